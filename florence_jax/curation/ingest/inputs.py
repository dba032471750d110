"""Raw pairs from parquet files, WebDataset tars, ArrayRecord files and folders of images, local or any fsspec URL.

A raw pair is a dict: "key" (str, unique in its source), "image" (bytes), "captions" (list of str), "caption" (the
first, or ""), "source" (str), "url", "licence" (str, "" where unknown), "headers" (list of HTTP response header lines),
"extra" (all other fields that are text, numbers or lists of text), "fields" (the names that the file has), "problem"
("" or why there are no image bytes) and "locator": (path, offset, size) where the bytes of the image can be read again
alone, or None where they cannot (a parquet column, a compressed tar).
What img2dataset writes (webdataset, parquet, files) is read as it is.
"""

import contextlib
import dataclasses
import itertools
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

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
from florence_jax.data.sources.folder import class_name, class_rows, texts_that_tell
from florence_jax.data.sources.picture_files import HIDDEN, Listing, known_suffixes, list_pictures, quoted, shown
from florence_jax.errors import UserError
from florence_jax.files import (
    DELIMITED,
    check_store,
    expand_braces,
    filesystem,
    has_many_lines,
    json_digest,
    table_rows,
)

Pair = dict[str, Any]
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
READ_ROWS = 64  # parquet rows decoded at a time: with images of 1 MB, 64 MB
LOOK_BYTES = 1 << 26
FIELDS_SHOWN = 16
PAIRS_LOOKED_AT = 16  # pairs of an input that are read before the work begins, to say what is there


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
      caption: of the pictures of a folder that have none of their own: their class.
    """

    source: str
    kind: str
    path: str
    name: str
    start: int
    stop: int
    stamp: str
    caption: str = ""

    def identity(self) -> str:
        """32 hexadecimal digits: equal for equal splits."""
        *rest, caption = dataclasses.astuple(self)
        return json_digest([*rest, caption] if caption else rest)


class Input(NamedTuple):
    """One source of raw pairs.

    Attributes:
      splits: at least one.
      summary: what was found, as `data.records.summary_of` has it: "folder" (the path), "files", "pictures" (None where
        they are not counted before they are read), "texts", "distinct" (None: only some were looked at), "example",
        "passed_over" (reason: count), "fields" (names seen) and "says", the sentence for people.
    """

    splits: list[Split]
    summary: dict[str, Any]


def list_inputs(spec: str, rows_per_split: int) -> list[Input]:
    """The sources of 'NAME=PATH|NAME=PATH|...'; a few pairs of each are read.

    PATH is a file, glob pattern or folder of `*.parquet`, `*.tar`, `*.tar.gz` or `*.array_record*` files, a table of
    images (`*.csv`, `*.tsv`, `*.jsonl`), or a folder of images with such a table named captions or metadata, with a
    .txt or .json beside each image, or with such sub-folders. '{000..009}' stands for ten names. NAME becomes part of
    every uid; without it, it is the last part of PATH.

    Raises:
      UserError: for a path that does not exist, holds nothing readable, or two sources of one name.
    """
    inputs: list[Input] = []
    names: set[str] = set()
    for part in filter(None, (piece.strip() for piece in spec.split("|"))):
        name, path = _named_path(part)
        if name in names:
            raise UserError(f"input {part!r}: there are two sources named {name!r}; write NAME=PATH to tell them apart")
        names.add(name)
        found = _open_input(name, path, rows_per_split)
        if not found.splits:
            raise UserError(
                f"input {path!r} does not exist or holds nothing to read; give *.parquet, *.tar or *.array_record "
                "files, a table, or a folder of images with captions.csv, metadata.jsonl or .txt files"
                f"{found.summary['says']}"
            )
        inputs.append(found)
    if not inputs:
        raise UserError("no input; write --input=NAME=PATH, several joined by '|'")
    return inputs


def list_splits(spec: str, rows_per_split: int) -> list[Split]:
    """The splits of `list_inputs`."""
    return [split for found in list_inputs(spec, rows_per_split) for split in found.splits]


def _named_path(part: str) -> tuple[str, str]:
    """(name, path) of 'NAME=PATH' or 'PATH', which may have a '=' of its own; local paths are absolute."""
    name, equals, path = part.partition("=")
    if not equals or not name or "/" in name or (os.path.exists(part) and not os.path.exists(path)):
        name, path = os.path.basename(part.rstrip("/")), part
    return name, path if "://" in path else os.path.abspath(path)


def _open_input(name: str, path: str, rows: int) -> Input:
    if "://" in path:
        check_store(path, pages=True)
    fs, whole = filesystem(path)
    files: list[str] = []
    for inner in expand_braces(whole):
        if any(c in inner for c in "*?["):
            files += sorted(fs.glob(inner))
        elif fs.isdir(inner):
            files += sorted(fs.ls(inner, detail=False))
        else:
            files += [inner] if fs.exists(inner) else []
    if files == [whole] and whole.lower().endswith(DELIMITED + (".jsonl",)):
        return _table_input(name, path, path, rows)
    hidden = [file for file in files if os.path.basename(file).startswith((".", "_"))]
    files = [file for file in files if file not in set(hidden)]
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
    if splits:
        others = (file for file in files if file not in kinds and _stem(file) not in beside and not file.endswith(META))
        passed = Counter(map(_suffix_of, others))
        if "parquet" in kinds.values():  # which may name the pictures beside it
            passed = Counter({suffix: count for suffix, count in passed.items() if suffix not in known_suffixes()})
        passed += Counter({HIDDEN: len(hidden)})
        counts = ", ".join(f"{count:,} {kind}" for kind, count in Counter(kinds.values()).items())
        return _with_looks(path, splits, f"{shown(path)}: {len(files) + len(hidden):,} files, {counts} read", passed)
    return _folder_input(name, path, rows) if fs.isdir(whole) else Input([], {"says": ""})


def _suffix_of(file: str) -> str:
    return os.path.splitext(file)[1].lower() or "without a suffix"


def _with_looks(path: str, splits: list[Split], head: str, passed_over: Mapping[str, int]) -> Input:
    """The input with its summary: a few of its pairs are read."""
    pairs: list[Pair] = []
    with contextlib.suppress(DamagedInput):  # the run goes on with what is before the damage, and reports it
        for pair in itertools.islice(read_split(splits[0], LOOK_BYTES), PAIRS_LOOKED_AT):
            pairs.append({name: value for name, value in pair.items() if name != "image"})
    captions = [text for pair in pairs for text in pair["captions"]]
    fields = sorted({name for pair in pairs for name in pair["fields"]} - {"key"})
    distinct = f"{len(set(captions)):,} distinct captions, such as {quoted(captions[0])}" if captions else "no caption"
    whole = sum(1 for pair in pairs if not pair["problem"])
    says = (
        f"{head}; of the first {len(pairs):,} pairs, the only ones looked at, {whole:,} have a picture, with {distinct}"
    )
    says += f"; fields: {', '.join(fields[:FIELDS_SHOWN])}" if fields else ""
    more = ", ".join(f"{count:,} {reason}" for reason, count in passed_over.items())
    summary = {
        "folder": path,
        "files": None,
        "pictures": None,
        "texts": splits[0].kind,
        "distinct": None,
        "example": captions[0] if captions else "",
        "passed_over": dict(passed_over),
        "fields": fields,
        "says": says + (f"; passed over: {more}" if more else ""),
    }
    return Input(splits, summary)


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


def _table_input(name: str, path: str, table: str, rows: int) -> Input:
    """Parts of a table of about `rows` rows; the rows of a picture that follow one another are in one part."""
    fs, inner = filesystem(table)
    starts, behind, count, long = [], rows, 0, []
    for _, group in itertools.groupby(table_rows(table), key=row_picture):
        found = list(group)
        if behind >= rows:
            starts.append(found[0].at)
            behind = 0
        behind, count = behind + len(found), count + len(found)
        long += [row.line for row in found if has_many_lines(row.fields) and table.lower().endswith(DELIMITED)]
    if not starts:
        raise UserError(f"{table} has no rows")
    stamp = fs.ukey(inner)
    splits = [Split(name, "table", table, "", *ends, stamp) for ends in itertools.pairwise([*starts, -1])]
    head = f"{shown(path)}: {os.path.basename(table)} with {count:,} rows"
    if long:
        head += f", of which {len(long):,} have texts of many lines, the first ends in line {long[0]:,}: is a quote "
        head += "missing?"
    folder = Listing(path) if "://" in table else list_pictures(os.path.dirname(table))  # in a bucket that takes long
    head += f"; {folder.files:,} files, {len(folder.pictures):,} read as pictures" if folder.files else ""
    folder.passed_over -= Counter({os.path.splitext(table)[1].lower(): 1})
    return _of_listing(_with_looks(path, splits, head, {}), folder)


def _of_listing(found: Input, listing: Listing) -> Input:
    """With what lies in the folder."""
    summary = found.summary | {"files": listing.files, "pictures": len(listing.pictures), "not_searched": listing.left}
    summary |= {"passed_over": listing.not_pictures(used=listing.texts)}
    summary |= {"says": summary["says"] + listing.passed_over_text(used=listing.texts)}
    return Input(found.splits, summary)


def _folder_input(name: str, path: str, rows: int) -> Input:
    fs, inner = filesystem(path)
    for table in folder_tables(path):  # a parquet file has been read as such
        return _table_input(name, path, table, rows)
    listing = list_pictures(path)
    rows = [] if texts_that_tell(listing) else class_rows(listing)
    captions = {os.path.dirname(picture): class_name(folder).replace("_", " ") for picture, folder in rows}
    inside = dict.fromkeys(os.path.dirname(picture) for picture in listing.pictures)
    folders = {f"{inner.rstrip('/')}/{folder}".rstrip("/"): captions.get(folder, "") for folder in sorted(inside)}
    splits = []
    for folder, short in _short_names({folder: os.path.basename(folder) for folder in folders}).items():
        files = sorted((f["name"], f["size"]) for f in fs.ls(folder, detail=True) if f["type"] == "file")
        stamp, caption = json_digest(files), folders[folder]
        splits.append(Split(name, "folder", fs.unstrip_protocol(folder), short, 0, -1, stamp, caption))
    head = f"{shown(path)}: {listing.files:,} files, {len(listing.pictures):,} read as pictures"
    head += f", captions from the names of {len(set(captions.values())):,} sub-folders" if captions else ""
    if not splits:
        return Input([], {"says": f". Found: {head}{listing.passed_over_text()}"})
    return _of_listing(_with_looks(path, splits, head, {}), listing)


def read_split(split: Split, max_bytes: int) -> Iterator[Pair]:
    """The raw pairs of a split, in their order.

    Args:
      split: as `list_splits` makes them.
      max_bytes: a larger image is not read: its pair has the problem 'too_many_bytes'.

    Raises:
      DamagedInput: where the file is damaged; the pairs before the damage have been given.
      UserError: for a table that cannot be read, a tar whose samples are not together.
    """
    try:
        yield from SPLIT_READERS[split.kind](split, max_bytes)
    except UserError:  # a mistake that can be mended, not damage
        raise
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
        for key, fields, place, problem in tar_samples(file, max_bytes, plain, inner):
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
        pair = make_pair(rows[0].fields, split.source, f"[{rows[0].at}]", folder, max_bytes)
        if len(rows) > 1:
            captions = row_captions(rows)
            pair |= {"captions": captions, "caption": captions[0] if captions else ""}
        yield pair


def _read_folder(split: Split, max_bytes: int) -> Iterator[Pair]:
    for fields in folder_rows(split.path, split.name, split.caption):
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
