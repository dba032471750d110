"""Worker processes by the cores that a process may use."""

import os

import pytest

from florence_jax.jobs import hardware


@pytest.mark.parametrize(
    "cores,limit,wanted,expected",
    [
        (2, "max 100000", -1, 0),
        (1, "", -1, 0),
        (6, "max 100000", -1, 4),
        (64, "", -1, 8),
        (64, "400000 100000", -1, 2),  # a container with four of the cores
        (64, "50000 100000", -1, 0),
        (2, "", 3, 3),
    ],
)
def test_worker_processes_follow_the_machine(cores, limit, wanted, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(hardware, "CPU_LIMIT", tmp_path / "cpu.max")
    if limit:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert hardware.worker_count(wanted) == expected
