"""Few pictures of each class of a set with boxes: what a detector is adapted on with 1, 3, 5 or 10 shots."""

import heapq

import numpy as np

from florence_jax.data.records import Subset, summary_of
from florence_jax.data.sources.boxes import BoxColumns, BoxSource, read_columns
from florence_jax.data.sources.picture_files import some
from florence_jax.errors import UserError


def choose_shots(columns: BoxColumns, classes: int, shots: int, seed: int) -> np.ndarray:
    """Pictures until each class is in at least `shots` of them, as few-shot detection draws them (GLIP, ODinW).

    The pictures are gone through in an order that the seed draws; one is taken while any class that it shows is in
    fewer than `shots` of those taken. So a frequent class may be in more, and one with too few pictures is in all of
    its own. Crowds show no class. The cost is that of sorting the boxes, and a step for each picture taken.

    Args:
      columns: the boxes of N pictures.
      classes: how many there are.
      shots: at least 1.
      seed: of the order.

    Returns:
      int64, numbers of the pictures, ascending.

    Raises:
      UserError: for less than one shot.
    """
    if shots < 1:
        raise UserError(f"config.shots={shots} must be at least 1")
    pictures = len(columns.offsets) - 1
    # A picture's place in the order, and of each class the places where it is, ascending: rows[starts[k]:starts[k+1]].
    order = np.random.default_rng(seed).permutation(pictures)
    place = np.empty(pictures, np.int64)
    place[order] = np.arange(pictures)
    places = place[_box_pictures(columns)][~columns.crowd]
    pairs = np.unique(np.stack([columns.class_ids[~columns.crowd].astype(np.int64), places], 1), axis=0)
    starts = np.searchsorted(pairs[:, 0], np.arange(classes + 1))
    by_place = pairs[np.argsort(pairs[:, 1], kind="stable")]
    firsts = np.searchsorted(by_place[:, 1], np.arange(pictures + 1))
    # Of each class that lacks pictures the next one that shows it; the nearest of these is the next that is taken.
    following = starts[:-1].copy()
    lacking = np.full(classes, shots, np.int64)
    nearest = [(int(pairs[start, 1]), k) for k, start in enumerate(starts[:-1].tolist()) if start < starts[k + 1]]
    heapq.heapify(nearest)
    taken: list[int] = []
    while nearest:
        at, k = heapq.heappop(nearest)
        if lacking[k] < 1:
            continue
        if not taken or taken[-1] < at:
            taken.append(at)
            lacking[by_place[firsts[at] : firsts[at + 1], 0]] -= 1
        following[k] += 1
        if following[k] < starts[k + 1]:
            heapq.heappush(nearest, (int(pairs[following[k], 1]), k))
    return np.sort(order[taken]).astype(np.int64)


def _box_pictures(columns: BoxColumns) -> np.ndarray:
    """int64 (M,): the picture of each box."""
    return np.repeat(np.arange(len(columns.offsets) - 1), np.diff(columns.offsets))


def class_pictures(columns: BoxColumns, classes: int) -> np.ndarray:
    """int64 (K,): how many pictures show each class, crowds apart."""
    shown = ~columns.crowd
    pairs = np.unique(np.stack([columns.class_ids[shown], _box_pictures(columns)[shown]], 1), axis=0)
    return np.bincount(pairs[:, 0], minlength=classes)


def few_shots(source: BoxSource, shots: int, seed: int) -> Subset:
    """The pictures that `choose_shots` takes of a source; its summary says how many, and which classes have too few.

    Raises:
      UserError: for less than one shot, or where no picture shows a class.
    """
    _, _, columns = read_columns(source)
    names = source.class_names
    rows = choose_shots(columns, len(names), shots, seed)
    if not len(rows):
        raise UserError(f"{source.name}: no picture shows a class: there is nothing to learn from")
    there = class_pictures(columns, len(names))
    few = [f"{names[k]} ({there[k]})" for k in np.flatnonzero(there < shots).tolist()]
    chosen = Subset(source, rows, f"{source.name} ({shots} shots)")
    says = f"; {shots} shots of each class, seed {seed}: {len(rows):,} of {len(source):,} pictures"
    if few:
        says += f"; {len(few)} class{'es have' if len(few) > 1 else ' has'} fewer pictures: {some(few)}"
    summary = summary_of(source)
    chosen.summary = {**summary, "says": summary.get("says", source.name) + says, "shots": shots, "chosen": len(rows)}
    return chosen
