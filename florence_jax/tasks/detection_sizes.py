"""The sizes of a detector's batches: buckets by aspect ratio, and those of each scale of multi-scale training."""

import math
from collections.abc import Sequence

from florence_jax.errors import UserError

BucketSize = tuple[int, int]
LONG = 1.5  # longer over shorter side of the buckets that are not square, where nobody names any


def bucket_sizes(given: Sequence[Sequence[int]], short: int, multiple: int) -> list[BucketSize]:
    """(height, width) of the buckets: those that are given, else a square one of side `short` and two longer ones.

    Raises:
      UserError: for sides that are no multiples of `multiple`.
    """
    sizes = [(int(height), int(width)) for height, width in given]
    if not sizes:
        short = _on_grid(short, multiple)
        long = _on_grid(LONG * short, multiple)
        return [(short, short), (short, long), (long, short)]
    for size in sizes:
        if min(size) < 1 or any(side % multiple for side in size):
            nearest = tuple(_on_grid(side, multiple) for side in size)
            raise UserError(
                f"config.detector.sizes: {size} must be multiples of {multiple} pixels, as the coarsest level wants "
                f"it: {nearest}"
            )
    return sizes


def scaled_sizes(sizes: Sequence[BucketSize], scales: Sequence[float], multiple: int) -> list[list[BucketSize]]:
    """The buckets of each scale of multi-scale training, the largest first; none is there twice.

    Raises:
      UserError: for no scale, or one that is not above 0.
    """
    if not scales or min(scales) <= 0:
        raise UserError(f"config.detector.scales={tuple(scales)} must be shares, above 0, of the buckets' sizes")
    seen: set[BucketSize] = set()
    groups = []
    for scale in sorted(scales, reverse=True):
        group = {(_on_grid(height * scale, multiple), _on_grid(width * scale, multiple)) for height, width in sizes}
        groups.append(sorted(group - seen))
        seen |= group
    return [group for group in groups if group]


def _on_grid(side: float, multiple: int) -> int:
    return max(-(-math.ceil(side) // multiple), 1) * multiple
