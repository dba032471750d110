"""Window attention and the blocks made of it (Swin), over maps of any size."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.layers import NORMAL, Dense, Dtype, LayerNorm, Mlp, attention, scale_branch, split_heads

SIZE_MODES = ("classification", "detection")
MASKED = -100.0  # Swin's additive mask value: finite, so that a softmax row never becomes NaN


def relative_position_index(height: int, width: int) -> np.ndarray:
    """Row of the bias table for each (query, key) pair of a window: int32 (height * width, height * width).

    With tokens row-major, entry (p, q) = (yp - yq + height - 1) * (2 * width - 1) + (xp - xq + width - 1).
    """
    y, x = np.divmod(np.arange(height * width, dtype=np.int32), np.int32(width))
    return (y[:, None] - y[None] + height - 1) * (2 * width - 1) + (x[:, None] - x[None] + width - 1)


def window_regions(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Region id of every token of the rolled grid, window by window: int32 (windows, window**2).

    Each axis has the bands [0, n - window), [n - window, n - shift), [n - shift, n); tokens of one window attend to
    each other only inside one region, because rolling put pixels from opposite borders side by side.
    """

    def band(n: int) -> np.ndarray:
        i = np.arange(n, dtype=np.int32)
        return (i >= n - window).astype(np.int32) + (i >= n - shift)

    grid = 3 * band(height)[:, None] + band(width)[None]
    return _partition(grid[None, :, :, None], window)[0, :, :, 0]


def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Additive mask of the shifted block, 0 inside a region and -100 across: float32 (windows, tokens, tokens)."""
    regions = window_regions(height, width, window, shift)
    return np.where(regions[:, :, None] == regions[:, None], 0, MASKED).astype(np.float32)


def _partition(x: jax.Array | np.ndarray, window: int) -> jax.Array | np.ndarray:
    """(B, H, W, C) -> (B, windows, window**2, C), windows row-major; the batch axis stays apart for sharding."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, window * window, channels)


