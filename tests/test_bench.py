"""Benchmarks: one JSON line with the promised keys, and the PyTorch yardstick computes what our tower computes."""

import argparse
import importlib
import io
import json
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empty_programs import jit_to_zeros
from PIL import Image
from tiny_run import tiny_config, tiny_pairs

from florence_jax.data.video_writer import encode_video
from florence_jax.data.videos import read_frames
from florence_jax.errors import UserError
from florence_jax.models import florence
from florence_jax.models.anchors import anchors
from florence_jax.models.detector import DETECTORS, DetectorConfig, Prediction
from florence_jax.models.sizes import VARIANTS, resolve_config
from florence_jax.params.rules import match_rules
from florence_jax.tools.bench import __main__ as bench
from florence_jax.tools.bench import (
    data,
    deform_conv,
    detect,
    devices,
    grad_cache,
    precision,
    step,
    timing,
    timm_swin,
    torch_swin,
    video_data,
    vocabulary,
)
from florence_jax.train.optim import DECAY_RULES

needs_torch = pytest.mark.skipif(not torch_swin.available(), reason="PyTorch is not installed (pip install torch)")
STEP = ["step", "--variant", "tiny", "--res", "32", "--batch", "2", "--steps", "2", "--image_only"]


@pytest.fixture
def tiny(monkeypatch):
    """A variant that compiles in a second or two."""
    sizes = dict(VARIANTS["ti"], depths=(2,), image_width=16, text_layers=1, window=4)
    monkeypatch.setitem(VARIANTS, "tiny", sizes)


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
    images, target = step.image_batch(model.config, 2)
    ours = step.image_step(model, params, images, target)
    theirs, details = step.make_rival("auto", model.config, params, images, target)
    assert details["rival"] == "eager"
    losses = np.array([(ours(), theirs()) for _ in range(4)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-4)
    assert losses[3, 0] < 0.99 * losses[0, 0]


def test_decays_what_the_trainer_decays(tower):
    _, params = tower
    assert step.decay_mask(params) == match_rules(DECAY_RULES, params, what="weight decay")


def test_step_prints_one_line(capsys, monkeypatch, tiny):
    monkeypatch.setattr(torch_swin, "available", lambda: False)
    code, result = run(capsys, STEP)
    assert code == 0
    assert result["seconds"] == result["image_tower_seconds"] > 0
    assert result["images_per_s"] == pytest.approx(2 / result["seconds"], rel=1e-3)
    assert result["torch"] is result["torch_seconds"] is result["ratio"] is result["rival"] is None
    assert result["mfu"] is result["peak_memory_bytes"] is None  # a CPU has no known peak and keeps no count
    assert result["compiled_bytes"] > 4 * 2 * 32 * 32 * 3
    assert result["jax"] == jax.__version__ and result["cores"] > 0 and result["cpu"]
    assert result["compared"].endswith("float32 on both sides")


def test_attention_forms(capsys, tiny):
    arguments = "attention --variant=tiny --res=64 --batch=2 --dtype=float32 --forms=xla,fused --rounds=1"
    code, result = run(capsys, arguments.split())
    (stage,) = result["stages"]
    assert code == 0 and stage["map"] == [16, 16, 16] and stage["window"] == 4
    assert stage["difference"] == {"xla": 0, "fused": None}  # 16 channels are none of the kernel's
    assert stage["seconds"]["xla"] > 0 and stage["seconds"]["fused"] is None


def test_mfu_is_of_the_given_peak(capsys, tiny):
    _, result = run(capsys, [*STEP, "--rival", "none", "--peak_tflops", "2"])
    assert result["mfu"] == pytest.approx(result["gflops_per_s"] / 2000, rel=1e-2)


def test_missing_timm_says_how_to_install_it(capsys, monkeypatch, tower):
    model, params = tower
    monkeypatch.setattr(timm_swin, "available", lambda: False)
    images, target = step.image_batch(model.config, 2)
    rival, details = step.make_rival("timm", model.config, params, images, target)
    assert rival is details["rival"] is None and "pip install torch torchvision timm" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["ViT-B-32", "Swin-T"])
def test_towers_that_no_rival_has_are_timed_alone(capsys, variant):
    config = resolve_config(variant)
    assert step.make_rival("auto", config, {}, None, None)[0] is None
    assert f"no comparison: the rivals have no image tower like that of variant {variant}" in capsys.readouterr().err
    assert step.make_rival("none", config, {}, None, None)[0] is None and not capsys.readouterr().err
    with pytest.raises(UserError, match="--rival=eager: the rivals have no image tower"):
        step.make_rival("eager", config, {}, None, None)


