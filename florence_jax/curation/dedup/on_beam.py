"""Near-duplicate clusters on Beam: exact copies, the covering-design join, and connected components in rounds.

Rows are numbered in the order of the table, so that the numbers, and with them all edges, do not depend on the order
of the input or on the workers. Edges are int64 (e, 2) arrays, (smaller, larger) row number.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from florence_jax.curation.blocks import Repartition, chain
from florence_jax.curation.dedup.clusters import (
    ASPECT_STEP,
    MEASURED,
    exact_edges,
    hash_rows,
    measured_rows,
    wide_hashes,
)
from florence_jax.curation.dedup.components import (
    MAX_ROUNDS,
    both_ways,
    downward,
    labels_of_stars,
    star_round,
    union_find,
)
from florence_jax.curation.dedup.join import HashRows, block_edges, covering_tables, merge_counts, partition_of
from florence_jax.curation.table import load_array, read_table, save_array, with_column
from florence_jax.errors import UserError
from florence_jax.files import read_json, write_json

Run = Callable[[Callable[[beam.Pipeline], None]], None]


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
        columns = sorted({"uid", "source", *MEASURED, *(name for stage in stages for name in stage.columns)})
        blocks = parts | "Spread" >> beam.Reshuffle() | beam.MapTuple(functools.partial(_numbered, columns=columns))
        blocks = chain(blocks, stages)["blocks"]
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


class WriteEdges(beam.PTransform):
    """Edge arrays -> `edges-00000.npy`, ... in a folder, divided by their larger end."""

    def __init__(self, folder: str, count: int):
        super().__init__()
        self._folder, self._count = folder, count

    def expand(self, edges: beam.PCollection[np.ndarray]) -> beam.PCollection[None]:
        """One shuffle."""
        return (
            edges
            | "Divide" >> beam.FlatMap(_divide, self._count, 1)
            | "Group" >> beam.GroupByKey()
            | "Write" >> beam.MapTuple(functools.partial(_write_edges, folder=self._folder))
        )


def _divide(edges: np.ndarray, count: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
    numbers = edges[:, end] % count
    for number in np.unique(numbers).tolist():
        yield number, edges[numbers == number]


def _write_edges(number: int, parts: Iterable[np.ndarray], folder: str) -> None:
    edges = np.concatenate(list(parts))
    edges = np.unique(np.sort(edges, axis=1), axis=0)
    save_array(f"{folder}/edges-{number:05d}.npy", edges)


# -- components -------------------------------------------------------------------------------------------------------


def labels_in_memory(paths: Iterable[str], rows: int) -> np.ndarray:
    """int64 (rows,): the smallest row number of each component."""
    edges = [load_array(path) for path in paths]
    return union_find(np.concatenate(edges) if edges else np.zeros((0, 2), np.int64), rows)


class StarRound(beam.PTransform):
    """Paths of edge files -> the same components one round further, in a folder, and how many edges are new.

    `changed.json` in the folder holds the number; at 0 the edges are stars.
    """

    def __init__(self, folder: str, count: int):
        super().__init__()
        self._folder, self._count = folder, count

    def expand(self, paths: beam.PCollection[str]) -> beam.PCollection[None]:
        """Three shuffles: by node for the large-star, again for the small-star, and by edge to compare."""
        before = paths | "Spread" >> beam.Reshuffle() | beam.Map(load_array)
        after = before
        for name, neighbours, large in (("Large", both_ways, True), ("Small", downward, False)):
            after = (
                after
                | f"{name}Ends" >> beam.Map(neighbours)
                | f"{name}Divide" >> beam.FlatMap(_divide, self._count, 0)
                | f"{name}Meet" >> beam.GroupByKey()
                | f"{name}Star" >> beam.MapTuple(functools.partial(_star, large=large))
            )
        divided = {
            "before": before | "DivideBefore" >> beam.FlatMap(_divide, self._count, 1),
            "after": after | "DivideAfter" >> beam.FlatMap(_divide, self._count, 1),
        }
        changed = (
            divided
            | "Compare" >> beam.CoGroupByKey()
            | beam.MapTuple(functools.partial(_write_round, folder=self._folder))
        )
        return changed | beam.CombineGlobally(sum) | beam.Map(_write_changed, self._folder)


def _star(number: int, parts: Iterable[np.ndarray], large: bool) -> np.ndarray:
    return star_round(np.unique(np.concatenate(list(parts)), axis=0), large)


def _write_round(number: int, both: Mapping[str, Iterable[np.ndarray]], folder: str) -> int:
    old, new = (
        np.unique(np.concatenate([np.zeros((0, 2), np.int64), *both[name]]), axis=0) for name in ("before", "after")
    )
    save_array(f"{folder}/edges-{number:05d}.npy", new)
    return len(np.unique(np.concatenate([old, new]), axis=0)) - len(old)


def _write_changed(changed: int, folder: str) -> None:
    write_json(f"{folder}/changed.json", int(changed))


def labels_in_rounds(folder: str, rows: int, count: int, run: Run, paths_of: Callable[[str], list[str]]) -> np.ndarray:
    """The labels of `labels_in_memory`, by rounds on Beam, each a checkpoint that a restart finds.

    Args:
      folder: with the edges; round i is in its sub-folder `round-i`.
      rows: of the table.
      count: partitions.
      run: runs a pipeline.
      paths_of: the edge files of a folder.

    Raises:
      UserError: if MAX_ROUNDS are too few.
    """
    before = folder
    for number in range(1, MAX_ROUNDS + 1):
        after = f"{folder}/round-{number:02d}"
        if (changed := read_json(f"{after}/changed.json")) is None:
            paths = paths_of(before)
            run(lambda pipeline, p=paths, a=after: pipeline | beam.Create(p) | StarRound(a, count))
            changed = read_json(f"{after}/changed.json")
        if not changed:
            stars = [load_array(path) for path in paths_of(after)]
            return labels_of_stars(np.concatenate([np.zeros((0, 2), np.int64), *stars]), rows)
        before = after
    raise UserError(f"near-duplicates: components still change after {MAX_ROUNDS} rounds; lower near_duplicates.k")
