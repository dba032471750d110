"""Modulated deformable convolution, 3x3, padding 1, one group (Zhu et al. 2018, DCNv2, arXiv 1811.11168, equation 1).

    out[p] = bias + sum_k mask[p, k] weight[k] . x<p stride - 1 + k + offset[p, k]>

for the nine taps k, row-major, with x<y, x> bilinear and 0 outside the map. An offset is (dy, dx) in pixels of `x`.
Where a coordinate is a whole number the gradient by it is the one from above (the slope towards the next row or
column), in every form and as in torchvision.

The forms differ in how a tap is sampled. 'packed' gathers the four corners of a sample at once, as a row of a table of
2x2 neighbourhoods. 'matrix' multiplies the map by a matrix of hat functions max(0, 1 - |y - row|) max(0, 1 - |x -
column|): positions times positions of work, but no scatter in the backward pass. Both go tap by tap and keep no samples
for the backward pass, which takes them again. 'naive' is the definition.

'auto' takes 'matrix' for maps that have at most half as many positions as channels, 'packed' for larger ones. On 2
cores of an Intel Xeon, no accelerator, `python -m florence_jax.tools.bench detect --parts=conv --maps=2x256x8x8` and
the like: with 256 channels the forward and backward pass of 'matrix' takes .83 of the time of 'packed' at 6 x 8
positions, .98 at 8 x 8, 1.06 at 10 x 12, 1.26 at 12 x 16; with 64 channels .68 at 4 x 6, 1.8 at 8 x 8.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from florence_jax.errors import UserError
from florence_jax.models.layers import add_bias, constrain

# Offsets are kept below this many pixels: outside of any map, and a whole number of int32.
FAR = 1e6
# Positions of the map for each of its channels up to which 'auto' takes the matrix form; measured, see above.
MATRIX_POSITIONS = 0.5


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

    Coordinates and the weights of corners are float32 (float64 if the offsets are) whatever the dtype of `x`.
    An infinite offset is one far outside: it samples 0. Where an offset is NaN, the output is NaN at that position and
    at no other, and no gradient comes from there.

    Args:
      x: (B, H, W, C), the maps.
      offsets: (B, h, w, 18), (dy, dx) of each tap, taps row-major; any h and w: positions are counted from the first.
      mask: (B, h, w, 9), the factor of each sample (after the sigmoid).
      weight: (3, 3, C, D), the kernel. bias: (D,) or None.
      stride: pixels of `x` between output positions.
      form: 'packed', 'matrix', 'naive', all of the same values and gradients, or 'auto': 'matrix' for maps of at most
        `MATRIX_POSITIONS` positions for each channel, else 'packed'.

    Returns:
      (B, h, w, D) in the dtype of `x`.

    Raises:
      UserError: for an unknown form.
    """
    weight = weight.astype(x.dtype)
    if form == "auto":
        form = "matrix" if x.shape[1] * x.shape[2] <= MATRIX_POSITIONS * x.shape[3] else "packed"
    if form == "naive":
        out = deform_conv_naive(x, offsets, mask, weight, stride)
    elif form in SAMPLERS:
        out = _by_taps(SAMPLERS[form], stride, x, offsets, mask, weight)
    else:
        raise UserError(f"form of the deformable convolution {form!r}: known are auto, naive, {', '.join(SAMPLERS)}")
    return out if bias is None else add_bias(out, bias)


