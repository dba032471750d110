"""The self-check: the true boxes of a test set, fed through the writer of results, must score AP 1.000."""

from collections.abc import Sequence

import numpy as np

from florence_jax.data.buckets import Bucket
from florence_jax.data.ops.geometry import boxes_to_source
from florence_jax.data.pipeline import eval_stream
from florence_jax.data.records import Record, Subset, evenly
from florence_jax.data.sources.boxes import BoxSource
from florence_jax.errors import UserError
from florence_jax.evaluators.coco_files import NAMED, FoundBoxes, GroundTruth, found_boxes, make_truth, with_truth
from florence_jax.evaluators.coco_scores import ALL_SIZES, coco_data, coco_eval

CHECKED_PICTURES = 32  # that are read, and taken through the ops and back
PAIRS = 80_000  # of pictures and classes: a few seconds' work
MOST_BOXES = 100  # of a picture that count, see COCOeval's maxDets
LEAST = 0.99  # AP below which scoring makes no sense


def sample_rows(pictures: int, classes: int) -> np.ndarray:
    """Rows of the pictures that are looked at, all of a small test set: the cost is bounded."""
    return evenly(pictures, max(PAIRS // max(classes, 1), 2 * CHECKED_PICTURES))


def self_check(
    source: BoxSource,
    records: Sequence[Record],
    ops: str,
    buckets: Sequence[Bucket] = (),
    on_corrupt: str = "error",
) -> str:
    """Scores true boxes as if they were found; some go with their pictures through the ops, and back to the source.

    Pictures with more than 100 boxes are left out: no more are counted of a picture.

    Args:
      source: what is scored on. records: its metadata.
      ops, buckets, on_corrupt: as for scoring; the ops go up to `pad_image`.

    Returns:
      A sentence for people.

    Raises:
      UserError: for an AP below .99, with the ids of pictures and boxes that are not found again.
    """
    rows = sample_rows(len(records), len(source.class_names))
    rows = np.array([row for row in rows.tolist() if len(records[row]["boxes"]) <= MOST_BOXES], np.int64)
    read = rows[evenly(len(rows), CHECKED_PICTURES)] if len(rows) else rows
    written = {records[row]["key"]: (records[row], records[row]["boxes"], records[row]["class_ids"]) for row in rows}
    for row in read.tolist():  # it may turn out that it cannot be read
        del written[records[row]["key"]]
    written |= _round_trips(source, ops, buckets, on_corrupt, read)
    if not written:
        return "self-check: no picture with at most 100 boxes"
    true, corners, labels = zip(*written.values(), strict=True)
    truth = make_truth(true, source)
    image = np.repeat(np.arange(len(true)), [len(each) for each in labels])
    found = found_boxes(image, np.concatenate(labels), np.concatenate(corners), np.ones(len(image)), truth)
    lost, ap = _lost(truth, found)
    says = f"self-check: true boxes of {len(truth.keys):,} pictures, written as results, score AP {ap:.3f}"
    if not len(lost):
        return says
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
    return says


def _round_trips(
    source: BoxSource, ops: str, buckets: Sequence[Bucket], on_corrupt: str, rows: np.ndarray
) -> dict[str, tuple[Record, np.ndarray, np.ndarray]]:
    """By key (truth, corners, labels) of the pictures that can be read, through the ops and back."""
    if not len(rows):
        return {}
    # In a subset the rows have other numbers.
    places = [Bucket(np.flatnonzero(np.isin(rows, bucket.rows)), bucket.size) for bucket in buckets]
    host = ("truth", "warp", "boxes", "class_ids")
    stream = eval_stream(
        Subset(with_truth(source), rows, source.name),
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
            for place in np.flatnonzero(batch["mask"]).tolist():
                truth, warp, boxes, labels = (batch[name][place] for name in host)
                corners = boxes_to_source(np.asarray(boxes, np.float64).reshape(-1, 4), warp)
                found[truth["key"]] = truth, corners, np.asarray(labels, np.int32)
    return found


def _lost(truth: GroundTruth, found: FoundBoxes) -> tuple[np.ndarray, float]:
    """True boxes that match nothing at IoU .95, and the AP."""
    result = coco_eval(coco_data(truth, found), **ALL_SIZES)
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
