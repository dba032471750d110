"""Regions of pictures and what they are: crops for a classifier that sees one thing at a time, scores; all jittable."""

import functools

import jax
import jax.numpy as jnp

from florence_jax.models.detections import suppress


def widen_boxes(boxes: jax.Array, margin: float, square: bool) -> jax.Array:
    """What is cut out for boxes (..., 4), x1 y1 x2 y2: (..., 4).

    Args:
      boxes: in pixels; one without sides is taken to have a pixel.
      margin: that is added on each side, as a share of the side; of the longer one, where `square`.
      square: both sides as long as the longer one; else what is cut out is as the box is, and is squashed later.
    """
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 1)
    if square:
        sides = jnp.broadcast_to(sides.max(-1, keepdims=True), sides.shape)
    half = sides * (0.5 + margin)
    return jnp.concatenate([centre - half, centre + half], -1)


def crop_regions(images: jax.Array, boxes: jax.Array, side: int, valid: jax.Array) -> jax.Array:
    """Cuts boxes out and makes each a square picture, bicubic and antialiased: (B, R, side, side, C), float32.

    As `jax.image.scale_and_translate` does, by two matrix products a box; but a picture's own border is its border in
    any batch. What lies beyond it is 0: the mean colour, of pictures that are normalised.

    Args:
      images: float (B, H, W, C).
      boxes: float (B, R, 4), x1 y1 x2 y2 in pixels of the pictures; may reach beyond them.
      side: in pixels.
      valid: int (B, 2), height and width of each picture's own part.
    """
    rows, columns = (
        _resize_weights(boxes[..., 1 - axis :: 2], side, images.shape[1 + axis], valid[:, axis]) for axis in (0, 1)
    )
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return product("briwc,brjw->brijc", product("brih,bhwc->briwc", rows, images), columns)


def _resize_weights(ends: jax.Array, side: int, cells: int, valid: jax.Array) -> jax.Array:
    """float32 (B, R, side, cells): of each pixel of the picture in each of the crop; `ends` (B, R, 2), `valid` (B,)."""
    step = (ends[..., 1:] - ends[..., :1]) / side
    points = ends[..., :1] + step * (jnp.arange(side, dtype=jnp.float32) + 0.5)[None, None]
    centres = (jnp.arange(cells, dtype=jnp.float32) + 0.5)[None, None, None]
    most = valid.astype(jnp.float32)[:, None, None]
    weights = _keys_cubic(jnp.abs(points[..., None] - centres) / jnp.maximum(step, 1)[..., None])
    weights = jnp.where(centres < most[..., None], weights, 0)
    total = weights.sum(-1)
    some = (points >= 0) & (points <= most) & (jnp.abs(total) > 1e-3)
    return jnp.where(some[..., None], weights / jnp.where(some, total, 1)[..., None], 0)


def _keys_cubic(x: jax.Array) -> jax.Array:
    """The kernel of bicubic resizing (Keys 1981, a = -1/2), as Pillow has it, of distances."""
    near, far = ((1.5 * x - 2.5) * x) * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


def name_boxes(
    boxes: jax.Array,
    objectness: jax.Array,
    logits: jax.Array,
    g: float,
    background: float | None = 0.0,
    iou: float = 0.5,
    most: int = 100,
) -> dict[str, jax.Array]:
    """From regions and what they look like to detections: scores, class-wise non-maximum suppression.

    The score of a class is objectness^(1 - g) x its probability^g, the probability by a softmax over all classes and
    the background.

    Args:
      boxes: (B, R, 4). objectness: (B, R), from 0 to 1; 0 for no region.
      logits: (B, R, K); -inf for a class that takes no part.
      g: from 0 to 1.
      background: logit of the background; None: without.
      iou, most: see `detections.suppress`.

    Returns:
      As `detections.suppress`.
    """
    batch, regions, classes = logits.shape
    if background is not None:
        logits = jnp.concatenate([logits, jnp.full((batch, regions, 1), background, logits.dtype)], -1)
    probability = jax.nn.softmax(logits, -1)[..., :classes]
    there = (objectness[..., None] > 0) & (probability > 0)
    score = jnp.where(there, objectness[..., None], 1) ** (1 - g) * jnp.where(there, probability, 1) ** g
    pairs = {
        "boxes": jnp.repeat(boxes, classes, 1),
        "scores": jnp.where(there, score, 0).reshape(batch, -1),
        "labels": jnp.tile(jnp.arange(classes, dtype=jnp.int32)[None], (batch, regions)),
    }
    return suppress(pairs, iou, most)
