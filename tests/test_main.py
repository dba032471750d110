"""The command line: every mistake is one line on stderr and exit code 2, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny_images import run_main
from tiny_run import TINY_FLAGS, tiny_pairs

from florence_jax import main as entry
from florence_jax.jobs.stop_signals import EXIT_PREEMPTED
from florence_jax.train.loop import Trainer
from florence_jax.train.workdir import write_config

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "--config is missing"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config=configs/pretrain.py:variant=XL"], "unknown variant 'XL'; known: ti, T, S, B, L, H"),
        (["--config=configs/pretrain.py:size=3"], "unknown config argument 'size'; known: "),
        (["--config=configs/pretrain.py:res=big"], "res takes int values"),
        (["--config=configs/pretrain.py:stage=4"], "unknown stage 4"),
        (["--config=configs/pretrain.py:variant=ViT-L-14-336,stage=3"], "say its size, such as res=448"),
        (
            ["--config=configs/pretrain.py", "--config.total_step=3"],
            "unknown config key 'total_step': did you mean --config.total_steps?",
        ),
        (["--config=configs/pretrain.py", "--confg.total_steps=3"], "did you mean --config.total_steps?"),
        (["--config=configs/pretrain.py", "--nonsense=3"], "'nonsense'; --help lists the options"),
        (["--config=configs/pretrain.py", "--config.image.workers=2"], "did you mean --config.data.workers?"),
        (["--config=configs/pretrain.py", "--config.total_steps=many"], "total_steps"),
        (["--config=configs/pretrain.py", "--config.data=mine"], "is given by its name, as --config.data.NAME=VALUE"),
        (["--config=configs/pretrain.py", "total_steps=3"], "unexpected argument 'total_steps=3'"),
        (
            ["--config=configs/pretrain.py:runlocal", "--config.data.train=gone", "--workdir={}"],
            "'gone' does not exist",
        ),
        (
            ["--config=configs/pretrain.py:runlocal", "--workdir=/proc/florence"],
            "cannot write to --workdir=/proc/florence",
        ),
        (
            ["--config=configs/pretrain.py:runlocal", "--workdir=gs://bucket/run"],
            "--config.checkpoint.directory=gs://bucket/run/checkpoints",
        ),
        (["--config=configs/pretrain.py:runlocal", "--workdir=/dev/null/x"], "cannot write to --workdir=/dev/null/x"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path):
    workdir = tmp_path / "run"
    assert run_main(*(a.format(workdir) for a in arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not workdir.exists() or not (workdir / "checkpoints").exists()


def test_full_disk_is_one_line(capsys, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "train", full)
    pairs = tiny_pairs(tmp_path / "pairs")
    assert run_main(*TINY_FLAGS, f"--config.data.train={pairs}", f"--workdir={tmp_path}/run") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No space left on device" in line and "run the same command again" in line


def test_the_default_folder_is_another_for_other_data(weights, pictures, tmp_path, monkeypatch):
    begun = []

    def begin(config, suite, workdir):
        begun.append(workdir.name)
        workdir.mkdir(exist_ok=True)
        write_config(config, suite.identity, workdir)
        return 0

    monkeypatch.setattr(entry, "run", begin)
    fixed = ["--config=configs/retrieve.py:protocol=zeroshot", f"--config.init={weights}"]
    for source in (pictures, "emoji:new_names", pictures, f"{pictures}/", "emoji:new_style", "emoji:new_names"):
        assert run_main(*fixed, f"--config.eval.source={source}", f"--config.workdir={tmp_path}/base") == 0
    assert begun == ["base", "base_2", "base", "base", "base_3", "base_2"]
    assert run_main(*fixed, "--config.eval.source=emoji:new_names", f"--workdir={tmp_path}/base") == 0
    assert begun[-1] == "base"  # as it was told; `run` refuses it


def test_config_is_dumped_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_steps", lambda *_: False)
    pairs = tiny_pairs(tmp_path / "pairs")
    assert run_main(*TINY_FLAGS, f"--config.data.train={pairs}", f"--workdir={tmp_path}/run") == EXIT_PREEMPTED
    dumped = json.loads((tmp_path / "run" / "config.json").read_text())
    assert dumped["total_steps"] == 8 and dumped["data"]["train"] == pairs


@pytest.mark.parametrize("inside", ["time.sleep(60)", "sys.exit(130)"])
def test_ctrl_c_is_one_line_and_waits_for_nothing(inside):
    """Of any command, also where it left with that code by itself; its threads and processes would go on for long."""
    program = f"""
        import multiprocessing, sys, threading, time
        from florence_jax.command_line import enter

        def main():
            threading.Thread(target=time.sleep, args=(60,)).start()
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
            print("ready", flush=True)
            {inside}

        enter(main)
    """
    command = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert command.stdout.readline() == "ready\n"
    if "sleep" in inside:
        command.send_signal(signal.SIGINT)
    _, errors = command.communicate(timeout=30)
    assert command.returncode == 130 and errors.split("\n") == (
        ["", "stopped by Ctrl-C", ""] if "sleep" in inside else [""]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say whose processes are whose")
def test_ctrl_c_ends_workers_that_are_not_our_own():
    program = f"""
        import subprocess, sys, time
        from florence_jax.command_line import leave_at_ctrl_c

        leave_at_ctrl_c()
        subprocess.run([{sys.executable!r}, "-c", "import time; print('ready', flush=True); time.sleep(60)"])
    """
    command = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert command.stdout.readline() == "ready\n"
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does, to the worker too
    out, errors = command.communicate(timeout=30)  # returns when the worker has ended, which has the same pipe
    assert command.returncode == 130 and (out, errors) == ("", "\nstopped by Ctrl-C\n")


def test_every_command_is_entered_in_one_place():
    files = [path for path in (ROOT / "florence_jax").rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert len(files) > 10
    entered = ("enter(main)", "enter_with_flags(main)")
    others = [path.name for path in files if not path.read_text().rstrip().endswith(entered)]
    # The first imports nothing of the project, its process ends with the trainer's; the second is started by Beam.
    assert sorted(others) == ["roll_call.py", "worker.py"]