def _unpartition(x: jax.Array, height: int, width: int, window: int) -> jax.Array:
    """Inverse of `_partition`: (B, windows, window**2, C) -> (B, H, W, C)."""
    batch, channels = x.shape[0], x.shape[-1]
    x = x.reshape(batch, height // window, width // window, window, window, channels)
    return x.swapaxes(2, 3).reshape(batch, height, width, channels)


def pad_to_multiple(x: jax.Array, side: int) -> jax.Array:
    """(B, H, W, C) with zeros added at the bottom and right until H and W divide by `side`."""
    bottom, right = -x.shape[1] % side, -x.shape[2] % side
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


class WindowAttention(nn.Module):
    """Multi-head attention inside windows with a learned relative position bias (Swin, equation 4).

    `x` is (B, windows, tokens, C) with tokens = height * width of `window`; `mask` is None or an additive float32
    array (windows, tokens, tokens). Returns (B, windows, tokens, C). `core` is `attention` or a form of it.
    """

    heads: int
    window: tuple[int, int]
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """(B, windows, tokens, C) -> the same shape."""
        dense = functools.partial(Dense, dtype=self.dtype)
        q, k, v = split_heads(dense(3 * x.shape[-1], name="qkv")(x), self.heads)
        entries = (2 * self.window[0] - 1) * (2 * self.window[1] - 1)
        table = self.param("relative_position_bias_table", NORMAL, (entries, self.heads))
        bias = table.T[:, relative_position_index(*self.window)][None, None]  # (1, 1, heads, tokens, tokens)
        if mask is not None:
            bias = bias + mask[None, :, None]
        return dense(x.shape[-1], name="proj")(self.core(q, k, v, bias))


class SwinBlock(nn.Module):
    """One pre-norm Swin block on a map: (B, H, W, C) -> (B, H, W, C).

    A map that does not divide by `window` is padded with zeros at the bottom and right after the first LayerNorm
    and cropped after attention. Padded positions take part as keys, as in Swin's detectors, unless `mask_padding`.

    Attributes:
      heads: attention heads.
      window: side of the square window, in tokens.
      shift: rows and columns the map is rolled by before partitioning; 0 = plain windows.
      mlp_ratio: hidden width of the MLP over C.
      mask_padding: keep padded positions out of the softmax.
      core: `attention` or a form of it.
    """

    heads: int
    window: int
    shift: int = 0
    mlp_ratio: float = 4
    mask_padding: bool = False
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, factors: jax.Array | None = None) -> jax.Array:
        """(B, H, W, C) -> the same shape; `factors` (2, B) are stochastic depth's, of the two branches, or None."""

        def branch(y: jax.Array, i: int) -> jax.Array:
            return y if factors is None else scale_branch(y, factors[i])

        norm = functools.partial(LayerNorm, dtype=self.dtype)
        x = x + branch(self._attend(norm(name="norm1")(x)), 0)
        mlp = Mlp(round(self.mlp_ratio * x.shape[-1]), "gelu", self.dtype, name="mlp")
        return x + branch(mlp(norm(name="norm2")(x)), 1)

    def _attend(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        bottom, right = -height % self.window, -width % self.window
        x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x
        x = jnp.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        windows = _partition(x, self.window)
        attend = WindowAttention(self.heads, (self.window,) * 2, self.core, self.dtype, name="attention")
        windows = attend(windows, self._mask(height, width, bottom, right))
        x = _unpartition(windows, height + bottom, width + right, self.window)
        x = jnp.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x
        return x[:, :height, :width]

    def _mask(self, height: int, width: int, bottom: int, right: int) -> jax.Array | None:
        """Additive float32 mask (windows, tokens, tokens), or None."""
        # Compared in the graph from small per-token constants: spelled out, a large map's masks would be megabytes.
        blocked = None
        if self.shift:
            regions = jnp.asarray(window_regions(height + bottom, width + right, self.window, self.shift))
            blocked = regions[:, :, None] != regions[:, None]
        if self.mask_padding and (bottom or right):
            padded = np.pad(np.zeros((height, width), bool), ((0, bottom), (0, right)), constant_values=True)
            padded = np.roll(padded, (-self.shift, -self.shift), (0, 1))
            padded = jnp.asarray(_partition(padded[None, :, :, None], self.window)[0, :, :, 0])
            keys = jnp.broadcast_to(padded[:, None], (*padded.shape, self.window**2))
            blocked = keys if blocked is None else blocked | keys
        return None if blocked is None else jnp.where(blocked, jnp.float32(MASKED), jnp.float32(0))


class SwinPair(nn.Module):
    """A plain block followed by a shifted one: the unit of Swin's depth, and of the scan over depth.

    Returns (map, None), the form `nn.scan` wants.
    """

    heads: int
    window: int
    shift: int
    mlp_ratio: float = 4
    mask_padding: bool = False
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, factors: jax.Array | None) -> tuple[jax.Array, None]:
        """(B, H, W, C) -> the same shape, None; `factors` (2, 2, B): stochastic depth's by block, branch."""
        block = functools.partial(
            SwinBlock,
            heads=self.heads,
            window=self.window,
            mlp_ratio=self.mlp_ratio,
            mask_padding=self.mask_padding,
            core=self.core,
            dtype=self.dtype,
        )
        first, second = (None, None) if factors is None else factors
        x = block(shift=0, name="plain")(x, first)
        return block(shift=self.shift, name="shifted")(x, second), None


def stage_window(height: int, width: int, window: int, size_mode: str) -> tuple[int, int]:
    """Effective (window, shift) of a stage whose map is height x width.

    'classification' (Swin's classifier): a map no larger than the window is one window, without shift, and the map
    must divide by the window. 'detection' (Swin's detectors): neither shrinks nor cancels, any size is padded.

    Raises:
      UserError: in classification mode, a map that does not divide by the window.
    """
    if size_mode == "detection":
        return window, window // 2
    if min(height, width) <= window:
        window, shift = min(height, width), 0
    else:
        shift = window // 2
    if height % window or width % window:
        raise UserError(
            f"a {height}x{width} feature map does not divide by window={window}: choose an image size and window "
            "that divide at every stage, or size_mode='detection'"
        )
    return window, shift
