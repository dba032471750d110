"""Window attention and the blocks made of it: Swin over maps (height, width), Video Swin over (time, height, width).

The number of axes is that of `window`; maps are (B, *sizes, C), of any size. Tokens and windows are row-major.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.layers import (
    NORMAL,
    Dense,
    Dtype,
    LayerNorm,
    Mlp,
    QueryKeyValue,
    attention,
    attention_core,
    remat_module,
    scale_branch,
    survival,
)
from florence_jax.models.window_attention import fused_attention, use_kernel
from florence_jax.models.window_places import MASKED, Places

SIZE_MODES = ("classification", "detection")
Array = TypeVar("Array", jax.Array, np.ndarray)


def relative_position_index(window: Sequence[int], table: Sequence[int] = ()) -> jax.Array:
    """Row of the bias table for each (query, key) pair of a window: int32 (tokens, tokens).

    The row-major index of the difference (query - key) + side - 1 along each axis, in a box of sides 2 * side - 1; the
    sides are those of the window that the table is for, which may be larger than the one in use.
    """
    sides = np.asarray(table or window)
    strides = np.append(np.cumprod((2 * sides - 1)[:0:-1])[::-1], 1)
    # It is linear in the positions, so that one number for each token says it: spelled out, the index of a large
    # window would be megabytes.
    codes = np.tensordot(strides, np.indices(window).reshape(len(window), -1), 1).astype(np.int32)
    return jnp.asarray(codes)[:, None] - jnp.asarray(codes)[None] + int(strides @ (sides - 1))


def window_regions(sizes: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> np.ndarray:
    """Region id of every token of the rolled grid, window by window: int8 (windows, tokens).

    Each axis has the bands [0, n - window), [n - window, n - shift), [n - shift, n); tokens of one window attend to
    each other only inside one region, because rolling put tokens from opposite borders side by side.
    """
    grid = np.zeros((), np.int8)
    for n, side, rolled in zip(sizes, window, shift, strict=True):
        i = np.arange(n)
        grid = np.int8(3) * grid[..., None] + (i >= n - side).astype(np.int8) + (i >= n - rolled)
    return partition(grid[None, ..., None], window)[0, :, :, 0]


def attention_mask(
    sizes: Sequence[int], window: Sequence[int], shift: Sequence[int], valid: tuple[int, ...] | jax.Array | None = None
) -> jax.Array | None:
    """Additive mask of window attention, 0 or -100, over a map that `window` divides.

    Args:
      sizes: of the map.
      window, shift: see `SwinBlock`; a shifted map is masked across regions.
      valid: the part of the map that may be attended to: its sizes, a tuple, or those of each example, int32 (B, axes).

    Returns:
      float32 (1 or B, windows, tokens or 1, tokens); None where nothing is masked.
    """
    # Compared in the graph from small per-token constants: spelled out, a large map's masks would be megabytes.
    blocked: jax.Array | None = None
    if any(shift):
        regions = jnp.asarray(window_regions(sizes, window, shift))[None]
        blocked = jnp.not_equal(regions[..., None], regions[:, :, None])
    if valid is not None:
        positions = np.moveaxis(np.indices(sizes, np.int32), 0, -1)
        positions = partition(np.roll(positions, [-n for n in shift], range(len(sizes)))[None], window)
        if isinstance(valid, jax.Array):
            outside = (jnp.asarray(positions) >= valid.astype(jnp.int32).reshape(-1, 1, 1, len(sizes))).any(-1)
        else:
            outside = jnp.asarray((positions >= np.asarray(valid)).any(-1))
        keys = outside[:, :, None]
        blocked = keys if blocked is None else blocked | keys
    return None if blocked is None else jnp.where(blocked, jnp.float32(MASKED), jnp.float32(0))


def window_places(
    sizes: Sequence[int], window: Sequence[int], shift: Sequence[int], valid: tuple[int, ...] | None = None
) -> Places:
    """What `attention_mask` and a rolled, partitioned map say, as tables for a kernel; arguments as there."""
    ids = np.arange(math.prod(sizes)).reshape(1, *sizes, 1)
    tokens = partition(np.roll(ids, [-n for n in shift], range(1, ids.ndim - 1)), window)[0, :, :, 0]
    regions = window_regions(sizes, window, shift) if any(shift) else np.zeros(tokens.shape, np.int8)
    outside: np.ndarray = np.zeros(tokens.shape, bool)
    if valid is not None:
        positions = np.stack(np.unravel_index(tokens, sizes), -1)
        outside = np.asarray((positions >= np.asarray(valid)).any(-1))
    return Places(tokens, regions, outside)


def partition(x: Array, window: Sequence[int]) -> Array:
    """(B, *sizes, C) -> (B, windows, tokens, C), for sizes that divide; the batch axis stays apart for sharding."""
    batch, *sizes, channels = x.shape
    axes = range(1, 2 * len(window), 2)
    split = [n for size, side in zip(sizes, window, strict=True) for n in (size // side, side)]
    x = x.reshape(batch, *split, channels).transpose(0, *axes, *(axis + 1 for axis in axes), 2 * len(window) + 1)
    return x.reshape(batch, -1, math.prod(window), channels)


def unpartition(x: jax.Array, sizes: Sequence[int], window: Sequence[int]) -> jax.Array:
    """Inverse of `partition`: (B, windows, tokens, C) -> (B, *sizes, C)."""
    batch, channels, count = x.shape[0], x.shape[-1], len(window)
    grid = [size // side for size, side in zip(sizes, window, strict=True)]
    order = [axis for i in range(1, count + 1) for axis in (i, i + count)]
    x = x.reshape(batch, *grid, *window, channels).transpose(0, *order, 2 * count + 1)
    return x.reshape(batch, *sizes, channels)


def pad_to_multiple(x: jax.Array, sides: Sequence[int]) -> jax.Array:
    """(B, *sizes, C) with zeros added at the end of each axis until it divides by its side."""
    ends = [-size % side for size, side in zip(x.shape[1:-1], sides, strict=True)]
    return jnp.pad(x, ((0, 0), *((0, end) for end in ends), (0, 0))) if any(ends) else x


def zero_outside(x: jax.Array, valid: jax.Array) -> jax.Array:
    """(B, *sizes, C) with zeros from `valid` on, int32 (B, axes), the size of each example's own part."""
    inside = jnp.ones((1,) * (x.ndim - 1), bool)
    for axis, size in enumerate(x.shape[1:-1]):
        shape = [size if i == axis + 1 else 1 for i in range(x.ndim - 1)]
        ends = valid[:, axis].reshape(-1, *(1,) * (x.ndim - 2))
        inside = inside & (jnp.arange(size).reshape(shape) < ends)
    return jnp.where(inside[..., None], x, jnp.zeros((), x.dtype))


