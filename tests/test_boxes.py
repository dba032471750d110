"""Areas and overlaps of boxes: known values, numpy and JAX alike, nothing infinite at boxes without area."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from florence_jax.boxes import box_areas, giou, iou

BOX = [0.0, 0, 4, 2]
# second box, IoU, GIoU: the same, a half, apart, touching, turned inside out, a line inside, a point far away
CASES = [
    (BOX, 1.0, 1.0),
    ([0, 0, 2, 2], 0.5, 0.5),
    ([6, 0, 8, 2], 0.0, -0.25),
    ([4, 0, 8, 2], 0.0, 0.0),
    ([4, 2, 0, 0], 0.0, 0.0),
    ([1, 1, 3, 1], 0.0, 0.0),
    ([8, 4, 8, 4], 0.0, -0.75),
]


def test_known_values_in_numpy_and_jax():
    second, common, general = zip(*CASES, strict=True)
    for module in (np, jnp):
        first, others = module.asarray([BOX], "float32"), module.asarray(second, "float32")
        np.testing.assert_allclose(iou(first, others), common, atol=1e-6)
        np.testing.assert_allclose(giou(first, others), general, atol=1e-6)
        assert box_areas(others).tolist() == [8, 4, 4, 8, 0, 0, 0]
    none = np.zeros((0, 4), np.float32)
    assert iou(none[:, None], none[None]).shape == (0, 0) and iou(np.array([BOX], np.int64), none).dtype == np.float64


def test_equal_the_definition_on_a_grid():
    """Of boxes with whole corners: cells counted one by one."""
    rng = np.random.default_rng(0)
    low = rng.integers(0, 8, (40, 2))
    boxes = np.concatenate([low, low + rng.integers(1, 8, (40, 2))], 1)
    y, x = np.mgrid[:16, :16]
    inside = [(x >= x1) & (x < x2) & (y >= y1) & (y < y2) for x1, y1, x2, y2 in boxes]
    union = np.array([[(a | b).sum() for a in inside] for b in inside])
    expected = np.array([[(a & b).sum() for a in inside] for b in inside]) / union
    np.testing.assert_allclose(iou(boxes[:, None], boxes[None]), expected)
    corners = np.minimum(boxes[:, None], boxes[None])[..., :2], np.maximum(boxes[:, None], boxes[None])[..., 2:]
    hull = (corners[1] - corners[0]).prod(-1)
    np.testing.assert_allclose(giou(boxes[:, None], boxes[None]), expected - (hull - union) / hull)


@pytest.mark.parametrize("function", [iou, giou])
def test_gradients_are_finite_at_boxes_without_area(function):
    points = jnp.asarray([[1.0, 1, 1, 1], [1, 1, 1, 3], [3, 3, 1, 1], [0, 0, 4, 2], [1e-30, 0, 2e-30, 1e-30]])
    gradient = jax.jit(jax.grad(lambda first: function(first[:, None], points[None]).sum()))(points)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
