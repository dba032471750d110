"""A checksum of arrays that does not depend on how they are spread over devices."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from florence_jax.params.lazy import LazyArray

WORD = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_BLOCK = 2**20  # entries of an array on the host that are summed at a time


def digests(leaves: Sequence[jax.Array | LazyArray]) -> np.ndarray:
    """The checksum of each array, uint32 (len(leaves),), the same number on every process.

    It is sum_i (2 i + 1) * bits_i modulo 2^32 over the elements in row-major order: integer sums are exact in any
    order, and an odd factor lets no change of a single element go unnoticed. One pass over the memory, an array at a
    time: on a CPU it takes as much memory as the largest of them. Lazy arrays are summed on the host, in blocks.
    """
    found: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, LazyArray):
            found.append(_digest_on_host(np.asarray(leaf)))
            continue
        sharding = getattr(leaf, "sharding", None)
        everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
        found.append(_compiled(everywhere)(jnp.asarray(leaf)))
    return np.array([np.asarray(value) for value in found], np.uint32)


def _digest_on_host(array: np.ndarray) -> np.uint32:
    bits = np.ascontiguousarray(array).reshape(-1).view(WORD[array.dtype.itemsize])
    total = 0
    for start in range(0, len(bits), _BLOCK):
        block = bits[start : start + _BLOCK].astype(np.uint64)
        odd = 2 * np.arange(start, start + len(block), dtype=np.uint64) + 1
        total += int((block * (odd % 2**32)).sum() % 2**32)  # modulo 2^64, of which 2^32 is a factor
    return np.uint32(total % 2**32)


@functools.cache
def _compiled(out: NamedSharding | None) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(_digest, out_shardings=out)


def _digest(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, WORD[x.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
