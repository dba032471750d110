"""Where records come from: the embedded emoji set, ArrayRecord files, TFDS, folders of images with captions.

A record is a dict: "key" (str, unique in its source), "image" (encoded bytes), "caption" (str), and further text fields
(str or list of str); optionally "label" (int, dense id of the caption, made by curation).
"""

import csv
import importlib.resources
import io
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from florence_jax.errors import UserError

Record = dict[str, Any]

EMOJI_SPLITS = ("train", "new_style", "new_names")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Names of the columns of captions.csv and of the fields of metadata.jsonl, first match wins.
FILE_COLUMNS = ("file", "filename", "file_name", "filepath", "image")
CAPTION_COLUMNS = ("caption", "text", "title")
METADATA_CHUNK = 256


class BadRecord(UserError):
    """One record that cannot be used (corrupt image, empty caption, ...); training counts, logs and replaces it.

    Attributes:
      key: of the record.
      reason: what is wrong with it.
    """

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"record {self.key!r}: {self.reason}"


class Source(Protocol):
    """Random access to records. Instances can be pickled (into worker processes)."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record at 0 <= index < len. Raises BadRecord if it cannot be read."""

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        """Many records at once; an unreadable one comes as the BadRecord in its place."""

    def metadata(self) -> Iterator[Record]:
        """All readable records in order, without "image"."""


class _Base:
    """What sources share; a subclass gives `name`, `__len__` and `__getitem__`."""

    name: str

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        return [self._get(i) for i in indices]

    def _get(self, index: int) -> Record | BadRecord:
        try:
            return self[index]
        except BadRecord as bad:
            return bad

    def metadata(self) -> Iterator[Record]:
        """All readable records in order, without "image"."""
        for start in range(0, len(self), METADATA_CHUNK):
            for record in self.__getitems__(range(start, min(start + METADATA_CHUNK, len(self)))):
                if not isinstance(record, BadRecord):
                    yield {name: value for name, value in record.items() if name != "image"}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} records)"


def open_source(spec: str) -> Source:
    """Opens a source by name.

    Args:
      spec: 'emoji:train' | 'emoji:new_style' | 'emoji:new_names'; a file, glob pattern or folder of `*.array_record`
        (also `*.array_record-00000-of-00010`); 'tfds:NAME:SPLIT'; 'karpathy:FILE.json:SPLIT@IMAGES'; or a folder of
        images with captions.csv (columns file and caption), metadata.csv or metadata.jsonl (fields file_name and
        text), or with one sub-folder a class.

    Raises:
      UserError: if it does not exist, is empty, lacks a column, or is of an unknown kind.
    """
    if spec.startswith("emoji:"):
        return _open_emoji(spec)
    if spec.startswith("tfds:"):
        return _open_tfds(spec)
    if spec.startswith("karpathy:"):
        from florence_jax.data.karpathy import open_karpathy  # it makes a source of this module

        return open_karpathy(spec)
    paths = _array_record_paths(spec)
    if paths:
        return ArrayRecordSource(paths, spec)
    if epath.Path(spec).is_dir():
        return _open_folder(spec)
    if epath.Path(spec).exists():
        raise UserError(f"data source {spec}: unknown kind of file; use *.array_record or a folder")
    if re.match(r"\w\w+:(?!//)", spec):
        raise UserError(f"data source {spec!r}: unknown kind; use emoji:SPLIT, tfds:NAME:SPLIT or a path")
    raise UserError(f"data source {spec!r} does not exist; use emoji:train, tfds:NAME:SPLIT or an existing path")


def open_mixture(spec: str) -> tuple[list[Source], list[float]]:
    """Opens sources joined by '|', each with an optional '*weight' (default 1), as in 'emoji:train*2|gs://b/pairs'.

    A pattern that ends in a star and digits needs its weight said: 'pairs-*00*1'.

    Returns:
      The sources and their weights; the weights are the shares of each batch up to a factor.

    Raises:
      UserError: for a weight that is not positive, and as `open_source` does.
    """
    sources, weights = [], []
    for part in spec.split("|"):
        match = re.fullmatch(r"(.+?)(?:\*(-?\d[\d.eE+-]*))?", part.strip())
        if not match:
            raise UserError(f"data {spec!r} has an empty source; write SOURCE or SOURCE*WEIGHT, joined by '|'")
        try:
            weight = float(match[2] or 1)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise UserError(f"data source {part.strip()!r}: the weight after '*' must be a positive number")
        sources.append(open_source(match[1]))
        weights.append(weight)
    return sources, weights


# -- ArrayRecord ------------------------------------------------------------------------------------------------------


