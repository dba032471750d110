"""Jobs of several real processes on this machine: the same run as one process, killed, preempted, resumed."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from test_roll_call import free_port
from tiny_run import TINY_FLAGS, tiny_config, tiny_pairs

from florence_jax.errors import EXIT_INTERRUPTED, UserError
from florence_jax.jobs.hosts import EXIT_LOST, ProcessInfo, connect_on_cluster, meet, process_from_environment
from florence_jax.jobs.stop_signals import EXIT_PREEMPTED
from florence_jax.tasks import create_task
from florence_jax.train.loop import Trainer
from florence_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
LOST_AFTER = 20


class Job:
    """`count` processes of `arguments`, with `devices` simulated devices each; their output is in `folder`."""

    started: ClassVar[list["Job"]] = []

    def __init__(self, folder, arguments, count, devices):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"{i}-of-{count}.log" for i in range(count)]
        shared = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(count),
            "PYTHONPATH": str(ROOT),
        }
        self.processes = []
        Job.started.append(self)
        for i, log in enumerate(self.logs):
            with log.open("w") as file:
                environment = shared | {"JAX_PROCESS_ID": str(i)}
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                )

    def wait(self, timeout=900):
        """Exit codes of all."""
        deadline = time.monotonic() + timeout
        return [process.wait(deadline - time.monotonic()) for process in self.processes]

    def output(self, i):
        return "".join(line for line in self.logs[i].read_text().splitlines(True) if not line.startswith("[Gloo]"))


def training(workdir, pairs, count, devices, *flags):
    arguments = [
        *("-m", "florence_jax.main", *TINY_FLAGS, "--config.distributed=True"),
        *(f"--config.data.train={pairs}", f"--config.eval.source={pairs}", f"--workdir={workdir}"),
        f"--config.hosts.lost_after={LOST_AFTER}",
        *flags,
    ]
    return Job(workdir / "logs", arguments, count, devices)


def losses(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def results(workdir):
    return json.loads((workdir / "result.json").read_text())


def assert_close(workdir, reference):
    """The same steps, losses equal to 1e-6 relative (another order of the sums), and the same evaluation."""
    a, b = losses(workdir), losses(reference)
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-6)
    assert results(workdir) == results(reference)


def wait_for_step(workdir, step, job):
    """Until that step is logged and a checkpoint is complete: it is written while the training goes on."""
    checkpoints = workdir / "checkpoints"
    while max(losses(workdir), default=0) < step or not any(path.name.isdigit() for path in checkpoints.glob("*")):
        assert all(process.poll() is None for process in job.processes), job.output(0) + job.output(1)
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _nothing_left_running():
    yield
    for job in Job.started:
        for process in job.processes:
            process.kill()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return tiny_pairs(tmp_path_factory.mktemp("pairs"))


def one_process(workdir, pairs, devices, **changes):
    workdir.mkdir()
    config = tiny_config(pairs, **changes)
    assert Trainer(config, create_task(config), workdir, jax.devices()[:devices]).train() == 0
    return workdir


def test_two_processes_are_the_same_run_as_one(pairs, tmp_path):
    job = training(tmp_path / "two", pairs, 2, 1, "--config.total_steps=4")
    reference = one_process(tmp_path / "one", pairs, 2, total_steps=4)
    assert job.wait() == [0, 0], job.output(0) + job.output(1)
    assert_close(tmp_path / "two", reference)
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == 4
    assert "results in" in job.output(0) and "results in" not in job.output(1) and "loss" not in job.output(1)


ROWS = """
import json, sys
import jax, numpy as np
from ml_collections import ConfigDict
from florence_jax.data.sources.catalog import open_source
from florence_jax.evaluators.predictor import Embedder, Predictor
from florence_jax.jobs.hosts import joined
from florence_jax.params.sharding import BATCH_AXES

class Lengths:
    length = 40
    def encode_batch(self, texts):
        return np.array([[len(text)] for text in texts], np.int32).reshape(-1, 1)
    def lengths(self, ids):
        return np.ones(len(ids), np.int32)

