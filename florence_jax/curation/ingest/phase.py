"""The table of scores: every raw pair measured, one row each, sorted by uid, as files in the workdir."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.curation.blocks import Repartition, by_identifier
from florence_jax.curation.ingest.inputs import Split, list_inputs
from florence_jax.curation.ingest.measure import measure_split, remove_other_parts, repeat_order
from florence_jax.curation.run import Run
from florence_jax.curation.table import OF_CAPTION, SCORES, read_table, with_column, write_table
from florence_jax.data.records import write_data
from florence_jax.data.sources.fields import CAPTION_FIELDS, FILE_FIELDS, IMAGE_FIELDS, known_field
from florence_jax.errors import UserError
from florence_jax.files import json_digest, read_json, write_json

MAX_PARTS = 4096
NOTES = ("damage", "fields")  # of the parts of a split, in their metadata


def build_table(run: Run) -> dict[str, Any]:
    """Measures what is not measured yet, and sorts all rows by uid."""
    inputs = list_inputs(run.config["inputs"], run.config["measure"]["rows_per_split"])
    write_data([found.summary for found in inputs], run.workdir)
    splits = [split for found in inputs for split in found.splits]
    splits.sort(key=lambda split: split.identity())  # the order in which inputs are named does not count
    count = run.config["parts"] or min(MAX_PARTS, max(4, len(splits) // 2))
    rules = run.rules.measure
    digest = json_digest([[split.identity() for split in splits], rules.digest, rules.retry, count])

    def build(folder: str) -> Mapping[str, Any]:
        def pipeline(root: beam.Pipeline) -> None:
            parts = root | beam.Create(splits) | Measure(run.workdir, run.rules)
            notes = parts | "Notes" >> beam.FlatMap(_notes) | beam.Distinct() | beam.combiners.ToList()
            _ = notes | "WriteNotes" >> beam.Map(_write_notes, folder)
            numbers = functools.partial(by_identifier, column="uid", count=count)
            tables = parts | "Read" >> beam.Map(read_table) | Repartition(numbers)
            _ = tables | "Write" >> beam.MapTuple(functools.partial(write_part, folder=folder))

        run.beam(pipeline)
        parts = [_part_facts(folder, number) for number in range(count)]
        sums = {name: sum(part[name] for part in parts) for name in ("rows", "repeated", "pictures", "captioned")}
        notes = {note: read_json(f"{folder}/{note}.json") for note in NOTES}
        check_usable(run.config["inputs"], sums, notes["fields"])
        return {"parts": parts, **sums, **notes}

    table = run.phase("table", digest, build, again=bool(rules.retry))
    remove_other_parts(run.workdir, splits, rules.digest)
    return table


def check_usable(inputs: str, sums: Mapping[str, int], fields: Sequence[str]) -> None:
    """Raises UserError if nothing could be left: no pairs, no picture, or no caption."""
    if not sums["rows"]:
        raise UserError(f"--input={inputs} has no raw pairs")
    seen, rows = f"{', '.join(fields) or 'none'}", f"{sums['rows']:,} raw pairs of --input={inputs}"
    if not sums["pictures"]:
        named = known_field(fields, (*FILE_FIELDS, "image"))
        there = f"; the files that {named!r} names are not there" if named else ""
        raise UserError(
            f"none of the {rows} has a picture{there}. Fields seen: {seen}. Wanted: bytes in {_some(IMAGE_FIELDS)}, or "
            f"paths in {_some(FILE_FIELDS)}; links must be downloaded first (img2dataset)"
        )
    if not sums["captioned"]:
        raise UserError(
            f"none of the {rows} has a caption. Fields seen: {seen}. Wanted: a text or a list of texts in "
            f"{_some(CAPTION_FIELDS)}; or a table captions.csv, a .txt or a .json beside each picture"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + ", ..."


def _notes(path: str) -> list[tuple[str, str]]:
    """What is noted in the metadata of a part: ("damage", its damage), ("fields", a name) for each field."""
    found = read_table(path, ["uid"]).schema.metadata
    damage = found.get(b"damage", b"").decode()
    return [("damage", damage)] * bool(damage) + [("fields", name) for name in json.loads(found[b"fields"])]


def _write_notes(notes: Sequence[tuple[str, str]], folder: str) -> None:
    for kind in NOTES:
        write_json(f"{folder}/{kind}.json", sorted(text for note, text in notes if note == kind))


def write_part(number: int, table: pa.Table, folder: str) -> None:
    """Writes one part; of rows with one uid (a key that occurs twice in a source) one stays: see `repeat_order`.

    It takes over the captions of those with the same picture.
    """
    table = table.replace_schema_metadata(None)
    uids = np.array(table["uid"].to_pylist())  # sorted
    first = np.concatenate([[True], uids[1:] != uids[:-1]])
    repeats = np.flatnonzero(~first | np.append(~first[1:], False))
    order = np.arange(len(table))
    repeated = table.take(repeats).to_pylist()
    rank = repeat_order(repeated)
    order[repeats] = repeats[rank]
    table = table.take(order).combine_chunks().filter(pa.array(first))
    if len(repeats):
        others = joined_captions([repeated[i] for i in rank])
        rows = table.select(["uid", "others"]).to_pylist()
        column = [others.get(row["uid"], row["others"]) for row in rows]
        table = with_column(table, "others", column, SCORES.field("others").type)
    _, sha256 = write_table(f"{folder}/part-{number:05d}.parquet", table)
    facts = {"rows": int(first.sum()), "repeated": int((~first).sum()), "sha256": sha256, **_usable(table)}
    write_json(f"{folder}/part-{number:05d}.json", facts)


def joined_captions(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{uid: its other captions} from rows in the order of `repeat_order`: those of the first, and of its repeats that
    show the same picture.
    """
    kept: dict[str, Mapping[str, Any]] = {}
    others: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        first = kept.setdefault(row["uid"], row)
        found = others.setdefault(row["uid"], [])
        own = [] if first is row else [{name: row[name] for name, _ in OF_CAPTION}]
        if first["image_id"] == row["image_id"]:
            for caption in (*own, *(row["others"] or ())):
                if caption["text"] not in (first["text"], *(known["text"] for known in found)):
                    found.append(caption)
    return others


def _usable(table: pa.Table) -> dict[str, int]:
    """How many rows of a part have a picture, and a caption."""
    without = pc.sum(pc.equal(table["status"], "missing")).as_py() or 0
    captioned = pc.sum(pc.greater(table["characters"], 0)).as_py() or 0
    return {"pictures": len(table) - without, "captioned": captioned}


def _part_facts(folder: str, number: int) -> dict[str, Any]:
    """Size and checksum of a part; an empty one is written where no uid fell into it."""
    facts = read_json(f"{folder}/part-{number:05d}.json")
    if facts is None:
        _, sha256 = write_table(f"{folder}/part-{number:05d}.parquet", SCORES.empty_table())
        facts = {"rows": 0, "repeated": 0, "sha256": sha256, "pictures": 0, "captioned": 0}
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