class ArrayRecordSource(_Base):
    """Records in ArrayRecord files: each payload is a msgpack map.

    Args:
      paths: the files, in order.
      name: for messages; also the prefix of the keys of records without one.

    Raises:
      UserError: for an unreadable file, or if there are no records.
    """

    def __init__(self, paths: Sequence[str], name: str):
        self.name = name
        try:
            self._records = ArrayRecordDataSource(list(paths))
        except Exception as error:  # the reader raises RuntimeError, ValueError, ... by kind of damage
            raise UserError(f"data source {name}: cannot read ArrayRecord files ({_first_line(error)})") from error
        if not len(self._records):
            raise UserError(f"data source {name} has no records")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            payload = self._records[index]
        except Exception as error:  # a damaged chunk; the reader's exceptions have no common type
            raise BadRecord(f"{self.name}[{index}]", f"unreadable ({_first_line(error)})") from error
        return self._unpack(index, payload)

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        try:
            payloads = self._records.__getitems__(indices)
        except Exception:  # one damaged chunk fails the whole read: find it
            return [self._get(i) for i in indices]
        return [self._get_unpacked(i, payload) for i, payload in zip(indices, payloads, strict=True)]

    def _get_unpacked(self, index: int, payload: bytes) -> Record | BadRecord:
        try:
            return self._unpack(index, payload)
        except BadRecord as bad:
            return bad

    def _unpack(self, index: int, payload: bytes) -> Record:
        try:
            record = msgpack.unpackb(payload)
        except (ValueError, msgpack.UnpackException) as error:
            raise BadRecord(f"{self.name}[{index}]", f"not a msgpack map ({_first_line(error)})") from error
        if not isinstance(record, dict):
            raise BadRecord(f"{self.name}[{index}]", f"not a msgpack map but {type(record).__name__}")
        record.setdefault("key", f"{self.name}[{index}]")
        return record


