"""The adapter that CONTRIBUTING.md points to: trained, killed and resumed, evaluated, preflighted, used."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_images import run_main
from tiny_run import TINY_MODEL
from toy_detector import register
from toy_detector.config import SIZES, get_config
from toy_detector.detector import Detector
from toy_detector.loss import detection_loss
from toy_detector.ops import PadBoxes
from toy_detector.source import ToyShapes

from florence_jax.boxes import iou
from florence_jax.data.records import BadRecord
from florence_jax.data.sources.catalog import KINDS
from florence_jax.models.resize import resize_bias_table
from florence_jax.params.sharding import make_mesh
from florence_jax.predict import main as predict
from florence_jax.tasks import TASKS, create_task
from florence_jax.tasks.encoder import Encoder
from florence_jax.tools.aot_compile import topologies
from florence_jax.tools.aot_compile.__main__ import preflight
from florence_jax.train.loop import open_stream
from florence_jax.train.metrics import read_metrics

TESTS = Path(__file__).parent
STEPS, SAVED, KILLED = 40, 10, 25
CHANGES = {
    "data.train": "toy:train:64",
    "data.test": "toy:test:12",
    "model.overrides.window": 2,  # another than the weights': their bias tables are resized
    "optim.learning_rate": 0.03,
    "eval.every": 10,
    "total_steps": STEPS,
    "checkpoint.every": SAVED,
}
CONFIG = f"--config={TESTS}/toy_detector/config.py:runlocal"
FLAGS = [CONFIG, *(f"--config.{name}={value}" for name, value in CHANGES.items())]
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
runpy.run_module("toy_detector", run_name="__main__")
"""


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()
    yield
    del TASKS["toy_detection"], KINDS["toy"]


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """Workdir of a run."""
    workdir = tmp_path_factory.mktemp("toy") / "run"
    assert run_main(*FLAGS, f"--config.init={weights}", f"--workdir={workdir}") == 0
    return workdir


def changed_config(**changes):
    config = get_config("runlocal")
    config.update_from_flattened_dict(CHANGES | changes)
    return config


def params_of(workdir):
    return jax.device_get(Detector(Encoder(str(workdir))).load_on(make_mesh(-1, 1)))


def lines_of(workdir):
    return [{k: v for k, v in line.items() if "perf/" not in k} for line in read_metrics(workdir / "metrics.jsonl")]


def test_boxes_follow_the_pictures_into_two_shapes(weights):
    config = changed_config(init=weights)
    task = create_task(config)
    shapes, boxes = set(), 0
    with open_stream(config, task, task.train_data()) as stream:
        for batch, _ in zip(stream, range(4), strict=False):
            assert any(
                {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in b.items()} for b in task.batches
            )
            shapes.add(batch["image"].shape[1:3])
            for row, there in np.argwhere(batch["objects"]):
                x1, y1, x2, y2 = batch["boxes"][row, there].round().astype(int)
                assert batch["image"][row, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 100  # what is no box is below 60
                boxes += 1
    assert shapes == set(SIZES) and boxes > 64


def test_it_learns_on_two_shapes_of_batches(trained):
    lines = [line for line in lines_of(trained) if "train/loss" in line]
    assert len(lines) == STEPS
    for name in ("objectness", "box"):
        first, last = (np.mean([line[f"train/{name}_loss"] for line in part]) for part in (lines[:5], lines[-5:]))
        assert last < 0.9 * first, name
    assert all(0 < line["train/padded_share"] < 0.5 for line in lines)
    result = json.loads((trained / "result.json").read_text())
    assert result["eval/test/iou"] > 0.4


def test_the_tower_is_frozen_and_starts_from_the_weights(trained, weights):
    overrides = {"size_mode": "detection", "mask_padding": True, "window": 2}
    detector = Detector(Encoder(weights, overrides), "tiny")
    start = jax.device_get(detector.load(jax.jit(detector.init)(jax.random.key(0))))
    end = params_of(trained)
    jax.tree.map(np.testing.assert_array_equal, end["image"], start["image"])
    pretrained = Encoder(weights).load_on(make_mesh(-1, 1))["image"]
    tables = [
        tree["stage0_pair0"]["plain"]["attention"]["relative_position_bias_table"]
        for tree in (end["image"], pretrained)
    ]
    np.testing.assert_array_equal(tables[0], resize_bias_table(np.asarray(tables[1]), 2))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), end["detector"], start["detector"])
    assert all(jax.tree.leaves(moved))


def test_killed_it_goes_on_bit_for_bit(trained, weights, tmp_path, capsys):
    arguments = [*FLAGS, f"--config.init={weights}", f"--workdir={tmp_path / 'run'}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-c", KILLED_RUN, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert run_main(*arguments) == 0
    assert f"resuming {tmp_path / 'run'} at step" in capsys.readouterr().out
    assert lines_of(tmp_path / "run") == lines_of(trained)
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "run"), params_of(trained))


