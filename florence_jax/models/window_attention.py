"""Window attention on whole maps by a kernel that needs neither rolled maps nor windows cut from them.

The same numbers as `windows.WindowAttention` on a rolled and partitioned map, which is the reference. The kernels are
in `window_attention_tpu.py` and `window_attention_gpu.py`, there with cuDNN's attention beside it: here are what they
are given, when they are used, their gradient, and their place on several devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from florence_jax.models.window_places import LOG2E, MASKED, Places
from florence_jax.models.window_sizes_tpu import EXAMPLES, LANES, Sizes, choose_parts

ATTENTIONS = ("auto", "xla", "fused", "cudnn")
MOST_TOKENS = 256  # of a window: the logits of four heads still lie in a core's memory, but for v4
LEAST_WIDTH = 16  # of a head: narrower ones make many queries, whose registers no longer fit
MOST_PIECES = 2**16  # of a map: their addresses lie in 1 MiB of memory for scalars


def _for_tpu() -> Any:
    """`window_attention_tpu`; loaded where it is used, because to import Pallas takes as long as half of JAX."""
    from florence_jax.models import window_attention_tpu

    return window_attention_tpu


def _for_gpu() -> Any:
    """`window_attention_gpu`, in the same way."""
    from florence_jax.models import window_attention_gpu

    return window_attention_gpu


def platform() -> str:
    """What will run that is traced, 'tpu', 'gpu' or 'cpu': by the mesh in context, or by JAX's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return str(jax.default_backend() if device is None else device.platform)


def _axes(kind: AxisType) -> tuple[str, ...]:
    """Axes of the mesh in context: Auto, what no shard_map has split yet, or Manual, what it has."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis, found in zip(mesh.axis_names, mesh.axis_types, strict=True) if found == kind)


def _devices() -> int:
    """Over how many the batch of what is traced is still to be split."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in _axes(AxisType.Auto))


@functools.cache
def say(what: str, why: str) -> None:
    """Tells once that maps do not go to the kernel."""
    logging.info("window attention of %s runs as XLA has it: %s", what, why)


def use_kernel(form: str, x: jax.Array, places: Places | None, heads: int) -> bool:
    """Whether `fused_attention` computes attention for this map.

    Args:
      form: 'xla': never; 'auto': on a TPU, where it fits; 'fused': wherever it fits, by the kernel for TPUs or the one
        for GPUs, elsewhere by that for TPUs, interpreted, which is slow and for tests; 'cudnn': on a GPU, by cuDNN.
      x: the map, (B, *sizes, C), in the dtype of the products.
      places: of the map; None where each example has its own.
      heads: of attention.

    Raises:
      UserError: 'cudnn' where there is none, or in a dtype that it does not have.
    """
    if form == "xla" or (form == "auto" and platform() != "tpu"):
        return False
    if form == "cudnn":
        _for_gpu().check_cudnn(platform(), x.dtype)
    why = _misfit(x, places, heads)
    if why and len(x) > 1:  # one example: parameters are being drawn
        say(f"{len(x)} maps of {'x'.join(map(str, x.shape[1:]))}", why)
    return not why


