"""Loss of the attributes of objects, as in Anderson et al. 2018 (arXiv 1707.07998)."""

import jax
import jax.numpy as jnp

from florence_jax.boxes import iou

LEAST_OVERLAP = 0.5  # of a box that was found with its object, to learn attributes on


def attribute_loss(logits: jax.Array, attribute_ids: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax cross entropy against the uniform distribution over the attributes of each box.

    Args:
      logits: float (B, R, A).
      attribute_ids: int (B, R, T), different ones, -1 for no more. A box without any costs nothing.
      counted: bool (B, R), False for padding.

    Returns:
      (loss, number), float32: the mean over the boxes of the global batch that cost anything, 0 for none, and how many
      they are.
    """
    known = attribute_ids >= 0
    number = known.sum(-1)
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), jnp.maximum(attribute_ids, 0), axis=-1)
    each = -jnp.where(known, taken, 0).sum(-1) / jnp.maximum(number, 1)
    counted = counted & (number > 0)
    boxes = counted.sum(dtype=jnp.float32)
    return jnp.where(counted, each, 0).sum() / jnp.maximum(boxes, 1), boxes


def best_found(matched: jax.Array, found: jax.Array, boxes: jax.Array, most: int) -> tuple[jax.Array, ...]:
    """The decoded boxes of the anchors that answer for an object and are nearest to it, IoU .5 and more, best first.

    Args:
      matched: int (B, N), the object of each anchor, -1 for none, see `detection.assign_atss`.
      found: float (B, N, 4), decoded. boxes: float (B, M, 4), of the objects.
      most: of a picture; of equal ones the first.

    Returns:
      float32 (B, P, 4), boxes; int32 (B, P), their objects, and bool (B, P), False where there are no more; P is `most`
      or N, where that is less.
    """
    chosen = jnp.maximum(matched, 0)
    overlaps = jnp.where(matched >= 0, iou(found, jnp.take_along_axis(boxes, chosen[..., None], axis=1)), 0)
    places = jnp.broadcast_to(jnp.arange(matched.shape[1], dtype=jnp.int32)[None], matched.shape)
    falling, places = (each[:, :most] for each in jax.lax.sort((-overlaps, places), num_keys=1, is_stable=True))
    of_object = jnp.take_along_axis(chosen, places, axis=1)
    return jnp.take_along_axis(found, places[..., None], axis=1), of_object, -falling >= LEAST_OVERLAP
