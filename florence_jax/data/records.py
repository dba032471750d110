"""What a record and a source of records are; sources over things that a caller has at hand."""

import contextlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from florence_jax.errors import UserError
from florence_jax.files import join, write_bytes
from florence_jax.pictures import thumbnail


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


Record = dict[str, Any]
DATA_FILE = "data.json"  # what sources found, in the folder of a run
# The fields that a record's size is in: encoded picture(s), or a video as bytes or path. `Source.metadata` is without.
PAYLOADS = ("image", "images", "video")


def without_payloads(record: Record) -> Record:
    """The record's other fields."""
    return {name: value for name, value in record.items() if name not in PAYLOADS}


class Source(Protocol):
    """Random access to records. Instances can be pickled (into worker processes).

    Fields of a record, all but the key optional:
      key: str, unique in the source.
      image: encoded bytes, a PIL picture or uint8 (H, W[, 3]). images: list of those. video: bytes or path, or
        uint8 (T, H, W, 3).
      caption: str; captions: list of str; other texts by any name, str or list of str.
      class_id: int; labels: list of class numbers or names. width, height: of the upright picture, in pixels.
      boxes: list of [x1, y1, x2, y2], pixels of the upright picture; class_ids, iscrowd, is_group_of, scores: of them.
      question, question_id, answer_type: str; answers: list of str. clip: (start, stop) in seconds.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record at 0 <= index < len. Raises BadRecord if it cannot be read."""

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        """Many records at once; an unreadable one comes as the BadRecord in its place."""

    def metadata(self) -> Iterator[Record]:
        """All readable records in order, without PAYLOADS, which are not read where they lie apart."""


def summary_of(source: Source) -> Mapping[str, Any]:
    """What a source says it found when it was opened ("says" is the sentence for people); {} if it says nothing."""
    return getattr(source, "summary", {})


def sample_of(source: Source, count: int) -> list[Record]:
    """Up to `count` readable records without PAYLOADS, spread over the source: the cost does not grow with its size.

    A source that can do that without reading its pictures has a method `sample` of its own.
    """
    if hasattr(source, "sample"):
        return source.sample(count)
    found = source.__getitems__(evenly(len(source), count).tolist())
    return [without_payloads(record) for record in found if not isinstance(record, BadRecord)]


def described(source: Source, index: int) -> Record:
    """One record without PAYLOADS. Raises BadRecord where it cannot be read.

    A source that can give it without reading its pictures has a method `described` of its own.
    """
    if hasattr(source, "described"):
        return source.described(index)
    return without_payloads(source[index])


