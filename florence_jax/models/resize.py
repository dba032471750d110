"""Tables that depend on the resolution (relative position biases, position embeddings), resized."""

from collections.abc import Sequence

import jax
import numpy as np

from florence_jax.errors import UserError


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


def resize_bias_tables(params: dict, window: int | Sequence[int]) -> dict:
    """Resizes every relative position bias table of CoSwin parameters to a new window.

    Needed when the window changes with the resolution (7 at 224 px -> 12 at 384 px); nothing else changes shape.
    Each head's column is a (2w-1) x (2w-1) image, resized by PyTorch's bicubic interpolation.

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
        if names[-1] != "relative_position_bias_table":
            return leaf
        new = window if isinstance(window, int) else window[int(next(n for n in names if n.startswith("stage"))[5])]
        table = np.asarray(leaf, np.float64)
        side = round(table.shape[-2] ** 0.5)
        if side * side != table.shape[-2]:
            raise UserError(f"bias table {'/'.join(names)} of shape {table.shape} is not of a square window")
        matrix = bicubic_matrix(side, 2 * new - 1)
        table = table.reshape(*table.shape[:-2], side, side, table.shape[-1])
        table = np.einsum("iy,jx,...yxh->...ijh", matrix, matrix, table)
        return table.reshape(*table.shape[:-3], -1, table.shape[-1]).astype(np.float32)

    return jax.tree_util.tree_map_with_path(resize, params)


def resize_position_embedding(table: np.ndarray, side: int) -> np.ndarray:
    """Position embeddings of a ViT for another number of patches.

    The class token's row is kept; the others, a square map, are resized by PyTorch's bicubic interpolation without
    antialiasing.

    Args:
      table: (1 + n * n, W).
      side: new patches per side.

    Returns:
      float32 (1 + side * side, W).

    Raises:
      UserError: a table that is not a class token and a square map.
    """
    old = round(max(len(table) - 1, 0) ** 0.5)
    if old < 1 or old * old != len(table) - 1:
        raise UserError(f"position embeddings of shape {table.shape} are not a class token and a square map")
    grid = np.asarray(table[1:], np.float64).reshape(old, old, -1)
    matrix = bicubic_matrix(old, side)
    grid = np.einsum("iy,jx,yxc->ijc", matrix, matrix, grid).reshape(side * side, -1)
    return np.concatenate([table[:1], grid]).astype(np.float32)
