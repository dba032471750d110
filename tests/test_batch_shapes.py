"""Batches of several shapes: each compiled when it first comes, outside the measured speed and the watchdog's clock."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from florence_jax.data.pipeline import TrainData
from florence_jax.evaluators.base import Evaluator
from florence_jax.tasks.base import Task, make_identity, make_plan
from florence_jax.tools.aot_compile import __main__ as aot_compile
from florence_jax.tools.aot_compile import topologies
from florence_jax.tools.aot_compile.report import report_table
from florence_jax.train import loop
from florence_jax.train.defaults import common, model_overrides
from florence_jax.train.metrics import read_metrics

SIZES = ((4, 8), (8, 4))
ORDER = (0, 0, 1, 0, 1, 1)  # the bucket of each step
COMPILING = 1.5  # seconds


class Mean(Task):
    """Fits one number to the mean of pictures of two shapes."""

    name = "mean"
    flops_per_example = 1.0

    def __init__(self, config):
        self.config, self.plan = config, make_plan(config)

    @property
    def identity(self):
        return make_identity(self.config)

    @property
    def description(self):
        return {"format": 1, "task": "mean", "parts": {"towers": {"variant": "", "overrides": {}, "entries": ["w"]}},
                "tokenizer": "", "classes": [], "source": {}}  # fmt: skip

    @property
    def batches(self):
        size = self.plan.batch_size
        row, share = (jax.ShapeDtypeStruct((size,), dtype) for dtype in (jnp.int32, jnp.float32))
        return tuple(
            {"image": jax.ShapeDtypeStruct((size, *shape), jnp.float32), "corrupt": row, "padded": share}
            for shape in SIZES
        )

    def init(self, key):
        return {"w": {"bias": jnp.zeros((1,))}}

    def start(self, params):
        return params

    def load(self, mesh):
        raise AssertionError("it starts from nothing")

    def loss(self, params, batch, key):
        assert set(batch) == {"image"}
        return jnp.square(batch["image"].mean() - params["w"]["bias"]).mean(), {}

    def train_data(self):
        return TrainData([], None, "", {})

    def evaluators(self, mesh):
        return [Width()]


class Width(Evaluator):
    """Says the number."""

    name = "width"

    def run(self, params):
        return {"w": float(params["w"]["bias"][0])}


class Stream:
    """Batches of the buckets in `ORDER`."""

    processor_seconds = 0.0

    def __init__(self, config, task, data, start_step):
        self.step, self.task = start_step, task

    def __next__(self):
        shapes = self.task.batches[ORDER[self.step]]
        self.step += 1
        image = np.full(shapes["image"].shape, self.step, np.float32)
        rows = len(image)
        return {"image": image, "corrupt": np.zeros(rows, np.int32), "padded": np.full(rows, 0.25, np.float32)}

    def close(self):
        pass


def config(**changes):
    made = common("unused")
    made.task, made.model = "mean", {"variant": "", "overrides": model_overrides()}
    made.batch_size, made.total_steps, made.log.every = 16, len(ORDER), 1
    made.watchdog.seconds = 0.5
    made.update_from_flattened_dict(changes)
    return made.lock()


@pytest.fixture
def slow_compiler(monkeypatch):
    """Compiling takes long; the list has the shapes that were compiled."""
    compiled, original = [], loop.CompiledStep.compile

    def compile_slowly(self, state, batch):
        began = time.perf_counter()
        original(self, state, batch)
        time.sleep(COMPILING)
        compiled.append(batch["image"].shape[1:])
        return time.perf_counter() - began

    monkeypatch.setattr(loop.CompiledStep, "compile", compile_slowly)
    monkeypatch.setattr(loop, "open_stream", Stream)
    return compiled


def test_each_shape_is_compiled_once_and_outside_the_clocks(slow_compiler, tmp_path, capfd):
    assert loop.run(config(), Mean(config()), tmp_path) == 0
    assert slow_compiler == list(SIZES)
    assert "watchdog" not in capfd.readouterr().err
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["perf/step_seconds"] < COMPILING / 2 for line in lines)
    assert all(line["train/padded_share"] == 0.25 for line in lines)


def test_a_resumed_run_compiles_what_it_meets(slow_compiler, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"watchdog.seconds": 0.0}
    assert loop.run(config(**options), Mean(config(**options)), whole) == 0
    half = config(**options, total_steps=6, **{"checkpoint.every": 4})
    assert loop.run(half, Mean(half), parts) == 0
    last = (parts / "checkpoints" / "6").rename(tmp_path / "away")
    (parts / "result.json").unlink()
    slow_compiler.clear()
    assert loop.run(half, Mean(half), parts) == 0 and last.exists()
    assert slow_compiler == [SIZES[1]]  # steps 5 and 6 have the second shape only
    got, want = ([line["train/loss"] for line in read_metrics(w / "metrics.jsonl")] for w in (parts, whole))
    assert got == want


def test_preflight_compiles_every_bucket_or_one(monkeypatch):
    monkeypatch.setattr(aot_compile, "create_task", Mean)
    topology = topologies.find("v5e:2x4")
    found = aot_compile.preflight(config(), topology, devices=jax.devices())
    assert [bucket["inputs"]["image"] for bucket in found["buckets"]] == [list(size) for size in SIZES]
    assert found["fits"] and found["hbm"]["peak"] == max(bucket["hbm"]["peak"] for bucket in found["buckets"])
    assert "bucket 1" in report_table(found)
    one = aot_compile.preflight(config(), topology, devices=jax.devices(), bucket=1)
    assert [bucket["bucket"] for bucket in one["buckets"]] == [1]
