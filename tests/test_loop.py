"""Whole runs: files, resuming bit for bit after kill -9 and SIGTERM, evaluation alone, errors that speak."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import TINY_FLAGS, at_step, tiny_config, tiny_pairs

from florence_jax.data.sources.array_record import write_array_record
from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import EXIT_INTERRUPTED, UserError
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.jobs.stop_signals import EXIT_PREEMPTED, StopSignals
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.sharding import make_mesh
from florence_jax.tasks import create_suite, create_task
from florence_jax.tasks.pretrain import Pretrain
from florence_jax.train.loop import Trainer, run
from florence_jax.train.metrics import read_metrics
from florence_jax.train.workdir import check_same_run

ROOT = Path(__file__).parents[1]


def train(config, workdir):
    return run(config, create_suite(config), Path(workdir))


def values(workdir):
    """{step: {name: value}} of everything in metrics.jsonl but speeds."""
    return {
        line["step"]: {name: value for name, value in line.items() if not name.startswith("perf/")}
        for line in read_metrics(Path(workdir) / "metrics.jsonl")
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return tiny_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def finished(pairs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "finished"
    assert train(tiny_config(pairs), workdir) == 0
    return workdir


def test_a_run_leaves_its_files(finished):
    assert {"metrics.jsonl", "result.json", "report.html", "checkpoints", "tensorboard"} <= {
        path.name for path in finished.iterdir()
    }
    assert not list(finished.glob("*.tmp"))
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert {"train/loss", "train/floor", "perf/step_seconds", "perf/data_wait_share"} <= lines[0].keys()
    assert lines[0]["perf/data_cpu_share"] > 0
    result = json.loads((finished / "result.json").read_text())
    assert result["step"] == 8 and 0 <= result["eval/held_out/i2t_r@10"] <= 1
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["6", "8", "model.json"]
    assert next((finished / "tensorboard").glob("events*")).stat().st_size > 0


def test_a_finished_run_says_so_and_touches_nothing(finished, pairs, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert train(tiny_config(pairs), finished) == 0
    assert "is finished: step 8 of 8" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_that_ended_in_its_evaluation_gets_its_result(finished, pairs, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    for name in ("result.json", "report.html"):
        (workdir / name).unlink()
    assert train(tiny_config(pairs), workdir) == 0
    assert (workdir / "result.json").read_text() == (finished / "result.json").read_text()
    assert (workdir / "report.html").exists()


def test_evaluation_alone_gives_the_same_numbers(finished, pairs, capsys):
    expected = json.loads((finished / "result.json").read_text())
    assert train(tiny_config(pairs, mode="eval"), finished) == 0
    assert json.loads((finished / "result.json").read_text()) == expected
    table = capsys.readouterr().out
    assert "chance" in table and "eval/held_out/i2t_r@1" in table


def test_another_architecture_is_one_message_with_all_mismatches(finished, pairs, tmp_path):
    config = tiny_config(pairs, **{"model.overrides.projection": 24})
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "config.json").unlink()  # else its options are compared
    with pytest.raises(UserError, match="another architecture") as error:
        train(config, workdir)
    for name in ("params/image_projection/kernel", "params/text_projection/kernel", "ema/text_projection/kernel"):
        assert name in str(error.value)
    assert not (workdir / "config.json").exists()


def test_other_data_in_the_same_workdir_is_one_message(finished, tmp_path):
    finished = shutil.copytree(finished, tmp_path / "run")
    (finished / "checkpoints" / "12.orbax-checkpoint-tmp-0").mkdir()  # what a live run there may be writing
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    other = tiny_pairs(tmp_path / "other")
    with pytest.raises(UserError, match=f"holds a run with config.data.train=.*would now be '{other}'.*--workdir"):
        train(tiny_config(other, total_steps=12), finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "name,value,said",
    [
        ("text.tokenizer", "{}/pieces.model", "config.text.tokenizer='sentencepiece', which would now be '{}"),
        ("model.overrides.text_heads", 1, "config.model.overrides.text_heads=2, which would now be 1"),
        ("model.overrides.image_mean", (0.5, 0.5, 0.5), "config.model.overrides.image_mean=[0.485, "),
        ("data.captions", "caption=1", "config.data.captions='caption=1|key"),
        ("data.train_ops", "decode|resize({res})|center_crop({res})", "config.data.train_ops='decode|shrink"),
        ("init", "{}/elsewhere", "config.init='', which would now be '{}/elsewhere'"),
    ],
)
def test_what_shapes_do_not_show_is_compared(finished, pairs, tmp_path, mode, name, value, said):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    shutil.copy(ROOT / "florence_jax" / "data" / "emoji" / "tokenizer.model", tmp_path / "pieces.model")
    value = value.replace("{}", str(tmp_path)) if isinstance(value, str) else value
    config = tiny_config(pairs, mode=mode, total_steps=12, **{name: value})
    with pytest.raises(UserError) as error:
        train(config, finished)
    assert said.replace("{}", str(tmp_path)) in str(error.value) and "another --workdir" in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_another_seed_is_another_run(finished, pairs):
    with pytest.raises(UserError, match="config.seed=0, which would now be 1.*another --workdir"):
        train(tiny_config(pairs, seed=1, total_steps=12), finished)


def test_the_same_data_may_be_named_otherwise(finished, pairs):
    relative = os.path.relpath(pairs) + "/"
    assert train(tiny_config(relative), finished) == 0


def test_results_of_one_thing_never_replace_those_of_another(finished, pairs, tmp_path):
    workdir, other = shutil.copytree(finished, tmp_path / "run"), tiny_pairs(tmp_path / "other", 16)
    before = {name: (workdir / name).read_bytes() for name in ("result.json", "report.html", "config.json")}

    def evaluated(init="", folder=workdir, **changes):
        return train(tiny_config(pairs, mode="eval", init=init, **changes), folder)

    with pytest.raises(UserError, match=f"holds results with config.eval.source=.*would now be '{other}'.*--config.in"):
        evaluated(**{"eval.source": other})
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json says what of.*another --workdir"):
        evaluated(init="elsewhere")
    (workdir / "config.json").write_bytes(before["config.json"])
    assert {name: (workdir / name).read_bytes() for name in before} == before
    found = tmp_path / "found"  # of these weights, elsewhere
    assert evaluated(str(workdir), found, **{"eval.source": other}) == 0
    assert json.loads((found / "result.json").read_text())["eval/held_out/images"] == 16
    with pytest.raises(UserError, match="holds a run with config.init="):
        evaluated(str(finished), found, **{"eval.source": other})
    shutil.rmtree(workdir / "checkpoints")
    for again in (lambda: train(tiny_config(pairs), found), evaluated):
        with pytest.raises(UserError, match="holds a result.json but no checkpoints"):
            again()


def test_a_run_may_be_evaluated_on_more_data(finished, pairs, pictures, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    config = tiny_config(pairs, mode="eval", **{"data.test": pictures})
    assert train(config, workdir) == 0
    result, written = (json.loads((workdir / name).read_text()) for name in ("result.json", "config.json"))
    assert "eval/test/top1" in result and result["eval/held_out/images"] == 48
    assert written["mode"] == "train" and written["identity"]["data.test"] == pictures
    with pytest.raises(UserError, match="holds results with config.data.test="):
        train(tiny_config(pairs, mode="eval"), workdir)


def test_a_config_json_that_cannot_be_read_is_one_message(pairs, tmp_path):
    (tmp_path / "config.json").write_text('{"task": "pre')
    with pytest.raises(UserError, match=r"cannot read .*config\.json.*--workdir"):
        check_same_run({"task": "pretrain"}, tiny_config(pairs), tmp_path)


def test_a_mixture_named_otherwise_is_the_same(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"identity": {"data.train": "emoji:train|a*2|b"}}')
    check_same_run({"data.train": f"emoji:train | {tmp_path}/a/*2 | ./b/"}, tiny_config(pairs), tmp_path)
    with pytest.raises(UserError, match="holds a run with config.data.train"):
        check_same_run({"data.train": "emoji:train|a*3|b"}, tiny_config(pairs), tmp_path)


def test_a_mistake_in_the_evaluation_costs_no_training(pairs, tmp_path):
    with pytest.raises(UserError, match="'gone' does not exist"):
        train(tiny_config(pairs, **{"eval.source": "gone"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pretraining_is_watched_by_images_and_by_pairs(pictures):
    task = create_task(tiny_config(pictures, **{"data.test": pictures}))
    assert [evaluator.name for evaluator in task.evaluators(make_mesh(-1, 1))] == ["test", "held_out"]


def restored(config, workdir):
    """Newest state of a run, as `config` wants it."""
    checkpoints = Checkpoints(str(workdir / "checkpoints"), read_only=True)
    state = checkpoints.restore(Trainer(config, create_task(config), workdir).target)
    checkpoints.close()
    return state


def test_the_first_moment_may_get_another_dtype(finished, pairs, capsys):
    """A step with it is taken in test_precision.py."""
    config = tiny_config(pairs, **{"optim.mu_dtype": "bfloat16"})
    assert train(config, finished) == 0
    assert "resuming" in (said := capsys.readouterr()).out and "damaged" not in said.err
    state, before = restored(config, finished), restored(tiny_config(pairs), finished)
    kinds = set()
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b.astype(a.dtype))
        kinds.add((a.dtype.name, b.dtype.name))
    assert kinds == {("bfloat16", "float32"), ("float32", "float32"), ("int32", "int32")}


def test_parameters_can_start_from_another_run(finished, pairs, tmp_path):
    config = tiny_config(pairs, init=str(finished / "checkpoints"))
    state = Trainer(config, create_task(config), tmp_path).initial_state()
    before = restored(tiny_config(pairs), finished)
    jax.tree.map(np.testing.assert_array_equal, state["params"], before["params"])
    assert int(state["step"]) == 0 and int(before["step"]) == 8


def test_killed_run_continues_bit_for_bit(finished, pairs, tmp_path):
    """kill -9 at a random step; the rerun, with worker processes, gives the undisturbed run's values."""
    flags = [f"--workdir={tmp_path}", f"--config.data.train={pairs}", f"--config.eval.source={pairs}"]
    command = [sys.executable, "-m", "florence_jax.main", *TINY_FLAGS, *flags]
    options = dict(
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    at = random.SystemRandom().randrange(2, 8)
    victim = subprocess.Popen(command, **options)
    while victim.poll() is None and max(values(tmp_path), default=0) < at:
        time.sleep(0.01)
    victim.kill()
    victim.communicate()
    (tmp_path / "result.json").unlink(missing_ok=True)
    again = subprocess.run([*command, "--config.data.workers=1"], **options)
    assert again.returncode == 0, again.stdout.decode()
    assert values(tmp_path) == values(finished), f"killed at step {at}"
    results = [json.loads((workdir / "result.json").read_text()) for workdir in (tmp_path, finished)]
    assert results[0] == results[1]
    assert b"eval/held_out/i2t_r@1" in again.stdout


class Poisoned(Pretrain):
    """Its parameters are not numbers, so that its losses are none."""

    def init(self, key):
        return jax.tree.map(lambda leaf: leaf * jnp.nan, super().init(key))


@pytest.mark.parametrize(
    "number,code,said",
    [
        (signal.SIGTERM, EXIT_PREEMPTED, "SIGTERM"),
        (signal.SIGINT, EXIT_INTERRUPTED, "Ctrl-C"),
        (signal.SIGHUP, EXIT_PREEMPTED, "SIGHUP: its terminal was closed"),
    ],
)
def test_a_signal_saves_and_the_rerun_continues_bit_for_bit(
    number, code, said, finished, pairs, tmp_path, capsys, monkeypatch
):
    config, handler = tiny_config(pairs), signal.getsignal(number)
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    assert train(config, tmp_path) == code
    assert f"stopped by {said} at step 3, saved" in capsys.readouterr().out and signal.getsignal(number) == handler
    assert max(values(tmp_path)) == 3 and (tmp_path / "checkpoints" / "3").exists()
    if number == signal.SIGTERM:  # what goes on does not know which it was
        assert train(config, tmp_path) == 0
        assert "resuming" in capsys.readouterr().out
        assert values(tmp_path) == values(finished)


def test_a_second_interrupt_ends_at_once_and_waits_for_the_save(pairs, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 5, twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(pairs), tmp_path)
    assert (tmp_path / "checkpoints" / "4").exists()


def test_ctrl_c_in_a_job_of_several_processes_is_passed_on_once(monkeypatch):
    """As SIGTERM, which JAX takes and all processes agree on; here nobody does, and it stays with Python."""
    passed, kill = [], os.kill
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with StopSignals() as signals:
        monkeypatch.setattr(os, "kill", lambda pid, number: passed.append(number))
        kill(os.getpid(), signal.SIGINT)
        assert passed == [signal.SIGTERM] and signals.exit_code == EXIT_INTERRUPTED and signals.meaning == "Ctrl-C"


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not signals.wanted(0)
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_a_failure_right_after_a_save_waits_for_it(pairs, tmp_path, monkeypatch):
    def fail():
        raise UserError("the disk of the data is gone")

    at_step(monkeypatch, 5, fail)
    with pytest.raises(UserError, match="disk of the data"):
        train(tiny_config(pairs), tmp_path)
    assert (tmp_path / "checkpoints" / "4").exists()


def test_damaged_newest_checkpoint_is_passed_over(finished, pairs, tmp_path, capsys):
    config = tiny_config(pairs)
    workdir = shutil.copytree(finished, tmp_path / "run")
    for file in (workdir / "checkpoints" / "8").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    assert train(config, workdir) == 0
    out, err = capsys.readouterr()
    assert "at step 6 of 8" in out
    (line,) = [line for line in err.splitlines() if "warning" in line]
    assert "checkpoints/8 is damaged" in line and "the one before it is used" in line
    assert values(workdir) == values(finished)
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert names[:2] == ["6", "8"] and names[2].startswith("8.damaged-")


def test_the_only_checkpoint_damaged_is_one_message(finished, pairs, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "6")
    os.remove(workdir / "checkpoints" / "8" / "default" / "manifest.ocdbt")
    with pytest.raises(UserError, match="checkpoints/8 is damaged and there is no earlier one"):
        train(tiny_config(pairs), workdir)
    assert (workdir / "checkpoints" / "8").exists()


def test_checkpoints_can_be_elsewhere(pairs, tmp_path):
    elsewhere = {"checkpoint.directory": str(tmp_path / "elsewhere"), "eval.source": ""}
    elsewhere |= {"checkpoint.every": 0, "log.every": 0}  # only at the end
    assert train(tiny_config(pairs, **elsewhere), tmp_path / "run") == 0
    assert (tmp_path / "elsewhere" / "8").exists() and not (tmp_path / "run" / "checkpoints").exists()
    assert train(tiny_config(pairs, mode="eval", **elsewhere), tmp_path / "run") == 0


class Sleeps(Evaluator):
    """Takes long, and leaves a file."""

    name, charts = "sleep", (Chart("sleep", {"": "seconds"}),)

    def run(self, params):
        time.sleep(2.0)
        return {"seconds": 2.0}

    def files(self):
        return {"dreams.json": b"[]"}


def test_a_stalled_step_is_reported_with_all_stacks_and_an_evaluation_is_not(pairs, tmp_path, capfd, monkeypatch):
    config = tiny_config(pairs, **{"watchdog.seconds": 1.0, "eval.every": 3})
    at_step(monkeypatch, 3, lambda: time.sleep(2.0))
    monkeypatch.setattr(Pretrain, "evaluators", lambda self, mesh: [Sleeps()])
    assert train(config, tmp_path) == 0
    err = capfd.readouterr().err
    reports = [line for line in err.splitlines() if line.startswith("watchdog: ")]
    assert sum("step 3 on process 0 has taken more than 1 s" in line for line in reports) == 1
    assert not any("step 1 " in line for line in reports)  # it compiles
    assert "in __next__" in err and "in _steps" in err and "in _watch" in err
    assert "in evaluate" not in err and "in save" not in err
    assert (tmp_path / "dreams.json").read_bytes() == b"[]"
    page = (tmp_path / "report.html").read_text()
    assert ">sleep</text>" in page and page.index("training loss") < page.index(">sleep</text>")


def test_a_trace_of_some_steps_is_written(pairs, tmp_path):
    train(tiny_config(pairs, **{"profile.steps": (3, 4), "eval.source": ""}), tmp_path)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_non_finite_loss_names_the_step_and_saves_nothing(pairs, tmp_path):
    config = tiny_config(pairs)
    with pytest.raises(UserError, match="loss of step 1 is nan"):
        run(config, Poisoned(config), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["model.json"]


def test_corrupt_record_is_counted_and_skipped_or_an_error(tmp_path):
    source = open_source("emoji:train")
    records = [source[i] for i in range(40)]
    records[7] = records[7] | {"image": b"RIFFnot a picture", "key": "broken/one"}
    (tmp_path / "data").mkdir()
    write_array_record(str(tmp_path / "data" / "pairs.array_record"), records)
    data = str(tmp_path / "data")
    assert train(tiny_config(data, **{"eval.source": ""}), tmp_path / "skip") == 0
    last = values(tmp_path / "skip")[8]
    result = json.loads((tmp_path / "skip" / "result.json").read_text())
    assert result["skipped_records"] == last["train/skipped_records"] >= 1
    assert "records skipped in training: " in (tmp_path / "skip" / "report.html").read_text()
    with pytest.raises(UserError, match="broken/one"):
        train(tiny_config(data, **{"eval.source": "", "data.on_corrupt": "error"}), tmp_path / "error")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"batch_size": 12}, "batch_size=12 does not divide by the 8 devices"),
        ({"mode": "evaluate"}, "config.mode='evaluate' is unknown"),
        ({"loss": "siglip"}, "config.loss='siglip' is unknown"),
        ({"task": "paint"}, "config.task='paint' is unknown"),
        ({"data.train": "no/such/folder"}, "'no/such/folder' does not exist"),
        ({"data.captions": "headline=1"}, "no record has the field 'headline'"),
        ({"data.train_ops": "decode|spin(3)"}, "unknown op 'spin'"),
        ({"optim.warmup_steps": 8}, "optim.warmup_steps=8"),
        ({"checkpoint.keep": 0}, "config.checkpoint.keep=0 must be at least 1"),
        ({"log.every": -1}, "config.log.every=-1 must be a number of steps"),
        ({"optim.lr_rules": ("image/.*", 0.1)}, "write (('PATTERN', VALUE), ...)".replace(")", "[)]")),
        ({"profile.steps": (4, 2)}, "config.profile.steps=(4, 2"),
        ({"mesh.fsdp": 3}, "does not use the 8 devices"),
        ({"text.tokenizer": "no.model"}, "cannot read no.model"),
        ({"model.overrides.res": 36}, "res=36"),
    ],
)
def test_mistakes_are_one_message(pairs, tmp_path, changes, message):
    config = tiny_config(pairs, **changes)
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        train(config, tmp_path)
    assert "\n" not in str(error.value).strip()


def test_empty_data_is_one_message(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="needs .*array_record files, or images with captions.csv"):
        train(tiny_config(str(tmp_path / "empty")), tmp_path / "run")


def test_evaluating_an_untrained_workdir_is_one_message(pairs, tmp_path):
    with pytest.raises(UserError, match="no checkpoints at"):
        train(tiny_config(pairs, mode="eval"), tmp_path)
