"""Metadata queries in captions, and how many pairs a cap of t a query leaves."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

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
        if not any(map(spaced, self.entries)):
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
            words = spaced(entry)
            key = words if _UNSPACED.search(words) else f" {words} "
            if words and not automaton.exists(key):
                automaton.add_word(key, number)
        automaton.make_automaton()
        return automaton

    def match(self, caption: str) -> list[int]:
        """Ids of the queries in a caption, increasing, each once."""
        if self._automaton is None:
            self._automaton = self._build()
        return sorted({number for _, number in self._automaton.iter(f" {spaced(caption)} ")})


def spaced(text: str) -> str:
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
