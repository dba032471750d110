"""The pass that opens pictures a second time: scores by a checkpoint or by functions, kept in a table of their own.

Only pairs that are alive after the text stage and have no score yet are scored, so a changed threshold scores nothing,
and an interrupted pass goes on with the parts that are missing.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.curation.measure import image_bytes
from florence_jax.curation.outputs import load_callable
from florence_jax.curation.pipeline import Alive, Repartition, by_identifier
from florence_jax.curation.relevance import CallableModelHandler, CheckpointLoader, JaxModelHandler, ScorePairs
from florence_jax.curation.rules import Rules
from florence_jax.curation.select import kmeans
from florence_jax.curation.table import concatenate, exists, read_table, with_column, write_table

CHECKPOINT = "checkpoint:"
BATCH = 64


class ScoreAlive(beam.PTransform):
    """(number, path) of parts -> `part-00000.parquet`, ... of a folder, with "uid" and each score.

    Args:
      workdir: of the run.
      rules: of the run.
      count: partitions, as many as the table has.
      clusters: folder of the cluster numbers.
      folder: of the scores.
    """

    def __init__(self, workdir: str, rules: Rules, count: int, clusters: str, folder: str):
        super().__init__()
        self._workdir, self._rules, self._count = workdir, rules, count
        self._clusters, self._folder = clusters, folder

    def expand(self, parts: beam.PCollection[tuple[int, str]]) -> beam.PCollection[None]:
        """The first four stages, then each model in turn."""
        alive = parts | Alive(self._rules, self._count, self._clusters)
        numbers = functools.partial(by_identifier, column="uid", count=self._count)
        missing = (
            alive["blocks"]
            | "ByUid" >> Repartition(numbers)
            | "Missing" >> beam.MapTuple(functools.partial(_missing, folder=self._folder))
            | "Some" >> beam.Filter(lambda both: len(both[1]))
        )
        pairs = missing | "Open" >> beam.FlatMapTuple(functools.partial(_pairs, workdir=self._workdir))
        results = []
        for name, spec in self._rules.scorers.items():
            scored = pairs | name >> ScorePairs(_handler(spec, self._rules))
            results.append(scored["scores"] | f"{name}Row" >> beam.MapTuple(functools.partial(_score_row, name=name)))
            results.append(scored["failures"] | f"{name}Failed" >> beam.MapTuple(lambda key, _: (key[0], (key[1], {}))))
        write = functools.partial(_write_scores, folder=self._folder, names=tuple(self._rules.scorers))
        return results | beam.Flatten() | beam.GroupByKey() | "WriteScores" >> beam.MapTuple(write)


def _handler(spec: str, rules: Rules) -> Any:
    if spec.startswith(CHECKPOINT):
        loader = CheckpointLoader(spec.removeprefix(CHECKPOINT), embeddings=rules.select.cluster_t > 0)
        return JaxModelHandler(loader, BATCH)
    return CallableModelHandler(load_callable(spec), BATCH)


def _missing(number: int, block: pa.Table, folder: str) -> tuple[int, pa.Table]:
    path = f"{folder}/part-{number:05d}.parquet"
    if exists(path):
        known = read_table(path, ["uid"])["uid"].combine_chunks()
        block = block.filter(pc.invert(pc.is_in(block["uid"], value_set=known)))
    return number, block


def _pairs(number: int, block: pa.Table, workdir: str) -> Iterator[tuple[tuple[int, str], dict[str, Any]]]:
    for row in block.select(["uid", "caption", "path", "offset", "size", "image_id"]).to_pylist():
        uid, caption = row.pop("uid"), row.pop("caption")
        yield (number, uid), {"image": image_bytes(workdir, **row), "caption": caption}


def _score_row(key: tuple[int, str], scores: Mapping[str, Any], name: str) -> tuple[int, tuple[str, dict[str, Any]]]:
    row = {name: scores["relevance"]}
    if "embedding" in scores:
        row["embedding"] = scores["embedding"].tolist()
    return key[0], (key[1], row)


def _write_scores(number: int, rows: Iterable[tuple[str, Mapping[str, Any]]], folder: str, names: tuple) -> None:
    merged: dict[str, dict[str, Any]] = {}
    for uid, scores in rows:
        merged.setdefault(uid, {}).update(scores)
    uids = sorted(merged)
    table = pa.table({"uid": pa.array(uids, pa.string())})
    for name in names:
        table = with_column(table, name, [merged[uid].get(name) for uid in uids], pa.float32())
    if any("embedding" in scores for scores in merged.values()):
        table = with_column(table, "embedding", [merged[u].get("embedding") for u in uids], pa.list_(pa.float32()))
    path = f"{folder}/part-{number:05d}.parquet"
    write_table(path, concatenate([read_table(path), table]) if exists(path) else table)


def fill_missing_parts(folder: str, names: Iterable[str], count: int) -> None:
    """Writes an empty part where no pair of it was alive."""
    empty = pa.table({"uid": pa.array([], pa.string())} | {name: pa.array([], pa.float32()) for name in names})
    for number in range(count):
        if not exists(path := f"{folder}/part-{number:05d}.parquet"):
            write_table(path, empty)


def cluster_embeddings(paths: Iterable[str], clusters: int, seed: int, folder: str) -> None:
    """Adds "embedding_cluster" to the scores: k-means of all image embeddings, in memory and in the order of uids.

    The new parts go to `folder`, without the embeddings. A pair without an embedding is in cluster -1.
    """
    tables = [read_table(path) for path in paths]
    vectors = [np.array([e for e in t["embedding"].to_pylist() if e is not None], np.float32) for t in tables]
    labels = iter(kmeans(np.concatenate([v for v in vectors if len(v)]), clusters, seed)[0].tolist())
    for number, table in enumerate(tables):
        found = [-1 if e is None else next(labels) for e in table["embedding"].to_pylist()]
        table = with_column(table.drop_columns(["embedding"]), "embedding_cluster", found, pa.int64())
        write_table(f"{folder}/part-{number:05d}.parquet", table)
