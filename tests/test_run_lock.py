"""One run a workdir: who holds it is said, what a dead process left is taken over."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from florence_jax.errors import UserError
from florence_jax.jobs import run_lock
from florence_jax.jobs.run_lock import LOCK_FILE, only_run

ROOT = Path(__file__).parents[1]
HOLDING = """
import sys, time
from pathlib import Path
from florence_jax.jobs.run_lock import only_run

with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "SILENCE_SECONDS", 1.0)


def holder(workdir):
    return json.loads((workdir / LOCK_FILE).read_text())


def test_a_second_process_is_told_who_holds_it_until_that_is_killed(tmp_path, capsys):
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by another run: process {other.pid} on .*, since 20.*--workdir"):
            with only_run(tmp_path):
                pytest.fail("two runs")
        assert holder(tmp_path)["pid"] == other.pid
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with only_run(tmp_path):
        assert holder(tmp_path)["pid"] == os.getpid()
    assert f"taking over {tmp_path}, which process {other.pid} on " in capsys.readouterr().out
    assert not (tmp_path / LOCK_FILE).exists()


def test_the_lock_goes_with_an_error(tmp_path):
    with pytest.raises(ValueError, match="mistake"), only_run(tmp_path):
        raise ValueError("mistake")
    assert not list(tmp_path.iterdir())


def test_a_number_that_was_given_again_is_not_the_same_process(tmp_path):
    with only_run(tmp_path):
        old = holder(tmp_path)
    (tmp_path / LOCK_FILE).write_text(json.dumps(old | {"born": "another boot 1"}))  # as in a container, started again
    with only_run(tmp_path):
        assert holder(tmp_path)["mark"] != old["mark"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("left", ['{"host": "far pid:[1]", "pid": 7, "born": "x", "since": "then", "mark": "m"}', ""])
def test_what_gives_no_sign_of_life_is_taken_over(left, tmp_path, capsys):
    (tmp_path / LOCK_FILE).write_text(left)
    with only_run(tmp_path):
        assert holder(tmp_path)["pid"] == os.getpid()
    said = capsys.readouterr().out
    assert ("process 7 on far, since then: waiting" in said) == bool(left) and "taking over" in said


@pytest.mark.usefixtures("quick")
def test_a_process_on_another_host_gives_signs_of_life(tmp_path, monkeypatch):
    with only_run(tmp_path):
        monkeypatch.setattr(run_lock, "_host", lambda: "far pid:[1]")
        with pytest.raises(UserError, match=rf"in use by another run: process {os.getpid()} on "), only_run(tmp_path):
            pytest.fail("two runs")
    assert not (tmp_path / LOCK_FILE).exists()


def test_only_process_0_of_a_job_holds_it(tmp_path, monkeypatch):
    with only_run(tmp_path):
        monkeypatch.setattr("jax.process_index", lambda: 1)
        with only_run(tmp_path):
            assert holder(tmp_path)["pid"] == os.getpid()
        monkeypatch.undo()
