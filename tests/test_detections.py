"""From a detector's outputs to boxes: equal to loops and numpy's greedy suppression on many cases, ties included."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from florence_jax.boxes import box_areas, iou
from florence_jax.models import detections as module
from florence_jax.models.detections import candidates, merge, suppress

SIZES = (48, 12, 3, 1, 1)  # anchors of the levels
CLASSES = 4
find = jax.jit(functools.partial(candidates, level_sizes=SIZES, threshold=0.1, per_level=20))
join = jax.jit(merge)


def greedy(boxes, scores, labels, most_overlap, most):
    """The definition, of one picture: indices of what stays, best first."""
    covers = (labels[:, None] == labels[None]) & (iou(boxes[:, None], boxes[None]) > most_overlap)
    kept = []
    for place in np.argsort(-scores, kind="stable").tolist():
        if scores[place] > 0 and not covers[kept, place].any():
            kept.append(place)
    return kept[:most]


def padded(boxes, scores, labels, kept, most):
    """What `suppress` gives of a picture."""
    room = most - len(kept)
    return {
        "boxes": np.pad(boxes[kept], ((0, room), (0, 0))),
        "scores": np.pad(scores[kept], (0, room)),
        "labels": np.pad(labels[kept], (0, room), constant_values=-1),
    }


def random_candidates(rng, count, room):
    """Boxes with whole corners, many alike, twice or without area, with few different scores."""
    corner = rng.integers(0, 12, (count, room, 2)) * rng.choice([1, 8], (count, 1, 1))
    side = rng.integers(0, rng.choice([3, 12, 40], (count, room, 1)), (count, room, 2))
    boxes = np.concatenate([corner, corner + side], -1).astype(np.float32)
    twin = rng.integers(0, room, (count, room // 4))
    boxes[:, : room // 4] = np.take_along_axis(boxes, twin[..., None], 1)
    scores = (rng.integers(-3, rng.choice([3, 20, 1000], (count, 1)), (count, room)) / 1024).clip(0).astype(np.float32)
    return {"boxes": boxes, "scores": scores, "labels": rng.integers(0, rng.choice([1, 3], (count, 1)), (count, room))}


@pytest.mark.parametrize("tile,room,count,most", [(16, 50, 1000, 12), (256, 40, 60, 100), (8, 120, 40, 30)])
def test_suppression_equals_the_greedy_one(tile, room, count, most, monkeypatch):
    monkeypatch.setattr(module, "BOXES_AT_ONCE", tile)
    found = random_candidates(np.random.default_rng(tile), count, room)
    found["labels"] = found["labels"].astype(np.int32)
    out = jax.device_get(jax.jit(functools.partial(suppress, iou=0.6, most=most))(found))
    kept = []
    for row, (boxes, scores, labels) in enumerate(zip(*found.values(), strict=True)):
        kept.append(greedy(boxes, scores, labels, 0.6, most))
        for name, expected in padded(boxes, scores, labels, kept[-1], most).items():
            np.testing.assert_array_equal(out[name][row], expected)
    numbers = np.array([len(row) for row in kept])
    assert (numbers > 1).mean() > 0.9 and (numbers < (found["scores"] > 0).sum(1)).mean() > 0.5


def test_a_chain_in_a_tile_is_decided_from_its_best():
    """Each of 60 boxes covers its neighbours only: every other one stays, which 60 rounds find."""
    corner = np.arange(60, dtype=np.float32)
    boxes = np.stack([corner, 0 * corner, corner + 4, 0 * corner + 1], 1)[None]
    found = {
        "boxes": boxes,
        "scores": np.linspace(1, 0.5, 60, dtype=np.float32)[None],
        "labels": np.zeros((1, 60), int),
    }
    out = jax.jit(functools.partial(suppress, iou=0.5, most=40))(found)
    assert out["boxes"][0, :31, 0].tolist() == [*range(0, 60, 2), 0] and (out["labels"][0] == 0).sum() == 30


@pytest.mark.parametrize("number,count", [(7, 7), (50, 9), (50, 70), (300, 1)])
def test_largest_equals_a_stable_sort(number, count):
    rng = np.random.default_rng(number)
    values = (rng.integers(0, 12, (20, number)) / 11).astype(np.float32)
    values[:4] = rng.random((4, number))
    values[4] = 0
    expected = np.sort(np.argsort(-values, axis=1, kind="stable")[:, :count], axis=1)
    np.testing.assert_array_equal(jax.jit(module._largest, static_argnums=1)(values, count), expected)


def random_outputs(rng, count, extent=64):
    """Outputs of a detector with few different logits, so that many scores are equal, and true sizes."""
    number = sum(SIZES)
    centres, half = rng.uniform(-10, extent + 10, (count, number, 2)), rng.uniform(0, 16, (count, number, 2))
    return {
        "detector/logits": rng.integers(-6, 4, (count, number, CLASSES)).astype(np.float32),
        "detector/centerness": rng.integers(-2, 3, (count, number)).astype(np.float32),
        "detector/boxes": np.concatenate([centres - half, centres + half], -1).round().astype(np.float32),
        "detector/inside": rng.random((count, number)) < 0.8,
    }, rng.integers(16, extent + 1, (count, 2)).astype(np.int32)


def candidates_by_loops(outputs, valid, threshold, per_level):
    """The definition for one picture: lists of boxes, scores, labels."""
    probability = 1 / (1 + np.exp(-outputs["detector/logits"]))
    scores = probability / (1 + np.exp(-outputs["detector/centerness"]))[:, None]
    scores[(probability <= threshold) | ~outputs["detector/inside"][:, None]] = 0
    found = []
    for first, size in zip(np.cumsum((0, *SIZES)), SIZES, strict=False):
        level = scores[first : first + size].ravel()
        pairs = [pair for pair in np.argsort(-level, kind="stable")[:per_level] if level[pair] > 0]
        for pair in sorted(pairs):
            box = outputs["detector/boxes"][first + pair // CLASSES].clip(0, [valid[1], valid[0]] * 2)
            if box_areas(box) > 0:
                found.append((box, level[pair], pair % CLASSES))
    return found


@pytest.mark.parametrize("per_level,most", [(1000, 100), (20, 15)])
def test_detections_equal_loops(per_level, most):
    outputs, valid = random_outputs(np.random.default_rng(per_level), 50)
    settings = {"level_sizes": SIZES, "threshold": 0.1, "per_level": per_level}
    chosen = (
        find(outputs, valid) if per_level == 20 else jax.jit(functools.partial(candidates, **settings))(outputs, valid)
    )
    out = jax.jit(functools.partial(suppress, iou=0.5, most=most))(chosen)
    chosen, out = jax.device_get((chosen, out))
    limit = np.tile(valid[:, ::-1], 2)[:, None]
    assert (out["boxes"] >= 0).all() and (out["boxes"] <= limit).all()
    for row in range(50):
        expected = candidates_by_loops({k: v[row] for k, v in outputs.items()}, valid[row], 0.1, per_level)
        some = chosen["scores"][row] > 0
        boxes, scores, labels = (np.array(column) for column in zip(*expected, strict=True))
        np.testing.assert_array_equal(chosen["boxes"][row][some], boxes)
        np.testing.assert_allclose(chosen["scores"][row][some], scores, rtol=1e-6)
        np.testing.assert_array_equal(chosen["labels"][row][some], labels)
        kept = greedy(boxes, np.asarray(chosen["scores"][row][some]), labels, 0.5, most)
        for name, right in padded(boxes, scores, labels, kept, most).items():
            np.testing.assert_allclose(out[name][row], right, rtol=1e-6)
    assert (out["scores"][:, min(most, 40) - 1] > 0).any()


@pytest.mark.parametrize("at_once,per_level", [(4, 20), (5, 1000), (11, 20)])
def test_some_classes_after_the_others_are_all_at_once(at_once, per_level, monkeypatch):
    """Whole numbers, so that sums are exact, and equal scores of several classes and anchors everywhere."""
    monkeypatch.setattr(module, "CLASSES_AT_ONCE", at_once)
    classes, rng = 11, np.random.default_rng(per_level)
    outputs, valid = random_outputs(rng, 8)
    layer = {"kernel": rng.integers(-1, 2, (4, classes)), "bias": rng.integers(-3, 0, classes)}
    layer = {name: value.astype(np.float32) for name, value in layer.items()}
    x = outputs["detector/features"] = rng.integers(-1, 2, (8, sum(SIZES), 4)).astype(np.float32)
    outputs["detector/logits"] = x @ layer["kernel"] + layer["bias"]
    found = functools.partial(candidates, level_sizes=SIZES, threshold=0.1, per_level=per_level)
    whole, parts = (jax.device_get(jax.jit(found)(outputs, valid, layer=given)) for given in (None, layer))
    assert whole["scores"].shape == parts["scores"].shape and (whole["scores"] > 0).sum() > 150
    for row in range(8):
        some, same = whole["scores"][row] > 0, parts["scores"][row] > 0
        for name, value in whole.items():
            np.testing.assert_array_equal(parts[name][row][same], value[row][some])


def test_nothing_found_is_no_boxes():
    outputs, valid = random_outputs(np.random.default_rng(0), 50)
    outputs["detector/inside"][:25] = False
    outputs["detector/logits"][25:] = -9
    out = join([find(outputs, valid)])
    assert (out["labels"] == -1).all() and not out["scores"].any() and not out["boxes"].any()


def test_views_of_a_picture_are_one_answer():
    outputs, valid = random_outputs(np.random.default_rng(0), 50)
    view = find(outputs, valid)
    one, both = join([view]), join([view, view])
    for name in one:
        np.testing.assert_array_equal(one[name], both[name])
    other = view | {"scores": view["scores"] * 1.2, "boxes": view["boxes"] + 1}
    better = join([other, view])
    assert (better["scores"][:, 0] == other["scores"].max(1)).all() and (
        better["boxes"][:, 0] != one["boxes"][:, 0]
    ).any()


@pytest.mark.parametrize("at_once", [None, 2])
def test_devices_keep_their_own_pictures(at_once, monkeypatch):
    monkeypatch.setattr(module, "CLASSES_AT_ONCE", at_once)
    outputs, valid = random_outputs(np.random.default_rng(1), 8)
    outputs["detector/features"] = outputs["detector/logits"]
    layer = {"kernel": np.eye(CLASSES, dtype=np.float32), "bias": np.zeros(CLASSES, np.float32)} if at_once else None
    function = jax.jit(lambda *args: suppress(candidates(*args, level_sizes=SIZES, per_level=20, layer=layer)))
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
    args = jax.device_put((outputs, valid), sharding)
    compiled = function.lower(*args).compile()
    assert not any(name in compiled.as_text() for name in ("all-gather", "all-to-all", "collective-permute"))
    for name, value in function(outputs, valid).items():
        np.testing.assert_array_equal(compiled(*args)[name], value)


def test_levels_that_do_not_fit_are_refused():
    outputs, valid = random_outputs(np.random.default_rng(0), 1)
    with pytest.raises(ValueError, match=r"levels of \(3, 4\) anchors are not 65"):
        candidates(outputs, valid, (3, 4))