def finite_offsets(offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Offsets (B, h, w, 18) -> (B, h, w, 9, 2), at least float32 and of at most `FAR`, and (B, h, w, 1): any NaN."""
    offsets = offsets.astype(jnp.promote_types(offsets.dtype, jnp.float32)).reshape(*offsets.shape[:3], 9, 2)
    broken = jnp.isnan(offsets).any((-2, -1))[..., None]
    return jnp.clip(jnp.where(broken[..., None], 0, offsets), -FAR, FAR), broken


def sample_positions(offsets: jax.Array, stride: int) -> jax.Array:
    """Where the taps fall: offsets (B, h, w, 9, 2) -> (y, x) of the same shape, in pixels of the input map."""
    grid = jnp.stack(jnp.meshgrid(*(jnp.arange(n) * stride - 1 for n in offsets.shape[1:3]), indexing="ij"), -1)
    taps = jnp.stack(jnp.meshgrid(jnp.arange(3), jnp.arange(3), indexing="ij"), -1).reshape(1, 1, 1, 9, 2)
    return offsets + (grid[None, :, :, None] + taps)


def deform_conv_naive(x: jax.Array, offsets: jax.Array, mask: jax.Array, weight: jax.Array, stride: int) -> jax.Array:
    """The definition, as `deform_conv` without bias: a gather for each corner, of all taps at once."""
    offsets, broken = finite_offsets(offsets)
    positions = sample_positions(offsets, stride)
    first = jnp.floor(positions)
    samples = jnp.zeros((), offsets.dtype)
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        at = [first[..., i].astype(jnp.int32) + corner[i] for i in (0, 1)]
        inside = (at[0] >= 0) & (at[0] < x.shape[1]) & (at[1] >= 0) & (at[1] < x.shape[2])
        share = jnp.where(jnp.array(corner, bool).reshape(1, 1, 1, 1, 2), positions - first, 1 - (positions - first))
        values = jax.vmap(lambda image, row, column: image[row, column])(
            x, jnp.clip(at[0], 0, x.shape[1] - 1), jnp.clip(at[1], 0, x.shape[2] - 1)
        )
        samples = samples + (jnp.where(inside, share.prod(-1), 0) * mask)[..., None] * values
    out = jnp.einsum("bhwkc,kcd->bhwd", samples.astype(x.dtype), weight.reshape(9, *weight.shape[2:]))
    return jnp.where(broken, jnp.nan, out)


class Sampler(NamedTuple):
    """How the samples of one tap are taken; P are the positions of the output, coordinates (B, P, 2) are (y, x).

    Samples are linear in the map: `scatter` is the transpose of `sample`.
    """

    # The maps (B, H, W, C) in the order that suits the sampler; linear.
    prepare: Callable[[jax.Array], jax.Array]
    # Prepared maps, coordinates -> (B, P, C) in the dtype of the coordinates.
    sample: Callable[[jax.Array, jax.Array], jax.Array]
    # A sum of gradients of prepared maps, coordinates, gradients of samples -> the sum with these.
    scatter: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def neighbourhoods(x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, H + 1, W + 1, 4C): at [i, j] the pixels (i - 1, j - 1) .. (i, j), row-major; 0 outside."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([x[:, :-1, :-1], x[:, :-1, 1:], x[:, 1:, :-1], x[:, 1:, 1:]], -1)


def _corners(table: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows and columns (B, P) of the table where the neighbourhoods are, and the weights (B, P, 4) of their pixels."""
    first = jnp.floor(positions)
    down, right = jnp.moveaxis(positions - first, -1, 0)
    place = first.astype(jnp.int32) + 1
    sizes = jnp.array(table.shape[1:3]).reshape(1, 1, 2)
    # Only the index is kept inside of the table. What lies outside weighs nothing.
    inside = ((place >= 0) & (place < sizes)).all(-1, keepdims=True)
    place = jnp.clip(place, 0, sizes - 1)
    weights = jnp.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], -1)
    return place[..., 0], place[..., 1], jnp.where(inside, weights, 0)


def _packed_sample(table: jax.Array, positions: jax.Array) -> jax.Array:
    rows, columns, weights = _corners(table, positions)
    # By vmap, the batch is a batch axis of the gather: images split over devices stay where they are.
    found = jax.vmap(lambda image, row, column: image[row, column])(table, rows, columns)
    corners = jnp.split(found.astype(positions.dtype), 4, axis=-1)
    return sum((weights[..., i, None] * corner for i, corner in enumerate(corners)), jnp.zeros((), positions.dtype))


def _packed_scatter(total: jax.Array, positions: jax.Array, gradients: jax.Array) -> jax.Array:
    rows, columns, weights = _corners(total, positions)
    updates = jnp.concatenate([weights[..., i, None] * gradients for i in range(4)], -1)
    return jax.vmap(lambda image, row, column, update: image.at[row, column].add(update))(total, rows, columns, updates)


def _hat(coordinates: jax.Array, size: int) -> jax.Array:
    """max(0, 1 - |coordinate - i|) for i < size: (B, P) -> (B, P, size)."""
    away = coordinates[..., None] - jnp.arange(size).reshape(1, 1, -1)
    # Written so that the derivative at whole numbers is the one from above.
    return jnp.where((away >= 0) & (away < 1), 1 - away, jnp.where((away >= -1) & (away < 0), 1 + away, 0))


def _hats(x: jax.Array, positions: jax.Array) -> jax.Array:
    """The weight of each pixel of the maps (B, H, W, C) in each sample: (B, P, H, W)."""
    return _hat(positions[..., 0], x.shape[1])[..., None] * _hat(positions[..., 1], x.shape[2])[:, :, None]


