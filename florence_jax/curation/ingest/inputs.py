"""Raw pairs from parquet files, WebDataset tars, ArrayRecord files and folders of images, local or any fsspec URL.

A raw pair is a dict: "key" (str, unique in its source), "image" (bytes), "caption" (str), "source" (str), "url",
"licence" (str, "" where unknown), "headers" (list of HTTP response header lines), "extra" (all other fields that are
text, numbers or lists of text), "problem" ("" or why there are no image bytes) and "locator": (path, offset, size)
where the bytes of the image can be read again alone, or None where they cannot (a parquet column, a compressed tar).
What img2dataset writes (webdataset, parquet, files) is read as it is.
"""

import dataclasses
import itertools
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq

from florence_jax.curation.ingest.readers import (
    folder_rows,
    folder_tables,
    make_pair,
    row_captions,
    row_picture,
    tar_samples,
)
from florence_jax.data.records import BadRecord
from florence_jax.data.sources.array_record import META, ArrayRecordSource
from florence_jax.data.sources.picture_files import list_pictures
from florence_jax.errors import UserError
from florence_jax.files import filesystem, json_digest, table_rows

Pair = dict[str, Any]
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
READ_ROWS = 64  # parquet rows decoded at a time: with images of 1 MB, 64 MB


SEVERAL = (
    "The first caption of a picture is judged and kept; config.measure.extra_fields=('captions',) keeps the list of all"
)


class DamagedInput(Exception):
    """An input file that cannot be read to its end."""


@dataclasses.dataclass(frozen=True)
class Split:
    """A part of a source that one task reads.

    Attributes:
      source: name of the source.
      kind: 'parquet', 'tar', 'array_record', 'table' (csv or jsonl beside images) or 'folder'.
      path: of the file or folder.
      name: stands for the file or folder in keys, where records have none of their own.
      start, stop: row groups of parquet, bytes of a table, else rows; (0, -1) for all.
      stamp: stands for the content: size and time of change, or what the store says.
    """

    source: str
    kind: str
    path: str
    name: str
    start: int
    stop: int
    stamp: str

    def identity(self) -> str:
        """32 hexadecimal digits: equal for equal splits."""
        return json_digest(dataclasses.astuple(self))


def list_splits(spec: str, rows_per_split: int) -> list[Split]:
    """The splits of 'NAME=PATH|NAME=PATH|...'.

    PATH is a file, glob pattern or folder of `*.parquet`, `*.tar`, `*.tar.gz` or `*.array_record*` files, or a folder
    of images with captions.csv, metadata.csv, metadata.jsonl, with a .txt or .json beside each image, or with such
    sub-folders. NAME becomes part of every uid; without it, it is the last part of PATH.

    Raises:
      UserError: for a path that does not exist, holds nothing readable, or two sources of one name.
    """
    splits: list[Split] = []
    names: set[str] = set()
    for part in filter(None, (piece.strip() for piece in spec.split("|"))):
        name, equals, path = part.partition("=")
        if not equals:
            name, path = os.path.basename(part.rstrip("/")), part
        if name in names:
            raise UserError(f"input {part!r}: there are two sources named {name!r}; write NAME=PATH to tell them apart")
        names.add(name)
        found = _splits_of(name, path, rows_per_split)
        if not found:
            raise UserError(
                f"input {path!r} does not exist or holds nothing to read; give *.parquet, *.tar or *.array_record "
                "files, or a folder of images with captions.csv, metadata.jsonl or .txt files"
            )
        splits += found
    if not splits:
        raise UserError("no input; write --input=NAME=PATH, several joined by '|'")
    return splits


