"""The self-check: the true boxes of a test set, fed through the writer of results, must score AP 1.000."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from florence_jax.data.buckets import Bucket
from florence_jax.data.ops.geometry import boxes_to_source
from florence_jax.data.pipeline import eval_stream
from florence_jax.data.records import Source, Subset, evenly
from florence_jax.errors import UserError
from florence_jax.evaluators.coco_files import NAMED, FoundBoxes, GroundTruth, found_boxes
from florence_jax.evaluators.coco_scores import coco_data, coco_eval

CHECKED_PICTURES = 32  # that are read, and taken through the ops and back
PAIRS = 160_000  # of pictures and classes: a second's work
MOST_BOXES = 100  # of a picture that count, see COCOeval's maxDets
LEAST = 0.99  # AP below which scoring makes no sense


class SelfCheck(NamedTuple):
    """What came of it: `ap`, rounded to three digits; `says`: a sentence for people."""

    ap: float
    says: str


def sample_rows(truth: GroundTruth) -> np.ndarray:
    """Rows of the pictures that are looked at, all of a small test set: the cost is bounded."""
    count = max(PAIRS // max(len(truth.class_names), 1), 2 * CHECKED_PICTURES)
    return evenly(len(truth.keys), count) if truth.keys else np.zeros(0, np.int64)


def self_check(
    truth: GroundTruth, source: Source, ops: str, buckets: Sequence[Bucket] = (), on_corrupt: str = "error"
) -> SelfCheck:
    """Scores true boxes as if they were found; some go with their pictures through the ops, and back to the source.

    Pictures with more than 100 boxes are left out: no more are counted of a picture.

    Args:
      truth: of `source`.
      source, ops, buckets, on_corrupt: as for scoring; the ops go up to `pad_image`.

    Raises:
      UserError: for an AP below .99, with the ids of pictures and boxes that are not found again.
    """
    crowded = np.bincount(truth.image, minlength=len(truth.keys)) > MOST_BOXES
    rows = sample_rows(truth)
    rows = rows[~crowded[rows]]
    read = rows[evenly(len(rows), CHECKED_PICTURES)] if len(rows) else rows
    tried = {truth.keys[row] for row in read.tolist()}
    trips = _round_trips(source, ops, buckets, on_corrupt, read)
    truth = truth.subset(rows[[truth.keys[row] not in tried or truth.keys[row] in trips for row in rows.tolist()]])
    if truth.crowd.all():
        return SelfCheck(np.nan, "self-check: no boxes to look for")
    place = {key: row for row, key in enumerate(truth.keys)}
    left = ~np.isin(truth.image, [place[key] for key in trips])
    corners = np.concatenate([truth.boxes[:, :2], truth.boxes[:, :2] + truth.boxes[:, 2:]], axis=1)
    parts = [(truth.image[left], truth.labels[left], corners[left])]
    parts += [(np.full(len(labels), place[key]), labels, boxes) for key, (labels, boxes) in trips.items()]
    image, labels, corners = (np.concatenate(column) for column in zip(*parts, strict=True))
    found = found_boxes(image, labels, corners, np.ones(len(image)), truth)
    lost, ap = _lost(truth, found)
    says = f"self-check: true boxes of {len(truth.keys):,} pictures, written as results, score AP {ap:.3f}"
    if not len(lost):
        return SelfCheck(ap, says)
    total = int((~truth.crowd).sum())
    named = "; ".join(
        f"picture {truth.image_ids[truth.image[box]]}, {truth.class_names[truth.labels[box]]} at "
        f"{truth.boxes[box].round(1).tolist()} (x, y, width, height)"
        for box in lost[:NAMED].tolist()
    )
    says += f", not 1.000: {len(lost)} of {total} boxes are not found again: {named}"
    if ap < LEAST:
        raise UserError(
            f"{source.name}: {says}; they do not lie in the pictures as they are read, or several are one. Mend the "
            "file: --config=configs/detect.py:protocol=check --config.data.test=DATA lists what is wrong"
        )
    return SelfCheck(ap, says)


def _round_trips(
    source: Source, ops: str, buckets: Sequence[Bucket], on_corrupt: str, rows: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By key the (labels, corners) of the true boxes of the pictures that can be read, through the ops and back."""
    if not len(rows):
        return {}
    # In a subset the rows have other numbers.
    places = [Bucket(np.flatnonzero(np.isin(rows, bucket.rows)), bucket.size) for bucket in buckets]
    host = ("key", "warp", "boxes", "class_ids")
    stream = eval_stream(
        Subset(source, rows, source.name),
        f"{ops}|keep(image, {', '.join(host)})",
        {},
        batch_size=1,
        buckets=[bucket for bucket in places if len(bucket.rows)],
        host=host,
        on_corrupt=on_corrupt,
    )
    found = {}
    with stream:
        for batch in stream:
            for key, warp, boxes, labels in zip(*(batch[name] for name in host), strict=True):
                if key is not None:  # it could be read
                    corners = boxes_to_source(np.asarray(boxes, np.float64).reshape(-1, 4), warp)
                    found[str(key)] = np.asarray(labels, np.int32).reshape(-1), corners
    return found


def _lost(truth: GroundTruth, found: FoundBoxes) -> tuple[np.ndarray, float]:
    """True boxes that match nothing at IoU .95, and the AP."""
    result = coco_eval(coco_data(truth, found), areaRng=[[0, 1e10]], areaRngLbl=["all"])
    numbers = result.eval["precision"][..., 0, -1]
    lost = [
        gt - 1
        for image in result.evalImgs
        if image is not None
        for gt, match, ignore in zip(image["gtIds"], image["gtMatches"][-1], image["gtIgnore"], strict=True)
        if not match and not ignore
    ]
    some = numbers[numbers > -1]
    return np.array(sorted(lost), np.int64), float(some.mean().round(3)) if len(some) else 1.0
