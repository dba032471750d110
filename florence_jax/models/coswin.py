"""CoSwin: Swin Transformer blocks with CvT's convolutional token embeddings (Florence, section 2.2).

Blocks follow Liu et al., "Swin Transformer" (arXiv 2103.14030); embeddings follow Wu et al., "CvT" (arXiv
2103.15808): a strided, overlapping convolution with explicit symmetric padding, then LayerNorm. Plain Swin, with its
own patch embedding and patch merging, is the option `embedding='patch'`. Maps are NHWC.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.layers import (
    NORMAL,
    Dtype,
    LayerNorm,
    add_bias,
    attention_core,
    constrain,
    convolve,
    remat_module,
    survival,
)
from florence_jax.models.windows import SIZE_MODES, SwinPair, pad_to_multiple, stage_window

EMBEDDINGS = ("conv", "patch")
STAGE_CONV = ((7, 4, 2), (3, 2, 1))  # kernel, stride, padding of the first and of the later embeddings


def conv_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Side of a convolution's output map: floor((size + 2 * padding - kernel) / stride) + 1."""
    return (size + 2 * padding - kernel) // stride + 1


def embedded_size(size: int, stage: int, embedding: str = "conv") -> int:
    """Side of the map of `stage` from the side of its input (pixels for stage 0); see `CoSwin.embedding`."""
    if embedding == "patch":
        return -(-size // (2 if stage else 4))
    return conv_size(size, *STAGE_CONV[min(stage, 1)])


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

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, jnp.float32, -1, 1) * (self.kernel**2 * x.shape[-1]) ** -0.5

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
        x = pad_to_multiple(x, 2)
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
      size_mode: 'classification' (fixed sizes, final LayerNorm + average pooling) or 'detection' (any size, one
        LayerNorm `norm{i}` per stage in `out_stages`, no pooling).
      mask_padding: detection mode only; keep padded positions out of attention (default: they take part, as in the
        published detectors).
      out_stages: detection mode only; the stages that get a `norm{i}`.
      remat: one of `layers.REMATS`; the unit is a pair of blocks.
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
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, image: jax.Array, train: bool = False, examples: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Encodes images.

        Args:
          image: float (B, H, W, 3), normalised.
          train: apply stochastic depth; needs rng 'drop_path' if `drop_path` > 0.
          examples: int32 (B,), ids by which images draw their stochastic depth; default: positions in the batch.

        Returns:
          'stage{i}': (B, h, w, C_i), each stage's map before any output norm; in classification mode 'pooled'
          float32 (B, C_last); in detection mode 'norm{i}' (B, h, w, C_i) for the stages in `out_stages`.

        Raises:
          UserError: odd depths, unknown size mode or embedding, sizes that do not fit the windows, or no key to draw
            stochastic depth with.
        """
        check_stages(self.width, self.depths, self.heads)
        if self.size_mode not in SIZE_MODES:
            raise UserError(f"size_mode={self.size_mode!r}: choose one of {', '.join(SIZE_MODES)}")
        if self.embedding not in EMBEDDINGS:
            raise UserError(f"embedding={self.embedding!r}: choose one of {', '.join(EMBEDDINGS)}")
        factors = None
        if train and self.drop_path > 0:
            if not self.has_rng("drop_path"):
                raise UserError("training with drop_path > 0 needs rngs={'drop_path': key}")
            rates = np.linspace(0, self.drop_path, sum(self.depths), dtype=np.float32)
            examples = jnp.arange(len(image)) if examples is None else examples
            factors = survival(self.make_rng("drop_path"), rates, examples).reshape(-1, 2, 2, len(image))
        outputs, x = {}, image.astype(self.dtype)
        for i, depth in enumerate(self.depths):
            start = sum(self.depths[:i]) // 2
            x = self._embed(i, x)
            x = self._stage(i, x, None if factors is None else factors[start : start + depth // 2])
            outputs[f"stage{i}"] = x
        if self.size_mode == "detection":
            for i in self.out_stages:
                outputs[f"norm{i}"] = LayerNorm(dtype=self.dtype, name=f"norm{i}")(outputs[f"stage{i}"])
        else:
            outputs["pooled"] = LayerNorm(name="norm")(x).mean((1, 2))
        return outputs

    def _embed(self, stage: int, x: jax.Array) -> jax.Array:
        features, name = self.width * 2**stage, f"stage{stage}_embed"
        if self.embedding == "conv":
            return ConvEmbed(features, *STAGE_CONV[min(stage, 1)], self.dtype, name=name)(x)
        if stage:
            return PatchMerging(features, self.dtype, name=name)(x)
        return ConvEmbed(features, 4, 4, 0, self.dtype, name=name)(pad_to_multiple(x, 4))

    def _stage(self, stage: int, x: jax.Array, factors: jax.Array | None) -> jax.Array:
        pairs = self.depths[stage] // 2
        window, shift = stage_window(x.shape[1], x.shape[2], self.window, self.size_mode)
        scanned = self.scan and pairs > 1
        pair = remat_module(SwinPair, self.remat, scanned=scanned)
        arguments = dict(
            heads=self.heads[stage],
            window=window,
            shift=shift,
            mlp_ratio=self.mlp_ratio,
            mask_padding=self.mask_padding,
            core=attention_core(self.remat),
            dtype=self.dtype,
        )
        if scanned:
            pair = nn.scan(pair, variable_axes={"params": 0}, split_rngs={"params": True}, length=pairs)
            return pair(**arguments, name=f"stage{stage}_pairs")(x, factors)[0]
        for j in range(pairs):
            x = pair(**arguments, name=f"stage{stage}_pair{j}")(x, None if factors is None else factors[j])[0]
        return x
