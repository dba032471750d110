"""Selection: balance over metadata queries, informativeness and learnability, each a score column with a switch.

Balance follows MetaCLIP (Xu et al. 2024): a pair is kept through any query that it matches, at most t pairs a query.
The score of a pair is the smallest t that keeps it, so that a new t is a comparison on the table, and a larger t only
adds pairs. Everything random is a keyed hash.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from florence_jax.curation.blocks import Decision
from florence_jax.curation.keyed import keyed_hashes, rank_within
from florence_jax.curation.select.queries import spaced
from florence_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SelectRules:
    """Thresholds of `decide_selection`; a zero or None switches a score off, which is the default of all.

    Attributes:
      t: most pairs per metadata query.
      keep_unmatched: whether pairs that match no query count as one more query, instead of being dropped.
      min_bits: least information of a caption, in bits (`information`).
      cluster_t: most pairs per embedding cluster.
      min_gap: least loss gap (`learnability`).
    """

    t: int = 0
    keep_unmatched: bool = False
    min_bits: float = 0.0
    cluster_t: int = 0
    min_gap: float | None = None


def decide_selection(scores: Mapping[str, Any], rules: SelectRules) -> Decision | None:
    """The first reason to leave a pair out, or None.

    Args:
      scores: what the switched-on rules read: "balance_t" and "matches" (number of queries), "bits", "cluster_t",
        "gap".

    Returns:
      (reason, value, threshold); reasons: 'no_query', 'balance', 'information', 'cluster', 'learnability'.
    """
    if rules.t and not rules.keep_unmatched and scores["matches"] == 0:
        return "no_query", 0, 1
    if rules.t and scores["balance_t"] > rules.t:
        return "balance", scores["balance_t"], rules.t
    if rules.min_bits and scores["bits"] < rules.min_bits:
        return "information", scores["bits"], rules.min_bits
    if rules.cluster_t and scores["cluster_t"] > rules.cluster_t:
        return "cluster", scores["cluster_t"], rules.cluster_t
    if rules.min_gap is not None and not scores["gap"] >= rules.min_gap:  # NaN is dropped too
        return "learnability", scores["gap"], rules.min_gap
    return None


# -- informativeness --------------------------------------------------------------------------------------------------


def word_counts(captions: Iterable[str]) -> collections.Counter:
    """How many captions contain each word; counters of parts can be added."""
    counts: collections.Counter = collections.Counter()
    for caption in captions:
        counts.update(set(spaced(caption).split()))
    return counts


def information(caption: str, counts: Mapping[str, int], captions: int) -> tuple[float, float]:
    """Bits of the distinct words of a caption, each -log2 of the share of captions with it: (sum, mean).

    Long captions of rare words have many bits; the mean separates specific from generic words at any length. An unknown
    word counts as seen once.

    Args:
      counts: from `word_counts` over the set.
      captions: size of the set.
    """
    words = sorted(set(spaced(caption).split()))
    bits = [math.log2(max(captions, 1) / min(max(counts.get(word, 1), 1), max(captions, 1))) for word in words]
    return math.fsum(bits), math.fsum(bits) / max(len(bits), 1)


def cluster_scores(uids: Sequence[str], clusters: np.ndarray, seed: int) -> np.ndarray:
    """int64 (N,): the smallest `cluster_t` that keeps each pair: its rank within its cluster by keyed hash, from 1."""
    hashes = keyed_hashes(seed, uids, ["cluster"] * len(uids))
    return rank_within(np.asarray(clusters), hashes, uids) + 1


# -- learnability -----------------------------------------------------------------------------------------------------


def learnability(learner_loss: np.ndarray, reference_loss: np.ndarray) -> np.ndarray:
    """Loss gap of two proxy models, float64: large for what is still hard for the learner but not for the reference.

    Noise is hard for both, and easy pairs are easy for both: both have a small gap (Mindermann et al. 2022).

    Args:
      learner_loss: (N,) per-pair losses of a model at the start of training.
      reference_loss: (N,) of the same loss under a model trained on clean data.

    Raises:
      UserError: for different shapes.
    """
    learner, reference = np.asarray(learner_loss, np.float64), np.asarray(reference_loss, np.float64)
    if learner.shape != reference.shape:
        raise UserError(
            f"learnability needs one loss a pair from each model, not {learner.shape} and {reference.shape}"
        )
    return learner - reference
