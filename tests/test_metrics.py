"""metrics.jsonl: one line a step, rewritten tails after a resume, cut-off lines ignored."""

import json
import math
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from florence_jax.train.loop import finish
from florence_jax.train.metrics import MetricsWriter, peak_memory, read_metrics


def write(workdir, resume_step, steps, offset=0.0):
    writer = MetricsWriter(workdir, resume_step=resume_step, write=True)
    for step in steps:
        writer.write(step, {"train/loss": step + offset})
    writer.close()


def test_resume_replaces_later_lines(tmp_path):
    write(tmp_path, 0, (1, 2, 3, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')  # killed in the middle of a line
    write(tmp_path, 2, (3, 4), offset=0.5)
    assert [(m["step"], m["train/loss"]) for m in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]  # fmt: skip
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_what_is_not_finite_is_null_in_valid_files(tmp_path):
    """The ROC AUC of a set with one class: the run ends with its result and its report."""
    results = {"roc_auc": math.nan, "large": math.inf, "top1": 0.5}
    writer = MetricsWriter(tmp_path, resume_step=0, write=True)
    writer.write(1, {f"eval/test/{name}": value for name, value in results.items()})
    writer.close()
    test = SimpleNamespace(name="test", run=lambda params: results, chance={}, charts=(), report=list, files=dict)
    suite = SimpleNamespace(name="classify", identity={}, description={"parts": {}})
    finish(ConfigDict({"eval": {"source": ""}}), suite, tmp_path, [test], None, {"step": 1, "skipped_records": 3})
    written = [(tmp_path / name).read_text() for name in ("metrics.jsonl", "result.json")]
    expected = {"eval/test/roc_auc": None, "eval/test/large": None, "eval/test/top1": 0.5, "step": 1}
    found = [json.loads(text, parse_constant=pytest.fail) for text in written]
    assert found == [expected, expected | {"skipped_records": 3}]
    assert '<td class="n">nan</td>' in (tmp_path / "report.html").read_text()


def test_other_processes_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0, write=False)
    writer.write(1, {"train/loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


class Device:
    def __init__(self, stats):
        self._stats = stats

    def memory_stats(self):
        return self._stats


def test_device_memory_is_that_of_the_fullest_device():
    devices = [Device({"peak_bytes_in_use": 3, "bytes_in_use": 1}), Device({"peak_bytes_in_use": 5})]
    assert peak_memory(devices) == 5
    assert peak_memory([Device(None), Device({})]) is None
