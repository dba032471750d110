"""Dynamic Head (Dai et al. 2021, arXiv 2106.08322): blocks of scale-, spatial- and task-aware attention on a pyramid.

A block makes level l anew from the levels l - 1, l, l + 1 of the block before, with weights shared over the levels:

    A_k = GroupNorm(deformable convolution of level k, at the offsets and masks of level l)    spatial attention
    Z   = mean_k hard_sigmoid(relu(w . average(A_k) + b)) A_k                                  scale attention
    Y   = max(a1 Z + b1, a2 Z + b2) by channel, a and b from average(Z)                        task attention, DyReLU

as in the authors' code. Maps are NHWC, finest first, each half as high and wide as the one before, rounded up.
Everything is told the images' own part of each map, `valid`: averages and GroupNorm are over it alone, maps are 0
outside it, and resizing maps its corners onto each other. So padding changes nothing.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from florence_jax.models.deform_conv import deform_conv
from florence_jax.models.layers import Dense, Dtype, add_bias, constrain, convolve
from florence_jax.models.windows import zero_outside

# How a block reads the coarser level l + 1 with the offsets of level l, which are of twice its size. 'upfirst': the
# level is resized first. 'topleft': the offsets are cut to its size (mmdetection 3). 'flat': their flat array is cut
# and reshaped, what the authors' CUDA kernel does, and so what their weights were trained with.
COARSE_MODES = ("upfirst", "flat", "topleft")
NORM_GROUPS = 16
TAPS = 9
DYRELU_RATIO = 4  # channels over the hidden layer's

Maps = tuple[jax.Array, ...]


def uniform_by_fan_in(gain: float) -> nn.initializers.Initializer:
    """Uniform in +-sqrt(gain / fan_in): gain 1 is PyTorch's default, 3 has variance 1 / fan_in."""
    return nn.initializers.variance_scaling(gain / 3, "fan_in", "uniform")


class Conv(nn.Module):
    """A k x k convolution with bias and padding (k - 1) / 2: (B, H, W, C) -> (B, h, w, features), in `dtype`."""

    features: int
    kernel: int = 3
    stride: int = 1
    kernel_init: nn.initializers.Initializer = uniform_by_fan_in(3)
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, h, w, features)."""
        kernel = self.param("kernel", self.kernel_init, (self.kernel, self.kernel, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, (self.kernel - 1) // 2)
        return checkpoint_name(constrain(add_bias(x, bias)), "dense")


def spatial_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Average of (B, H, W, C) over each image's own positions, `valid` int32 (B, 2): float32 (B, C)."""
    total = zero_outside(x.astype(jnp.float32), valid).sum((1, 2))
    return total / jnp.maximum(valid.prod(1, keepdims=True), 1)


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, valid: jax.Array) -> jax.Array:
    """GroupNorm with 16 groups and eps 1e-5 (Wu & He 2018) over each image's own positions, in float32.

    Args:
      x: (B, H, W, C). scale, bias: (C,).
      valid: int32 (B, 2), the size of each image's own part.

    Returns:
      float32 (B, H, W, C); outside the own part it means nothing.
    """

    def group_mean(x: jax.Array) -> jax.Array:
        means = spatial_mean(x, valid).reshape(len(x), NORM_GROUPS, -1).mean(-1)
        return jnp.repeat(means, x.shape[-1] // NORM_GROUPS, axis=-1)[:, None, None]

    x = x.astype(jnp.float32)
    x = x - group_mean(x)
    x = x * jax.lax.rsqrt(group_mean(jnp.square(x)) + 1e-5)
    return x * scale.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)


