"""Metrics of classification and retrieval, as numpy functions, and their chance levels."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

METRIC_NAMES = ("top1", "mean_per_class", "voc_map", "roc_auc")
TOP = 5


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Of each number."""
    powers = np.exp(-np.abs(scores))
    return np.where(scores >= 0, 1, powers) / (1 + powers)


def log_likelihoods(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float64 (n,): of each image the log probability of what is right, minus its cross entropy.

    With several classes an image it is the mean over the classes that are judged; images without any are left out.

    Args:
      scores: float (N, K), logits.
      labels: int (N,), or int8 (N, K) of 1, 0 and -1 (not judged).
    """
    wide = scores.astype(np.float64)
    if labels.ndim == 1:
        own = wide[np.arange(len(wide)), labels]
        return own - np.logaddexp.reduce(wide, axis=1)
    judged = labels >= 0
    each = np.where(judged, -np.logaddexp(0, np.where(labels > 0, -wide, wide)), 0)
    there = judged.any(1)
    return each[there].sum(1) / judged[there].sum(1)


class Answers(NamedTuple):
    """What a classifier answered; N images, K classes.

    Attributes:
      labels: int (N,), the right classes.
      ranks: int (N,), wrong classes scored at least as high as the right one.
      top: int (N, min(5, K)), classes by score, best first; the right one stands at its rank.
      scores: float (N, min(5, K)), of `top`, as people read them.
    """

    labels: np.ndarray
    ranks: np.ndarray
    top: np.ndarray
    scores: np.ndarray


def answers(
    score_chunks: Iterable[np.ndarray],
    labels: np.ndarray,
    readable: Callable[[np.ndarray], np.ndarray] = softmax,
) -> Answers:
    """Ranks the classes of each image.

    Ties count against the classifier, as in `retrieval.positive_ranks`: one that scores all classes alike is never
    right.

    Args:
      score_chunks: float (n, K) arrays, N rows together.
      labels: int (N,).
      readable: float (n, K) -> float (n, K), what people are shown of the scores: probabilities.
    """
    ranks, tops, shown, start = [], [], [], 0
    for scores in score_chunks:
        rows = np.arange(len(scores))
        right = labels[start : start + len(scores)]
        own = scores[rows, right]
        rank = (scores >= own[:, None]).sum(1) - 1
        # The right class goes behind all that tie with it.
        order = np.argsort(
            -np.where(np.arange(scores.shape[1])[None] == right[:, None], -np.inf, scores), kind="stable"
        )
        place = np.arange(min(TOP, scores.shape[1]))[None]
        behind = np.take_along_axis(order, np.maximum(place - (place > rank[:, None]), 0), axis=1)
        tops.append(np.where(place == rank[:, None], right[:, None], behind))
        shown.append(np.take_along_axis(readable(scores), tops[-1], axis=1))
        ranks.append(rank)
        start += len(scores)
    return Answers(labels, np.concatenate(ranks), np.concatenate(tops), np.concatenate(shown))


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """int (K, K): how many images of class (row) were called class (column)."""
    flat = np.bincount(labels.astype(np.int64) * classes + predictions, minlength=classes * classes)
    return flat.reshape(classes, classes)


def mean_per_class(confusion: np.ndarray) -> float:
    """Mean over the classes that have images of the share of them that was recognised."""
    counts = confusion.sum(1)
    return float((np.diag(confusion)[counts > 0] / counts[counts > 0]).mean())


def voc_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """11-point interpolated average precision of one class (VOC 2007; Everingham et al. 2010, section 4.2).

    Equal scores are one step of the curve, so that the order of the images does not matter.

    Args:
      scores: float (N,).
      targets: int (N,), 1, 0, or negative for images that are not judged.

    Returns:
      The mean over recall 0, 0.1, ... 1 of the highest precision at that recall or more; nan without a positive.
    """
    judged = targets >= 0
    scores, targets = scores[judged], targets[judged] > 0
    if not targets.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(targets[order])
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # the end of each group of equal scores
    recall, precision = found[last] / found[-1], found[last] / (last + 1)
    points = np.arange(11)[:, None] / 10
    return float(np.where(recall[None] >= points - 1e-12, precision[None], 0).max(1).mean())


def class_targets(labels: np.ndarray, classes: int) -> np.ndarray:
    """int8 (N, K) of 1, 0 and -1 (not judged), from class numbers (N,) or what is in that form already."""
    if labels.ndim == 2:
        return labels
    return (labels[:, None] == np.arange(classes)[None]).astype(np.int8)


def average_precisions(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """`voc_average_precision` of every class: float64 (K,); nan for a class without a positive."""
    return np.array([voc_average_precision(scores[:, k], targets[:, k]) for k in range(targets.shape[1])])


def roc_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive scores above a negative, ties counting half; nan if either is missing."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return math.nan
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2  # mean rank, from 1, of each distinct score
    return float((middle[place][positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


class TwoClasses(NamedTuple):
    """How well one of two classes, the positive one, is told from the other.

    Attributes:
      precision, recall, f1: of the images called positive; 0 where there are none.
      best_f1, best_threshold: the highest F1 that a threshold on the score gives, and that threshold: images of at
        least so much are called positive. nan without a positive image.
    """

    precision: float
    recall: float
    f1: float
    best_f1: float
    best_threshold: float


def two_classes(scores: np.ndarray, positive: np.ndarray, called: np.ndarray) -> TwoClasses:
    """See `TwoClasses`.

    Args:
      scores: float (N,), of the positive class.
      positive: bool (N,), what is right. called: bool (N,), what was answered.
    """
    hits, count = int((positive & called).sum()), int(positive.sum())
    precision, recall = hits / max(int(called.sum()), 1), hits / max(count, 1)
    f1 = 2 * hits / max(count + int(called.sum()), 1)
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # the end of each group of equal scores
    f1_at = 2 * np.cumsum(positive[order])[last] / (last + 1 + count)
    best = int(f1_at.argmax())  # of equals the one that calls the fewest positive
    found = (float(f1_at[best]), float(scores[order][last[best]])) if count else (math.nan, math.nan)
    return TwoClasses(precision, recall, f1, *found)


KS = (1, 5, 10)


def recalls(ranks: np.ndarray, prefix: str, ks: Sequence[int] = KS) -> dict[str, float]:
    """{'<prefix>r@<k>': share of queries with rank < k}."""
    return {f"{prefix}r@{k}": float((ranks < k).mean()) for k in ks}


def positive_places(similarity: np.ndarray, right: np.ndarray) -> np.ndarray:
    """int (Q,): wrong targets that are at least as similar to each query as its best right one; T without a right one.

    Args:
      similarity: (Q, T). right: bool (Q, T).
    """
    best = np.where(right, similarity, -np.inf).max(1, keepdims=True)
    return ((similarity >= best) & ~right).sum(1)


def recall_chance(right: np.ndarray, total: int, k: int) -> float:
    """Expected recall@k of a random order, mean over queries with `right[q]` right ones among `total` targets.

    One minus the chance that k draws without replacement are all wrong.
    """
    wrong = total - right.astype(np.float64)
    missed = np.ones_like(wrong)
    for i in range(min(k, total)):
        missed *= np.maximum(wrong - i, 0) / (total - i)
    return float((1 - missed).mean())


def retrieval_chance(image_ids: np.ndarray, text_ids: np.ndarray) -> dict[str, float]:
    """Chance levels of `two_way_recalls` for the ids of its images and texts."""
    chance: dict[str, float] = {}
    for prefix, queries, targets in (("i2t_", image_ids, text_ids), ("t2i_", text_ids, image_ids)):
        values, counts = np.unique(targets, return_counts=True)
        place = np.searchsorted(values, queries).clip(max=len(values) - 1)
        right = np.where(values[place] == queries, counts[place], 0)
        chance |= {f"{prefix}r@{k}": recall_chance(right, len(targets), k) for k in KS}
    return chance
