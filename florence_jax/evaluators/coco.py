"""A detector scored as COCO does: pycocotools on the very file that is written."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from florence_jax.data.box_classes import match_classes
from florence_jax.data.buckets import Bucket
from florence_jax.data.ops.geometry import boxes_to_source
from florence_jax.data.records import Source
from florence_jax.data.sources.boxes import BoxSource
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.coco_baseline import mean_box_scores
from florence_jax.evaluators.coco_check import self_check
from florence_jax.evaluators.coco_files import (
    NAMED,
    FoundBoxes,
    GroundTruth,
    found_boxes,
    json_bytes,
    make_truth,
    with_truth,
)
from florence_jax.evaluators.coco_pictures import Painter
from florence_jax.evaluators.coco_report import coco_report
from florence_jax.evaluators.coco_scores import AGNOSTIC, CocoScores, coco_scores, need_pycocotools
from florence_jax.evaluators.predictor import Predictor, image_counts

CLASSES_IN_RESULTS = 20  # a result for each class of at most so many
HOST = ("truth", "warp")  # fields that stay on the host


class CocoEvaluator(Evaluator):
    """Average precision of a detector on a source with boxes.

    Attributes:
      metric: the headline, AP.

    Results: those of pycocotools, AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, without those of
    which the test set has no boxes; 'agnostic_AP50', AP50 whatever the classes of boxes (see
    `coco_scores.one_of_each`); 'AP/NAME' of at most 20 classes; of a set in which not every class was looked for
    'AP300' and 'fixed_AP', of LVIS's also 'APr', 'APc', 'APf' and 'fixed_APr', ..., see `coco_scores`; 'images',
    'skipped' ones if any, 'boxes' and 'crowds'. A class that the detector does not know counts with AP 0.

    Args:
      source: N pictures with boxes.
      ops: up to `pad_image`. buckets: of the source.
      detect: pure function (params, batch) -> {"boxes" (B, n, 4), x1, y1, x2, y2 in pixels of the batch's pictures,
        "scores" (B, n), 0 where there is none, "labels" (B, n), numbers of `class_names`}.
      mesh, batch_size: see `Predictor`.
      class_names: of the detector. Those of the source are matched to them by name.
      name: prefix of the results, and of the files.
      train: sources of the training, for `chance`: what their mean boxes score; () for none.
      on_corrupt: 'skip' leaves unreadable pictures and their boxes out, 'error' ends the evaluation.

    Raises:
      UserError: without pycocotools; if no class of the source has a name of the detector's; as `make_truth`, and
        `self_check`, which is made at once, before anything is trained.
    """

    answers: Mapping[str, bool] = {"": True}  # words that names of boxes begin with -> whether they have classes

    def __init__(
        self,
        source: BoxSource,
        ops: str,
        buckets: Sequence[Bucket],
        detect: Callable[[Any, dict[str, jax.Array]], Mapping[str, jax.Array]],
        mesh: Mesh,
        batch_size: int,
        class_names: Sequence[str],
        name: str = "test",
        train: Sequence[BoxSource] = (),
        on_corrupt: str = "error",
    ):
        need_pycocotools()
        self.name, self.metric = name, "AP"
        self.charts = (Chart(f"{name}: average precision", {"AP": "AP", "AP50": "AP50", "classes aside": AGNOSTIC}),)
        self._source, self._buckets, self._train, self._on_corrupt = source, buckets, tuple(train), on_corrupt
        self._ops = f"{ops}|keep(image, valid, {', '.join(HOST)})"
        self._predictor = Predictor(detect, mesh, batch_size)
        records = list(source.metadata())
        self._stated = make_truth(records, source)  # by the metadata; scored is by what the records say
        self._class_of = match_classes(class_names, source.class_names)  # -1: the test set does not name it
        self.notes = [
            *_class_notes(self._stated, class_names, self._class_of),
            self_check(source, records, ops, buckets, on_corrupt),
        ]
        if jax.process_index() == 0:
            print("\n".join(f"{name}: {note}" for note in self.notes), flush=True)
        self._truth: GroundTruth | None = None
        self._found: FoundBoxes | None = None
        self._scores: CocoScores | None = None
        self._rows = np.zeros(0, np.int64)

    @property
    def sources(self) -> Sequence[Source]:
        """See `Evaluator`."""
        return (self._source,)

    @property
    def chance(self) -> Mapping[str, float]:
        """What the mean boxes of the training set score."""
        return self._mean_boxes

    @functools.cached_property
    def _mean_boxes(self) -> Mapping[str, float]:
        """See `mean_box_scores`; {} without a training set."""
        return mean_box_scores(self._stated, self._train) if self._train else {}

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        self._rows, self._truth, found = self._detect(params)
        return self._judge(self._truth, found)

    def _judge(self, truth: GroundTruth, found: Mapping[str, FoundBoxes]) -> dict[str, float]:
        """The results, of what was found by the words of `answers`."""
        self._found = found[""]
        self._scores = scores = coco_scores(truth, self._found)
        names = truth.class_names
        by_class: dict[str, float] = {}
        if len(names) <= CLASSES_IN_RESULTS:
            values = zip(names, scores.class_ap().tolist(), strict=True)
            by_class = {f"AP/{name}": value for name, value in values if not np.isnan(value)}
        crowds = int(truth.crowd.sum())
        counts = {"boxes": float(len(truth.boxes) - crowds), "crowds": float(crowds)}
        return scores.values | by_class | image_counts(self._source, self._rows) | counts

    def _detect(self, params: Any) -> tuple[np.ndarray, GroundTruth, dict[str, FoundBoxes]]:
        """Numbers of the records that could be read, what is true of them, and what was found, by `answers`.

        They are the same on every process.
        """
        numbers: list[int] = []
        truth: list[Any] = []
        parts: dict[str, list[tuple[np.ndarray, ...]]] = {word: [] for word in self.answers}
        rows = self._predictor.rows(
            params,
            with_truth(self._source),
            self._ops,
            {},
            host=HOST,
            buckets=self._buckets,
            on_corrupt=self._on_corrupt,
            what=self.name,
        )
        for row in rows:
            numbers.append(row["index"])
            truth.append(row["truth"])
            self._see(row)
            for word, of_pictures in parts.items():
                of_pictures.append(self._boxes_of(row, word))
        true = make_truth(truth, self._source)
        found = {}
        for word, of_pictures in parts.items():
            image = np.repeat(np.arange(len(truth), dtype=np.int32), [len(each[0]) for each in of_pictures])
            labels, corners, scores = (np.concatenate(column) for column in zip(*of_pictures, strict=True))
            seen = true if self.answers[word] else dataclasses.replace(true, judged=None)
            found[word] = found_boxes(image, labels, corners, scores, seen)
        return np.array(numbers, np.int64), true, found

    def _see(self, row: Mapping[str, Any]) -> None:
        """Takes from what is given for a picture what else is wanted of it."""

    def _boxes_of(self, row: Mapping[str, Any], word: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Classes of the test set, corners in pixels of the source and scores, of what has such a class."""
        boxes, scores, labels = (row[f"{word}{name}"] for name in ("boxes", "scores", "labels"))
        there = scores > 0
        classes = self._class_of[labels[there]] if self.answers[word] else np.zeros(there.sum(), np.int32)
        known = classes >= 0
        corners = boxes_to_source(boxes[there][known], row["warp"]).astype(np.float32)
        return classes[known], corners, scores[there][known]

    def report(self) -> list[str]:
        """See `coco_report`."""
        if self._truth is None or self._found is None or self._scores is None:
            return []
        painter = Painter(self._source, self._rows)
        return coco_report(self.name, self._truth, self._found, self._scores, self._mean_boxes, self.notes, painter)

    def files(self) -> Mapping[str, bytes]:
        """What was found and what is true, both in COCO's format: pycocotools gives their numbers again."""
        if self._truth is None or self._found is None:
            return {}
        return {
            f"detections_{self.name}.json": json_bytes(self._found.rows(self._truth)),
            f"ground_truth_{self.name}.json": json_bytes(self._truth.dataset()),
        }


def _class_notes(truth: GroundTruth, class_names: Sequence[str], class_of: np.ndarray) -> list[str]:
    """What is to be said of the classes.

    Raises:
      UserError: if the detector knows none of the source's.
    """
    known = np.zeros(len(truth.class_names), bool)
    known[class_of[class_of >= 0]] = True
    if not known.any():
        raise UserError(
            f"the detector knows no class of the test set by its name: it knows {_some(class_names)}, the test set has "
            f"{_some(truth.class_names)}; give the classes the same names"
        )
    counts = truth.counts()
    unknown = [name for name, there, count in zip(truth.class_names, known, counts, strict=True) if count and not there]
    empty = [name for name, count in zip(truth.class_names, counts, strict=True) if not count]
    other = [name for name, place in zip(class_names, class_of, strict=True) if place < 0]
    notes = []
    if unknown:
        notes.append(f"{len(unknown)} classes with boxes that the detector does not know have AP 0: {_some(unknown)}")
    if empty:
        notes.append(f"{len(empty)} classes have no boxes in the test set and count nowhere: {_some(empty)}")
    if other:
        notes.append(
            f"what is found of {len(other)} classes that the test set does not name is left out: {_some(other)}"
        )
    return notes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
