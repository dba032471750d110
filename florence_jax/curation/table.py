"""The table of scores: its columns, dividing it into blocks, and parquet files that appear complete or not at all.

One row is one raw pair. Everything decided later is decided from these columns; images are not opened again.
"""

import hashlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from florence_jax.files import read_bytes, write_file

PROBE = pa.struct([("kind", pa.string()), ("h64", pa.uint64()), ("h256", pa.binary())])
# What decisions about one caption read.
OF_CAPTION = [
    ("caption", pa.string()),  # as found
    ("text", pa.string()),  # normalised
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
    ("mails", pa.int32()),
    ("phones", pa.int32()),
    ("cards", pa.int32()),
]
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
        ("flatness", pa.float32()),
        ("look", pa.binary()),
        ("aspect", pa.float32()),
        ("probes", pa.list_(PROBE)),
        # filters.captions.text_scores, filters.personal.personal_scores: of the first caption, and of the others
        *OF_CAPTION,
        ("text_id", pa.string()),
        ("others", pa.list_(pa.struct(OF_CAPTION))),
        # filters.post_filter.rights_scores, filters.known_pictures.HashList
        ("licence_id", pa.string()),
        ("host", pa.string()),
        ("listed", pa.int32()),  # distance to a listed hash; null where there is no match
        ("listed_limit", pa.int32()),
    ]
)
# Why a pair is where it is; every uid has one. `refused`: the reasons of captions that it lost, where it had several.
DECISIONS = pa.schema(
    [
        *((name, pa.string()) for name in ("uid", "source", "stage", "reason", "value", "threshold")),
        ("refused", pa.list_(pa.string())),
        ("config", pa.string()),
    ]
)


def uid_of(source: str, key: str) -> str:
    """128-bit BLAKE2b of (source name, key), 32 hexadecimal digits: the identity of a raw pair."""
    data = source.encode("utf-8", "surrogatepass") + b"\0" + key.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def prefixes(identifiers: pa.ChunkedArray) -> np.ndarray:
    """uint32 (N,): the first 32 bits of hexadecimal identifiers, for dividing rows among partitions in sorted order."""
    digits = pc.binary_slice(identifiers.cast(pa.binary()), 0, 8).cast(pa.binary(8)).combine_chunks()
    codes = np.frombuffer(digits.buffers()[1] or b"", np.uint8, 8 * len(digits), 8 * digits.offset).reshape(-1, 8)
    values = np.where(codes >= ord("a"), codes - (ord("a") - 10), codes - ord("0")).astype(np.uint32)
    return np.bitwise_or.reduce(values << np.arange(28, -1, -4, dtype=np.uint32), axis=1)


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


def write_table(path: str, table: pa.Table) -> tuple[int, str]:
    """Writes a parquet file (zstd) in one step; equal tables give equal bytes. Returns size and sha256."""
    return write_file(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A parquet file, or some columns of it."""
    return pq.read_table(io.BytesIO(read_bytes(path)), columns=None if columns is None else list(columns))


def save_array(path: str, array: np.ndarray) -> None:
    """Writes an .npy file in one step."""

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            np.save(file, array)

    write_file(path, write)


def load_array(path: str) -> np.ndarray:
    """Reads what `save_array` wrote."""
    return np.load(io.BytesIO(read_bytes(path)))
