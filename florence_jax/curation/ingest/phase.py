"""The table of scores: every raw pair measured, one row each, sorted by uid, as files in the workdir."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from florence_jax.curation.blocks import Repartition, by_identifier
from florence_jax.curation.ingest.inputs import Split, list_splits
from florence_jax.curation.ingest.measure import measure_split, remove_other_parts, repeat_order
from florence_jax.curation.run import Run
from florence_jax.curation.table import SCORES, read_table, write_table
from florence_jax.errors import UserError
from florence_jax.files import json_digest, read_json, write_json

MAX_PARTS = 4096


def build_table(run: Run) -> dict[str, Any]:
    """Measures what is not measured yet, and sorts all rows by uid."""
    splits = list_splits(run.config["inputs"], run.config["measure"]["rows_per_split"])
    splits.sort(key=lambda split: split.identity())  # the order in which inputs are named does not count
    count = run.config["parts"] or min(MAX_PARTS, max(4, len(splits) // 2))
    rules = run.rules.measure
    digest = json_digest([[split.identity() for split in splits], rules.digest, rules.retry, count])

    def build(folder: str) -> Mapping[str, Any]:
        def pipeline(root: beam.Pipeline) -> None:
            parts = root | beam.Create(splits) | Measure(run.workdir, run.rules)
            _ = parts | "Damage" >> beam.FlatMap(_damage) | beam.combiners.ToList() | beam.Map(_write_damage, folder)
            numbers = functools.partial(by_identifier, column="uid", count=count)
            tables = parts | "Read" >> beam.Map(read_table) | Repartition(numbers)
            _ = tables | "Write" >> beam.MapTuple(functools.partial(write_part, folder=folder))

        run.beam(pipeline)
        parts = [_part_facts(folder, number) for number in range(count)]
        rows = sum(part["rows"] for part in parts)
        if not rows:
            raise UserError(f"--input={run.config['inputs']} has no raw pairs")
        repeated = sum(part["repeated"] for part in parts)
        return {"parts": parts, "rows": rows, "repeated": repeated, "damage": read_json(f"{folder}/damage.json")}

    table = run.phase("table", digest, build, again=bool(rules.retry))
    remove_other_parts(run.workdir, splits, rules.digest)
    return table


def _damage(path: str) -> list[str]:
    damage = read_table(path, ["uid"]).schema.metadata.get(b"damage", b"").decode()
    return [damage] if damage else []


def _write_damage(damage: Sequence[str], folder: str) -> None:
    write_json(f"{folder}/damage.json", sorted(damage))


def write_part(number: int, table: pa.Table, folder: str) -> None:
    """Writes one part; of rows with one uid (a key that occurs twice in a source) one stays: see `repeat_order`."""
    table = table.replace_schema_metadata(None)
    uids = np.array(table["uid"].to_pylist())  # sorted
    first = np.concatenate([[True], uids[1:] != uids[:-1]])
    repeats = np.flatnonzero(~first | np.append(~first[1:], False))
    order = np.arange(len(table))
    order[repeats] = repeats[repeat_order(table.take(repeats).to_pylist())]
    table = table.take(order).combine_chunks()
    _, sha256 = write_table(f"{folder}/part-{number:05d}.parquet", table.filter(pa.array(first)))
    facts = {"rows": int(first.sum()), "repeated": int((~first).sum()), "sha256": sha256}
    write_json(f"{folder}/part-{number:05d}.json", facts)


def _part_facts(folder: str, number: int) -> dict[str, Any]:
    """Size and checksum of a part; an empty one is written where no uid fell into it."""
    facts = read_json(f"{folder}/part-{number:05d}.json")
    if facts is None:
        _, sha256 = write_table(f"{folder}/part-{number:05d}.parquet", SCORES.empty_table())
        facts = {"rows": 0, "repeated": 0, "sha256": sha256}
        write_json(f"{folder}/part-{number:05d}.json", facts)
    return facts


class Measure(beam.PTransform):
    """Splits -> paths of their parts of the table of scores; a part that is there already is not made again."""

    def __init__(self, workdir: str, rules: Any):
        super().__init__()
        self._workdir, self._rules = workdir, rules.measure

    def expand(self, splits: beam.PCollection[Split]) -> beam.PCollection[str]:
        """Spreads the splits over the workers and measures each."""
        return splits | beam.Reshuffle() | beam.Map(measure_split, self._workdir, self._rules)