# Full precision: by default a TPU rounds the factors of a product to bfloat16.
_matrix_product = functools.partial(jnp.einsum, precision="highest")


def _matrix_sample(x: jax.Array, positions: jax.Array) -> jax.Array:
    return _matrix_product("bphw,bhwc->bpc", _hats(x, positions), x.astype(positions.dtype))


def _matrix_scatter(total: jax.Array, positions: jax.Array, gradients: jax.Array) -> jax.Array:
    return total + _matrix_product("bphw,bpc->bhwc", _hats(total, positions), gradients)


SAMPLERS = {
    "packed": Sampler(neighbourhoods, _packed_sample, _packed_scatter),
    "matrix": Sampler(lambda x: x, _matrix_sample, _matrix_scatter),
}


def _taps(offsets: jax.Array, mask: jax.Array, weight: jax.Array, stride: int) -> tuple[jax.Array, ...]:
    """Coordinates (9, B, P, 2), mask (9, B, P) and kernel (9, C, D): one entry a tap."""
    positions = sample_positions(offsets, stride)
    batch, height, width = mask.shape[:3]
    positions, mask = (jnp.moveaxis(a.reshape(batch, height * width, *a.shape[3:]), 2, 0) for a in (positions, mask))
    return positions, mask.astype(offsets.dtype), weight.reshape(9, *weight.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_taps(
    sampler: Sampler, stride: int, x: jax.Array, offsets: jax.Array, mask: jax.Array, weight: jax.Array
) -> jax.Array:
    """`deform_conv` without bias, the taps one after another; the kernel in the dtype of x."""
    prepared = sampler.prepare(x)
    offsets, broken = finite_offsets(offsets)
    product = functools.partial(jnp.einsum, preferred_element_type=offsets.dtype)

    def add(total: jax.Array, tap: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        positions, factor, kernel = tap
        samples = sampler.sample(prepared, positions) * factor[..., None]
        return total + product("bpc,cd->bpd", samples.astype(x.dtype), kernel), None

    batch, height, width = mask.shape[:3]
    total = constrain(jnp.zeros((batch, height * width, weight.shape[-1]), offsets.dtype))
    total, _ = jax.lax.scan(add, total, _taps(offsets, mask, weight, stride))
    return jnp.where(broken, jnp.nan, total.astype(x.dtype).reshape(batch, height, width, -1))


def _by_taps_forward(
    sampler: Sampler, stride: int, x: jax.Array, offsets: jax.Array, mask: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _by_taps(sampler, stride, x, offsets, mask, weight), (x, offsets, mask, weight)


def _by_taps_backward(
    sampler: Sampler, stride: int, residuals: tuple[jax.Array, ...], gradient: jax.Array
) -> tuple[jax.Array, ...]:
    """Gradients of map, offsets, mask and kernel; sums are in the dtype of the coordinates."""
    x, given, mask, weight = residuals
    prepared = sampler.prepare(x)
    offsets, broken = finite_offsets(given)
    gradient = jnp.where(broken, 0, gradient).reshape(len(gradient), -1, gradient.shape[-1])
    product = functools.partial(jnp.einsum, preferred_element_type=offsets.dtype)

    def add(total: jax.Array, tap: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        positions, factor, kernel = tap
        samples, by_positions = jax.vjp(functools.partial(sampler.sample, prepared), positions)
        by_kernel = product("bpc,bpd->cd", (samples * factor[..., None]).astype(x.dtype), gradient)
        by_masked = product("bpd,cd->bpc", gradient, kernel)
        by_samples = by_masked * factor[..., None]
        total = sampler.scatter(total, positions, by_samples)
        return total, (*by_positions(by_samples), (by_masked * samples).sum(-1), by_kernel)

    total = constrain(jnp.zeros(prepared.shape, offsets.dtype))
    total, (by_offsets, by_mask, by_weight) = jax.lax.scan(add, total, _taps(offsets, mask, weight, stride))
    (by_x,) = jax.linear_transpose(sampler.prepare, jax.ShapeDtypeStruct(x.shape, total.dtype))(total)
    return (
        by_x.astype(x.dtype),
        jnp.moveaxis(by_offsets, 0, 2).reshape(given.shape).astype(given.dtype),
        jnp.moveaxis(by_mask, 0, 2).reshape(mask.shape).astype(mask.dtype),
        by_weight.reshape(weight.shape).astype(weight.dtype),
    )


_by_taps.defvjp(_by_taps_forward, _by_taps_backward)
