"""Scoring of classifiers: top-1, top-5, mean per class, VOC's 11-point mAP, two classes, predictions.csv, report."""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging

from florence_jax.data.classes import ClassIndex
from florence_jax.data.records import Source
from florence_jax.errors import UserError
from florence_jax.evaluators.base import OF_IMAGES, Chart, Evaluator, Payload
from florence_jax.evaluators.classification_report import (
    classes_table,
    confusion_html,
    examples_html,
    several_html,
    two_classes_html,
)
from florence_jax.evaluators.metrics import (
    METRIC_NAMES,
    TOP,
    Answers,
    answers,
    average_precisions,
    class_targets,
    confusion_matrix,
    mean_per_class,
    roc_auc,
    sigmoid,
    softmax,
    two_classes,
)
from florence_jax.evaluators.predictor import Embedder, image_counts
from florence_jax.files import csv_bytes

SCORE_ROWS = 4096
PREDICTIONS_FILE = "predictions.csv"
# Below this many standard errors above chance, a number is called near chance.
NEAR_CHANCE = 2.0
HINT = (
    "that the class names belong to the labels, the weights and the tokenizer to each other, and that --config.init is "
    "of a trained model"
)


class Score(NamedTuple):
    """The headline number with what guessing scores, and the standard error of guessing."""

    value: float
    chance: float
    error: float

    def near_chance(self) -> bool:
        """Whether guessing would score this well now and then."""
        return not self.value > self.chance + NEAR_CHANCE * self.error


def check_metric(metric: str, classes: ClassIndex, source: str) -> None:
    """Raises `UserError` for an unknown metric, or one that does not fit the classes of the named source."""
    if metric not in METRIC_NAMES:
        raise UserError(f"metric {metric!r} is unknown; choose one of {', '.join(METRIC_NAMES)}")
    if classes.multi and metric != "voc_map":
        raise UserError(f"{source} has several classes an image: its metric is voc_map, not {metric}")
    if metric == "roc_auc" and len(classes) != 2:
        raise UserError(f"metric roc_auc is for two classes; {source} has {len(classes)}")


class Scorer(Protocol):
    """Turns parameters into scores of classes."""

    def __call__(self, params: Any, features: np.ndarray) -> Callable[[int, int], np.ndarray]:
        """Returns a function (start, stop) -> float32 (stop - start, K), the scores of those rows of the features."""


class Predicted(NamedTuple):
    """What was answered about N images, as predictions.csv has it.

    Attributes:
      keys: of the records. labels: int (N,), or int8 (N, K), what is right, as `ClassIndex.target` gives it.
      classes: int (N,), the best class of each. scores: float (N,), its score, as people read it.
    """

    keys: Iterable[str]
    labels: np.ndarray
    classes: np.ndarray
    scores: np.ndarray

    def table(self, names: Sequence[str]) -> bytes:
        """CSV: file, label (several joined by '|'), prediction, score."""
        if self.labels.ndim == 2:
            texts = ["|".join(names[k] for k in np.flatnonzero(row > 0).tolist()) for row in self.labels]
        else:
            texts = [names[k] for k in self.labels.tolist()]
        called = (names[k] for k in self.classes.tolist())
        scores = (f"{score:.6f}" for score in self.scores)
        return csv_bytes(("file", "label", "prediction", "score"), zip(self.keys, texts, called, scores, strict=True))


