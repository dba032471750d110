"""Anchors and the box code, against the numbers of the released code."""

import jax.numpy as jnp
import numpy as np
import pytest

from florence_jax.models.anchors import STRIDES, anchors, decode_boxes, level_shapes


@pytest.mark.parametrize(
    ("size", "shapes"),
    [
        ((256, 384), [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]),
        ((96, 32), [(12, 4), (6, 2), (3, 1), (2, 1), (1, 1)]),
    ],
)
def test_order_and_sides(size, shapes):
    """Level, row, column; squares of eight strides around the middle of their position."""
    assert level_shapes(*size) == tuple(shapes)
    rows = iter(anchors(*size))
    for stride, (height, width) in zip(STRIDES, shapes, strict=True):
        for y in range(height):
            for x in range(width):
                want = stride * np.array([x + 0.5 - 4, y + 0.5 - 4, x + 0.5 + 4, y + 0.5 + 4])
                np.testing.assert_array_equal(next(rows), want)
    assert next(rows, None) is None


@pytest.mark.parametrize(
    ("level", "row", "column", "box", "deltas"),
    [
        (0, 8, 6, (20, 30, 90, 110), (0.4688, 0.3125, 0.4481, 1.1157)),
        (1, 8, 8, (60, 60, 220, 200), (0.3125, -0.4688, 1.1157, 0.4481)),
        (0, 2, 26, (200, 10, 230, 34), (0.4688, 0.3125, -3.7884, -4.9041)),
    ],
)
def test_box_code_golden(level, row, column, box, deltas):
    shapes = level_shapes(256, 256)
    index = sum(height * width for height, width in shapes[:level]) + row * shapes[level][1] + column
    # The golden deltas have four digits.
    np.testing.assert_allclose(decode_boxes(jnp.asarray(anchors(256, 256)[index]), jnp.array(deltas)), box, atol=3e-3)


def test_decoded_sides_are_bounded():
    box = decode_boxes(jnp.array([0.0, 0, 64, 64]), jnp.array([0, 0, 1e4, -1e4]))
    np.testing.assert_allclose(box, [32 - 2000, 32, 32 + 2000, 32], rtol=1e-5)
