"""ATSS and the detector's losses: the reference implementation's values, loops over everything, what must hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from florence_jax.boxes import giou, iou
from florence_jax.losses.detection import assign_atss, centerness, detection_loss, focal_loss, loss_of_sums, loss_sums

STRIDES = (8, 16, 32, 64, 128)
CLASSES = 3
assigned = jax.jit(assign_atss, static_argnums=1)


def assign(*args):
    """`assign_atss`, in numpy."""
    return jax.device_get(assigned(*args))


def grid(height, width):
    """Square anchors (N, 4) of side 8 x stride, and how many each level has."""
    levels = []
    for stride in STRIDES:
        y, x = np.mgrid[: -(-height // stride), : -(-width // stride)]
        centres = stride * (np.stack([x, y], -1).reshape(-1, 2) + 0.5)
        levels.append(np.concatenate([centres - 4 * stride, centres + 4 * stride], 1))
    return np.concatenate(levels).astype(np.float32), tuple(map(len, levels))


def rectangles_inside(height, width, valid):
    """bool (B, N): anchors whose cell is not all padding, for true sizes (B, 2)."""
    rows = []
    for true in valid:
        cells = [np.mgrid[: -(-height // s), : -(-width // s)] * s for s in STRIDES]
        rows.append(np.concatenate([((y < true[0]) & (x < true[1])).ravel() for y, x in cells]))
    return np.array(rows)


def atss_by_loops(anchors, sizes, boxes, objects, inside):
    """The definition for one picture, float64: index of the box of each anchor, -1 for none."""
    anchors, boxes = anchors.astype(np.float64), boxes.astype(np.float64)
    centres, best, matched = (anchors[:, :2] + anchors[:, 2:]) / 2, np.full(len(anchors), -1.0), -np.ones(len(anchors))
    for index in np.flatnonzero(objects):
        box, candidates = boxes[index], []
        for first, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
            level = np.arange(first, first + size)[inside[first : first + size]]
            far = ((centres[level] - (box[:2] + box[2:]) / 2) ** 2).sum(1)
            candidates += level[np.argsort(far, kind="stable")[:9]].tolist()
        overlaps = iou(anchors[candidates], box[None])
        least = overlaps.mean() + (overlaps.std(ddof=1) if len(candidates) > 1 else 0)
        for anchor, overlap in zip(candidates, overlaps, strict=True):
            within = min(*(centres[anchor] - box[:2]), *(box[2:] - centres[anchor])) > 0.01
            if overlap >= least and within and overlap > best[anchor]:
                best[anchor], matched[anchor] = overlap, index
    return matched


def random_boxes(rng, count, room, height, width):
    """Boxes (count, room, 4) with whole corners, some small, some thin, some twice, some without area."""
    corner = rng.integers(0, (width - 8, height - 8), (count, room, 2))
    side = rng.integers(0, rng.choice([8, 40, max(height, width)], (count, room, 1)), (count, room, 2))
    boxes = np.concatenate([corner, np.minimum(corner + side, (width, height))], -1).astype(np.float32)
    boxes[:, 1::5] = boxes[:, ::5][:, : boxes[:, 1::5].shape[1]]
    return boxes


def test_atss_of_the_reference_implementation():
    anchors, sizes = grid(256, 256)
    boxes = np.array([[20, 30, 90, 110], [60, 60, 220, 200], [200, 10, 230, 34], [64, 64, 96, 128]], np.float32)
    expected = {
        0: [(7, 6), (7, 7), (8, 5), (8, 6), (8, 7), (8, 8), (9, 5), (9, 6), (9, 7)],
        1: [(6, 8), (7, 7), (7, 8), (7, 9), (8, 7), (8, 8), (8, 9), (9, 8), (9, 9)],
        2: [(1, 26), (1, 27), (2, 25), (2, 26), (2, 27), (2, 28), (3, 25), (3, 26), (3, 27)],
        3: [(10, 9), (10, 10), (11, 8), (11, 9), (11, 10), (11, 11), (12, 8), (12, 9), (12, 10)],
    }
    matched, answered = assign(anchors, sizes, boxes[None], np.ones((1, 4), bool), np.ones((1, len(anchors)), bool))
    assert matched.dtype == jnp.int32 and (matched >= 0).sum() == 36 and answered.all()
    for index, places in expected.items():
        first, columns = (1024, 16) if index == 1 else (0, 32)
        assert np.flatnonzero(matched[0] == index).tolist() == [first + columns * y + x for y, x in places]
    centre = lambda first, columns, y, x: anchors[first + columns * y + x].reshape(2, 2).mean(0)  # noqa: E731
    points = np.stack([centre(0, 32, 8, 6), centre(1024, 16, 8, 8), centre(0, 32, 2, 26)])
    np.testing.assert_allclose(centerness(points, boxes[:3]), [0.87287, 0.87287, 0.69007], atol=5e-6)


def test_atss_of_four_anchors():
    anchors = np.array([[0, 0, 10, 10], [10, 10, 20, 20], [5, 5, 15, 15], [32, 32, 38, 42]], np.float32)
    boxes = np.array([[[0, 0, 10, 9], [0, 10, 10, 19]]], np.float32)
    matched, answered = assign(anchors, (4,), boxes, np.ones((1, 2), bool), np.ones((1, 4), bool))
    assert matched.tolist() == [[0, -1, -1, -1]] and answered.tolist() == [[True, False]]


@pytest.mark.parametrize("height,width,room,distances", [(96, 160, 11, 2**18), (256, 128, 7, 1500)])
def test_atss_equals_loops(height, width, room, distances, monkeypatch):
    monkeypatch.setattr("florence_jax.losses.detection.DISTANCES_AT_ONCE", distances)  # some boxes after the others
    rng = np.random.default_rng(height)
    anchors, sizes = grid(height, width)
    count = 40
    boxes, objects = random_boxes(rng, count, room, height, width), rng.random((count, room)) < 0.7
    inside = rectangles_inside(height, width, rng.integers(1, (height + 1, width + 1), (count, 2)))
    inside[::2] = True
    matched, answered = assign(anchors, sizes, boxes, objects, inside)
    expected = [atss_by_loops(anchors, sizes, *one) for one in zip(boxes, objects, inside, strict=True)]
    np.testing.assert_array_equal(matched, expected)
    np.testing.assert_array_equal(answered, [[index in row for index in range(room)] for row in expected])
    assert 100 < (matched >= 0).sum() and 0 < answered.sum() < objects.sum()


def test_focal_loss_of_the_reference_implementation():
    logits = np.array([[2.0, 2], [0, 0], [-4.59512, -4.59512]], np.float32)
    expected = [[4.509e-4, 1.237558], [0.0433217, 0.1299651], [1.128382, 7.54e-7]]
    np.testing.assert_allclose(focal_loss(logits, np.zeros(3, np.int32)), expected, rtol=5e-4)
    far = jnp.array([[300.0, -300, 300, -300]])
    gradient = jax.grad(lambda x: focal_loss(x, jnp.array([1])).sum())(far)
    assert np.isfinite(gradient).all() and focal_loss(far, jnp.array([1]))[0].tolist() == [225, 75, 225, 0]


def test_centerness_without_area_is_no_nan():
    boxes = np.array([[5, 5, 5, 9], [5, 5, 5, 5], [4, 4, 6, 6], [0, 0, 6, 6], [6, 6, 8, 8]], np.float32)
    expected = [0, 0, 1, 0.2, 0]
    np.testing.assert_allclose(centerness(np.full((5, 2), 5, np.float32), boxes), expected, rtol=1e-6)


def example(count=8, height=64, width=128, room=4, seed=0):
    """Outputs of a detector that knows nothing, and a batch with objects, boxes to ignore and room for more."""
    rng = np.random.default_rng(seed)
    anchors, sizes = grid(height, width)
    number = len(anchors)
    boxes = random_boxes(rng, count, room, height, width)
    boxes[:, 2:] = np.where(rng.random((count, room - 2, 1)) < 0.7, boxes[:, 2:], 0)
    known = (boxes[..., 2:] > boxes[..., :2]).all(-1)
    ignore = known & (rng.random((count, room)) < 0.3)
    noise = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    outputs = {
        "detector/logits": 2 * noise(count, number, CLASSES),
        "detector/centerness": noise(count, number),
        "detector/boxes": anchors[None] + 4 * noise(count, number, 4),
        "detector/inside": rectangles_inside(height, width, rng.integers(32, (height + 1, width + 1), (count, 2))),
        "detector/anchors": anchors,
    }
    batch = {
        "boxes": boxes,
        "class_ids": rng.integers(0, CLASSES, (count, room)).astype(np.int32),
        "objects": known & ~ignore,
        "ignore": ignore,
    }
    return outputs, batch, sizes


LEARNT = ("logits", "centerness", "boxes")


@functools.cache
def loss_and_gradients(sizes):
    """Jitted: learnt outputs, the other outputs, a batch -> ((loss, metrics), gradients)."""
    return jax.jit(
        jax.value_and_grad(lambda learnt, others, batch: detection_loss(learnt | others, batch, sizes), has_aux=True)
    )


def split(outputs):
    learnt = {f"detector/{name}": outputs[f"detector/{name}"] for name in LEARNT}
    return learnt, {name: value for name, value in outputs.items() if name not in learnt}


def loss_by_loops(outputs, batch, sizes):
    """The definition, an anchor after the other, float64: sums as `loss_sums`."""
    sums = dict.fromkeys(("class", "centerness", "box", "weight", "positives", "missed"), 0.0)
    anchors = outputs["detector/anchors"].astype(np.float64)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for row, boxes in enumerate(batch["boxes"].astype(np.float64)):
        inside, objects = outputs["detector/inside"][row], batch["objects"][row]
        matched = atss_by_loops(anchors, sizes, boxes, objects, inside).astype(int)
        sums["missed"] += sum(index not in matched for index in np.flatnonzero(objects))
        for anchor in np.flatnonzero(inside):
            x, y = (anchors[anchor, :2] + anchors[anchor, 2:]) / 2
            index = matched[anchor]
            covers = (boxes[:, :2] < (x, y)).all(1) & (boxes[:, 2:] > (x, y)).all(1) & batch["ignore"][row]
            if index < 0 and covers.any():
                continue
            for label, p in enumerate(sigmoid(outputs["detector/logits"][row, anchor].astype(np.float64))):
                right = index >= 0 and batch["class_ids"][row, index] == label
                if not right and not batch["judged"][row, label]:
                    continue
                sums["class"] -= 0.25 * (1 - p) ** 2 * np.log(p) if right else 0.75 * p**2 * np.log(1 - p)
            if index >= 0:
                left, top, right, bottom = x - boxes[index, 0], y - boxes[index, 1], *(boxes[index, 2:] - (x, y))
                weight = np.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
                p = sigmoid(outputs["detector/centerness"][row, anchor].astype(np.float64))
                sums["centerness"] -= weight * np.log(p) + (1 - weight) * np.log(1 - p)
                found = outputs["detector/boxes"][row, anchor].astype(np.float64)
                sums["box"] += weight * (1 - giou(found, boxes[index]))
                sums["weight"] += weight
                sums["positives"] += 1
    return sums


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_loss_equals_loops(share):
    """Where people judged all classes of each picture, and where some."""
    outputs, batch, sizes = example()
    judged = np.random.default_rng(2).random((len(batch["boxes"]), CLASSES)) < share
    sums = loss_by_loops(outputs, batch | {"judged": judged}, sizes)
    if share < 1:
        batch["judged"] = judged
    (loss, metrics), _ = loss_and_gradients(sizes)(*split(outputs), batch)
    expected = {
        "class_loss": sums["class"] / sums["positives"],
        "centerness_loss": sums["centerness"] / sums["positives"],
        "box_loss": 2 * sums["box"] / sums["weight"],
        "positives": sums["positives"],
        "objects_without_anchor": sums["missed"],
    }
    assert sums["positives"] > 20 and sums["missed"] > 0 and metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=2e-6), name
    assert float(loss) == pytest.approx(sum(expected[f"{name}_loss"] for name in ("class", "box", "centerness")))


def test_what_is_ignored_or_padding_has_no_gradient():
    outputs, batch, sizes = example()
    learnt, others = split(outputs)
    (loss, _), gradients = jax.device_get(loss_and_gradients(sizes)(learnt, others, batch))
    by_class = np.abs(gradients["detector/logits"]).max(-1)
    matched = np.array(
        assign(others["detector/anchors"], sizes, batch["boxes"], batch["objects"], others["detector/inside"])[0]
    )
    centres = others["detector/anchors"].reshape(-1, 2, 2).mean(1)[None, :, None]
    boxes = batch["boxes"][:, None]
    covers = ((centres > boxes[..., :2]) & (centres < boxes[..., 2:])).all(-1)
    unknown = (covers & batch["ignore"][:, None]).any(-1) & (matched < 0)
    assert unknown.any() and ((by_class > 0) == (others["detector/inside"] & ~unknown)).all()
    assert ((np.abs(gradients["detector/boxes"]).max(-1) > 0) <= (matched >= 0)).all()
    assert ((np.abs(gradients["detector/centerness"]) > 0) == (matched >= 0)).all()
    # What stands in the room for more boxes does not matter.
    filled = batch | {
        "boxes": np.where((batch["objects"] | batch["ignore"])[..., None], batch["boxes"], np.float32(33))
    }
    assert float(loss_and_gradients(sizes)(learnt, others, filled)[0][0]) == float(loss)


def test_what_nobody_judged_has_no_gradient():
    outputs, batch, sizes = example()
    judged = np.random.default_rng(2).random((len(batch["boxes"]), CLASSES)) < 0.4
    learnt, others = split(outputs)
    gradient_of = loss_and_gradients(sizes)
    (loss, metrics), gradients = jax.device_get(gradient_of(learnt, others, batch | {"judged": judged}))
    everything = np.ones_like(judged)
    (whole, all_metrics), all_gradients = jax.device_get(gradient_of(learnt, others, batch))
    (same, _), same_gradients = jax.device_get(gradient_of(learnt, others, batch | {"judged": everything}))
    assert same == whole and all((same_gradients[name] == all_gradients[name]).all() for name in same_gradients)
    matched = assign(others["detector/anchors"], sizes, batch["boxes"], batch["objects"], others["detector/inside"])[0]
    own = np.take_along_axis(batch["class_ids"], np.maximum(matched, 0), 1)[..., None] == np.arange(CLASSES)
    own &= (matched >= 0)[..., None]
    assert (own & ~judged[:, None]).any() and judged.any(1).mean() < 1
    kept, by_class = own | judged[:, None], gradients["detector/logits"]
    np.testing.assert_array_equal(by_class, np.where(kept, all_gradients["detector/logits"], 0))
    for name in ("positives", "objects_without_anchor", "box_loss", "centerness_loss"):
        assert metrics[name] == all_metrics[name]
    assert metrics["class_loss"] < all_metrics["class_loss"]


def test_apart_from_all_boxes_of_a_picture_with_some_nothing_is_background():
    outputs, batch, sizes = example()
    learnt, others = split(outputs)
    gradient_of = loss_and_gradients(sizes)
    partly = np.arange(len(batch["boxes"])) % 2 == 0
    (_, metrics), gradients = jax.device_get(gradient_of(learnt, others, batch | {"partly_boxed": partly}))
    (_, all_metrics), all_gradients = jax.device_get(gradient_of(learnt, others, batch))
    matched = assign(others["detector/anchors"], sizes, batch["boxes"], batch["objects"], others["detector/inside"])[0]
    x, y = (np.asarray(others["detector/anchors"])[:, axis::2].mean(1) for axis in (0, 1))
    near = np.zeros(matched.shape, bool)
    for row in range(len(near)):
        for (x1, y1, x2, y2), known in zip(batch["boxes"][row].tolist(), batch["objects"][row], strict=True):
            across, down = abs(x - (x1 + x2) / 2) < x2 - x1, abs(y - (y1 + y2) / 2) < y2 - y1
            near[row] |= across & down & known
    kept = (near | (matched >= 0) | ~partly[:, None])[..., None]
    everywhere = all_gradients["detector/logits"]
    assert (everywhere[partly] != 0)[~kept[partly][..., 0]].any() and (near & (matched < 0))[partly].any()
    np.testing.assert_array_equal(gradients["detector/logits"], np.where(kept, everywhere, 0))
    for name in ("positives", "objects_without_anchor", "box_loss", "centerness_loss"):
        assert metrics[name] == all_metrics[name]


def test_without_boxes_all_is_background():
    outputs, batch, sizes = example()
    empty = batch | {"objects": np.zeros_like(batch["objects"]), "ignore": np.zeros_like(batch["ignore"])}
    (loss, metrics), gradients = jax.device_get(loss_and_gradients(sizes)(*split(outputs), empty))
    background = np.asarray(
        focal_loss(outputs["detector/logits"], np.full(outputs["detector/inside"].shape, -1)), float
    )
    assert float(loss) == pytest.approx(background[outputs["detector/inside"]].sum(), rel=1e-6)
    assert float(metrics["positives"]) == float(metrics["box_loss"]) == float(metrics["centerness_loss"]) == 0
    assert all(np.isfinite(value).all() for value in gradients.values())
    assert (np.abs(gradients["detector/logits"]).max(-1) > 0).tolist() == outputs["detector/inside"].tolist()


def test_parts_of_a_batch_add_up_whatever_their_shapes():
    """Two buckets of other sizes, one with less room for boxes, against both together in the larger one."""
    anchors, sizes = grid(64, 128)
    few, few_sizes = grid(64, 64)
    outputs, batch, _ = example()
    outputs["detector/inside"] &= rectangles_inside(64, 128, np.array([[64, 64]] * 8))
    batch["boxes"] = batch["boxes"].clip(0, 64)
    columns = np.concatenate(
        [
            (first + np.arange(len(level)).reshape(-1, -(-128 // stride))[:, : -(-64 // stride)]).ravel()
            for stride, level, first in zip(
                STRIDES, np.split(anchors, np.cumsum(sizes)[:-1]), np.cumsum((0, *sizes))[:-1], strict=True
            )
        ]
    )
    np.testing.assert_array_equal(anchors[columns], few)
    sums = jax.jit(loss_sums, static_argnums=2)
    cut = {name: value if name == "detector/anchors" else value[:3, columns] for name, value in outputs.items()} | {
        "detector/anchors": few
    }
    room = np.argsort(~(batch["objects"] | batch["ignore"])[:3], axis=1, kind="stable")
    first = {
        name: np.take_along_axis(value[:3], room[..., None] if value.ndim == 3 else room, 1)
        for name, value in batch.items()
    }
    rest = {name: value if name == "detector/anchors" else value[3:] for name, value in outputs.items()}
    parts = sums(cut, first, few_sizes), sums(rest, {name: value[3:] for name, value in batch.items()}, sizes)
    total = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    whole = sums(outputs, batch, sizes)
    assert parts[0]["positives"] > 5 and parts[1]["positives"] > 5
    for name, value in whole.items():
        assert float(total[name]) == pytest.approx(float(value), rel=1e-6), name
    assert float(loss_of_sums(total)[0]) == pytest.approx(float(loss_of_sums(whole)[0]), rel=1e-6)


def test_any_number_of_devices_gives_the_same():
    outputs, batch, sizes = example(height=32, width=64, room=3, seed=1)
    batch["judged"] = np.random.default_rng(2).random((len(batch["boxes"]), CLASSES)) < 0.7
    learnt, others = split(outputs)
    anchors = others.pop("detector/anchors")
    function = jax.value_and_grad(
        lambda learnt, others, batch: detection_loss(learnt | others | {"detector/anchors": anchors}, batch, sizes)[0]
    )
    results = []
    for count in (1, 2, 4, 8):
        sharding = NamedSharding(Mesh(np.array(jax.devices()[:count]), "data"), PartitionSpec("data"))
        args = jax.device_put((learnt, others, batch), sharding)
        compiled = jax.jit(function).lower(*args).compile()
        assert not any(name in compiled.as_text() for name in ("all-gather", "all-to-all", "collective-permute"))
        results.append(compiled(*args))
    for loss, gradients in results[1:]:
        assert float(loss) == pytest.approx(float(results[0][0]), rel=1e-6)
        for name, value in gradients.items():
            np.testing.assert_allclose(value, results[0][1][name], rtol=1e-5, atol=1e-9)


def test_levels_that_do_not_fit_are_refused():
    outputs, batch, _ = example(count=1)
    with pytest.raises(ValueError, match=r"levels of \(3, 4\) anchors are not"):
        detection_loss(outputs, batch, (3, 4))
