"""configs/detect.py: trained, killed and resumed, evaluated, preflighted, used from its folder alone."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_images import run_main, tiny_checkpoint
from two_processes import run_job

from configs.detect import get_config
from florence_jax import inference
from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import UserError
from florence_jax.inference import Florence
from florence_jax.models.anchors import level_shapes
from florence_jax.models.detector import DetectorConfig
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.sharding import make_mesh, replicated
from florence_jax.predict import main as predict
from florence_jax.tasks import create_suite, create_task
from florence_jax.tasks.detect import Detect
from florence_jax.tasks.detection_sizes import bucket_sizes, scaled_sizes
from florence_jax.tasks.detector import Detector, Options, mirrored, scaled
from florence_jax.tasks.encoder import Encoder
from florence_jax.tools import build_scenes
from florence_jax.tools.aot_compile import topologies
from florence_jax.tools.aot_compile.__main__ import preflight
from florence_jax.train.loop import open_stream
from florence_jax.train.metrics import read_metrics

TESTS = Path(__file__).parent
NOTEBOOK = TESTS.parent / "docs" / "detection_colab.ipynb"
STEPS, SAVED = 4, 2
KILLED = 6  # of the 8 steps of a run that is: a save waits for the one before it
SIZES = ((128, 128), (128, 256))  # of two scales
CHANGES = {
    "data.train": "scenes:train:24",
    "data.test": "scenes:held_out:8",
    "detector.tower_lr": 0.0,
    "detector.sampled_classes": 6,  # of 8
    "detections.threshold": 0.0,  # it learns too little for more
    "total_steps": STEPS,
    "checkpoint.every": SAVED,
}
CONFIG = "--config=configs/detect.py:runlocal"
SEVERAL = [CONFIG, *(f"--config.{name}={value}" for name, value in CHANGES.items())]
FLAGS = [*SEVERAL, "--config.detector.sizes=((128, 128),)", "--config.detector.scales=(1.0,)"]  # of one size: quick
# The command, killed by -9 before the batch of a step.
KILLED_RUN = f"""
import itertools, os, runpy, signal
from florence_jax.train import loop
steps, inner = itertools.count(1), loop.to_global
def to_global(*args):
    if next(steps) == {KILLED}:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*args)
loop.to_global = to_global
runpy.run_module("florence_jax.main", run_name="__main__")
"""


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Checkpoints of a tiny pretraining with four stages."""
    return tiny_checkpoint(tmp_path_factory.mktemp("towers"), depths=(2, 2, 2, 2))


@pytest.fixture(scope="module")
def trained(towers, tmp_path_factory):
    """Workdir of a run."""
    workdir = tmp_path_factory.mktemp("detect") / "run"
    assert run_main(*FLAGS, f"--config.init={towers}", f"--workdir={workdir}") == 0
    return workdir


def changed_config(**changes):
    config = get_config("runlocal")
    config.update_from_flattened_dict(CHANGES | changes)
    return config


def params_of(workdir):
    return jax.device_get(Detector(Encoder(str(workdir))).load_on(make_mesh(-1, 1)))


@pytest.fixture(scope="module")
def parameters(trained):
    """Of the run; no test changes them."""
    return params_of(trained)


@pytest.fixture(scope="module")
def model(trained):
    return Florence(trained)


@pytest.fixture
def untraced(monkeypatch):
    """Tasks are made without a look at the shapes of all parameters, which takes seconds; only the FLOPs need it."""
    monkeypatch.setattr(Detect, "trains_tower", False)


def lines_of(workdir):
    return [{k: v for k, v in line.items() if "perf/" not in k} for line in read_metrics(workdir / "metrics.jsonl")]


def test_batches_have_the_shapes_that_are_announced(towers, caplog, untraced):
    config = changed_config(init=towers)
    task = create_task(config)
    with open_stream(config, task, task.train_data()) as stream:
        batches = [batch for batch, _ in zip(stream, range(6), strict=False)]
    assert "in no bucket" not in caplog.text  # each record is in one of each scale
    announced = [{name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()} for shapes in task.batches]
    assert all({name: (x.shape, x.dtype) for name, x in batch.items()} in announced for batch in batches)
    assert {batch["image"].shape[1:3] for batch in batches} == set(SIZES)
    assert sum(int(batch["objects"].sum()) for batch in batches) > 48


