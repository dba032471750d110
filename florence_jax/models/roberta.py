"""RoBERTa (Liu et al. 2019, arXiv 1907.11692) as an encoder of texts: the text side of METER."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from florence_jax.errors import UserError
from florence_jax.models.cross_attention import CrossLayer, key_bias
from florence_jax.models.dropout import Dropout
from florence_jax.models.flops import block_macs
from florence_jax.models.layers import (
    NORMAL,
    Dtype,
    LayerNorm,
    attention,
    attention_core,
    constrain,
    remat_module,
)

PAD_POSITION = 1  # row of the position embedding that padding has; the first token's is the next
FIRST_DRAW = 1000  # its layers' numbers in `Dropout.layer`: beyond those of a fusion


@dataclasses.dataclass(frozen=True)
class RobertaConfig:
    """Sizes.

    Attributes:
      layers, width, heads, mlp_ratio: of the blocks.
      vocabulary: rows of the token embedding.
      positions: rows of the position embedding; texts have at most two tokens less.
      length: tokens of a text in training, as in METER; for the inputs' shapes and the FLOPs.
      eps: of LayerNorm.
      dropout: rate, of attention weights and of outputs.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4
    vocabulary: int = 50265
    positions: int = 514
    length: int = 50
    eps: float = 1e-5
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "vocabulary", "positions", "length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"roberta {name}={value!r}: must be a whole number above 0")
        if self.width % self.heads:
            raise UserError(f"roberta width={self.width} does not divide by heads={self.heads}")
        self.check_length(self.length)
        if not 0 <= self.dropout < 1:
            raise UserError(f"roberta dropout={self.dropout}: must be in [0, 1)")

    def check_length(self, length: int) -> None:
        """Raises `UserError` for texts of more tokens than there are positions."""
        if length + PAD_POSITION + 1 > self.positions:
            room = self.positions - PAD_POSITION - 1
            raise UserError(f"texts of {length} tokens exceed the {room} places of this RoBERTa: shorten them")


ROBERTAS = {"roberta-base": RobertaConfig(), "roberta-large": RobertaConfig(layers=24, width=1024, heads=16)}


class RobertaLayer(nn.Module):
    """A layer of BERT, in the form that `nn.scan` wants; attributes as `CrossLayer`."""

    heads: int
    mlp_ratio: float = 4
    eps: float = 1e-5
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, number: jax.Array, bias: jax.Array | None, drop: Dropout | None
    ) -> tuple[jax.Array, None]:
        """(B, L, W) -> the same, None."""
        drop = None if drop is None else drop.layer(number)
        layer = CrossLayer(
            self.heads, mlp_ratio=self.mlp_ratio, eps=self.eps, cross=False, core=self.core, dtype=self.dtype
        )
        nn.share_scope(self, layer)
        return layer(x, bias, drop)[0], None


class Roberta(nn.Module):
    """The encoder, without a pooler.

    Attributes:
      config: sizes.
      remat, scan, dtype: as of `TextTransformer`.
    """

    config: RobertaConfig
    remat: str = "none"
    scan: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, lengths: jax.Array | None = None, drop: Dropout | None = None) -> jax.Array:
        """Encodes texts.

        Args:
          ids: int32 (B, L). Positions count from 2 over the tokens before the padding.
          lengths: int32 (B,), tokens before the padding; None: there is none.
          drop: None for none.

        Returns:
          (B, L, W), the last layer's states.

        Raises:
          UserError: texts longer than there are positions.
        """
        c, length = self.config, ids.shape[1]
        c.check_length(length)
        tokens = self.param("token_embedding", NORMAL, (c.vocabulary, c.width))
        positions = self.param("position_embedding", NORMAL, (c.positions, c.width))
        types = self.param("type_embedding", NORMAL, (1, c.width))
        places = jnp.broadcast_to(jnp.arange(length)[None] + PAD_POSITION + 1, ids.shape)
        if lengths is not None:
            places = jnp.where(jnp.arange(length)[None] < lengths[:, None], places, PAD_POSITION)
        x = constrain(jnp.take(tokens, ids, axis=0) + jnp.take(positions, places, axis=0)) + types[None]
        x = LayerNorm(c.eps, self.dtype, name="norm")(x)
        x = x if drop is None else drop.layer(jnp.uint32(FIRST_DRAW))(x)
        return self._layers(x, key_bias(lengths, length), drop)

    def _layers(self, x: jax.Array, bias: jax.Array | None, drop: Dropout | None) -> jax.Array:
        c = self.config
        scanned = self.scan and c.layers > 2
        layer = remat_module(RobertaLayer, self.remat, scanned=scanned)
        arguments = dict(
            heads=c.heads, mlp_ratio=c.mlp_ratio, eps=c.eps, core=attention_core(self.remat), dtype=self.dtype
        )
        numbers = jnp.arange(c.layers, dtype=jnp.uint32) + FIRST_DRAW + 1
        if scanned:
            layer = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=c.layers,
            )
            return layer(**arguments, name="layers")(x, numbers, bias, drop)[0]
        for i in range(c.layers):
            x = layer(**arguments, name=f"layer{i}")(x, numbers[i], bias, drop)[0]
        return x


def resolve_roberta(variant: str, **overrides: Any) -> RobertaConfig:
    """The sizes of a row of `ROBERTAS` with `overrides` applied; None = keep the table's value.

    Raises:
      UserError: an unknown variant or option, sizes that do not fit together.
    """
    if variant not in ROBERTAS:
        raise UserError(f"unknown text encoder {variant!r}: choose one of {', '.join(ROBERTAS)}")
    known = [field.name for field in dataclasses.fields(RobertaConfig)]
    if unknown := sorted(overrides.keys() - set(known)):
        raise UserError(f"unknown option of {variant} {', '.join(unknown)}: known are {', '.join(known)}")
    return dataclasses.replace(ROBERTAS[variant], **{k: v for k, v in overrides.items() if v is not None})


def roberta_flops(config: RobertaConfig) -> float:
    """Floating point operations of one text's forward pass."""
    return 2.0 * config.layers * block_macs(config.length, config.width, config.length, config.mlp_ratio)
