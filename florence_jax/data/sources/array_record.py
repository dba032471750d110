"""Records in ArrayRecord files, each a msgpack map; beside each file its records without the pictures.

PATH holds one record a chunk, for random access. PATH.meta holds the same records in the same order without their
payloads (`records.PAYLOADS`), many a chunk: what asks for texts or sizes of all records reads it, and no picture.
"""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from florence_jax.data.records import PAYLOADS, BadRecord, Record, RowSource, evenly, first_line, without_payloads
from florence_jax.data.sources.fields import records_summary
from florence_jax.errors import UserError
from florence_jax.files import replacing

META = ".meta"
META_GROUP = 256  # records a chunk: some 50 kB of captions, which compress well together
READ = 4 * META_GROUP  # records of a side file that are read at once
SAMPLED_FILES, SAMPLED_BLOCKS = 16, 4  # side files that a sample is of, and blocks of each
WRITE_SIDE_FILE = "python -m florence_jax.tools.write_metadata"


class ArrayRecordSource(RowSource):
    """Records in ArrayRecord files: each payload is a msgpack map.

    Args:
      paths: the files, in order.
      name: for messages; also the prefix of the keys of records without one.

    Raises:
      UserError: for an unreadable file, or if there are no records.
    """

    def __init__(self, paths: Sequence[str], name: str):
        self._paths = tuple(paths)
        try:
            records = ArrayRecordDataSource(list(paths))
        except Exception as error:  # the reader raises RuntimeError, ValueError, ... by kind of damage
            raise UserError(f"data source {name}: cannot read ArrayRecord files ({first_line(error)})") from error
        super().__init__(name, records)

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """What was found; {} for the embedded sets, which are known."""
        return {} if self.name.startswith("emoji:") else records_summary(self, len(self._paths))

    def _record(self, index: int, row: bytes) -> Record:
        try:
            record = msgpack.unpackb(row)
        except (ValueError, msgpack.UnpackException) as error:
            raise BadRecord(f"{self.name}[{index}]", f"not a msgpack map ({first_line(error)})") from error
        if not isinstance(record, dict):
            raise BadRecord(f"{self.name}[{index}]", f"not a msgpack map but {type(record).__name__}")
        record.setdefault("key", f"{self.name}[{index}]")
        return record

    def metadata(self) -> Iterator[Record]:
        """All readable records in order, without PAYLOADS, from the side files; the data files are not touched.

        Raises:
          UserError: for a file without its side file, as older ones are, or with one of another number of records.
        """
        start = 0
        for path in self._paths:
            for i, record in enumerate(_read_side_file(path), start):
                start = i + 1
                if record is not None:
                    record.setdefault("key", f"{self.name}[{i}]")
                    yield record

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`: blocks of a few side files; of the data files where one has none."""
        files = [self._paths[i] for i in evenly(len(self._paths), SAMPLED_FILES)]
        if not all(epath.Path(path + META).exists() for path in files):
            found = self.__getitems__(evenly(len(self), count).tolist())
            return [without_payloads(record) for record in found if not isinstance(record, BadRecord)]
        return [record for path in files for record in _side_blocks(path, -(-count // len(files)))][:count]


def _side_blocks(path: str, count: int) -> Iterator[Record]:
    """Up to `count` records of a side file, in blocks spread over it."""
    try:
        with closing(ArrayRecordReader(path + META)) as side:
            total = side.num_records()
            size = total if count >= total else -(-count // SAMPLED_BLOCKS)
            for start in evenly(total - size + 1, SAMPLED_BLOCKS).tolist():
                yield from filter(None, map(msgpack.unpackb, side.read(start, start + size)))
    except (RuntimeError, IndexError, msgpack.UnpackException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"cannot read {path}{META} ({first_line(error)}): {WRITE_SIDE_FILE} {path}")


def _read_side_file(path: str) -> Iterator[Record | None]:
    fix = f"{WRITE_SIDE_FILE} {path}"
    if not epath.Path(path + META).exists():
        raise UserError(f"{path} has no {path}{META}, its records without the pictures, which is needed here: {fix}")
    try:
        with closing(ArrayRecordReader(path)) as data, closing(ArrayRecordReader(path + META)) as side:
            count = side.num_records()
            if count != data.num_records():
                raise UserError(f"{path}{META} has {count} records, {path} {data.num_records()}: {fix}")
            for start in range(0, count, READ):
                yield from map(msgpack.unpackb, side.read(start, min(start + READ, count)))
    except (RuntimeError, IndexError, msgpack.UnpackException) as error:
        raise _unreadable(path, error) from error


def write_array_record(path: str, records: Iterable[Record]) -> int:
    """Writes one ArrayRecord file of msgpack maps and its side file; returns the number of records.

    The file appears under its name only when both are complete.

    Args:
      path: local.
      records: each with a str "key" and one of PAYLOADS: "image" of bytes, "images", a list of bytes, or "video", bytes
        or a path.

    Raises:
      UserError: for a record without these, for no records, or if a file cannot be written.
    """
    count = 0
    try:
        # The block's end gives the side file its name first.
        with replacing(path) as data_path, replacing(path + META) as side_path:
            with (
                closing(ArrayRecordWriter(data_path, "group_size:1")) as data,
                closing(ArrayRecordWriter(side_path, f"group_size:{META_GROUP}")) as side,
            ):
                for record in records:
                    _check_record(record, f"record {count} for {path}")
                    data.write(msgpack.packb(record, use_bin_type=True))
                    side.write(msgpack.packb(without_payloads(record), use_bin_type=True))
                    count += 1
            if not count:
                raise UserError(f"no records to write to {path}")
            epath.Path(path).unlink(missing_ok=True)  # an older file never lies beside the side file of this one
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
    return count


def _check_record(record: Record, what: str) -> None:
    if not isinstance(record.get("key"), str):
        raise UserError(f"{what} needs a str 'key'")
    kinds: dict[str, tuple[type, ...]] = {"image": (bytes,), "images": (list,), "video": (bytes, str)}
    found = [name for name in PAYLOADS if record.get(name) is not None]
    fits = all(isinstance(record[name], kinds[name]) for name in found)
    if not found or not fits or not all(isinstance(item, bytes) for item in record.get("images") or ()):
        raise UserError(f"{what} needs an 'image' of bytes, 'images', a list of bytes, or a 'video', bytes or a path")


def write_side_file(path: str) -> int:
    """Writes PATH.meta of a file that has none, reading the whole file once; returns the number of records.

    Raises:
      UserError: if the file cannot be read, or the side file cannot be written.
    """
    source = ArrayRecordSource([path], path)
    try:
        with (
            replacing(path + META) as temporary,
            closing(ArrayRecordWriter(temporary, f"group_size:{META_GROUP}")) as side,
        ):
            for start in range(0, len(source), READ):
                for record in source.__getitems__(range(start, min(start + READ, len(source)))):
                    # An unreadable record keeps its place.
                    kept = None if isinstance(record, BadRecord) else without_payloads(record)
                    side.write(msgpack.packb(kept, use_bin_type=True))
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}{META}: {first_line(error)}") from error
    return len(source)


def array_record_paths(spec: str) -> list[str]:
    """Files that `spec` (a file, glob pattern or folder) names, sorted; [] if there are none."""
    path = epath.Path(spec)
    if _is_data_file(path.name) and path.exists() and not path.is_dir():
        return [spec]
    if path.is_dir():
        found = path.glob("*")
    elif any(c in path.name for c in "*?["):
        found = path.parent.glob(path.name)
    else:
        return []
    return sorted(os.fspath(p) for p in found if _is_data_file(p.name))


def _is_data_file(name: str) -> bool:
    """Not a side file, nor one that `write_array_record` was killed in."""
    return ".array_record" in name and not name.endswith((META, ".tmp"))
