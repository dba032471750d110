"""CoSwin: Swin Transformer blocks with CvT's convolutional token embeddings (Florence, section 2.2).

Blocks follow Liu et al., "Swin Transformer" (arXiv 2103.14030); embeddings follow Wu et al., "CvT" (arXiv
2103.15808): a strided, overlapping convolution with explicit symmetric padding, then LayerNorm. Plain Swin, with its
own patch embedding and patch merging, is the option `embedding='patch'`. Maps are NHWC.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from florence_jax.errors import UserError
from florence_jax.models.layers import (
    NORMAL,
    Dtype,
    LayerNorm,
    add_bias,
    at_least_float32,
    constrain,
    convolve,
)
from florence_jax.models.windows import (
    SIZE_MODES,
    pad_to_multiple,
    path_factors,
    run_pairs,
    stage_window,
    zero_outside,
)

EMBEDDINGS = ("conv", "patch")
STAGE_CONV = ((7, 4, 2), (3, 2, 1))  # kernel, stride, padding of the first and of the later embeddings

Size = TypeVar("Size", int, jax.Array)


def conv_size(size: Size, kernel: int, stride: int, padding: int) -> Size:
    """Side of a convolution's output map: floor((size + 2 * padding - kernel) / stride) + 1."""
    return (size + 2 * padding - kernel) // stride + 1


def embedded_size(size: Size, stage: int, embedding: str = "conv") -> Size:
    """Side of the map of `stage` from the side of its input (pixels for stage 0); see `CoSwin.embedding`."""
    if embedding == "patch":
        return -(-size // (2 if stage else 4))
    return conv_size(size, *STAGE_CONV[min(stage, 1)])


def fan_in_uniform(fan_in: int) -> Callable[..., jax.Array]:
    """Initialiser U(+-1/sqrt(fan_in)), PyTorch's default of convolutions: (key, shape) -> float32."""

    def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, shape, jnp.float32, -1, 1) * fan_in**-0.5

    return uniform


class ConvEmbed(nn.Module):
    """Convolutional token embedding: convolution with bias, then LayerNorm; (B, H, W, C) -> (B, h, w, features).

    `conv_size` gives h and w. Padding is explicit because XLA's 'SAME' pads a
    7x7 stride-4 kernel unevenly. Kernel and bias start as U(+-1/sqrt(fan_in)), PyTorch's default.
    """

    features: int
    kernel: int
    stride: int
    padding: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, h, w, features)."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        uniform = fan_in_uniform(math.prod(shape[:-1]))
        kernel = self.param("kernel", uniform, shape).astype(self.dtype)
        bias = self.param("bias", uniform, (self.features,))
        x = constrain(add_bias(convolve(x, kernel, self.stride, self.padding), bias))
        return LayerNorm(dtype=self.dtype, name="norm")(x)