def evenly(total: int, count: int) -> np.ndarray:
    """int64: up to `count` different numbers below `total`, ascending, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))


def scattered(total: int, count: int) -> np.ndarray:
    """int64: up to `count` different numbers below `total`, ascending, drawn at random, always the same ones.

    Unlike those of `evenly` they cannot fall in step with what repeats itself, such as the questions of each picture.
    """
    return np.sort(np.random.default_rng(0).choice(total, min(count, total), replace=False))


def write_data(summaries: Iterable[Mapping[str, Any]], folder: str | os.PathLike) -> None:
    """Prints what was found, a sentence each, and writes it to data.json in a folder; empty summaries are left out."""
    found = {summary["says"]: summary for summary in summaries if summary}
    for says in filter(None, found):
        print(says, flush=True)
    if found:
        content = json.dumps(list(found.values()), indent=1, default=str) + "\n"
        write_bytes(join(os.fspath(folder), DATA_FILE), content.encode("utf-8", "replace"))


class Subset:
    """Some records of a source, in the given order; a `Source`.

    Args:
      source: random access. rows: of the source. name: for messages.

    Attributes:
      whole: that source. rows: int64, of it.
    """

    def __init__(self, source: Source, rows: np.ndarray, name: str):
        self.name = name
        self.whole, self.rows = source, np.asarray(rows, np.int64)
        self.class_names: Sequence[str] = tuple(getattr(source, "class_names", ()))
        self.category_ids: Sequence[Any] = tuple(getattr(source, "category_ids", ()))
        self.class_sets: np.ndarray | None = getattr(source, "class_sets", None)
        self.partly_boxed: bool = getattr(source, "partly_boxed", False)
        self.attribute_names: Sequence[str] = tuple(getattr(source, "attribute_names", ()))
        self.frequencies: Sequence[str] = tuple(getattr(source, "frequencies", ()))
        self.summary = summary_of(source)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        return self.whole[int(self.rows[index])]

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        return self.whole.__getitems__([int(self.rows[i]) for i in indices])

    def metadata(self) -> Iterator[Record]:
        """Of the chosen records, in their order. Raises UserError if the source has unreadable ones."""
        wanted, found, count = set(self.rows.tolist()), {}, 0
        for i, record in enumerate(self.whole.metadata()):
            count += 1
            if i in wanted:
                found[i] = record
        if count != len(self.whole):
            raise UserError(f"{self.name}: {len(self.whole) - count} of {len(self.whole)} records cannot be read")
        return (found[i] for i in self.rows.tolist())

    def described(self, index: int) -> Record:
        """See `records.described`."""
        return described(self.whole, int(self.rows[index]))

    def sample(self, count: int) -> list[Record]:
        """See `sample_of`."""
        found = []
        for index in scattered(len(self), count).tolist():
            with contextlib.suppress(BadRecord):
                found.append(self.described(index))
        return found


class WithCopy:
    """A source whose records also have a copy of some of their fields, which no op changes; a `Source`.

    Args:
      source: of the records. field: where the copy is. names: of the fields; those that a record lacks are left out.
    """

    def __init__(self, source: Source, field: str, names: Sequence[str]):
        self.name, self._source, self._field, self._names = source.name, source, field, tuple(names)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return self._with_copy(self._source[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        found = self._source.__getitems__(indices)
        return [record if isinstance(record, BadRecord) else self._with_copy(record) for record in found]

    def metadata(self) -> Iterator[Record]:
        """All readable records in order, without PAYLOADS."""
        return map(self._with_copy, self._source.metadata())

    def _with_copy(self, record: Record) -> Record:
        return record | {self._field: {name: record[name] for name in self._names if name in record}}


class ArraySource:
    """Images in memory.

    Args:
      name: for messages and keys.
      images: uint8 (N, H, W) or (N, H, W, 3). captions: one for each.
    """

    def __init__(self, name: str, images: np.ndarray, captions: Sequence[str]):
        self.name, self._images, self._captions = name, images, list(captions)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return {"key": f"{self.name}[{index}]", "image": self._images[index], "caption": self._captions[index]}

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        return [self[i] for i in indices]

    def metadata(self) -> Iterator[Record]:
        """All records in order, without "image"."""
        return ({"key": f"{self.name}[{i}]", "caption": caption} for i, caption in enumerate(self._captions))


METADATA_CHUNK = 256


class BaseSource(ABC):
    """What sources share; a subclass gives `name`, `__len__` and `__getitem__`."""

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        return [self._get(i) for i in indices]

    def _get(self, index: int) -> Record | BadRecord:
        try:
            return self[index]
        except BadRecord as bad:
            return bad

    def metadata(self) -> Iterator[Record]:
        """All readable records in order, without PAYLOADS; each is read to see whether it can be."""
        for start in range(0, len(self), METADATA_CHUNK):
            for record in self.__getitems__(range(start, min(start + METADATA_CHUNK, len(self)))):
                if not isinstance(record, BadRecord):
                    yield without_payloads(record)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self)} records)"


class RowSource(BaseSource):
    """A source over rows that a reader gives, one or many at once; a subclass makes a record of each.

    Args:
      name: for messages, and the prefix of keys.
      rows: random access: `len`, `[index]`, and perhaps `__getitems__(indices)`, which is faster.

    Raises:
      UserError: if there are no rows.
    """

    def __init__(self, name: str, rows: Any):
        self.name, self._rows = name, rows
        if not len(rows):
            raise UserError(f"data source {name} has no records")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        try:
            row = self._rows[index]
        except Exception as error:  # a damaged chunk; the readers' exceptions have no common type
            raise BadRecord(f"{self.name}[{index}]", f"unreadable ({first_line(error)})") from error
        return self._record(index, row)

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        try:
            rows = self._rows.__getitems__(indices)
        except Exception:  # no such method, or one damaged chunk fails the whole read: find it
            return super().__getitems__(indices)
        return [self._record_or_bad(i, row) for i, row in zip(indices, rows, strict=True)]

    @abstractmethod
    def _record(self, index: int, row: Any) -> Record:
        """The record of a row. Raises BadRecord."""

    def _record_or_bad(self, index: int, row: Any) -> Record | BadRecord:
        try:
            return self._record(index, row)
        except BadRecord as bad:
            return bad


class ListSource(BaseSource):
    """Pictures, or videos, that a caller has at hand, without captions.

    Args:
      name: for messages.
      images: paths, PIL pictures or uint8 arrays, see op 'decode'; as "video" what `videos.open_video` takes. The key
        of a path is the path, of others the number.
      field: of the records that they are in; of pictures files are read here.
    """

    def __init__(self, name: str, images: Sequence[Any], field: str = "image"):
        self.name, self._images, self._field = name, images, field

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        image = self._images[index]
        if isinstance(image, (str, os.PathLike)):
            image = picture_bytes(os.fspath(image)) if self._field == "image" else os.fspath(image)
        return {"key": self._key(index), self._field: image}

    def metadata(self) -> Iterator[Record]:
        """The keys of all pictures; no file is touched."""
        return ({"key": self._key(i)} for i in range(len(self)))

    def _key(self, index: int) -> str:
        image = self._images[index]
        return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"number {index}"


def picture_bytes(path: str, key: str = "") -> bytes:
    """The bytes of a file. Raises BadRecord, by `key` or the path, if it cannot be read."""
    try:
        return epath.Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise BadRecord(key or path, f"cannot read the file: {getattr(error, 'strerror', '') or error}") from error


def record_thumbnail(source: Source, index: int) -> str:
    """Data URI of a record's picture, see `pictures.thumbnail`; '' for one that cannot be read."""
    try:
        return thumbnail(source[index]["image"])
    except BadRecord:
        return ""


def first_line(error: Exception) -> str:
    """The first line of what an exception says, at most 300 characters."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]