class ClassificationMetrics:
    """Metrics of a classifier's scores on a labelled source, for the terminal, the report and predictions.csv.

    Args:
      name: for messages and titles.
      source: the images, for the pictures of the report.
      names: of the K classes; of two, the second is the positive one.
      metric: one of METRIC_NAMES, the headline.
      multi: whether an image may have several classes.
      note: how labels and names were joined, for people.
      readable: float (n, K) -> float (n, K), what people are shown of the scores; None: their probabilities, by the
        softmax over classes or, with several classes an image, the sigmoid of each.
      payload: what the source has instead of images.

    Attributes:
      chance: what guessing scores, by the names of the results, after the first call.
      report: HTML fragments about the last call: the warning if the headline is near chance, or near what the largest
        class alone gives; two classes; the confusion matrix, accuracy by class, right and wrong images, or of several
        classes an image those that are told best and worst.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        names: Sequence[str],
        metric: str,
        multi: bool = False,
        note: str = "",
        readable: Callable[[np.ndarray], np.ndarray] | None = None,
        payload: Payload = OF_IMAGES,
    ):
        self.name, self.metric, self._payload = name, metric, payload
        self._source, self._names, self._multi, self._note = source, list(names), multi, note
        self._readable = readable or (sigmoid if multi else softmax)
        self.chance: dict[str, float] = {}
        self.report: list[str] = []
        self._warned = False
        self._predicted: Predicted | None = None

    def __call__(
        self,
        score_chunks: Iterable[np.ndarray],
        labels: np.ndarray,
        index: np.ndarray,
        keys: Iterable[str],
        hint: str | None = "",
    ) -> dict[str, float]:
        """The metric, and for one class an image 'top1', 'top5', 'mean_per_class', those of `_of_two` and, where the
        classes are out of balance, 'majority_share'; `image_counts`.

        Args:
          score_chunks: float (n, K) arrays, N rows together.
          labels: int (N,), or int8 (N, K) as `ClassIndex.target` gives them.
          index: (N,), rows of the source. keys: N, of its records.
          hint: what to check if the headline is near chance; None: that is no mistake, nothing is said of it.
        """
        self.report = []
        judged: dict[str, Score] = {}
        values: dict[str, float] = {}
        shares: dict[str, float] = {}
        largest = None
        two = len(self._names) == 2 and not self._multi
        if two or self.metric == "voc_map":
            scores = np.concatenate(list(score_chunks))
            score_chunks = iter([scores])
        if self.metric == "voc_map":
            judged["voc_map"] = self._ranking(scores, labels)
        if self._multi:
            best, shown = scores.argmax(1), self._readable(scores)
            self._predicted = Predicted(keys, labels, best, shown[np.arange(len(best)), best])
            self.report.append(several_html(self.name, self._source, shown, labels, index, self._names, self._payload))
        else:
            given = answers(score_chunks, labels, self._readable)
            self._predicted = Predicted(keys, labels, given.top[:, 0], given.scores[:, 0])
            confusion = confusion_matrix(labels, given.top[:, 0], len(self._names))
            judged |= self._single(given, confusion)
            if two:
                judged["roc_auc"], values = self._of_two(scores, given)
            largest = self._majority(judged["top1"], confusion.sum(1))
            shares = {} if largest is None else {"majority_share": largest.chance}
            self.report += self._pictures(given, confusion, index)
        self.chance |= {name: score.chance for name, score in judged.items()}
        if hint is not None:
            self._warn(judged[self.metric], hint, largest)
        headline = {self.metric: judged.pop(self.metric).value}
        others = {name: score.value for name, score in judged.items()}
        return headline | shares | others | values | image_counts(self._source, index, self._payload.plural)

    def files(self) -> dict[str, bytes]:
        """predictions.csv of the last call, see `Predicted.table`."""
        return {} if self._predicted is None else {PREDICTIONS_FILE: self._predicted.table(self._names)}

    def _single(self, given: Answers, confusion: np.ndarray) -> dict[str, Score]:
        classes, count = len(self._names), len(given.labels)
        per_class = confusion.sum(1)
        present = per_class[per_class > 0]
        values = {"top1": (given.ranks == 0).mean(), "mean_per_class": mean_per_class(confusion)}
        chances = {"top1": 1 / classes, "mean_per_class": 1 / classes}
        if classes > TOP:
            values["top5"], chances["top5"] = (given.ranks < TOP).mean(), TOP / classes
        # The variance of a mean of class means is that of its classes' means over their squared number.
        spread = {name: 1 / count for name in values} | {"mean_per_class": (1 / present).sum() / len(present) ** 2}
        return {
            name: Score(float(value), chances[name], math.sqrt(chances[name] * (1 - chances[name]) * spread[name]))
            for name, value in values.items()
        }

    def _of_two(self, scores: np.ndarray, given: Answers) -> tuple[Score, dict[str, float]]:
        """The area under the ROC curve; 'precision', 'recall', 'f1', 'best_f1', 'best_threshold', see `TwoClasses`."""
        positive = given.labels == 1
        shown = self._readable(scores.astype(np.float64))[:, 1]
        found = two_classes(shown, positive, given.top[:, 0] == 1)
        sizes = int(positive.sum()), int((~positive).sum())
        error = math.sqrt((sum(sizes) + 1) / (12 * max(sizes[0] * sizes[1], 1)))
        share = sizes[0] / sum(sizes)
        # What guessing gives; best_f1 is never below that of calling every image positive.
        self.chance |= {"precision": share, "best_f1": 2 * share / (1 + share)}
        self.report.append(two_classes_html(self.name, self._names, found))
        return Score(roc_auc(scores[:, 1] - scores[:, 0], positive), 0.5, error), found._asdict()

    def _ranking(self, scores: np.ndarray, labels: np.ndarray) -> Score:
        """VOC's metric, of the whole ranking of the images."""
        targets = class_targets(labels, len(self._names))
        precisions = average_precisions(scores, targets)
        positives, judged = (targets > 0).sum(0), (targets >= 0).sum(0)
        there = positives > 0
        if not there.any():
            raise UserError(f"{self._source.name}: no image has one of the {len(self._names)} classes")
        base = positives[there] / judged[there]
        # A random order has about the precision of the class's share; the spread is that of the positives' places.
        error = math.sqrt((base * (1 - base) / positives[there]).sum()) / there.sum()
        self.report.append(classes_table(self.name, self._names, precisions, positives, "AP"))
        return Score(float(np.nanmean(precisions)), float(base.mean()), float(error))

    def _majority(self, top1: Score, counts: np.ndarray) -> Score | None:
        """Top-1 beside what always answering the largest class scores, where the classes are out of balance."""
        count = int(counts.sum())
        share = float(counts.max() / count)
        balanced = Score(share, top1.chance, top1.error).near_chance()
        return None if balanced else Score(top1.value, share, math.sqrt(share * (1 - share) / count))

    def _warn(self, headline: Score, hint: str, largest: Score | None) -> None:
        what = f"{self.name}: {self.metric} {headline.value:.3f}"
        if headline._replace(value=1.0).near_chance():
            few = f"{what}: these are too few {self._payload.plural}"
            text = f"{few} to tell any result from chance ({headline.chance:.3f})"
        elif headline.near_chance():
            text = f"{what} is near chance ({headline.chance:.3f}): check {hint}"
        elif largest is not None and self.metric == "top1" and largest.near_chance():
            text = (
                f"{what} is near or below what always answering with the largest class scores ({largest.chance:.3f}): "
                "look at mean_per_class, which gains nothing by that"
            )
        else:
            return
        if not self._warned:
            logging.warning("%s", text)
        self._warned = True  # not again in every epoch; the report always has it
        self.report.insert(0, f'<p class="warning">{html.escape(text)}</p>')

    def _pictures(self, given: Answers, confusion: np.ndarray, index: np.ndarray) -> list[str]:
        counts = confusion.sum(1)
        share = np.where(counts > 0, np.diag(confusion) / np.maximum(counts, 1), np.nan)
        return [
            f"<p>{html.escape(self._note)}</p>" if self._note else "",
            confusion_html(self.name, confusion, self._names),
            classes_table(self.name, self._names, share, counts, "accuracy", self._payload.plural),
            examples_html(self.name, self._source, given, index, self._names, self._payload),
        ]


