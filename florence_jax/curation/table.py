"""The table of scores: its columns, dividing it into blocks, and parquet files that appear complete or not at all.

One row is one raw pair. Everything decided later is decided from these columns; images are not opened again.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from florence_jax.errors import UserError

PROBE = pa.struct([("kind", pa.string()), ("h64", pa.uint64()), ("h256", pa.binary())])
# One raw pair; `image_id`, `text_id` and `uid` are 32 hexadecimal digits.
SCORES = pa.schema(
    [
        ("uid", pa.string()),
        ("source", pa.string()),
        ("key", pa.string()),
        ("url", pa.string()),
        ("licence", pa.string()),
        ("headers", pa.list_(pa.string())),
        ("extra", pa.string()),  # JSON object of further fields
        ("path", pa.string()),  # where the bytes are: of a file, or 'copy:' and the name of a file in the workdir
        ("offset", pa.int64()),
        ("size", pa.int64()),
        # hashing.measure
        ("status", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
        ("format", pa.string()),
        ("mode", pa.string()),
        ("orientation", pa.int8()),
        ("has_alpha", pa.bool_()),
        ("image_id", pa.string()),
        ("h64", pa.uint64()),
        ("h256", pa.binary()),
        ("detail", pa.float32()),
        ("aspect", pa.float32()),
        ("probes", pa.list_(PROBE)),
        # filters.text_scores
        ("caption", pa.string()),  # as found
        ("text", pa.string()),  # normalised
        ("text_id", pa.string()),
        ("characters", pa.int32()),
        ("words", pa.int32()),
        ("language", pa.string()),
        ("language_probability", pa.float32()),
        ("repetition", pa.float32()),
        ("run", pa.int32()),
        ("url_share", pa.float32()),
        ("letter_share", pa.float32()),
        ("garbled", pa.int32()),
        ("file_name", pa.bool_()),
        ("markup", pa.bool_()),
        ("boilerplate", pa.string()),
        # safety.safety_scores, safety.HashList
        ("mails", pa.int32()),
        ("phones", pa.int32()),
        ("cards", pa.int32()),
        ("licence_id", pa.string()),
        ("host", pa.string()),
        ("listed", pa.int32()),  # distance to a listed hash; null where there is no match
        ("listed_limit", pa.int32()),
    ]
)
# Why a pair is where it is; every uid has one.
DECISIONS = pa.schema(
    [(name, pa.string()) for name in ("uid", "source", "stage", "reason", "value", "threshold", "config")]
)


def uid_of(source: str, key: str) -> str:
    """128-bit BLAKE2b of (source name, key), 32 hexadecimal digits: the identity of a raw pair."""
    data = source.encode("utf-8", "surrogatepass") + b"\0" + key.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def prefixes(identifiers: pa.ChunkedArray) -> np.ndarray:
    """uint32 (N,): the first 32 bits of hexadecimal identifiers, for dividing rows among partitions in sorted order."""
    return np.array([int(text[:8], 16) for text in identifiers.to_pylist()], np.uint32)


def partitions(identifiers: pa.ChunkedArray, count: int) -> np.ndarray:
    """int64 (N,): partition in [0, count) of each identifier; ranges of equal width, so partitions are in order."""
    return (prefixes(identifiers).astype(np.uint64) * np.uint64(count) >> np.uint64(32)).astype(np.int64)


def split_by(table: pa.Table, numbers: np.ndarray) -> Iterable[tuple[int, pa.Table]]:
    """(number, rows with it) for each distinct number, in increasing order."""
    order = np.argsort(numbers, kind="stable")
    values, starts = np.unique(numbers[order], return_index=True)
    for value, rows in zip(values.tolist(), np.split(order, starts[1:]), strict=True):
        yield value, table.take(rows)


def concatenate(tables: Iterable[pa.Table], sort_by: str = "uid") -> pa.Table:
    """All rows, sorted by a column: the same result for any order of `tables`. Needs at least one table."""
    table = pa.concat_tables(tables, promote_options="default")
    return table.sort_by(sort_by).combine_chunks()


def with_column(table: pa.Table, name: str, values: Any, kind: pa.DataType | None = None) -> pa.Table:
    """`table` with a column added or replaced."""
    array = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, kind)
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, array)
    return table.append_column(name, array)


def json_digest(value: Any) -> str:
    """32 hexadecimal digits that stand for a JSON-like value."""
    data = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()[:32]


# -- files ------------------------------------------------------------------------------------------------------------


def join(folder: str, *names: str) -> str:
    """Path of a file in a local folder or under a URL."""
    return "/".join([folder.rstrip("/"), *names])


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
      UserError: if fsspec does not know the protocol, or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {path}: {error} (s3fs for s3://, gcsfs for gs://)") from error


def exists(path: str) -> bool:
    """Whether a file is there."""
    fs, inner = filesystem(path)
    return fs.exists(inner)


def read_bytes(path: str, offset: int = 0, size: int = -1) -> bytes:
    """A whole file, or `size` bytes of it from `offset` on. Raises OSError."""
    fs, inner = filesystem(path)
    if size < 0 and not offset:
        return fs.cat_file(inner)
    return fs.cat_file(inner, start=offset, end=None if size < 0 else offset + size)


def write_file(path: str, write: Callable[[str], None]) -> tuple[int, str]:
    """Lets `write` fill a temporary local file, then gives it its name in one step.

    On a local disk the temporary file lies beside the result and is renamed; elsewhere it is uploaded whole.

    Returns:
      Size in bytes and sha256 (hexadecimal) of the file.
    """
    fs, inner = filesystem(path)
    local = isinstance(fs, fsspec.implementations.local.LocalFileSystem)
    folder = os.path.dirname(inner) if local else tempfile.mkdtemp()
    try:
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{os.path.basename(inner)}.{uuid.uuid4().hex}.tmp")
        try:
            write(temporary)
            with open(temporary, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
                os.fsync(file.fileno())
            if local:
                os.replace(temporary, inner)
            else:
                fs.makedirs(os.path.dirname(inner), exist_ok=True)
                fs.put_file(temporary, inner)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
    finally:
        if not local:
            shutil.rmtree(folder, ignore_errors=True)
    return size, digest


def write_bytes(path: str, data: bytes) -> tuple[int, str]:
    """Writes a file in one step; returns its size and sha256."""

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(data)

    return write_file(path, write)


def write_json(path: str, value: Any) -> tuple[int, str]:
    """Writes indented JSON in one step; returns size and sha256."""
    return write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path: str) -> Any | None:
    """The content of a JSON file; None if it is not there."""
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError:
        return None


def write_table(path: str, table: pa.Table) -> tuple[int, str]:
    """Writes a parquet file (zstd) in one step; equal tables give equal bytes. Returns size and sha256."""
    return write_file(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A parquet file, or some columns of it."""
    return pq.read_table(io.BytesIO(read_bytes(path)), columns=None if columns is None else list(columns))


def list_files(folder: str, suffix: str) -> list[str]:
    """Names of the finished files of a folder with that suffix, sorted; [] if there is no folder."""
    fs, inner = filesystem(folder)
    if not fs.exists(inner):
        return []
    names = (os.path.basename(path) for path in fs.ls(inner, detail=False))
    return sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))
