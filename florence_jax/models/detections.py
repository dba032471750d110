"""From a detector's outputs to boxes: scores, the best of each level, class-wise non-maximum suppression; all jittable.

As in ATSS (Zhang et al. 2020), whose score is the root of this one, which changes no order. No part is quadratic in the
candidates, none waits for the host, and over several devices each has its own pictures (`lax.top_k` would gather them).

Classes are gone through some at a time. Of B pictures with N anchors and K classes, of which k = min(K, 512) at once,
the largest arrays beside the outputs are float32 (B, 5, per_level, k), 10 MB a picture, and with more than 512 classes
(B, N, k).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from florence_jax.boxes import box_areas
from florence_jax.boxes import iou as overlap
from florence_jax.models.detector import predict_positions

BOXES_AT_ONCE = 256  # candidates that are compared with each other at once
CLASSES_AT_ONCE = 512  # whose logits of all anchors are there at once

LevelPairs = tuple[jax.Array, ...]  # of each level: scores, anchors, classes (B, levels, P)


def candidates(
    outputs: Mapping[str, jax.Array],
    valid: jax.Array,
    level_sizes: Sequence[int],
    threshold: float = 0.05,
    per_level: int = 1000,
    layer: Mapping[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """The best pairs of anchor and class of each level; of equal ones those of the first anchors, then classes.

    The score is the probability of the class times the centerness. Boxes are cut at the border of the picture; what is
    empty then is none.

    Args:
      outputs: of the detector, of K classes: "detector/logits" float32 (B, N, K), or with `layer` "detector/features"
        float (B, N, C); "detector/centerness" float32 (B, N), logits; "detector/boxes" float32 (B, N, 4), decoded;
        "detector/inside" bool (B, N), False for an anchor that takes no part.
      valid: int (B, 2), true height and width of the pictures.
      level_sizes: anchors of each level; their sum is N.
      threshold: probability of the class that a pair exceeds, before the centerness.
      per_level: pairs of a level.
      layer: "kernel" (C, K) and "bias" (K,) of the classes. The logits are then made of the features, of
        `CLASSES_AT_ONCE` classes after the others: the same pairs, and no array of N * K.

    Returns:
      "boxes" float32 (B, C, 4), "scores" float32 (B, C), 0 for none, and "labels" int32 (B, C), in the order of level,
      anchor, class.

    Raises:
      ValueError: if the levels are not all anchors.
    """
    inside, centred = outputs["detector/inside"], jax.nn.sigmoid(outputs["detector/centerness"])
    batch, number = centred.shape
    if sum(level_sizes) != number:
        raise ValueError(f"levels of {tuple(level_sizes)} anchors are not {number}")
    best = functools.partial(
        _best_pairs, factor=jnp.where(inside, centred, 0), level_sizes=level_sizes, threshold=threshold, most=per_level
    )
    if layer is None:
        pairs = best(outputs["detector/logits"])
    else:
        pairs = _over_classes(best, outputs["detector/features"], layer["kernel"], layer["bias"])
    scores, anchors, labels = (each.reshape(batch, -1) for each in pairs)
    boxes = jnp.take_along_axis(outputs["detector/boxes"], anchors[..., None], axis=1)
    boxes = jnp.clip(boxes, 0, jnp.tile(valid[:, None, ::-1], 2).astype(jnp.float32))
    scores = jnp.where(box_areas(boxes) > 0, scores, 0)
    return {"boxes": boxes, "scores": scores, "labels": labels}


def _best_pairs(
    logits: jax.Array, factor: jax.Array, level_sizes: Sequence[int], threshold: float, most: int
) -> LevelPairs:
    """The best pairs of each level, in the order of anchor, class; `factor` (B, N), 0 where an anchor takes no part."""
    batch, _, classes = logits.shape

    def scores_of(logit: jax.Array, factor: jax.Array) -> jax.Array:
        probability = jax.nn.sigmoid(logit)
        return jnp.where(probability > threshold, probability * factor, 0)

    # The best pairs are of the anchors whose best pairs are the best: so many anchors hold them all, ties included.
    best = scores_of(logits.max(-1), factor)
    levels, first = [], 0
    for size in level_sizes:
        levels.append(jnp.pad(best[:, first : first + size], ((0, 0), (0, max(level_sizes) - size))))
        first += size
    by_level = jnp.stack(levels, 1)  # (B, levels, anchors)
    anchors = _largest(by_level, most)
    some = jnp.take_along_axis(by_level, anchors, axis=2) > 0
    starts = jnp.cumsum(jnp.array((0, *level_sizes[:-1]), jnp.int32))[None, :, None]
    anchors = jnp.where(some, anchors + starts, 0).reshape(batch, -1)
    chosen = jnp.take_along_axis(logits, anchors[..., None], axis=1)
    factor = jnp.where(some.reshape(batch, -1), jnp.take_along_axis(factor, anchors, axis=1), 0)
    pairs = scores_of(chosen, factor[..., None]).reshape(batch, len(level_sizes), -1)
    places = _largest(pairs, most)
    anchors = jnp.take_along_axis(anchors.reshape(some.shape), places // classes, axis=2)
    return jnp.take_along_axis(pairs, places, axis=2), anchors, places % classes


def _over_classes(
    best: Callable[[jax.Array], LevelPairs], x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> LevelPairs:
    """What `best` of all logits is: of some classes after the others, with the best so far."""
    classes = len(bias)
    size = min(CLASSES_AT_ONCE, classes)

    def some_more(so_far: LevelPairs, start: jax.Array) -> tuple[LevelPairs, None]:
        begin = jnp.minimum(start, classes - size)  # the last ones reach back, over classes that were there already
        part = [jax.lax.dynamic_slice_in_dim(each, begin, size, axis=-1) for each in (kernel, bias)]
        new = (begin + jnp.arange(size, dtype=jnp.int32) >= start)[None, None]
        scores, anchors, labels = best(jnp.where(new, predict_positions(x, *part), -jnp.inf))
        together = zip(so_far, (scores, anchors, labels + begin), strict=True)
        scores, anchors, labels = (jnp.concatenate(each, axis=2) for each in together)
        # In the order of anchor, class, so that of equal scores the same go on as of all classes at once.
        anchors, labels, scores = jax.lax.sort((anchors, labels, scores), num_keys=2)
        places = _largest(scores, so_far[0].shape[2])
        return tuple(jnp.take_along_axis(each, places, axis=2) for each in (scores, anchors, labels)), None

    shapes = jax.eval_shape(best, jax.ShapeDtypeStruct((*x.shape[:2], classes), jnp.float32))
    none = tuple(jnp.zeros(each.shape, each.dtype) for each in shapes)
    return jax.lax.scan(some_more, none, jnp.arange(0, classes, size, dtype=jnp.int32))[0]


def merge(views: Sequence[Mapping[str, jax.Array]], iou: float = 0.6, most: int = 100) -> dict[str, jax.Array]:
    """The best boxes of pictures that were looked at in several ways: at several sizes, mirrored.

    Args:
      views: `candidates` of each, their boxes brought back to pixels of the picture.
      iou, most: see `suppress`.

    Returns:
      As `suppress` of all of them; of equal scores the first view's comes first.
    """
    return suppress({name: jnp.concatenate([view[name] for view in views], 1) for name in views[0]}, iou, most)


def suppress(found: Mapping[str, jax.Array], iou: float = 0.6, most: int = 100) -> dict[str, jax.Array]:
    """Greedy non-maximum suppression within each class: a box stays unless a better one that stays covers it.

    Classes are compared; to shift the boxes of each class apart, as is often done, costs them bits.

    Args:
      found: as `candidates` gives it, in any order; of equal scores the first is the better one.
      iou: two boxes of a class that both stay have at most this IoU.
      most: how many of a picture are given, the best.

    Returns:
      "boxes" float32 (B, most, 4), 0 where none, "scores" float32 (B, most), falling, 0 where none, and "labels" int32
      (B, most), -1 where none.
    """
    of_picture = functools.partial(_suppress, most_overlap=iou, most=most)
    return jax.vmap(of_picture)(found["boxes"], found["scores"], found["labels"])


def _suppress(
    boxes: jax.Array, scores: jax.Array, labels: jax.Array, most_overlap: float, most: int
) -> dict[str, jax.Array]:
    """`suppress` of one picture: boxes (C, 4), scores and labels (C,).

    A tile of candidates after the other, best first, against what is kept, then among themselves, until enough is kept.
    """
    tile = min(BOXES_AT_ONCE, len(scores))
    rest = -len(scores) % tile
    falling, order = jax.lax.sort((-scores, jnp.arange(len(scores), dtype=jnp.int32)), num_keys=1, is_stable=True)
    falling, order = jnp.pad(-falling, (0, rest)), jnp.pad(order, (0, rest))
    earlier = jnp.triu(jnp.ones((tile, tile), bool), 1)

    def some_more(state: Any) -> Any:
        start, count, kept_boxes, kept_scores, kept_labels = state
        score, place = (jax.lax.dynamic_slice_in_dim(each, start, tile) for each in (falling, order))
        box, label = boxes[place], labels[place]
        alive = (score > 0) & ~_same(kept_boxes, kept_labels, box, label, most_overlap).any(0)
        same = earlier & _same(box, label, box, label, most_overlap)
        keep = _best_of_tile(alive, same)
        slot = jnp.where(keep, count + jnp.cumsum(keep) - 1, most)  # behind the last one: not written
        return (
            start + tile,
            count + keep.sum(),
            kept_boxes.at[slot].set(box, mode="drop"),
            kept_scores.at[slot].set(score, mode="drop"),
            kept_labels.at[slot].set(label, mode="drop"),
        )

    def is_more(state: Any) -> jax.Array:
        start, count = state[:2]
        return (start < len(scores)) & (count < most) & (falling[jnp.minimum(start, len(scores) - 1)] > 0)

    none = jnp.zeros((most, 4)), jnp.zeros(most), jnp.full(most, -1, jnp.int32)
    state = jax.lax.while_loop(is_more, some_more, (jnp.int32(0), jnp.int32(0), *none))
    return dict(zip(("boxes", "scores", "labels"), state[2:], strict=True))


def _same(first: jax.Array, labels: jax.Array, second: jax.Array, others: jax.Array, most_overlap: float) -> jax.Array:
    """bool (n, m): which of boxes (n, 4) and (m, 4) say the same thing."""
    return (labels[:, None] == others[None]) & (overlap(first[:, None], second[None]) > most_overlap)


def _best_of_tile(alive: jax.Array, same: jax.Array) -> jax.Array:
    """bool (T,): which stay of those alive, (T,), where `same` (T, T) says which i < j covers which j.

    All j look at once at who stays, until nothing changes: after n rounds the first n are right whatever the others,
    and usually all after a few.
    """

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        keep = state[0]
        return alive & ~(same & keep[:, None]).any(0), keep

    return jax.lax.while_loop(lambda state: (state[0] != state[1]).any(), again, again((alive, alive)))[0]


def _largest(values: jax.Array, count: int) -> jax.Array:
    """int32 (..., k): indices of the `count` largest of values (..., n) >= 0, ascending; of equal ones the first.

    k is `count`, or n where that is less. The bits of floats that are not negative are in the order of the floats: the
    bits of the least that is taken are found one by one, and nothing is sorted but the k indices.
    """
    number = values.shape[-1]
    if count >= number:
        return jnp.broadcast_to(jnp.arange(number, dtype=jnp.int32), values.shape)

    def of_row(row: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(row, jnp.int32)

        def next_bit(place: jax.Array, least: jax.Array) -> jax.Array:
            more = least | (jnp.int32(1) << (30 - place))
            return jnp.where((bits >= more).sum() >= count, more, least)

        least = jax.lax.fori_loop(0, 31, next_bit, jnp.int32(0))
        above, equal = jnp.cumsum(jnp.stack([bits > least, bits == least]), axis=1, dtype=jnp.int32)
        slots = jnp.arange(1, count + 1, dtype=jnp.int32)
        larger = above[-1]
        places = jnp.where(slots <= larger, jnp.searchsorted(above, slots), jnp.searchsorted(equal, slots - larger))
        return jnp.sort(places.astype(jnp.int32))

    rows = jax.vmap(of_row)(values.reshape(-1, number))
    return rows.reshape(*values.shape[:-1], count)