class WindowAttention(nn.Module):
    """Multi-head attention inside windows with a learned relative position bias (Swin, equation 4).

    `core` is `attention` or a form of it, `table` and `form` as in `BlockOptions`.
    """

    heads: int
    window: tuple[int, ...]
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32
    table: tuple[int, ...] = ()
    form: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, places: Places | None = None) -> jax.Array:
        """(B, windows, tokens, C), the tokens of `window`, -> the same shape; `mask` as `attention_mask` gives it.

        Or, with `places`, a whole map (B, *sizes, C), which a kernel takes as it is; see `window_attention`.
        """
        dense = functools.partial(Dense, dtype=self.dtype)
        entries = math.prod(2 * side - 1 for side in self.table or self.window)
        table = self.param("relative_position_bias_table", NORMAL, (entries, self.heads))
        index = relative_position_index(self.window, self.table)
        bias = jnp.asarray(table).T.at[:, index].get(mode="promise_in_bounds")  # (heads, tokens, tokens)
        if places is not None:
            qkv = dense(3 * x.shape[-1], name="qkv")(x)
            out = fused_attention(qkv, bias, places, self.heads, self.form)
        else:
            bias = bias[None, None] if mask is None else bias[None, None] + mask[:, :, None]
            out = self.core(*QueryKeyValue(self.heads, self.dtype, name="qkv")(x), bias)
        return dense(x.shape[-1], name="proj")(out)


class BlockOptions(nn.Module):
    """What a Swin block and a pair of them are given; of a pair, `shift` is the second one's.

    Attributes:
      heads: attention heads.
      window: sides of the window, in tokens.
      shift: what the map is rolled by along each axis before partitioning; zeros = plain windows.
      mlp_ratio: hidden width of the MLP over C.
      mask_padding: keep padded positions, and those beyond an example's own size, out of the softmax.
      core: `attention` or a form of it.
      table: sides of the window that the bias table is for, at least those of `window`; () for `window`.
      form: of attention, one of `window_attention.ATTENTIONS`.
    """

    heads: int
    window: tuple[int, ...]
    shift: tuple[int, ...]
    mlp_ratio: float = 4
    mask_padding: bool = False
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32
    table: tuple[int, ...] = ()
    form: str = "xla"


