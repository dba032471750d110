"""RoIAlign (He et al. 2017, arXiv 1703.06870): the features of boxes, as two small matrix products a box.

A box is cut into h x w bins, each the mean of samples x samples points, bilinear between the cells of a map. The points
of a bin lie on a grid, so rows and columns have weights of their own: nothing is gathered, and nothing is scattered in
the backward pass.
"""

import functools

import jax
import jax.numpy as jnp

# Full precision: by default a TPU rounds the factors of a product to bfloat16, and with them the places of points.
_product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def roi_align(
    x: jax.Array,
    boxes: jax.Array,
    stride: float,
    size: tuple[int, int],
    samples: int = 2,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Features of boxes, as torchvision's `roi_align` with `aligned=True` gives them.

    The cell in row i of the map is centred at pixel (i + 1/2) * stride. A point beyond the centre of the last cell has
    that cell's value, one that is more than a cell beyond the map 0. A box without area, such as one of padding, has
    the value at its corner; one turned inside out is read backwards.

    Args:
      x: (B, H, W, C), the maps.
      boxes: float (B, R, 4), x1 y1 x2 y2 in pixels of the picture.
      stride: pixels of the picture between the cells of the map.
      size: (h, w), bins of each box.
      samples: points of a bin along each axis.
      valid: int (B, 2), rows and columns of each picture's own part, the rest of the map is not read; None: all.

    Returns:
      (B, R, h, w, C) in the dtype of `x`.
    """
    limits = jnp.array([x.shape[1:3]]) if valid is None else valid
    rows, columns = (
        _weights(boxes[..., 1 - axis :: 2].astype(jnp.float32) / stride, size[axis], samples, x.shape[1 + axis], limit)
        for axis, limit in enumerate((limits[:, 0], limits[:, 1]))
    )
    x32 = x.astype(jnp.float32)
    if size[0] * x.shape[2] <= size[1] * x.shape[1]:  # the smaller of what lies between the products
        found = _product("briwc,brjw->brijc", _product("brih,bhwc->briwc", rows, x32), columns)
    else:
        found = _product("brih,brhjc->brijc", rows, _product("bhwc,brjw->brhjc", x32, columns))
    return found.astype(x.dtype)


def _weights(ends: jax.Array, bins: int, samples: int, cells: int, limit: jax.Array) -> jax.Array:
    """float32 (B, R, bins, cells): of each cell in each bin; `ends` (B, R, 2) in cells, `limit` int (1 or B,) cells."""
    start, length = ends[..., :1] - 0.5, ends[..., 1:] - ends[..., :1]
    places = (jnp.arange(bins * samples, dtype=jnp.float32) + 0.5) / (bins * samples)
    points = start + length * places[None, None]
    most = limit.astype(jnp.float32)[:, None, None]
    inside = (points >= -1) & (points <= most)
    points = jnp.clip(points, 0, jnp.maximum(most - 1, 0))
    hats = jnp.maximum(1 - jnp.abs(points[..., None] - jnp.arange(cells, dtype=jnp.float32)[None, None, None]), 0)
    hats = jnp.where(inside[..., None], hats, 0)
    return hats.reshape(*points.shape[:2], bins, samples, cells).mean(3)
