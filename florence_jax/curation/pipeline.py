"""The stages as Beam transforms over blocks of the table of scores.

Every stage takes blocks (Arrow tables) and gives {"kept": blocks, "dropped": log rows}. A stage that must see all pairs
with one key (a caption, a cluster, a query) first brings them together with `Repartition`; blocks are columns, so that
Beam moves thousands of rows as one element. What the stages decide is in `decide`; nothing here opens an image but
`Measure` and `Score`.
"""

import dataclasses
import functools
import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.curation import decide
from florence_jax.curation.dedup import BenchmarkIndex, Views, hash_rows, representatives, split_components, total_order
from florence_jax.curation.inputs import Split
from florence_jax.curation.measure import measure_split
from florence_jax.curation.rules import FIELD, Rules
from florence_jax.curation.select import cluster_scores, word_counts
from florence_jax.curation.table import concatenate, partitions, read_bytes, read_table, split_by, with_column

Numbers = Callable[[pa.Table], np.ndarray]


class Measure(beam.PTransform):
    """Splits -> paths of their parts of the table of scores; a part that is there already is not made again."""

    def __init__(self, workdir: str, rules: Rules):
        super().__init__()
        self._workdir, self._rules = workdir, rules.measure

    def expand(self, splits: beam.PCollection[Split]) -> beam.PCollection[str]:
        """Spreads the splits over the workers and measures each."""
        return splits | beam.Reshuffle() | beam.Map(measure_split, self._workdir, self._rules)


class Repartition(beam.PTransform):
    """Blocks -> (number, block of all rows with it, sorted), where `numbers` gives the number of each row."""

    def __init__(self, numbers: Numbers, sort_by: str = "uid"):
        super().__init__()
        self._numbers, self._sort_by = numbers, sort_by

    def expand(self, blocks: beam.PCollection[pa.Table]) -> beam.PCollection[tuple[int, pa.Table]]:
        """One shuffle."""
        return (
            blocks
            | "Split" >> beam.FlatMap(_split, self._numbers)
            | "Group" >> beam.GroupByKey()
            | "Join" >> beam.MapTuple(functools.partial(_joined, sort_by=self._sort_by))
        )


def _split(block: pa.Table, numbers: Numbers) -> Iterator[tuple[int, pa.Table]]:
    return iter(split_by(block, numbers(block))) if len(block) else iter(())


def _joined(number: int, blocks: Iterable[pa.Table], sort_by: str) -> tuple[int, pa.Table]:
    return number, concatenate(blocks, sort_by)


def by_identifier(block: pa.Table, column: str, count: int) -> np.ndarray:
    """Numbers for `Repartition`: ranges of a hexadecimal column."""
    return partitions(block[column], count)


class Stage(beam.PTransform):
    """A stage that decides each block by itself.

    Args:
      name: of the stage, in the decision log.
      function: (block, rules, *side inputs) -> (block, decisions); see `decide`.
      rules: of the run.
      sides: side inputs.
    """

    def __init__(self, name: str, function: Callable[..., Any], rules: Rules, *sides: Any):
        super().__init__(name)
        self._name, self._function, self._rules, self._sides = name, function, rules, sides

    def expand(self, blocks: beam.PCollection[pa.Table]) -> Any:
        """{"kept": blocks, "dropped": log rows}."""
        outputs = blocks | "Decide" >> beam.ParDo(
            _Decide(self._name, self._function, self._rules), *self._sides
        ).with_outputs("dropped", main="kept")
        return {"kept": outputs.kept, "dropped": outputs.dropped}


class _Decide(beam.DoFn):
    def __init__(self, name: str, function: Callable[..., Any], rules: Rules):
        self._name, self._function, self._rules = name, function, rules

    def process(self, block: pa.Table, *sides: Any) -> Iterator[Any]:
        block, decisions = self._function(block, self._rules, *sides)
        kept, dropped = decide.split_decided(block, self._name, decisions, self._rules.digest)
        if len(kept):
            yield kept
        if len(dropped):
            yield beam.pvalue.TaggedOutput("dropped", dropped)


