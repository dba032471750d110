"""Folders of pictures: captions in a table, in a text beside each picture, or a sub-folder for each class."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from florence_jax.data.records import BadRecord, BaseSource, Record, evenly, picture_bytes
from florence_jax.data.sources.fields import CAPTION_FIELDS, distinct_captions, known_field
from florence_jax.data.sources.picture_files import Listing, list_pictures, quoted, shown, some
from florence_jax.data.sources.tables import (
    PARQUET,
    TABLE_SUFFIXES,
    TABLES,
    captions_of,
    curation_command,
    table_records,
)
from florence_jax.errors import UserError
from florence_jax.files import AS_UTF8, join, list_files

LOOKED_AT = 64  # texts beside pictures that are read when a folder is opened: never all
TEXT_SHARE = 0.5  # of the pictures have a text, where it is texts and not sub-folders that tell what a picture shows


class FolderSource(BaseSource):
    """Image files with their captions.

    Args:
      folder: where the files are.
      rows: a dict for each record with "key" (file name relative to the folder), "caption" and further str fields.
      summary: what was found in the folder, see `open_folder`; {} where nothing was looked for.
    """

    def __init__(self, folder: str, rows: Sequence[Record], summary: Mapping[str, Any] | None = None):
        self.name, self.summary = folder, dict(summary or {})
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

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; the image files are not touched."""
        some = FolderSource(self.name, [self._rows[i] for i in evenly(len(self), count)])
        return list(some.metadata())


