"""Benchmarks: one JSON line with the promised keys, and the PyTorch yardstick computes what our tower computes."""

import argparse
import importlib
import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from florence_jax.models import florence
from florence_jax.tools import bench, bench_data, bench_step, timing, torch_swin
from florence_jax.train.optim import DECAY_RULES
from florence_jax.train.rules import match_rules

needs_torch = pytest.mark.skipif(not torch_swin.available(), reason="PyTorch is not installed (pip install torch)")
STEP = ["step", "--variant", "tiny", "--res", "32", "--batch", "2", "--steps", "2", "--image_only"]


@pytest.fixture
def tiny(monkeypatch):
    """A variant that compiles in a second or two."""
    sizes = dict(florence.VARIANTS["ti"], depths=(2,), image_width=16, text_layers=1, window=4)
    monkeypatch.setitem(florence.VARIANTS, "tiny", sizes)


@pytest.fixture(scope="module")
def tower():
    """A small tower with a scanned stage and a shifted one, parameters large enough that every term matters."""
    model = florence.build("ti", depths=(2, 4), image_width=16, heads=(1, 2), text_layers=1, res=64, window=4)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes)


def run(capsys, arguments):
    code = bench.main(arguments)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return code, json.loads(out)


@needs_torch
def test_torch_tower_computes_the_same_features(tower):
    import torch

    model, params = tower
    images = np.random.default_rng(1).standard_normal((2, 64, 64, 3)).astype(np.float32)
    ours = model.apply(params, {"image": jnp.asarray(images)})["image/pooled"]
    with torch.no_grad():
        theirs = torch_swin.TorchCoSwin(params["image"], model.config)(torch.tensor(images).permute(0, 3, 1, 2))
    assert float(jnp.abs(ours).mean()) > 0.05
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5, rtol=2e-4)


@needs_torch
def test_torch_step_follows_the_same_trajectory(tower):
    model, params = tower
    images, target = bench_step.image_batch(model.config, 2)
    ours = bench_step.image_step(model, params, images, target)
    theirs, _ = bench_step.torch_step(model.config, params, images, target)
    losses = np.array([(ours(), theirs()) for _ in range(4)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-4)
    assert losses[3, 0] < 0.99 * losses[0, 0]


def test_decays_what_the_trainer_decays(tower):
    _, params = tower
    assert bench_step.decay_mask(params) == match_rules(DECAY_RULES, params, what="weight decay")


def test_step_prints_one_line(capsys, monkeypatch, tiny):
    monkeypatch.setattr(torch_swin, "available", lambda: False)
    code, result = run(capsys, STEP)
    assert code == 0
    assert result["seconds"] == result["image_tower_seconds"] > 0
    assert result["images_per_s"] == pytest.approx(2 / result["seconds"], rel=1e-3)
    assert result["torch"] is result["torch_seconds"] is result["ratio"] is None
    assert result["jax"] == jax.__version__ and result["cores"] > 0 and result["cpu"]


@needs_torch
def test_step_with_torch(capsys, tiny):
    _, result = run(capsys, STEP)
    assert result["ratio"] == pytest.approx(result["torch_seconds"] / result["image_tower_seconds"], rel=1e-3)
    assert result["ratio_range"][0] <= result["ratio_range"][1]


def test_whole_step_trains_both_towers(tower):
    model, params = tower
    step = bench_step.pretrain_step(model, params, 4)
    losses = [step() for _ in range(6)]
    assert losses[-1] < losses[0]


def test_disagreeing_losses_are_an_error():
    assert bench_step.check_losses(1.0, 1.0, "float32") == 0
    with pytest.raises(RuntimeError, match="disagree"):
        bench_step.check_losses(1.0, 1.01, "float32")
    with pytest.raises(RuntimeError, match="disagree"):
        bench_step.check_losses(float("nan"), 1.0, "float32")


@pytest.mark.parametrize("workers", [0, 1])
def test_data_prints_one_line(capsys, workers):
    arguments = "data --image_size 80x60,own --res 32 --batch 4 --records 16 --images 16 --rounds 1"
    code, result = run(capsys, [*arguments.split(), f"--workers={workers}"])
    assert code == 0
    assert set(result["sizes"]) == {"80x60", "own"}
    assert result["ratio"] == result["sizes"]["80x60"]["ratio"] > 0
    assert (result["cpu_ratio"] is None) == (workers > 0)
    for name in ("decode_images_per_s", "pipeline_images_per_s", "kilobytes_per_image"):
        assert result[name] > 0


def test_enlarged_records_are_jpegs_of_the_size():
    record = bench_data.take_records("emoji:train", 1)[0]
    made = bench_data.enlarge(record, (500, 375), 0)
    image = Image.open(io.BytesIO(made["image"]))
    assert (image.format, image.size) == ("JPEG", (500, 375))
    assert made["caption"] == record["caption"]
    assert 50_000 < len(made["image"]) < 150_000


def test_interleaved_takes_turns_and_drops_the_warm_up():
    calls = []
    times = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert "".join(calls) == "ababab"
    assert [len(values) for values in times.values()] == [2, 2]


def test_ratio_report():
    report = timing.ratio_report([1.0, 2.0, 1.0], [3.0, 3.0, 2.0])
    assert report == {"ratio": 3.0, "ratio_of_best": 2.0, "ratio_range": [1.5, 3.0]}


@pytest.mark.parametrize(
    "arguments", [["step", "--batch", "0"], ["data", "--image_size", "big"], ["data", "--source", "nowhere"]]
)
def test_mistakes_are_one_message(capsys, arguments):
    assert bench.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_registered_benchmarks_exist(name):
    module = importlib.import_module(bench.BENCHMARKS[name][0])
    module.add_arguments(argparse.ArgumentParser())
    assert callable(module.run)


def test_step_needs_neither_torch_nor_the_data_packages():
    forbidden = ("torch", "grain", "array_record", "ml_collections", "orbax", "PIL")
    code = f"import sys, florence_jax.tools.bench_step; print([m for m in {forbidden} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
