"""A training on encoded clips, one in twenty of them broken, that is killed while its workers decode."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from video_files import encode, moving_frames

from florence_jax.train.metrics import read_metrics

pytest.importorskip("av")
ROOT = Path(__file__).parents[1]
STEPS, SAVED, KILLED = 10, 2, 5
BROKEN = "left/7.mp4"


@pytest.fixture
def clips(tmp_path):
    """Folder of twenty clips in two classes, one of which is cut off."""
    for name, step in (("left", -1), ("right", 1)):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "clips" / name / f"{i}.mp4").write_bytes(encode(moving_frames(40, (64, 96), i)[::step]))
    broken = tmp_path / "clips" / BROKEN
    broken.write_bytes(broken.read_bytes()[:500])
    return tmp_path / "clips"


def group_members(group):
    """Ids of the processes of a process group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def losses(workdir):
    """{step: everything in metrics.jsonl but speeds}."""
    lines = read_metrics(Path(workdir) / "metrics.jsonl")
    return {line["step"]: {k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines}


@pytest.mark.slow
def test_a_run_that_is_killed_while_workers_decode(weights, clips, tmp_path):
    """By kill -9, which leaves no process behind; run again it ends as an undisturbed run, and names what is broken."""
    flags = [
        "--config=configs/video.py:runlocal", f"--config.data.train={clips}", f"--config.data.test={clips}",
        f"--config.init={weights}", "--config.data.workers=2", f"--config.total_steps={STEPS}",
        f"--config.checkpoint.every={SAVED}",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}

    def start(name):
        command = [sys.executable, "-m", "florence_jax.main", *flags, f"--workdir={tmp_path / name}"]
        with (tmp_path / f"{name}.log").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)

    assert start("whole").wait(600) == 0, (tmp_path / "whole.log").read_text()
    victim = start("killed")
    while victim.poll() is None and max(losses(tmp_path / "killed"), default=0) < KILLED:
        time.sleep(0.01)
    assert len(group_members(victim.pid)) >= 3  # the trainer and two workers, which decode ahead of it
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    end = time.monotonic() + 60
    while group_members(victim.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not group_members(victim.pid)
    assert not (tmp_path / "killed" / "result.json").exists()
    assert start("killed").wait(600) == 0, (tmp_path / "killed.log").read_text()
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert results[0] == results[1] and results[0]["step"] == STEPS
    assert results[0]["skipped_records"] > 0 and results[0]["eval/test/skipped"] == 1
    assert f"cannot be used: record '{BROKEN}'" in (tmp_path / "whole.log").read_text()