class NearDuplicates(beam.PTransform):
    """One representative of each cluster goes on, with the captions of all.

    Blocks need the column "cluster": a number, -1 for pairs without a near-duplicate, which are not shuffled.
    """

    def __init__(self, rules: Rules, count: int):
        super().__init__("near_duplicates")
        self._rules, self._count = rules, count

    def expand(self, blocks: beam.PCollection[pa.Table]) -> Any:
        """{"kept": blocks, "dropped": log rows}."""
        chosen = blocks | "Captions" >> beam.Map(decide.caption_choice, self._rules)
        single = chosen | "Single" >> beam.Map(_single) | "SomeSingle" >> beam.Filter(len)
        members = (
            chosen
            | "Members" >> beam.Map(_members)
            | "SomeMembers" >> beam.Filter(len)
            | "Clusters" >> Repartition(functools.partial(_by_cluster, count=self._count))
            | "Blocks" >> beam.Values()
        )
        decided = members | "Choose" >> Stage("near_duplicates", choose, self._rules)
        return {"kept": (single, decided["kept"]) | "Both" >> beam.Flatten(), "dropped": decided["dropped"]}


def _single(block: pa.Table) -> pa.Table:
    return decide.singletons(block.filter(pc.less(block["cluster"], 0)))


def _members(block: pa.Table) -> pa.Table:
    return block.filter(pc.greater_equal(block["cluster"], 0))


def _by_cluster(block: pa.Table, count: int) -> np.ndarray:
    return block["cluster"].to_numpy() % count


def measured_rows(block: pa.Table) -> list[dict[str, Any]]:
    """What `dedup` reads of each row."""
    rows = block.select(["status", "image_id", "h64", "h256", "detail", "aspect", "probes"]).to_pylist()
    return [row | {"image_id": bytes.fromhex(row["image_id"])} for row in rows]


def choose(block: pa.Table, rules: Rules) -> tuple[pa.Table, decide.Decisions]:
    """Representatives of whole clusters, by a total order: none of the post-filter's objections, not letterboxed, more
    pixels, a usable caption, smallest uid. Clusters above `star_above` are split around their representatives first.
    """
    measured = measured_rows(block)
    rows = block.select(["uid", "image_id", "width", "height", "text_decision", "clean"]).to_pylist()
    # A score made from pictures is there for representatives only, so it has no say in who they are.
    known = dataclasses.replace(rules.safety, max_nsfw=None) if "nsfw" in rules.scorers else rules.safety
    unflagged = with_column(block, "flag", [""] * len(block), pa.string())
    _, objections = decide.post_filter(unflagged, dataclasses.replace(rules, safety=known))
    ranks = total_order(
        np.array([objection is not None for objection in objections]),
        np.array([any(probe["kind"] == "trimmed" for probe in row["probes"]) for row in measured]),
        np.array([-row["width"] * row["height"] for row in rows]),
        np.array([bool(row["text_decision"]) or not row["clean"] for row in rows]),
        np.arange(len(rows)),  # the block is sorted by uid
    )
    _, same = np.unique([row["image_id"] for row in rows], return_inverse=True)
    same = np.unique(same, return_index=True)[1][same]
    labels = np.unique(block["cluster"].to_numpy(), return_inverse=True)[1]
    labels = np.unique(labels, return_index=True)[1][labels]
    views = Views.of(hash_rows(range(len(rows)), measured), len(rows))
    labels = split_components(labels, ranks, views, same, rules.join.max_d256, rules.star_above)
    places, _ = representatives(labels, ranks)
    limits = f"d64<={rules.join.k}, d256<={rules.join.max_d256}"
    reasons: decide.Decisions = []
    for i, place in enumerate(places.tolist()):
        kind = "exact_copy" if rows[i]["image_id"] == rows[place]["image_id"] else "near_duplicate"
        threshold = "" if kind == "exact_copy" else limits
        reasons.append(None if place == i else (kind, rows[place]["uid"], threshold))
    return decide.clusters(block, places, reasons)


