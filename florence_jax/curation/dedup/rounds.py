"""Connected components on Beam: edge files, rounds over them, and the cluster of every row, written part by part.

Edges are int64 (e, 2) arrays of row numbers, (smaller, larger). No process holds something for every row: a task gets
the edges of one partition, or the rows of one part of the table.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from florence_jax.curation.dedup.components import both_ways, distinct, downward, star_edges, star_round
from florence_jax.curation.table import load_array, save_array, write_table
from florence_jax.errors import UserError
from florence_jax.files import list_files, read_json, write_json

RunBeam = Callable[[Callable[[beam.Pipeline], Any]], None]
MAX_ROUNDS = 40  # a chain of n needs about log2(n) + 1
EMPTY = np.zeros((0, 2), np.int64)


def edge_paths(folder: str) -> list[str]:
    """The edge files of a folder."""
    return [f"{folder}/{name}" for name in list_files(folder, ".npy")]


class WriteEdges(beam.PTransform):
    """Edge arrays -> `edges-00000.npy`, ... in a folder, divided by their larger end; gives the number of edges.

    Args:
      folder: for the files. count: their number at most.
    """

    def __init__(self, folder: str, count: int):
        super().__init__()
        self._folder, self._count = folder, count

    def expand(self, edges: beam.PCollection[np.ndarray]) -> beam.PCollection[int]:
        """One shuffle. The one number comes after the last file."""
        return (
            edges
            | "Divide" >> beam.FlatMap(_divide, self._count, 1)
            | "Group" >> beam.GroupByKey()
            | "Write" >> beam.MapTuple(functools.partial(_write_edges, folder=self._folder))
            | "Add" >> beam.CombineGlobally(sum)
        )


def _divide(edges: np.ndarray, count: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
    """Edges by the remainder of one of their ends: by ranges, the first partitions would get most of the centres."""
    return split_edges(edges, edges[:, end] % count)


def split_edges(edges: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(number, edges with it) for each distinct number of int64 (e,), in increasing order."""
    order = np.argsort(numbers, kind="stable")
    values, starts = np.unique(numbers[order], return_index=True)
    return zip(values.tolist(), np.split(edges[order], starts[1:]), strict=False)


def _write_edges(number: int, parts: Iterable[np.ndarray], folder: str) -> int:
    edges = distinct(np.sort(np.concatenate(list(parts)), axis=1))
    save_array(f"{folder}/edges-{number:05d}.npy", edges)
    return len(edges)


class StarRound(beam.PTransform):
    """Paths of edge files -> the same components one round further, in a folder, and how many edges are new.

    `changed.json` in the folder holds the number; at 0 the edges are stars: where a node is two edges from the smallest
    of its component, a round makes an edge that was not there.
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
    return star_round(np.concatenate(list(parts)), large)


def _write_round(number: int, both: Mapping[str, Iterable[np.ndarray]], folder: str) -> int:
    old, new = (distinct(np.concatenate([EMPTY, *both[name]])) for name in ("before", "after"))
    save_array(f"{folder}/edges-{number:05d}.npy", new)
    return len(distinct(np.concatenate([old, new]))) - len(old)


def _write_changed(changed: int, folder: str) -> None:
    write_json(f"{folder}/changed.json", int(changed))


def star_files(folder: str, count: int, run: RunBeam, max_rounds: int = MAX_ROUNDS) -> list[str]:
    """Edge files with the stars of all components, by rounds on Beam, each a checkpoint that a restart finds.

    Args:
      folder: with the edges; round i is in its sub-folder `round-i`.
      count: partitions.
      run: runs a pipeline.
      max_rounds: at most.

    Raises:
      UserError: if `max_rounds` are too few.
    """
    before = folder
    for number in range(1, max_rounds + 1):
        after = f"{folder}/round-{number:02d}"
        if (changed := read_json(f"{after}/changed.json")) is None:
            paths = edge_paths(before)
            run(lambda root, paths=paths, after=after: root | beam.Create(paths) | StarRound(after, count))
            changed = read_json(f"{after}/changed.json")
        if not changed:
            return edge_paths(after)
        before = after
    raise UserError(
        f"near-duplicates: {changed} edges still changed in round {max_rounds}; lower near_duplicates.k, or raise "
        "max_edges_in_memory"
    )


def stars_of_files(paths: Sequence[str]) -> np.ndarray:
    """The stars of all components, in the memory of one worker; `star_files` for more edges than fit."""
    return star_edges(np.concatenate([EMPTY, *map(load_array, paths)]))


class WriteClusters(beam.PTransform):
    """Star edges -> `part-00000.parquet`, ... of a folder, with the column "cluster", and `sizes.json`.

    The cluster is the smallest row number of the component, -1 for a row without a near-duplicate. `sizes.json` says
    how many components there are of each size, before large ones are split.

    Args:
      folder: for the files.
      rows: of each part of the table, in order.
    """

    def __init__(self, folder: str, rows: Sequence[int]):
        super().__init__()
        self._folder, self._rows = folder, list(rows)

    def expand(self, stars: beam.PCollection[np.ndarray]) -> beam.PCollection[None]:
        """One shuffle: each edge to the part of its member, and how many members a centre has to that of the centre."""
        firsts = np.cumsum([0, *self._rows[:-1]])
        joined = {
            "rows": stars.pipeline | "Parts" >> beam.Create(list(enumerate(self._rows))),
            "members": stars | "ByMember" >> beam.FlatMap(_by_range, firsts, 1),
            "centres": stars | "Centres" >> beam.Map(_centres) | "ByCentre" >> beam.FlatMap(_by_range, firsts, 0),
        }
        write = functools.partial(_write_part, firsts=firsts, folder=self._folder)
        sizes = joined | beam.CoGroupByKey() | beam.MapTuple(write)
        return sizes | beam.CombineGlobally(_add_sizes) | beam.Map(_write_sizes, f"{self._folder}/sizes.json")


def _by_range(edges: np.ndarray, firsts: np.ndarray, end: int) -> Iterator[tuple[int, np.ndarray]]:
    return split_edges(edges, np.searchsorted(firsts, edges[:, end], "right") - 1)


def _centres(stars: np.ndarray) -> np.ndarray:
    """int64 (c, 2): each centre, and how many members it has here."""
    return np.stack(np.unique(stars[:, 0], return_counts=True), axis=1)


def _write_part(number: int, joined: Mapping[str, Iterable[Any]], firsts: np.ndarray, folder: str) -> Mapping[int, int]:
    (rows,), first = joined["rows"], int(firsts[number])
    members, centres = (np.concatenate([EMPTY, *joined[name]]) for name in ("members", "centres"))
    others = np.zeros(rows, np.int64)
    np.add.at(others, centres[:, 0] - first, centres[:, 1])
    labels = np.where(others > 0, np.arange(first, first + rows), -1)
    labels[members[:, 1] - first] = members[:, 0]
    write_table(f"{folder}/part-{number:05d}.parquet", pa.table({"cluster": pa.array(labels)}))
    sizes = np.unique(others[others > 0] + 1, return_counts=True)
    return dict(zip(*(values.tolist() for values in sizes), strict=True))


def _add_sizes(counters: Iterable[Mapping[int, int]]) -> Counter:
    total: Counter = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _write_sizes(sizes: Mapping[int, int], path: str) -> None:
    write_json(path, {str(size): sizes[size] for size in sorted(sizes)})
