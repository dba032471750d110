"""Adapting to one few-shot episode: a linear head, alone on cached features or together with the backbone.

Florence (section 3.5) trains for 100 epochs with SGD: learning rate 1e-2 and momentum 0.99 for the head, 2e-4 and 0.9
for the backbone (printed there in the other order), dropout 0.5 before the head, horizontal flips in training and in
testing. The batch of 4 is that of the benchmark's own fine-tuning script; the paper does not give one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from florence_jax.errors import UserError

Embed = Callable[[Any, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an episode is trained.

    Attributes:
      epochs: over the support set. batch: examples a step.
      head_rate, head_momentum, backbone_rate, backbone_momentum: of SGD, constant.
      dropout: share of the features set to 0 before the head.

    Raises:
      UserError: for a number out of range.
    """

    epochs: int = 100
    batch: int = 4
    head_rate: float = 1e-2
    head_momentum: float = 0.99
    backbone_rate: float = 2e-4
    backbone_momentum: float = 0.9
    dropout: float = 0.5

    def __post_init__(self):
        if self.epochs < 1 or self.batch < 1:
            raise UserError(f"few-shot recipe: epochs={self.epochs} and batch={self.batch} must be positive")
        for name in ("head_momentum", "backbone_momentum", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"few-shot recipe: {name}={getattr(self, name)} must be from 0 to below 1")
        if min(self.head_rate, self.backbone_rate) < 0:
            raise UserError("few-shot recipe: learning rates must not be negative")


def embed_cached(params: Any, pairs: jax.Array, flipped: jax.Array) -> jax.Array:
    """(B, 2, D) features of images and of their mirror images -> (B, D), the second where `flipped` (B,)."""
    del params  # nothing is trained below the head
    return jnp.where(flipped[:, None], pairs[:, 1], pairs[:, 0])


def embed_images(features: Callable[[Any, dict[str, jax.Array]], jax.Array]) -> Embed:
    """(params, uint8 (B, H, W, 3), bool (B,)) -> (B, D) features of the images, mirrored where flipped."""

    def embed(params: Any, images: jax.Array, flipped: jax.Array) -> jax.Array:
        return features(params, {"image": jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)})

    return embed


def adapt_and_classify(
    embed: Embed, backbone: Any, support: jax.Array, query: jax.Array, key: jax.Array, recipe: Recipe, ways: int
) -> jax.Array:
    """Trains on an episode's support set and scores its queries.

    Args:
      embed: (backbone, inputs, flipped) -> features.
      backbone: parameters to train along, or None.
      support: (ways * shots, ...) inputs, class by class. query: (Q, ...) inputs.
      key: of the order, the flips and the dropout.
      recipe, ways: of the episode.

    Returns:
      float32 (Q, ways): scores, the mean of those of each query and of its mirror image.
    """
    size = len(support)
    labels = jnp.repeat(jnp.arange(ways), size // ways)
    steps = -(-size // recipe.batch)
    unflipped = jnp.zeros(len(query), bool)
    width = jax.eval_shape(embed, backbone, query, unflipped).shape[1]
    head = {"weights": jnp.zeros((width, ways)), "bias": jnp.zeros(ways)}
    params = {"head": head, "backbone": backbone}

    def loss(params: Any, rows: jax.Array, present: jax.Array, key: jax.Array) -> jax.Array:
        flip_key, drop_key = jax.random.split(key)
        features = embed(params["backbone"], support[rows], jax.random.bernoulli(flip_key, 0.5, rows.shape))
        keep = jax.random.bernoulli(drop_key, 1 - recipe.dropout, features.shape)
        features = jnp.where(keep, features / (1 - recipe.dropout), 0)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(_scores(params, features)), labels[rows][:, None], 1)[:, 0]
        return -(present * chosen).sum() / present.sum()

    def step(carry: tuple[Any, Any], inputs: tuple[jax.Array, ...]) -> tuple[tuple[Any, Any], None]:
        params, velocity = carry
        grads = jax.grad(loss)(params, *inputs)
        moved = {part: _momentum_step(recipe, part, params[part], velocity[part], grads[part]) for part in params}
        return tuple({part: moved[part][i] for part in params} for i in (0, 1)), None

    def epoch(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        order_key, step_key = jax.random.split(key)
        rows = jnp.pad(jax.random.permutation(order_key, size), (0, steps * recipe.batch - size), constant_values=-1)
        rows = rows.reshape(steps, recipe.batch)
        inputs = (jnp.maximum(rows, 0), (rows >= 0).astype(jnp.float32), jax.random.split(step_key, steps))
        return jax.lax.scan(step, carry, inputs)

    start = (params, jax.tree.map(jnp.zeros_like, params))
    (params, _), _ = jax.lax.scan(epoch, start, jax.random.split(key, recipe.epochs))
    sides = [_scores(params, embed(params["backbone"], query, unflipped | side)) for side in (False, True)]
    return (sides[0] + sides[1]) / 2


def _momentum_step(recipe: Recipe, part: str, params: Any, velocity: Any, grads: Any) -> tuple[Any, Any]:
    rate, momentum = getattr(recipe, f"{part}_rate"), getattr(recipe, f"{part}_momentum")
    velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads)
    return jax.tree.map(lambda p, v: p - rate * v, params, velocity), velocity


def _scores(params: Any, features: jax.Array) -> jax.Array:
    head = params["head"]
    features = features.astype(jnp.float32)
    return jnp.matmul(features, head["weights"], precision="highest") + head["bias"][None]
