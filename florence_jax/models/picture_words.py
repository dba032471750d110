"""A small network that answers questions without any pretraining: convolutions times a bag of words."""

import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from florence_jax.models.base import Model
from florence_jax.models.layers import convolve


@dataclasses.dataclass(frozen=True)
class PictureWordsConfig:
    """Sizes, by default those of easy-VQA's own network (Zhou 2019).

    Attributes:
      answers: to choose from. vocabulary: words. length: of a question, in tokens.
      res: side of the picture in pixels. channels: of each convolution. width: of the rest.
    """

    answers: int
    vocabulary: int
    length: int
    res: int = 64
    channels: tuple[int, ...] = (8, 16, 32)
    width: int = 32


class _PictureWords(nn.Module):
    """See `build_picture_words`."""

    config: PictureWordsConfig

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> dict[str, jax.Array]:
        """Answers; training draws nothing."""
        c, tanh = self.config, jnp.tanh
        dense = functools.partial(nn.Dense, c.width)
        x = batch["image"]
        for i, channels in enumerate(c.channels):
            shape = (3, 3, x.shape[-1], channels)
            bias = self.param(f"bias{i}", nn.initializers.zeros, (channels,))
            x = convolve(x, self.param(f"kernel{i}", nn.initializers.lecun_normal(), shape), 1, 1)
            x = x + bias[None, None, None]
            # Pooled as a maximum over axes, whose gradient XLA's CPU compiler has a fast form of.
            x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, channels).max((2, 4))
        picture = tanh(dense(name="picture")(x.reshape(len(x), -1)))
        words = self.param("words", nn.initializers.normal(c.width**-0.5), (c.vocabulary, c.width))
        real = jnp.arange(c.length)[None, None] < batch["text_length"][..., None]
        # The bag of words times a matrix: the sum of the words' rows.
        bag = jnp.where(real[..., None], words[batch["text"]], 0).sum(2)
        question = tanh(dense(name="question")(tanh(bag)))
        both = tanh(dense(name="both")(question * picture[:, None]))
        return {"answer_logits": nn.Dense(c.answers, name="answers")(both)}


def build_picture_words(config: PictureWordsConfig) -> Model[PictureWordsConfig]:
    """A model of pictures "image" float (B, res, res, 3), about -0.5 to 0.5, with Q questions each.

    The questions are "text" int32 (B, Q, length) and "text_length" int32 (B, Q); it gives "answer_logits" (B, Q,
    answers). As easy-VQA's: 3 x 3 convolutions, each with max pooling by 2 and without another activation, and a bag of
    words in two layers; their product, a layer, the answers.
    """
    of = jax.ShapeDtypeStruct
    inputs = {
        "image": of((1, config.res, config.res, 3), jnp.float32),
        "text": of((1, 1, config.length), jnp.int32),
        "text_length": of((1, 1), jnp.int32),
    }
    return Model(_PictureWords(config), config, inputs)
