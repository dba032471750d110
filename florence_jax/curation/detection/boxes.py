"""Pure functions that join detection sets: which rows are one picture, which boxes are valid, which are double.

Nothing here is quadratic in images or boxes; overlaps are computed within one picture and class, in tiles.
"""

from collections.abc import Sequence

import numpy as np

from florence_jax.boxes import iou

WITHIN_IOU = 0.95  # one set drew the same box twice
ACROSS_IOU = 0.7  # two sets drew a box for the same object
TILE_ROWS = 1024


def dense_codes(values: Sequence) -> np.ndarray:
    """int64 (N,): equal values have equal numbers, counted from 0 in the order of appearance."""
    codes: dict = {}
    return np.fromiter((codes.setdefault(value, len(codes)) for value in values), np.int64, len(values))


def group_rows(*codes: np.ndarray) -> np.ndarray:
    """int64 (N,): the connected components of rows that share any code; a group's number is its smallest row.

    Args:
      codes: int64 (N,) each, from 0; a negative one is shared with nobody.
    """
    label = np.arange(len(codes[0]))
    while True:
        before = label
        for code in codes:
            known = np.flatnonzero(code >= 0)
            lowest = np.full(code.max(initial=-1) + 1, len(label))
            np.minimum.at(lowest, code[known], label[known])
            label = label.copy()
            label[known] = lowest[code[known]]
        if (label == before).all():
            return label


def overlapping_pairs(boxes: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs i < j of boxes (N, 4) with an IoU of at least `least` > 0, and that IoU; memory is TILE_ROWS x N."""
    found = []
    for start in range(0, len(boxes), TILE_ROWS):
        # Only the rest of the row: pairs with an earlier box were met in an earlier tile.
        values = iou(boxes[start : start + TILE_ROWS, None], boxes[None, start:])
        i, j = np.nonzero(np.triu(values >= least, 1))
        found.append((i + start, j + start, values[i, j]))
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def double_boxes(
    boxes: np.ndarray,
    sources: np.ndarray,
    pseudo: np.ndarray,
    within: float = WITHIN_IOU,
    across: float = ACROSS_IOU,
) -> np.ndarray:
    """Which boxes of one class in one picture repeat an earlier one.

    Boxes of one source repeat each other from an IoU of `within` on; those of two sources from `across` on, and then a
    box stands for at most one box of each other source, so that neighbours are not swallowed. A pseudo box has no such
    limit.

    Args:
      boxes: float (N, 4), of the preferred source first.
      sources: int (N,).
      pseudo: bool (N,).
      within: IoU.
      across: IoU.

    Returns:
      int64 (N,): the index of the box that each repeats, -1 for a box to keep.
    """
    repeats = np.full(len(boxes), -1)
    i, j, values = overlapping_pairs(boxes, min(within, across))
    taken = set()
    for k in np.lexsort((j, i, -values)).tolist():
        a, b = int(i[k]), int(j[k])
        if repeats[a] >= 0 or repeats[b] >= 0:
            continue
        same = sources[a] == sources[b]
        if values[k] < (within if same else across):
            continue
        if not same and not pseudo[b]:
            if (a, sources[b]) in taken:
                continue
            taken.add((a, sources[b]))
        repeats[b] = a
    for b in np.flatnonzero(repeats >= 0).tolist():  # in order: what a box repeats is settled before it
        if repeats[repeats[b]] >= 0:
            repeats[b] = repeats[repeats[b]]
    return repeats


def find_doubles(
    runs: np.ndarray,
    boxes: np.ndarray,
    sources: np.ndarray,
    pseudo: np.ndarray,
    within: float = WITHIN_IOU,
    across: float = ACROSS_IOU,
) -> np.ndarray:
    """`double_boxes` for many runs of boxes at once.

    Args:
      runs: int64 (M,): boxes with the same number, in the order of the arrays, may repeat each other.
      boxes: float32 (M, 4).
      sources: int (M,).
      pseudo: bool (M,).
      within: see `double_boxes`.
      across: see `double_boxes`.

    Returns:
      int64 (M,): the index of the box that each repeats, -1 for a box to keep.
    """
    order = np.argsort(runs, kind="stable")
    starts = np.flatnonzero(np.diff(runs[order], prepend=-1))
    ends = np.append(starts[1:], len(order))
    repeats = np.full(len(runs), -1)
    several = ends - starts > 1
    for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
        rows = order[start:end]
        found = double_boxes(boxes[rows], sources[rows], pseudo[rows], within, across)
        double = found >= 0
        repeats[rows[double]] = rows[found[double]]
    return repeats
