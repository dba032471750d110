"""Edges between near-duplicates on Beam: exact copies, and the covering-design join.

Rows are numbered in the order of the table, so that the numbers, and with them all edges, do not depend on the order
of the input or on the workers. Edges are int64 (e, 2) arrays, (smaller, larger) row number.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from florence_jax.curation.blocks import Repartition, chain_stages
from florence_jax.curation.dedup.clusters import ASPECT_STEP, HASHED, exact_edges, measured_rows
from florence_jax.curation.dedup.join import HashRows, block_edges, covering_tables, merge_counts, partition_of
from florence_jax.curation.dedup.views import hash_rows, wide_hashes
from florence_jax.curation.table import read_table, with_column


class CandidateEdges(beam.PTransform):
    """(path, first row number) of parts -> {"edges": arrays, "counts": of the join}.

    Args:
      rules: of the run; pictures that validity or size drop are left out.
      count: partitions of each shuffle, and of each table of the join.
    """

    def __init__(self, rules: Any, count: int):
        super().__init__()
        self._rules, self._count = rules, count

    def expand(self, parts: beam.PCollection[tuple[str, int]]) -> Any:
        """Three shuffles: by bytes, by 256-bit hash, by the keys of the join."""
        rules, count = self._rules, self._count
        stages = rules.picture_stages()
        columns = sorted({"uid", "source", *HASHED, *(name for stage in stages for name in stage.columns)})
        blocks = parts | "Spread" >> beam.Reshuffle() | beam.MapTuple(functools.partial(_numbered, columns=columns))
        blocks = chain_stages(blocks, stages)["blocks"]
        copies = _Collapse(functools.partial(_by_bytes, count=count), _equal_bytes)
        bytes_once = blocks | "Copies" >> copies
        detailed = bytes_once["blocks"] | "Detail" >> beam.Map(_detailed, rules.min_detail) | beam.Filter(len)
        same_hash = _Collapse(functools.partial(_by_hash, count=count), _equal_hash)
        hashes_once = detailed | "SameHash" >> same_hash
        joined = (
            hashes_once["blocks"]
            | "Keys" >> beam.FlatMap(_join_keys, rules.join.k, count)
            | "Meet" >> beam.GroupByKey()
            | "Join" >> beam.MapTuple(functools.partial(_join, join=rules.join))
        )
        found = joined | "Found" >> beam.Map(lambda both: both[0])
        counts = joined | "Counts" >> beam.Map(lambda both: both[1]) | beam.CombineGlobally(_merge)
        return {"edges": (bytes_once["edges"], hashes_once["edges"], found) | beam.Flatten(), "counts": counts}


def _numbered(path: str, first: int, columns: Sequence[str]) -> pa.Table:
    block = read_table(path, columns)
    return with_column(block, "rid", np.arange(first, first + len(block)))


class _Collapse(beam.PTransform):
    """Blocks -> {"edges": between equal rows, "blocks": the first of each}."""

    def __init__(self, numbers: Callable[[pa.Table], np.ndarray], equal: Callable[[pa.Table], np.ndarray]):
        super().__init__()
        self._numbers, self._equal = numbers, equal

    def expand(self, blocks: beam.PCollection[pa.Table]) -> Any:
        both = blocks | Repartition(self._numbers) | beam.MapTuple(functools.partial(_collapsed, equal=self._equal))
        edges = both | "Edges" >> beam.Map(lambda pair: pair[0])
        return {"edges": edges, "blocks": both | "Blocks" >> beam.Map(lambda pair: pair[1])}


def _collapsed(number: int, block: pa.Table, equal: Callable[[pa.Table], np.ndarray]) -> tuple[np.ndarray, pa.Table]:
    edges = equal(block)
    first = ~np.isin(block["rid"].to_numpy(), edges[:, 1])
    return edges, block.filter(pa.array(first))


def _by_bytes(block: pa.Table, count: int) -> np.ndarray:
    return np.array([int(text[:8], 16) % count for text in block["image_id"].to_pylist()], np.int64)


def _equal_bytes(block: pa.Table) -> np.ndarray:
    ids = b"".join(map(bytes.fromhex, block["image_id"].to_pylist()))
    return exact_edges(block["rid"].to_numpy(), np.frombuffer(ids, np.uint64).reshape(-1, 2))


def _detailed(block: pa.Table, least: float) -> pa.Table:
    return block.filter(pa.array(block["detail"].to_numpy() >= least))


def _by_hash(block: pa.Table, count: int) -> np.ndarray:
    wide = wide_hashes(block["h256"].to_pylist())
    return ((wide[:, 0] ^ wide[:, 1]) % np.uint64(count)).astype(np.int64)


def _equal_hash(block: pa.Table) -> np.ndarray:
    shape = np.rint(np.log(block["aspect"].to_numpy().astype(np.float64)) / np.log(ASPECT_STEP))
    return exact_edges(block["rid"].to_numpy(), wide_hashes(block["h256"].to_pylist()), shape)


def _join_keys(block: pa.Table, k: int, count: int) -> Iterator[tuple[tuple[int, int], HashRows]]:
    rows = hash_rows(block["rid"].to_pylist(), measured_rows(block))
    for number, mask in enumerate(covering_tables(k)):
        partition = partition_of(rows.h64, mask, count)
        for value in np.unique(partition).tolist():
            yield (number, value), rows.take(partition == value)


def _join(key: tuple[int, int], parts: Iterable[HashRows], join: Any) -> tuple[np.ndarray, Mapping[str, int]]:
    rows = HashRows.concatenate(list(parts))
    rows = rows.take(np.lexsort((*rows.h256.T, rows.h64, rows.rid)))  # one order, whoever came first
    return block_edges(rows, covering_tables(join.k)[key[0]], join)


def _merge(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Mapping[str, int] = {}
    for count in counts:
        total = merge_counts(total, count)
    return dict(total)