@needs_torch
def test_timm_takes_the_same_step(capsys, monkeypatch, tiny):
    """With a stand-in of timm's interface and an identity for `torch.compile`, which are of use on a GPU only."""
    import torch

    asked = {}

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = torch.nn.Conv2d(3, 16, 4, 4)

        def forward(self, images):
            return self.patch_embed(images).mean((2, 3))

    def create_model(name, **options):
        asked.update(options, name=name)
        return Pooled()

    module = types.ModuleType("timm")
    module.create_model, module.__version__, module.__spec__ = create_model, "1.0", object()
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.setitem(timm_swin.NAMES, "tiny", "swin_of_tests")
    monkeypatch.setattr(torch, "compile", lambda model: model)
    _, result = run(capsys, [*STEP, "--rival", "timm", "--dtype", "bfloat16"])
    assert asked == dict(name="swin_of_tests", num_classes=0, img_size=32, window_size=4, drop_path_rate=0.0)
    assert result["rival"] == "timm" and result["rival_description"] == "swin_of_tests, timm 1.0, torch.compile"
    assert result["ratio"] == pytest.approx(result["torch_seconds"] / result["image_tower_seconds"], rel=1e-3)


@pytest.mark.parametrize("variant,drop_path", [("ViT-B-32", 0.0), ("T", 0.1)])
def test_the_gradient_cache_is_timed_with_the_stochastic_depth_that_the_tower_has(monkeypatch, variant, drop_path):
    class Built(Exception):
        pass

    def make_loss(model, *_):
        raise Built(model.config.drop_path)

    monkeypatch.setattr(grad_cache, "make_loss", make_loss)
    with pytest.raises(Built, match=str(drop_path)):
        bench.main(["grad_cache", "--variant", variant])


def test_the_default_devices_benchmark_starts():
    """Size ti has an average of the parameters, the tiny one of these tests none."""
    args = argparse.Namespace(variant="ti", batch=2, zero=False)
    devices.DeviceStep(args, 1, jax.devices()[:1])


def test_devices_are_compared_with_one_that_does_the_same_work(capsys, tiny):
    code, result = run(capsys, "devices --variant tiny --batch 2 --counts 1,2 --steps 1 --zero".split())
    assert code == 0 and set(result["devices"]) == {"1", "2"}
    single = result["devices"]["1"]["seconds_one_device"]
    for count, row in result["devices"].items():
        assert row["ratio_of_repeats"] == pytest.approx(row["seconds"] / (int(count) * single), rel=1e-3)
        assert row["ratio"] == pytest.approx(row["seconds"] / row["seconds_one_device"], rel=1e-3)


def test_precisions_are_compared(capsys, monkeypatch, tmp_path):
    config = tiny_config(tiny_pairs(tmp_path / "pairs"))
    monkeypatch.setattr(precision, "read_config", lambda spec: config.copy_and_resolve_references().unlock())
    code, result = run(capsys, "precision --rounds 2 --batches 2".split())
    assert code == 0 and result["data_processor_seconds"] > 0
    whole, rounded = (result[name] for name in precision.PRECISIONS)
    assert 0 < abs(whole["loss"] / rounded["loss"] - 1) < 0.01  # other numbers, the same training
    slow, fast = (found["processor_seconds"] + result["data_processor_seconds"] for found in (whole, rounded))
    assert result["loop_ratio"] == pytest.approx(slow / fast, rel=1e-3)


@needs_torch
def test_step_with_torch(capsys, tiny):
    _, result = run(capsys, STEP)
    assert result["ratio"] == pytest.approx(result["torch_seconds"] / result["image_tower_seconds"], rel=1e-3)
    assert result["ratio_range"][0] <= result["ratio_range"][1]


def test_whole_step_trains_both_towers(tower):
    model, params = tower
    one = step.pretrain_step(model, params, 4)
    losses = [one() for _ in range(6)]
    assert losses[-1] < losses[0]


def test_disagreeing_losses_are_an_error():
    assert step.check_losses(1.0, 1.0, "float32") == 0
    with pytest.raises(RuntimeError, match="disagree"):
        step.check_losses(1.0, 1.01, "float32")
    with pytest.raises(RuntimeError, match="disagree"):
        step.check_losses(float("nan"), 1.0, "float32")


