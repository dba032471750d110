"""Records in ArrayRecord files, each a msgpack map."""

import os
from collections.abc import Iterable, Sequence

import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from florence_jax.data.records import BadRecord, BaseSource, Record, first_line
from florence_jax.errors import UserError
from florence_jax.files import replacing


class ArrayRecordSource(BaseSource):
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
            raise UserError(f"data source {name}: cannot read ArrayRecord files ({first_line(error)})") from error
        if not len(self._records):
            raise UserError(f"data source {name} has no records")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            payload = self._records[index]
        except Exception as error:  # a damaged chunk; the reader's exceptions have no common type
            raise BadRecord(f"{self.name}[{index}]", f"unreadable ({first_line(error)})") from error
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
            raise BadRecord(f"{self.name}[{index}]", f"not a msgpack map ({first_line(error)})") from error
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
    count = 0
    try:
        with replacing(path) as temporary:
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
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
    return count


def array_record_paths(spec: str) -> list[str]:
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
