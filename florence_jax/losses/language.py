"""Losses of vision and language: masked words, match, answers, classes.

Each gives sums over the examples it is given, which of micro-batches add up: over the global batch, on any number of
devices, the loss is `LossSums.mean`. All in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossSums(NamedTuple):
    """float32 scalars.

    Attributes:
      loss: sum of the losses. right: sum of what was right, of answers their soft scores. number: how many there were.
    """

    loss: jax.Array
    right: jax.Array
    number: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The loss: the mean; 0 of nothing."""
        return self.loss / jnp.maximum(self.number, 1)

    @property
    def accuracy(self) -> jax.Array:
        """Share of what was right; 0 of nothing."""
        return self.right / jnp.maximum(self.number, 1)


def masked_word_loss(logits: jax.Array, targets: jax.Array) -> LossSums:
    """Cross entropy of the words behind the masks (Devlin et al. 2019).

    Args:
      logits: (N, P, V), at the places where something may be masked.
      targets: int (N, P), the words; -1 where nothing is, which costs nothing.
    """
    logits, real = logits.astype(jnp.float32), targets >= 0
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses = jnp.where(real, jax.nn.logsumexp(logits, axis=-1) - picked, 0)
    right = real & (logits.argmax(-1) == targets)
    return LossSums(losses.sum(), right.sum(dtype=jnp.float32), real.sum(dtype=jnp.float32))


def class_loss(logits: jax.Array, labels: jax.Array) -> LossSums:
    """Cross entropy of classes: logits (N, K), labels int (N,), below 0 for an example that does not count.

    Of NLVR2 (2 classes), SNLI-VE (3), and ranking: K scores of one query, the label the place of the true one.
    """
    return masked_word_loss(logits[:, None], labels[:, None])


def match_loss(logits: jax.Array, match: jax.Array) -> LossSums:
    """Cross entropy of whether image and text belong together: logits (N, 2), match bool or int (N,), 1 = they do."""
    return class_loss(logits, match.astype(jnp.int32))


def answer_loss(logits: jax.Array, labels: jax.Array, scores: jax.Array, asked: jax.Array | None = None) -> LossSums:
    """Binary cross entropy of soft scores, summed over the answers (METER, Dou et al. 2022).

    With x the logits and t the scores of all answers it is sum_a softplus(x_a) - t_a x_a, and t is 0 but for a few: no
    (N, A) targets are made.

    Args:
      logits: (N, A).
      labels: int (N, K), different answers, padded with -1.
      scores: float (N, K), of those answers, in [0, 1].
      asked: bool (N,), rows that are questions and no padding; None: all.

    Returns:
      `right` is the score of the answers with the largest logit; `number` is of the questions.
    """
    logits = logits.astype(jnp.float32)
    real = jnp.ones(len(logits), bool) if asked is None else asked
    scores = jnp.where(labels >= 0, scores, 0).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0), axis=1)
    loss = jax.nn.softplus(logits).sum(1) - (scores * picked).sum(1)
    right = jnp.where(labels == logits.argmax(1, keepdims=True), scores, 0).sum(1)
    return LossSums(jnp.where(real, loss, 0).sum(), jnp.where(real, right, 0).sum(), real.sum(dtype=jnp.float32))
