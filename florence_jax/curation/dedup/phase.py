"""The phases of near-duplicates: edges, components, and the index of benchmarks, as files in the workdir."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from florence_jax.curation.dedup.benchmarks import BenchmarkIndex
from florence_jax.curation.dedup.on_beam import CandidateEdges, WriteEdges, labels_in_memory, labels_in_rounds
from florence_jax.curation.ingest.hashing import measure
from florence_jax.curation.run import Run, part_paths
from florence_jax.curation.table import write_table
from florence_jax.data.sources.folder import IMAGE_SUFFIXES
from florence_jax.files import filesystem, json_digest, list_files, read_bytes, read_json, write_file, write_json


def build_clusters(run: Run, table: Mapping[str, Any]) -> dict[str, Any]:
    """Finds near-duplicates; each row gets the number of its cluster, -1 if it is alone."""
    count = len(table["parts"])
    names = ("validity", "size", "near_duplicates")
    digest = json_digest([[part["sha256"] for part in table["parts"]], [run.config[name] for name in names]])
    rows = [part["rows"] for part in table["parts"]]
    firsts = np.concatenate([[0], np.cumsum(rows)]).tolist()

    def build(folder: str) -> Mapping[str, Any]:
        edges = f"{folder}/edges"
        if read_json(f"{edges}/counts.json") is None:
            starts = [(path, firsts[i]) for i, path in part_paths(f"{run.workdir}/table", count) if rows[i]]

            def pipeline(root: beam.Pipeline) -> None:
                found = root | beam.Create(starts) | CandidateEdges(run.rules, count)
                _ = found["edges"] | WriteEdges(edges, count)
                _ = found["counts"] | "WriteCounts" >> beam.Map(_write_value, f"{edges}/counts.json")

            run.beam(pipeline)
        sizes = [read_bytes(path, 0, 128) for path in edge_paths(edges)]
        in_memory = sum(map(_array_rows, sizes)) <= run.config["max_edges_in_memory"]
        if in_memory:
            labels = labels_in_memory(edge_paths(edges), firsts[-1])
        else:
            labels = labels_in_rounds(edges, firsts[-1], count, run.beam, edge_paths)
        members = np.bincount(labels, minlength=firsts[-1])
        labels = np.where(members[labels] > 1, labels, -1)
        for number in range(count):
            part = pa.table({"cluster": pa.array(labels[firsts[number] : firsts[number + 1]])})
            write_table(f"{folder}/part-{number:05d}.parquet", part)
        return {"join": read_json(f"{edges}/counts.json"), "sizes": _histogram(members), "in_memory": in_memory}

    return run.phase("clusters", digest, build)


def edge_paths(folder: str) -> list[str]:
    """The edge files of a folder."""
    return [f"{folder}/{name}" for name in list_files(folder, ".npy")]


def _write_value(value: Any, path: str) -> None:
    write_json(path, value)


def _array_rows(header: bytes) -> int:
    return int(re.search(rb"'shape': \((\d+)", header)[1])


def _histogram(members: np.ndarray) -> dict[str, int]:
    """How many components there are of each size, before large ones are split."""
    sizes, counts = np.unique(members[members > 1], return_counts=True)
    return {str(size): count for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)}


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
    fs, inner = filesystem(folder)
    for path in sorted(fs.find(inner)):
        if path.lower().endswith(IMAGE_SUFFIXES):
            yield measure(fs.cat_file(path), rules.measure.limits)
