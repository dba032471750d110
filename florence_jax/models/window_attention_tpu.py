"""Window attention as a Pallas kernel for TPUs: forward, and backward with the gradients of q, k, v and the bias.

It works on maps as XLA lays them out on a TPU, (tokens, batch, channels), the last two in tiles: a token of 16 examples
is a few whole tiles. So rolling a map, cutting it into windows and both ways back are nothing but the addresses that
the copies between the chip's memory and its cores use.

A step of the grid is one window of 16 examples, a part of the channels at a time; while it is computed the next one is
copied in and the last one out. Numbers of 16 bits are taken and put back as pairs, in words: rows of words may be
stored with a stride, which brings the tokens of an example together without a transposition.

128 lanes hold the channels of several heads (four of 32): queries are stacked, head by head, with zeros in the lanes of
the others, so that one product gives the logits of all, keys along sublanes, (head, query) along lanes. A softmax then
reduces over sublanes, which costs additions of whole registers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from florence_jax.models.window_places import LOG2E
from florence_jax.models.window_sizes_tpu import EXAMPLES, LANES, Sizes, core

ROWS_TURNED = 8  # rows of words that are turned side by side
STRIDED = False  # also where the kernel is interpreted, which takes long
UNROLLED = 32  # copies whose addresses are computed side by side


@dataclasses.dataclass(frozen=True)
class _Stream:
    """Copies of a window's tokens, for 16 examples, between a map and one half of a buffer.

    Attributes:
      sizes: of the kernel.
      starts: (windows * pieces,), the map's token that each piece of a window begins with; offsets: (pieces,), the
        window's.
      chunk: which part of the channels.
      hbm: the map, (tokens, batch, parts * C). buffer: (2, tokens, EXAMPLES, parts * lanes). done: 2 semaphores.
      inward: from the map to the buffer, or back.
    """

    sizes: Sizes
    starts: Any
    offsets: Any
    chunk: Any
    hbm: Any
    buffer: Any
    done: Any
    inward: bool

    def start(self, step: Any, slot: Any) -> None:
        """Begins to copy the window of `step`."""
        sizes = self.sizes
        blocks, pieces = sizes.batch // EXAMPLES, sizes.runs[-1][2]
        window, block = jax.lax.div(step, blocks), jax.lax.rem(step, blocks)
        rows = pl.ds(pl.multiple_of(block * EXAMPLES, EXAMPLES), EXAMPLES)
        # All parts of a piece by one copy, where its channels are all there.
        width = sizes.lanes if sizes.chunks > 1 else self.buffer.shape[-1]
        for part in range(self.buffer.shape[-1] // width):
            first = part * sizes.channels + self.chunk * sizes.lanes
            outer = pl.ds(pl.multiple_of(first, LANES), width)
            inner = pl.ds(part * width, width)

            def copy(piece: Any, length: int, outer: Any = outer, inner: Any = inner) -> None:
                outside = self.hbm.at[pl.ds(self.starts[window * pieces + piece], length), rows, outer]
                inside = self.buffer.at[slot, pl.ds(self.offsets[piece], length), :, inner]
                pair = (outside, inside) if self.inward else (inside, outside)
                pltpu.make_async_copy(*pair, self.done.at[slot]).start()

            for length, begin, end in sizes.runs:
                pl.loop(begin, end, unroll=end - begin <= UNROLLED)(functools.partial(copy, length=length))

    def wait(self, slot: Any) -> None:
        """Waits until all copies of a half are done: a semaphore counts bytes, here those of the whole half."""
        half = self.buffer.at[slot]
        pltpu.make_async_copy(half, half, self.done.at[slot]).wait()


def _pipeline(
    step: Any, steps: int, incoming: Sequence[_Stream], outgoing: Sequence[_Stream], work: Callable[[Any], None]
) -> None:
    """Computes a step between the copies of the next one and of the last ones."""
    slot = jax.lax.rem(step, 2)

    def wait(streams: Sequence[_Stream], slot: Any) -> None:
        for stream in streams:
            stream.wait(slot)

    # The next one's, and before the first its own: one piece of code for both.
    @pl.loop(jnp.int32(step > 0), jnp.int32(step + 1 < steps) + 1)
    def _(ahead: Any) -> None:
        for stream in incoming:
            stream.start(step + ahead, jax.lax.rem(step + ahead, 2))

    wait(incoming, slot)
    pl.when(step >= 2)(lambda: wait(outgoing, slot))
    work(slot)
    for stream in outgoing:
        stream.start(step, slot)

    @pl.when(step == steps - 1)
    def _() -> None:
        wait(outgoing, slot)
        if steps > 1:
            wait(outgoing, 1 - slot)


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Product of each window's a, rounded to the dtype of b, and b, contracted over these axes, in float32."""
    contract = (((axis_a - 1,), (axis_b - 1,)), ((), ()))
    # Of what may be asked of all products Mosaic knows two: float32 in one pass of bfloat16, the default, or whole.
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    whole = b.dtype == jnp.float32 and asked not in (None, "default", "fastest", "bfloat16")
    precision = jax.lax.Precision.HIGHEST if whole else jax.lax.Precision.DEFAULT
    products = [
        jax.lax.dot_general(x.astype(b.dtype), y, contract, precision, preferred_element_type=jnp.float32)
        for x, y in zip(a, b, strict=True)
    ]
    return jnp.stack(products)