class SwinBlock(BlockOptions):
    """One pre-norm Swin block on a map: (B, *sizes, C) -> the same shape.

    A map that does not divide by `window` is padded with zeros at the ends after the first LayerNorm and cropped after
    attention. Padded positions take part as keys, as in Swin's detectors, unless `mask_padding`.
    """

    @nn.compact
    def __call__(self, x: jax.Array, factors: jax.Array | None = None, valid: jax.Array | None = None) -> jax.Array:
        """(B, *sizes, C) -> the same shape.

        Args:
          x: the map.
          factors: (2, B), stochastic depth's, of the two branches, or None.
          valid: int32 (B, axes), the size of each example's own part of the map, or None: all of it.
        """

        def branch(y: jax.Array, i: int) -> jax.Array:
            return y if factors is None else scale_branch(y, factors[i])

        norm = functools.partial(LayerNorm, dtype=self.dtype)
        x = x + branch(self._attend(norm(name="norm1")(x), valid), 0)
        mlp = Mlp(round(self.mlp_ratio * x.shape[-1]), "gelu", self.dtype, name="mlp")
        return x + branch(mlp(norm(name="norm2")(x)), 1)

    def _attend(self, x: jax.Array, valid: jax.Array | None) -> jax.Array:
        sizes, axes = x.shape[1:-1], tuple(range(1, x.ndim - 1))
        x = pad_to_multiple(x, self.window)
        padded = x.shape[1:-1]
        own: tuple[int, ...] | jax.Array | None = None
        if self.mask_padding:
            own = sizes if valid is None and padded != sizes else valid
        options = (self.heads, self.window, self.core, self.dtype, self.table, self.form)
        attend = WindowAttention(*options, name="attention")
        crop = (slice(None), *(slice(size) for size in sizes))
        places = None if isinstance(own, jax.Array) else window_places(padded, self.window, self.shift, own)
        if use_kernel(self.form, x, places, self.heads):
            return attend(x, places=places)[crop]
        x = jnp.roll(x, tuple(-n for n in self.shift), axes) if any(self.shift) else x
        windows = attend(partition(x, self.window), attention_mask(padded, self.window, self.shift, own))
        x = unpartition(windows, padded, self.window)
        x = jnp.roll(x, self.shift, axes) if any(self.shift) else x
        return x[crop]


class SwinPair(BlockOptions):
    """A plain block followed by a shifted one: the unit of Swin's depth, and of the scan over depth.

    Returns (map, None), the form `nn.scan` wants.
    """

    @nn.compact
    def __call__(self, x: jax.Array, factors: jax.Array | None, valid: jax.Array | None) -> tuple[jax.Array, None]:
        """(B, *sizes, C) -> the same shape, None; `factors` (2, 2, B): by block, branch; see `SwinBlock`."""
        block = functools.partial(
            SwinBlock,
            heads=self.heads,
            window=self.window,
            mlp_ratio=self.mlp_ratio,
            mask_padding=self.mask_padding,
            core=self.core,
            dtype=self.dtype,
            table=self.table,
            form=self.form,
        )
        first, second = (None, None) if factors is None else factors
        x = block(shift=(0,) * len(self.window), name="plain")(x, first, valid)
        return block(shift=self.shift, name="shifted")(x, second, valid), None


def run_pairs(
    stage: int,
    pairs: int,
    x: jax.Array,
    factors: jax.Array | None,
    valid: jax.Array | None,
    *,
    remat: str,
    scan: bool,
    **options: Any,
) -> jax.Array:
    """The blocks of a stage, as submodules of the module that calls it: (B, *sizes, C) -> the same shape.

    Args:
      stage: of the network; its several pairs are scanned, `stage{i}_pairs`, their parameters stacked on axis 0; or
        else plain modules `stage{i}_pair0`, `stage{i}_pair1`, ...
      pairs: their number.
      x, valid: see `SwinBlock`. factors: stochastic depth's (pairs, block, branch, B), or None.
      remat, scan: see `CoSwin`.
      **options: see `BlockOptions`.
    """
    scanned = scan and pairs > 1
    pair = remat_module(SwinPair, remat, scanned=scanned)
    options = {**options, "core": attention_core(remat)}
    if scanned:
        pair = nn.scan(
            pair,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=pairs,
        )
        return pair(**options, name=f"stage{stage}_pairs")(x, factors, valid)[0]
    for j in range(pairs):
        x = pair(**options, name=f"stage{stage}_pair{j}")(x, None if factors is None else factors[j], valid)[0]
    return x


def path_factors(
    module: nn.Module, rate: float, depths: Sequence[int], train: bool, batch: int, examples: jax.Array | None
) -> jax.Array | None:
    """Stochastic depth's (pairs, block, branch, B) of the blocks of all stages, or None; see `CoSwin.drop_path`.

    Raises:
      UserError: there is no key to draw with.
    """
    if not train or rate == 0:
        return None
    if not module.has_rng("drop_path"):
        raise UserError("training with drop_path > 0 needs rngs={'drop_path': key}")
    rates = np.linspace(0, rate, sum(depths), dtype=np.float32)
    examples = jnp.arange(batch) if examples is None else examples
    return survival(module.make_rng("drop_path"), rates, examples).reshape(-1, 2, 2, batch)


def axis_windows(sizes: Sequence[int], window: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(window, shift) in use of a stage whose map has these sizes, each axis for itself; any size is padded.

    An axis no longer than the window's side is one window, without shift (Video Swin).
    """
    used = tuple(min(size, side) for size, side in zip(sizes, window, strict=True))
    return used, tuple(side // 2 if size > side else 0 for size, side in zip(sizes, used, strict=True))


def stage_window(height: int, width: int, window: int, size_mode: str) -> tuple[int, int]:
    """Effective (window, shift) of a stage of pictures whose map is height x width; both are the same on both axes.

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
