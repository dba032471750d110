"""Linear probe: logistic regression on frozen features, by the protocol of CLIP (Radford et al. 2021, appendix A.3).

C is searched among 97 values, 8 a decade from 1e-6 to 1e6, on a part of the training set that is held out: first every
other decade, then halving the distance to the neighbours of the best. With the best C the regression is fitted again on
all of the training set. CLIP takes the features before the projection.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from florence_jax.data.labelled import Labelled
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Embedder
from florence_jax.evaluators.logistic import Fits, LogisticRegression
from florence_jax.evaluators.report import curve

STEPS_PER_DECADE, DECADES = 8, 6
COARSE = 2 * STEPS_PER_DECADE
VALIDATION = 0.2


def grid_c(index: int) -> float:
    """C number `index` of the grid, 0 to 96."""
    return 10.0 ** (index / STEPS_PER_DECADE - DECADES)


def search_c(score: Callable[[Sequence[float]], Sequence[float]]) -> tuple[float, dict[float, float]]:
    """CLIP's search: C = 1e-6, 1e-4, ..., 1e6, then the neighbours of the best at ever smaller distances.

    Args:
      score: values of C -> their validation accuracies; called five times, with 7 and then at most 2 values.

    Returns:
      The best C (the smallest of equally good ones), and the accuracy of every C tried.
    """
    last = 2 * DECADES * STEPS_PER_DECADE
    tried: dict[int, float] = {}
    wanted, distance = list(range(0, last + 1, COARSE)), COARSE
    while True:
        tried |= dict(zip(wanted, map(float, score([grid_c(i) for i in wanted])), strict=True))
        best = min(tried, key=lambda i: (-tried[i], i))
        if distance == 1:
            return grid_c(best), {grid_c(i): tried[i] for i in sorted(tried)}
        distance //= 2
        wanted = [i for i in (best - distance, best + distance) if 0 <= i <= last]


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows at random, class by class: (rows to train on, rows to validate on), both sorted.

    Each class gives `share` of its rows, rounded, to validation, but keeps at least one.

    Raises:
      UserError: if the share is not between 0 and 1, or nothing would be held out.
    """
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


def accuracies(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """'top1', and 'mean_per_class', the mean over the classes that occur of the share found of each."""
    right = scores.argmax(1) == labels
    counts = np.bincount(labels)
    per_class = np.bincount(labels, right)[counts > 0] / counts[counts > 0]
    return {"top1": float(right.mean()), "mean_per_class": float(per_class.mean())}


class LinearProbe:
    """The probe of one data set.

    Args:
      name: prefix of the results.
      train, test: the two splits; their class names must agree.
      ops: image ops that give the model's input size.
      embedder: its image function gives the features; CLIP's protocol takes those before the projection.
      validation: a split of its own to choose C on, or the share of each class of `train` to hold out.
      seed: of that choice.
      dtype: of the features, see `logistic.LogisticRegression`.
      on_corrupt: 'skip' leaves unreadable images out, 'error' ends the evaluation.

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
        validation: Labelled | float = VALIDATION,
        seed: int = 0,
        dtype: str = "auto",
        on_corrupt: str = "error",
    ):
        splits = [train, test] + ([validation] if isinstance(validation, Labelled) else [])
        if any(split.names != train.names for split in splits):
            raise UserError(f"the splits of probe {name} have different classes")
        self.name = name
        self._train, self._test, self._validation = train, test, validation
        self._ops, self._embedder, self._on_corrupt = f"{ops}|keep(image)", embedder, on_corrupt
        self._seed, self._dtype = seed, dtype
        classes = len(train.names)
        self.chance = {"top1": 1 / classes, "mean_per_class": 1 / classes, "validation_top1": 1 / classes}
        self._report: list[str] = []

    def run(self, params: Any) -> dict[str, float]:
        """'top1' and 'mean_per_class' on the test split, 'validation_top1' and 'log10_c' of the C chosen, 'images'."""
        features, labels = self._features(params, self._train)
        if isinstance(self._validation, Labelled):
            held = self._features(params, self._validation)
            chosen = (features, labels)
            features, labels = np.concatenate([features, held[0]]), np.concatenate([labels, held[1]])
        else:
            rows, held_rows = hold_out(labels, self._validation, self._seed)
            chosen, held = (features[rows], labels[rows]), (features[held_rows], labels[held_rows])
        c, tried, near = self._search(*chosen, *held)
        test, test_labels = self._features(params, self._test)
        final = self._regression(features, labels).fit([c], start=near)
        results = accuracies(final.scores(0, test), test_labels)
        self._report = [self._curve(tried, c)]
        results |= {"validation_top1": tried[c], "log10_c": float(np.log10(c)), "images": float(len(test))}
        return results

    def report(self) -> list[str]:
        """The curve of validation accuracy over C."""
        return self._report

    def _features(self, params: Any, split: Labelled) -> tuple[np.ndarray, np.ndarray]:
        out = self._embedder.images(params, split.source, self._ops, on_corrupt=self._on_corrupt)
        return out["embedding"], split.labels[out["index"]]

    def _regression(self, features: np.ndarray, labels: np.ndarray) -> LogisticRegression:
        return LogisticRegression(features, labels, len(self._train.names), self._embedder.mesh, self._dtype)

    def _search(
        self, features: np.ndarray, labels: np.ndarray, held: np.ndarray, held_labels: np.ndarray
    ) -> tuple[float, dict[float, float], Fits]:
        """The best C, the accuracies of all tried, and the fits, for the last fit to start from."""
        regression = self._regression(features, labels)
        known: list[Fits] = []

        def score(cs: Sequence[float]) -> list[float]:
            fits = regression.fit(cs, start=Fits.join(known) if known else None)
            known.append(fits)
            return [accuracies(fits.scores(i, held), held_labels)["top1"] for i in range(len(cs))]

        c, tried = search_c(score)
        return c, tried, Fits.join(known)

    def _curve(self, tried: Mapping[float, float], c: float) -> str:
        name = html.escape(self.name)
        line = curve("validation accuracy over log10 C", [np.log10(x) for x in tried], {"": list(tried.values())})
        return f"<h2>{name}: linear probe</h2><p>C = {c:.4g}, the best of {len(tried)} tried.</p>{line}"
