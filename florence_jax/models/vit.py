"""The Vision Transformer as CLIP uses it: the image tower of OpenAI's and OpenCLIP's public weights.

Dosovitskiy et al. (arXiv 2010.11929) with CLIP's changes (Radford et al. 2021): no bias in the patch convolution, a
LayerNorm before the first block, and the class token's state after a last LayerNorm as the image's feature.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from florence_jax.errors import UserError
from florence_jax.models.layers import Dtype, LayerNorm, attention_core, constrain, convolve, remat_module
from florence_jax.models.text import TextBlock


class PatchConv(nn.Module):
    """Non-overlapping patches, linear without bias: (B, H, W, C) -> (B, H / side, W / side, features)."""

    features: int
    side: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H / side, W / side, features)."""
        shape = (self.side, self.side, x.shape[-1], self.features)

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:  # PyTorch's default for convolutions
            return jax.random.uniform(key, shape, jnp.float32, -1, 1) * (self.side**2 * x.shape[-1]) ** -0.5

        kernel = self.param("kernel", uniform, shape).astype(self.dtype)
        return constrain(convolve(x, kernel, self.side, 0))


class ViT(nn.Module):
    """The image tower.

    Attributes:
      width: channels W.
      layers: transformer blocks.
      heads: attention heads.
      patch_size: side of the square patches, in pixels.
      res: side of the square image; fixes the number of position embeddings.
      mlp_ratio: hidden width of the MLPs over W.
      activation: 'quick_gelu' (OpenAI's weights), 'gelu' (most of OpenCLIP's) or 'gelu_tanh'.
      eps: of LayerNorm; 1e-5 in CLIP.
      remat: one of `layers.REMATS`; the unit is a block.
      scan: scan over the layers if there are more than two (parameters stacked on axis 0 under `layers`); otherwise
        plain modules `layer0`, `layer1`, ...
      dtype: compute dtype; parameters are float32.
    """

    width: int
    layers: int
    heads: int
    patch_size: int
    res: int
    mlp_ratio: float = 4
    activation: str = "quick_gelu"
    eps: float = 1e-5
    remat: str = "none"
    scan: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, image: jax.Array, train: bool = False, examples: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Encodes images.

        Args:
          image: float (B, res, res, 3), normalised.
          train, examples: ignored; the tower has no stochastic depth.

        Returns:
          'stage0': (B, h, w, W), the patches' states after the last block; 'tokens' (B, h * w, W), the same after the
          last LayerNorm; 'pooled': float32 (B, W), the class token's after it.

        Raises:
          UserError: an image of another size than `res`, or a `res` that does not divide by the patch size.
        """
        del train, examples
        check_patches(self.res, self.patch_size)
        if image.shape[1:3] != (self.res, self.res):
            raise UserError(
                f"images of {image.shape[1]}x{image.shape[2]} pixels: this ViT was built for res={self.res}"
            )
        x = PatchConv(self.width, self.patch_size, self.dtype, name="patch_embed")(image.astype(self.dtype))
        batch, side = x.shape[0], x.shape[1]
        init = nn.initializers.normal(self.width**-0.5)
        token = self.param("class_embedding", init, (self.width,)).astype(self.dtype)
        positions = self.param("position_embedding", init, (1 + side**2, self.width)).astype(self.dtype)
        token = jnp.broadcast_to(token[None, None], (batch, 1, self.width))
        x = jnp.concatenate([token, x.reshape(batch, side**2, self.width)], axis=1) + positions[None]
        x = self._blocks(LayerNorm(self.eps, self.dtype, name="norm_pre")(x))
        norm = LayerNorm(self.eps, name="norm")
        patches = x[:, 1:]
        return {
            "stage0": patches.reshape(batch, side, side, self.width),
            "tokens": norm(patches).astype(self.dtype),
            "pooled": norm(x[:, 0]),
        }

    def _blocks(self, x: jax.Array) -> jax.Array:
        scanned = self.scan and self.layers > 2
        block = remat_module(TextBlock, self.remat, scanned=scanned)
        block_args = dict(
            heads=self.heads,
            activation=self.activation,
            mlp_ratio=self.mlp_ratio,
            eps=self.eps,
            core=attention_core(self.remat),
            dtype=self.dtype,
        )
        if scanned:
            block = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.layers,
            )
            return block(**block_args, name="layers")(x, None)[0]
        for i in range(self.layers):
            x = block(**block_args, name=f"layer{i}")(x, None)[0]
        return x


def check_patches(res: int, patch_size: int) -> None:
    """Raises `UserError` unless `res` divides by `patch_size`."""
    if patch_size < 1 or res < 1 or res % patch_size:
        raise UserError(f"res={res} does not divide by patch_size={patch_size}: choose a multiple of it")