def resize_corners(x: jax.Array, size: tuple[int, ...], valid: jax.Array, valid_out: jax.Array) -> jax.Array:
    """Bilinear resizing that maps the corners of each image's own part onto each other.

    PyTorch's interpolate(..., align_corners=True) of each image alone: the factor depends on its own sizes, so it is
    the same however large the map around it.

    Args:
      x: (B, H, W, C).
      size: of the result, (h, w).
      valid, valid_out: int32 (B, 2), the images' own part of `x` and of the result.

    Returns:
      (B, h, w, C) in the dtype of `x`; outside the own part it means nothing.
    """
    # As products with matrices of hat functions: no gather, and so no scatter in the backward pass.
    rows, columns = (
        _interpolation(x.shape[1 + axis], size[axis], valid[:, axis], valid_out[:, axis]).astype(x.dtype)
        for axis in (0, 1)
    )
    return constrain(jnp.einsum("byh,bhwc,bxw->byxc", rows, x, columns))


def _interpolation(size: int, size_out: int, valid: jax.Array, valid_out: jax.Array) -> jax.Array:
    """float32 (B, size_out, size): the weights of linear interpolation between `valid` and `valid_out` places."""
    last, last_out = (jnp.maximum(ends - 1, 0)[:, None].astype(jnp.float32) for ends in (valid, valid_out))
    places = jnp.arange(size_out, dtype=jnp.float32)[None] * last / jnp.maximum(last_out, 1)
    places = jnp.minimum(places, last)[..., None]
    return jnp.maximum(1 - jnp.abs(places - jnp.arange(size, dtype=jnp.float32).reshape(1, 1, -1)), 0)


def cut_flat(field: jax.Array, size: tuple[int, ...], valid: jax.Array, valid_out: jax.Array) -> jax.Array:
    """The first numbers of each image's (K, height, width) array, as (K, h, w): see 'flat' of `COARSE_MODES`.

    Args:
      field: (B, H, W, K); its own part, `valid` int32 (B, 2), is that array.
      size: of the result, (h, w), of which `valid_out` is the own part.

    Returns:
      (B, h, w, K); outside the own part it means nothing.
    """
    (height, width), (rows, columns) = (
        [jnp.maximum(ends[:, axis], 1).reshape(-1, 1, 1, 1) for axis in (0, 1)] for ends in (valid, valid_out)
    )
    y, x, k = jnp.meshgrid(*(jnp.arange(n) for n in (*size, field.shape[-1])), indexing="ij")
    place = (k[None] * rows + y[None]) * columns + x[None]
    channel, rest = jnp.divmod(place, height * width)
    flat = (jnp.floor_divide(rest, width) * field.shape[2] + rest % width) * field.shape[-1] + channel
    values = field.reshape(len(field), -1)
    # By vmap, the batch is a batch axis of the gather: images split over devices stay where they are.
    return jax.vmap(lambda image, index: image[index])(values, jnp.minimum(flat, values.shape[1] - 1))


class GroupNorm(nn.Module):
    """`group_norm` with learned scale and bias; the result has `dtype`."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """(B, H, W, C) -> the same shape in `dtype`; `valid` int32 (B, 2)."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return constrain(group_norm(x, scale, bias, valid).astype(self.dtype))