def test_it_trains_the_detector_and_no_more(trained, towers, parameters):
    lines = [line for line in lines_of(trained) if "train/loss" in line]
    assert len(lines) == STEPS and all(np.isfinite(line["train/loss"]) for line in lines)
    assert all(line["train/objects_not_drawn"] < line["train/positives"] for line in lines)
    detector = Detector(Encoder(towers), "tiny", ["a"] * 8, {"width": 16, "blocks": 1})
    fresh = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(detector.init, jax.random.key(0)))
    start, end = jax.device_get(detector.load(fresh)), dict(parameters)
    norms = [f"norm{stage}" for stage in (1, 2, 3)]  # of the detection mode: pretraining has not trained them
    assert all((parameters["image"][name]["scale"] != 1).any() for name in norms)
    for tree in (start, end):
        tree["image"] = {name: leaf for name, leaf in tree["image"].items() if name not in norms}
    for name in ("image", "text", "image_projection", "text_projection", "logit_scale"):
        jax.tree.map(np.testing.assert_array_equal, end[name], start[name])
    checkpoints, here = Checkpoints(str(trained / "checkpoints"), read_only=True), replicated(make_mesh(-1, 1))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), end["detector"])
    earlier = checkpoints.restore({"params": {"detector": like}}, SAVED, partial=True)["params"]["detector"]
    checkpoints.close()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), end["detector"], jax.device_get(earlier))
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_killed_it_goes_on_bit_for_bit(towers, tmp_path, capsys):
    """Batches of several sizes go on as well."""
    arguments = [*SEVERAL, f"--config.init={towers}", "--config.total_steps=8", f"--workdir={tmp_path / 'run'}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-c", KILLED_RUN, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=TESTS.parent)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert run_main(*arguments) == 0
    assert f"resuming {tmp_path / 'run'} at step" in capsys.readouterr().out
    whole = tmp_path / "whole"
    assert run_main(*arguments[:-1], f"--workdir={whole}") == 0
    assert lines_of(tmp_path / "run") == lines_of(whole)
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "run"), params_of(whole))


def test_the_evaluation_leaves_cocos_files_and_a_page(trained):
    result = json.loads((trained / "result.json").read_text())
    truth = json.loads((trained / "ground_truth_held_out.json").read_text())
    assert {"eval/held_out/AP", "eval/held_out/AP50", "eval/held_out/agnostic_AP50"} <= set(result)
    assert len(truth["images"]) == result["eval/held_out/images"] == 8
    found = json.loads((trained / "detections_held_out.json").read_text())
    assert {box["image_id"] for box in found} <= {image["id"] for image in truth["images"]}
    assert "average precision" in (trained / "report.html").read_text()


def test_a_trained_detector_is_evaluated_elsewhere(trained, tmp_path):
    flags = ["--config=configs/detect.py:protocol=eval,runlocal", "--config.data.test=scenes:held_out:8", *FLAGS[-2:]]
    assert run_main(*flags, f"--config.init={trained}", f"--workdir={tmp_path}") == 0
    for name in ("detections_held_out.json", "ground_truth_held_out.json"):
        assert (tmp_path / name).read_text() == (trained / name).read_text()


