"""Tables of captions: CSV and its kin, JSON lines, parquet with the paths of pictures, as records."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec

from florence_jax.data.records import Record
from florence_jax.data.sources.fields import (
    CAPTION_FIELDS,
    CLASS_FIELDS,
    FILE_FIELDS,
    IMAGE_FIELDS,
    LISTS,
    caption_texts,
    captions_or_classes,
    known_field,
    known_names,
)
from florence_jax.errors import UserError
from florence_jax.files import TableRow, filesystem, has_many_lines, table_rows

PARQUET = ".parquet"
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", PARQUET)
# Tables beside pictures; the first that a folder has counts.
TABLES = tuple(f"{stem}{suffix}" for stem in ("captions", "metadata") for suffix in TABLE_SUFFIXES)
PARQUET_ROWS = 4096  # that are decoded at a time
WANTED_FILES = (*FILE_FIELDS, "image", "img")


def curation_command(spec: str) -> str:
    """The command that turns what can only be read in its order into ArrayRecord files, and how to train on them."""
    given = shlex.quote(f"--input={spec}")
    return (
        f"python -m florence_jax.curation.main --config=configs/curate.py {given} --workdir=runs/curated, "
        "then --config.data.train=runs/curated/output"
    )


def table_records(path: str, parts: Sequence[str] = ()) -> tuple[list[Record], int, str]:
    """A record for each picture of a table: "key" (its file), "caption", "captions" (where any has several), the rest.

    Args:
      path: local or a URL; `TABLE_SUFFIXES`, or text with a heading.
      parts: the parquet files of one folder that `path`, a folder or a pattern, stands for.

    Returns:
      Records, the number of rows, and what is to be said of them, for people ('' for nothing).

    Raises:
      UserError: if it cannot be read, has no rows, or no columns of files and captions.
    """
    if parts or path.endswith(PARQUET):
        rows = [row for part in parts or (path,) for row in _parquet_rows(part, path)]
    else:
        rows = list(table_rows(path))
    if not rows:
        raise UserError(f"{path} has no rows")
    delimited = not parts and not path.endswith((PARQUET, ".jsonl"))
    long = [row for row in rows if has_many_lines(row.fields)] if delimited else []
    said = f"; {len(long):,} rows have texts of many lines, the first ends in line {long[0].line}: " if long else ""
    said += "is a quote missing there?" if long else ""
    columns = list(dict.fromkeys(name for row in rows for name in row.fields if name))
    if (caption := known_field(columns, (*CAPTION_FIELDS, *CLASS_FIELDS))) in known_names(columns, CLASS_FIELDS):
        said = f"; they are the classes in the column {caption!r}{said}"
    return one_a_picture(_as_records(path, rows, columns, caption)), len(rows), said


def _as_records(path: str, rows: Sequence[TableRow], columns: Sequence[str], caption: str | None) -> list[Record]:
    file, classes = known_field(columns, WANTED_FILES), known_names(columns, CLASS_FIELDS)
    several = known_field(columns, CLASS_FIELDS[-1:])
    for found, wanted in (
        (file, ("file", "file_name", "path")),
        (caption, ("caption", "captions", "text", "title", "label")),
    ):
        if found is None:
            raise UserError(
                f"{path} has no column {' or '.join(map(repr, wanted))}, only: {', '.join(columns)}; rename one"
            )
    used = {file, caption, "key", *(name for name in columns if name.strip().lower() in LISTS)}
    records = []
    for row in rows:
        key = row.fields.get(file)
        if not isinstance(key, str) or not key.strip():
            raise UserError(f"{path} line {row.line}: column {file!r} must name a file")
        fields = {name: value for name, value in row.fields.items() if name}
        if several is not None and isinstance(fields.get(several), str):
            fields[several] = _several(fields[several])
        ignored = () if caption in classes else classes
        captions = captions_or_classes({name.strip().lower(): x for name, x in fields.items() if name not in ignored})
        record = {name: value for name, value in fields.items() if name not in used or name == several}
        if record.get("label") is not None:
            record["label"] = str(record["label"])  # a class: JSON may have a number where CSV has text
        record |= {"key": key.strip(), "caption": captions[0] if captions else ""}
        is_list = not isinstance(fields.get(caption), str) or len(captions) > 1
        records.append(record | ({"captions": captions} if is_list and captions else {}))
    return records


def _several(text: str) -> list[str]:
    """The classes in a text such as '["a", "b"]', 'a;b', 'a|b' or 'a, b'."""
    if len(listed := caption_texts(text)) > 1 or listed != [text]:
        return listed
    mark = next((mark for mark in ";|," if mark in text), ";")
    return [name.strip() for name in text.split(mark) if name.strip()]


def captions_of(record: Mapping[str, Any]) -> list[str]:
    """All captions of a record of `table_records`."""
    return record.get("captions") or ([record["caption"]] if record["caption"].strip() else [])


def one_a_picture(rows: Sequence[Record]) -> list[Record]:
    """Rows of one picture as one record, in the order of the first rows.

    Where any picture has several captions or rows, every record has "captions", the list of all that are not blank, and
    "caption", the first. Of the other fields, those that differ between the rows become lists, in the order of the
    rows.
    """
    groups: dict[str, list[Record]] = {}
    for row in rows:
        groups.setdefault(os.path.normpath(row["key"]), []).append(row)
    if len(groups) == len(rows) and not any("captions" in row for row in rows):
        return list(rows)
    return [_joined(group) for group in groups.values()]


def _joined(group: Sequence[Record]) -> Record:
    record = dict(group[0])
    if len(group) > 1:
        for name in dict.fromkeys(name for row in group for name in row if name not in ("key", "caption", "captions")):
            values = [row[name] for row in group if name in row]
            record[name] = values[0] if all(value == values[0] for value in values) else values
    captions = [caption for row in group for caption in captions_of(row)]
    return record | {"caption": captions[0] if captions else "", "captions": captions}


# -- parquet ----------------------------------------------------------------------------------------------------------


def _parquet_rows(path: str, spec: str) -> Iterator[TableRow]:
    """Rows of a parquet file that names its pictures; columns of bytes and of nested values are not read.

    `spec`: as the user named it.
    """
    import pyarrow as pa  # half a second that other sources need not wait for
    import pyarrow.parquet as pq

    try:
        with _open(path) as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            if known_field(schema.names, WANTED_FILES) is None or _holds_pictures(schema, pa):
                raise UserError(_no_paths(spec, schema, pa))
            names = [field.name for field in schema if _is_plain(field.type, pa)]
            row = 0
            for batch in parquet.iter_batches(PARQUET_ROWS, columns=names):
                for fields in batch.to_pylist():
                    row += 1
                    yield TableRow(row, 0, {name: value for name, value in fields.items() if value is not None})
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _open(path: str) -> fsspec.core.OpenFile:
    fs, inner = filesystem(path)
    return fs.open(inner, "rb")


def _is_plain(kind: Any, pa: Any) -> bool:
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind) or types.is_floating(kind)


def _holds_pictures(schema: Any, pa: Any) -> bool:
    types = pa.types
    return any(
        field.name.lower() in IMAGE_FIELDS
        and (types.is_binary(field.type) or types.is_large_binary(field.type) or types.is_struct(field.type))
        for field in schema
    )


def _no_paths(path: str, schema: Any, pa: Any) -> str:
    if _holds_pictures(schema, pa):
        return f"data source {path} holds the pictures themselves: training needs them one by one. {_turn(path)}"
    return (
        f"data source {path} has no column of paths ({', '.join(WANTED_FILES[:6])}, ...), only: "
        f"{', '.join(schema.names)}; pictures that are links must be downloaded first (img2dataset)"
    )


def _turn(path: str) -> str:
    return f"Turn it into ArrayRecord files: {curation_command(path)}"