def _head_of_lane(sizes: Sizes) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, 1, LANES), 2) // sizes.head_width


def _stack(words: jax.Array, sizes: Sizes, dtype: Any) -> jax.Array:
    """Words of (windows, slots, 128) -> (windows, heads * slots, 128): a head's rows have its own lanes, else zeros.

    Rows beyond the window's tokens become zeros, whatever is there: that is why words are masked and not numbers.
    """
    row, head = jax.lax.broadcasted_iota(jnp.int32, (1, words.shape[1], 1), 1), _head_of_lane(sizes)
    whole, rest = divmod(sizes.tokens, sizes.per_word)
    filled = jnp.where(row < whole, -1, jnp.where((row == whole) & (rest > 0), 0xFFFF, 0))
    parts = [words & jnp.where(head == i, filled, 0).astype(jnp.uint32) for i in range(sizes.heads)]
    return pltpu.bitcast(jnp.concatenate(parts, 1), dtype)


def _unstack(x: jax.Array, sizes: Sizes) -> jax.Array:
    """(windows, heads * slots, 128) -> (windows, tokens, 128): the lanes of a head from its rows."""
    head, out = _head_of_lane(sizes), x[:, : sizes.tokens]
    for i in range(1, sizes.heads):
        begin = i * sizes.slots
        out = jnp.where(head == i, x[:, begin : begin + sizes.tokens], out)
    return out


def _scaled_queries(q: jax.Array, sizes: Sizes, dtype: Any) -> jax.Array:
    """Stacked queries, of words, whose products with keys are logits to the base 2."""
    scaled = pltpu.bitcast(q, dtype).astype(jnp.float32) * (sizes.head_width**-0.5 * LOG2E)
    return _stack(pltpu.bitcast(scaled.astype(dtype), jnp.uint32), sizes, dtype)


def _softmax(queries: jax.Array, keys: jax.Array, bias: jax.Array) -> jax.Array:
    """float32 (windows, tokens, heads * slots) of stacked queries."""
    logits = _dot(keys, queries, 2, 2) + bias[None]
    weights = jnp.exp2(logits - jnp.max(logits, 1, keepdims=True))
    return weights * (1 / jnp.sum(weights, 1, keepdims=True))


def _forward_windows(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, sizes: Sizes) -> jax.Array:
    """Attention of 128 lanes: q words, k, v (windows, tokens, 128), bias (tokens, heads * slots); float32."""
    weights = _softmax(_scaled_queries(q, sizes, k.dtype), k, bias)
    return _unstack(_dot(weights, v, 1, 1), sizes)