def test_few_shots_beside_the_first_detector_and_mixed_with_it(trained, parameters, tmp_path, capsys):
    """A picture a class of another style, on a detector that knows the classes; the encoder stays as it is."""
    flags = ["--config=configs/detect.py:protocol=fewshot,shots=1,runlocal", "--config.data.train=scenes:new_style:24"]
    flags += ["--config.data.test=scenes:held_out:8", *FLAGS[3:], f"--config.init={trained}", f"--workdir={tmp_path}"]
    assert run_main(*flags, "--config.keep_zero_shot=(0.0,)") == 0  # the compiled programs are those of `trained`
    assert "; 1 shots of each class, seed 0: " in capsys.readouterr().out
    result, before = (json.loads((place / "result.json").read_text()) for place in (tmp_path, trained))
    assert result["eval/held_out/start_AP"] == before["eval/held_out/AP"]  # what the first weights scored
    # Mixed with nothing of the trained weights they are the first ones.
    assert result["eval/held_out_wise0/AP"] == before["eval/held_out/AP"]
    assert "before this training, by the detector of" in (tmp_path / "report.html").read_text()
    start, end = parameters, params_of(tmp_path)
    for name in start["image"].keys() - {f"norm{stage}" for stage in (1, 2, 3)}:  # those of the maps are the detector's
        jax.tree.map(np.testing.assert_array_equal, start["image"][name], end["image"][name])
    assert (start["detector"]["class_logits"]["kernel"] != end["detector"]["class_logits"]["kernel"]).any()


def test_the_folder_alone_detects_and_classifies(model, towers):
    source = open_source("scenes:held_out:3")
    pictures = [source[i]["image"] for i in range(3)]
    found = model.detect(pictures, threshold=0.0, top=7)
    for one, picture in zip(found, pictures, strict=True):
        assert one["boxes"].shape == (7, 4) and one["boxes"].dtype == np.float32
        height, width = picture.shape[:2]
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= [width, height, width, height]).all()
        assert (np.diff(one["scores"]) <= 0).all() and len(one["names"]) == 7
        assert [source.class_names[label] for label in one["labels"]] == one["names"]
    assert not any(len(one["boxes"]) for one in model.detect(pictures, threshold=1.0))
    names = ["cat", "dog", "tree"]  # the towers are frozen, and of one size
    np.testing.assert_allclose(
        model.classify(pictures, names, ["{}"]), Florence(towers).classify(pictures, names, ["{}"]), atol=1e-5
    )
    with pytest.raises(UserError, match="holds no detector: train one with"):
        Florence(towers).detect(pictures)
    for wrong in ({"threshold": 2.0}, {"top": 0}):
        with pytest.raises(UserError, match="must be"):
            model.detect(pictures, **wrong)


def test_predict_reads_every_kind_of_picture(trained, tmp_path, capsys):
    images = tmp_path / "in"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    Image.fromarray(noise).save(images / "colour.png")
    Image.fromarray(noise[..., 0]).save(images / "grey.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(images / "sixteen.png")
    Image.fromarray(noise).convert("P").save(images / "palette.png")
    Image.fromarray(noise[:1, :1]).save(images / "pixel.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise).save(images / "turned.jpg", exif=turned)
    (images / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    assert predict([f"--init={trained}", f"--input={images}", f"--out={out}", "--threshold=0", "--top=3"]) == 0
    assert "6 pictures, 1 not read" in capsys.readouterr().out
    coco = json.loads((out / "detections.json").read_text())
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in coco["images"]}
    assert sizes["turned.jpg"] == (48, 80) and sizes["grey.png"] == (80, 48) and sizes["pixel.png"] == (1, 1)
    by_image = {image["id"]: sizes[image["file_name"]] for image in coco["images"]}
    for box in coco["annotations"]:
        x, y, width, height = box["bbox"]
        assert x >= 0 and y >= 0 and x + width <= by_image[box["image_id"]][0] + 0.02
        assert y + height <= by_image[box["image_id"]][1] + 0.02
    assert [category["name"] for category in coco["categories"]] == list(open_source("scenes:train:1").class_names)
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(coco["annotations"]) and list(rows[0])[1:] == ["x1", "y1", "x2", "y2", "class", "score"]
    assert len(list((out / "pictures").iterdir())) == 6 and "not read" in (out / "report.html").read_text().lower()


def test_other_classes_begin_anew_and_known_ones_go_on(trained, parameters):
    encoder = Encoder(str(trained))
    known = encoder.description.parts["detector"]["classes"]
    detector = Detector(encoder, classes=["unknown", known[5], known[0]])
    shapes = jax.eval_shape(detector.init, jax.random.key(0))
    fresh = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), shapes)
    loaded, saved = detector.load(fresh), parameters["detector"]["class_logits"]
    for name, leaf in loaded["detector"]["class_logits"].items():
        np.testing.assert_array_equal(leaf[..., 1:], saved[name][..., [5, 0]])
        assert (np.asarray(leaf)[..., 0] == 0.5).all()