with joined(ConfigDict({"start_timeout": 60.0, "lost_after": 20.0, "port": 0})):
    order = json.loads(sys.argv[2])
    mesh = jax.sharding.Mesh(np.array(jax.devices())[order].reshape(-1, 1), BATCH_AXES)
    predict = {"text": lambda params, batch: batch["text"] * 1.0,
               "image": lambda params, batch: batch["image"].mean((1, 2)) * 1.0}
    embedder = Embedder(predict, Lengths(), mesh, 12)
    texts = embedder.texts(None, ["x" * n for n in range(1, 31)])
    images = embedder.images(None, open_source(sys.argv[1]), "decode|resize(8)|keep(image)")
    predictor = Predictor(lambda params, batch: {"red": batch["image"][:, 0, 0, 0]}, mesh, 12)
    source = open_source(sys.argv[1])
    rows = list(predictor.rows(None, source, "decode|resize(8)|keep(image, key)", {}, host=("key",)))
    assert [row["key"] for row in rows] == [row["key"] for row in source.metadata()]
    reds = [int(row["red"]) for row in rows]
    print(json.dumps([texts.ravel().tolist(), images["index"].tolist(), images["embedding"].tolist(), reds]))
"""


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_evaluation_keeps_its_rows_where_devices_of_a_host_are_no_neighbours(count, pairs, tmp_path):
    order = [0, 2, 1, 3]
    job = Job(tmp_path, ["-c", ROWS, pairs, json.dumps(order)], count, 4 // count)
    assert job.wait(120) == [0] * count, job.output(0)
    printed = [json.loads(job.output(i).splitlines()[-1]) for i in range(count)]
    texts, index, pixels, reds = printed[0]
    assert printed == [printed[0]] * count
    assert texts == list(range(1, 31)) and index == list(range(48))
    assert len(np.unique(pixels, axis=0)) > 40 and len(reds) == 48


def test_the_place_is_read_from_the_environment(monkeypatch):
    for name, value in zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), ("h:65500", "4", "3"), strict=True):
        monkeypatch.setenv(f"JAX_{name}", value)
    assert process_from_environment() == ProcessInfo("h:65500", 4, 3) and process_from_environment().watch_port == 65400
    monkeypatch.setenv("JAX_PROCESS_ID", "4")
    with pytest.raises(UserError, match="JAX_PROCESS_ID=4: give HOST:PORT"):
        process_from_environment()
    monkeypatch.delenv("JAX_PROCESS_ID")
    assert process_from_environment() is None
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    with pytest.raises(UserError, match="this is no TPU slice, SLURM, Kubernetes or MPI job.*: set JAX_COORD"):
        connect_on_cluster({"initialization_timeout": 1})


def test_one_process_waits_for_nobody():
    meet("nobody")


@pytest.mark.slow
def test_one_two_and_four_processes_are_the_same_run(pairs, tmp_path):
    reference = one_process(tmp_path / "1", pairs, 4)
    for count in (2, 4):
        job = training(tmp_path / str(count), pairs, count, 4 // count)
        assert job.wait() == [0] * count, job.output(0)
        assert_close(tmp_path / str(count), reference)


def wait_for_line(line, job, i):
    """The watcher of a process that JAX aborted writes its line a moment after the process has ended."""
    deadline = time.monotonic() + 15
    while line not in job.output(i):
        assert time.monotonic() < deadline, job.output(i)
        time.sleep(0.1)


LONG = ("--config.total_steps=40", "--config.checkpoint.every=5", "--config.eval.every=15")


@pytest.fixture(scope="module")
def undisturbed(pairs, tmp_path_factory):
    """40 steps on two processes with two devices each."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    job = training(workdir, pairs, 2, 2, *LONG)
    assert job.wait() == [0, 0], job.output(0)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_at_a_random_step_and_restarted_with_four_processes(victim, undisturbed, pairs, tmp_path):
    at = random.SystemRandom().randrange(6, 30)
    job = training(tmp_path, pairs, 2, 2, *LONG)
    wait_for_step(tmp_path, at, job)
    job.processes[victim].kill()
    killed = time.monotonic()
    codes = job.wait(2 * LOST_AFTER)
    seconds = time.monotonic() - killed
    # JAX itself aborts the others where its coordinator, process 0, died.
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] in (
        (EXIT_LOST,) if victim else (EXIT_LOST, -signal.SIGABRT)
    )
    line = f"error: process {victim} on {socket.gethostname()} was killed or crashed"
    wait_for_line(line, job, 1 - victim)
    again = training(tmp_path, pairs, 4, 1, *LONG)
    assert again.wait() == [0] * 4, again.output(0)
    (resumed,) = [line for line in again.output(0).splitlines() if line.startswith("resuming")]
    assert_close(tmp_path, undisturbed)
    a, b = losses(tmp_path), losses(undisturbed)
    print(f"process {victim} of 2 killed with -9 after step {at}; the other ended {seconds:.1f} s later: {line}")
    print(f"restarted with 4 processes: {resumed}")
    print(f"largest relative difference of the 40 losses: {max(abs(a[s] - b[s]) / b[s] for s in b):.1e}")


