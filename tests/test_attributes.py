"""Attributes of objects: the head, its loss against numpy, the boxes that it learns on; told, and scored."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coco_tools import OPS, DrawnBoxes

from florence_jax.boxes import iou
from florence_jax.errors import UserError
from florence_jax.evaluators.attributes import AttributeAccuracy
from florence_jax.inference.detector import BoxFinder, DetectorAnswerer, PictureBoxes
from florence_jax.losses.attributes import attribute_loss, best_found
from florence_jax.models.attributes import build_attribute_head
from florence_jax.models.roi_align import roi_align
from florence_jax.params.sharding import make_mesh
from florence_jax.pictures import Frame
from florence_jax.tasks.attributes import MOST_TOLD, Attributes, attributes_of_folder, attributes_of_source


def test_loss_is_the_cross_entropy_with_the_mean_of_the_attributes():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    ids = np.array([[[1, 3, -1], [0, -1, -1], [-1, -1, -1]], [[2, 4, 0], [1, 2, -1], [4, -1, -1]]])
    counted = np.array([[True, True, True], [True, True, False]])
    expected = []
    for row, box in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        own = [i for i in ids[row, box] if i >= 0]
        target = np.isin(np.arange(5), own) / len(own)
        each = logits[row, box].astype(np.float64)
        expected.append(-(target * (each - np.log(np.exp(each).sum()))).sum())
    function = jax.jit(jax.value_and_grad(attribute_loss, has_aux=True))
    (loss, number), gradient = function(logits, ids, counted)
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-6) and float(number) == 4
    assert (np.asarray(gradient).any(-1) == [[True, True, False], [True, True, False]]).all()
    (loss, number), gradient = function(logits, np.full_like(ids, -1), counted)
    assert float(loss) == float(number) == 0 and not np.asarray(gradient).any()


def test_attributes_are_learned_on_the_best_boxes_found():
    rng = np.random.default_rng(1)
    boxes = np.array([[[0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 0, 0]]] * 2, np.float32)
    matched = rng.integers(-1, 2, (2, 12))
    found = boxes[np.arange(2)[:, None], np.maximum(matched, 0)] + rng.normal(0, 2, (2, 12, 4)).astype(np.float32)
    got, of_object, good = jax.device_get(jax.jit(functools.partial(best_found, most=7))(matched, found, boxes))
    for row in range(2):
        overlap = np.where(matched[row] >= 0, iou(found[row], boxes[row, np.maximum(matched[row], 0)]), 0)
        best = [i for i in np.argsort(-overlap, kind="stable")[:7] if overlap[i] >= 0.5]
        assert 3 < len(best) == good[row].sum() and good[row, : len(best)].all()
        np.testing.assert_array_equal(got[row, : len(best)], found[row, best])
        np.testing.assert_array_equal(of_object[row, : len(best)], matched[row, best])


def test_the_head_reads_the_box_and_its_class():
    head = build_attribute_head(channels=8, classes=4, attributes=6)
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(head.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    batch = {
        "map": rng.normal(size=(2, 3, 4, 8)).astype(np.float32),
        "valid": np.array([[3, 4], [2, 2]], np.int32),
        "boxes": np.array([[[0, 0, 64, 96], [32, 32, 128, 96]], [[0, 0, 40, 64], [0, 0, 0, 0]]], np.float32),
        "class_ids": np.array([[0, 3], [2, 2]], np.int32),
    }
    got = jax.jit(head.apply)(params, batch)["logits"]
    features = jax.jit(roi_align, static_argnums=(2, 3))(batch["map"], batch["boxes"], 32, (1, 1), valid=batch["valid"])
    x = np.concatenate([features[:, :, 0, 0], params["class_embedding"][batch["class_ids"]]], -1)
    assert params["class_embedding"].shape == (4, 256) and params["fc1"]["kernel"].shape == (8 + 256, 512)
    hidden = np.maximum(x @ params["fc1"]["kernel"] + params["fc1"]["bias"], 0)
    np.testing.assert_allclose(got, hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"], rtol=1e-4, atol=1e-5)
    assert got.shape == (2, 2, 6)


# -- told and scored --------------------------------------------------------------------------------------------------

KNOWN = tuple(f"attribute {k}" for k in range(10))


def stand_in(found=None, outputs=None, part=None):
    """Of a detector of two classes, seen at half its size."""
    described = SimpleNamespace(folder="DIR", parts={} if part is None else {"attributes": part})
    model = SimpleNamespace(config=SimpleNamespace(image_width=1))
    return SimpleNamespace(
        classes=("cat", "dog"),
        encoder=SimpleNamespace(description=described, model=model),
        options=SimpleNamespace(scales=(0.5,)),
        look=lambda params, batch: (found, outputs),
        outputs=lambda params, batch: outputs,
    )


def test_the_likeliest_attributes_of_what_is_found():
    rng = np.random.default_rng(3)
    outputs = {"image/norm3": rng.normal(size=(1, 3, 3, 8)).astype(np.float32), "image/valid3": np.array([[3, 3]])}
    boxes = np.array([[[10, 20, 90, 100], [0, 0, 190, 190], [0, 0, 0, 0]]], np.float32)
    found = {"boxes": boxes, "scores": np.array([[0.9, 0.5, 0.0]]), "labels": np.array([[1, 0, -1]])}
    head = Attributes(KNOWN, stand_in(found, outputs))
    shapes = jax.eval_shape(head.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)

    @jax.jit
    def both(params):
        return head.detect(params, {}), head.logits(params, outputs, boxes / 2, np.array([[1, 0, 0]]))

    got, logits = jax.device_get(both(params))
    assert set(got) == {"boxes", "scores", "labels", "attribute_ids", "attribute_scores"}
    assert got["attribute_ids"].shape == (1, 3, MOST_TOLD)
    powers = np.exp(logits[0])
    for row, chance in enumerate(powers / powers.sum(-1, keepdims=True)):
        best = np.argsort(-chance, kind="stable")[:MOST_TOLD]
        np.testing.assert_array_equal(got["attribute_ids"][0, row], best)
        np.testing.assert_allclose(got["attribute_scores"][0, row], chance[best], rtol=1e-5)


def test_which_head_a_detector_has():
    part = {"names": list(KNOWN), "classes": ["cat", "dog"], "entries": ["attributes"]}
    head = attributes_of_folder(stand_in(part=part))
    assert head.names == KNOWN and head.describe() == part
    assert attributes_of_folder(stand_in()) is None
    assert attributes_of_folder(stand_in(part=part | {"classes": ["dog"]})) is None
    assert len(attributes_of_source(None, stand_in()).names) == 400
    with pytest.raises(UserError, match="drawn has no attributes: vg:FOLDER with attributes.json"):
        attributes_of_source(DrawnBoxes(), stand_in())


def test_attributes_beside_the_boxes(tmp_path):
    row = {"attribute_ids": np.array([[2, 0, 1], [1, 2, 0]])}
    row["attribute_scores"] = np.array([[0.7, 0.2, 0.1], [0.9, 0.05, 0.05]])
    finder = object.__new__(BoxFinder)
    finder.attributes = SimpleNamespace(names=("red", "round", "large"))
    told = finder._attributes_of(row, np.array([0, 1]))
    assert told == [[("large", 0.7), ("red", 0.2), ("round", 0.1)], [("round", 0.9)]]
    boxes = np.array([[1, 2, 30, 40], [5, 5, 20, 20]], np.float32)
    scores, labels = np.array([0.9, 0.5], np.float32), np.array([1, 0])
    found = PictureBoxes(0, "a.png", Frame((64, 48), (64, 48), 1), boxes, scores, labels, 0.9, told)
    shown = SimpleNamespace(attributes=finder.attributes, names=("cat", "dog"), category_ids=(1, 2))
    shown.boxes = lambda *_: [found]
    answerer = DetectorAnswerer(shown)
    answers = list(answerer.answers(DrawnBoxes()))
    assert answerer.columns[-1] == "attributes"
    assert [line["attributes"] for line in answers[0].rows] == ["large, red, round", "round"]
    written = json.loads(answerer.files(answers)["detections.json"])["annotations"]
    assert [each["attributes"] for each in written] == [["large", "red", "round"], ["round"]]
    assert answerer.picture_file({"key": "a.png", "image": np.zeros((48, 64, 3), np.uint8)}, answers[0])
    shown.attributes = None
    assert "attributes" not in DetectorAnswerer(shown).columns


class Described(DrawnBoxes):
    """Every box has the attribute of its class, and the first of a picture one more; the second none."""

    attribute_names = ("red", "green", "blue", "first")

    def _record(self, index):
        record = super()._record(index)
        ids = [[label, 3 if i == 0 else -1] if i != 1 else [-1, -1] for i, label in enumerate(record["class_ids"])]
        ids = {"attribute_ids": np.array(ids, np.int32).reshape(-1, 2)}
        arrays = {name: np.array(record[name], kind) for name, kind in (("class_ids", int), ("iscrowd", bool))}
        return record | ids | arrays


def test_accuracy_of_attributes():
    """Of a head that tells red of all, knows no green, and has other numbers."""
    source = Described()
    classes, names = ("WBC", "RBC"), ("first", "blue", "red")  # no platelets

    def judge(params, batch):
        ids = batch["attribute_ids"]
        counted = batch["objects"] & (batch["class_ids"] >= 0) & (ids >= 0).any(-1)
        return {"counted": counted, "right": counted & (ids == params).any(-1)}

    evaluator = AttributeAccuracy(source, OPS, (), judge, make_mesh(-1, 1), 8, classes, names, "test_attributes")
    found = evaluator.run(jnp.int32(2))
    known, red, first = 0, 0, 0
    for record in source.metadata():
        for i, (label, crowd) in enumerate(zip(record["class_ids"], record["iscrowd"], strict=True)):
            if label < 2 and not crowd and i != 1 and (label == 0 or i == 0):  # of WBC, which are green, the first
                known, red, first = known + 1, red + (label == 0), first + (i == 0)
    assert known and found == {"top1": pytest.approx(red / known), "objects": known}
    assert evaluator.chance == {"top1": pytest.approx(max(red, first) / known)}
    assert evaluator.sources == (source,)
