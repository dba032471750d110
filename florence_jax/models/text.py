"""The text tower: CLIP's transformer (Radford et al. 2021), with UniCL's options (Yang et al. 2022)."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.layers import (
    ACTIVATIONS,
    NORMAL,
    Dense,
    Dtype,
    LayerNorm,
    Mlp,
    attention,
    attention_core,
    constrain,
    remat_module,
    split_heads,
)

POOLINGS = ("eot", "first", "eos", "mean")


class TextBlock(nn.Module):
    """Pre-norm transformer block: (B, L, W) -> (B, L, W).

    `bias` is the additive float32 attention bias, broadcastable to (B, heads, L, L), of the same rank, or None; `core`
    is `attention` or a form of it. Returns (x, None), the form `nn.scan` wants.
    """

    heads: int
    activation: str = "quick_gelu"
    mlp_ratio: float = 4
    eps: float = 1e-5
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, None]:
        """(B, L, W) -> the same shape, None."""
        norm = functools.partial(LayerNorm, eps=self.eps, dtype=self.dtype)
        # UniCL leaves the fused qkv at PyTorch's Xavier-uniform; everything else is normal(.02).
        qkv = Dense(3 * x.shape[-1], nn.initializers.xavier_uniform(), self.dtype, name="qkv")
        proj = Dense(x.shape[-1], dtype=self.dtype, name="proj")
        q, k, v = split_heads(qkv(norm(name="norm1")(x)), self.heads)
        x = x + proj(self.core(q, k, v, bias))
        mlp = Mlp(round(self.mlp_ratio * x.shape[-1]), self.activation, self.dtype, name="mlp")
        return x + mlp(norm(name="norm2")(x)), None


class TextTransformer(nn.Module):
    """Token ids to one vector per text.

    Attributes:
      vocab_size: rows of the token embedding.
      length: rows of the position embedding; texts may be shorter, never longer.
      width: channels W.
      layers: transformer blocks.
      heads: attention heads.
      causal: each token sees itself and earlier ones (no padding mask, as in CLIP); otherwise all tokens see all
        tokens but padding.
      pooling: 'eot' = state at the largest id (CLIP: its end token is the last of the vocabulary); 'eos' = state at
        the first `eot_id`; both, where lengths are given, at the last token before the padding, which is the end token;
        'first' = state at position 0; 'mean' = average over the tokens that are not padding.
      eps: of LayerNorm; 1e-5 in CLIP, 1e-12 in UniCL's checkpoints.
      activation: 'quick_gelu' (CLIP), 'gelu' or 'gelu_tanh'.
      pad_id, eot_id: the tokenizer's padding and end-of-text ids. Where no lengths are given, `pad_id` is padding.
      remat: one of `layers.REMATS`; the unit is a block.
      scan: scan over the layers if there are more than two (parameters stacked on axis 0 under `layers`); otherwise
        plain modules `layer0`, `layer1`, ...
      dtype: compute dtype; parameters are float32.
    """

    vocab_size: int
    length: int
    width: int
    layers: int
    heads: int
    causal: bool = True
    pooling: str = "eot"
    eps: float = 1e-5
    activation: str = "quick_gelu"
    pad_id: int = 0
    eot_id: int = 49407
    remat: str = "none"
    scan: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, lengths: jax.Array | None = None) -> dict[str, jax.Array]:
        """Encodes texts.

        Args:
          ids: int32 (B, L), L <= `length`.
          lengths: int32 (B,), tokens before the padding. Without it padding is known by its id, which CLIP's
            vocabulary gives to a word as well.

        Returns:
          'tokens': (B, L, W) after the final LayerNorm; 'pooled': float32 (B, W).

        Raises:
          UserError: a text longer than `length`, unknown pooling or activation, or heads that do not divide width.
        """
        self._check(ids.shape[1])
        embedding = self.param("token_embedding", NORMAL, (self.vocab_size, self.width))
        positions = self.param("position_embedding", NORMAL, (self.length, self.width))
        x = constrain(jnp.take(embedding, ids, axis=0)) + positions[None, : ids.shape[1]]
        if lengths is None:
            real = ids != self.pad_id
        else:
            real = jnp.arange(ids.shape[1])[None] < lengths[:, None]
        x = self._blocks(x.astype(self.dtype), self._bias(real))
        x = LayerNorm(eps=self.eps, name="norm")(x)
        return {"tokens": x.astype(self.dtype), "pooled": self._pool(x, ids, real, lengths)}

    def _check(self, length: int) -> None:
        if length > self.length:
            raise UserError(f"texts of {length} tokens exceed text_length={self.length}: shorten them or raise it")
        if self.pooling not in POOLINGS:
            raise UserError(f"text_pooling={self.pooling!r}: choose one of {', '.join(POOLINGS)}")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"text_activation={self.activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if self.width % self.heads:
            raise UserError(f"text_width={self.width} does not divide by text_heads={self.heads}")

    def _bias(self, real: jax.Array) -> jax.Array:
        lowest = np.finfo(np.float32).min  # finite: an all-padding text must not give NaN
        causal = np.tril(np.ones((real.shape[1],) * 2, bool))[None, None]
        return jnp.where(causal if self.causal else real[:, None, None], jnp.float32(0), lowest)

    def _blocks(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        scanned = self.scan and self.layers > 2
        block = remat_module(TextBlock, self.remat, scanned=scanned)
        block_args = dict(
            heads=self.heads,
            activation=self.activation,
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
            return block(**block_args, name="layers")(x, bias)[0]
        for i in range(self.layers):
            x = block(**block_args, name=f"layer{i}")(x, bias)[0]
        return x

    def _pool(self, x: jax.Array, ids: jax.Array, real: jax.Array, lengths: jax.Array | None) -> jax.Array:
        if self.pooling == "mean":
            real = real.astype(x.dtype)
            return jnp.einsum("blw,bl->bw", x, real) / jnp.maximum(real.sum(1, keepdims=True), 1)
        if self.pooling == "first":
            return x[:, 0]
        if lengths is None:
            index = jnp.argmax(ids if self.pooling == "eot" else ids == self.eot_id, axis=1)
        else:
            index = jnp.maximum(lengths - 1, 0)
        return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
