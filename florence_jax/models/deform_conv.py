"""Modulated deformable convolution, 3x3, padding 1, one group (Zhu et al. 2018, DCNv2, arXiv 1811.11168, equation 1).

    out[p] = bias + sum_k mask[p, k] weight[k] . x<p stride - 1 + k + offset[p, k]>

for the nine taps k, row-major, with x<y, x> bilinear and 0 outside the map. An offset is (dy, dx) in pixels of `x`.
Where a coordinate is a whole number the gradient by it is the one from above (the slope towards the next row or
column), in every form and as in torchvision.
"""

import jax
import jax.numpy as jnp

# Offsets are kept below this many pixels: still outside of any map, and a whole number of int32.
FAR = 1e6


def deform_conv(
    x: jax.Array,
    offsets: jax.Array,
    mask: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    stride: int = 1,
    form: str = "auto",
) -> jax.Array:
    """The convolution of maps at learned positions.

    Coordinates and the weights of the samples are float32 (float64 if the offsets are) whatever the dtype of `x`.
    An infinite offset is one far outside: it samples 0. Where an offset is NaN, the output is NaN at that position and
    at no other, and no gradient comes from there.

    Args:
      x: (B, H, W, C), the maps.
      offsets: (B, h, w, 18), (dy, dx) of each tap, taps row-major; h = (H - 1) // stride + 1, w alike, or any other
        size: positions are counted from the first.
      mask: (B, h, w, 9), the factor of each sample (after the sigmoid).
      weight: (3, 3, C, D), the kernel. bias: (D,) or None.
      stride: pixels of `x` between output positions.
      form: how it is computed; all give the same values and gradients.

    Returns:
      (B, h, w, D) in the dtype of `x`.
    """
    dtype = jnp.promote_types(offsets.dtype, jnp.float32)
    offsets = offsets.astype(dtype).reshape(*offsets.shape[:3], 9, 2)
    broken = jnp.isnan(offsets).any((-2, -1))[..., None]
    offsets = jnp.clip(jnp.where(broken[..., None], 0, offsets), -FAR, FAR)
    out = deform_conv_naive(x, offsets, mask.astype(dtype), weight.astype(x.dtype), stride)
    if bias is not None:
        out = out + jnp.broadcast_to(bias.reshape(1, 1, 1, -1), out.shape).astype(x.dtype)
    return jnp.where(broken, jnp.nan, out)


def sample_positions(offsets: jax.Array, stride: int) -> jax.Array:
    """Where the taps fall: offsets (B, h, w, 9, 2) -> (y, x) of the same shape, in pixels of the input map."""
    grid = jnp.stack(jnp.meshgrid(*(jnp.arange(n) * stride - 1 for n in offsets.shape[1:3]), indexing="ij"), -1)
    taps = jnp.stack(jnp.meshgrid(jnp.arange(3), jnp.arange(3), indexing="ij"), -1).reshape(1, 1, 1, 9, 2)
    return offsets + grid[None, :, :, None] + taps


def deform_conv_naive(x: jax.Array, offsets: jax.Array, mask: jax.Array, weight: jax.Array, stride: int) -> jax.Array:
    """The definition: four gathers of corners for all taps at once. Offsets (B, h, w, 9, 2), as above otherwise."""
    positions = sample_positions(offsets, stride)
    first = jnp.floor(positions)
    samples = jnp.zeros((), offsets.dtype)
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at = first + jnp.array(corner, first.dtype).reshape(1, 1, 1, 1, 2)
        inside = ((at >= 0) & (at < jnp.array(x.shape[1:3]).reshape(1, 1, 1, 1, 2))).all(-1)
        share = (1 - jnp.abs(positions - at)).prod(-1)
        rows, columns = (jnp.clip(at[..., i], 0, x.shape[1 + i] - 1).astype(jnp.int32) for i in (0, 1))
        values = jax.vmap(lambda image, r, c: image[r, c])(x, rows, columns)
        samples = samples + (jnp.where(inside, share, 0) * mask)[..., None] * values
    return jnp.einsum("bhwkc,kcd->bhwd", samples.astype(x.dtype), weight.reshape(9, *weight.shape[2:]))
