"""Selection: balance over metadata queries, informativeness and learnability, each a score column with a switch.

Balance follows MetaCLIP (Xu et al. 2024): a pair is kept through any query that it matches, at most t pairs a query.
The score of a pair is the smallest t that keeps it, so that a new t is a comparison on the table, and a larger t only
adds pairs. Everything random is a keyed hash.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from florence_jax.curation.filters import Decision
from florence_jax.curation.keyed import fractions, keyed_hashes, rank_within
from florence_jax.data.captions import normalise_caption
from florence_jax.errors import UserError

try:
    import ahocorasick
except ImportError:  # optional: only `Metadata` needs it
    ahocorasick = None

# The query of pairs that match no other.
UNMATCHED = ""

_NOT_WORD = re.compile(r"[^\w\u0300-\u036f\u0900-\u0dff]+|_+")
# Scripts without spaces, whose words need no boundary around them.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


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


# -- metadata queries -------------------------------------------------------------------------------------------------


class Metadata:
    """Finds the queries that occur in a caption, all in one pass over it (Aho and Corasick 1975).

    Whole words only, without regard to case, punctuation or spacing; queries in scripts without spaces may occur
    anywhere. Instances can be pickled; the automaton is built on first use.

    Args:
      entries: the queries; their order gives the ids. Equal ones after normalisation share the first one's id.

    Raises:
      UserError: without any usable query, or if pyahocorasick is not installed.
    """

    def __init__(self, entries: Iterable[str]):
        if ahocorasick is None:
            raise UserError("metadata queries need pyahocorasick: pip install '.[curation]'")
        self.entries = tuple(entries)
        if not any(map(_spaced, self.entries)):
            raise UserError("the metadata has no queries: give a file with one query a line")
        self._automaton = None

    @classmethod
    def from_file(cls, path: str) -> "Metadata":
        """Queries from a UTF-8 file, one a line; empty lines are skipped.

        Raises:
          UserError: if it cannot be read.
        """
        try:
            with open(path, encoding="utf-8") as file:
                return cls(line.strip() for line in file if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the metadata queries in {path}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"entries": self.entries, "_automaton": None}

    def __len__(self) -> int:
        return len(self.entries)

    def _build(self) -> Any:
        automaton = ahocorasick.Automaton()
        for number, entry in enumerate(self.entries):
            words = _spaced(entry)
            key = words if _UNSPACED.search(words) else f" {words} "
            if words and not automaton.exists(key):
                automaton.add_word(key, number)
        automaton.make_automaton()
        return automaton

    def match(self, caption: str) -> list[int]:
        """Ids of the queries in a caption, increasing, each once."""
        if self._automaton is None:
            self._automaton = self._build()
        return sorted({number for _, number in self._automaton.iter(f" {_spaced(caption)} ")})


def _spaced(text: str) -> str:
    """Normalised words joined by single spaces."""
    return " ".join(_NOT_WORD.sub(" ", normalise_caption(text)).split())


@dataclasses.dataclass(frozen=True)
class Matches:
    """Which queries each pair matches, as compressed rows.

    Attributes:
      uids: (N,) of str.
      pairs: int64 (M,): row of each match, not decreasing.
      queries: int64 (M,): query id of each match; -1 for the one row entry of a pair without a match.
      size: number of queries of the metadata.
    """

    uids: Sequence[str]
    pairs: np.ndarray
    queries: np.ndarray
    size: int

    @classmethod
    def build(cls, uids: Sequence[str], matched: Sequence[Sequence[int]], size: int) -> "Matches":
        """From the query ids of each pair (`Metadata.match`)."""
        lengths = np.fromiter((max(len(ids), 1) for ids in matched), np.int64, len(uids))
        queries = np.fromiter((q for ids in matched for q in (ids or (-1,))), np.int64, int(lengths.sum()))
        return cls(uids, np.repeat(np.arange(len(uids)), lengths), queries, size)

    def counts(self) -> np.ndarray:
        """int64 (size + 1,): pairs per query; the last is that of the pairs without a query."""
        return np.bincount(self.queries % (self.size + 1), minlength=self.size + 1)

    def per_pair(self) -> np.ndarray:
        """int64 (N,): queries that each pair matches."""
        return np.bincount(self.pairs[self.queries >= 0], minlength=len(self.uids))


def balance_scores(matches: Matches, entries: Sequence[str], seed: int, counts: np.ndarray | None = None) -> np.ndarray:
    """The smallest t that keeps each pair.

    Args:
      matches: of all pairs, or of a part of them with `counts` given.
      entries: texts of the queries: the keyed hash is that of (seed, uid, query text), so ids may change.
      counts: int64 (size + 1,) of the whole set. If given, a pair's rank within a query is not counted but expected
        (hash fraction times count): no grouping by query, so that it scales; a query then keeps t pairs on average.

    Returns:
      float64 (N,): minimum over the matched queries of the pair's rank, counted from 1. With exact ranks (`counts`
      None) a query admits exactly min(t, count) pairs.
    """
    names = [entries[q] if q >= 0 else UNMATCHED for q in matches.queries.tolist()]
    uids = [matches.uids[i] for i in matches.pairs.tolist()]
    hashes = keyed_hashes(seed, uids, names)
    if counts is None:
        ranks = rank_within(matches.queries, hashes, uids) + 1.0
    else:
        ranks = fractions(hashes) * counts[matches.queries]  # index -1 is the last, the count of the unmatched
    best = np.full(len(matches.uids), np.inf)
    np.minimum.at(best, matches.pairs, ranks)
    return best


def predict_size(matches: Matches, counts: np.ndarray, pairs: int, t: float, keep_unmatched: bool = False) -> float:
    """Expected number of pairs kept at t, from the counts and the matches of all pairs or of a uniform sample.

    A pair that matches several queries is kept if any of them keeps it, so adding up min(t, count) over queries counts
    it several times; the product over its queries does not.

    Args:
      matches: of all pairs or of a sample.
      counts: int64 (size + 1,) of the whole set.
      pairs: size of the whole set.
      t: most pairs a query.
      keep_unmatched: as in `SelectRules`.
    """
    chance = np.minimum(1.0, t / np.maximum(counts, 1))
    if not keep_unmatched:
        chance[-1] = 0.0
    missed = np.ones(len(matches.uids))
    np.multiply.at(missed, matches.pairs, 1.0 - chance[matches.queries])
    return float((1.0 - missed).sum() * pairs / max(len(matches.uids), 1))


def t_for_size(matches: Matches, counts: np.ndarray, pairs: int, size: float, keep_unmatched: bool = False) -> int:
    """The largest integer t whose predicted size is at most `size` (at least 1); see `predict_size`."""
    low, high = 1, max(int(counts.max(initial=1)), 1)
    while low < high:
        middle = (low + high + 1) // 2
        if predict_size(matches, counts, pairs, middle, keep_unmatched) <= size:
            low = middle
        else:
            high = middle - 1
    return low


def tail_share(counts: np.ndarray, t: int) -> float:
    """Share of all matches that belong to queries with fewer than t pairs (MetaCLIP 2 carries it across languages)."""
    matched = counts[:-1]
    return float(matched[matched < t].sum() / max(matched.sum(), 1))


def t_for_tail_share(counts: np.ndarray, share: float) -> int:
    """The smallest t with a `tail_share` of at least `share`."""
    matched = np.sort(counts[:-1])
    place = int(np.searchsorted(np.cumsum(matched), share * matched.sum()))
    return int(matched[min(place, len(matched) - 1)]) + 1


# -- informativeness --------------------------------------------------------------------------------------------------


def word_counts(captions: Iterable[str]) -> collections.Counter:
    """How many captions contain each word; counters of parts can be added."""
    counts: collections.Counter = collections.Counter()
    for caption in captions:
        counts.update(set(_spaced(caption).split()))
    return counts


def information(caption: str, counts: Mapping[str, int], captions: int) -> tuple[float, float]:
    """Bits of the distinct words of a caption, each -log2 of the share of captions with it: (sum, mean).

    Long captions of rare words have many bits; the mean separates specific from generic words at any length. An unknown
    word counts as seen once.

    Args:
      counts: from `word_counts` over the set.
      captions: size of the set.
    """
    words = sorted(set(_spaced(caption).split()))
    bits = [math.log2(max(captions, 1) / min(max(counts.get(word, 1), 1), max(captions, 1))) for word in words]
    return math.fsum(bits), math.fsum(bits) / max(len(bits), 1)


def kmeans(embeddings: np.ndarray, clusters: int, seed: int, iterations: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's k-means with k-means++ seeding (Arthur and Vassilvitskii 2007); the same result on every run.

    Args:
      embeddings: float (N, D), rows in an order that does not depend on workers (sort by uid).
      clusters: at most N are used.
      seed: of the keyed hash that draws the first centres.
      iterations: upper bound; stops when no row moves.

    Returns:
      int64 (N,) cluster of each row and float64 (K, D) centres. A cluster that loses its last row keeps its centre.

    Raises:
      UserError: for no rows, or for values that are not finite.
    """
    x = np.asarray(embeddings, np.float64)
    if not len(x) or not np.isfinite(x).all():
        raise UserError("k-means needs at least one embedding, and finite values")
    centres = _first_centres(x, min(clusters, len(x)), seed)
    labels = np.full(len(x), -1)
    for _ in range(iterations):
        nearest = _nearest(x, centres)
        if (nearest == labels).all():
            break
        labels = nearest
        sizes = np.bincount(labels, minlength=len(centres))
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, x)
        filled = sizes > 0
        centres[filled] = sums[filled] / sizes[filled, None]
    return labels, centres


def _first_centres(x: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    draws = fractions(keyed_hashes(seed, [str(i) for i in range(clusters)], ["kmeans"] * clusters))
    chosen = [int(draws[0] * len(x))]
    distances = ((x - x[chosen[0]]) ** 2).sum(1)
    for draw in draws[1:]:
        total = np.cumsum(distances)
        chosen.append(min(int(np.searchsorted(total, draw * total[-1], side="right")), len(x) - 1))
        distances = np.minimum(distances, ((x - x[chosen[-1]]) ** 2).sum(1))
    return x[chosen].copy()


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((centres**2).sum(1)[None] - 2 * x @ centres.T).argmin(1)


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
