"""What is wrong with found boxes: which are right at IoU .5, kinds of false positives, confusion, a threshold.

These are counts of single boxes at one threshold, for people; the metrics are pycocotools' (`coco_scores`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from florence_jax.boxes import box_areas, iou
from florence_jax.data.records import evenly
from florence_jax.evaluators.coco_files import FoundBoxes, GroundTruth

RIGHT_IOU, NEAR_IOU = (
    0.5,
    0.1,
)  # IoU with a true box from which on a box is right; below NEAR_IOU it is on the background
MOST_JUDGED = 5000  # pictures, spread over the test set: the cost is bounded
# Kinds of false positives, after TIDE (Bolya et al. 2020); a box is of the first that it fits. See `judge_boxes`.
FALSE_KINDS = ("duplicate", "class", "location", "class and location", "background")
CORRECT, IGNORED = -1, -2  # beside the numbers of FALSE_KINDS


class Judged(NamedTuple):
    """Found boxes of some pictures, by picture and falling score; D of them.

    Attributes:
      truth: of the pictures.
      found: `image` has rows of `truth`.
      match: int32 (D,), the true box of its class that a right one has found, else the nearest one of any class, -1
        where none is near.
      kind: int8 (D,), number of `FALSE_KINDS`, or CORRECT, or IGNORED in a crowd of its class.
      rows: int64, rows of the pictures in the ground truth that was given.
    """

    truth: GroundTruth
    found: FoundBoxes
    match: np.ndarray
    kind: np.ndarray
    rows: np.ndarray

    def kept(self, threshold: float) -> np.ndarray:
        """bool (D,): what counts, right or wrong, from a score on."""
        return (self.found.scores >= threshold) & (self.kind != IGNORED)


class Threshold(NamedTuple):
    """A score from which on boxes are taken, and what that gives over all classes together at IoU .5."""

    score: float
    precision: float
    recall: float
    f1: float


def corners_of(boxes: np.ndarray) -> np.ndarray:
    """x, y, width, height (..., 4) -> x1, y1, x2, y2."""
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def judge_boxes(truth: GroundTruth, found: FoundBoxes) -> Judged:
    """Says of each found box whether it is right, and if not, why.

    In a picture the boxes are taken by falling score; each finds the true box of its class with the largest IoU, of at
    least .5, that none before has found. Of the others those that lie by half or more in a crowd of their class count
    neither way; the rest are of the first kind that fits: 'duplicate': IoU of .5 with a true box of its class, which
    another has found; 'class': .5 with one of another class; 'location': .1 with one of its class; 'class and
    location': .1 with one of another; 'background': all others.
    """
    rows = evenly(len(truth.keys), MOST_JUDGED)
    if len(rows) < len(truth.keys):
        place = np.full(len(truth.keys), -1, np.int32)
        place[rows] = np.arange(len(rows))
        found = found._replace(image=place[found.image])
        found, truth = found.subset(np.flatnonzero(found.image >= 0)), truth.subset(rows)
    found = found.subset(np.lexsort((-found.scores, found.image)))
    match, kind = np.full(len(found.scores), -1, np.int32), np.full(len(found.scores), len(FALSE_KINDS) - 1, np.int8)
    for _, true, ours in _by_picture(truth, found):
        if ours.start < ours.stop:
            match[ours], kind[ours] = _judge_picture(truth, found, true, ours)
    return Judged(truth, found, match, kind, rows)


def _by_picture(truth: GroundTruth, found: FoundBoxes) -> Iterator[tuple[int, slice, slice]]:
    """(row, its true boxes, its found ones), of columns sorted by picture."""
    numbers = np.arange(len(truth.keys) + 1)
    true, ours = np.searchsorted(truth.image, numbers), np.searchsorted(found.image, numbers)
    for row in range(len(truth.keys)):
        yield row, slice(int(true[row]), int(true[row + 1])), slice(int(ours[row]), int(ours[row + 1]))


def _judge_picture(truth: GroundTruth, found: FoundBoxes, true: slice, ours: slice) -> tuple[np.ndarray, np.ndarray]:
    boxes, targets = corners_of(found.boxes[ours]), corners_of(truth.boxes[true])
    same = found.labels[ours][:, None] == truth.labels[true]
    crowd = truth.crowd[true]
    overlap = np.where(crowd, 0, iou(boxes[:, None], targets))
    own, other = np.where(same, overlap, 0), np.where(same, 0, overlap)
    match = np.where(overlap.max(1, initial=0) >= NEAR_IOU, overlap.argmax(1) if len(crowd) else -1, -1)
    best, best_other = own.max(1, initial=0), other.max(1, initial=0)
    kind = np.select(
        [best >= RIGHT_IOU, best_other >= RIGHT_IOU, best >= NEAR_IOU, best_other >= NEAR_IOU], range(4), 4
    )
    free = np.ones(len(crowd), bool)
    for i in np.flatnonzero(best >= RIGHT_IOU).tolist():
        candidates = np.where(free, own[i], 0)
        target = int(candidates.argmax())
        if candidates[target] >= RIGHT_IOU:
            free[target], match[i], kind[i] = False, target, CORRECT
    kind[(kind != CORRECT) & _in_crowd(boxes, targets, same & crowd)] = IGNORED
    return np.where(match >= 0, match + true.start, -1), kind


def _in_crowd(boxes: np.ndarray, targets: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """bool (n,): whether half of a box lies in one target (m, 4); `crowds` (n, m) says which count."""
    low, high = np.maximum(boxes[:, None, :2], targets[:, :2]), np.minimum(boxes[:, None, 2:], targets[:, 2:])
    common = box_areas(np.concatenate([low, high], -1))
    return (crowds & (common >= RIGHT_IOU * box_areas(boxes)[:, None])).any(1)


def best_threshold(judged: Judged) -> Threshold:
    """The score with the highest F1; of equals the highest. All NaN without true boxes or found ones that count."""
    counted = judged.kind != IGNORED
    total = int((~judged.truth.crowd).sum())
    scores, right = judged.found.scores[counted], judged.kind[counted] == CORRECT
    if not total or not len(scores):
        return Threshold(np.nan, np.nan, np.nan, np.nan)
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # the end of each group of equal scores
    hits = np.cumsum(right[order])[last]
    f1 = 2 * hits / (last + 1 + total)
    best = int(f1.argmax())
    return Threshold(
        float(scores[order][last[best]]),
        float(hits[best] / (last[best] + 1)),
        float(hits[best] / total),
        float(f1[best]),
    )


def confusion_with_background(judged: Judged, threshold: float) -> np.ndarray:
    """int64 (K + 1, K + 1): true boxes of a class (row) by what they were called (column), K for the background.

    Boxes from the threshold on. Right ones, see `judge_boxes`, come first; then each of the others, by falling score,
    takes the true box of any class with the largest IoU, of at least .5, that none has taken. What takes none is in the
    last row, true boxes that none takes in the last column.
    """
    truth, found = judged.truth, judged.found
    classes = len(truth.class_names)
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    kept, right = judged.kept(threshold), judged.kind == CORRECT
    for _, true, ours in _by_picture(truth, found):
        free = ~truth.crowd[true]
        hits = np.arange(ours.start, ours.stop)[(kept & right)[ours]]
        free[judged.match[hits] - true.start] = False
        np.add.at(matrix, (found.labels[hits], found.labels[hits]), 1)
        others = np.arange(ours.start, ours.stop)[(kept & ~right)[ours]]
        overlaps = iou(corners_of(found.boxes[others])[:, None], corners_of(truth.boxes[true]))
        for i, overlap in zip(others.tolist(), overlaps, strict=True):
            candidates = np.where(free, overlap, 0)
            target = int(candidates.argmax()) if len(candidates) else -1
            taken = target >= 0 and candidates[target] >= RIGHT_IOU
            if taken:
                free[target] = False
            matrix[truth.labels[true.start + target] if taken else classes, found.labels[i]] += 1
        np.add.at(matrix[:, classes], truth.labels[true][free], 1)
    return matrix


def picture_f1(judged: Judged, threshold: float) -> np.ndarray:
    """float64 (N,): F1 of each picture at a threshold; NaN for one without boxes, true or found."""
    count = len(judged.truth.keys)
    kept = judged.kept(threshold)
    hits = np.bincount(judged.found.image[kept & (judged.kind == CORRECT)], minlength=count)
    said = np.bincount(judged.found.image[kept], minlength=count)
    there = np.bincount(judged.truth.image[~judged.truth.crowd], minlength=count)
    return np.where(said + there > 0, 2 * hits / np.maximum(said + there, 1), np.nan)
