"""Losses of a one-stage detector: ATSS says which anchor answers for which box, and what the answers cost.

Assignment as in ATSS (Zhang et al. 2020, arXiv 1912.02424), losses as in its authors' code, which Dynamic Head keeps:
focal loss of the classes (Lin et al. 2017), binary cross entropy of the centerness (Tian et al. 2019), GIoU loss of the
boxes (Rezatofighi et al. 2019), weighted by the centerness. All in float32, boxes x1 y1 x2 y2 in pixels.

With B pictures of N anchors on all levels, of which the first `level_sizes[0]` are of the first level and so on, and
room for M boxes a picture, memory grows with B * (N + M), not with N * M.

Unknown is not absent: where several sets are trained on together, nobody looked for the classes of the others, and an
anchor is background for those classes only that people judged in its picture. A class-agnostic detector has one class,
of which an object without a box may be anywhere in such a picture: there only what lies around a box is background.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from florence_jax.boxes import giou, iou

NEAREST = 9  # candidates of a box on each level
INSIDE = 0.01  # pixels that an anchor's centre lies within a box that it answers for
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2
BOX_WEIGHT = 2.0
KNOWN_AROUND = 2.0  # times the sides of a box: what is known around it, where other objects have none
LEAST_WEIGHT = 1e-6  # of the boxes of a batch
DISTANCES_AT_ONCE = 2**18  # in memory, for each picture


def detection_loss(
    outputs: Mapping[str, jax.Array],
    batch: Mapping[str, jax.Array],
    level_sizes: Sequence[int],
    assigned: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of a global batch and its parts, float32 scalars.

    Args and Raises: see `loss_sums`.

    Returns:
      (loss, metrics): the sum of 'class_loss', 'box_loss' and 'centerness_loss'; 'positives', the anchors of the batch
      that answer for a box, and 'objects_without_anchor', the boxes that none answers for, which cannot be learnt.
    """
    return loss_of_sums(loss_sums(outputs, batch, level_sizes, assigned))


