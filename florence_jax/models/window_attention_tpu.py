"""Window attention as a Pallas kernel for TPUs: forward, and backward with the gradients of q, k, v and the bias.

It works on maps as XLA lays them out on a TPU, (tokens, batch, channels), the last two in tiles: a token of 16 examples
is a few whole tiles. So rolling a map, cutting it into windows and both ways back are nothing but the addresses that
the copies between the chip's memory and its cores use.

A step of the grid is one window of 16 examples, a part of the channels at a time; while it is computed the next one is
copied in and the last one out. 128 lanes hold the channels of several heads (four of 32): queries are stacked, head by
head, with zeros in the lanes of the others, so that one product gives the logits of all, keys along sublanes, (head,
query) along lanes. A softmax then reduces over sublanes, which costs additions of whole registers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from florence_jax.models.window_places import LOG2E

LANES = 128
EXAMPLES = 16  # of a step: the rows of a bfloat16 tile
UNROLLED = 32  # copies whose addresses are computed side by side
SPILLED = 4  # arrays of a window's logits that do not fit into registers
INTERPRETED_VMEM = 64 * 2**20  # as of v5p; where there is no chip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kernel is compiled for.

    Attributes:
      tokens: of a window. windows: of a map. batch: examples, a multiple of `EXAMPLES`.
      channels: C. head_width: channels of a head, a divisor of 128.
      lanes: channels of a step, a multiple of 128 that divides C.
      together: windows whose operations are interleaved, so that units do not wait for each other: a power of 2.
      runs: (length, first, end): the pieces first to end - 1 of a window have this many tokens, see `Places.pieces`.
      itemsize: bytes of an element.
    """

    tokens: int
    windows: int
    batch: int
    channels: int
    head_width: int
    lanes: int
    together: int
    runs: tuple[tuple[int, int, int], ...]
    itemsize: int

    @property
    def heads(self) -> int:
        """Heads side by side in 128 lanes."""
        return LANES // self.head_width

    @property
    def slots(self) -> int:
        """Rows of a head in stacked queries: its tokens, in whole tiles."""
        return -(-self.tokens // 16) * 16

    @property
    def queries(self) -> int:
        """Columns of the logits: (head, query)."""
        return self.heads * self.slots

    @property
    def groups(self) -> int:
        """Times 128 lanes of a step."""
        return self.lanes // LANES

    @property
    def chunks(self) -> int:
        """Steps that share a window of 16 examples."""
        return self.channels // self.lanes

    @property
    def steps(self) -> int:
        """Windows of 16 examples."""
        return self.windows * self.batch // EXAMPLES

    def vmem(self) -> int:
        """Bytes of a core's memory that the backward pass takes: two of each buffer, one of the windows at work."""
        buffers = 2 * 7 * self.lanes + 4 * LANES  # q, k, v, the output's gradient and theirs
        logits = -(-self.tokens // 8) * 8 * -(-self.queries // LANES) * LANES * 4
        tables = 2 * logits * (2 * self.groups + 1)
        return buffers * self.tokens * EXAMPLES * self.itemsize + tables + SPILLED * self.together * logits


def choose_parts(sizes: Sizes) -> Sizes | None:
    """`sizes` with the most windows together and then the most lanes that fit; None: not even one and 128.

    There is a part of the channels for each core.
    """
    memory, cores = core()
    whole, together = sizes.channels // LANES, min(8, 2 ** int(math.log2(max(1, 640 // sizes.slots))))
    parts = [n for n in range(1, whole + 1) if whole % n == 0 and (n % cores == 0 or whole % cores)]
    while together:
        for n in parts:
            found = dataclasses.replace(sizes, lanes=sizes.channels // n, together=together)
            if found.vmem() <= memory * 7 // 8:
                return found
        together //= 2
    return None


def core() -> tuple[int, int]:
    """Bytes of memory of a core, and cores, of the chip that is compiled for."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # no TPU
        return INTERPRETED_VMEM, 1
    return info.vmem_capacity_bytes, info.num_cores


@dataclasses.dataclass(frozen=True)
class _Stream:
    """Copies of a window's tokens, for 16 examples, between a map and one half of a buffer.

    Attributes:
      sizes: of the kernel.
      starts: (windows * pieces,), the map's token that each piece of a window begins with; offsets: (pieces,), the
        window's.
      chunk: which part of the channels.
      hbm: the map, (tokens, batch, parts * C). buffer: (2, parts, tokens, EXAMPLES, lanes). done: 2 semaphores.
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
        for part in range(self.buffer.shape[1]):
            first = part * sizes.channels + self.chunk * sizes.lanes
            columns = pl.ds(pl.multiple_of(first, LANES), sizes.lanes)

            def copy(piece: Any, length: int, part: int = part, columns: Any = columns) -> None:
                outside = self.hbm.at[pl.ds(self.starts[window * pieces + piece], length), rows, columns]
                inside = self.buffer.at[slot, part, pl.ds(self.offsets[piece], length)]
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
    """Product of each window, contracted over these axes, in float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _head_of_lane(sizes: Sizes) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, 1, LANES), 2) // sizes.head_width


def _stack(x: jax.Array, sizes: Sizes) -> jax.Array:
    """(windows, tokens, 128) -> (windows, heads * slots, 128): in the rows of a head its own lanes, else zeros."""
    head = _head_of_lane(sizes)
    if sizes.slots > sizes.tokens:
        x = jnp.concatenate([x, jnp.zeros((len(x), sizes.slots - sizes.tokens, LANES), x.dtype)], 1)
    return jnp.concatenate([jnp.where(head == i, x, jnp.zeros_like(x)) for i in range(sizes.heads)], 1)


def _unstack(x: jax.Array, sizes: Sizes) -> jax.Array:
    """(windows, heads * slots, 128) -> (windows, tokens, 128): the lanes of a head from its rows."""
    head, out = _head_of_lane(sizes), x[:, : sizes.tokens]
    for i in range(1, sizes.heads):
        begin = i * sizes.slots
        out = jnp.where(head == i, x[:, begin : begin + sizes.tokens], out)
    return out


def _scaled_queries(q: jax.Array, sizes: Sizes) -> jax.Array:
    """Stacked queries whose products with keys are logits to the base 2."""
    scale = sizes.head_width**-0.5 * LOG2E
    return _stack((q.astype(jnp.float32) * scale).astype(q.dtype), sizes)


def _softmax(queries: jax.Array, keys: jax.Array, bias: jax.Array) -> jax.Array:
    """float32 (windows, tokens, heads * slots) of stacked queries."""
    logits = _dot(keys, queries, 2, 2) + bias[None]
    weights = jnp.exp2(logits - jnp.max(logits, 1, keepdims=True))
    return weights * (1 / jnp.sum(weights, 1, keepdims=True))


def _forward_windows(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, sizes: Sizes) -> jax.Array:
    """Attention of 128 lanes: q, k, v (windows, tokens, 128), bias (tokens, heads * slots); float32."""
    weights = _softmax(_scaled_queries(q, sizes), k, bias)
    return _unstack(_dot(weights.astype(v.dtype), v, 1, 1), sizes)


def _backward_windows(
    q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array, bias: jax.Array, sizes: Sizes
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, and of the bias, summed over windows; arguments as of `_forward_windows`, float32."""
    queries, grads = _scaled_queries(q, sizes), _stack(grad, sizes)
    weights = _softmax(queries, k, bias)
    of_weights = _dot(v, grads, 2, 2)
    of_logits = weights * (of_weights - jnp.sum(weights * of_weights, 1, keepdims=True))
    of_bias, of_logits = jnp.sum(of_logits, 0), of_logits.astype(q.dtype)
    of_q = _unstack(_dot(of_logits, k, 1, 1), sizes) * sizes.head_width**-0.5
    of_k = _dot(of_logits, queries, 2, 1) * (1 / LOG2E)
    return of_q, of_k, _dot(weights.astype(q.dtype), grads, 2, 1), of_bias


def _lanes(group: Any) -> Any:
    return pl.ds(pl.multiple_of(group * LANES, LANES), LANES)


def _each_group(buffers: Sequence[Any], out: Any, slot: Any, at_work: Any, work: Callable[[Any], None]) -> None:
    """Runs `work(group)` for each 128 lanes.

    `at_work` holds them window by window, (parts, EXAMPLES, tokens, 128): first the parts of `buffers`, after `work` in
    the foremost those of `out`.
    """
    parts = [(buffer, part) for buffer in buffers for part in range(buffer.shape[1])]

    tokens = at_work.shape[2]

    def turn(lanes: Any, first: Any, count: int, back: bool) -> None:
        some = pl.ds(first, count)
        if back:
            for part in range(out.shape[1]):
                out[slot, part, some, :, lanes] = jnp.swapaxes(at_work[part, :, some], 0, 1)
        else:
            for i, (buffer, part) in enumerate(parts):
                at_work[i, :, some] = jnp.swapaxes(buffer[slot, part, some, :, lanes], 0, 1)

    def turn_all(lanes: Any, back: bool) -> None:
        if tokens >= EXAMPLES:

            @pl.loop(0, tokens // EXAMPLES)
            def _(i: Any) -> None:
                turn(lanes, pl.multiple_of(i * EXAMPLES, EXAMPLES), EXAMPLES, back)

        if rest := tokens % EXAMPLES:
            turn(lanes, tokens - rest, rest, back)

    @pl.loop(0, out.shape[-1] // LANES)
    def _(group: Any) -> None:
        lanes = pl.ds(pl.multiple_of(group * LANES, LANES), LANES)
        turn_all(lanes, back=False)
        work(group)
        turn_all(lanes, back=True)


def _forward_kernel(
    starts: Any, offsets: Any, kinds: Any, qkv: Any, bias: Any, mask: Any, out: Any, *scratch: Any, sizes: Sizes
) -> None:
    at_work, qkv_buffer, out_buffer, arrived, left = scratch
    stream = functools.partial(_Stream, sizes, starts, offsets, pl.program_id(0))

    def work(group: Any) -> None:
        table = bias[group] + mask[0]

        @pl.loop(0, EXAMPLES // sizes.together)
        def _(i: Any) -> None:
            some = pl.ds(i * sizes.together, sizes.together)
            q, k, v = (at_work[part, some] for part in range(3))
            at_work[0, some] = _forward_windows(q, k, v, table, sizes).astype(at_work.dtype)

    def step(slot: Any) -> None:
        _each_group([qkv_buffer], out_buffer, slot, at_work, work)

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
            some = pl.ds(i * sizes.together, sizes.together)
            q, k, v, outer = (at_work[part, some] for part in range(4))
            *grads, of_table = _backward_windows(q, k, v, outer, table, sizes)
            for part, value in enumerate(grads):
                at_work[part, some] = value.astype(at_work.dtype)
            of_bias[group] += of_table

    def step(slot: Any) -> None:
        _each_group([qkv_buffer, grad_buffer], out_buffer, slot, at_work, work)

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
      bias: float32 (C / 128, tokens, heads * slots), keys first, times log2(e); mask: (kinds, tokens, heads * slots).
      interpret: run without a TPU.

    Returns:
      [(map tokens, batch, C)]; backward [the gradient of qkv, of bias (without the factor)].
    """
    backward = len(maps) == 2
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
        scratch_shapes=[pltpu.VMEM((4 if backward else 3, EXAMPLES, sizes.tokens, LANES), dtype)]
        + [pltpu.VMEM((2, n, sizes.tokens, EXAMPLES, sizes.lanes), dtype) for n in parts]
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
