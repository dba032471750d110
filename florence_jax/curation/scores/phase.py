"""The pass that opens pictures a second time: scores by a checkpoint or by functions, kept in a table of their own.

Only pairs that are alive after the text stage and whose picture and caption have no score yet are scored, so a changed
threshold scores nothing, and an interrupted pass goes on with the parts that are missing. A pair that could not be
scored has null, and is tried again by the next run.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.curation.blocks import Repartition, by_identifier, chain_stages, load_callable
from florence_jax.curation.ingest.measure import image_bytes
from florence_jax.curation.plan import CurationRules, make_stages, stages_before
from florence_jax.curation.run import Run, part_paths, remove_folder
from florence_jax.curation.scores.clusters import cluster_embeddings
from florence_jax.curation.scores.models import CallableModelHandler, CheckpointLoader, JaxModelHandler, ScorePairs
from florence_jax.curation.stages import load_blocks
from florence_jax.curation.table import concatenate, read_table, with_column, write_table
from florence_jax.files import exists, json_digest, read_bytes, write_json
from florence_jax.params.checkpoint import newest_step
from florence_jax.params.weights import checkpoint_folder

CHECKPOINT = "checkpoint:"
SCORED_BATCH = 64
# (uid, text_id) and the scores found.
ScoreRow = tuple[tuple[str, str], Mapping[str, Any]]


class ScoreAlive(beam.PTransform):
    """(number, path) of parts -> `part-00000.parquet`, ... of a folder, with "uid", "text_id" and each score, and the
    uids that are alive in this run as `alive/part-00000.parquet`, ..., where clusters are made of them.

    Args:
      workdir: of the run.
      rules: of the run.
      count: partitions, as many as the table has.
      clusters: folder of the cluster numbers.
      folder: of the scores.
      step: of the checkpoint, where one scores.
    """

    def __init__(self, workdir: str, rules: CurationRules, count: int, clusters: str, folder: str, step: int | None):
        super().__init__()
        self._workdir, self._rules, self._count = workdir, rules, count
        self._clusters, self._folder, self._step = clusters, folder, step

    def expand(self, parts: beam.PCollection[tuple[int, str]]) -> beam.PCollection[None]:
        """The stages that need no score of a picture, then each model in turn."""
        stages = stages_before(make_stages(self._rules, self._count), self._rules.scorers)
        alive = chain_stages(load_blocks(parts, self._rules, stages, self._clusters), stages)
        names = tuple(self._rules.scorers)
        numbers = functools.partial(by_identifier, column="uid", count=self._count)
        blocks = alive["blocks"] | "ByUid" >> Repartition(numbers)
        if self._rules.select.cluster_t:
            _ = blocks | "WriteAlive" >> beam.MapTuple(functools.partial(_write_alive, folder=self._folder))
        missing = (
            blocks
            | "Missing" >> beam.MapTuple(functools.partial(_missing, folder=self._folder, names=names))
            | "Some" >> beam.Filter(lambda both: len(both[1]))
        )
        pairs = missing | "Open" >> beam.FlatMapTuple(functools.partial(_pairs, workdir=self._workdir))
        results = []
        for name, spec in self._rules.scorers.items():
            scored = pairs | name >> ScorePairs(_handler(spec, self._rules, self._step))
            results.append(scored["scores"] | f"{name}Row" >> beam.MapTuple(functools.partial(_score_row, name=name)))
            results.append(scored["failures"] | f"{name}Failed" >> beam.MapTuple(_failed_row))
        write = functools.partial(_write_scores, folder=self._folder, names=names)
        return results | beam.Flatten() | beam.GroupByKey() | "WriteScores" >> beam.MapTuple(write)


def scoring_step(rules: CurationRules) -> int | None:
    """Step of the checkpoint that scores; None if none does, or if there is none yet, which loading it reports."""
    spec = rules.scores.get("relevance", "")
    return newest_step(checkpoint_folder(spec.removeprefix(CHECKPOINT))) if spec.startswith(CHECKPOINT) else None


def _handler(spec: str, rules: CurationRules, step: int | None) -> Any:
    if spec.startswith(CHECKPOINT):
        loader = CheckpointLoader(
            spec.removeprefix(CHECKPOINT), rules.tokenizer, step, embeddings=rules.select.cluster_t > 0
        )
        return JaxModelHandler(loader, SCORED_BATCH)
    return CallableModelHandler(load_callable(spec), SCORED_BATCH)


def _write_alive(number: int, block: pa.Table, folder: str) -> None:
    write_table(f"{folder}/alive/part-{number:05d}.parquet", block.select(["uid"]))


def _missing(number: int, block: pa.Table, folder: str, names: Sequence[str]) -> tuple[int, pa.Table]:
    """The pairs without scores of their present captions."""
    path = f"{folder}/part-{number:05d}.parquet"
    if exists(path):
        known = read_table(path, ["uid", "text_id", *names]).drop_null()
        places = pc.index_in(block["uid"], value_set=known["uid"].combine_chunks())
        same = pc.equal(known["text_id"].take(places), block["text_id"])
        block = block.filter(pc.invert(pc.fill_null(same, False)))
    return number, block


def _pairs(number: int, block: pa.Table, workdir: str) -> Iterator[tuple[tuple[int, str, str], dict[str, Any]]]:
    for row in block.select(["uid", "text_id", "caption", "path", "offset", "size", "image_id"]).to_pylist():
        uid, text_id, caption = row.pop("uid"), row.pop("text_id"), row.pop("caption")
        yield (number, uid, text_id), {"image": image_bytes(workdir, **row), "caption": caption}


def _score_row(key: tuple[int, str, str], scores: Mapping[str, Any], name: str) -> tuple[int, ScoreRow]:
    row = {name: scores["relevance"]}
    if "embedding" in scores:
        row["embedding"] = scores["embedding"].tolist()
    return key[0], (key[1:], row)


def _failed_row(key: tuple[int, str, str], reason: str) -> tuple[int, ScoreRow]:
    return key[0], (key[1:], {})


def _write_scores(number: int, rows: Iterable[ScoreRow], folder: str, names: Sequence[str]) -> None:
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for pair, scores in rows:
        merged.setdefault(pair, {}).update(scores)
    uids, text_ids = zip(*sorted(merged), strict=True)
    found = [merged[pair] for pair in sorted(merged)]
    table = pa.table({"uid": pa.array(uids, pa.string()), "text_id": pa.array(text_ids, pa.string())})
    for name in names:
        table = with_column(table, name, [scores.get(name) for scores in found], pa.float32())
    if any("embedding" in scores for scores in found):
        table = with_column(table, "embedding", [scores.get("embedding") for scores in found], pa.list_(pa.float32()))
    path = f"{folder}/part-{number:05d}.parquet"
    if exists(path):
        known = read_table(path)
        others = known.filter(pc.invert(pc.is_in(known["uid"], value_set=table["uid"].combine_chunks())))
        table = concatenate([others, table])
        if table.equals(known):  # what failed before has failed again
            return
    write_table(path, table)


def fill_missing_parts(folder: str, names: Iterable[str], count: int) -> None:
    """Writes an empty part where no pair of it was alive."""
    empty = pa.schema([("uid", pa.string()), ("text_id", pa.string()), *((name, pa.float32()) for name in names)])
    for number in range(count):
        if not exists(path := f"{folder}/part-{number:05d}.parquet"):
            write_table(path, empty.empty_table())


def build_scores(run: Run, table: Mapping[str, Any]) -> str:
    """Folder of the scores of pictures, which the configuration asks for."""
    count, step = len(table["parts"]), scoring_step(run.rules)
    # Not in the digest: thresholds. Pairs that a new one lets live are scored, the others are known.
    models = json_digest(
        [table["digest"], run.rules.scorers, run.rules.select.cluster_t > 0, step, run.rules.tokenizer]
    )
    folder = f"{run.workdir}/scores/{models}"
    parts = part_paths(f"{run.workdir}/table", count)
    remove_folder(f"{folder}/alive")  # of an earlier run
    score = ScoreAlive(run.workdir, run.rules, count, f"{run.workdir}/clusters", folder, step)
    run.beam(lambda root: root | beam.Create(parts) | score)
    fill_missing_parts(folder, run.rules.scorers, count)
    if run.rules.select.cluster_t:
        folder = cluster_embeddings(folder, count, run.rules.clusters, run.rules.seed, run.beam)
    run.beam(lambda root: root | beam.Create(part_paths(folder, count)) | WriteDigest(f"{folder}/digest.json"))
    return folder


class WriteDigest(beam.PTransform):
    """(number, path) of parts -> a JSON file with a text that stands for the contents of all."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path

    def expand(self, parts: beam.PCollection[tuple[int, str]]) -> beam.PCollection[None]:
        """Each worker reads its parts; what comes together is a hash for each."""
        hashes = parts | beam.Reshuffle() | beam.MapTuple(_hash_part) | beam.combiners.ToList()
        return hashes | beam.Map(_write_digest, self._path)


def _hash_part(number: int, path: str) -> tuple[int, str]:
    return number, hashlib.sha256(read_bytes(path)).hexdigest()


def _write_digest(hashes: Sequence[tuple[int, str]], path: str) -> None:
    write_json(path, json_digest(sorted(hashes)))
