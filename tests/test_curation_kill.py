"""The whole command of curation, killed and started again."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from curation_tools import stamps


def command(workdir, *more):
    return [
        sys.executable,
        "-m",
        "florence_jax.curation.main",
        "--config=configs/curate.py",
        f"--workdir={workdir}",
        *more,
    ]


def run_to_end(workdir, *more):
    result = subprocess.run(command(workdir, *more), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split("root:")[1].strip()


@pytest.mark.slow
def test_kill_and_worker_matrix(tmp_path):
    """kill -9 of the whole process group at random moments; the end is that of an undisturbed run, and no finished
    part or shard is made again. 1, 2 and 4 workers give the same root."""
    start = time.monotonic()
    root = run_to_end(tmp_path / "plain", "--workers=2")
    seconds = time.monotonic() - start
    for workers in (1, 4):
        assert run_to_end(tmp_path / f"w{workers}", f"--workers={workers}") == root
    moments = np.random.default_rng(5).uniform(0.1, 1.0, 8) * seconds
    finished: dict = {}
    for moment in moments.tolist():
        process = subprocess.Popen(
            command(tmp_path / "killed", "--workers=2"),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        made = stamps(tmp_path / "killed", "measured/*.parquet") | stamps(tmp_path / "killed", "output/*.array_record")
        assert {name: made.get(name) for name in finished} == finished
        finished = made
    assert finished
    assert run_to_end(tmp_path / "killed", "--workers=2") == root
    made = stamps(tmp_path / "killed", "measured/*.parquet") | stamps(tmp_path / "killed", "output/*.array_record")
    assert {name: made.get(name) for name in finished} == finished


MOMENTS = ("clusters/edges/edges-00000.npy", "clusters/edges/round-01/edges-00000.npy", "clusters/sizes.json")
MOMENTS += ("decisions/log-00000.json", "output/manifest/written.json", "audit/facts.json")


@pytest.mark.slow
def test_killed_in_every_phase(tmp_path):
    """kill -9 as soon as a file of a phase is there, with components in rounds; the end is the undisturbed run's."""
    options = ("--workers=1", "--config.max_edges_in_memory=0")
    finished: dict = {}
    for moment in MOMENTS:
        process = subprocess.Popen(
            command(tmp_path / "killed", *options),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (tmp_path / "killed" / moment).exists():
            assert process.poll() is None
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        made = stamps(tmp_path / "killed", "measured/*.parquet") | stamps(tmp_path / "killed", "output/*.array_record")
        assert {name: made.get(name) for name in finished} == finished
        finished = made
    assert run_to_end(tmp_path / "killed", *options) == run_to_end(tmp_path / "plain", "--workers=1")