@pytest.mark.slow
def test_preflight_compiles_every_bucket():
    changes = {"init": "", "data.train": "", "data.test": "", "model.variant": "ti", "model.overrides.image_width": 8}
    config = changed_config(**changes)
    found = preflight(config.lock(), topologies.find("v5e:2x4"), devices=jax.devices(), bucket=0)
    assert found["fits"] and found["task"] == "detect" and found["variant"] == "ti, tiny"
    assert {tuple(shapes["image"].shape[1:3]) for shapes in create_task(config).batches} == set(SIZES)


def test_a_run_on_scenes_is_of_their_backgrounds(untraced):
    changes = {"init": "", "model.variant": "ti", "data.test": "scenes:held_out:2:groups:64:noise"}
    noise = create_task(changed_config(**changes, **{"data.train": "scenes:train:4:groups:64:noise"}))
    assert noise.identity["backgrounds"] == ["noise"]
    files = create_task(changed_config(**changes | {"data.test": "", "data.train": ""}))
    assert "backgrounds" not in files.identity


def test_sizes_of_batches():
    assert bucket_sizes((), 128, 128) == [(128, 128), (128, 256), (256, 128)]
    assert bucket_sizes((), 800, 32) == [(800, 800), (800, 1216), (1216, 800)]
    groups = scaled_sizes([(256, 256), (256, 512)], (0.5, 1.0, 0.6), 128)
    assert groups == [[(256, 256), (256, 512)], [(256, 384)], [(128, 128), (128, 256)]]
    with pytest.raises(UserError, match=r"\(128, 200\) must be multiples of 128.*\(128, 256\)"):
        bucket_sizes(((128, 200),), 128, 128)
    for scales in ((), (0.0,)):
        with pytest.raises(UserError, match="must be shares, above 0"):
            scaled_sizes([(128, 128)], scales, 128)


def test_views_of_a_picture():
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8))
    valid = jnp.array([[8, 8], [4, 6]])
    turned = np.asarray(mirrored(image, valid))
    np.testing.assert_array_equal(turned[0], image[0, :, ::-1])
    np.testing.assert_array_equal(turned[1, :, :6], image[1, :, :6][:, ::-1])
    np.testing.assert_array_equal(turned[1, :, 6:], image[1, :, 6:])
    small, sizes = scaled(image, valid, 0.5, 8)
    assert small.shape == (2, 8, 8, 3) and small.dtype == jnp.uint8
    np.testing.assert_array_equal(sizes, [[4, 4], [2, 3]])
    assert not np.asarray(small)[:, 4:].any()


