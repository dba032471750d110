"""The stages relevance and selection on blocks."""

import functools
import math
import zlib
from collections.abc import Iterable
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.curation.blocks import Decide, Decisions, Repartition, WideStage, by_identifier, rows_of
from florence_jax.curation.keyed import keyed_hashes, rank_within
from florence_jax.curation.select.queries import UNMATCHED, Metadata
from florence_jax.curation.select.relevance import RelevanceRules, RelevanceThreshold
from florence_jax.curation.select.rules import (
    SelectRules,
    cluster_scores,
    decide_selection,
    information,
    learnability,
    word_counts,
)
from florence_jax.curation.table import with_column


def relevance_scores(block: pa.Table) -> np.ndarray:
    """float32 (N,): NaN where a pair could not be scored."""
    return block["relevance"].to_numpy().astype(np.float32)


def relevance_decisions(block: pa.Table, threshold: float) -> tuple[pa.Table, Decisions]:
    """Pairs below the threshold, and those that could not be scored."""
    decisions: Decisions = []
    for score in relevance_scores(block).tolist():
        if math.isnan(score):
            decisions.append(("unscored", "", threshold))
        else:
            decisions.append(None if score >= threshold else ("relevance", score, threshold))
    return block, decisions


def query_matches(block: pa.Table, metadata: Metadata) -> pa.Table:
    """(uid, query) of every metadata query in every caption; the query '' for a caption without any."""
    uids, queries = [], []
    for row in rows_of(block, ("uid", "text")):
        found = [metadata.entries[i] for i in metadata.match(row["text"])] or [UNMATCHED]
        uids += [row["uid"]] * len(found)
        queries += found
    return pa.table({"uid": pa.array(uids, pa.string()), "query": pa.array(queries, pa.string())})


def query_ranks(matches: pa.Table, seed: int) -> pa.Table:
    """(uid, matched, rank from 1 within its query by keyed hash); `matches` holds all pairs of each of its queries."""
    uids, queries = matches["uid"].to_pylist(), matches["query"].to_pylist()
    ranks = rank_within(np.asarray(queries), keyed_hashes(seed, uids, queries), uids) + 1
    matched = [int(query != UNMATCHED) for query in queries]
    return pa.table({"uid": matches["uid"], "matched": pa.array(matched, pa.int32()), "rank": pa.array(ranks)})


def with_balance(block: pa.Table, ranks: pa.Table) -> pa.Table:
    """Adds "balance_t", the smallest t that keeps each pair, and "matches", the number of its queries."""
    best = ranks.group_by("uid").aggregate([("rank", "min"), ("matched", "sum")])
    order = pc.index_in(block["uid"], value_set=best["uid"].combine_chunks())
    block = with_column(block, "balance_t", best["rank_min"].take(order))
    return with_column(block, "matches", best["matched_sum"].take(order))


def selection_decisions(
    block: pa.Table, words: tuple[dict[str, int], int], rules: SelectRules
) -> tuple[pa.Table, Decisions]:
    """`decide_selection` on the columns of the rules that are on.

    Args:
      block: with "balance_t" and "matches", and "cluster_t", where those rules are on.
      words: captions with each word, and the number of pairs that came to this stage, where `min_bits` is on.
      rules: thresholds.
    """
    if rules.min_bits:
        bits = [information(caption, *words)[0] for caption in block["text"].to_pylist()]
        block = with_column(block, "bits", bits, pa.float64())
    if rules.min_gap is not None:
        losses = [block[name].to_numpy() for name in ("learner_loss", "reference_loss")]
        block = with_column(block, "gap", learnability(*losses))
    names = [name for name in ("balance_t", "matches", "bits", "cluster_t", "gap") if name in block.column_names]
    rows = rows_of(block, names) if names else [{}] * len(block)
    return block, [decide_selection(row, rules) for row in rows]


