"""Linear probe: logistic regression on frozen features, by the protocol of CLIP (Radford et al. 2021, appendix A.3).

C is searched among 97 values, 8 a decade from 1e-6 to 1e6, on a part of the training set that is held out: first every
other decade, then halving the distance to the neighbours of the best. Of the values tried the smallest is taken whose
difference to the best is within one standard error: a small validation part cannot tell them apart, and where CLIP
takes the best of them it may end at an extreme. Fewer than 30 images cannot tell even extremes apart by what is right
of them: there C is chosen by their cross entropy, by the same rule. With this C the regression is fitted again on all
of the training set.
CLIP takes the features before the projection. For several classes an image (VOC) there is one regression of each class
against the rest, all with the same C.
"""

import html
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from florence_jax.data.sources.labelled import Labelled
from florence_jax.errors import UserError, require
from florence_jax.evaluators.base import Evaluator, own_files
from florence_jax.evaluators.classification import ClassificationMetrics
from florence_jax.evaluators.metrics import average_precisions, class_targets, log_likelihoods
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.solvers.logistic import Fits, LogisticRegression, objective, sklearn_weights
from florence_jax.page import curve

STEPS_PER_DECADE, DECADES = 8, 6
COARSE = 2 * STEPS_PER_DECADE
VALIDATION = 0.2
FEW = 30  # held-out images, below which C is chosen by their cross entropy
SKLEARN_TOLERANCE = 1e-7
USUAL_PROBE = "probe"  # the usual name
PROBE_HINT = "that --config.init is of a trained model and that the labels are those of the images"


def grid_c(index: int) -> float:
    """C number `index` of the grid, 0 to 96."""
    return 10.0 ** (index / STEPS_PER_DECADE - DECADES)


def search_c(judge: Callable[[Sequence[float]], Sequence[np.ndarray]]) -> tuple[float, dict[float, float]]:
    """CLIP's search: C = 1e-6, 1e-4, ..., 1e6, then the neighbours of the best at ever smaller distances.

    Args:
      judge: values of C -> for each what the same images score, see `judged` and `metrics.log_likelihoods`; called
        five times, with 7 and then at most 2 values.

    Returns:
      The smallest C that is as good as the best: the mean difference of what the images score is at most its standard
      error. And the validation result of every C tried.
    """
    last = 2 * DECADES * STEPS_PER_DECADE
    tried: dict[int, np.ndarray] = {}
    wanted, distance = list(range(0, last + 1, COARSE)), COARSE
    while True:
        tried |= dict(zip(wanted, judge([grid_c(i) for i in wanted]), strict=True))
        best = min(tried, key=lambda i: (-tried[i].mean(), i))
        if distance == 1:
            break
        distance //= 2
        wanted = [i for i in (best - distance, best + distance) if 0 <= i <= last]
    worse = {i: tried[best] - values for i, values in tried.items()}
    equals = [i for i, lost in worse.items() if i <= best and lost.mean() <= lost.std() / np.sqrt(len(lost))]
    return grid_c(min(equals, default=best)), {grid_c(i): float(tried[i].mean()) for i in sorted(tried)}