def _misfit(x: jax.Array, places: Places | None, heads: int) -> str:
    """Why no kernel takes a map; '' where one does. Arguments as of `use_kernel`."""
    if places is None:
        return "each example has its own padding"
    if places.tokens.shape[1] > MOST_TOKENS:
        return f"its windows have {places.tokens.shape[1]} tokens, more than {MOST_TOKENS}"
    if platform() != "cpu" and jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        return "no mesh in context says how several devices split the batch"
    if platform() != "gpu":
        return _tpu_misfit(x, places, heads)
    if len(x) % _devices():
        return f"{_devices()} devices do not split the batch evenly"
    return str(_for_gpu().misfit(x.dtype, x.shape[-1] // heads))


def _tpu_misfit(x: jax.Array, places: Places, heads: int) -> str:
    channels, devices = x.shape[-1], _devices()
    if channels % LANES or LANES % (channels // heads):
        return f"its {channels} channels in {heads} heads do not make up whole groups of {LANES}"
    if channels // heads < LEAST_WIDTH:
        return f"its heads have {channels // heads} channels, fewer than {LEAST_WIDTH}"
    if len(x) % (devices * EXAMPLES):
        return f"a device's part of the batch is not a multiple of {EXAMPLES}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it is of {x.dtype}"
    if places.pieces()[0].size > MOST_PIECES:
        return f"its windows are more than {MOST_PIECES} pieces"
    if kernel_sizes(x, places, heads) is None:
        return "a window of 16 examples does not fit into a core's memory"
    return ""


def kernel_sizes(x: Any, places: Places, heads: int) -> Sizes | None:
    """`Sizes` for a map, or its shape, on the devices in context; None where it does not fit."""
    windows, tokens = places.tokens.shape
    smallest = Sizes(
        tokens=tokens,
        windows=windows,
        batch=len(x) // _devices(),
        channels=x.shape[-1],
        head_width=x.shape[-1] // heads,
        lanes=LANES,
        together=1,
        runs=places.pieces()[2],
        itemsize=x.dtype.itemsize,
    )
    return choose_parts(smallest)


def fused_attention(qkv: jax.Array, bias: jax.Array, places: Places, heads: int, form: str = "fused") -> jax.Array:
    """Window attention on a map that `use_kernel` accepts.

    Args:
      qkv: (B, *sizes, 3C), nested as `layers.split_heads` says.
      bias: float32 (heads, tokens, tokens), by query and key.
      places: of the map's windows.
      heads: of attention.
      form: as it was accepted for.

    Returns:
      (B, *sizes, C).
    """
    if form == "cudnn":

        def library(qkv: jax.Array, bias: jax.Array) -> list[jax.Array]:
            return [_for_gpu().library_attention(qkv, bias, places, heads)]

        return checkpoint_name(_per_device(library, (True, False), [True])(qkv, bias)[0], "attention")
    if platform() == "gpu":
        attend = _with_gradient(functools.partial(_for_gpu().run, places))
    else:
        run, bias = _tpu_kernel(qkv, bias, places, heads)
        attend = _with_gradient(run)
    return checkpoint_name(attend(qkv, bias), "attention")


def _tpu_kernel(
    qkv: jax.Array, bias: jax.Array, places: Places, heads: int
) -> tuple[Callable[[list[jax.Array], jax.Array], list[jax.Array]], jax.Array]:
    """What `_with_gradient` takes, and the bias as that is given it; arguments as of `fused_attention`."""
    tpu, channels = _for_tpu(), qkv.shape[-1] // 3
    sizes = kernel_sizes(jax.ShapeDtypeStruct((*qkv.shape[:-1], channels), qkv.dtype), places, heads)
    starts, offsets, _ = places.pieces()
    kind, regions, outside = places.kinds()

    @jax.custom_batching.sequential_vmap  # of a kernel with one more axis Mosaic could not reach the maps
    def run(maps: list[jax.Array], tables: jax.Array) -> list[jax.Array]:
        # (tokens, batch, channels) is how XLA lays out a map on a TPU whatever the order of axes: nothing is moved.
        by_token = [x.reshape(len(x), -1, x.shape[-1]).swapaxes(0, 1) for x in maps]
        addresses = [jnp.asarray(table) for table in (starts.reshape(-1), offsets, kind)]
        mask = _mask(regions, outside, sizes) * LOG2E
        out, *rest = tpu.run(sizes, addresses, by_token, tables * LOG2E, mask, interpret=platform() != "tpu")
        return [out.swapaxes(0, 1).reshape(*maps[0].shape[:-1], -1), *rest]

    return run, _to_columns(bias, sizes)


def _with_gradient(run: Callable[[list[jax.Array], jax.Array], list[jax.Array]]) -> Any:
    """Attention of qkv (B, *sizes, 3C) and a bias, on all devices, by kernels of one device.

    Args:
      run: given [qkv], its part of the batch, and the bias: [(b, *sizes, C)]; given [qkv, gradient of that] as well:
        [gradient of qkv, of the bias].
    """
    axes = _axes(AxisType.Auto)

    def run_backward(qkv: jax.Array, grad: jax.Array, bias: jax.Array) -> list[jax.Array]:
        of_qkv, of_bias = run([qkv, grad], bias)
        return [of_qkv, jax.lax.psum(of_bias, axes) if axes else of_bias]

    @jax.custom_vjp
    def attend(qkv: jax.Array, bias: jax.Array) -> jax.Array:
        return _per_device(lambda qkv, bias: run([qkv], bias), (True, False), [True])(qkv, bias)[0]

    def backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, ...]:
        qkv, bias = residuals
        return tuple(_per_device(run_backward, (True, True, False), [True, False])(qkv, grad, bias))

    attend.defvjp(lambda qkv, bias: (attend(qkv, bias), (qkv, bias)), backward)
    return attend


def _per_device(run: Callable[..., list[jax.Array]], split: tuple[bool, ...], results: list[bool]) -> Any:
    """`run` on each device's part of the batch: the partitioner does not split kernels.

    Args:
      run: gives a list of arrays.
      split, results: of its arguments and results, whether they are split by batch; the others are whole everywhere.
    """
    axes, manual = _axes(AxisType.Auto), _axes(AxisType.Manual)
    if not axes:
        return run
    specs = {True: PartitionSpec(axes), False: PartitionSpec()}
    mapped = jax.shard_map(
        run,
        in_specs=tuple(specs[one] for one in split),
        out_specs=[specs[one] for one in results],
        axis_names=set(axes),
        check_vma=False,  # the interpreter mixes what varies over devices with what does not
    )

    def call(*arguments: jax.Array) -> list[jax.Array]:
        # Unchecked, the results lost that they differ over the axes of a shard_map around this one.
        return [jax.lax.pcast(x, manual, to="varying") if manual else x for x in mapped(*arguments)]

    return call


def _to_columns(bias: jax.Array, sizes: Any) -> jax.Array:
    """(heads, queries, keys) -> (heads / those in 128 lanes, keys, those in 128 lanes * slots); see `Sizes`."""
    bias = jnp.pad(bias, ((0, 0), (0, sizes.slots - sizes.tokens), (0, 0)))
    bias = bias.reshape(-1, sizes.heads, sizes.slots, sizes.tokens).transpose(0, 3, 1, 2)
    return bias.reshape(-1, sizes.tokens, sizes.queries)


def _mask(regions: np.ndarray, outside: np.ndarray, sizes: Any) -> jax.Array:
    """float32 (kinds, keys, heads in 128 lanes * slots), 0 or `MASKED`, from (kinds, tokens) each."""
    queries, keys = jnp.asarray(regions)[:, None], jnp.asarray(regions)[:, :, None]
    blocked = (queries != keys) | jnp.asarray(outside)[:, :, None]
    mask = jnp.where(blocked, jnp.float32(MASKED), jnp.float32(0))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, sizes.slots - sizes.tokens)))
    return jnp.tile(mask, (1, 1, sizes.heads))