def loss_sums(
    outputs: Mapping[str, jax.Array],
    batch: Mapping[str, jax.Array],
    level_sizes: Sequence[int],
    assigned: tuple[jax.Array, jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """What `loss_of_sums` needs of a batch: numerators and denominators, which of two batches add up.

    An anchor that answers for no box is background for all classes that are judged in its picture, unless its centre
    lies in a box to be ignored; one that answers for a box is background for the others of them. Its own class counts
    in any case. What is no background for a class and not of it costs nothing there, whatever its logit.

    Args:
      outputs: of the detector, of K classes: "detector/logits" float (B, N, K), "detector/centerness" float (B, N),
        logits; "detector/boxes" float (B, N, 4), decoded; "detector/inside" bool (B, N), False for an anchor that
        takes no part; "detector/anchors" float (N, 4).
      batch: "boxes" float (B, M, 4), "class_ids" int (B, M), "objects" and "ignore" bool (B, M), both False for
        padding; perhaps "judged" bool (B, K): the classes that people looked for in the picture, everywhere; without
        it all of them. Perhaps "drawn" int (S,), different classes: the logits, (B, N, S), are of these, and the others
        cost nothing, see `class_sampling`; "judged" is of all K. Perhaps "partly_boxed" bool (B,): pictures in which
        objects have no box. There an anchor that answers for none is background only where its centre lies in an
        object's box, made `KNOWN_AROUND` times as wide and high; elsewhere it costs nothing.
      level_sizes: anchors of each level; their sum is N.
      assigned: what `assign_atss` gives, where it is known already.

    Raises:
      ValueError: if that sum is another.
    """
    anchors, inside, boxes = outputs["detector/anchors"], outputs["detector/inside"], batch["boxes"]
    if sum(level_sizes) != len(anchors):
        raise ValueError(f"levels of {tuple(level_sizes)} anchors are not {len(anchors)}")
    matched, answered = assigned or assign_atss(anchors, level_sizes, boxes, batch["objects"], inside)
    positive, centres = matched >= 0, _centres(anchors)
    chosen = jnp.maximum(matched, 0)
    # Anchors without a box have themselves: all that is computed of them is finite, and counts for nothing.
    goals = jnp.where(positive[..., None], jnp.take_along_axis(boxes, chosen[..., None], axis=1), anchors[None])
    centred = centerness(centres[None], goals)
    weights = jnp.where(positive, centred, 0)
    classes = jnp.where(positive, jnp.take_along_axis(batch["class_ids"], chosen, axis=1), -1)
    counted = inside & (positive | ~_covered(centres, boxes, batch["ignore"]))
    if (partly := batch.get("partly_boxed")) is not None:
        counted &= positive | ~partly[:, None] | _covered(centres, _widened(boxes, KNOWN_AROUND), batch["objects"])
    judged, drawn = batch.get("judged"), batch.get("drawn")
    if judged is not None and drawn is not None:
        judged = judged[:, drawn]
    entropy = optax.sigmoid_binary_cross_entropy(outputs["detector/centerness"].astype(jnp.float32), centred)
    apart = 1 - giou(outputs["detector/boxes"].astype(jnp.float32), goals)
    return {
        "class": _class_sum(outputs["detector/logits"], classes, counted, judged, drawn),
        "centerness": jnp.where(positive, entropy, 0).sum(),
        "box": (weights * apart).sum(),
        "weight": weights.sum(),
        "positives": positive.sum(dtype=jnp.float32),
        "missed": (batch["objects"] & ~answered).sum(dtype=jnp.float32),
    }


def loss_of_sums(sums: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, metrics) as `detection_loss`: all is divided by what it is a mean of, counted over the whole batch."""
    positives = jnp.maximum(sums["positives"], 1)
    parts = {
        "class_loss": sums["class"] / positives,
        "box_loss": BOX_WEIGHT * sums["box"] / jnp.maximum(sums["weight"], LEAST_WEIGHT),
        "centerness_loss": sums["centerness"] / positives,
    }
    counts = {"positives": sums["positives"], "objects_without_anchor": sums["missed"]}
    return sum(parts.values(), start=jnp.float32(0)), parts | counts


def focal_loss(logits: jax.Array, classes: jax.Array, drawn: jax.Array | None = None) -> jax.Array:
    """Focal loss of each class of its own: -a (1-p)^2 ln p for the right one, -(1-a) p^2 ln(1-p) for the others.

    Args:
      logits: float (..., K).
      classes: int (...), -1 for none of them.
      drawn: int (K,), the class that each logit is of; None: in order.

    Returns:
      float32 (..., K).
    """
    logits = logits.astype(jnp.float32)
    right = _is_right(classes, logits.shape[-1], drawn)
    wrongness = jnp.where(right, -logits, logits)  # the probability of the wrong answer is its sigmoid
    weight = jnp.where(right, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return weight * jax.nn.sigmoid(wrongness) ** FOCAL_GAMMA * jax.nn.softplus(wrongness)


def _is_right(classes: jax.Array, count: int, drawn: jax.Array | None) -> jax.Array:
    """bool (..., K): which of K classes, `drawn` or in order, those of (...) are."""
    columns = jnp.arange(count, dtype=jnp.int32) if drawn is None else drawn
    return classes[..., None] == columns.reshape((1,) * classes.ndim + (count,))


@jax.checkpoint  # of all that is as large as the logits only they are kept for the backward pass
def _class_sum(
    logits: jax.Array, classes: jax.Array, counted: jax.Array, judged: jax.Array | None, drawn: jax.Array | None
) -> jax.Array:
    """Sum of the focal losses of the anchors that `counted` bool (B, N) names: of `judged` (B, K) and own classes."""
    counts = counted[..., None]
    if judged is not None:
        counts = counts & (judged[:, None] | _is_right(classes, logits.shape[-1], drawn))
    return jnp.where(counts, focal_loss(logits, classes, drawn), 0).sum()


def centerness(points: jax.Array, boxes: jax.Array) -> jax.Array:
    """How central points (..., 2) lie in boxes (..., 4): (...), 1 in the middle, 0 at a side, outside, without area."""
    left, top, right, bottom = jnp.moveaxis(jnp.maximum(_sides(points, boxes), 0), -1, 0)
    least = jnp.minimum(left, right) * jnp.minimum(top, bottom)
    most = jnp.maximum(left, right) * jnp.maximum(top, bottom)
    return jnp.sqrt(least / jnp.where(most > 0, most, 1))


def assign_atss(
    anchors: jax.Array, level_sizes: Sequence[int], boxes: jax.Array, objects: jax.Array, inside: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which box each anchor answers for.

    Candidates of a box are on each level the nine anchors whose centres are nearest to its own; of two that are
    equally far the earlier one. Those answer for it whose IoU with it is at least the mean plus the standard deviation
    (unbiased) of all its candidates' and whose centre lies in it. An anchor that could answer for several boxes does so
    for the one with the largest IoU, of equal ones the first.

    Args:
      anchors: float (N, 4).
      level_sizes: anchors of each level; their sum is N.
      boxes: float (B, M, 4). objects: bool (B, M), False for padding and for what is not to be found.
      inside: bool (B, N), whether an anchor is of the picture; others are no candidates.

    Returns:
      int32 (B, N): the index of the box of each anchor, -1 for none; bool (B, M): which objects have an anchor.
    """
    anchors = jnp.asarray(anchors)
    return jax.vmap(lambda *one: _assign(anchors, level_sizes, *one))(boxes, objects, inside)


def _assign(
    anchors: jax.Array, level_sizes: Sequence[int], boxes: jax.Array, objects: jax.Array, inside: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`assign_atss` of one picture."""
    count = len(boxes)
    candidates, is_one = _nearest(anchors, level_sizes, boxes, inside)  # (M, C)
    near = anchors[candidates]
    overlaps = iou(near, boxes[:, None])
    among = is_one & objects[:, None]
    number = jnp.maximum(among.sum(1, keepdims=True), 1)
    mean = jnp.where(among, overlaps, 0).sum(1, keepdims=True) / number
    spread = jnp.where(among, (overlaps - mean) ** 2, 0).sum(1, keepdims=True) / jnp.maximum(number - 1, 1)
    centred = _sides(_centres(near), boxes[:, None]).min(-1) > INSIDE
    positive = among & centred & (overlaps >= mean + jnp.sqrt(spread))
    # Largest IoU, then smallest index: both are the same in whatever order an accelerator scatters.
    best = jnp.full(len(anchors), -1.0).at[candidates].max(jnp.where(positive, overlaps, -1.0))
    positive &= overlaps == best[candidates]
    rows = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[:, None], candidates.shape)
    winner = jnp.full(len(anchors), count, jnp.int32).at[candidates].min(jnp.where(positive, rows, count))
    answered = (positive & (winner[candidates] == rows)).any(1)
    return jnp.where(winner == count, -1, winner), answered


def _nearest(
    anchors: jax.Array, level_sizes: Sequence[int], boxes: jax.Array, inside: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """int32 (M, C) indices of the candidates of each box, and which are any: a level may have less than nine inside."""
    found, is_one, goals, first = [], [], _centres(boxes), 0
    for size in level_sizes:
        level = slice(first, first + size)
        nearest = _nearest_of_level(_centres(anchors[level]), goals, inside[level])
        found.append(jnp.minimum(nearest, size - 1) + first)
        is_one.append(nearest < size)
        first += size
    return jnp.concatenate(found, 1), jnp.concatenate(is_one, 1)


def _nearest_of_level(centres: jax.Array, goals: jax.Array, inside: jax.Array) -> jax.Array:
    """int32 (M, 9 or n): of centres (n, 2) that are inside (n,) the nearest to goals (M, 2), in order; n for none.

    Some goals after the others, so that nothing of M * n is kept. Not by `lax.top_k`: its custom call is one piece,
    for which the pictures of all devices would be gathered on each.
    """
    size = len(centres)
    places = jnp.arange(size, dtype=jnp.int32)

    def nearest(goal: jax.Array) -> jax.Array:
        # No root: of whole and half pixels the square is exact, so that what is equally far is equal.
        far = jnp.where(inside, (centres[:, 0] - goal[0]) ** 2 + (centres[:, 1] - goal[1]) ** 2, jnp.inf)

        def take_one(far: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            place = far.argmin().astype(jnp.int32)
            return jnp.where(places == place, jnp.inf, far), jnp.where(jnp.isfinite(far[place]), place, size)

        return jax.lax.scan(take_one, far, length=min(NEAREST, size))[1]

    rounds = -(-len(goals) * size // DISTANCES_AT_ONCE)
    return jax.lax.map(nearest, goals, batch_size=-(-len(goals) // rounds))


def _covered(points: jax.Array, boxes: jax.Array, which: jax.Array) -> jax.Array:
    """bool (B, N): whether points (N, 2) lie in any of boxes (B, M, 4) that `which` (B, M) names."""

    def one_more(covered: jax.Array, box: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        corners, counts = box  # (B, 4), (B,)
        return covered | ((_sides(points[None], corners[:, None]).min(-1) > 0) & counts[:, None]), None

    none = jnp.zeros((len(boxes), len(points)), bool)
    return jax.lax.scan(one_more, none, (boxes.swapaxes(0, 1), which.T))[0]


def _widened(boxes: jax.Array, times: float) -> jax.Array:
    """Boxes (..., 4) around the same centres, so many times as wide and high."""
    centres, halves = _centres(boxes), (boxes[..., 2:] - boxes[..., :2]) * (times / 2)
    return jnp.concatenate([centres - halves, centres + halves], -1)


def _centres(boxes: jax.Array) -> jax.Array:
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def _sides(points: jax.Array, boxes: jax.Array) -> jax.Array:
    """Distances (..., 4) from points (..., 2) to the left, top, right and bottom side; negative outside."""
    return jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], -1)
