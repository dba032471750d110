"""Counts of the decision log: how many pairs come into each stage, and why each of the others goes."""

import collections
import heapq
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.curation.filters.known_pictures import QUARANTINE_REASONS
from florence_jax.curation.keyed import keyed_hashes
from florence_jax.curation.table import read_table, with_column

SIDES = (32, 64, 128, 200, 256, 512, 1024)  # pixels, for drop rates by size
TOP = 20  # values of a slice that are listed
COLUMNS = ("uid", "source", "url", "host", "licence_id", "language", "status", "width", "height", "bytes", "caption")
COLUMNS += ("image_id", "path", "offset", "size", "listed")


class AuditError(RuntimeError):
    """The decision log does not account for every pair: a fault of this program, not of the user."""


def joined_parts(workdir: str, count: int) -> Iterator[pa.Table]:
    """The parts of the table with "stage", "reason", "value" and "threshold" of each row.

    Raises:
      AuditError: unless every uid of the table is in the log exactly once, and no other.
    """
    for number in range(count):
        table = read_table(f"{workdir}/table/part-{number:05d}.parquet", COLUMNS)
        if not len(table):
            continue
        log = read_table(f"{workdir}/decisions/log-{number:05d}.parquet").sort_by("uid")
        if not table["uid"].equals(log["uid"]):
            raise AuditError(f"part {number}: {len(table)} pairs, {len(log)} decisions, and not for the same uids")
        for name in ("stage", "reason", "value", "threshold"):
            table = with_column(table, name, log[name])
        yield table


class Funnel:
    """Counts over all parts, and examples of each reason.

    Args:
      seed: of the choice of examples.
      examples: a reason.
    """

    def __init__(self, seed: int, examples: int):
        self._seed, self._size = seed, examples
        self.reasons: collections.Counter = collections.Counter()
        self.slices: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self._examples: dict[tuple[str, str], list[tuple[int, str, dict[str, Any]]]] = collections.defaultdict(list)
        self.benchmarks: collections.Counter = collections.Counter()
        self.listed: list[str] = []
        self.partners: dict[str, dict[str, Any]] = {}

    def add(self, part: pa.Table) -> None:
        """Counts one part of `joined_parts`."""
        counts = part.group_by(["stage", "reason"]).aggregate([("uid", "count")]).to_pylist()
        self.reasons.update({(row["stage"], row["reason"]): row["uid_count"] for row in counts})
        kept = pc.equal(part["stage"], "output")
        sliced = {"source": part["source"], "language": part["language"], "licence": part["licence_id"]}
        sliced |= {"domain": part["host"], "smaller side": pa.chunked_array([_sides(part)])}
        for name, values in sliced.items():
            both = pa.table({"value": values, "kept": kept}).group_by(["value", "kept"]).aggregate([("kept", "count")])
            self.slices[name].update({(row["value"], row["kept"]): row["kept_count"] for row in both.to_pylist()})
        copies = part.filter(pc.equal(part["stage"], "decontamination"))
        self.benchmarks.update(zip(copies["value"].to_pylist(), copies["reason"].to_pylist(), strict=True))
        self.listed += part.filter(pc.is_valid(part["listed"]))["uid"].to_pylist()
        if self._size:
            self._choose(part.filter(pc.is_null(part["listed"])))

    def _choose(self, part: pa.Table) -> None:
        """Keeps the pairs with the smallest keyed hashes of each reason; none of what must be quarantined."""
        hashes = keyed_hashes(self._seed, part["uid"].to_pylist(), ["example"] * len(part))
        pairs = list(zip(part["stage"].to_pylist(), part["reason"].to_pylist(), strict=True))
        for i in np.argsort(hashes).tolist():
            stage, reason = pairs[i]
            heap = self._examples[stage, reason]
            if reason in QUARANTINE_REASONS or (len(heap) == self._size and -heap[0][0] <= int(hashes[i])):
                continue
            row = part.slice(i, 1).to_pylist()[0]
            push = heapq.heappush if len(heap) < self._size else heapq.heapreplace
            push(heap, (-int(hashes[i]), row["uid"], row))

    def examples(self, stage: str, reason: str) -> list[dict[str, Any]]:
        """Rows of the table with their decision, in a fixed order."""
        return [row for _, _, row in sorted(self._examples[stage, reason], key=lambda entry: -entry[0])]

    def find_partners(self, part: pa.Table) -> None:
        """Remembers the rows that examples name as what they are copies of."""
        heaps = [heap for (stage, _), heap in self._examples.items() if stage == "near_duplicates"]
        wanted = pa.array([row["value"] for heap in heaps for _, _, row in heap], pa.string())
        found = part.filter(pc.is_in(part["uid"], value_set=wanted)).to_pylist()
        self.partners |= {row["uid"]: row for row in found}

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
            {"value": name} | {kind: self.benchmarks[name, f"benchmark_{kind}"] for kind in kinds} for name in names
        ]

    def slice_tables(self) -> dict[str, list[dict[str, Any]]]:
        """Pairs, kept pairs and the share dropped, for the commonest values of each slice."""
        tables = {}
        for name, counts in self.slices.items():
            totals: collections.Counter = collections.Counter()
            for (value, _), number in counts.items():
                totals[value] += number
            commonest = sorted(totals.items(), key=lambda item: (-item[1], item[0]))[:TOP]
            tables[name] = [
                {
                    "value": value,
                    "pairs": n,
                    "kept": counts[value, True],
                    "dropped": round(1 - counts[value, True] / n, 4),
                }
                for value, n in commonest
            ]
        return tables


def _sides(part: pa.Table) -> pa.Array:
    sides = np.minimum(part["width"].to_numpy(), part["height"].to_numpy())
    names = np.array([f"below {SIDES[0]}", *(f"{low} and more" for low in SIDES)])
    return pa.array(np.where(sides > 0, names[np.searchsorted(SIDES, sides, "right")], "unknown"))
