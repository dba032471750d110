"""The output: shards of records in ArrayRecord, parquet or WebDataset, each complete or not there, with checksums.

A pair belongs to the shard that a keyed hash of its uid names, at the place that another one gives: a global shuffle
that no worker count and no input order changes. A shard whose content has not changed is not written again.
"""

import functools
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from florence_jax.curation.blocks import load_callable
from florence_jax.curation.filters.personal import blur_faces
from florence_jax.curation.ingest.measure import image_bytes
from florence_jax.curation.keyed import keyed_hashes
from florence_jax.curation.table import read_table, with_column
from florence_jax.data.records import Record
from florence_jax.data.sources.array_record import META, write_array_record
from florence_jax.errors import UserError
from florence_jax.files import exists, json_digest, read_json, write_file, write_json

PLAN = ("uid", "source", "key", "url", "licence", "caption", "captions", "text_id", "extra", "image_id")
PLAN += ("width", "height", "members", "path", "offset", "size")
SUFFIXES = {"array_record": ".array_record", "parquet": ".parquet", "webdataset": ".tar"}
MAGIC = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp", b"II": "tif", b"MM": "tif"}


def shard_count(rows: int, records_per_shard: int) -> int:
    """A power of two, so that removing a few pairs hardly ever moves the others to other shards."""
    return 1 << max(0, (max(rows, 1) - 1) // records_per_shard).bit_length()


def with_place(block: pa.Table, seed: int, shards: int) -> pa.Table:
    """Adds "shard" and "place" (uint64), the position in it."""
    uids = block["uid"].to_pylist()
    shard = keyed_hashes(seed, uids, ["shard"] * len(uids)) % np.uint64(shards)
    block = with_column(block, "shard", shard.astype(np.int64))
    return with_column(block, "place", keyed_hashes(seed, uids, ["place"] * len(uids)))


def by_shard(block: pa.Table) -> np.ndarray:
    """Numbers for `pipeline.Repartition`."""
    return block["shard"].to_numpy()


class Writer:
    """Writes one shard; can be pickled.

    Args:
      workdir: of the run.
      plans: folder of `plan-00000.parquet`, ..., the rows of each shard in order.
      formats: of `SUFFIXES`.
      face_detector: 'module:function' for `personal.blur_faces`, or ''.
      shards: their number.
    """

    def __init__(self, workdir: str, plans: str, formats: Sequence[str], face_detector: str, shards: int):
        self._workdir, self._plans = workdir, plans
        self._formats, self._face_detector, self._shards = tuple(formats), face_detector, shards

    def __call__(self, shard: int) -> bool:
        """Writes a shard and its manifest; False if it was there already."""
        path = f"{self._plans}/plan-{shard:05d}.parquet"
        plan = read_table(path) if exists(path) else None
        digest = self._digest(plan)
        manifest = f"{self._workdir}/output/manifest/{shard:05d}.json"
        before = read_json(manifest)
        if before is not None and before["plan"] == digest and self._complete(before):
            return False
        records = [] if plan is None else list(self._records(plan))
        files = {}
        for form in self._formats if records else ():
            name = f"pairs-{shard:05d}-of-{self._shards:05d}{SUFFIXES[form]}"
            for suffix, (size, sha256) in WRITERS[form](f"{self._workdir}/output/{name}", records).items():
                files[name + suffix] = {"bytes": size, "sha256": sha256}
        write_json(manifest, {"plan": digest, "records": len(records), "files": files})
        return True

    def _complete(self, manifest: Mapping[str, Any]) -> bool:
        return all(exists(f"{self._workdir}/output/{name}") for name in manifest["files"])

    def _digest(self, plan: pa.Table | None) -> str:
        """Stands for what the shard will contain; where its pictures are read from does not matter."""
        rows = [] if plan is None else plan.drop_columns(["path", "offset", "size"]).to_pylist()
        return json_digest([rows, self._formats, self._face_detector, self._shards])

    def _records(self, plan: pa.Table) -> Iterator[Record]:
        rows = plan.to_pylist()
        # Pictures of one file are read one after the other.
        order = sorted(range(len(rows)), key=lambda i: (rows[i]["path"], rows[i]["offset"]))
        images = {i: self._image(rows[i]) for i in order}
        for i, row in enumerate(rows):
            yield {
                **json.loads(row["extra"]),
                "key": row["uid"],
                "image": images[i],
                "caption": row["caption"],
                "captions": row["captions"],
                "text_id": row["text_id"],
                "url": row["url"],
                "licence": row["licence"],
                "source": row["source"],
                "source_key": row["key"],
                "members": row["members"],
            }

    def _image(self, row: Mapping[str, Any]) -> bytes:
        data = image_bytes(self._workdir, row["path"], row["offset"], row["size"], row["image_id"])
        return blur_faces(data, load_callable(self._face_detector))[0] if self._face_detector else data


Written = dict[str, tuple[int, str]]  # what comes after the shard's name -> size and sha256 of the file


def _write_array_record(path: str, records: Sequence[Record]) -> Written:
    written: Written = {}

    def write(temporary: str) -> None:
        write_array_record(temporary, records)
        # The side file gets its name first: a shard that is there has one.
        written[META] = write_file(path + META, functools.partial(os.replace, temporary + META))

    written[""] = write_file(path, write)
    return written


def _write_parquet(path: str, records: Sequence[Record]) -> Written:
    columns = {}
    for name in sorted({name for record in records for name in record}):
        try:
            columns[name] = pa.array([record.get(name) for record in records])
        except (pa.ArrowException, OverflowError) as error:
            raise UserError(
                f"field {name!r} does not fit a parquet column: give it one type in all inputs, take it out of "
                f"measure.extra_fields, or take 'parquet' out of output.formats ({error})"
            ) from error
    table = pa.table(columns)
    return {"": write_file(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))}


def _write_webdataset(path: str, records: Sequence[Record]) -> Written:
    def write(temporary: str) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for record in records:
                fields = {name: value for name, value in record.items() if name != "image"}
                members = {
                    MAGIC.get(record["image"][:2], "img"): record["image"],
                    "txt": record["caption"].encode("utf-8", "replace"),
                    "json": json.dumps(fields, sort_keys=True).encode(),
                }
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{record['key']}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

    return {"": write_file(path, write)}


WRITERS: Mapping[str, Callable[[str, Sequence[Record]], Written]] = {
    "array_record": _write_array_record,
    "parquet": _write_parquet,
    "webdataset": _write_webdataset,
}


class WriteShards(beam.PTransform):
    """Numbers of shards -> how many were written and how many were there, in a JSON file.

    Args:
      writer: of the shards.
      path: of the JSON file, {"written": n, "unchanged": n}.
    """

    def __init__(self, writer: Writer, path: str):
        super().__init__()
        self._writer, self._path = writer, path

    def expand(self, shards: beam.PCollection[int]) -> beam.PCollection[None]:
        """One shard, one task."""
        return (
            shards
            | beam.Reshuffle()
            | "Write" >> beam.Map(self._writer)
            | "Count" >> beam.combiners.Count.PerElement()
            | beam.combiners.ToDict()
            | "Report" >> beam.Map(_write_counts, self._path)
        )


def _write_counts(counts: Mapping[bool, int], path: str) -> None:
    write_json(path, {"written": counts.get(True, 0), "unchanged": counts.get(False, 0)})


def is_shard(name: str) -> bool:
    """Whether a file of the output folder is a shard of some run."""
    return os.path.basename(name).startswith("pairs-") and name.removesuffix(META).endswith(tuple(SUFFIXES.values()))
