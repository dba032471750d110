"""The watchers beside the processes of a job, without JAX: who is missing, who died, who went silent."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Stands for a training process: starts its watcher, prints what it says, leaves with 69 when told.
TRAINER = """
import os, subprocess, sys
command = [sys.executable, "-m", "florence_jax.jobs.roll_call", *sys.argv[1:]]
watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
print(watcher.pid, flush=True)
for word in watcher.stdout:
    print(word.strip(), flush=True)
    if word == "end\\n":
        os._exit(69)
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Job:
    """Processes `indices` of a job of `count`; `watchers` are the process ids of their watchers."""

    def __init__(self, indices, count, *, start_timeout=20.0, lost_after=20.0, counts=None):
        port = free_port()
        self.processes = {}
        for index in indices:
            arguments = [
                f"--index={index}",
                f"--count={(counts or {}).get(index, count)}",
                f"--address=127.0.0.1:{port}",
                f"--port={port}",
                f"--start-timeout={start_timeout}",
                f"--lost-after={lost_after}",
            ]
            self.processes[index] = subprocess.Popen(
                [sys.executable, "-c", TRAINER, *arguments],
                cwd=ROOT,
                text=True,
                **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
            )
        self.watchers = {index: int(process.stdout.readline()) for index, process in self.processes.items()}

    def wait_ready(self):
        for process in self.processes.values():
            assert process.stdout.readline() == "ready\n"

    def say(self, index, text):
        self.processes[index].stdin.write(text + "\n")
        self.processes[index].stdin.flush()

    def end(self):
        """{process: (exit code, what it wrote on stderr)}."""
        codes = {index: process.wait(timeout=30) for index, process in self.processes.items()}
        return {index: (code, self.processes[index].stderr.read().strip()) for index, code in codes.items()}


def test_missing_processes_are_named_to_all_that_came():
    here = socket.gethostname()
    for code, error in Job([0, 2], 4, start_timeout=2.0).end().values():
        assert code == 69 and len(error.splitlines()) == 1
        assert error.startswith(f"error: missing after 2 s: process 1, 3 of 4 (numbered from 0); here: 0 ({here}), 2 (")


def test_without_process_0_the_others_say_so():
    ((code, error),) = Job([1], 2, start_timeout=1.0).end().values()
    assert code == 69 and len(error.splitlines()) == 1
    assert "missing after 1 s: process 0 of 2 does not answer at 127.0.0.1, port " in error


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_at_once(victim):
    job = Job([0, 1, 2], 3)
    job.wait_ready()
    job.processes[victim].kill()
    began = time.monotonic()
    ended = job.end()
    assert time.monotonic() - began < 10
    assert {index: code for index, (code, _) in ended.items()} == {0: 69, 1: 69, 2: 69} | {victim: -signal.SIGKILL}
    for _, error in ended.values():
        assert error == f"error: process {victim} on {socket.gethostname()} was killed or crashed"


@pytest.mark.parametrize("victim,name", [(0, "process 0 at 127.0.0.1:"), (2, f"process 2 on {socket.gethostname()} ")])
def test_silence_is_noticed(victim, name):
    job = Job([0, 1, 2], 3, lost_after=2.0)
    job.wait_ready()
    os.kill(job.watchers[victim], signal.SIGSTOP)  # as if its machine had dropped out of the network
    for index in {0, 1, 2} - {victim}:
        code = job.processes[index].wait(timeout=20)
        error = job.processes[index].stderr.read()
        assert code == 69 and name in error and "gave no sign of life for 2 s" in error
    os.kill(job.watchers[victim], signal.SIGKILL)
    job.processes[victim].kill()
    job.processes[victim].wait()


def test_a_mistake_on_one_is_told_to_the_others():
    job = Job([0, 1], 2)
    job.wait_ready()
    job.say(1, "stopped 'my_pictures' does not exist")
    code, error = job.end()[0]
    assert code == 69 and f"process 1 on {socket.gethostname()} stopped: 'my_pictures' does not exist" in error


def test_processes_meet_where_all_have_come():
    job = Job([0, 1, 2], 3)
    job.wait_ready()
    for index, name in ((1, "first"), (0, "second"), (2, "first"), (1, "second"), (2, "second"), (0, "first")):
        job.say(index, f"meet {name}")
    for process in job.processes.values():
        assert {process.stdout.readline() for _ in range(2)} == {"met first\n", "met second\n"}
    for index in (2, 1, 0):
        job.say(index, "bye")
    assert job.end() == dict.fromkeys(range(3), (0, ""))


def test_a_good_end_is_no_alarm():
    job = Job([0, 1], 2)
    job.wait_ready()
    for index in (1, 0):
        job.say(index, "bye")
    assert job.end() == {0: (0, ""), 1: (0, "")}


def test_different_numbers_of_processes_are_one_message():
    for code, error in Job([0, 1], 2, counts={1: 3}).end().values():
        assert code == 69 and "started as one of 3 processes, process 0" in error
