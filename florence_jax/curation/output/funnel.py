"""Counts of the decision log, made part by part on Beam: how many pairs come into each stage, why the others go."""

import collections
import functools
import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.curation.filters.known_pictures import QUARANTINE_REASONS
from florence_jax.curation.keyed import keyed_hashes, rank_within
from florence_jax.curation.table import DECISIONS, partitions, read_table, with_column
from florence_jax.files import exists

SIDES = (32, 64, 128, 200, 256, 512, 1024)  # pixels, for drop rates by size
TOP_REASONS = 20  # values of a slice that are listed
COLUMNS = ("uid", "source", "url", "host", "licence_id", "language", "status", "width", "height", "bytes", "caption")
COLUMNS += ("image_id", "path", "offset", "size", "listed")
# Title in the report, column of the table; "smaller side" is made of two.
SLICES = {"source": "source", "language": "language", "licence": "licence_id", "domain": "host", "smaller side": ""}


class AuditError(RuntimeError):
    """The decision log does not account for every pair: a fault of this program, not of the user."""


def joined_part(workdir: str, number: int) -> pa.Table:
    """A part of the table with "stage", "reason", "value" and "threshold" of each row.

    Raises:
      AuditError: unless every uid of the part is in its log exactly once, and no other.
    """
    table = read_table(f"{workdir}/table/part-{number:05d}.parquet", COLUMNS)
    path = f"{workdir}/decisions/log-{number:05d}.parquet"
    log = read_table(path).sort_by("uid") if exists(path) else DECISIONS.empty_table()
    if not table["uid"].equals(log["uid"]):
        raise AuditError(f"part {number}: {len(table)} pairs, {len(log)} decisions, and not for the same uids")
    for name in ("stage", "reason", "value", "threshold", "refused"):
        table = with_column(table, name, log[name])
    return table


class CountParts(beam.PTransform):
    """Numbers of parts -> {"facts": what `Funnel` reads, one element, "kept", "listed": tables of uids}.

    Args:
      workdir: of the run.
      count: parts of the table.
      seed: of the choice of examples.
      examples: a reason.
    """

    def __init__(self, workdir: str, count: int, seed: int, examples: int):
        super().__init__()
        self._workdir, self._count, self._seed, self._examples = workdir, count, seed, examples

    def expand(self, numbers: beam.PCollection[int]) -> Any:
        """Reads each part once; counts are added up by key, so that no process holds those of all domains."""
        parts = (
            numbers | "Spread" >> beam.Reshuffle() | "Join" >> beam.Map(functools.partial(joined_part, self._workdir))
        )
        reasons = parts | "Reasons" >> beam.FlatMap(_reasons) | "AddReasons" >> beam.CombinePerKey(sum)
        refused = parts | "Refused" >> beam.FlatMap(_refused) | "AddRefused" >> beam.CombinePerKey(sum)
        slices = (
            parts
            | "Slices" >> beam.FlatMap(_slices)
            | "AddSlices" >> beam.CombinePerKey(_add)
            | "BySlice" >> beam.MapTuple(lambda key, counts: (key[0], [(key[1], *counts)]))
            | "Commonest" >> beam.CombinePerKey(_commonest)
        )
        least = functools.partial(_least, size=self._examples)
        examples = parts | "Examples" >> beam.FlatMap(_examples, self._seed, self._examples)
        examples = examples | "Least" >> beam.CombinePerKey(least)
        partners = (
            examples
            | "Wanted" >> beam.FlatMapTuple(functools.partial(_wanted, count=self._count))
            | "ByPart" >> beam.GroupByKey()
            | "Partners" >> beam.FlatMapTuple(functools.partial(_partners, workdir=self._workdir))
        )
        sides = [beam.pvalue.AsList(found) for found in (reasons, refused, slices, examples, partners)]
        return {
            "facts": numbers.pipeline | "One" >> beam.Create([None]) | "Facts" >> beam.Map(_facts, *sides),
            "kept": parts | "Kept" >> beam.Map(lambda part: _uids(part, pc.equal(part["stage"], "output"))),
            "listed": parts | "Listed" >> beam.Map(lambda part: _uids(part, pc.is_valid(part["listed"]))),
        }


def _uids(part: pa.Table, mask: pa.ChunkedArray) -> pa.Table:
    return part.select(["uid"]).filter(mask)


def _reasons(part: pa.Table) -> Iterator[tuple[tuple[str, str, str], int]]:
    """((stage, reason, benchmark or ''), pairs)."""
    copies = pc.equal(part["stage"], "decontamination")
    part = with_column(part, "benchmark", pc.if_else(copies, part["value"], ""))
    keys = ["stage", "reason", "benchmark"]
    for row in part.group_by(keys).aggregate([("uid", "count")]).to_pylist():
        yield tuple(row[key] for key in keys), row["uid_count"]


def _refused(part: pa.Table) -> Iterator[tuple[str, int]]:
    """(reason, captions) of those that pictures in the output lost and kept others."""
    lost = part.filter(pc.equal(part["stage"], "output"))["refused"]
    for row in pc.list_flatten(lost).value_counts().to_pylist():
        yield row["values"], row["counts"]


def _slices(part: pa.Table) -> Iterator[tuple[tuple[str, str | None], tuple[int, int]]]:
    """((slice, value), (pairs, kept pairs))."""
    kept = pc.equal(part["stage"], "output").cast(pa.int64())
    for name, column in SLICES.items():
        values = part[column] if column else pa.chunked_array([_sides(part)])
        counts = (
            pa.table({"value": values, "kept": kept}).group_by("value").aggregate([("kept", "count"), ("kept", "sum")])
        )
        for row in counts.to_pylist():
            yield (name, row["value"]), (row["kept_count"], row["kept_sum"])