def write_array_record(path: str, records: Iterable[Record]) -> int:
    """Writes one ArrayRecord file of msgpack maps (group_size 1, for random access); returns the number of records.

    The file appears under its name only when it is complete.

    Raises:
      UserError: for a record without "key" or "image", for no records, or if the file cannot be written.
    """
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    count = 0
    try:
        writer = ArrayRecordWriter(temporary, "group_size:1")
        try:
            for record in records:
                if not isinstance(record.get("key"), str) or not isinstance(record.get("image"), bytes):
                    raise UserError(f"record {count} for {path} needs a str 'key' and an 'image' of bytes")
                writer.write(msgpack.packb(record, use_bin_type=True))
                count += 1
        finally:
            writer.close()
        if not count:
            raise UserError(f"no records to write to {path}")
        epath.Path(temporary).replace(path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {_first_line(error)}") from error
    finally:
        epath.Path(temporary).unlink(missing_ok=True)
    return count


def _array_record_paths(spec: str) -> list[str]:
    """Files that `spec` (a file, glob pattern or folder) names, sorted; [] if there are none."""
    path = epath.Path(spec)
    if ".array_record" in path.name and path.exists() and not path.is_dir():
        return [spec]
    if path.is_dir():
        found = path.glob("*")
    elif any(c in path.name for c in "*?["):
        found = path.parent.glob(path.name)
    else:
        return []
    # Not the half-written ones of `write_array_record`.
    return sorted(os.fspath(p) for p in found if ".array_record" in p.name and not p.name.endswith(".tmp"))


def _open_emoji(spec: str) -> ArrayRecordSource:
    split = spec.removeprefix("emoji:")
    if split not in EMOJI_SPLITS:
        raise UserError(f"data source {spec!r}: the embedded set has {', '.join('emoji:' + s for s in EMOJI_SPLITS)}")
    return ArrayRecordSource(
        [str(importlib.resources.files("florence_jax.data") / f"emoji/{split}.array_record")], spec
    )


# -- folders ----------------------------------------------------------------------------------------------------------


class FolderSource(_Base):
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
        try:
            return row | {"image": (epath.Path(self.name) / row["key"]).read_bytes()}
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL
            raise BadRecord(row["key"], f"cannot read the file: {getattr(error, 'strerror', '') or error}") from error

    def metadata(self) -> Iterator[Record]:
        """All rows in order; the image files are not touched."""
        return map(dict, self._rows)


class ListSource(_Base):
    """Pictures that a caller has at hand, without captions.

    Args:
      name: for messages.
      images: paths, PIL pictures or uint8 arrays, see op 'decode'. The key of a path is the path, of others the number.
    """

    def __init__(self, name: str, images: Sequence[Any]):
        self.name, self._images = name, images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        image = self._images[index]
        if isinstance(image, (str, os.PathLike)):
            return FolderSource("", [{"key": os.fspath(image)}])[0]
        return {"key": f"number {index}", "image": image}


def _open_folder(folder: str) -> FolderSource:
    path = epath.Path(folder)
    for name, read in (("captions.csv", _csv_rows), ("metadata.csv", _csv_rows), ("metadata.jsonl", _jsonl_rows)):
        if (path / name).exists():
            return FolderSource(folder, _as_records(path / name, read(path / name)))
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


def _csv_rows(path: epath.Path) -> list[Record]:
    try:
        reader = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        rows = []
        for row in reader:
            if any(cell.strip() for cell in row.pop(None, ())):
                raise csv.Error(f"line {reader.line_num} has more cells than the header: quote texts with commas")
            rows.append({"": reader.line_num, **{k: v for k, v in row.items() if k and v is not None}})
        return rows
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UserError(f"cannot read {path}: {_first_line(error)}; it must be comma-separated UTF-8") from error


def _jsonl_rows(path: epath.Path) -> list[Record]:
    rows = []
    try:
        for number, line in enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not a JSON object")
                rows.append({"": number, **row})
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {path}: {_first_line(error)}; it must have one JSON object a line") from error
    return rows


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
            rest["label"] = str(rest["label"])  # a class; a number would be taken for the id of the caption
        caption = {"caption": row.get(names["caption"], "")} if names["caption"] else {}  # else a list, "captions"
        records.append({**rest, "key": key.strip(), **caption})
    return records


# -- TFDS -------------------------------------------------------------------------------------------------------------


class TfdsSource(_Base):
    """A TFDS data set in ArrayRecord format, read without TensorFlow.

    The caption is the feature "caption", "text", "title" or "captions", else the name of the class "label" with spaces
    for underscores; the class number is the field "class_id" (a record's "label" would be a caption id).

    Args:
      data: random-access TFDS data source with the image left encoded.
      class_names: of the feature "label", or ().
      name: for messages and keys.
    """

    def __init__(self, data: Sequence[Record], class_names: Sequence[str], name: str):
        self.name = name
        self._data, self.class_names = data, tuple(class_names)
        if not len(data):
            raise UserError(f"data source {name} has no records")

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        try:
            row = self._data[index]
        except Exception as error:  # a damaged chunk; the reader's exceptions have no common type
            raise BadRecord(f"{self.name}[{index}]", f"unreadable ({_first_line(error)})") from error
        return self._record(index, row)

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        try:
            rows = self._data.__getitems__(indices)
        except Exception:  # no such method, or one damaged chunk fails the whole read: find it
            return super().__getitems__(indices)
        return [self._record(i, row) for i, row in zip(indices, rows, strict=True)]

    def _record(self, index: int, row: Record) -> Record:
        record = {name: _as_text(value) for name, value in row.items()}
        record["key"] = f"{self.name}[{index}]"
        if isinstance(record.get("label"), (int, np.integer)):
            record["class_id"] = int(record.pop("label"))
        names = [*CAPTION_COLUMNS, "captions"]
        texts = [value for name in names if isinstance(value := record.get(name), (str, list)) and value]
        if texts:
            record["caption"] = texts[0]
        elif 0 <= record.get("class_id", -1) < len(self.class_names):  # -1: without a class
            record["caption"] = self.class_names[record["class_id"]].replace("_", " ")
        return record


def _open_tfds(spec: str) -> TfdsSource:
    # The name may have a version ('mnist:3.0.1'), the split a slice ('train[:10%]').
    match = re.fullmatch(r"tfds:(.+):([^:\[\]]+(?:\[[^\]]*\])?(?:\+.+)?)", spec)
    if not match:
        raise UserError(f"data source {spec!r}: write tfds:NAME:SPLIT, for example tfds:cifar10:train")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"data source {spec} needs TFDS: pip install tensorflow-datasets") from error
    name, split = match.groups()
    try:
        builder = tfds.builder(name)
        features = builder.info.features
        if "image" not in features:
            raise UserError(f"it has no feature 'image', only: {', '.join(features)}")
        data = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    except UserError as error:
        raise UserError(f"data source {spec}: {error}") from error
    except Exception as error:  # TFDS has a type of its own for each mistake
        raise UserError(
            f"data source {spec}: {_first_line(error)}; prepare it with: tfds build {name} --file_format=array_record"
        ) from error
    names = getattr(features["label"], "names", None) if "label" in features else None
    return TfdsSource(data, names or (), spec)


def _as_text(value: Any) -> Any:
    """TFDS gives texts as bytes, arrays of bytes, or {"text": such an array}; everything else is left as it is."""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value  # an encoded image


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]