class TextSource(FolderSource):
    """Image files with a .txt or a .json beside each, which are read when a record is.

    Args:
      folder: where the files are.
      pictures: names, relative to the folder.
      texts: names of the .txt and .json files there.
      summary: as of `FolderSource`.

    A record has "key", "folder" (its sub-folder, '' for none), "caption" (of the .txt, else of the .json), "captions"
    where the .json has that list, and the other texts of the .json.
    """

    def __init__(self, folder: str, pictures: Sequence[str], texts: set[str], summary: Mapping[str, Any] | None = None):
        super().__init__(folder, [{"key": key, "folder": key.rpartition("/")[0]} for key in pictures], summary)
        self._texts = {text for key in pictures for text in _texts_beside(key, texts)}

    def __getitem__(self, index: int) -> Record:
        return self._read(self._rows[index]) | super().__getitem__(index)

    def metadata(self) -> Iterator[Record]:
        """All records whose text can be read, in order; the image files are not touched."""
        return (row for row in self.texts() if not isinstance(row, BadRecord))

    def texts(self) -> Iterator[Record | BadRecord]:
        """All records in order, without the images; or why their text cannot be read."""
        for row in self._rows:
            try:
                yield self._read(row)
            except BadRecord as error:
                yield error

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; the image files are not touched."""
        return list(self._some(count).metadata())

    def _some(self, count: int) -> "TextSource":
        return TextSource(self.name, [self._rows[i]["key"] for i in evenly(len(self), count)], self._texts)

    def _read(self, row: Record) -> Record:
        fields: Record = {}
        for name in _texts_beside(row["key"], self._texts):
            data = picture_bytes(os.path.join(self.name, name), row["key"])
            if name.endswith(".json"):
                fields = json_texts(data) | fields
            else:
                try:
                    fields["caption"] = data.decode("utf-8-sig").strip()
                except UnicodeDecodeError as error:
                    raise BadRecord(row["key"], f"{name} is not UTF-8: {AS_UTF8}") from error
        if "caption" not in fields:
            raise BadRecord(row["key"], "the .json beside it has no caption")
        return fields | row


def _texts_beside(key: str, texts: set[str]) -> list[str]:
    """Of a picture the .txt and the .json of the same name that are there."""
    stem = os.path.splitext(key)[0]
    return [name for name in (f"{stem}.txt", f"{stem}.json") if name in texts]


def json_texts(data: bytes) -> Record:
    """The texts and lists of texts of a .json beside a picture: "caption" and "captions" by these names.

    Numbers and all else are left out; {} for what is no JSON object.
    """
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    if not isinstance(value, dict):
        return {}
    listed = {
        name: field
        for name, field in value.items()
        if isinstance(field, str) or (isinstance(field, list) and field and all(isinstance(x, str) for x in field))
    }
    found = {name: listed[name] for name in listed if name not in ("key", "image", "images", "video", "folder")}
    captions = distinct_captions({name.lower(): field for name, field in found.items()})
    first = known_field(found, CAPTION_FIELDS)
    if first is None or not captions:
        return found
    is_list = isinstance(found.pop(first), list) or len(captions) > 1
    return found | {"caption": captions[0]} | ({"captions": captions} if is_list else {})


def open_folder(folder: str) -> FolderSource:
    """A folder of pictures as `catalog.open_source` describes it. Raises UserError.

    The source has `summary`: "folder", "files" (None where the folder was not listed), "pictures" (records),
    "texts" (where captions come from), "distinct" (captions or classes; None where only some were read), "example",
    "passed_over" (reason: count), and "says", the sentence for people.
    """
    path = epath.Path(folder)
    for name in TABLES:
        if (path / name).exists():
            return open_table(os.path.join(folder, name))
    listing = list_pictures(folder)
    if with_texts := texts_that_tell(listing):
        return _open_texts(listing, with_texts)
    if rows := class_rows(listing):
        return open_class_folders(listing, rows)
    if not listing.pictures and (names := list_files(folder, PARQUET)):
        return open_table(folder, [join(folder, name) for name in names])
    raise UserError(
        f"data source {folder}: needs *.array_record files, or images with captions.csv (columns file, caption), "
        "metadata.jsonl, a .txt or .json beside each image, or a sub-folder of images for each class. Found: "
        f"{listing.sentence()}{_instead(folder, listing)}"
    )


def _instead(folder: str, listing: Listing) -> str:
    """What may be meant by a folder that cannot be read."""
    names = [name for suffix in TABLE_SUFFIXES for name in list_files(folder, suffix)]
    if names and listing.pictures:
        return f". A table of another name is named itself: {join(folder, names[0])}"
    shards = any(listing.passed_over[suffix] for suffix in (".tar", ".gz", ".tgz"))
    return f". Tars: {curation_command(folder)}" if shards else ""


def texts_that_tell(listing: Listing) -> list[str]:
    """The pictures with a caption beside them; [] where it is the sub-folders that tell what the pictures show."""
    with_texts = _with_texts(listing)
    enough = len(with_texts) >= TEXT_SHARE * len(listing.pictures) or not class_rows(listing)
    return with_texts if enough else []


# -- a text beside each picture ---------------------------------------------------------------------------------------


def _spread(names: Sequence[str], count: int = LOOKED_AT) -> list[str]:
    """Some of many, spread evenly."""
    step = max(1, len(names) // count)
    return list(names[::step][:count])


def _with_texts(listing: Listing) -> list[str]:
    """The pictures with a caption beside them; a .json counts if any that is looked at holds one: it may hold boxes."""
    beside = {key: found for key in listing.pictures if (found := _texts_beside(key, listing.texts))}
    only_json = [key for key, found in beside.items() if not found[0].endswith(".txt")]
    looked = [json_texts(_read_quietly(listing.folder, beside[key][0])) for key in _spread(only_json)]
    if any("caption" in fields for fields in looked):
        return list(beside)
    return [key for key, found in beside.items() if found[0].endswith(".txt")]


def _read_quietly(folder: str, name: str) -> bytes:
    try:
        return picture_bytes(os.path.join(folder, name))
    except BadRecord:  # counted when the record is read
        return b""


def _open_texts(listing: Listing, pictures: Sequence[str]) -> TextSource:
    source = TextSource(listing.folder, pictures, listing.texts)
    used = {text for key in pictures for text in _texts_beside(key, listing.texts)}
    kinds = sorted({os.path.splitext(text)[1] for text in used}, reverse=True)
    looked = TextSource(listing.folder, _spread(pictures), listing.texts)
    read = list(looked.texts())
    bad = [row for row in read if isinstance(row, BadRecord)]
    captions = [row["caption"] for row in read if not isinstance(row, BadRecord)]
    if not any(captions):
        why = bad[0] if bad else f"the {' and '.join(kinds)} files beside the pictures are empty"
        raise UserError(f"data source {listing.folder}: {why}")
    without, whole = len(listing.pictures) - len(pictures), len(looked) == len(source)
    distinct, example = len(set(captions)), next(filter(None, captions))
    of = "" if whole else f" of the {len(captions)} looked at"
    says = f"{distinct:,} distinct captions{of} from the {' and '.join(kinds)} beside each, such as {quoted(example)}"
    if any("/" in key for key in pictures):
        says += ", not from the names of the sub-folders (those are in the field 'folder')"
    if bad:
        says += f"; of {len(read)} looked at {len(bad)} cannot be used and are left out, the first: {bad[0]}"
    if without:
        says += f"; {without:,} pictures have no caption and are left out"
    source.summary = _summary(
        listing, len(source), f"{' and '.join(kinds)} files", distinct if whole else None, example, says, used
    )
    source.summary["passed_over"] |= {"no caption": without} if without else {}
    return source


def _summary(
    listing: Listing, records: int, texts: str, distinct: int | None, example: str, says: str, used: set[str]
) -> dict[str, Any]:
    counts = f"{listing.files:,} files, {len(listing.pictures):,} read as pictures" if listing.files else "not listed"
    head = f"{shown(listing.folder)}: {counts}; {says}"
    return {
        "folder": listing.folder,
        "files": listing.files or None,
        "pictures": records,
        "texts": texts,
        "distinct": distinct,
        "example": example,
        "passed_over": listing.not_pictures(used),
        "not_searched": listing.left,
        "says": head + listing.passed_over_text(used),
    }


# -- a sub-folder for each class --------------------------------------------------------------------------------------


def class_rows(listing: Listing) -> list[tuple[str, str]]:
    """(picture, folder of its class) of each: the sub-folder, at the first depth where the pictures are in several.

    Pictures that lie deeper are of that class too; those beside the sub-folders have none and are left out.
    """
    inside = [(key, parts) for key in listing.pictures if len(parts := key.split("/")) > 1]
    depth, loose = 1, len(inside) < len(listing.pictures)
    while inside and not loose and all(len(parts) > depth + 1 for _, parts in inside):
        if inside[0][1][depth - 1] != inside[-1][1][depth - 1]:  # as they are sorted, else all are in that folder
            break
        depth += 1
    return [(key, "/".join(parts[:depth])) for key, parts in inside]


def class_name(folder: str) -> str:
    """The name of the class whose pictures are in a folder."""
    return folder.rpartition("/")[2]


def open_class_folders(listing: Listing, rows: Sequence[tuple[str, str]]) -> FolderSource:
    """The source of `class_rows`: a class is the caption, with spaces for '_'."""
    records = [{"key": key, "caption": class_name(folder).replace("_", " ")} for key, folder in rows]
    folders = sorted({folder for _, folder in rows})
    without, used = len(listing.pictures) - len(rows), set(folders)
    above = folders[0].rpartition("/")[0]
    empty = [name for name in listing.folders if name.rpartition("/")[0] == above and name not in used]
    says = f"{len(folders):,} classes from the names of the sub-folders: {some(map(class_name, folders))}"
    says += f"; {without:,} pictures beside the sub-folders have no class and are left out" if without else ""
    says += f"; no pictures in {some(empty)}" if empty else ""
    example = records[0]["caption"]
    summary = _summary(listing, len(records), "names of sub-folders", len(folders), example, says, ())
    summary["passed_over"] |= {"no class": without} if without else {}
    return FolderSource(listing.folder, records, summary)


# -- a table ----------------------------------------------------------------------------------------------------------


def open_table(path: str, parts: Sequence[str] = ()) -> FolderSource:
    """The pictures that a table names, relative to its folder, with their captions; see `tables.table_records`."""
    folder, name = os.path.split(parts[0] if parts else path)
    folder, name = folder or ".", f"{len(parts)} parquet files" if parts else name
    records, rows, suspicious = table_records(path, parts)
    captions = list(dict.fromkeys(caption for record in records for caption in captions_of(record)))
    if not captions:
        raise UserError(f"data source {path}: every caption of its {rows:,} rows is empty")
    says = f"{name}: {rows:,} rows of {len(records):,} pictures, {len(captions):,} distinct captions"
    says += f", such as {quoted(captions[0])}"
    if any("captions" in record for record in records):
        says += " (all of a picture are in its list field 'captions')"
    listing = Listing(folder) if "://" in folder else list_pictures(folder)  # in a bucket that takes long
    named, there = {_inside(folder, record["key"]) for record in records}, set(listing.pictures)
    extra = len(there - named)
    absent = sum(1 for key in named - there if "://" not in folder and not _exists(os.path.join(folder, key)))
    if absent == len(records):
        raise UserError(f"data source {path}: none of its {absent:,} pictures is there, such as {records[0]['key']!r}")
    says += f"; {extra:,} pictures are not in the table and left out" if extra else ""
    says += f"; {absent:,} pictures of the table are not there" if absent else ""
    listing.passed_over -= Counter(os.path.splitext(table)[1].lower() for table in parts or (name,))
    summary = _summary(listing, len(records), name, len(captions), captions[0], says + suspicious, ())
    summary["passed_over"] |= {"not in the table": extra} if extra else {}
    summary["passed_over"] |= {"not in the folder": absent} if absent else {}
    return FolderSource(folder, records, summary)


def _inside(folder: str, key: str) -> str:
    """The name of a file relative to the folder."""
    return os.path.relpath(key, folder) if os.path.isabs(key) else os.path.normpath(key)


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # a name with a NUL
        return False
