"""Writes joined detection sets: sharded ArrayRecord files, tables and the report."""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from florence_jax.curation.detection.images import image_digest, ordered_map
from florence_jax.curation.detection.join import Merged
from florence_jax.data.sources.array_record import write_array_record
from florence_jax.errors import UserError
from florence_jax.files import write_text

RECORDS_A_SHARD = 4096
PLAN_FILE = "plan.json"


def shard_digest(key: str) -> int:
    """Where a record goes: 64 bits of its key, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def shards(merged: Merged, split: str, count: int | None) -> dict[str, np.ndarray]:
    """File name below the output folder -> its records, in the order of their digests: any slice is a mixture.

    Args:
      merged: the set.
      split: 'train' or 'validation'.
      count: of files; None for one for each `RECORDS_A_SHARD` records. A file without records is not written.
    """
    records = np.flatnonzero(merged.validation == (split == "validation"))
    digests = np.fromiter((shard_digest(merged.key(r)) for r in records), np.uint64, len(records))
    count = count or max(1, -(-len(records) // RECORDS_A_SHARD))
    order = np.argsort(digests, kind="stable")
    records, shard = records[order], (digests[order] % np.uint64(count)).astype(np.int64)
    order = np.argsort(shard, kind="stable")
    cuts = np.searchsorted(shard[order], np.arange(1, count))
    names = [f"{split}/flod.array_record-{i:05d}-of-{count:05d}" for i in range(count)]
    return {name: part for name, part in zip(names, np.split(records[order], cuts), strict=True) if len(part)}


def prepare_folder(out: str, plan: dict[str, list], fingerprint: str) -> None:
    """Makes the output folder ready; the finished files of an interrupted build of the same plan stay.

    Raises:
      UserError: if it holds files of another build.
    """
    text = json.dumps({"fingerprint": fingerprint, "files": sorted(plan)}, indent=1) + "\n"
    path = epath.Path(out) / PLAN_FILE
    if path.exists() and path.read_text() == text:
        for unfinished in epath.Path(out).glob("*/.flod.array_record*.tmp"):
            unfinished.unlink()
        return
    if epath.Path(out).exists() and any(epath.Path(out).glob("*/flod.array_record*")):
        raise UserError(f"--out={out} holds records of another build: remove it or choose another folder")
    for name in plan:
        (epath.Path(out) / name).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def write_records(merged: Merged, out: str, plan: dict[str, np.ndarray], workers: int) -> dict[str, dict[str, Any]]:
    """Writes the files of `plan` that are not there yet; returns for each its number of records and sha256.

    Raises:
      UserError: if an image changed or went since it was first read, or a file cannot be written.
    """
    written = {}
    for name, records in plan.items():
        path = os.path.join(out, name)
        if not epath.Path(path).exists():
            write_array_record(path, _with_images(merged, records, workers))
        with epath.Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        written[name] = {"records": len(records), "sha256": digest}
    return written


def read_picture(merged: Merged, record: int) -> bytes:
    """The record's image file. Raises UserError if it is not what it was when first read."""
    row = merged.pictures[record]
    path = merged.rows.facts.paths[row]
    try:
        data = epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} went away during the build ({error.strerror or error}): run again") from error
    if image_digest(data) != merged.rows.facts.digest[row].tobytes():
        raise UserError(f"{path} changed during the build: run again")
    return data


def _with_images(merged: Merged, records: np.ndarray, workers: int) -> Iterator[dict[str, Any]]:
    images = ordered_map(lambda record: read_picture(merged, record), records.tolist(), workers)
    for record, image in zip(records.tolist(), images, strict=True):
        yield merged.record(record) | {"image": image}