class Text(beam.PTransform):
    """Usable captions, then the cap of pairs with one caption."""

    def __init__(self, rules: Rules, count: int):
        super().__init__("text")
        self._rules, self._count = rules, count

    def expand(self, blocks: beam.PCollection[pa.Table]) -> Any:
        """{"kept": blocks, "dropped": log rows}."""
        usable = blocks | "Usable" >> Stage("text", decide.text, self._rules)
        if not self._rules.cap:
            return usable
        numbers = functools.partial(by_identifier, column="text_id", count=self._count)
        capped = (
            usable["kept"]
            | "Captions" >> Repartition(numbers)
            | "Blocks" >> beam.Values()
            | "Cap" >> Stage("text", decide.frequency, self._rules)
        )
        dropped = (usable["dropped"], capped["dropped"]) | "Dropped" >> beam.Flatten()
        return {"kept": capped["kept"], "dropped": dropped}


class Relevance(beam.PTransform):
    """Pairs whose score "relevance" reaches the threshold; nothing is dropped where there is no such score."""

    def __init__(self, rules: Rules):
        super().__init__("relevance")
        self._rules = rules

    def expand(self, blocks: beam.PCollection[pa.Table]) -> Any:
        """{"kept": blocks, "dropped": log rows}."""
        if not self._rules.scores.get("relevance"):
            return {"kept": blocks, "dropped": blocks | "None" >> beam.FlatMap(lambda _: ())}
        from florence_jax.curation.relevance import RelevanceThreshold  # loads JAX

        scores = blocks | "Scores" >> beam.Map(decide.relevance_scores)
        threshold = scores | RelevanceThreshold(self._rules.relevance)
        side = beam.pvalue.AsSingleton(threshold)
        return blocks | "Threshold" >> Stage("relevance", _relevance, self._rules, side)


def _relevance(block: pa.Table, rules: Rules, threshold: float) -> tuple[pa.Table, decide.Decisions]:
    return decide.relevance(block, threshold)


class Selection(beam.PTransform):
    """Balance over metadata queries and over embedding clusters, informativeness, learnability: those that are on."""

    def __init__(self, rules: Rules, count: int):
        super().__init__("selection")
        self._rules, self._count = rules, count

    def expand(self, blocks: beam.PCollection[pa.Table]) -> Any:
        """{"kept": blocks, "dropped": log rows}."""
        select = self._rules.select
        if select.t:
            blocks = blocks | "Balance" >> Balance(self._rules, self._count)
        if select.cluster_t:
            blocks = (
                blocks
                | "Embeddings" >> Repartition(functools.partial(_by_embedding, count=self._count))
                | "Ranks" >> beam.Values()
                | "ClusterT" >> beam.Map(_with_cluster_t, self._rules.seed)
            )
        words: Any = ({}, 0)
        if select.min_bits:
            counted = blocks | "Words" >> beam.Map(lambda block: (word_counts(block["text"].to_pylist()), len(block)))
            words = beam.pvalue.AsSingleton(counted | "AddWords" >> beam.CombineGlobally(_add_words))
        return blocks | "Select" >> Stage("selection", _selection, self._rules, words)