class Classification(Evaluator):
    """A classifier on a labelled source. Results: see `ClassificationMetrics`.

    Args:
      name: prefix of the results.
      source: the images. classes: their classes, see `data.classes.open_classes`.
      ops: image ops, such as 'decode|resize(224)|center_crop(224)'.
      embedder: gives the features of the images.
      scorer: turns them into class scores.
      metric: one of METRIC_NAMES; 'voc_map' is the one for several classes an image, 'roc_auc' for two classes.
      on_corrupt: 'skip' leaves unreadable images out, 'error' ends the evaluation.
      readable: see `ClassificationMetrics`.

    Raises:
      UserError: for an unknown metric, or one that does not fit the classes.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        classes: ClassIndex,
        ops: str,
        embedder: Embedder,
        scorer: Scorer,
        metric: str = "top1",
        on_corrupt: str = "error",
        readable: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        check_metric(metric, classes, source.name)
        self.name, self.metric = name, metric
        self.charts = (Chart(f"{name}: {metric}", {"": metric}),)
        self._source, self._classes, self._embedder, self._scorer = source, classes, embedder, scorer
        payload = embedder.payload
        self._ops, self._on_corrupt = f"{ops}|class_label|keep({payload.field}, label, key)", on_corrupt
        self._metrics = ClassificationMetrics(
            name, source, classes.first_names, metric, classes.multi, classes.note, readable, payload
        )

    @property
    def sources(self) -> Sequence[Source]:
        """See `Evaluator`."""
        return (self._source,)

    @property
    def chance(self) -> dict[str, float]:
        """What guessing scores."""
        return self._metrics.chance

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        context = {"classes": self._classes}
        images = self._embedder.images(params, self._source, self._ops, context, self._on_corrupt, keys=True)
        labels, count = images["label"], len(images["label"])
        score = self._scorer(params, images["embedding"])
        chunks = (score(i, min(i + SCORE_ROWS, count)) for i in range(0, count, SCORE_ROWS))
        return self._metrics(chunks, labels, images["index"], images["key"], HINT)

    def report(self) -> list[str]:
        """See `ClassificationMetrics`."""
        return self._metrics.report

    def files(self) -> dict[str, bytes]:
        """predictions.csv."""
        return self._metrics.files()