@pytest.mark.parametrize("workers", [0, 1])
def test_data_prints_one_line(capsys, workers):
    arguments = "data --image_size 80x60,own --res 32 --batch 4 --records 16 --images 16 --rounds 1"
    code, result = run(capsys, [*arguments.split(), f"--workers={workers}"])
    assert code == 0
    assert set(result["sizes"]) == {"80x60", "own"}
    assert result["ratio"] == result["sizes"]["80x60"]["ratio"] > 0
    assert (result["cpu_ratio"] is None) == (workers > 0)
    for name in ("decode_images_per_s", "pipeline_images_per_s", "kilobytes_per_image", "reduced_gain"):
        assert result[name] > 0


def test_video_data_prints_one_line_and_the_bare_loop_reads_the_same_frames(capsys):
    pytest.importorskip("av")
    arguments = "video_data --side 32 --length 30 --key_every 8 --frames 4 --clips 2 --rounds 1 --codecs mpeg4"
    code, result = run(capsys, arguments.split())
    assert code == 0 and set(result["results"]["mpeg4"]) == {"bare", "sequential", "op", "ops", "op_ratio", "ops_ratio"}
    made = encode_video(np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8), 25, "mpeg4", 8)
    for numbers in (np.array([9, 11, 13]), np.array([0, 2])):
        for seeks in (True, False):
            np.testing.assert_array_equal(video_data.bare_frames(made, numbers, seeks), read_frames(made, numbers))


def test_boxes_print_one_line(capsys):
    arguments = "boxes --image_size 80x60 --bucket 64x48 --boxes 3 --batch 4 --records 8 --images 8 --rounds 1"
    code, result = run(capsys, arguments.split())
    assert code == 0 and min(result["ratio"], result["cpu_ratio"], result["image_ops_ratio"]) > 0
    assert result["bucket"] == "64x48" and result["pipeline_images_per_s"] > 0


def test_records_of_the_benchmark_are_pictures_and_texts(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file": "a.png", "text": "x", "box": 1.5}\n')
    (record,) = data.take_records(str(tmp_path), 3)
    assert record.keys() == {"key", "image", "caption"}
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="corrupt image"):
        data.take_records(str(tmp_path), 3)


def test_enlarged_records_are_jpegs_of_the_size():
    record = data.take_records("emoji:train", 1)[0]
    made = data.enlarge(record, (500, 375), 0)
    image = Image.open(io.BytesIO(made["image"]))
    assert (image.format, image.size) == ("JPEG", (500, 375))
    assert made["caption"] == record["caption"]
    assert 50_000 < len(made["image"]) < 150_000


def test_a_start_reads_no_more_of_more_data(capsys):
    code, report = run(capsys, ["start", "--records=300,6000", "--processes=2", "--batch=8"])
    small, large = report["results"]
    assert code == 0 and (small["records"], large["records"], small["processes"]) == (300, 6000, 2)
    assert large["file_bytes"] > 10 * small["file_bytes"] and large["seconds"] > 0
    assert large["bytes_read"] < small["bytes_read"] + large["file_bytes"] / 2


def test_forms_of_the_deformable_convolution_are_timed(capsys):
    code, report = run(capsys, ["detect", "--parts=conv", "--maps=1x6x3x4,1x24x3x4", "--rounds=1"])
    assert code == 0 and set(report["conv"]) == {"1x6x3x4", "1x24x3x4"}
    for row, form in zip(report["conv"].values(), ("packed", "matrix"), strict=True):
        forms = row["forms"]
        assert forms["auto"]["temp_bytes"] == forms[form]["temp_bytes"] < forms["naive"]["temp_bytes"]
        assert row["naive_ratio"] == pytest.approx(forms["naive"]["ms"] / forms["auto"]["ms"], rel=1e-2)
        assert (row["ratio"] is None) == (row["torchvision_ms"] is None)