def test_views_agree_about_one_object():
    """A stand-in for the network, which finds the one bright rectangle at the first anchor."""
    image, valid = np.zeros((2, 128, 256, 3), np.uint8), jnp.array([[128, 256], [96, 120]])
    true = np.array([[200, 20, 240, 100], [8, 16, 40, 88]])
    for picture, (x1, y1, x2, y2) in zip(image, true, strict=True):
        picture[y1:y2, x1:x2] = 255

    def outputs(params, batch):
        bright = batch["image"][..., 0] > 128
        sides = [bright.any(axis) for axis in (1, 2)]  # columns, rows
        first, last = ([f(side) for side in sides] for f in (lambda s: s.argmax(1), lambda s: s[:, ::-1].argmax(1)))
        ends = [side.shape[1] - place for side, place in zip(sides, last, strict=True)]
        count = sum(height * width for height, width in level_shapes(*bright.shape[1:]))
        box = jnp.stack([*first, *ends], 1).astype(jnp.float32)
        return {
            "detector/logits": jnp.full((2, count, 3), -9.0).at[:, 0, 1].set(9.0),
            "detector/centerness": jnp.full((2, count), 9.0),
            "detector/boxes": jnp.repeat(box[:, None], count, 1),
            "detector/inside": jnp.ones((2, count), bool),
        }

    detector = object.__new__(Detector)
    detector.options, detector.config = Options(scales=(1.0, 0.5), flip=True, most=5, root=True), DetectorConfig()
    detector.outputs, detector.classes = outputs, ("a", "b", "c")
    found = jax.device_get(jax.jit(detector.detect)(None, {"image": jnp.asarray(image), "valid": valid}))
    assert found["labels"].tolist() == 2 * [[1, -1, -1, -1, -1]]
    np.testing.assert_array_equal(found["boxes"][:, 0], true)
    np.testing.assert_allclose(found["scores"][:, 0], 1 / (1 + np.exp(-9)), rtol=1e-6)  # the root of its square


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"detector.sizes": ((100, 128),)}, "must be multiples of 128"),
        ({"detector.variant": "huge"}, "unknown detector 'huge'"),
        ({"data.train": "", "data.test": "scenes:held_out:8"}, "holds no detector"),
        ({"holdout": 1.5, "data.test": "", "data.train": "{folder}"}, "config.holdout=1.5"),
        ({"keep_zero_shot": (0.5,)}, "compare with a first detector: give one with --config.init=DIR"),
        ({"keep_zero_shot": (1.5,)}, "shares of the trained weights"),
        ({"data.train": "nowhere"}, "'nowhere' does not exist"),
    ],
)
def test_mistakes_are_told(changes, message, towers, tmp_path):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2,name\na.png,1,1,5,5,dog\n")
    changes = {
        name: value.format(folder=tmp_path) if isinstance(value, str) else value for name, value in changes.items()
    }
    with pytest.raises(UserError, match=message):
        create_suite(changed_config(init=towers, **changes))


def test_a_batch_that_the_devices_do_not_divide(towers, tmp_path, capsys, untraced):
    flags = [*FLAGS, f"--config.init={towers}", f"--workdir={tmp_path / 'run'}", "--config.batch_size=6"]
    assert run_main(*flags) == 2
    assert "config.batch_size=6 does not divide by the 8 devices" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(trained, towers, tmp_path):
    command = [*FLAGS, f"--config.init={towers}", f"--workdir={tmp_path / 'run'}"]
    run_job(tmp_path, 2, [command], devices=4)
    both, alone = lines_of(tmp_path / "run"), lines_of(trained)
    assert [line["step"] for line in both] == [line["step"] for line in alone]
    for ours, theirs in zip(both, alone, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name


# -- the notebook -----------------------------------------------------------------------------------------------------


def notebook_cells():
    """Of each cell with code the commands that it starts, [module, options], and the rest of it."""
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        lines = "".join(cell["source"]).splitlines()
        if cell["cell_type"] == "code":
            commands = [shlex.split(line.removeprefix("!python -m ")) for line in lines if line.startswith("!")]
            yield commands, "\n".join(line for line in lines if not line.startswith("!"))


def test_the_cells_of_the_notebook_work_on_a_runs_folder(model, tmp_path, monkeypatch):
    """What they train is there already; scenes are written, boxes found and drawn."""
    for run in ("detect", "detect_check"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "report.html").write_text(f"<p>{run}</p>")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, "Florence", {"runs/detect": model}.__getitem__)
    shown, started, scope = [], [], {}
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str, display=shown.append))
    for commands, python in list(notebook_cells())[1:]:
        for module, *options in commands:
            started.append((module, options))
            if module.endswith("build_scenes"):
                assert build_scenes.main([*options, "--train=2", "--held_out=3", "--side=64"]) == 0
        python = python.replace("threshold=0.3", "threshold=0.0")
        exec(compile(python, "detection_colab.ipynb", "exec"), scope)
    assert [module for module, _ in started] == ["florence_jax.tools.build_scenes", *["florence_jax.main"] * 3]
    assert "--config.data.train=$DATA" in started[-1][1] and scope["DATA"] == "scenes/train"
    assert shown[:2] == ["<p>detect_check</p>", "<p>detect</p>"] and len(shown) == 2 + 3
    with Image.open("scenes/held_out/held_out-000000.png") as first:
        assert shown[2].height * first.width == shown[2].width * first.height
