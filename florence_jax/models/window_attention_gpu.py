"""Window attention on GPUs: a kernel in Triton's dialect of Pallas, and cuDNN's attention, its rival.

A program of the kernel has 64 queries of one head of a window at a time, and all keys of the window. It takes their
channels (64 bytes of a token, for 32 in bfloat16) from the map where they lie, and puts results back there: nothing is
rolled, cut or turned, and no logits leave the program. Only in it are windows padded to whole blocks of 64 tokens.

The backward pass is a kernel as well and computes the softmax anew. A program goes through a part of all windows, so
that the gradient of its part of the bias stays in registers and no sum depends on the order of programs.

cuDNN wants windows in memory, padded, and one bias for all of them: they are gathered kind by kind.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from florence_jax.errors import UserError
from florence_jax.models.window_places import LOG2E, MASKED, Places

SQUARE = 64  # tokens of a block, of queries or keys
PROGRAMS = 1024  # of the backward pass, of which each leaves a sum for the bias: some for each core of any GPU
TRITON_WIDTHS = (16, 32, 64, 128)  # what Triton's matrix products take
PADDING = -1e9  # added to the logits of keys that a block has beyond its window


@dataclasses.dataclass(frozen=True)
class GpuSizes:
    """What a kernel is compiled for.

    Attributes:
      batch: examples. length: tokens of a map. windows: of a map. heads: of attention. width: channels of a head.
      blocks: of 64 tokens, that hold a window.
    """

    batch: int
    length: int
    windows: int
    heads: int
    width: int
    blocks: int

    @property
    def channels(self) -> int:
        """C."""
        return self.heads * self.width

    @property
    def turns(self) -> int:
        """Windows of all examples that a program of the backward pass goes through, at most."""
        return -(-self.batch * self.windows // max(1, PROGRAMS // (self.heads * self.blocks)))

    @property
    def parts(self) -> int:
        """Programs of the backward pass for a head and a block of queries."""
        return -(-self.batch * self.windows // self.turns)


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of an example, for one head, in a program.

    Attributes:
      sizes: of the kernel. tables: see `_tables`, in the GPU's memory.
      step: int32, counts windows, example by example. head: int32.
    """

    sizes: GpuSizes
    tables: tuple[Any, ...]
    step: jax.Array
    head: jax.Array

    @property
    def example(self) -> jax.Array:
        """Its number."""
        return jax.lax.div(self.step, self.sizes.windows)

    @property
    def index(self) -> jax.Array:
        """Which of the map's windows."""
        return jax.lax.rem(self.step, self.sizes.windows)

    def rows(self, block: Any) -> jax.Array:
        """Of a block's tokens in the map, int32 (64,); beyond the map where the window has no more."""
        return self.tables[0][self.index, pl.ds(block * SQUARE, SQUARE)]

    def _at(self, ref: Any, block: Any, part: int, *lead: Any) -> tuple[Any, jax.Array]:
        rows = self.rows(block)[:, None]
        columns = part * self.sizes.channels + self.head * self.sizes.width + jnp.arange(self.sizes.width)
        return ref.at[(*lead, self.example, rows, columns[None])], rows < self.sizes.length

    def load(self, ref: Any, block: Any, part: int = 0) -> jax.Array:
        """(64, width) of a block's tokens, of q (0), k (1), v (2); zeros where the window has no more."""
        at, inside = self._at(ref, block, part)
        return plgpu.load(at, mask=jnp.broadcast_to(inside, at.shape), other=0.0)

    def store(self, ref: Any, value: jax.Array, block: Any, part: int, *lead: Any) -> None:
        """Puts (64, width) where `load` would take them; `lead` are indices in front of the example's."""
        at, inside = self._at(ref, block, part, *lead)
        plgpu.store(at, value.astype(ref.dtype), mask=jnp.broadcast_to(inside, at.shape))

    def logits(self, q: jax.Array, i: Any, j: Any, qkv: Any, bias: Any) -> jax.Array:
        """float32 (64, 64) of block i of queries, which is `q`, and block j of keys, times log2(e)."""
        _, kinds, of_queries, of_keys = self.tables
        kind, queries, keys = (
            kinds[self.index],
            pl.ds(i * SQUARE, SQUARE),
            pl.ds(j * SQUARE, SQUARE),
        )
        products = _product(q, self.load(qkv, j, 1), 1, 1) * (self.sizes.width**-0.5 * LOG2E)
        blocked = of_queries[kind, queries][:, None] != of_keys[kind, keys][None]
        return products + bias[self.head, queries, keys] + jnp.where(blocked, MASKED * LOG2E, 0.0)

    def average(
        self, width: int, logits: Callable[[Any], jax.Array], value: Callable[[Any, jax.Array], jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A sum over all keys with the softmax's weights, with one block's weights at a time.

        Args:
          logits: of a block of keys, times log2(e).
          value: given a block of keys and what weighs it, float32 (64, 64): its part of the sum, (64, n).

        Returns:
          The largest logit of each query and the sum of the powers of 2 of all others over it, (64, 1); the sum.
        """

        def block(j: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            most, total, found = so_far
            tile = logits(j)
            now = jnp.maximum(most, tile.max(1)[:, None])
            powers, shrunk = jnp.exp2(tile - now), jnp.exp2(most - now)
            return now, total * shrunk + powers.sum(1)[:, None], found * shrunk + value(j, powers)

        start = (
            jnp.full((SQUARE, 1), -jnp.inf, jnp.float32),
            jnp.zeros((SQUARE, 1)),
            jnp.zeros((SQUARE, width)),
        )
        most, total, found = jax.lax.fori_loop(0, self.sizes.blocks, block, start)
        return most, total, found / total


def _product(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """float32, the sum over these axes of two matrices."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _forward_kernel(*refs: Any, sizes: GpuSizes) -> None:
    *tables, bias, qkv, out = refs
    head, block, step = (pl.program_id(axis) for axis in range(3))
    window = Window(sizes, tuple(tables), step, head)
    q = window.load(qkv, block)

    def value(j: int, weights: jax.Array) -> jax.Array:
        v = window.load(qkv, j, 2)
        return _product(weights.astype(v.dtype), v, 1, 0)

    window.store(out, window.average(sizes.width, lambda j: window.logits(q, block, j, qkv, bias), value)[2], block, 0)


def _backward_kernel(*refs: Any, sizes: GpuSizes) -> None:
    """Of one block of queries: all gradients that go through its logits."""
    *tables, bias, qkv, grad, out, of_bias = refs
    head, block, part = (pl.program_id(axis) for axis in range(3))
    scale = sizes.width**-0.5

    def turn(step: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        window = Window(sizes, tuple(tables), step, head)
        q, of_out = window.load(qkv, block), window.load(grad, block)

        def logits(j: int) -> jax.Array:
            return window.logits(q, block, j, qkv, bias)

        def of_weights(j: int) -> jax.Array:
            return _product(of_out, window.load(qkv, j, 2), 1, 1)

        most, total, mean = window.average(1, logits, lambda j, weights: (weights * of_weights(j)).sum(1)[:, None])
        of_q, found = jnp.zeros(q.shape, jnp.float32), []
        for j, before in enumerate(sums):  # several blocks of logits do not fit into registers: they are made again
            weights = jnp.exp2(logits(j) - most) * (1 / total)
            of_logits = weights * (of_weights(j) - mean)
            found.append(before + of_logits)
            low = of_logits.astype(q.dtype)
            of_q += _product(low, window.load(qkv, j, 1), 1, 0)
            window.store(out, _product(low, q, 0, 0) * scale, j, 1, block)
            window.store(out, _product(weights.astype(q.dtype), of_out, 0, 0), j, 2, block)
        for j in range(sizes.blocks):  # zeros for other queries: the shares of all blocks are added
            window.store(out, jnp.where(block == j, of_q * scale, 0.0), j, 0, block)
        return tuple(found)

    first = part * sizes.turns
    last = jnp.minimum(first + sizes.turns, sizes.batch * sizes.windows)
    zeros = (jnp.zeros((SQUARE, SQUARE), jnp.float32),) * sizes.blocks
    sums = jax.lax.fori_loop(first, last, turn, zeros)
    for j, total in enumerate(sums):
        of_bias[part, head, pl.ds(block * SQUARE, SQUARE), pl.ds(j * SQUARE, SQUARE)] = total


def _tables(places: Places, length: int, slots: int) -> list[jax.Array]:
    """int32: the map's tokens (windows, slots), kinds (windows,), what queries and keys (kinds, slots) must share."""
    kind, regions, outside = places.kinds()
    more = ((0, 0), (0, slots - places.tokens.shape[1]))
    tokens = np.pad(places.tokens, more, constant_values=length)
    queries, keys = np.pad(regions, more), np.pad(np.where(outside, -1, regions), more)
    return [jnp.asarray(table, jnp.int32) for table in (tokens, kind, queries, keys)]


def run(places: Places, maps: list[jax.Array], bias: jax.Array) -> list[jax.Array]:
    """Forward pass, or backward where the outputs' gradient is given.

    Args:
      places: of the map's windows.
      maps: qkv (B, *sizes, 3C), and for the backward pass the gradient (B, *sizes, C).
      bias: float32 (heads, tokens, tokens).

    Returns:
      [(B, *sizes, C)]; backward [the gradient of qkv, of bias].
    """
    backward, shape, heads = len(maps) == 2, maps[0].shape, len(bias)
    flat = [x.reshape(len(x), -1, x.shape[-1]) for x in maps]
    batch, length, channels = flat[0].shape
    windows, tokens = places.tokens.shape
    sizes = GpuSizes(batch, length, windows, heads, channels // 3 // heads, -(-tokens // SQUARE))
    slots = sizes.blocks * SQUARE
    padded = jnp.pad(bias * LOG2E, ((0, 0), (0, slots - tokens), (0, 0)))
    padded = jnp.pad(padded, ((0, 0), (0, 0), (0, slots - tokens)), constant_values=PADDING)
    out = [jax.ShapeDtypeStruct((batch, length, sizes.channels), maps[0].dtype)]
    if backward:
        out = [jax.ShapeDtypeStruct((sizes.blocks, batch, length, channels), maps[0].dtype)]
        out.append(jax.ShapeDtypeStruct((sizes.parts, heads, slots, slots), jnp.float32))
    call = pl.pallas_call(
        functools.partial(_backward_kernel if backward else _forward_kernel, sizes=sizes),
        grid=(heads, sizes.blocks, sizes.parts if backward else batch * windows),
        out_shape=out,
        name="window_attention_backward" if backward else "window_attention",
        compiler_params=plgpu.CompilerParams(num_warps=8 if backward and sizes.blocks > 1 else 4, num_stages=2),
    )
    results = call(*_tables(places, length, slots), padded, *flat)
    if not backward:
        return [results[0].reshape(*shape[:-1], -1)]
    of_qkv, of_bias = results
    # The blocks of queries have left their shares of the gradients of keys and values.
    of_qkv = of_qkv[0] if sizes.blocks == 1 else of_qkv.astype(jnp.float32).sum(0).astype(of_qkv.dtype)
    return [of_qkv.reshape(shape), of_bias.sum(0)[:, :tokens, :tokens]]


def check_cudnn(platform: str, dtype: Any) -> None:
    """Whether cuDNN can be asked for attention.

    Raises:
      UserError: there is no GPU, or the dtype is not one of cuDNN's.
    """
    if platform != "gpu":
        raise UserError(f"attention='cudnn' needs an NVIDIA GPU, and this is a {platform}: choose auto, xla or fused")
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(f"attention='cudnn' computes in bfloat16 or float16, not in {dtype}: set precision=bfloat16")


def library_attention(
    qkv: jax.Array, bias: jax.Array, places: Places, heads: int, implementation: Literal["cudnn", "xla"] = "cudnn"
) -> jax.Array:
    """Attention by `jax.nn.dot_product_attention`, in windows padded to whole blocks of 64 tokens.

    Bias and mask are added in the dtype of `qkv`: cuDNN has its own.

    Args:
      qkv: (B, *sizes, 3C), nested as `layers.split_heads` says.
      bias: float32 (heads, tokens, tokens).
      places: of the map's windows.
      heads: of attention.
      implementation: 'cudnn' or 'xla'.

    Returns:
      (B, *sizes, C).

    Raises:
      UserError: this JAX has no cuDNN.
    """
    batch, (kind, regions, outside) = len(qkv), places.kinds()
    tokens = places.tokens[np.argsort(kind, kind="stable")]
    count = tokens.shape[1]
    more = -count % SQUARE
    windows = qkv.reshape(batch, -1, 3, heads, qkv.shape[-1] // 3 // heads)
    windows = windows.at[:, tokens].get(mode="promise_in_bounds", unique_indices=True)
    windows = jnp.pad(windows, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0), (0, 0)))
    ends, results = np.cumsum(np.bincount(kind)).tolist(), []
    own = (np.arange(count + more) < count)[None, None, None]
    for i, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        q, k, v = jnp.moveaxis(windows[:, first:last].reshape(-1, *windows.shape[2:]), 2, 0)
        blocked = (regions[i][:, None] != regions[i][None]) | outside[i][None]
        added = bias + jnp.asarray(np.where(blocked, np.float32(MASKED), np.float32(0)))[None]
        added = jnp.pad(added, ((0, 0), (0, more), (0, more)))[None].astype(q.dtype)
        try:
            out = jax.nn.dot_product_attention(
                q, k, v, bias=added, mask=jnp.asarray(own), implementation=implementation
            )
        except RuntimeError as error:
            raise UserError(f"attention={implementation!r}: {error} Choose auto, xla or fused") from None
        results.append(out.reshape(batch, last - first, count + more, -1)[:, :, :count])
    out = jnp.concatenate(results, 1).reshape(batch, tokens.size, -1)
    out = out.at[:, np.argsort(tokens, axis=None)].get(mode="promise_in_bounds", unique_indices=True)
    return out.reshape(*qkv.shape[:-1], -1)


def misfit(dtype: Any, width: int) -> str:
    """Why the kernel does not take maps of this dtype, with heads of this width; '' where it does."""
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it is of {dtype}"
    if width not in TRITON_WIDTHS:
        return f"its heads of {width} channels are none of {', '.join(map(str, TRITON_WIDTHS))}"
    return ""