class Relevance(WideStage):
    """The stage 'relevance': pairs whose score "relevance" reaches the threshold of all of them.

    Args:
      rules: None where there is no such score: nothing is dropped.
    """

    def __init__(self, rules: RelevanceRules | None):
        super().__init__("relevance", () if rules is None else ("relevance",))
        self._rules = rules

    def expand(self, blocks: beam.PCollection[pa.Table]) -> Any:
        """{"kept": blocks, "dropped": log rows}."""
        if self._rules is None:
            return {"kept": blocks, "dropped": blocks | "None" >> beam.FlatMap(lambda _: ())}
        threshold = blocks | "Scores" >> beam.Map(relevance_scores) | RelevanceThreshold(self._rules)
        side = beam.pvalue.AsSingleton(threshold)
        return blocks | "Threshold" >> Decide("relevance", relevance_decisions, side)


class Selection(WideStage):
    """The stage 'selection': balance over metadata queries and over embedding clusters, informativeness, learnability.

    Args:
      rules: those that are on.
      metadata: the queries; None where `rules.t` is off.
      seed: of the keyed hashes.
      count: of the blocks.
    """

    def __init__(self, rules: SelectRules, metadata: Metadata | None, seed: int, count: int):
        losses = () if rules.min_gap is None else ("learner_loss", "reference_loss")
        super().__init__("selection", ("text", "embedding_cluster", *losses) if rules.cluster_t else ("text", *losses))
        self._rules, self._metadata, self._seed, self._count = rules, metadata, seed, count

    def expand(self, blocks: beam.PCollection[pa.Table]) -> Any:
        """{"kept": blocks, "dropped": log rows}."""
        if self._rules.t:
            blocks = blocks | "Balance" >> Balance(self._metadata, self._seed, self._count)
        if self._rules.cluster_t:
            blocks = (
                blocks
                | "Embeddings" >> Repartition(functools.partial(_by_embedding, count=self._count))
                | "Ranks" >> beam.Values()
                | "ClusterT" >> beam.Map(_with_cluster_t, self._seed)
            )
        words: Any = ({}, 0)
        if self._rules.min_bits:
            counted = blocks | "Words" >> beam.Map(lambda block: (word_counts(block["text"].to_pylist()), len(block)))
            words = beam.pvalue.AsSingleton(counted | "AddWords" >> beam.CombineGlobally(_add_words))
        decide = functools.partial(selection_decisions, rules=self._rules)
        return blocks | "Select" >> Decide("selection", decide, words)


def _add_words(counts: Iterable[tuple[dict, int]]) -> tuple[dict, int]:
    total, pairs = word_counts(()), 0
    for words, number in counts:
        total.update(words)
        pairs += number
    return total, pairs


def _by_embedding(block: pa.Table, count: int) -> np.ndarray:
    return block["embedding_cluster"].to_numpy() % count


def _with_cluster_t(block: pa.Table, seed: int) -> pa.Table:
    scores = cluster_scores(block["uid"].to_pylist(), block["embedding_cluster"].to_numpy(), seed)
    return with_column(block, "cluster_t", scores)


class Balance(beam.PTransform):
    """Adds "balance_t" and "matches" to every row: ranks within each query, and back to the pairs."""

    def __init__(self, metadata: Metadata, seed: int, count: int):
        super().__init__()
        self._metadata, self._seed, self._count = metadata, seed, count

    def expand(self, blocks: beam.PCollection[pa.Table]) -> beam.PCollection[pa.Table]:
        """Two shuffles: by query, and by uid."""
        by_uid = functools.partial(by_identifier, column="uid", count=self._count)
        ranks = (
            blocks
            | "Match" >> beam.Map(query_matches, self._metadata)
            | "Queries" >> Repartition(functools.partial(_by_query, count=self._count))
            | "Rank" >> beam.Values()
            | "RankRows" >> beam.Map(query_ranks, self._seed)
            | "RanksByUid" >> Repartition(by_uid)
        )
        pairs = blocks | "PairsByUid" >> Repartition(by_uid)
        return {"pairs": pairs, "ranks": ranks} | "Meet" >> beam.CoGroupByKey() | "Add" >> beam.MapTuple(_add_ranks)


def _by_query(matches: pa.Table, count: int) -> np.ndarray:
    # Not Python's hash, which differs between processes.
    queries = (query.encode("utf-8", "surrogatepass") for query in matches["query"].to_pylist())
    return np.fromiter((zlib.crc32(query) % count for query in queries), np.int64, len(matches))


def _add_ranks(number: int, both: dict[str, Any]) -> pa.Table:
    (block,), (ranks,) = both["pairs"], both["ranks"]
    return with_balance(block, ranks)