def test_the_evaluation_writes_a_file_and_shows_a_chart_and_pictures(trained):
    found = json.loads((trained / "predictions.json").read_text())
    source = ToyShapes("toy:test:12")
    assert [picture["id"] for picture in found] == [row["picture_id"] for row in source.metadata()]
    # Boxes are of the source picture: one that was found lies on a true one there.
    best = [
        iou(np.asarray(row["boxes"], float)[:, None], np.asarray(picture["boxes"]).reshape(1, -1, 4)).max(1, initial=0)
        for row, picture in zip(source.metadata(), found, strict=True)
    ]
    result = json.loads((trained / "result.json").read_text())
    assert np.concatenate(best).mean() == pytest.approx(result["eval/test/iou"], abs=0.02)
    page = (trained / "report.html").read_text()
    assert "boxes found" in page and "recall at IoU 0.5" in page
    assert page.count("<img") == 6 and "test-00005" in page


def test_a_trained_detector_is_evaluated_elsewhere(trained, tmp_path):
    assert run_main(*FLAGS, "--config.mode=eval", f"--config.init={trained}", f"--workdir={tmp_path}") == 0
    assert (tmp_path / "predictions.json").read_text() == (trained / "predictions.json").read_text()


def test_preflight_compiles_both_buckets_or_one():
    config = changed_config(**{"init": "", "data.train": "", "data.test": "", "model.variant": "ti"})
    config.model.overrides.update(TINY_MODEL)
    topology = topologies.find("v5e:2x4")
    found = preflight(config.lock(), topology, devices=jax.devices())
    assert [bucket["inputs"]["image"] for bucket in found["buckets"]] == [[*size, 3] for size in SIZES]
    assert found["fits"] and found["task"] == "toy_detection" and found["variant"] == "ti, tiny"
    one = preflight(config, topology, devices=jax.devices(), bucket=1)
    assert [bucket["bucket"] for bucket in one["buckets"]] == [1]


def test_predict_draws_boxes_and_writes_a_line_for_each(trained, tmp_path, capsys):
    source = ToyShapes("toy:test:3")
    (tmp_path / "in").mkdir()
    for record in map(source.__getitem__, range(3)):
        Image.fromarray(record["image"]).save(tmp_path / "in" / f"{record['key']}.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    assert predict([f"--init={trained}", f"--input={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--least=0.4"]) == 0
    assert "3 pictures, 1 not read" in capsys.readouterr().out
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "x1", "y1", "x2", "y2", "score"]
    pictures = json.loads((tmp_path / "out" / "predictions.json").read_text())["pictures"]
    assert len(rows) == sum(len(picture["found"]) for picture in pictures)
    assert all(float(row["score"]) >= 0.4 for row in rows)
    for picture, record in zip(pictures, source.metadata(), strict=True):
        found = np.array([[box[name] for name in ("x1", "y1", "x2", "y2")] for box in picture["found"]]).reshape(-1, 4)
        assert picture["file"] == f"{record['key']}.png"
        assert iou(np.asarray(record["boxes"], float)[:, None], found[None]).max(initial=0) > 0.3
    assert (tmp_path / "out" / "report.html").read_text().count("<img") == 3


def test_boxes_are_padded_to_one_shape():
    example = {"key": "a", "boxes": np.array([[0, 0, 2, 2], [1, 1, 3, 3]]), "ignore": np.array([False, True])}
    out = PadBoxes(3)(example, np.random.default_rng(0))
    np.testing.assert_array_equal(out["boxes"], [[0, 0, 2, 2], [1, 1, 3, 3], [0, 0, 0, 0]])
    assert out["objects"].tolist() == [True, False, False] and out["ignore"].tolist() == [False, True, False]
    with pytest.raises(BadRecord, match="2 boxes, a batch has room for 1"):
        PadBoxes(1)(example, np.random.default_rng(0))


def test_loss_of_known_cells_only():
    """Five cells: an object, the smaller of two around it; background; ignored; padding; another object's."""
    centres = jnp.array([[4.0, 4.0], [12.0, 4.0], [20.0, 4.0], [28.0, 4.0], [1.0, 1.0]])
    boxes = jnp.array([[[0, 0, 8, 8], [2, 2, 6, 6], [16, 0, 24, 8], [0, 0, 0, 0]]], jnp.float32)
    batch = {
        "boxes": boxes,
        "objects": jnp.array([[True, True, False, False]]),
        "ignore": jnp.array([[False, False, True, False]]),
    }
    right = {
        "detector/centres": centres,
        "detector/boxes": boxes[:, jnp.array([1, 3, 3, 3, 0])],
        "detector/objectness": jnp.array([[30.0, -30, 30, 30, 30]]),
        "detector/inside": jnp.array([[True, True, True, False, True]]),
    }
    loss_of = jax.jit(detection_loss)
    loss, parts = loss_of(right, batch)
    assert float(loss) == pytest.approx(0, abs=1e-6) and set(parts) == {"objectness_loss", "box_loss"}
    moved = right | {"detector/boxes": right["detector/boxes"].at[0, 0].set(jnp.array([4.0, 2, 8, 6]))}
    assert float(loss_of(moved, batch)[1]["box_loss"]) == pytest.approx((1 - 1 / 3) / 2, abs=1e-6)
    wrong = right | {"detector/objectness": jnp.array([[30.0, 30, 30, 30, 30]])}
    assert float(loss_of(wrong, batch)[1]["objectness_loss"]) == pytest.approx(30 / 3, abs=1e-4)