def _backward_windows(
    q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array, bias: jax.Array, sizes: Sizes
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, and of the bias, summed over windows; float32.

    Arguments as of `_forward_windows`; `grad`, of the output, is words like q.
    """
    queries, grads = _scaled_queries(q, sizes, k.dtype), _stack(grad, sizes, k.dtype)
    weights = _softmax(queries, k, bias)
    of_weights = _dot(v, grads, 2, 2)
    of_logits = weights * (of_weights - jnp.sum(weights * of_weights, 1, keepdims=True))
    of_bias = jnp.sum(of_logits, 0)
    of_q = _unstack(_dot(of_logits, k, 1, 1), sizes) * sizes.head_width**-0.5
    of_k = _dot(of_logits, queries, 2, 1) * (1 / LOG2E)
    return of_q, of_k, _dot(weights, grads, 2, 1), of_bias


def _halves(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of words of two halves: words of the lower halves, a's below b's, and of the upper ones."""
    lower = jnp.uint32(0xFFFF)
    return (a & lower) | (b << 16), (a >> 16) | (b & ~lower)


def _gather(tokens: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Of the tokens that a word holds, (EXAMPLES, 128): the words of two times 8 examples."""
    words = [pltpu.bitcast(x, jnp.uint32) for x in tokens]
    return _halves(*words) if len(words) == 2 else tuple(jnp.split(words[0], 2))


def _scatter(words: Sequence[jax.Array], dtype: Any) -> list[jax.Array]:
    """The inverse of `_gather`."""
    tokens = _halves(*words) if jnp.dtype(dtype).itemsize == 2 else (jnp.concatenate(words),)
    return [pltpu.bitcast(x, dtype) for x in tokens]


def _parts(buffers: Sequence[Any], group: Any, sizes: Sizes) -> list[tuple[Any, Any]]:
    """Of each part of buffers (tokens, EXAMPLES, parts * lanes): the buffer, and a group's 128 lanes."""
    return [
        (buffer, pl.ds(pl.multiple_of(first + group * LANES, LANES), LANES))
        for buffer in buffers
        for first in range(0, buffer.shape[-1], sizes.lanes)
    ]


def _turn(parts: Sequence[tuple[Any, Any]], at_work: Any, sizes: Sizes, back: bool) -> None:
    """From `_parts` to (parts, *`Sizes.at_work`), or back.

    A row of words lies in registers as it is read, and is written with a stride, or the other way round: nothing is
    transposed.
    """
    examples = EXAMPLES // 2

    def turn(row: Any, count: int) -> None:
        tokens = [row * sizes.per_word + i for i in range(count)]
        rows = [pl.ds(row + half * examples * sizes.rows, examples, stride=sizes.rows) for half in range(2)]
        for part, (buffer, lanes) in enumerate(parts):
            if back:
                found = _scatter([at_work.at[part][row] for row in rows], buffer.dtype)
                for token, x in zip(tokens, found, strict=False):  # of the last word maybe only the first
                    buffer[token, :, lanes] = x
            else:
                found = [buffer[token, :, lanes] for token in tokens]
                found += [jnp.zeros_like(found[0])] * (sizes.per_word - count)
                for row, words in zip(rows, _gather(found), strict=True):
                    at_work.at[part][row] = words

    whole, rest = divmod(sizes.tokens, sizes.per_word)

    @pl.loop(0, whole // ROWS_TURNED)
    def _(i: Any) -> None:
        for row in range(ROWS_TURNED):
            turn(i * ROWS_TURNED + row, sizes.per_word)

    for row in range(whole // ROWS_TURNED * ROWS_TURNED, whole):
        turn(row, sizes.per_word)
    if rest:
        turn(whole, rest)


def _turn_by_definition(parts: Sequence[tuple[Any, Any]], at_work: Any, sizes: Sizes, back: bool) -> None:
    """What `_turn` does, for the interpreter, which reaches every number by itself where there is a stride."""
    per, many = sizes.per_word, EXAMPLES // sizes.per_word
    words, tokens = pl.ds(0, EXAMPLES * sizes.rows), sizes.rows * per
    for part, (buffer, lanes) in enumerate(parts):
        if back:
            x = pltpu.bitcast(at_work[part, words].reshape(per, many, sizes.rows, LANES), buffer.dtype)
            buffer[:, :, lanes] = x.transpose(2, 1, 0, 3).reshape(tokens, EXAMPLES, LANES)[: sizes.tokens]
        else:
            x = jnp.pad(buffer[:, :, lanes], ((0, tokens - sizes.tokens), (0, 0), (0, 0)))
            x = x.reshape(tokens, many, per, LANES).transpose(2, 1, 0, 3)
            at_work[part, words] = pltpu.bitcast(x, jnp.uint32).reshape(-1, LANES)


def _read(at_work: Any, first: Any, sizes: Sizes) -> jax.Array:
    """Words of the examples from `first` on: (together, slots) rows, what is beyond a window's tokens undefined."""
    count = sizes.slots // sizes.per_word
    return jnp.stack([at_work[pl.ds((first + i) * sizes.rows, count)] for i in range(sizes.together)])


def _write(at_work: Any, first: Any, sizes: Sizes, value: jax.Array, dtype: Any) -> None:
    """Numbers (together, tokens, 128) to where `_read` finds them as words of this dtype."""
    if more := min(sizes.slots, sizes.rows * sizes.per_word) - sizes.tokens:  # to whole words and more
        value = jnp.concatenate([value, jnp.zeros((len(value), more, LANES), value.dtype)], 1)
    words = pltpu.bitcast(value.astype(dtype), jnp.uint32)
    for i in range(sizes.together):
        at_work[pl.ds((first + i) * sizes.rows, words.shape[1])] = words[i]


def _each_group(
    buffers: Sequence[Any], out: Any, slot: Any, at_work: Any, work: Callable[[Any], None], sizes: Sizes
) -> None:
    """Runs `work(group)` for each 128 lanes.

    `at_work` holds them, (parts, *sizes.at_work): first the parts of `buffers`, after `work` in the foremost those of
    `out`.
    """
    turn = _turn if sizes.strided else _turn_by_definition

    @pl.loop(0, sizes.groups)
    def _(group: Any) -> None:
        turn(_parts([buffer.at[slot] for buffer in buffers], group, sizes), at_work, sizes, back=False)
        work(group)
        turn(_parts([out.at[slot]], group, sizes), at_work, sizes, back=True)


def _forward_kernel(
    starts: Any, offsets: Any, kinds: Any, qkv: Any, bias: Any, mask: Any, out: Any, *scratch: Any, sizes: Sizes
) -> None:
    at_work, qkv_buffer, out_buffer, arrived, left = scratch
    stream = functools.partial(_Stream, sizes, starts, offsets, pl.program_id(0))

    def work(group: Any) -> None:
        table = bias[group] + mask[0]

        @pl.loop(0, EXAMPLES // sizes.together)
        def _(i: Any) -> None:
            first = i * sizes.together
            q, *kv = (_read(at_work.at[part], first, sizes) for part in range(3))
            k, v = (pltpu.bitcast(words, qkv.dtype)[:, : sizes.tokens] for words in kv)
            _write(at_work.at[0], first, sizes, _forward_windows(q, k, v, table, sizes), qkv.dtype)

    def step(slot: Any) -> None:
        _each_group([qkv_buffer], out_buffer, slot, at_work, work, sizes)

    incoming, outgoing = [stream(qkv, qkv_buffer, arrived, True)], [stream(out, out_buffer, left, False)]
    _pipeline(pl.program_id(1), sizes.steps, incoming, outgoing, step)


def _backward_kernel(
    starts: Any, offsets: Any, kinds: Any, qkv: Any, grad: Any, bias: Any, mask: Any, out: Any, of_bias: Any,
    *scratch: Any, sizes: Sizes,
) -> None:  # fmt: skip
    at_work, qkv_buffer, grad_buffer, out_buffer, arrived, grad_arrived, left = scratch
    stream = functools.partial(_Stream, sizes, starts, offsets, pl.program_id(0))

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        of_bias[...] = jnp.zeros_like(of_bias)

    def work(group: Any) -> None:
        table = bias[group] + mask[0]

        @pl.loop(0, EXAMPLES // sizes.together)
        def _(i: Any) -> None:
            first = i * sizes.together
            q, *kv, outer = (_read(at_work.at[part], first, sizes) for part in range(4))
            k, v = (pltpu.bitcast(words, qkv.dtype)[:, : sizes.tokens] for words in kv)
            *grads, of_table = _backward_windows(q, k, v, outer, table, sizes)
            for part, value in enumerate(grads):
                _write(at_work.at[part], first, sizes, value, qkv.dtype)
            of_bias[group] += of_table

    def step(slot: Any) -> None:
        _each_group([qkv_buffer, grad_buffer], out_buffer, slot, at_work, work, sizes)

    incoming = [stream(qkv, qkv_buffer, arrived, True), stream(grad, grad_buffer, grad_arrived, True)]
    _pipeline(pl.program_id(1), sizes.steps, incoming, [stream(out, out_buffer, left, False)], step)


def run(
    sizes: Sizes,
    tables: Sequence[jax.Array],
    maps: Sequence[jax.Array],
    bias: jax.Array,
    mask: jax.Array,
    interpret: bool,
) -> list[jax.Array]:
    """Forward pass, or backward where the outputs' gradient is given.

    Args:
      sizes: of the call.
      tables: int32, the pieces' starts (windows * pieces,) and offsets (pieces,), and the windows' kinds (windows,).
      maps: qkv (map tokens, batch, 3C), and for the backward pass the gradient (map tokens, batch, C).
      bias: float32 (C / 128, tokens, heads * slots), keys first; mask: (kinds, tokens, heads * slots); both times
        log2(e).
      interpret: run without a TPU.

    Returns:
      [(map tokens, batch, C)]; backward [the gradient of qkv, of bias (without the factor)].
    """
    backward, sizes = len(maps) == 2, dataclasses.replace(sizes, strided=STRIDED or not interpret)
    dtype = maps[0].dtype
    parts = [array.shape[-1] // sizes.channels for array in maps] + [3 if backward else 1]
    out = [jax.ShapeDtypeStruct((*maps[0].shape[:2], parts[-1] * sizes.channels), dtype)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    of_chunk = pl.BlockSpec((sizes.groups, *bias.shape[1:]), lambda chunk, *_: (chunk, 0, 0))
    blocks, out_specs = sizes.batch // EXAMPLES, [anywhere]
    of_kind = pl.BlockSpec(
        (1, *mask.shape[1:]), lambda chunk, step, starts, offsets, kinds: (kinds[step // blocks], 0, 0)
    )
    if backward:
        out.append(jax.ShapeDtypeStruct(bias.shape, jnp.float32))
        out_specs.append(of_chunk)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(sizes.chunks, sizes.steps),
        in_specs=[*[anywhere] * len(maps), of_chunk, of_kind],
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM((4 if backward else 3, *sizes.at_work), jnp.uint32)]
        + [pltpu.VMEM((2, sizes.tokens, EXAMPLES, n * sizes.lanes), dtype) for n in parts]
        + [pltpu.SemaphoreType.DMA((2,))] * len(parts),
    )
    call = pl.pallas_call(
        functools.partial(_backward_kernel if backward else _forward_kernel, sizes=sizes),
        grid_spec=grid,
        out_shape=out,
        interpret=interpret,
        name="window_attention_backward" if backward else "window_attention",
        cost_estimate=_cost(sizes, backward),
        metadata={"trips": str(sizes.steps * -(-sizes.chunks // core()[1]))},  # of a core, for whoever adds up cycles
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=core()[0] * 15 // 16
        ),
    )
    return call(*tables, *maps, bias, mask)


def _cost(sizes: Sizes, backward: bool) -> pl.CostEstimate:
    """For XLA's scheduler: the work that the definition needs, not what padding adds."""
    count = sizes.windows * sizes.batch * sizes.tokens * sizes.channels
    return pl.CostEstimate(
        flops=(10 if backward else 4) * count * sizes.tokens,
        bytes_accessed=(7 if backward else 4) * count * sizes.itemsize,
        transcendentals=count // sizes.head_width * sizes.tokens,
    )