def split_validation(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows at random, class by class: (rows to train on, rows to validate on), both sorted.

    Each class gives `share` of its rows, rounded, to validation, but keeps at least one. Rows with several classes,
    (N, K) labels, go by the first of them.

    Raises:
      UserError: if the share is not between 0 and 1, or nothing would be held out.
    """
    labels = labels.argmax(1) if labels.ndim == 2 else labels
    if not 0 < share < 1:
        raise UserError(f"validation share {share} must be between 0 and 1")
    shuffled = np.random.default_rng([seed, 0]).permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(starts, counts)
    held = place < np.repeat(np.minimum(np.round(share * counts), counts - 1), counts)
    if not held.any():
        raise UserError(f"a validation share of {share} of {len(labels)} images holds none out; give a validation set")
    return np.sort(order[~held]), np.sort(order[held])


def judged(metric: str, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float64 (n,): values whose mean is a metric of `classification.METRIC_NAMES`, to choose C by.

    There is one for each image or, for 'voc_map', for each class, for 'roc_auc' for each image of the rarer class.

    Args:
      metric: its name.
      scores: float (N, K). labels: int (N,), or int8 (N, K) for several classes an image.
    """
    if metric == "voc_map":
        precisions = average_precisions(scores, class_targets(labels, scores.shape[1]))
        return precisions[~np.isnan(precisions)]
    if metric == "roc_auc":
        margins, rare = scores[:, 1] - scores[:, 0], int((labels == 1).mean() < 0.5)
        few, many = margins[labels == rare], np.sort(margins[labels != rare])
        below = (np.searchsorted(many, few) + np.searchsorted(many, few, "right")) / 2 / max(len(many), 1)
        return below if rare else 1 - below
    right = (scores.argmax(1) == labels).astype(np.float64)
    if metric == "mean_per_class":
        _, kinds, counts = np.unique(labels, return_inverse=True, return_counts=True)
        right *= len(labels) / (len(counts) * counts[kinds])
    return right


class Fitted(NamedTuple):
    """A probe's regressions.

    Attributes:
      chosen: one fit, of the part that C was chosen on, without the images that it was chosen by.
      final: one fit with the same C, of all of them.
      tried: C -> validation result.
      entropies: C -> mean cross entropy of the images that C was chosen on, where it was chosen by that; else empty.
    """

    chosen: Fits
    final: Fits
    tried: Mapping[float, float]
    entropies: Mapping[float, float]


class _Rows(NamedTuple):
    """Features and labels to fit on, to choose C by, and both together."""

    train: tuple[np.ndarray, np.ndarray]
    held: tuple[np.ndarray, np.ndarray]
    all: tuple[np.ndarray, np.ndarray]


class LinearProbe(Evaluator):
    """The probe of one data set.

    Results: those of `ClassificationMetrics` on the test split, 'validation_<metric>' and 'log10_c' of the C chosen;
    with `compare` also 'sklearn_<metric>', and 'sklearn_objective_diff', by what share of scikit-learn's objective ours
    is higher.

    Args:
      name: prefix of the results.
      train, test: the two splits; their class names must agree.
      ops: image ops that give the model's input size.
      embedder: its image function gives the features; CLIP's protocol takes those before the projection.
      metric: what C is chosen by, and the headline; one of METRIC_NAMES.
      validation: a split of its own to choose C on, or the share of each class of `train` to hold out.
      seed: of that choice.
      dtype: of the features, see `logistic.LogisticRegression`.
      on_corrupt: 'skip' leaves unreadable images out, 'error' ends the evaluation.
      compare: also fit scikit-learn's LogisticRegression with the same C on the same features.
      hint: see `ClassificationMetrics`.

    Raises:
      UserError: if the splits have different classes.
    """

    def __init__(
        self,
        name: str,
        train: Labelled,
        test: Labelled,
        ops: str,
        embedder: Embedder,
        *,
        metric: str = "top1",
        validation: Labelled | float = VALIDATION,
        seed: int = 0,
        dtype: str = "auto",
        on_corrupt: str = "error",
        compare: bool = False,
        hint: str | None = PROBE_HINT,
    ):
        splits = [train, test] + ([validation] if isinstance(validation, Labelled) else [])
        if any(split.names != train.names for split in splits):
            raise UserError(f"the splits of probe {name} have different classes")
        self._several = train.labels.ndim == 2
        if compare and self._several:
            raise UserError(f"probe {name}: the comparison with scikit-learn is for one class an image")
        if compare:
            require("sklearn", "config.probe.sklearn needs scikit-learn: pip install '.[eval]'")
        self.name, self._metric = name, metric
        self._train, self._test, self._validation = train, test, validation
        self._ops, self._embedder, self._on_corrupt = ops, embedder, on_corrupt
        self._seed, self._dtype, self._compare, self._hint = seed, dtype, compare, hint
        self._metrics = ClassificationMetrics(
            name, test.source, train.names, metric, self._several, payload=embedder.payload
        )
        self._sweep: list[str] = []

    @property
    def chance(self) -> dict[str, float]:
        """What guessing scores."""
        chance = self._metrics.chance
        same = {f"{what}_{self._metric}" for what in ("validation", "sklearn")}
        return chance | {name: chance[self._metric] for name in same if self._metric in chance}

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        rows = self._rows(params)
        fitted, test = self._fit(rows), self._read_test(params)
        results = self._measure(fitted, test)
        if self._compare:
            results |= self._sklearn(fitted.final, rows.all, (test["embedding"], self._test.labels[test["index"]]))
        return results

    def fit(self, params: Any) -> Fitted:
        """Chooses C on the features of these parameters, and fits."""
        return self._fit(self._rows(params))

    def measure(self, params: Any, fitted: Fitted) -> dict[str, float]:
        """The results of `run`, of what was fitted to features of the same parameters."""
        return self._measure(fitted, self._read_test(params))

    def _measure(self, fitted: Fitted, test: Mapping[str, np.ndarray]) -> dict[str, float]:
        scores, labels = fitted.final.scores(0, test["embedding"]), self._test.labels[test["index"]]
        c = float(fitted.final.cs[0])
        self._sweep = [self._curve(fitted, c)]
        results = self._metrics([scores], labels, test["index"], test["key"], self._hint)
        return results | {f"validation_{self._metric}": fitted.tried[c], "log10_c": float(np.log10(c))}

    def _rows(self, params: Any) -> "_Rows":
        features, labels = self._features(params, self._train)
        if isinstance(self._validation, Labelled):
            held = self._features(params, self._validation)
            both = np.concatenate([features, held[0]]), np.concatenate([labels, held[1]])
            return _Rows((features, labels), held, both)
        rest, held_rows = split_validation(labels, self._validation, self._seed)
        train, held = ((features[part], labels[part]) for part in (rest, held_rows))
        return _Rows(train, held, (features, labels))

    def _fit(self, rows: "_Rows") -> Fitted:
        c, chosen_by, tried, near = self._search(*rows.train, *rows.held)
        final = self._regression(*rows.all).fit([c], start=near)
        entropies = {x: -value for x, value in chosen_by.items()} if len(rows.held[0]) < FEW else {}
        return Fitted(near.take(np.flatnonzero(near.cs == c)[:1]), final, tried, entropies)

    def report(self) -> list[str]:
        """The curve of validation results over C, then as `ClassificationMetrics`."""
        return self._sweep + self._metrics.report

    def files(self) -> dict[str, bytes]:
        """predictions.csv of the test split; with the name before it where that is not 'probe'."""
        return own_files(self.name, USUAL_PROBE, self._metrics.files())

    def _features(self, params: Any, split: Labelled) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels of the readable images."""
        ops = f"{self._ops}|keep({self._embedder.payload.field})"
        out = self._embedder.images(params, split.source, ops, on_corrupt=self._on_corrupt)
        return out["embedding"], split.labels[out["index"]]

    def _read_test(self, params: Any) -> Mapping[str, np.ndarray]:
        """See `Embedder.images`, with the keys."""
        ops = f"{self._ops}|keep({self._embedder.payload.field}, key)"
        return self._embedder.images(params, self._test.source, ops, on_corrupt=self._on_corrupt, keys=True)

    def _regression(self, features: np.ndarray, labels: np.ndarray) -> LogisticRegression:
        return LogisticRegression(features, labels, len(self._train.names), self._embedder.mesh, self._dtype)

    def _search(
        self, features: np.ndarray, labels: np.ndarray, held: np.ndarray, held_labels: np.ndarray
    ) -> tuple[float, dict[float, float], dict[float, float], Fits]:
        """The best C, of all tried what it was chosen by and the metric, and the fits, for the last to start from."""
        regression = self._regression(features, labels)
        known: list[Fits] = []
        metric: dict[float, float] = {}
        main = jax.process_index() == 0
        began = time.perf_counter()
        with tqdm(desc=f"{self.name}: C", unit="fit", leave=False, disable=not (main and sys.stderr.isatty())) as bar:

            def judge(cs: Sequence[float]) -> list[np.ndarray]:
                fits = regression.fit(cs, start=Fits.join(known) if known else None)
                known.append(fits)
                bar.update(len(cs))
                scores = [fits.scores(i, held) for i in range(len(cs))]
                values = [judged(self._metric, found, held_labels) for found in scores]
                metric.update(zip(cs, (float(value.mean()) for value in values), strict=True))
                return values if len(held) >= FEW else [log_likelihoods(found, held_labels) for found in scores]

            c, chosen_by = search_c(judge)
        if main:
            shape, by = f"{features.shape[0]} x {features.shape[1]} features", ""
            if len(held) < FEW:
                by = f", chosen by the cross entropy of {len(held)} images, too few for their {self._metric}"
            took = f"{time.perf_counter() - began:.1f} s"
            print(f"{self.name}: {len(metric)} values of C on {shape}, {took}{by}", flush=True)
        return c, chosen_by, {x: metric[x] for x in sorted(metric)}, Fits.join(known)

    def _sklearn(
        self, ours: Fits, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
    ) -> dict[str, float]:
        from sklearn.linear_model import LogisticRegression as Theirs

        c = float(ours.cs[0])
        began = time.perf_counter()
        fit = Theirs(C=c, tol=SKLEARN_TOLERANCE, max_iter=10_000).fit(train[0].astype(np.float64), train[1])
        if jax.process_index() == 0:
            print(f"{self.name}: scikit-learn, only C = {c:.4g}, {time.perf_counter() - began:.1f} s", flush=True)
        there, (weights, bias) = fit.classes_, sklearn_weights(fit)
        scores = np.full((len(test[0]), len(self._train.names)), -np.inf)
        scores[:, there] = test[0] @ weights + bias
        data = train[0], np.searchsorted(there, train[1])
        least = objective(*data, weights, bias, c)
        return {
            f"sklearn_{self._metric}": float(judged(self._metric, scores, test[1]).mean()),
            "sklearn_objective_diff": objective(*data, ours.weights[0][:, there], ours.bias[0][there], c) / least - 1,
        }

    def _curve(self, fitted: Fitted, c: float) -> str:
        name, metric = html.escape(self.name), html.escape(self._metric)
        shown, what = (fitted.entropies, "cross entropy") if fitted.entropies else (fitted.tried, metric)
        line = curve(f"validation {what} over log10 C", [np.log10(x) for x in shown], {"": list(shown.values())})
        chosen = f"C = {c:.4g}, the smallest of {len(shown)} tried that is as good as the best by {what}"
        return f"<h2>{name}: linear probe</h2><p>{chosen}.</p>{line}"
