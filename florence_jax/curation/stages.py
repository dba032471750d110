"""The stages as Beam transforms over blocks of the table of scores.

Every stage takes blocks (Arrow tables) and gives {"kept": blocks, "dropped": log rows}. A stage that must see all pairs
with one key (a caption, a cluster, a query) first brings them together with `Repartition`; blocks are columns, so that
Beam moves thousands of rows as one element. What the stages decide is in `decide`; nothing here opens an image but
`Measure` and `Score`.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.curation.blocks import Repartition, Stage, WideStage, by_identifier, chain_stages, decision_rows
from florence_jax.curation.output.shards import PLAN, by_shard, shard_count, with_place
from florence_jax.curation.plan import FIELD, CurationRules, make_stages
from florence_jax.curation.run import Run, part_paths
from florence_jax.curation.table import DECISIONS, SCORES, read_table, with_column, write_table
from florence_jax.files import json_digest, read_json, write_json


def with_fields(block: pa.Table, rules: CurationRules) -> pa.Table:
    """Adds the scores that come from fields of the raw pairs ('field:NAME'); NaN where a pair has none.

    A number may be written as text, as csv files have it.
    """
    fields = {name: spec.removeprefix(FIELD) for name, spec in rules.scores.items() if spec.startswith(FIELD)}
    if not fields:
        return block
    extras = [json.loads(extra) for extra in block["extra"].to_pylist()]
    for name, field in fields.items():
        numbers = [_number(extra.get(field)) for extra in extras]
        block = with_column(block, name, numbers, pa.float32())
    return block


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def load_block(
    number_and_path: tuple[int, str], rules: CurationRules, clusters: str, scores: str, columns: Sequence[str]
) -> pa.Table:
    """A part of the table with the columns that other phases made: "cluster", and scores of pictures.

    Args:
      number_and_path: of the part.
      rules: of the run.
      clusters: folder of the cluster numbers.
      scores: folder of the scores made from pictures; '' where there are none.
      columns: of the table to read.
    """
    number, path = number_and_path
    block = with_fields(read_table(path, columns), rules)
    block = with_column(block, "cluster", read_table(f"{clusters}/part-{number:05d}.parquet")["cluster"])
    if scores:
        made = read_table(f"{scores}/part-{number:05d}.parquet")
        places = pc.index_in(block["uid"], value_set=made["uid"].combine_chunks())
        for name in made.column_names[2:]:  # the first two are "uid" and "text_id"
            block = with_column(block, name, made[name].take(places))
        for name in rules.scorers:
            block = with_column(block, name, pc.fill_null(block[name], float("nan")))
    return block


def load_blocks(
    parts: beam.PCollection[tuple[int, str]],
    rules: CurationRules,
    stages: Sequence[Stage | WideStage],
    clusters: str,
    scores: str = "",
) -> beam.PCollection[pa.Table]:
    """(number, path) of parts -> blocks with the columns that the stages and the plan of the output read."""
    read = {"source", *PLAN, *(name for stage in stages for name in stage.columns)}
    columns = [name for name in SCORES.names if name in read]
    return parts | "Spread" >> beam.Reshuffle() | "Load" >> beam.Map(load_block, rules, clusters, scores, columns)


def build_decisions(run: Run, table: Mapping[str, Any], scores: str, benchmarks: str) -> dict[str, Any]:
    """Decides every pair: the log, and the rows of each output shard."""
    count = len(table["parts"])
    shards = run.config["output"]["shards"] or shard_count(table["rows"], run.config["output"]["records_per_shard"])
    contents = [part["sha256"] for part in table["parts"]]
    made = read_json(f"{scores}/digest.json") if scores else ""
    stages = [stage.name for stage in make_stages(run.rules, count)]
    digest = json_digest([contents, run.rules.digest, run.rules.measure.digest, made, shards, stages])

    def build(folder: str) -> Mapping[str, Any]:
        run.beam(lambda root: _decide(root, run, count, shards, folder, scores, benchmarks))
        log = [facts for i in range(count) if (facts := read_json(f"{folder}/log-{i:05d}.json")) is not None]
        return {"stages": stages, "shards": shards, "log": log}

    return run.phase("decisions", digest, build)


def _decide(root: beam.Pipeline, run: Run, count: int, shards: int, folder: str, scores: str, benchmarks: str) -> None:
    """The pipeline of all stages."""
    rules, workdir = run.rules, run.workdir
    parts = root | beam.Create([part for part in part_paths(f"{workdir}/table", count)])
    stages = make_stages(rules, count, benchmarks)
    blocks = load_blocks(parts, run.rules, stages, f"{workdir}/clusters", scores)
    decided = chain_stages(blocks, stages)
    placed = decided["blocks"] | "Place" >> beam.Map(with_place, rules.seed, shards)
    logs = (*decided["dropped"], placed | "Kept" >> beam.Map(_kept_rows)) | "AllLogs" >> beam.Flatten()
    by_uid = functools.partial(by_identifier, column="uid", count=count)
    _ = (
        logs
        | "LogByUid" >> Repartition(by_uid)
        | "WriteLog" >> beam.MapTuple(functools.partial(_write_log, folder=folder, config=rules.digest))
    )
    plans = placed | "Columns" >> beam.Map(lambda block: block.select([*PLAN, "shard", "place"]))
    plans = plans | "ByShard" >> Repartition(by_shard)
    _ = plans | "WritePlan" >> beam.MapTuple(functools.partial(_write_plan, folder=folder))


def _kept_rows(block: pa.Table) -> pa.Table:
    return decision_rows(block, "output", [("kept", shard, "") for shard in block["shard"].to_pylist()])


def _write_log(number: int, log: pa.Table, folder: str, config: str) -> None:
    log = with_column(log, "config", [config] * len(log), pa.string()).select(DECISIONS.names)
    _, sha256 = write_table(f"{folder}/log-{number:05d}.parquet", log)
    write_json(f"{folder}/log-{number:05d}.json", {"rows": len(log), "sha256": sha256})


def _write_plan(number: int, plan: pa.Table, folder: str) -> None:
    plan = plan.sort_by([("place", "ascending"), ("uid", "ascending")]).drop_columns(["shard"])
    write_table(f"{folder}/plan-{number:05d}.parquet", plan)
