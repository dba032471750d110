"""Anchors of the five levels of a detector, and the box code relative to them.

One square anchor a position (Zhang et al. 2020, "ATSS", arXiv 1912.02424), side 8 times the stride of its level. All
arrays are ordered level, row, column. Boxes are x1 y1 x2 y2 in pixels of the (padded) picture.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

STRIDES = (8, 16, 32, 64, 128)  # P3 to P7, in pixels
ANCHOR_SIDE = 8  # in strides
CENTRE_WEIGHT, SIDE_WEIGHT = 10.0, 5.0  # of the box code, as in Faster R-CNN
LARGEST_LOG_SCALE = math.log(1000 / 16)  # of a decoded side over the anchor's


def level_shapes(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of each level of a picture of height x width pixels, which are multiples of 32."""
    return tuple((-(-height // stride), -(-width // stride)) for stride in STRIDES)


def anchors(height: int, width: int) -> np.ndarray:
    """float32 (N, 4): the anchors of a picture of height x width pixels, N positions of `level_shapes`.

    That of row y, column x of a level with `stride` has its centre at (x + 1/2, y + 1/2) * stride.
    """
    levels = []
    for stride, (rows, columns) in zip(STRIDES, level_shapes(height, width), strict=True):
        y, x = np.meshgrid(np.arange(rows) + 0.5, np.arange(columns) + 0.5, indexing="ij")
        centres = stride * np.stack([x, y], -1).reshape(-1, 2)
        half = ANCHOR_SIDE * stride / 2
        levels.append(np.concatenate([centres - half, centres + half], -1))
    return np.concatenate(levels).astype(np.float32)


def decode_boxes(anchors: jax.Array, deltas: jax.Array) -> jax.Array:
    """Boxes (..., 4) float32 of deltas (..., 4) from anchors of the same rank, at most 62.5 times as wide or high.

    The deltas are (10 dx, 10 dy, 5 log w, 5 log h): the centre moves by dx, dy anchor sides, the sides become w, h
    times the anchor's (Ren et al. 2015, equation 2, with detectron2's weights).
    """
    deltas = deltas.astype(jnp.float32)
    centres, sides = _centres_and_sides(anchors)
    centres = centres + deltas[..., :2] / CENTRE_WEIGHT * sides
    half = jnp.exp(jnp.minimum(deltas[..., 2:] / SIDE_WEIGHT, LARGEST_LOG_SCALE)) * sides / 2
    return jnp.concatenate([centres - half, centres + half], -1)


def _centres_and_sides(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low
