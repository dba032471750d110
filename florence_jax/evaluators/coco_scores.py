"""COCO's numbers, by pycocotools, on what the files say."""

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from florence_jax.boxes import iou
from florence_jax.errors import UserError
from florence_jax.evaluators.coco_files import FoundBoxes, GroundTruth

INSTALL = 'scoring of boxes needs pycocotools: pip install ".[detect]"'
AREAS = {"s": "small", "m": "medium", "l": "large"}  # endings of metrics
# Those of COCOeval.summarize, in its order.
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
AGNOSTIC = "agnostic_AP50"
LVIS_AP, FIXED_AP = "AP300", "fixed_AP"
LVIS_BOXES, FIXED_BOXES = 300, 10_000  # of a picture; of a class in all pictures
FREQUENCIES = "rcf"  # endings of metrics of LVIS's rare, common and frequent classes
ONE_THING = 0.6  # IoU above which two boxes of different classes say the same, where classes do not count
ALL_SIZES = {"areaRng": [[0, 1e10]], "areaRngLbl": ["all"]}  # parameters of COCOeval that leave sizes aside


class CocoScores(NamedTuple):
    """What a test set with K classes scores.

    Attributes:
      values: COCO_METRICS and AGNOSTIC; those of which there are no boxes, such as large ones, are left out. Of a set
        in which not every class was looked for also LVIS_AP and FIXED_AP, and the same of the rare, common and frequent
        classes, where the set says which those are: 'APr', 'APc', 'APf', 'fixed_APr', ...
      precision: float64 (10, 101, K), at IoU .50, .55, ... .95 and recall 0, .01, ... 1; NaN for classes without boxes.
    """

    values: dict[str, float]
    precision: np.ndarray

    def class_ap(self, threshold: int | None = None) -> np.ndarray:
        """float64 (K,): AP of each class, or AP at one of the ten thresholds; NaN without boxes."""
        chosen = self.precision if threshold is None else self.precision[threshold][None]
        return chosen.mean(axis=(0, 1))