def _selection(block: pa.Table, rules: Rules, words: tuple[dict, int]) -> tuple[pa.Table, decide.Decisions]:
    return decide.selection(block, rules, *words)


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

    def __init__(self, rules: Rules, count: int):
        super().__init__()
        self._rules, self._count = rules, count

    def expand(self, blocks: beam.PCollection[pa.Table]) -> beam.PCollection[pa.Table]:
        """Two shuffles: by query, and by uid."""
        by_uid = functools.partial(by_identifier, column="uid", count=self._count)
        ranks = (
            blocks
            | "Match" >> beam.Map(decide.query_matches, self._rules)
            | "Queries" >> Repartition(functools.partial(_by_query, count=self._count))
            | "Rank" >> beam.Values()
            | "RankRows" >> beam.Map(decide.query_ranks, self._rules)
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
    return decide.with_balance(block, ranks)


def decontaminate(block: pa.Table, rules: Rules, index: str) -> tuple[pa.Table, decide.Decisions]:
    """Copies of benchmark pictures, exact and resized; the value is the benchmark's name."""
    names = {"exact": "benchmark_exact", "near": "benchmark_near"}
    found = benchmark_index(index).query(measured_rows(block), rules.benchmark_detail)
    return block, [match and (names[match["kind"]], match["benchmark"], match["d256"]) for match in found]


@functools.lru_cache(1)
def benchmark_index(path: str) -> BenchmarkIndex:
    """The index of a file, once a process."""
    return BenchmarkIndex.load(io.BytesIO(read_bytes(path)))


def with_fields(block: pa.Table, rules: Rules) -> pa.Table:
    """Adds the scores that come from fields of the raw pairs ('field:NAME'); NaN where a pair has none.

    A number may be written as text, as csv files have it.
    """
    fields = {name: spec.removeprefix(FIELD) for name, spec in rules.scores.items() if spec.startswith(FIELD)}
    if not fields:
        return block
    extras = [json.loads(extra) for extra in block["extra"].to_pylist()]
    for name, field in fields.items():
        numbers = [_number(extra.get(field)) for extra in extras]
        block = with_column(block, name, numbers, pa.float32())
    return block


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def load_block(number_and_path: tuple[int, str], rules: Rules, clusters: str, scores: str) -> pa.Table:
    """A part of the table with the columns that other phases made: "cluster", and scores of pictures.

    Args:
      number_and_path: of the part.
      rules: of the run.
      clusters: folder of the cluster numbers.
      scores: folder of the scores made from pictures; '' where there are none.
    """
    number, path = number_and_path
    block = with_fields(read_table(path), rules)
    block = with_column(block, "cluster", read_table(f"{clusters}/part-{number:05d}.parquet")["cluster"])
    if scores:
        made = read_table(f"{scores}/part-{number:05d}.parquet")
        places = pc.index_in(block["uid"], value_set=made["uid"].combine_chunks())
        for name in made.column_names[2:]:  # the first two are "uid" and "text_id"
            block = with_column(block, name, made[name].take(places))
        for name in rules.scorers:
            block = with_column(block, name, pc.fill_null(block[name], float("nan")))
    return block


class Alive(beam.PTransform):
    """(number, path) of parts -> {"blocks": what is alive after quarantine, validity, size, near-duplicates and text,
    "dropped": log rows of the others}.
    """

    def __init__(self, rules: Rules, count: int, clusters: str, scores: str = ""):
        super().__init__()
        self._rules, self._count = rules, count
        self._clusters, self._scores = clusters, scores

    def expand(self, parts: beam.PCollection[tuple[int, str]]) -> Any:
        """Chains the stages."""
        rules = self._rules
        blocks = parts | "Spread" >> beam.Reshuffle() | beam.Map(load_block, rules, self._clusters, self._scores)
        stages = (
            Stage("quarantine", decide.quarantine, rules),
            Stage("validity", decide.validity, rules),
            Stage("size", decide.size, rules),
            NearDuplicates(rules, self._count),
            Text(rules, self._count),
        )
        return chain(blocks, stages)


def chain(blocks: beam.PCollection[pa.Table], stages: Iterable[beam.PTransform]) -> dict[str, Any]:
    """{"blocks": what the last stage keeps, "dropped": log rows of all, "entering": blocks before each stage}."""
    dropped, entering = [], {}
    for stage in stages:
        entering[stage.label] = blocks
        outputs = blocks | stage
        blocks = outputs["kept"]
        dropped.append(outputs["dropped"])
    return {"blocks": blocks, "dropped": dropped, "entering": entering}