def _sides(part: pa.Table) -> pa.Array:
    sides = np.minimum(part["width"].to_numpy(), part["height"].to_numpy())
    names = np.array([f"below {SIDES[0]}", *(f"{low} and more" for low in SIDES)])
    return pa.array(np.where(sides > 0, names[np.searchsorted(SIDES, sides, "right")], "unknown"))


def _add(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    pairs, kept = 0, 0
    for both in counts:
        pairs, kept = pairs + both[0], kept + both[1]
    return pairs, kept


def _commonest(lists: Iterable[Sequence[tuple]]) -> list[tuple]:
    """The TOP_REASONS values of one slice, as (value, pairs, kept pairs)."""
    return heapq.nsmallest(
        TOP_REASONS, itertools.chain.from_iterable(lists), key=lambda row: (-row[1], row[0] or "", row[0] is None)
    )


def _examples(part: pa.Table, seed: int, size: int) -> Iterator[tuple[tuple[str, str], list[tuple]]]:
    """((stage, reason), its rows with the smallest keyed hashes); none of what must be quarantined."""
    shown = pc.and_(
        pc.is_null(part["listed"]),
        pc.invert(pc.is_in(part["reason"], value_set=pa.array(sorted(QUARANTINE_REASONS), pa.string()))),
    )
    part = part.filter(shown)
    if not size or not len(part):
        return
    hashes = keyed_hashes(seed, part["uid"].to_pylist(), ["example"] * len(part))
    reasons = pc.binary_join_element_wise(part["stage"], part["reason"], " ").combine_chunks().dictionary_encode()
    ranks = rank_within(reasons.indices.to_numpy(), hashes, np.arange(len(part)))  # rows are in the order of uids
    chosen = np.flatnonzero(ranks < size)
    for value, row in zip(hashes[chosen].tolist(), part.take(chosen).to_pylist(), strict=True):
        yield (row["stage"], row["reason"]), [(value, row["uid"], row)]


def _least(lists: Iterable[Sequence[tuple]], size: int) -> list[tuple]:
    return heapq.nsmallest(size, itertools.chain.from_iterable(lists), key=lambda entry: entry[:2])


def _wanted(reason: tuple[str, str], entries: Sequence[tuple], count: int) -> Iterator[tuple[int, str]]:
    """(part, uid) of what examples of near-duplicates are copies of."""
    if reason[0] == "near_duplicates" and entries:
        uids = [row["value"] for _, _, row in entries]
        yield from zip(partitions(pa.chunked_array([uids]), count).tolist(), uids, strict=True)


def _partners(number: int, uids: Iterable[str], workdir: str) -> list[dict[str, Any]]:
    part = read_table(f"{workdir}/table/part-{number:05d}.parquet", COLUMNS)
    return part.filter(pc.is_in(part["uid"], value_set=pa.array(sorted(set(uids)), pa.string()))).to_pylist()


def _facts(
    _: None, reasons: Sequence, refused: Sequence, slices: Sequence, examples: Sequence, partners: Sequence
) -> dict[str, Any]:
    """In an order that does not depend on the workers."""
    return {
        "refused_captions": dict(sorted(refused)),
        "reasons": sorted([*key, number] for key, number in reasons),
        "slices": dict(sorted(slices)),
        "examples": sorted([*key, [row for _, _, row in entries]] for key, entries in examples),
        "partners": sorted(partners, key=lambda row: row["uid"]),
    }


class Funnel:
    """What the report is made of: a few counts and rows, however many pairs there are.

    Args:
      facts: of `CountParts`, perhaps read from JSON.

    Attributes:
      reasons: pairs by (stage, reason).
      partners: rows of the table by uid, of what examples are copies of.
    """

    def __init__(self, facts: Mapping[str, Any]):
        self.reasons: collections.Counter = collections.Counter()
        self._benchmarks: collections.Counter = collections.Counter()
        for stage, reason, benchmark, number in facts["reasons"]:
            self.reasons[stage, reason] += number
            self._benchmarks[benchmark, reason] += number
        self._slices = facts["slices"]
        self._examples = {(stage, reason): rows for stage, reason, rows in facts["examples"]}
        self.partners: dict[str, dict[str, Any]] = {row["uid"]: row for row in facts["partners"]}

    def examples(self, stage: str, reason: str) -> list[dict[str, Any]]:
        """Rows of the table with their decision, in a fixed order."""
        return self._examples.get((stage, reason), [])

    def stages(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """For each stage, named in their order: pairs that came, were kept, and how many left for each reason."""
        stages, left = [], sum(self.reasons.values())
        for stage in names:
            reasons = {reason: n for (name, reason), n in sorted(self.reasons.items()) if name == stage}
            stages.append({"stage": stage, "came": left, "kept": left - sum(reasons.values()), "reasons": reasons})
            left = stages[-1]["kept"]
        return stages

    def benchmark_table(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """For each benchmark, how many pairs were removed as exact copies of its pictures, and as resized ones."""
        kinds = ("exact", "near")
        return [
            {"value": name} | {kind: self._benchmarks[name, f"benchmark_{kind}"] for kind in kinds} for name in names
        ]

    def slice_tables(self) -> dict[str, list[dict[str, Any]]]:
        """Pairs, kept pairs and the share dropped, for the commonest values of each slice."""
        return {
            name: [
                {"value": value, "pairs": pairs, "kept": kept, "dropped": round(1 - kept / pairs, 4)}
                for value, pairs, kept in self._slices[name]
            ]
            for name in SLICES
        }
