"""The pictures of a folder or of a parquet file, measured by several processes.

What the processes run stands here and not beside the command: a started process does not load a package's `__main__`.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from florence_jax.curation.ingest.hashing import DEFAULT_LIMITS, measure
from florence_jax.data.sources.picture_files import list_pictures
from florence_jax.errors import UserError

MEASURED_CHUNK = 64  # pictures a worker process gets at a time
LIMITS = dataclasses.replace(DEFAULT_LIMITS, animated=True)  # an animation is a picture like others here
Item = tuple[str, int, "bytes | Path"]  # key, stamp, where the picture is


def items_of(path: Path) -> Iterator[Item]:
    """The pictures of a folder or parquet file, in order. Raises UserError for a parquet file without pictures."""
    if path.is_dir():
        for file in (path / name for name in list_pictures(path).pictures):
            status = file.stat()
            yield str(file), status.st_mtime_ns ^ status.st_size, file
        return
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError("reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        table = pq.ParquetFile(path)
    except Exception as error:  # pyarrow's errors have no common base that users could be shown
        raise UserError(f"{path}: neither a folder nor a parquet file ({error})") from error
    names = set(table.schema_arrow.names)
    if not names & {"image", "path"}:
        raise UserError(f"{path}: needs a column 'image' or 'path'; it has {', '.join(sorted(names))}")
    column, count = "image" if "image" in names else "path", 0
    for batch in table.iter_batches(MEASURED_CHUNK, columns=sorted(names & {"image", "path", "key"})):
        for row in batch.to_pylist():
            image = row[column]
            image = image.get("bytes", image) if isinstance(image, dict) else image
            if not isinstance(image, (bytes, str, type(None))):
                kind = table.schema_arrow.field(column).type
                raise UserError(f"{path}: column {column!r} holds {kind}, not bytes, a struct with 'bytes', or paths")
            key = str(row["key"]) if row.get("key") is not None else f"{path}#{count}"
            yield key, 0, path.parent / image if isinstance(image, str) else image or b""
            count += 1


def measure_new(
    items: Iterable[Item], known: dict[str, dict[str, Any]], workers: int
) -> tuple[dict[str, dict[str, Any]], int]:
    """(key -> measurements of known and new pictures, how many were read). Raises UserError on a repeated key."""
    pictures, waiting, seen, read = dict(known), [], set(), 0
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else None

    def flush() -> None:
        results = pool.map(measure_item, waiting, chunksize=MEASURED_CHUNK // 4) if pool else map(measure_item, waiting)
        pictures.update(zip((key for key, _, _ in waiting), results, strict=True))
        waiting.clear()

    try:
        for key, stamp, where in items:
            if key in seen:
                raise UserError(f"key {key!r} occurs twice; keys must be unique")
            seen.add(key)
            if key in known and known[key]["stamp"] == stamp:
                continue
            waiting.append((key, stamp, where))
            read += 1
            if len(waiting) >= MEASURED_CHUNK * workers:
                flush()
        flush()
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return pictures, read


def measure_item(item: Item) -> dict[str, Any]:
    """Measures one picture; a file that cannot be read has the status 'unreadable'."""
    _, stamp, where = item
    try:
        data = where.read_bytes() if isinstance(where, Path) else where
    except OSError:
        return {**measure(b"", LIMITS), "status": "unreadable", "stamp": stamp}
    return {**measure(data, LIMITS), "stamp": stamp}
