"""Florence's two towers, their projections and the temperature."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from florence_jax.errors import UserError
from florence_jax.models.base import Model
from florence_jax.models.coswin import CoSwin
from florence_jax.models.flops import forward_flops
from florence_jax.models.layers import NORMAL, LayerNorm, constrain, unit_norm
from florence_jax.models.sizes import ModelConfig, resolve_config
from florence_jax.models.text import TextTransformer
from florence_jax.models.vit import ViT


class _Projection(nn.Module):
    """(B, C) -> unit vectors (B, features), float32; no bias (UniCL)."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", NORMAL, (x.shape[-1], self.features))
        product = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        return constrain(unit_norm(product))


class TwoTowers(nn.Module):
    """Florence's module; see `build` for its inputs and outputs.

    An adapter that runs on these towers is a subclass, so that its parameters lie beside theirs: its `setup` calls this
    one and adds its own, its `__call__` adds to these outputs.
    """

    config: ModelConfig

    def setup(self) -> None:
        """Makes the submodules, by the names of their parameters."""
        c = self.config
        common: dict[str, Any] = dict(dtype=jnp.dtype(c.dtype), remat=c.remat, scan=c.scan)
        if c.image_tower == "vit":
            self.image: nn.Module = ViT(
                width=c.image_width, layers=c.depths[0], heads=c.heads[0], patch_size=c.patch_size, res=c.res,
                mlp_ratio=c.mlp_ratio, activation=c.image_activation, eps=c.image_eps, **common,
            )  # fmt: skip
        else:
            self.image = CoSwin(
                width=c.image_width, depths=c.depths, heads=c.heads, window=c.window, embedding=c.embedding,
                mlp_ratio=c.mlp_ratio, drop_path=c.drop_path, size_mode=c.size_mode, mask_padding=c.mask_padding,
                out_stages=c.out_stages, attention=c.attention, **common,
            )  # fmt: skip
        self.text = TextTransformer(
            vocab_size=c.vocab_size, length=c.text_length, width=c.text_width, layers=c.text_layers, heads=c.text_heads,
            causal=c.text_causal, pooling=c.text_pooling, eps=c.text_eps, activation=c.text_activation,
            pad_id=c.text_pad_id, eot_id=c.text_eot_id, **common,
        )  # fmt: skip
        self.image_projection = _Projection(c.projection, common["dtype"])
        self.text_projection = _Projection(c.projection, common["dtype"])
        if self._has("logit_scale"):
            self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(c.logit_scale_init)), ())
        if c.logit_bias and self._has("logit_bias"):
            self.logit_bias = self.param("logit_bias", nn.initializers.zeros, ())

    def _has(self, name: str) -> bool:
        """False for what parameters of an image tower alone lack."""
        return self.is_initializing() or self.has_variable("params", name)

    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> dict[str, jax.Array]:
        """Encodes what the batch holds."""
        for needed, given in (("image", "image_valid"), ("text", "text_length")):
            if given in batch and needed not in batch:
                raise UserError(f"the batch holds {given} without {needed}")
            if needed in batch and not self._has(needed):
                raise UserError(f"the weights hold no {needed} tower, which the batch needs")
        outputs = {}
        if self._has("logit_scale"):
            outputs["logit_scale"] = jnp.exp(self.logit_scale.astype(jnp.float32))
        if self.config.logit_bias and self._has("logit_bias"):
            outputs["logit_bias"] = self.logit_bias.astype(jnp.float32)
        if "image" in batch:
            valid = {"valid": batch["image_valid"]} if "image_valid" in batch else {}
            image = self.image(batch["image"], train, batch.get("example"), **valid)
            outputs |= {f"image/{name}": value for name, value in image.items()}
            if self._has("image_projection"):
                outputs["image/embedding"] = self.image_projection(image["pooled"])
        if "text" in batch:
            text = self.text(batch["text"], batch.get("text_length"))
            outputs |= {f"text/{name}": value for name, value in text.items()}
            outputs["text/embedding"] = self.text_projection(text["pooled"])
        return outputs


def embed_maps(config: ModelConfig, params: Mapping[str, Any], maps: jax.Array) -> jax.Array:
    """Unit vectors of the joint space, float32 (N, D), as the image tower ends: norm, mean over places, projection.

    Args:
      config, params: of the towers.
      maps: (N, h, w, C), parts of the map of the last stage.
    """
    norm: Any = LayerNorm()
    projection: Any = _Projection(config.projection, jnp.dtype(config.dtype))
    normed = norm.apply({"params": params["image"]["norm"]}, maps)
    return projection.apply({"params": params["image_projection"]}, normed.mean((1, 2)))


def tower_inputs(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs of the two towers, of one example; each is optional."""
    inputs = {
        "image": jax.ShapeDtypeStruct((1, config.res, config.res, 3), jnp.float32),
        "example": jax.ShapeDtypeStruct((1,), jnp.int32),
        "text": jax.ShapeDtypeStruct((1, config.text_length), jnp.int32),
        "text_length": jax.ShapeDtypeStruct((1,), jnp.int32),
    }
    if config.size_mode == "detection":
        inputs["image_valid"] = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return inputs


def _model(config: ModelConfig) -> Model[ModelConfig]:
    inputs = tower_inputs(config)
    return Model(TwoTowers(config), config, inputs, optional=tuple(inputs), flops=forward_flops(config))


def build(variant: str, **overrides: Any) -> Model[ModelConfig]:
    """Builds a model from the variants table: {"image", "text", "image_projection", "text_projection", "logit_scale"}.

    With the option logit_bias also "logit_bias".

    Its inputs, each optional: "image" float (B, H, W, 3), already normalised; "example" int32 (B,), ids by which images
    draw their stochastic depth, default: positions in the batch; in detection mode "image_valid" int32 (B, 2), height
    and width in pixels of each image inside a padded batch; "text" int32 (B, L); "text_length" int32 (B,), its tokens
    before the padding. Training with drop_path > 0 needs rngs={'drop_path': key}.

    Its outputs, of the towers whose input the batch holds: 'image/stage{i}' (B, h, w, C_i), 'image/tokens' (B, h * w,
    C), the last stage after its LayerNorm, 'image/pooled' (B, C) float32, 'image/embedding' (B, D) float32 of unit
    norm (see `CoSwin` for more in detection mode); 'text/tokens' (B, L, W), 'text/pooled', 'text/embedding' likewise;
    'logit_scale' float32 scalar, the factor of the logits (= exp of the parameter), and 'logit_bias' where there is
    one. A ViT has one stage, its patches.
    The parameters {"image"} alone give neither 'image/embedding' nor 'logit_scale'.

    Args:
      variant: a key of `VARIANTS`.
      **overrides: any field of `ModelConfig` but `variant`; None = keep the table's value. Unless given, `window`
        follows `res`, and `heads` follows `image_width` (32 channels a head).

    Raises:
      UserError: unknown variant, option or choice (the message lists the known ones), a value of another type, sizes
        that do not fit together.
    """
    return _model(resolve_config(variant, **overrides))


@functools.cache
def _count(config: ModelConfig) -> dict[str, int]:
    shapes = jax.eval_shape(_model(config).init, jax.random.key(0))
    return {name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()}


def parameter_count(variant: str, **overrides: Any) -> dict[str, int]:
    """Parameters by top-level entry (image, text, image_projection, text_projection, logit_scale) and 'total'.

    Nothing is allocated. Arguments and errors as `build`.
    """
    counts = _count(resolve_config(variant, **overrides))
    return {**counts, "total": sum(counts.values())}
