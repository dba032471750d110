"""All pairs of hashes within a Hamming distance, by a covering design instead of all against all.

The 64 bits are cut into m blocks. A pair at distance k or less differs in at most k blocks, so it agrees on some
r = m - k of them: with every choice of r blocks as a key, C(m, r) tables, each such pair meets in at least one bucket.
The guarantee is exact; the price is C(m, r) sorts and the comparisons inside buckets.

Everything works on columns. `block_edges` joins one (table, partition) block, which is what one task of a cluster gets;
`candidate_edges` calls it for all blocks. A pair is kept if the 256-bit hashes also agree (`max_d256`). From a block
come the components of its verified pairs as stars: at most one edge a row, the same components as all pairs would
give. (One edge from each row to its smallest verified neighbour, an obvious choice, would not: similarity is not
transitive, and of the path 1 - 3 - 4 - 2 it loses the middle.)

A bucket of more than `hot_bucket` rows is joined by a second covering design over the bits that its key leaves free,
which loses nothing; should a bucket of that still be hot, for instance because the hashes are equal, each row is
compared with its `window` successors in the order of the hashes only, and the rows are counted in `capped_rows`.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from florence_jax.curation.dedup.components import star_edges
from florence_jax.curation.ingest.hashing import bit_distance
from florence_jax.errors import UserError

DESIGNS = {2: (3, 1), 4: (6, 2), 6: (9, 3)}  # distance: (blocks, blocks in a key); a key has at most 31 bits
SMALL_BUCKET = 48  # rows; smaller ones are joined together, larger ones one by one
TILE = (128, 1024)  # hashes compared at once: a megabyte of differing bits
STAR_PAIRS = 1 << 20  # verified pairs held before they are reduced to stars


@dataclasses.dataclass(frozen=True)
class HashRows:
    """Hashes to be joined; several rows may belong to one image.

    Attributes:
      rid: int64 (n,), the image. h64: uint64 (n,). h256: uint64 (n, 4).
      probe: bool (n,); a probe is compared with rows that are none, never with another probe.
    """

    rid: np.ndarray
    h64: np.ndarray
    h256: np.ndarray
    probe: np.ndarray

    def __len__(self) -> int:
        return len(self.rid)

    def take(self, index: np.ndarray) -> "HashRows":
        """The rows at these positions, or under this mask."""
        return HashRows(self.rid[index], self.h64[index], self.h256[index], self.probe[index])

    @classmethod
    def concatenate(cls, parts: list["HashRows"]) -> "HashRows":
        """All rows of `parts`, in order."""
        if not parts:
            return cls(np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros((0, 4), np.uint64), np.zeros(0, bool))
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclasses.dataclass(frozen=True)
class Join:
    """What counts as a pair, and how hard to look.

    Attributes:
      k: largest distance of h64: 2, 4 or 6. max_d256: of h256. hot_bucket: rows. window: see the module's docstring.
    """

    k: int = 4
    max_d256: int = 44
    hot_bucket: int = 50_000
    window: int = 256


DEFAULT_JOIN = Join()


def covering_tables(k: int, bits: int = (1 << 64) - 1) -> np.ndarray:
    """Key masks of the covering design for distance `k`: uint64 (tables,); 15 for k = 4, 84 for k = 6.

    Args:
      k: largest distance that must be found. bits: the bits that may differ (default: all 64).

    Raises:
      UserError: no design is known for `k`.
    """
    if k not in DESIGNS:
        raise UserError(f"distance {k}: choose one of {sorted(DESIGNS)} (distances of these hashes are even)")
    blocks, chosen = DESIGNS[k]
    positions = [bit for bit in range(64) if bits >> bit & 1]
    masks = [sum(1 << int(bit) for bit in part) for part in np.array_split(positions, blocks)]
    return np.array([sum(choice) for choice in itertools.combinations(masks, chosen)], np.uint64)


def compact(h64: np.ndarray, mask: int) -> np.ndarray:
    """The bits of uint64 (n,) under `mask`, moved together at the low end."""
    mask, position = int(mask), 0
    key = np.zeros_like(h64)
    while mask:
        start = (mask & -mask).bit_length() - 1
        length = ((mask >> start) + 1 & -((mask >> start) + 1)).bit_length() - 1  # of the lowest run of ones
        run = (1 << length) - 1
        key |= (h64 >> np.uint64(start) & np.uint64(run)) << np.uint64(position)
        position += length
        mask &= ~(run << start)
    return key


def partition_of(h64: np.ndarray, mask: int, partitions: int) -> np.ndarray:
    """Which of `partitions` blocks of a table each hash belongs to: int64 (n,). Equal keys share a partition."""
    spread = compact(h64, mask) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: neighbours part
    return ((spread >> np.uint64(32)) % np.uint64(partitions)).astype(np.int64)


def candidate_edges(
    rows: HashRows, join: Join = DEFAULT_JOIN, partitions: int = 1
) -> tuple[np.ndarray, Mapping[str, int]]:
    """Star edges of the verified pairs of all rows.

    Args:
      rows: what to join. join: the distances. partitions: blocks that a table is joined in, to bound the memory.

    Returns:
      (sorted int64 (e, 2) of (smallest rid, rid), counts as `block_edges` returns them). The edges do not depend on
      `partitions` or on the order of the rows.
    """
    edges, counts = [], Counter()
    for mask in covering_tables(join.k):
        block = partition_of(rows.h64, mask, partitions) if partitions > 1 else None
        for partition in range(partitions):
            part = rows if block is None else rows.take(block == partition)
            found, count = block_edges(part, mask, join)
            edges.append(found)
            counts = merge_counts(counts, count)
    return star_edges(np.concatenate(edges)), counts


def block_edges(rows: HashRows, mask: int, join: Join = DEFAULT_JOIN) -> tuple[np.ndarray, Mapping[str, int]]:
    """Joins one block: all the rows of a table, or of one partition of it.

    Args:
      rows: the block. mask: the table, one of `covering_tables(join.k)`. join: the distances.

    Returns:
      (star edges as of `candidate_edges`, for this block; counts: `rows`, `comparisons`, `candidates` (within k, of
      different images), `verified`, `largest_bucket`, `rekeyed_rows` (in hot buckets), `capped_rows`).
    """
    counts: Counter = Counter(rows=len(rows))
    edges, pending = [], 0
    for left, right in _bucket_pairs(rows, np.arange(len(rows)), int(mask), join, counts, first=True):
        differ = rows.rid[left] != rows.rid[right]
        left, right = left[differ], right[differ]
        near = bit_distance(rows.h256[left], rows.h256[right]) <= join.max_d256
        counts["candidates"] += len(left)
        counts["verified"] += int(near.sum())
        edges.append(np.stack([rows.rid[left[near]], rows.rid[right[near]]], axis=1))
        pending += len(edges[-1])
        if pending > STAR_PAIRS:
            edges, pending = [star_edges(np.concatenate(edges))], 0
    return star_edges(np.concatenate(edges) if edges else np.zeros((0, 2))), counts


def merge_counts(a: Mapping[str, int], b: Mapping[str, int]) -> Counter:
    """Counts of two blocks together: sums, and the maximum of `largest_bucket`."""
    total = Counter(a)
    total.update(b)
    total["largest_bucket"] = max(a.get("largest_bucket", 0), b.get("largest_bucket", 0))
    return total


Pairs = Iterator[tuple[np.ndarray, np.ndarray]]


def _bucket_pairs(rows: HashRows, index: np.ndarray, mask: int, join: Join, counts: Counter, first: bool) -> Pairs:
    """Positions (left, right) in `rows` of pairs within k among those at `index` that share the bits under `mask`."""
    order, starts, sizes = _buckets(compact(rows.h64[index], mask), rows.probe[index])
    counts["largest_bucket"] = max(counts["largest_bucket"], int(sizes.max(initial=0)))
    index = index[order]
    h64, probe = rows.h64[index], rows.probe[index]
    yield from _located(_small_pairs(h64, probe, starts, sizes, join.k, counts), index)
    for bucket in np.flatnonzero((sizes > SMALL_BUCKET) & (sizes <= join.hot_bucket)):
        start, end = starts[bucket], starts[bucket] + sizes[bucket]
        inside = _tile_pairs(h64[start:end], int(end - start - probe[start:end].sum()), join.k, counts)
        yield from _located(inside, index[start:end])
    for bucket in np.flatnonzero(sizes > join.hot_bucket):
        members = index[starts[bucket] : starts[bucket] + sizes[bucket]]
        if first:
            counts["rekeyed_rows"] += len(members)
            for submask in covering_tables(join.k, ~mask & (1 << 64) - 1):
                yield from _bucket_pairs(rows, members, int(submask), join, counts, first=False)
        else:
            counts["capped_rows"] += len(members)
            members = members[np.argsort(rows.h64[members], kind="stable")]
            yield from _located(_window_pairs(rows.h64[members], rows.probe[members], join, counts), members)


def _located(pairs: Pairs, index: np.ndarray) -> Pairs:
    return ((index[left], index[right]) for left, right in pairs)


def _buckets(key: np.ndarray, probe: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(order of the rows by key, probes last; first position of each bucket; its size).

    Key (at most 31 bits), flag and position are sorted as one number: in place, and several times faster than argsort.
    """
    packed = key << np.uint64(1) | probe.astype(np.uint64)
    packed = packed << np.uint64(32) | np.arange(len(key), dtype=np.uint64)
    packed.sort()
    order = (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)
    packed >>= np.uint64(33)
    starts = np.flatnonzero(np.concatenate([[True], packed[1:] != packed[:-1]])) if len(key) else np.zeros(0, np.int64)
    return order, starts, np.diff(starts, append=len(key))


