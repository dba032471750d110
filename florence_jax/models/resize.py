"""Tables that depend on the resolution or on a vocabulary, for another one: resized, or grown by rows."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from florence_jax.errors import UserError

BIAS_TABLE = "relative_position_bias_table"
TOKEN_TYPES = "fusion/token_types"
# Axis along which a table may grow: its further entries (words, places in a text, classes) say nothing about earlier
# ones.
GROWING = ((r"text/(token|position)_embedding", 0), (r"head/.*", -1))


def resize_or_grow(path: str, saved: np.ndarray, like: Any) -> np.ndarray | None:
    """A saved parameter in the shape of `like`, or None; see `Model.adapt`.

    Bias tables and position embeddings of images are resized (bicubic). Tables with an entry a word, place in a text or
    class keep the saved ones and take more from `like`, which then must hold values. The token type of a second image
    is that of the first.
    """
    if saved.shape == like.shape:
        return np.asarray(saved, np.float32)
    if saved.ndim != len(like.shape):
        return None
    try:
        if path.endswith(BIAS_TABLE):
            resized = resize_bias_table(saved, (_side(like.shape[-2]) + 1) // 2)
        elif path.endswith("image/position_embedding"):
            resized = resize_position_embedding(saved, _side(like.shape[0] - 1))
        elif path == TOKEN_TYPES:  # text, image, further images, which begin as the first
            resized = saved[np.minimum(np.arange(like.shape[0]), len(saved) - 1)].astype(np.float32)
        else:
            return _grow(path, saved, like)
    except UserError:  # not of a square window or map
        return None
    return resized if resized.shape == like.shape else None


def _grow(path: str, saved: np.ndarray, like: Any) -> np.ndarray | None:
    axis = next((axis for pattern, axis in GROWING if re.fullmatch(pattern, path)), None)
    if axis is None or isinstance(like, jax.ShapeDtypeStruct) or saved.shape[axis] > like.shape[axis]:
        return None
    fresh = np.moveaxis(np.array(like, np.float32), axis, 0)
    saved = np.moveaxis(saved, axis, 0)
    if saved.shape[1:] != fresh.shape[1:]:
        return None
    return np.moveaxis(np.concatenate([saved.astype(np.float32), fresh[len(saved) :]]), 0, axis)


def _side(entries: int) -> int:
    """Side of the square with so many entries."""
    return round(max(entries, 0) ** 0.5)


def bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Weights of 1-D bicubic interpolation, float64 (size_out, size_in), as PyTorch with align_corners=False.

    Keys' kernel with a = -0.75 and clamped borders, no antialiasing; `jax.image.resize(..., 'cubic')` uses
    a = -0.5 and renormalises the borders, so it does not reproduce resized Swin checkpoints.
    """
    a = -0.75
    weights = np.zeros((size_out, size_in))
    for i in range(size_out):
        x = (i + 0.5) * size_in / size_out - 0.5
        for tap in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            d = abs(x - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(tap, 0), size_in - 1)] += near if d <= 1 else far
    return weights


def antialiased_bicubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Weights of 1-D antialiased bicubic interpolation, float64 (size_out, size_in), as PyTorch's `antialias=True`.

    Keys' kernel with a = -0.5, as wide as PIL's: stretched where the output is smaller, weights beyond the borders left
    out and the rest renormalised. `bicubic_matrix` differs both ways.
    """
    a, scale = -0.5, size_in / size_out
    stretch = max(scale, 1.0)
    centres = (np.arange(size_out)[:, None] + 0.5) * scale
    taps = np.arange(size_in)[None]
    first = np.maximum(np.floor(centres - 2 * stretch + 0.5), 0)
    last = np.minimum(np.floor(centres + 2 * stretch + 0.5), size_in)
    d = np.abs(taps + 0.5 - centres) / stretch
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    weights = np.where(d < 1, near, np.where(d < 2, far, 0.0)) * ((taps >= first) & (taps < last))
    return weights / weights.sum(1, keepdims=True)


def resize_bias_table(table: np.ndarray, window: int) -> np.ndarray:
    """A relative position bias table for another window (7 at 224 px -> 12 at 384 px).

    Each head's column is a (2w-1) x (2w-1) image, resized by PyTorch's bicubic interpolation.

    Args:
      table: (..., (2w-1)**2, heads); leading axes are those of a scan over depth.
      window: the new side of the window.

    Returns:
      float32 (..., (2 window - 1)**2, heads).

    Raises:
      UserError: a table that is not square.
    """
    side = _side(table.shape[-2])
    if side * side != table.shape[-2]:
        raise UserError(f"a bias table of shape {table.shape} is not of a square window")
    matrix = bicubic_matrix(side, 2 * window - 1)
    grid = np.asarray(table, np.float64).reshape(*table.shape[:-2], side, side, table.shape[-1])
    grid = np.einsum("iy,jx,...yxh->...ijh", matrix, matrix, grid)
    return grid.reshape(*grid.shape[:-3], -1, grid.shape[-1]).astype(np.float32)


def resize_bias_tables(params: dict, window: int | Sequence[int]) -> dict:
    """Resizes every relative position bias table of CoSwin parameters; nothing else changes shape with the window.

    Args:
      params: nested dict holding CoSwin's parameters, at any depth (also stacked on axis 0 by the scan).
      window: the new side of the window, one for all stages or one per stage. In classification mode a stage whose
        map is smaller than the window needs the side of its map.

    Returns:
      A new dict; tables are float32 numpy arrays, other leaves are the same objects.

    Raises:
      UserError: a table that is not square.
    """

    def resize(path: tuple, leaf: jax.Array) -> jax.Array | np.ndarray:
        names = [str(entry.key) for entry in path]
        if names[-1] != BIAS_TABLE:
            return leaf
        new = window if isinstance(window, int) else window[int(next(n for n in names if n.startswith("stage"))[5])]
        return resize_bias_table(np.asarray(leaf), new)

    return jax.tree_util.tree_map_with_path(resize, params)


def resize_position_embedding(table: np.ndarray, side: int) -> np.ndarray:
    """Position embeddings of a ViT for another number of patches.

    The class token's row is kept; the others, a square map, are resized by PyTorch's antialiased bicubic interpolation,
    as OpenCLIP does.

    Args:
      table: (1 + n * n, W).
      side: new patches per side.

    Returns:
      float32 (1 + side * side, W).

    Raises:
      UserError: a table that is not a class token and a square map.
    """
    old = _side(len(table) - 1)
    if old < 1 or old * old != len(table) - 1:
        raise UserError(f"position embeddings of shape {table.shape} are not a class token and a square map")
    grid = np.asarray(table[1:], np.float64).reshape(old, old, -1)
    matrix = antialiased_bicubic_matrix(old, side)
    grid = np.einsum("iy,jx,yxc->ijc", matrix, matrix, grid, optimize=True).reshape(side * side, -1)
    return np.concatenate([table[:1], grid]).astype(np.float32)