def need_pycocotools() -> None:
    """Raises UserError, with the line to install it, where pycocotools is missing."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError(INSTALL)


def coco_scores(truth: GroundTruth, found: FoundBoxes, by_size: bool = True) -> CocoScores:
    """The numbers that pycocotools prints of the two files; AGNOSTIC is its AP50 with `useCats=0` of `one_of_each`.

    Without `by_size` those of small, medium and large boxes and LVIS's are left out: a quarter of the time.
    """
    data = coco_data(truth, found)
    # Classes without a box have no AP: leaving them out changes no mean.
    there = np.unique(truth.labels)
    precision = np.full((10, 101, len(truth.class_names)), np.nan)
    values: dict[str, float] = {}
    if len(there):
        sizes: dict[str, Any] = {} if by_size else ALL_SIZES
        result = coco_eval(data, catIds=[truth.category_ids[k] for k in there.tolist()], **sizes)
        with silent():
            result.summarize()
        values = dict(zip(COCO_METRICS, result.stats.tolist(), strict=True))
        values[AGNOSTIC] = agnostic_ap50(coco_data(truth, one_of_each(found)))
        if truth.judged is not None and by_size:
            values |= _lvis_values(truth, data, found)
        order = _numbers_of_classes(truth)
        numbers = result.eval["precision"][:, :, :, 0, -1]
        precision[:, :, [order[i] for i in result.params.catIds]] = np.where(numbers < 0, np.nan, numbers)
    return CocoScores({name: value for name, value in values.items() if value >= 0}, precision)


def best_of_classes(found: FoundBoxes, most: int = FIXED_BOXES) -> FoundBoxes:
    """The best boxes of each class in all pictures (Dave et al. 2021, arXiv 2102.01066, "fixed AP")."""
    order = np.lexsort((-found.scores, found.labels))
    labels = found.labels[order]
    place = np.arange(len(order)) - np.searchsorted(labels, labels)
    return found.subset(np.sort(order[place < most]))


def _lvis_values(truth: GroundTruth, data: tuple[Any, Any], found: FoundBoxes) -> dict[str, float]:
    """LVIS_AP and FIXED_AP, of all classes and of those of each frequency; -1 without boxes."""
    fixed = coco_data(truth, best_of_classes(found))
    order, values = _numbers_of_classes(truth), {}
    for name, ending, given, most in (
        (LVIS_AP, "AP", data, LVIS_BOXES),
        (FIXED_AP, FIXED_AP, fixed, max(len(found.scores), 1)),
    ):
        result = coco_eval(given, maxDets=[most], **ALL_SIZES)
        precision = result.eval["precision"][:, :, :, 0, 0]
        letters = [truth.frequencies[order[i]] if truth.frequencies else "" for i in result.params.catIds]
        values[name] = _mean_of(precision)
        for letter in FREQUENCIES:
            values[ending + letter] = _mean_of(precision[:, :, np.array(letters) == letter])
    return values


def _mean_of(precision: np.ndarray) -> float:
    """Mean over the classes that have boxes, in which it is not -1; -1 for none."""
    some = precision[precision > -1]
    return float(some.mean()) if len(some) else -1.0


def _numbers_of_classes(truth: GroundTruth) -> dict[Any, int]:
    return {category_id: k for k, category_id in enumerate(truth.category_ids)}


def one_of_each(found: FoundBoxes) -> FoundBoxes:
    """What was found without the boxes that a better one of any class covers: greedy non-maximum suppression.

    A detector that is not sure of the class of a thing gives a box of each: where classes do not count they are one.
    """
    order = np.lexsort((-found.scores, found.image))
    corners = np.concatenate([found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]], axis=1)
    kept: list[np.ndarray] = [np.zeros(0, np.int64)]
    for rows in np.split(order, np.flatnonzero(np.diff(found.image[order])) + 1):
        same = iou(corners[rows, None], corners[None, rows]) > ONE_THING
        alive = np.ones(len(rows), bool)
        for place in range(len(rows)):
            if alive[place]:
                alive[place + 1 :] &= ~same[place, place + 1 :]
        kept.append(rows[alive])
    return found.subset(np.sort(np.concatenate(kept)))


def agnostic_ap50(data: tuple[Any, Any]) -> float:
    """AP at IoU .5 whatever the classes; -1 without boxes."""
    return _mean_of(coco_eval(data, useCats=0, iouThrs=np.array([0.5]), **ALL_SIZES).eval["precision"][..., -1])


def coco_data(truth: GroundTruth, found: FoundBoxes) -> tuple[Any, Any]:
    """Both as pycocotools has them in memory, what was found as by its loadRes (which fails for an empty file)."""
    need_pycocotools()
    dataset = truth.dataset()
    rows = list(found.rows(truth))
    for number, row in enumerate(rows, 1):
        _, _, width, height = row["bbox"]
        row |= {"id": number, "area": width * height, "iscrowd": 0}
    return _indexed(dataset), _indexed(dataset | {"annotations": rows})


def _indexed(dataset: dict[str, Any]) -> Any:
    from pycocotools.coco import COCO

    with silent():
        data = COCO()
        data.dataset = dataset
        data.createIndex()
    return data


def coco_eval(data: tuple[Any, Any], **params: Any) -> Any:
    """A COCOeval of boxes that has been evaluated and accumulated.

    Args:
      data: see `coco_data`.
      params: that differ from the usual ones, by their names there.
    """
    from pycocotools.cocoeval import COCOeval

    with silent():
        result = COCOeval(*data, "bbox")
        for name, value in params.items():
            setattr(result.params, name, value)
        result.evaluate()
        result.accumulate()
    return result


def silent() -> contextlib.AbstractContextManager[Any]:
    """Without what pycocotools prints."""
    return contextlib.redirect_stdout(io.StringIO())


def absent_words(names: Sequence[str]) -> str:
    """Says why metrics are absent: 'no APl and ARl: the test set has no large boxes'; '' for none."""
    sizes = [AREAS[ending] for ending in AREAS if any(name in (f"AP{ending}", f"AR{ending}") for name in names)]
    if not sizes:
        return ""
    return f"no {' and '.join(names)}: the test set has no {' and no '.join(sizes)} boxes"
