"""Buckets: the rows of a data set by the size of picture that their batches have."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from florence_jax.data.records import Source
from florence_jax.errors import UserError


class Bucket(NamedTuple):
    """Rows whose batches have one size of picture; the ops see it as {height} and {width}.

    Attributes:
      rows: int64 (N,), numbers of records, counted through all sources in order.
      size: (height, width) in pixels.
    """

    rows: np.ndarray
    size: tuple[int, int]


def make_buckets(sources: Sequence[Source], sizes: Sequence[tuple[int, int]]) -> tuple[Bucket, ...]:
    """Each record goes to the size whose aspect ratio is nearest to its own; of equally near ones, nearest in area.

    This reads "width" and "height" (of the upright picture) of every record's metadata, so that its cost grows with the
    data; nothing else at the start of a run does. A source that knows them without its records has a method `shapes`,
    float32 (N, 2), height and width. A size that no record is nearest to gives no bucket, and is logged.

    Args:
      sources: as in `TrainData`; records are numbered through all of them.
      sizes: (height, width) of each bucket, in pixels.

    Raises:
      UserError: for no or equal sizes, sizes below 1, a record that cannot be read or lacks its width or height.
    """
    if not sizes or len(set(sizes)) < len(sizes) or min(min(size) for size in sizes) < 1:
        raise UserError(f"buckets need different sizes (height, width) of at least 1 pixel, not {list(sizes)}")
    shapes = np.concatenate([shapes_of(source) for source in sources])
    chosen = np.empty(len(shapes), np.int64)
    for start in range(0, len(shapes), METADATA_ROWS):
        chosen[start : start + METADATA_ROWS] = nearest_sizes(shapes[start : start + METADATA_ROWS], sizes)
    buckets = [Bucket(np.flatnonzero(chosen == k), (height, width)) for k, (height, width) in enumerate(sizes)]
    for bucket in buckets:
        logging.info("bucket of %d x %d pixels (height x width): %d records", *bucket.size, len(bucket.rows))
    return tuple(bucket for bucket in buckets if len(bucket.rows))


METADATA_ROWS = 1 << 20  # records compared with all sizes at once
SAME_SIZE = 1e-6  # difference of logarithms of aspect ratios that are one


def nearest_sizes(shapes: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """int64 (N,): the size nearest to each of `shapes` (N, 2), height and width; see `make_buckets`."""
    logs, targets = np.log(shapes.astype(np.float64)), np.log(np.asarray(sizes, np.float64))
    aspect = np.abs((logs[:, 1] - logs[:, 0])[:, None] - (targets[:, 1] - targets[:, 0])[None])
    area = np.abs(logs.sum(1)[:, None] - targets.sum(1)[None])
    return np.where(aspect <= aspect.min(1, keepdims=True) + SAME_SIZE, area, np.inf).argmin(1)


def shapes_of(source: Source) -> np.ndarray:
    """float32 (N, 2): height and width of all records, 0 where they have none."""
    if hasattr(source, "shapes"):
        return source.shapes()
    pairs = ((row.get(name) or 0) for row in source.metadata() for name in ("height", "width"))
    shapes = np.fromiter(pairs, np.float32).reshape(-1, 2)
    if len(shapes) != len(source):
        raise UserError(f"{source.name}: {len(source) - len(shapes)} of {len(source)} records cannot be read")
    if (wrong := np.flatnonzero((shapes < 1).any(1))).size:
        raise UserError(
            f"{source.name}: {len(wrong)} records have no 'width' and 'height', the first is record {wrong[0]}; "
            "buckets need both, in pixels of the upright picture: write them into the records, or use one size"
        )
    return shapes
