"""Dropout keyed by example: the same draws for an example whole, in micro-batches, or spread over devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

SITES = 16  # room for the places of a layer that draw


@functools.partial(jax.tree_util.register_dataclass, data_fields=["seeds", "site"], meta_fields=["rate"])
@dataclasses.dataclass(frozen=True)
class Dropout:
    """What a place of the network draws (Srivastava et al. 2014), for each example its own.

    The bits are a hash of the example's seed, the place and the element's index, made where they are used: nothing of
    the size of the activations is kept for the backward pass, and there is no state to split over devices.

    Attributes:
      seeds: uint32 (B, 2), of each example; see `drop_examples`.
      site: uint32 scalar, the place.
      rate: probability of a zero, in [0, 1).
    """

    seeds: jax.Array
    site: jax.Array
    rate: float

    def layer(self, number: jax.Array) -> "Dropout":
        """For one of several equal layers, uint32 scalar; then `at` numbers the places inside it."""
        return dataclasses.replace(self, site=self.site + (number + 1) * jnp.uint32(SITES))

    def at(self, place: int) -> "Dropout":
        """For a place of a layer, below `SITES`."""
        return dataclasses.replace(self, site=self.site + jnp.uint32(place))

    def copies(self, count: int) -> "Dropout":
        """For a batch with so many copies of each example beside each other, each of which draws its own."""
        shifts = jnp.arange(count, dtype=jnp.uint32)[None, :, None] * jnp.uint32(0x9E3779B9)
        return dataclasses.replace(self, seeds=(self.seeds[:, None] + shifts).reshape(-1, 2))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, ...) -> the same shape and dtype: zeros with probability `rate`, the others scaled by 1 / (1 - rate)."""
        return _drop(x, self.seeds, self.site, self.rate)


def drop_examples(key: jax.Array, examples: jax.Array, rate: float) -> Dropout:
    """Dropout of a batch.

    Args:
      key: PRNG key of the step.
      examples: int (B,), distinct ids, such as positions in the global batch.
      rate: see `Dropout`.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, examples)
    data = jax.random.key_data(keys) if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else keys
    return Dropout(data.reshape(len(examples), -1)[:, -2:], jnp.uint32(0), rate)


def _mixed(bits: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: every bit of the result depends on every bit of the uint32."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _factors(seeds: jax.Array, site: jax.Array, rate: float, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    ones = (1,) * (len(shape) - 1)
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(1, len(shape)):
        stride = math.prod(shape[axis + 1 :])
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    low, high = (_mixed(seeds[:, i] + site * jnp.uint32(0x9E3779B9 + i)).reshape(-1, *ones) for i in (0, 1))
    bits = _mixed(_mixed(index ^ low) + high)
    return jnp.where(bits >= jnp.uint32(rate * 2**32), 1 / (1 - rate), 0.0).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _drop(x: jax.Array, seeds: jax.Array, site: jax.Array, rate: float) -> jax.Array:
    return x * _factors(seeds, site, rate, x.shape, x.dtype)


def _drop_forward(
    x: jax.Array, seeds: jax.Array, site: jax.Array, rate: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _drop(x, seeds, site, rate), (seeds, site)


def _drop_backward(rate: float, residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple:
    return grad * _factors(*residuals, rate, grad.shape, grad.dtype), None, None


_drop.defvjp(_drop_forward, _drop_backward)
