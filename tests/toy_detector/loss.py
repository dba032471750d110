"""Loss of a detector that speaks for each cell of a map: binary cross entropy of objects, 1 - IoU of their boxes."""

import jax
import jax.numpy as jnp
import optax

from florence_jax.boxes import box_areas, iou


def assign(
    centres: jax.Array, boxes: jax.Array, objects: jax.Array, ignore: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which box each cell answers for: of the objects around its centre the smallest (FCOS, Tian et al. 2019).

    Args:
      centres: (N, 2). boxes: (B, M, 4). objects, ignore: bool (B, M), both False for padding.

    Returns:
      boxes (B, N, 4), objects bool (B, N), and where neither object nor background is known, bool (B, N).
    """
    centres = centres[None, :, None]
    sides = jnp.concatenate([centres - boxes[:, None, :, :2], boxes[:, None, :, 2:] - centres], -1)  # (B, N, M, 4)
    around = sides.min(-1) > 0
    counts = around & objects[:, None]
    smallest = jnp.where(counts, box_areas(boxes)[:, None], jnp.inf).argmin(-1)
    chosen = jnp.take_along_axis(boxes, smallest[..., None], axis=1)
    positive = counts.any(-1)
    return chosen, positive, (around & ignore[:, None]).any(-1) & ~positive


def detection_loss(out: dict[str, jax.Array], batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Scalar loss of a global batch and its parts.

    Args:
      out: outputs of the model, see `model.build_detector`. batch: with what op 'toy_pad_boxes' adds.
    """
    boxes, positive, unknown = assign(out["detector/centres"], batch["boxes"], batch["objects"], batch["ignore"])
    judged = (out["detector/inside"] & ~unknown).astype(jnp.float32)
    positive = positive.astype(jnp.float32) * judged
    entropy = optax.sigmoid_binary_cross_entropy(out["detector/objectness"], positive)
    objectness = (entropy * judged).sum() / jnp.maximum(judged.sum(), 1)
    distance = (1 - iou(out["detector/boxes"], boxes)) * positive
    box = distance.sum() / jnp.maximum(positive.sum(), 1)
    return objectness + box, {"objectness_loss": objectness, "box_loss": box}