def _small_pairs(
    h64: np.ndarray, probe: np.ndarray, starts: np.ndarray, sizes: np.ndarray, k: int, counts: Counter
) -> Pairs:
    """All small buckets at once: each row with its first, second, ... successor in the bucket."""
    small = (sizes > 1) & (sizes <= SMALL_BUCKET)
    left = np.flatnonzero(np.repeat(small, sizes) & ~probe)  # probes come last: a pair of them has a probe on its left
    end = np.repeat(starts + sizes, sizes)
    for shift in range(1, SMALL_BUCKET):
        left = left[left + shift < end[left]]
        if not len(left):
            return
        counts["comparisons"] += len(left)
        near = left[np.bitwise_count(h64[left] ^ h64[left + shift]) <= k]
        yield near, near + shift


def _tile_pairs(h64: np.ndarray, heads: int, k: int, counts: Counter) -> Pairs:
    """One bucket whose first `heads` rows are not probes: those with all later rows, a tile at a time."""
    words = np.empty(TILE, np.uint64)
    bits = np.empty(TILE, np.uint8)
    for top in range(0, heads, TILE[0]):
        head = h64[top : min(top + TILE[0], heads), None]
        for first in range(top, len(h64), TILE[1]):
            tail = h64[None, first : first + TILE[1]]
            shape = (len(head), tail.shape[1])
            xor = np.bitwise_xor(head, tail, out=words.ravel()[: shape[0] * shape[1]].reshape(shape))
            distance = np.bitwise_count(xor, out=bits.ravel()[: shape[0] * shape[1]].reshape(shape))
            left, right = divmod(np.flatnonzero(distance <= k), shape[1])
            left, right = left + top, right + first
            counts["comparisons"] += shape[0] * shape[1]
            later = right > left
            if later.any():
                yield left[later], right[later]


def _window_pairs(h64: np.ndarray, probe: np.ndarray, join: Join, counts: Counter) -> Pairs:
    """A capped bucket in the order of its hashes: each row with its `window` successors."""
    for shift in range(1, min(join.window, len(h64) - 1) + 1):
        near = (np.bitwise_count(h64[:-shift] ^ h64[shift:]) <= join.k) & ~(probe[:-shift] & probe[shift:])
        counts["comparisons"] += len(near)
        left = np.flatnonzero(near)
        yield left, left + shift