def _splits_of(name: str, path: str, rows: int) -> list[Split]:
    fs, inner = filesystem(path)
    if any(c in inner for c in "*?["):
        files = sorted(fs.glob(inner))
    elif fs.isdir(inner):
        files = sorted(fs.ls(inner, detail=False))
    else:
        files = [inner] if fs.exists(inner) else []
    files = [file for file in files if not os.path.basename(file).startswith((".", "_"))]
    tars = {_stem(file) for file in files if file.endswith(TAR_SUFFIXES)}
    kinds = {file: kind for file in files if (kind := _kind(file))}
    # img2dataset writes 00000.parquet with the metadata of 00000.tar, or of the files in the folder 00000, beside it.
    beside = tars | {_stem(file) for file, kind in kinds.items() if kind == "parquet" and fs.isdir(_stem(file))}
    kinds = {file: kind for file, kind in kinds.items() if kind != "parquet" or _stem(file) not in beside}
    splits: list[Split] = []
    for file, short in _short_names({file: os.path.basename(_stem(file)) for file in kinds}).items():
        if kinds[file] == "parquet":
            splits += _parquet_splits(name, fs.unstrip_protocol(file), short, fs.ukey(file), rows)
        elif kinds[file] == "tar":
            splits.append(Split(name, "tar", fs.unstrip_protocol(file), short, 0, -1, fs.ukey(file)))
        else:
            splits += _array_record_splits(name, file, short, fs.ukey(file), rows)
    if not splits and fs.isdir(inner):
        splits = _folder_splits(name, path, rows)
    return splits


def _kind(file: str) -> str:
    if file.endswith(".parquet"):
        return "parquet"
    if file.endswith(TAR_SUFFIXES):
        return "tar"
    # Not the side files, which hold the records without the pictures.
    return "array_record" if ".array_record" in os.path.basename(file) and not file.endswith(META) else ""


def _short_names(names: Mapping[str, str]) -> dict[str, str]:
    """{path: name}, with the path from the folder that all are in instead of a name that several share."""
    times = Counter(names.values())
    if len(times) == len(names):
        return dict(names)
    common = os.path.commonpath(list(map(os.path.dirname, names))).rstrip("/") + "/"
    return {path: name if times[name] == 1 else path.removeprefix(common) for path, name in names.items()}


def _stem(path: str) -> str:
    for suffix in (*TAR_SUFFIXES, ".parquet"):
        path = path.removesuffix(suffix)
    return path


def _parquet_splits(name: str, path: str, short: str, stamp: str, rows: int) -> list[Split]:
    """Runs of row groups of about `rows` rows."""
    fs, inner = filesystem(path)
    try:
        with fs.open(inner, "rb") as file:
            footer = pq.ParquetFile(file).metadata
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it or replace it by a whole parquet file") from error
    splits, start, total = [], 0, 0
    for group in range(footer.num_row_groups):
        total += footer.row_group(group).num_rows
        if total >= rows or group + 1 == footer.num_row_groups:
            splits.append(Split(name, "parquet", path, short, start, group + 1, stamp))
            start, total = group + 1, 0
    return splits


def _array_record_splits(name: str, path: str, short: str, stamp: str, rows: int) -> list[Split]:
    if "://" in path or not os.path.exists(path):
        raise UserError(f"input {path}: ArrayRecord files are read from a local disk; copy them there first")
    count = len(ArrayRecordSource([path], path))
    starts = range(0, count, rows)
    return [Split(name, "array_record", path, short, start, min(start + rows, count), stamp) for start in starts]


def _folder_splits(name: str, path: str, rows: int) -> list[Split]:
    splits: list[Split] = []
    for table in folder_tables(path):
        fs, inner = filesystem(table)
        starts, behind, total, pictures = [], rows, 0, 0
        for _, group in itertools.groupby(table_rows(table), key=row_picture):
            places = [row.at for row in group]
            if behind >= rows:
                starts.append(places[0])
                behind = 0
            behind, total, pictures = behind + len(places), total + len(places), pictures + 1
        if pictures < total:
            print(f"{table}: {total:,} rows of {pictures:,} pictures. {SEVERAL}", flush=True)
        stamp = fs.ukey(inner)
        splits += [Split(name, "table", table, "", *ends, stamp) for ends in itertools.pairwise([*starts, -1])]
    if splits:
        return splits
    listing = list_pictures(path)
    print(listing.sentence(used=listing.texts), flush=True)
    fs, inner = filesystem(path)
    inside = dict.fromkeys(os.path.dirname(picture) for picture in listing.pictures)
    folders = sorted(f"{inner.rstrip('/')}/{folder}".rstrip("/") for folder in inside)
    for folder, short in _short_names({folder: os.path.basename(folder) for folder in folders}).items():
        files = sorted((f["name"], f["size"]) for f in fs.ls(folder, detail=True) if f["type"] == "file")
        splits.append(Split(name, "folder", fs.unstrip_protocol(folder), short, 0, -1, json_digest(files)))
    return splits


