"""Scoring of classifiers: top-1, top-5, mean per class, VOC's 11-point mAP, ROC AUC, confusion matrix, report."""

import html
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from absl import logging
from PIL import Image

from florence_jax.data.classes import ClassIndex
from florence_jax.data.records import Source, record_thumbnail
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator
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
)
from florence_jax.evaluators.predictor import Embedder, image_counts
from florence_jax.page import GridCell, matches_html
from florence_jax.pictures import data_uri

SCORE_ROWS = 4096
# Below this many standard errors above chance, a number is called near chance.
NEAR_CHANCE = 2.0
TABLE_CLASSES = 20  # a confusion matrix of more classes is drawn as a picture
EXAMPLE_ROWS = 6
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


class ClassificationMetrics:
    """Metrics of a classifier's scores on a labelled source, for the terminal and for the report.

    Args:
      name: for messages and titles.
      source: the images, for the pictures of the report.
      names: of the K classes.
      metric: one of METRIC_NAMES, the headline.
      multi: whether an image may have several classes.
      note: how labels and names were joined, for people.

    Attributes:
      chance: what guessing scores, by the names of the results, after the first call.
      report: HTML fragments about the last call: the warning if the headline is near chance, the confusion matrix,
        accuracy by class, right and wrong images.
    """

    def __init__(
        self, name: str, source: Source, names: Sequence[str], metric: str, multi: bool = False, note: str = ""
    ):
        self.name, self.metric = name, metric
        self._source, self._names, self._multi, self._note = source, list(names), multi, note
        self.chance: dict[str, float] = {}
        self.report: list[str] = []
        self._warned = False

    def __call__(
        self, score_chunks: Iterable[np.ndarray], labels: np.ndarray, index: np.ndarray, hint: str = ""
    ) -> dict[str, float]:
        """The metric, 'top1', 'top5', 'mean_per_class' (for one class an image), 'images'.

        Args:
          score_chunks: float (n, K) arrays, N rows together.
          labels: int (N,), or int8 (N, K) as `ClassIndex.target` gives them.
          index: (N,), rows of the source.
          hint: what to check if the headline is near chance.
        """
        results: dict[str, float] = {}
        self.report = []
        if self.metric in ("voc_map", "roc_auc"):
            scores = np.concatenate(list(score_chunks))
            headline = self._whole(scores, labels)
            results[self.metric] = headline.value
            score_chunks = iter([scores])
        if not self._multi:
            given = answers(score_chunks, labels)
            confusion = confusion_matrix(labels, given.top[:, 0], len(self._names))
            every = self._single(given, confusion)
            headline = headline if results else every[self.metric]
            self.report += self._pictures(given, confusion, index)
            results |= {name: every[name].value for name in sorted(every, key=lambda name: name != self.metric)}
            self.chance |= {name: score.chance for name, score in every.items()}
        self.chance[self.metric] = headline.chance
        self._warn(headline, hint)
        return results | {"images": float(len(labels))}

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

    def _whole(self, scores: np.ndarray, labels: np.ndarray) -> Score:
        """Metrics of the whole ranking of the images."""
        if self.metric == "roc_auc":
            positive = labels == 1
            sizes = int(positive.sum()), int((~positive).sum())
            error = math.sqrt((sum(sizes) + 1) / (12 * max(sizes[0] * sizes[1], 1)))
            return Score(roc_auc(scores[:, 1] - scores[:, 0], positive), 0.5, error)
        targets = class_targets(labels, len(self._names))
        precisions = average_precisions(scores, targets)
        positives, judged = (targets > 0).sum(0), (targets >= 0).sum(0)
        there = positives > 0
        if not there.any():
            raise UserError(f"{self._source.name}: no image has one of the {len(self._names)} classes")
        base = positives[there] / judged[there]
        # A random order has about the precision of the class's share; the spread is that of the positives' places.
        error = math.sqrt((base * (1 - base) / positives[there]).sum()) / there.sum()
        self.report.append(_classes_table(self.name, self._names, precisions, positives, "AP"))
        return Score(float(np.nanmean(precisions)), float(base.mean()), float(error))

    def _warn(self, headline: Score, hint: str) -> None:
        if not headline.near_chance():
            return
        text = f"{self.name}: {self.metric} {headline.value:.3f} is near chance ({headline.chance:.3f}): check {hint}"
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
            _classes_table(self.name, self._names, share, counts, "accuracy"),
            examples_html(self.name, self._source, given, index, self._names),
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
    ):
        check_metric(metric, classes, source.name)
        self.name, self.metric = name, metric
        self.charts = (Chart(f"{name}: {metric}", {"": metric}),)
        self._source, self._classes, self._embedder, self._scorer = source, classes, embedder, scorer
        self._ops, self._on_corrupt = f"{ops}|class_label|keep(image, label)", on_corrupt
        self._metrics = ClassificationMetrics(name, source, classes.first_names, metric, classes.multi, classes.note)

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
        images = self._embedder.images(params, self._source, self._ops, {"classes": self._classes}, self._on_corrupt)
        labels, count = images["label"], len(images["label"])
        score = self._scorer(params, images["embedding"])
        chunks = (score(i, min(i + SCORE_ROWS, count)) for i in range(0, count, SCORE_ROWS))
        return self._metrics(chunks, labels, images["index"], HINT) | image_counts(self._source, images["index"])

    def report(self) -> list[str]:
        """See `ClassificationMetrics`."""
        return self._metrics.report