@pytest.mark.slow
@pytest.mark.parametrize("number,code", [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGINT, EXIT_INTERRUPTED)])
def test_a_signal_to_one_process_stops_all_at_one_step_and_resumes_bit_for_bit(
    number, code, undisturbed, pairs, tmp_path
):
    job = training(tmp_path, pairs, 2, 2, *LONG)
    wait_for_step(tmp_path, 3, job)
    job.processes[1].send_signal(number)
    assert job.wait() == [EXIT_PREEMPTED, code], job.output(0) + job.output(1)
    step = max(losses(tmp_path))
    assert f"stopped by SIGTERM at step {step}, saved" in job.output(0) and step < 40
    assert (tmp_path / "checkpoints" / str(step)).exists()
    again = training(tmp_path, pairs, 2, 2, *LONG)
    assert again.wait() == [0, 0], again.output(0)
    assert f"at step {step} of 40" in again.output(0)
    assert losses(tmp_path) == losses(undisturbed) and results(tmp_path) == results(undisturbed)


WAITING = """
import time
from ml_collections import ConfigDict
from florence_jax.jobs.hosts import joined

with joined(ConfigDict({"start_timeout": 60.0, "lost_after": 20.0, "port": 0})):
    print("up", flush=True)
    time.sleep(120)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_all_end_when_one_is_killed_outside_a_collective(victim, tmp_path):
    job = Job(tmp_path, ["-c", WAITING], 3, 1)
    while any("up" not in job.output(i) for i in range(3)):
        time.sleep(0.05)
    job.processes[victim].kill()
    codes = job.wait(15)
    for i, code in enumerate(codes):
        expected = (-signal.SIGKILL,) if i == victim else (EXIT_LOST,) if victim else (EXIT_LOST, -signal.SIGABRT)
        assert code in expected
        wait_for_line(f"error: process {victim} on {socket.gethostname()} was killed or crashed", job, i)


@pytest.mark.slow
def test_a_damaged_checkpoint_of_several_processes_is_passed_over_at_the_next_start(pairs, tmp_path):
    assert training(tmp_path, pairs, 2, 1).wait() == [0, 0]
    for file in (tmp_path / "checkpoints" / "8").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    (tmp_path / "result.json").unlink()
    job = training(tmp_path, pairs, 2, 1)
    assert set(job.wait()) == {EXIT_LOST}
    assert "is damaged" in job.output(0) + job.output(1)
    job = training(tmp_path, pairs, 2, 1)
    assert job.wait() == [0, 0] and "at step 6 of 8" in job.output(0)
    assert results(tmp_path)["step"] == 8


@pytest.mark.slow
def test_a_mistake_on_one_process_ends_all(pairs, tmp_path):
    script = (
        "import os, runpy, sys; sys.argv += ['--config.data.train=gone'] * (os.environ['JAX_PROCESS_ID'] == '1'); "
        "runpy.run_module('florence_jax.main', run_name='__main__')"
    )
    arguments = ["-c", script, *TINY_FLAGS, "--config.distributed=True", f"--config.data.train={pairs}"]
    job = Job(tmp_path / "logs", [*arguments, f"--workdir={tmp_path}/run"], 2, 1)
    assert job.wait(120) == [EXIT_LOST, 2]
    assert f"process 1 on {socket.gethostname()} stopped: data source 'gone' does not exist" in job.output(0)
