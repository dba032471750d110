"""The stages near_duplicates and decontamination on blocks."""

import dataclasses
import functools
import io
import json
from collections.abc import Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.curation.blocks import Decide, Decisions, Repartition, Stage, WideStage, rows_of
from florence_jax.curation.dedup.benchmarks import BenchmarkIndex
from florence_jax.curation.dedup.clusters import (
    HASHED,
    MEASURED,
    measured_rows,
    representatives,
    star_clusters,
    total_order,
)
from florence_jax.curation.dedup.join import Join
from florence_jax.curation.dedup.views import Views
from florence_jax.curation.filters.captions import USABLE, TextRules, judge_captions
from florence_jax.curation.filters.post_filter import PostFilterRules, decide_post_filter, post_filter_columns
from florence_jax.curation.table import OF_CAPTION, with_column
from florence_jax.files import read_bytes

_JUDGED = (*(name for name, _ in OF_CAPTION), "others")  # of the captions
# Columns that the choice of a representative reads, besides those of its picture.
_CAPTION_COLUMNS = (
    "uid",
    *_JUDGED,
    "url",
    "width",
    "height",
    "cluster",
)


@dataclasses.dataclass(frozen=True)
class DuplicateRules:
    """What the stage 'near_duplicates' reads.

    Attributes:
      join: the distances.
      text: of the captions that a representative can take over.
      post_filter: pairs that it would drop are not representatives. Without "nsfw" where that is a score made from
        pictures, which is there for representatives only.
    """

    join: Join
    text: TextRules
    post_filter: PostFilterRules


def caption_choice(block: pa.Table, rules: DuplicateRules) -> pa.Table:
    """Adds what the stages after this one need of every member of a cluster.

    "usable" (its captions that can be used), "refused" (the reasons of its others, if any can be used),
    "text_decision" (JSON of the decision on its first caption if none can be used, or ''), "clean" (no personal data in
    the usable captions), "flag" ('takedown' or ''): why the whole cluster must go.
    """
    captions, refusals, decisions, clean, flags = [], [], [], [], []
    for row in rows_of(block, ("uid", "url", "image_id", *_JUDGED)):
        usable, refused, decision = judge_captions(row, rules.text, rules.post_filter.safety.personal)
        captions.append(usable)
        refusals.append(refused)
        decisions.append(json.dumps(decision) if decision else "")
        clean.append(all(not caption["personal"] for caption in usable))
        takedown = rules.post_filter.takedown
        taken = takedown and takedown.decide(row["uid"], row["url"], row["image_id"])
        flags.append("takedown" if taken else "")
    block = with_column(block.drop_columns(["others"]), "usable", captions, pa.list_(USABLE))
    block = with_column(block, "refused", refusals, pa.list_(pa.string()))
    block = with_column(block, "text_decision", decisions, pa.string())
    return with_column(with_column(block, "clean", clean, pa.bool_()), "flag", flags, pa.string())


def singletons(block: pa.Table) -> pa.Table:
    """Pairs without a near-duplicate, with the columns that `clusters` adds to representatives."""
    captions = [[caption["caption"] for caption in usable] for usable in block["usable"].to_pylist()]
    block = with_column(block, "captions", captions, pa.list_(pa.string()))
    return with_column(block, "members", [1] * len(block), pa.int32())


def cluster_decisions(block: pa.Table, places: np.ndarray, reasons: Decisions) -> tuple[pa.Table, Decisions]:
    """Gives each representative the captions of its cluster, their number, and the flag of any member.

    Args:
      block: whole clusters, after `caption_choice`.
      places: int64 (N,), row of the representative of each row.
      reasons: why each row goes; None for representatives.
    """
    rows = rows_of(block, ("uid", "usable", "refused", "clean", "flag"))
    captions: list[list[str]] = [[] for _ in rows]
    refused: list[list[str]] = [[] for _ in rows]
    members, flags = [0] * len(rows), [""] * len(rows)
    for place in np.unique(places).tolist():
        inside = np.flatnonzero(places == place).tolist()
        captions[place] = _captions([rows[place], *(rows[i] for i in inside if i != place)])
        refused[place] = [reason for i in inside for reason in rows[i]["refused"]]
        members[place] = len(inside)
        flags[place] = max(rows[i]["flag"] for i in inside)
    block = with_column(block, "captions", captions, pa.list_(pa.string()))
    block = with_column(block, "refused", refused, pa.list_(pa.string()))
    block = with_column(block, "members", members, pa.int32())
    return with_column(block, "flag", flags, pa.string()), reasons


