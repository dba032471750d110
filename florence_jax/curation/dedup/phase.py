"""The phases of near-duplicates: edges, components, and the index of benchmarks, as files in the workdir."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import apache_beam as beam

from florence_jax.curation.dedup.benchmarks import BenchmarkIndex
from florence_jax.curation.dedup.on_beam import CandidateEdges
from florence_jax.curation.dedup.rounds import (
    RunBeam,
    WriteClusters,
    WriteEdges,
    edge_paths,
    star_files,
    stars_of_files,
)
from florence_jax.curation.ingest.hashing import measure
from florence_jax.curation.run import Run, part_paths
from florence_jax.curation.table import load_array
from florence_jax.data.sources.picture_files import list_pictures
from florence_jax.files import filesystem, json_digest, read_bytes, read_json, write_file, write_json


def build_clusters(run: Run, table: Mapping[str, Any]) -> dict[str, Any]:
    """Finds near-duplicates; each row gets the number of its cluster, -1 if it is alone."""
    count = len(table["parts"])
    names = ("validity", "size", "near_duplicates")
    digest = json_digest([[part["sha256"] for part in table["parts"]], [run.config[name] for name in names]])
    rows = [part["rows"] for part in table["parts"]]

    def build(folder: str) -> Mapping[str, Any]:
        edges = f"{folder}/edges"
        if (found := read_json(f"{edges}/found.json")) is None:
            firsts = list(itertools.accumulate(rows, initial=0))
            starts = [(path, firsts[i]) for i, path in part_paths(f"{run.workdir}/table", count) if rows[i]]
            run.beam(lambda root: _find_edges(root, starts, run.rules, count, edges))
            found = read_json(f"{edges}/found.json")
        in_memory = found["edges"] <= run.config["max_edges_in_memory"]
        write_clusters(edges, folder, rows, in_memory, run.beam)
        return {**found, "sizes": read_json(f"{folder}/sizes.json"), "in_memory": in_memory}

    return run.phase("clusters", digest, build)


def write_clusters(edges: str, folder: str, rows: Sequence[int], in_memory: bool, run: RunBeam) -> None:
    """Joins edges to components and writes the cluster of every row, and the sizes, as `WriteClusters` says.

    Args:
      edges: folder of the edge files.
      folder: for the result.
      rows: of each part of the table.
      in_memory: whether one worker joins them all, instead of rounds.
      run: runs a pipeline.
    """
    files = None if in_memory else star_files(edges, len(rows), run)

    def pipeline(root: beam.Pipeline) -> None:
        if files is None:
            stars = root | beam.Create([edge_paths(edges)]) | "Join" >> beam.Map(stars_of_files)
        else:
            stars = root | beam.Create(files) | "Spread" >> beam.Reshuffle() | "Read" >> beam.Map(load_array)
        _ = stars | WriteClusters(folder, rows)

    run(pipeline)


def _find_edges(root: beam.Pipeline, starts: Sequence[tuple[str, int]], rules: Any, count: int, folder: str) -> None:
    """Writes the edges, and last of all `found.json`: their number, and the counts of the join."""
    candidates = root | beam.Create(starts) | CandidateEdges(rules, count)
    number = candidates["edges"] | WriteEdges(folder, count)
    counts = beam.pvalue.AsSingleton(candidates["counts"])
    _ = number | "Found" >> beam.Map(_write_found, counts, f"{folder}/found.json")


def _write_found(edges: int, join: Mapping[str, int], path: str) -> None:
    write_json(path, {"join": join, "edges": edges})


def build_benchmarks(run: Run) -> str:
    """Path of the index of the pictures that must not be trained on, '' if there are none."""
    if not run.rules.benchmarks:
        return ""
    digest = json_digest([run.rules.digest, run.rules.measure.digest])
    path = f"{run.workdir}/benchmarks-{digest[:8]}.npz"
    if not filesystem(path)[0].exists(filesystem(path)[1]):
        pictures = {name: _pictures(folder, run.rules) for name, folder in run.rules.benchmarks.items()}
        index = BenchmarkIndex.build(pictures, run.rules.join, run.rules.benchmark_detail)
        write_file(path, index.save)
    return path


def _pictures(folder: str, rules: Any) -> Iterable[Mapping[str, Any]]:
    for name in list_pictures(folder).pictures:
        yield measure(read_bytes(f"{folder.rstrip('/')}/{name}"), rules.measure.limits)