def read_split(split: Split, max_bytes: int) -> Iterator[Pair]:
    """The raw pairs of a split, in their order.

    Args:
      split: as `list_splits` makes them.
      max_bytes: a larger image is not read: its pair has the problem 'too_many_bytes'.

    Raises:
      DamagedInput: where the file is damaged; the pairs before the damage have been given.
    """
    try:
        yield from SPLIT_READERS[split.kind](split, max_bytes)
    except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DamagedInput(f"{split.path}: {str(error) or type(error).__name__}") from error


def _read_parquet(split: Split, max_bytes: int) -> Iterator[Pair]:
    fs, inner = filesystem(split.path)
    folder = os.path.dirname(split.path)
    with fs.open(inner, "rb") as file:
        parquet = pq.ParquetFile(file)
        row = sum(parquet.metadata.row_group(i).num_rows for i in range(split.start))
        for batch in parquet.iter_batches(READ_ROWS, row_groups=list(range(split.start, split.stop))):
            for fields in batch.to_pylist():
                yield make_pair(fields, split.source, f"{split.name}[{row}]", folder, max_bytes)
                row += 1


def _read_tar(split: Split, max_bytes: int) -> Iterator[Pair]:
    fs, inner = filesystem(split.path)
    plain = split.path.endswith(".tar")
    with fs.open(inner, "rb") as file:
        for key, fields, place, problem in tar_samples(file, max_bytes, plain):
            pair = make_pair(fields | {"key": f"{split.name}/{key}"}, split.source, "", "", max_bytes, problem)
            yield pair | {"locator": (split.path, *place) if plain and place else None}


def _read_array_record(split: Split, max_bytes: int) -> Iterator[Pair]:
    source = ArrayRecordSource([split.path], os.path.basename(split.path))
    for start in range(split.start, split.stop, READ_ROWS):
        rows = range(start, min(start + READ_ROWS, split.stop))
        for row, record in zip(rows, source.__getitems__(rows), strict=True):
            fields, problem = ({}, "unreadable") if isinstance(record, BadRecord) else (record, "")
            yield make_pair(fields, split.source, f"{split.name}[{row}]", "", max_bytes, problem)


def _read_table(split: Split, max_bytes: int) -> Iterator[Pair]:
    folder = os.path.dirname(split.path)
    for _, group in itertools.groupby(table_rows(split.path, split.start, split.stop), key=row_picture):
        rows = list(group)
        captions = row_captions(rows) if len(rows) > 1 else []
        fields = rows[0].fields | ({"caption": captions[0], "captions": captions} if captions else {})
        yield make_pair(fields, split.source, f"[{rows[0].at}]", folder, max_bytes)


def _read_folder(split: Split, max_bytes: int) -> Iterator[Pair]:
    for fields in folder_rows(split.path, split.name):
        yield make_pair(fields, split.source, "", split.path, max_bytes)


SPLIT_READERS: Mapping[str, Callable[[Split, int], Iterator[Pair]]] = {
    "parquet": _read_parquet,
    "tar": _read_tar,
    "array_record": _read_array_record,
    "table": _read_table,
    "folder": _read_folder,
}


class ReadPairs(beam.PTransform):
    """PCollection of splits to raw pairs, for pipelines of one's own; curation itself reads inside `Measure`."""

    def __init__(self, max_bytes: int = 1 << 26):
        super().__init__()
        self.max_bytes = max_bytes

    def expand(self, splits: beam.PCollection) -> beam.PCollection:
        """Splits in, pairs out."""
        return splits | beam.Reshuffle() | beam.FlatMap(read_split, self.max_bytes)
