"""Folders of pictures with captions.csv, metadata.jsonl, or a sub-folder for each class."""

import os
from collections.abc import Iterator, Sequence

from etils import epath

from florence_jax.data.records import BaseSource, Record, picture_bytes
from florence_jax.errors import UserError
from florence_jax.files import table_rows

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Tables of captions beside pictures, the first that a folder has counts.
TABLES = ("captions.csv", "metadata.csv", "metadata.jsonl")
# Names of the columns of captions.csv and of the fields of metadata.jsonl, first match wins.
FILE_COLUMNS = ("file", "filename", "file_name", "filepath", "image")
CAPTION_COLUMNS = ("caption", "text", "title")


class FolderSource(BaseSource):
    """Image files with their captions.

    Args:
      folder: where the files are.
      rows: a dict for each record with "key" (file name relative to the folder), "caption" and further str fields.
    """

    def __init__(self, folder: str, rows: Sequence[Record]):
        self.name = folder
        self._rows = list(rows)
        if not self._rows:
            raise UserError(f"data source {folder} has no records")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        return row | {"image": picture_bytes(os.path.join(self.name, row["key"]), row["key"])}

    def metadata(self) -> Iterator[Record]:
        """All rows in order; the image files are not touched."""
        return map(dict, self._rows)


def open_folder(folder: str) -> FolderSource:
    """A folder of pictures as `catalog.open_source` describes it. Raises UserError."""
    path = epath.Path(folder)
    for name in TABLES:
        if (path / name).exists():
            rows = [{"": row.line, **_named(row.fields)} for row in table_rows(path / name)]
            return FolderSource(folder, _as_records(path / name, rows))
    rows = [
        {"key": f"{sub.name}/{file.name}", "caption": sub.name.replace("_", " ")}
        for sub in sorted(p for p in path.iterdir() if p.is_dir())
        for file in sorted(sub.iterdir())
        if file.name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not rows:
        raise UserError(
            f"data source {folder}: needs *.array_record files, or images with captions.csv (columns file, caption), "
            "metadata.jsonl, or a sub-folder of images for each class"
        )
    return FolderSource(folder, rows)


def _named(fields: Record) -> Record:
    """Without the cells of columns that have no name."""
    return {name: value for name, value in fields.items() if name}


def _as_records(path: epath.Path, rows: Sequence[Record]) -> list[Record]:
    """Rows of a table (with the line number under "") as records: the columns renamed to "key" and "caption"."""
    if not rows:
        raise UserError(f"{path} has no rows")
    columns = {name.strip().lower(): name for row in rows for name in row}
    names = {}
    for field, known in (("key", FILE_COLUMNS), ("caption", CAPTION_COLUMNS)):
        names[field] = next((columns[name] for name in known if name in columns), None)
        if names[field] is None and not (field == "caption" and "captions" in columns):
            given = ", ".join(filter(None, columns.values()))
            raise UserError(f"{path} has no column {' or '.join(map(repr, known))}, only: {given}; rename one")
    records = []
    for row in rows:
        key = row.get(names["key"])
        if not isinstance(key, str) or not key.strip():
            raise UserError(f"{path} line {row['']}: column {names['key']!r} must name a file")
        rest = {k: v for k, v in row.items() if k and k not in names.values() and k != "key"}
        if rest.get("label") is not None:
            rest["label"] = str(rest["label"])  # a class: JSON may have a number where CSV has text
        caption = {"caption": row.get(names["caption"], "")} if names["caption"] else {}  # else a list, "captions"
        records.append({**rest, "key": key.strip(), **caption})
    return records