def _captions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Distinct usable captions of a cluster, if possible without personal data; the first row's comes first."""
    usable = [row for row in rows if row["usable"]]
    usable = [row for row in usable if row["clean"]] or usable[:1]
    found: dict[str, str] = {}
    for caption in (caption for row in usable for caption in row["usable"]):
        found.setdefault(caption["text"], caption["caption"])
    return list(found.values())


class NearDuplicates(WideStage):
    """The stage 'near_duplicates': one representative of each cluster goes on, with the captions of all.

    Blocks need the column "cluster": a number, -1 for pairs without a near-duplicate, which are not shuffled.
    """

    def __init__(self, rules: DuplicateRules, count: int):
        super().__init__("near_duplicates", (*_CAPTION_COLUMNS, *MEASURED, *post_filter_columns(rules.post_filter)))
        self._rules, self._count = rules, count

    def expand(self, blocks: beam.PCollection[pa.Table]) -> Any:
        """{"kept": blocks, "dropped": log rows}."""
        chosen = blocks | "Captions" >> beam.Map(caption_choice, self._rules)
        single = chosen | "Single" >> beam.Map(_single) | "SomeSingle" >> beam.Filter(len)
        members = (
            chosen
            | "Members" >> beam.Map(_members)
            | "SomeMembers" >> beam.Filter(len)
            | "Clusters" >> Repartition(functools.partial(_by_cluster, count=self._count))
            | "Blocks" >> beam.Values()
        )
        decided = members | "Choose" >> Decide("near_duplicates", functools.partial(choose, rules=self._rules))
        return {"kept": (single, decided["kept"]) | "Both" >> beam.Flatten(), "dropped": decided["dropped"]}


def _single(block: pa.Table) -> pa.Table:
    return singletons(block.filter(pc.less(block["cluster"], 0)))


def _members(block: pa.Table) -> pa.Table:
    return block.filter(pc.greater_equal(block["cluster"], 0))


def _by_cluster(block: pa.Table, count: int) -> np.ndarray:
    return block["cluster"].to_numpy() % count


def choose(block: pa.Table, rules: DuplicateRules) -> tuple[pa.Table, Decisions]:
    """Representatives of whole clusters, by a total order: none of the post-filter's objections, not letterboxed, more
    pixels, a usable caption, smallest uid. Components are cut into stars around them (`star_clusters`).
    """
    measured = measured_rows(block, MEASURED)
    rows = block.select(["uid", "image_id", "width", "height", "text_decision", "clean"]).to_pylist()
    post = rules.post_filter
    objections = [decide_post_filter(row, post) for row in rows_of(block, post_filter_columns(post))]
    ranks = total_order(
        np.array([objection is not None for objection in objections]),
        np.array([any(probe["kind"] == "trimmed" for probe in row["probes"]) for row in measured]),
        np.array([-row["width"] * row["height"] for row in rows]),
        np.array([bool(row["text_decision"]) or not row["clean"] for row in rows]),
        np.arange(len(rows)),  # the block is sorted by uid
    )
    labels = np.unique(block["cluster"].to_numpy(), return_inverse=True)[1]
    labels = np.unique(labels, return_index=True)[1][labels]
    labels = star_clusters(labels, ranks, Views.of(measured), rules.join)
    places, _ = representatives(labels, ranks)
    limits = f"d64<={rules.join.k}, d256<={rules.join.max_d256}"
    reasons: Decisions = []
    for i, place in enumerate(places.tolist()):
        kind = "exact_copy" if rows[i]["image_id"] == rows[place]["image_id"] else "near_duplicate"
        threshold = "" if kind == "exact_copy" else limits
        reasons.append(None if place == i else (kind, rows[place]["uid"], threshold))
    return cluster_decisions(block, places, reasons)


def decontamination_decisions(block: pa.Table, index: str, min_detail: float) -> tuple[pa.Table, Decisions]:
    """Copies of benchmark pictures, exact and resized; the value is the benchmark's name."""
    if not index:
        return block, [None] * len(block)
    names = {"exact": "benchmark_exact", "near": "benchmark_near"}
    found = benchmark_index(index).query(measured_rows(block), min_detail)
    return block, [match and (names[match["kind"]], match["benchmark"], match["d256"]) for match in found]


def decontamination_stage(index: str, min_detail: float) -> Stage:
    """The stage 'decontamination'.

    Args:
      index: file of the `BenchmarkIndex`; '' where there are no benchmarks.
      min_detail: benchmark pictures with less are found as exact copies only.
    """
    decide = functools.partial(decontamination_decisions, index=index, min_detail=min_detail)
    return Stage("decontamination", HASHED, decide)


@functools.lru_cache(1)
def benchmark_index(path: str) -> BenchmarkIndex:
    """The index of a file, once a process."""
    return BenchmarkIndex.load(io.BytesIO(read_bytes(path)))
