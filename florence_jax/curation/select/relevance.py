"""The threshold of relevance: a fixed one, or the share of pairs that is kept, found from a histogram."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from fractions import Fraction

import apache_beam as beam
import numpy as np

from florence_jax.errors import UserError

_BUCKETS = 1 << 16


def kept_count(total: int, keep: float) -> int:
    """How many of `total` a share means: rounded up, with the decimal that was written (0.3 is three tenths)."""
    return math.ceil(Fraction(str(keep)) * total)


@dataclasses.dataclass(frozen=True)
class RelevanceRules:
    """What relevance a pair must have.

    Attributes:
      min_score: absolute threshold; None = none.
      keep: share of the scored pairs to keep, the best ones, in (0, 1]; ties with the last one stay too.

    Raises:
      UserError: if keep is outside (0, 1].
    """

    min_score: float | None = None
    keep: float = 1.0

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise UserError(f"relevance.keep={self.keep} must be above 0 and at most 1")


def _least(rules: RelevanceRules) -> float:
    return -math.inf if rules.min_score is None else rules.min_score


def score_histogram(scores: np.ndarray, upper: int | None = None) -> np.ndarray:
    """int64 (65536,): counts of the upper 16 bits of the scores, or of the lower 16 of those with these upper bits.

    The bits are those of the float32 in an order that follows the numbers, so two passes find any order statistic
    exactly, and histograms of parts add up. Scores that are not finite are not counted.
    """
    values = np.asarray(scores, np.float32)
    bits = (values[np.isfinite(values)] + np.float32(0)).view(np.uint32)  # -0.0 becomes 0.0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    if upper is None:
        return np.bincount(ordered >> 16, minlength=_BUCKETS)
    return np.bincount((ordered & 0xFFFF)[ordered >> 16 == upper], minlength=_BUCKETS)


def locate(histogram: np.ndarray, rank: int) -> tuple[int, int]:
    """Bucket of the rank-th largest element (from 1), and its rank within the bucket; (0, 0) for an empty histogram."""
    above = np.cumsum(histogram[::-1])
    if not above[-1]:
        return 0, 0
    place = int(np.searchsorted(above, rank))
    return _BUCKETS - 1 - place, int(rank - (above[place - 1] if place else 0))


def threshold_at(upper: int, lower: int) -> float:
    """The float32 with these ordered bits; -inf for (0, 0), the bits of no finite number."""
    if not (upper or lower):
        return -math.inf
    bits = np.uint32(upper << 16 | lower)
    return float((bits ^ np.uint32(1 << 31) if bits >> 31 else ~bits).view(np.float32))


class RelevanceThreshold(beam.PTransform):
    """float32 blocks of scores -> one float: the score of the last pair to keep, in two passes over the scores.

    It is a score of the set, not an interpolation, or `min_score`, if that is larger. Scores that are not finite do not
    count.

    Args:
      rules: with the share to keep and the absolute threshold.
    """

    def __init__(self, rules: RelevanceRules):
        super().__init__()
        self._rules = rules

    def expand(self, blocks: beam.PCollection) -> beam.PCollection:
        """Two histograms, added up over the blocks; the second looks into the bucket that the first one found."""
        keep, least = self._rules.keep, _least(self._rules)
        chosen = (
            blocks
            | "Upper" >> beam.Map(score_histogram)
            | "AddUpper" >> beam.CombineGlobally(_add)
            | "Bucket" >> beam.Map(lambda h: locate(h, kept_count(int(h.sum()), keep)))
        )
        return (
            blocks
            | "Lower" >> beam.Map(lambda block, at: score_histogram(block, at[0]), beam.pvalue.AsSingleton(chosen))
            | "AddLower" >> beam.CombineGlobally(_add)
            | "Threshold"
            >> beam.Map(
                lambda h, at: max(threshold_at(at[0], locate(h, at[1])[0]), least), beam.pvalue.AsSingleton(chosen)
            )
        )


def _add(histograms: Iterable[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.add, histograms, np.zeros(_BUCKETS, np.int64))