class PatchMerging(nn.Module):
    """Swin's downsampling: 2x2 tokens side by side (4C), LayerNorm, linear to `features` without bias.

    The four are ordered (row, column) = (0, 0), (1, 0), (0, 1), (1, 1). An odd map is padded with zeros.
    """

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), features)."""
        x = pad_to_multiple(x, (2, 2))
        x = jnp.concatenate([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], axis=-1)
        x = LayerNorm(dtype=self.dtype, name="norm")(x)
        reduction = nn.Dense(self.features, use_bias=False, dtype=self.dtype, kernel_init=NORMAL, name="reduction")
        return constrain(reduction(x))


def check_stages(width: int, depths: Sequence[int], heads: Sequence[int]) -> None:
    """Checks that the stages fit together.

    Raises:
      UserError: an odd depth, a stage without its number of heads, or heads that do not divide the channels.
    """
    if any(depth % 2 or depth < 2 for depth in depths):
        raise UserError(f"depths={depths}: every stage needs an even number of blocks, at least 2")
    if len(heads) != len(depths):
        raise UserError(f"heads={heads} and depths={depths} must have one entry per stage")
    for i, count in enumerate(heads):
        if width * 2**i % count:
            raise UserError(f"heads={heads}: {count} heads do not divide the {width * 2**i} channels of stage {i}")


class CoSwin(nn.Module):
    """The image tower.

    Attributes:
      width: channels C of the first stage; stage i has C * 2**i.
      depths: blocks per stage, all even (a block and its shifted partner).
      heads: attention heads per stage.
      window: side of the attention window, in tokens.
      embedding: 'conv' (Florence: overlapping convolutions of CvT) or 'patch' (Swin: 4x4 patches, then patch merging;
        sizes that do not divide are padded with zeros at the bottom and right, as in Swin's detectors).
      mlp_ratio: hidden width of the MLPs over the channels.
      drop_path: stochastic depth rate of the last block; it grows linearly from 0 at the first block.
      size_mode: 'classification' (fixed sizes) or 'detection' (any size, and one more LayerNorm `norm{i}` for each
        stage in `out_stages`).
      mask_padding: detection mode only; keep padded positions out of attention and of the next embedding, so that
        they change nothing (default: they take part, as in the published detectors).
      out_stages: detection mode only; the stages that get a `norm{i}`.
      remat: one of `layers.REMATS`; the unit is a pair of blocks.
      attention: one of `window_attention.ATTENTIONS`: as XLA has it, or by a kernel where that fits.
      scan: scan over the pairs of a stage that has several (parameters stacked on axis 0 under `pairs`); otherwise,
        and for a single pair, plain modules `pair0`, `pair1`, ...
      dtype: compute dtype; parameters are float32.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    embedding: str = "conv"
    mlp_ratio: float = 4
    drop_path: float = 0.0
    size_mode: str = "classification"
    mask_padding: bool = False
    out_stages: tuple[int, ...] = (0, 1, 2, 3)
    remat: str = "none"
    scan: bool = True
    attention: str = "xla"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        train: bool = False,
        examples: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Encodes images.

        Args:
          image: float (B, H, W, 3), normalised.
          train: apply stochastic depth; needs rng 'drop_path' if `drop_path` > 0.
          examples: int32 (B,), ids by which images draw their stochastic depth; default: positions in the batch.
          valid: int32 (B, 2), height and width in pixels of each image inside a padded batch, detection mode only;
            pixels beyond them count as zeros. Default: all of it.

        Returns:
          'stage{i}': (B, h, w, C_i), each stage's map before any output norm; 'tokens' (B, h * w, C_last), the last one
          after its LayerNorm `norm`; 'pooled' float32 (B, C_last), their average, without padding; in detection mode
          'norm{i}' (B, h, w, C_i) for the stages in `out_stages`, and with `valid` 'valid{i}' int32 (B, 2), the sizes
          of the images' own parts of 'stage{i}'.

        Raises:
          UserError: odd depths, unknown size mode or embedding, sizes that do not fit the windows, `valid` in
            classification mode, or no key to draw stochastic depth with.
        """
        self._check(valid)
        factors = path_factors(self, self.drop_path, self.depths, train, len(image), examples)
        outputs, x = {}, image.astype(self.dtype)
        if valid is not None:
            x = zero_outside(x, valid)
        for i, depth in enumerate(self.depths):
            start = sum(self.depths[:i]) // 2
            if i and valid is not None and self.mask_padding:
                x = zero_outside(x, valid)
            x = self._embed(i, x)
            if valid is not None:
                outputs[f"valid{i}"] = valid = embedded_size(valid, i, self.embedding)
            x = self._stage(i, x, None if factors is None else factors[start : start + depth // 2], valid)
            outputs[f"stage{i}"] = x
        if self.size_mode == "detection":
            for i in self.out_stages:
                outputs[f"norm{i}"] = LayerNorm(dtype=self.dtype, name=f"norm{i}")(outputs[f"stage{i}"])
        x = LayerNorm(dtype=at_least_float32(x.dtype), name="norm")(x)
        if valid is None:
            outputs["pooled"] = x.mean((1, 2))
        else:
            outputs["pooled"] = zero_outside(x, valid).sum((1, 2)) / jnp.maximum(valid.prod(1, keepdims=True), 1)
        outputs["tokens"] = x.astype(self.dtype).reshape(len(x), -1, x.shape[-1])
        return outputs

    def _check(self, valid: jax.Array | None) -> None:
        check_stages(self.width, self.depths, self.heads)
        if self.size_mode not in SIZE_MODES:
            raise UserError(f"size_mode={self.size_mode!r}: choose one of {', '.join(SIZE_MODES)}")
        if self.embedding not in EMBEDDINGS:
            raise UserError(f"embedding={self.embedding!r}: choose one of {', '.join(EMBEDDINGS)}")
        if valid is not None and self.size_mode != "detection":
            raise UserError("images padded to a common size need size_mode='detection'")

    def _embed(self, stage: int, x: jax.Array) -> jax.Array:
        features, name = self.width * 2**stage, f"stage{stage}_embed"
        if self.embedding == "conv":
            return ConvEmbed(features, *STAGE_CONV[min(stage, 1)], self.dtype, name=name)(x)
        if stage:
            return PatchMerging(features, self.dtype, name=name)(x)
        return ConvEmbed(features, 4, 4, 0, self.dtype, name=name)(pad_to_multiple(x, (4, 4)))

    def _stage(self, stage: int, x: jax.Array, factors: jax.Array | None, valid: jax.Array | None) -> jax.Array:
        window, shift = stage_window(x.shape[1], x.shape[2], self.window, self.size_mode)
        return run_pairs(
            stage,
            self.depths[stage] // 2,
            x,
            factors,
            valid,
            remat=self.remat,
            scan=self.scan,
            heads=self.heads[stage],
            window=(window,) * 2,
            shift=(shift,) * 2,
            mlp_ratio=self.mlp_ratio,
            mask_padding=self.mask_padding,
            form=self.attention,
            dtype=self.dtype,
        )