# -- report -----------------------------------------------------------------------------------------------------------


def confusion_html(title: str, confusion: np.ndarray, names: Sequence[str]) -> str:
    """A table for up to 20 classes, else a picture; and the commonest mistakes."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    head = f"<h2>{html.escape(title)}: confusion</h2><p>Rows: the right class; columns: what it was called.</p>"
    if len(names) <= TABLE_CLASSES:
        columns = "".join(f'<th class="turn"><span>{html.escape(name)}</span></th>' for name in names)
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th>"
            + "".join(
                f'<td style="background:{_shade(share, i == j)}">{count or ""}</td>'
                for j, (count, share) in enumerate(zip(confusion[i], shares[i], strict=True))
            )
            + "</tr>"
            for i, name in enumerate(names)
        )
        body = f'<table class="confusion"><tr><th></th>{columns}</tr>{rows}</table>'
    else:
        pixels = (255 - 255 * np.sqrt(shares)).astype(np.uint8)
        size = len(names) * max(1, 600 // len(names))
        file = io.BytesIO()
        Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).save(file, "PNG", optimize=True)
        body = (
            f'<img src="{data_uri(file.getvalue(), "image/png")}" alt="confusion matrix" style="border:1px solid #ccc">'
            f"<p>{len(names)} classes in the order of their numbers; darker: a larger share of the row.</p>"
        )
    wrong = confusion * (1 - np.eye(len(names), dtype=confusion.dtype))
    pairs = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None, kind="stable")[:10]]
    mistakes = "".join(
        f"<li>{html.escape(names[i])} called {html.escape(names[j])}: {wrong[i, j]} of {confusion[i].sum()}</li>"
        for i, j in pairs
        if wrong[i, j]
    )
    return head + body + (f"<p>Commonest mistakes:</p><ol>{mistakes}</ol>" if mistakes else "")


def _shade(share: float, right: bool) -> str:
    strength = 0.85 * float(share)
    return f"rgba({'58,125,68' if right else '209,73,91'},{strength:.2f})"


def _classes_table(title: str, names: Sequence[str], values: np.ndarray, counts: np.ndarray, what: str) -> str:
    """Numbers of each class that has images, worst first."""
    order = [k for k in np.argsort(values, kind="stable") if counts[k]]
    rows = "".join(
        f'<tr><td>{html.escape(names[k])}</td><td class="n">{values[k]:.3f}</td><td class="n">{counts[k]}</td></tr>'
        for k in order
    )
    return (
        f"<h2>{html.escape(title)}: classes</h2><details{' open' if len(order) <= TABLE_CLASSES else ''}><summary>"
        f"{len(order)} classes, worst first</summary><table><tr><th>class</th><th>{what}</th><th>images</th></tr>{rows}"
        "</table></details>"
    )


def examples_html(
    title: str, source: Source, given: Answers, index: np.ndarray, names: Sequence[str], rows: int = EXAMPLE_ROWS
) -> str:
    """Images with the classes they were given, best first: `rows` that are right, as many that are wrong."""
    body = ""
    for what, chosen in (
        ("right", np.flatnonzero(given.ranks == 0)),
        ("wrong", np.flatnonzero(given.ranks > 0)),
    ):
        if not len(chosen):
            continue
        chosen = chosen[np.linspace(0, len(chosen) - 1, min(rows, len(chosen))).astype(int)]
        lines = []
        for i in chosen:
            right = int(given.labels[i])
            query = GridCell(names[right], record_thumbnail(source, int(index[i])) or None, True)
            lines.append((query, [GridCell(names[k], None, bool(k == right)) for k in given.top[i]]))
        body += matches_html(f"{title}: {what} answers", lines)
    return body
