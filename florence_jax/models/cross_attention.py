"""Co-attention of a text and an image: the layers of METER (Dou et al. 2022, arXiv 2111.02387, section 3.2).

Two streams of one width. A layer of a stream is BERT's (Devlin et al. 2019), post-norm, with a cross-attention between
self-attention and MLP; both streams of a layer read the states that the other had before it.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.models.dropout import Dropout
from florence_jax.models.layers import (
    Dense,
    Dtype,
    LayerNorm,
    attention,
    attention_core,
    gelu,
    remat_module,
    split_heads,
)

# Places of a layer that draw dropout, see `dropout.Dropout.at`; the image stream's come after the text stream's.
STREAM_PLACES = 5


def key_bias(lengths: jax.Array | None, keys: int) -> jax.Array | None:
    """Additive bias that hides the keys beyond `lengths`, int32 (B,): float32 (B, 1, 1, keys); None for None."""
    if lengths is None:
        return None
    lowest = np.finfo(np.float32).min  # finite: a text of nothing must not give NaN
    real = jnp.arange(keys)[None] < lengths[:, None]
    return jnp.where(real[:, None, None], jnp.float32(0), lowest)


class PostNormAttention(nn.Module):
    """LN(x + attention(x, context)), with dropout on the weights and on the output; `context` None: of x itself.

    Attributes:
      heads, eps, dtype: as in the towers.
      place: the first of its two places of dropout.
      core: `layers.attention` or a form of it.
    """

    heads: int
    place: int
    eps: float = 1e-12
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None, bias: jax.Array | None, drop: Dropout | None
    ) -> tuple[jax.Array, jax.Array]:
        """Attends.

        Args:
          x: (B, T, W). context: (B, S, W) or None. bias: float32, broadcast against (B, heads, T, S), or None.
          drop: of the layer, or None.

        Returns:
          (B, T, W); and float32 (B, S), the weights of the first query, mean over the heads, without dropout.
        """
        width = x.shape[-1]
        dense = functools.partial(Dense, dtype=self.dtype)
        if context is None:
            q, k, v = split_heads(dense(3 * width, name="qkv")(x), self.heads)
        else:
            shape = (*context.shape[:-1], 2, self.heads, width // self.heads)
            kv = dense(2 * width, name="kv")(context).reshape(shape)
            k, v = kv[..., 0, :, :], kv[..., 1, :, :]
            q = dense(width, name="q")(x).reshape(*x.shape[:-1], self.heads, -1)
            q = q * q.shape[-1] ** -0.5
        out = dense(width, name="output")(self.core(q, k, v, bias, drop and drop.at(self.place)))
        out = out if drop is None else drop.at(self.place + 1)(out)
        return LayerNorm(self.eps, self.dtype, name="norm")(x + out), _first_weights(q, k, bias)


def _first_weights(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
    """float32 (B, S): where the first query looks."""
    q, k = jax.lax.stop_gradient((q, k))
    logits = jnp.einsum("bhd,bkhd->bhk", q[:, 0], k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias[:, :, 0]
    return jax.nn.softmax(logits, axis=-1).mean(1)


class CrossLayer(nn.Module):
    """A layer of one stream: self-attention, cross-attention, MLP; after each the sum and a LayerNorm.

    `cross` False leaves the cross-attention out: a layer of BERT and RoBERTa. Attributes as `PostNormAttention`.
    """

    heads: int
    place: int = 0
    mlp_ratio: float = 4
    eps: float = 1e-12
    cross: bool = True
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        drop: Dropout | None,
        context: jax.Array | None = None,
        context_bias: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """One layer.

        Args:
          x: (B, T, W), the stream. bias: hides its padding. drop: of the layer.
          context: (B, S, W), the other stream. context_bias: hides its padding.

        Returns:
          (B, T, W); and float32 (B, S), where its first token looks in the other stream (without `cross`: in its own).
        """
        attend = functools.partial(PostNormAttention, self.heads, eps=self.eps, core=self.core, dtype=self.dtype)
        dense = functools.partial(Dense, dtype=self.dtype)
        x, look = attend(place=self.place, name="self_attention")(x, None, bias, drop)
        if self.cross:
            x, look = attend(place=self.place + 2, name="cross_attention")(x, context, context_bias, drop)
        hidden = gelu(dense(round(self.mlp_ratio * x.shape[-1]), name="fc1")(x))
        out = dense(x.shape[-1], name="fc2")(hidden)
        out = out if drop is None else drop.at(self.place + 4)(out)
        return LayerNorm(self.eps, self.dtype, name="norm")(x + out), look


class CoAttentionLayer(nn.Module):
    """A layer of both streams, in the form that `nn.scan` wants."""

    heads: int
    mlp_ratio: float = 4
    core: Callable[..., jax.Array] = attention
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, streams: tuple[jax.Array, jax.Array], number: jax.Array, bias: jax.Array | None, drop: Dropout | None
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """Text (B, L, W) and image (B, T, W) -> the same; and float32 (B, T), where the first token looks."""
        layer = functools.partial(CrossLayer, self.heads, mlp_ratio=self.mlp_ratio, core=self.core, dtype=self.dtype)
        drop = None if drop is None else drop.layer(number)
        text, image = streams
        fused_text, look = layer(name="text")(text, bias, drop, image)
        fused_image, _ = layer(place=STREAM_PLACES, name="image")(image, None, drop, text, bias)
        return (fused_text, fused_image), look


class CoAttention(nn.Module):
    """The stack of layers.

    Attributes:
      layers, heads, mlp_ratio: sizes.
      remat: one of `layers.REMATS`; the unit is a layer of both streams.
      scan: scan over the layers if there are more than two (parameters stacked on axis 0 under `layers`); otherwise
        plain modules `layer0`, `layer1`, ...
      dtype: compute dtype.
    """

    layers: int
    heads: int
    mlp_ratio: float = 4
    remat: str = "none"
    scan: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, text: jax.Array, image: jax.Array, lengths: jax.Array | None = None, drop: Dropout | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Fuses.

        Args:
          text: (B, L, W). image: (B, T, W). lengths: int32 (B,), words before the padding; None: there is none.
          drop: None for none.

        Returns:
          Both streams, and float32 (B, T): where the first token looks in the last layer, mean over the heads.
        """
        bias = key_bias(lengths, text.shape[1])
        scanned = self.scan and self.layers > 2
        layer = remat_module(CoAttentionLayer, self.remat, scanned=scanned)
        arguments = dict(heads=self.heads, mlp_ratio=self.mlp_ratio, core=attention_core(self.remat), dtype=self.dtype)
        numbers = jnp.arange(self.layers, dtype=jnp.uint32)
        if scanned:
            layer = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=self.layers,
            )
            (text, image), looks = layer(**arguments, name="layers")((text, image), numbers, bias, drop)
            return text, image, looks[-1]
        look = jnp.zeros(image.shape[:2])
        for i in range(self.layers):
            (text, image), look = layer(**arguments, name=f"layer{i}")((text, image), numbers[i], bias, drop)
        return text, image, look