def test_the_detectors_steps_are_timed_by_size_of_picture(capsys, monkeypatch):
    """Its functions are traced, not compiled, which takes most of a minute."""
    monkeypatch.setitem(VARIANTS, "tiny", dict(VARIANTS["ti"], image_width=16, text_layers=1, window=4))
    monkeypatch.setitem(DETECTORS, "small", DetectorConfig(width=16, blocks=1))
    shapes = []

    class Traced:
        peak_bytes = 2**20

        def __init__(self, function, argument, *_):
            shapes.append(jax.eval_shape(function, argument))

        def __call__(self):
            time.sleep(0.001)

    monkeypatch.setattr(step, "TimedStep", Traced)
    monkeypatch.setattr(step, "TimedFunction", Traced)
    monkeypatch.setattr(jax, "jit", jit_to_zeros)
    options = "--variant=tiny --detector=small --classes=2 --batch=1 --sides=100 --remat_side=100 --rounds=1"
    code, report = run(capsys, ["detect", "--parts=step,inference", *options.split()])
    whole, tower, found, maps, boxes = shapes
    assert whole.shape == tower.shape == () and len(maps) == 3 and found == boxes
    assert found["boxes"].shape == (1, 100, 4)
    assert code == 0 and "conv" not in report and "remat" not in report
    for part in ("step", "inference"):
        row = report[part]["100"]
        assert (row["canvas"], row["peak_bytes"], row["bytes_per_pixel"]) == (128, 2**20, 64)
        assert row["images_per_s"] == pytest.approx(1e3 / row["ms"], rel=1e-2) and row["head_share"] < 1
    assert report["inference"]["100"]["suppression_share"] > 0


class ClassLayer:
    """A detector of nothing but its class layer, on features that are parameters."""

    def init(self, key):
        layer = Prediction(700).init(key, jnp.zeros((1, 1, 8)))["params"]
        return {"features": jnp.zeros((1, 341, 8)), "detector": {"class_logits": layer}}

    def apply(self, params, inputs, train=False):
        features, layer = params["features"], params["detector"]["class_logits"]
        places = jnp.asarray(anchors(128, 128))
        return {
            "detector/features": features,
            "detector/logits": Prediction(700).apply({"params": layer}, features, inputs.get("drawn")),
            "detector/centerness": features[..., 0],
            "detector/boxes": features[..., :4] + places[None],
            "detector/inside": jnp.ones((1, 341), bool),
            "detector/anchors": places,
        }


def test_memory_of_many_classes(capsys, monkeypatch):
    monkeypatch.setattr(detect, "make_model", lambda args, remat: ClassLayer())
    code, report = run(capsys, ["vocabulary", "--parts=loss", "--classes=700", "--sampled=8", "--side=100"])
    assert code == 0 and (report["canvas"], report["logits_bytes"]) == (128, 4 * 700 * 341)
    assert report["loss"]["drawn"] < report["loss"]["whole"] / 4 and report["loss"]["whole"] > report["logits_bytes"]
    found = []

    def traced(function, model, batch):
        found.append(jax.eval_shape(function, model.init(jax.random.key(0)), batch))

    monkeypatch.setattr(vocabulary, "working_memory", traced)
    assert run(capsys, ["vocabulary", "--parts=inference", "--classes=700", "--side=100"])[0] == 0
    assert found[0] == found[1] and found[0]["labels"].shape == (1, 100)


def test_deformable_convolutions_that_disagree_are_an_error():
    with pytest.raises(RuntimeError, match="disagree: packed"):
        deform_conv.check([np.ones(3)], {"packed": [np.array([1, 1, 1.01])]})


def test_interleaved_takes_turns_and_drops_the_warm_up():
    calls = []
    times = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert "".join(calls) == "ababab"
    assert [len(values) for values in times.values()] == [2, 2]


def test_ratio_report():
    report = timing.ratio_report([1.0, 2.0, 1.0], [3.0, 3.0, 2.0])
    assert report == {"ratio": 3.0, "ratio_of_best": 2.0, "ratio_range": [1.5, 3.0]}


@pytest.mark.parametrize(
    "arguments",
    [
        ["step", "--batch", "0"],
        ["devices", "--counts", "1,x"],
        ["devices", "--counts", "64"],
        ["data", "--image_size", "big"],
        ["boxes", "--bucket", "own"],
        ["boxes", "--data", "scenes:train:4"],
        ["detect", "--parts", "conv,all"],
        ["detect", "--maps", "2x32x48"],
        ["detect", "--sides", "320px"],
        ["precision", "--rounds", "1"],
        ["vocabulary", "--classes", "100"],
        ["data", "--source", "nowhere"],
        ["start", "--records", "0"],
        ["start", "--batch", "3"],
    ],
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
    forbidden = ("torch", "timm", "grain", "tensorboardX", "array_record", "ml_collections", "orbax", "PIL")
    code = f"import sys, florence_jax.tools.bench.step; print([m for m in {forbidden} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