class DeformNorm(nn.Module):
    """A modulated deformable convolution with bias, then `group_norm`: (B, H, W, C) -> (B, h, w, C), in `dtype`."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, offsets: jax.Array, mask: jax.Array, valid: jax.Array, stride: int = 1
    ) -> jax.Array:
        """See `deform_conv`; `valid` (B, 2) is of the result. `x` is 0 outside the images' own part."""
        channels = x.shape[-1]
        kernel = self.param("kernel", uniform_by_fan_in(1), (3, 3, channels, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = deform_conv(x, offsets, mask, kernel.astype(self.dtype), stride=stride)
        x = checkpoint_name(constrain(add_bias(x, bias)), "dense")
        return GroupNorm(self.dtype, name="norm")(x, valid)


class DyReLU(nn.Module):
    """DyReLU-B with two pieces (Chen et al. 2020, arXiv 2003.10027): its coefficients from the average of its input."""

    @nn.compact
    def __call__(self, x: jax.Array, mean: jax.Array) -> jax.Array:
        """(B, H, W, C), of average `mean` float32 (B, C) -> the same shape and dtype."""
        channels = x.shape[-1]
        dense = functools.partial(Dense, kernel_init=uniform_by_fan_in(1))
        hidden = jax.nn.relu(dense(channels // DYRELU_RATIO, name="fc1")(mean))
        theta = jax.nn.hard_sigmoid(dense(4 * channels, name="fc2")(hidden)) - 0.5
        a1, b1, a2, b2 = jnp.split(theta[:, None, None], 4, axis=-1)
        return jnp.maximum((2 * a1 + 1) * x + b1, 2 * a2 * x + b2).astype(x.dtype)


class DyHeadBlock(nn.Module):
    """One block on all levels.

    Attributes:
      coarse: one of `COARSE_MODES`.
      dtype: compute dtype; offsets, averages, GroupNorm and attention are float32.
    """

    coarse: str = "upfirst"
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Makes the submodules, which all levels share."""
        self.offset = Conv(3 * TAPS, kernel_init=nn.initializers.zeros)
        self.coarser, self.same, self.finer = (DeformNorm(self.dtype) for _ in range(3))
        self.scale_attention = Dense(1, kernel_init=nn.initializers.normal(0.01))
        self.dyrelu = DyReLU()

    def __call__(self, maps: Maps, valids: Maps) -> tuple[Maps, None]:
        """One block.

        Args:
          maps: (B, H, W, C) of each level, finest first, 0 outside the images' own parts.
          valids: int32 (B, 2) of each level, the size of the images' own part.

        Returns:
          maps like the given ones, None: the form `nn.scan` wants.
        """
        return tuple(self._level(maps, valids, level) for level in range(len(maps))), None

    def _level(self, maps: Maps, valids: Maps, level: int) -> jax.Array:
        x, valid = maps[level], valids[level]
        field = self.offset(x)
        offsets, mask = field[..., : 2 * TAPS], jax.nn.sigmoid(field[..., 2 * TAPS :])
        branches = [self.same(x, offsets, mask, valid)]
        if level:
            branches.append(self.finer(maps[level - 1], offsets, mask, valid, stride=2))
        if level + 1 < len(maps):
            branches.append(self._from_coarser(maps[level + 1], offsets, mask, valids[level : level + 2]))
        means = jnp.stack([spatial_mean(branch, valid) for branch in branches], 1)
        gates = jax.nn.hard_sigmoid(jax.nn.relu(self.scale_attention(means))) / len(branches)
        # The average of the sum is the sum of the averages: no other pass over the map.
        mean = (gates * means).sum(1)
        x = functools.reduce(jnp.add, [gates[:, i, None, None] * branch for i, branch in enumerate(branches)])
        return constrain(zero_outside(self.dyrelu(x.astype(self.dtype), mean), valid))

    def _from_coarser(
        self, x: jax.Array, offsets: jax.Array, mask: jax.Array, valids: Sequence[jax.Array]
    ) -> jax.Array:
        """The branch of the coarser level, in the size of this one; `valids` of this level and that."""
        valid, valid_coarse = valids
        size, coarse_size = offsets.shape[1:3], x.shape[1:3]
        if self.coarse == "upfirst":
            x = zero_outside(resize_corners(x, size, valid_coarse, valid), valid)
            return self.coarser(x, offsets, mask, valid)
        if self.coarse == "topleft":
            offsets, mask = (field[:, : coarse_size[0], : coarse_size[1]] for field in (offsets, mask))
        else:
            offsets, mask = (cut_flat(field, coarse_size, valid, valid_coarse) for field in (offsets, mask))
        # Outside its own part the branch is read by no image's own part.
        return resize_corners(self.coarser(x, offsets, mask, valid_coarse), size, valid_coarse, valid)
