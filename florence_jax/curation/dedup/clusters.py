"""Near-duplicates: clusters of pictures, their representatives, and copies of benchmark pictures.

    python -m florence_jax.curation.dedup DIR_OR_PARQUET     # finds the duplicates of a folder; --help

The steps, each a function on columns: exact copies first (`exact_edges`), then the covering-design join of what is left
(join.py), connected components (components.py), large components split again around representatives so that a chain
of similar pictures does not become one cluster (`split_components`), and one representative each (`representatives`).

What hashes do not see: off-centre crops, rotations of 5 degrees and more, caption bars, vertical flips. They need
embeddings.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from florence_jax.curation.dedup.components import union_find
from florence_jax.curation.dedup.join import DEFAULT_JOIN, HashRows, Join, candidate_edges
from florence_jax.curation.ingest.hashing import bit_distance

MIN_DETAIL = 0.5  # grey levels; below it only equal files are duplicates: the hash of a flat picture means little
ASPECT_STEP = 1.05  # pictures of one h256 are exact copies if their shapes fall into one bucket of this ratio
FAR = 1 << 20 | 64 << 10 | 256  # the score of no pair of views
SPLIT_ABOVE = 50  # members; larger components are split around their representatives
MEASURED = ("status", "image_id", "h64", "h256", "detail", "aspect", "probes")  # columns that `measured_rows` reads
INDEXED_VIEWS = ("trimmed",)  # kinds of probes that are compared with other pictures' probes as well


def wide_hashes(hashes: Sequence[bytes]) -> np.ndarray:
    """32-byte hashes as uint64 (n, 4), as HashRows holds them."""
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 4)


def hash_rows(rids: Sequence[int], measured: Sequence[Mapping[str, Any]]) -> HashRows:
    """Rows to join of measured pictures: the whole picture, and its `probes`.

    Args:
      rids: an integer for each picture.
      measured: of `hashing.measure`, or rows of a table with its columns `h64`, `h256` and `probes`, whose items are
        (kind, h64, h256) or mappings of these names. Only pictures of status 'ok'.
    """
    rid, h64, h256, probe = [], [], [], []
    for number, item in zip(rids, measured, strict=True):
        views = [(p["kind"], p["h64"], p["h256"]) if isinstance(p, Mapping) else p for p in item["probes"]]
        for kind, short, long in [("", item["h64"], item["h256"]), *views]:
            rid.append(number)
            h64.append(short)
            h256.append(long)
            probe.append(kind != "" and kind not in INDEXED_VIEWS)
    return HashRows(np.array(rid, np.int64), np.array(h64, np.uint64), wide_hashes(h256), np.array(probe, bool))


def exact_edges(rids: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Star edges int64 (e, 2) between images whose values agree in all `columns` ((n,) or (n, words) each)."""
    if not len(rids):
        return np.zeros((0, 2), np.int64)
    codes = [np.unique(column, axis=0, return_inverse=True)[1].ravel() for column in columns]
    order = np.lexsort((rids, *codes))
    joined = np.all([np.diff(code[order]) == 0 for code in codes], axis=0)
    starts = np.flatnonzero(np.concatenate([[True], ~joined]))
    centre = np.repeat(rids[order[starts]], np.diff(starts, append=len(rids)))
    member = rids[order] != centre
    return np.stack([centre[member], rids[order][member]], axis=1)


def near_edges(
    rids: np.ndarray, measured: Sequence[Mapping[str, Any]], join: Join = DEFAULT_JOIN, min_detail: float = MIN_DETAIL
) -> tuple[np.ndarray, Mapping[str, int]]:
    """Edges between equal and similar pictures, in memory.

    Args:
      rids: int64 (n,). measured: their measurements (see `hash_rows`), also with `image_id`, `detail`, `aspect`.
      join: the distances. min_detail: pictures with less are duplicates only if their bytes are equal.

    Returns:
      (int64 (e, 2) edges, counts of the join with `exact_edges` and `low_detail` added).
    """
    if not len(rids):
        return np.zeros((0, 2), np.int64), {}
    identity = np.frombuffer(b"".join(item["image_id"] for item in measured), np.uint64).reshape(-1, 2)
    edges = [exact_edges(rids, identity)]
    keep = np.array([item["detail"] >= min_detail for item in measured])
    keep[np.isin(rids, edges[0][:, 1])] = False
    position = np.flatnonzero(keep)
    if len(position):
        shape = np.array([np.log(measured[i]["aspect"]) / np.log(ASPECT_STEP) for i in position])
        wide = wide_hashes([measured[i]["h256"] for i in position])
        edges.append(exact_edges(rids[position], wide, np.rint(shape)))
        position = position[~np.isin(rids[position], edges[1][:, 1])]
    rows = hash_rows(rids[position], [measured[i] for i in position])
    found, counts = candidate_edges(rows, join)
    counts = {
        **counts,
        "exact_edges": sum(map(len, edges)),
        "low_detail": sum(item["detail"] < min_detail for item in measured),
    }
    return np.concatenate([*edges, found]), counts


def total_order(*keys: np.ndarray) -> np.ndarray:
    """Ranks int64 (n,) by `keys`, the most significant first, small values first. Raises ValueError on a tie."""
    order = np.lexsort(keys[::-1])
    ties = np.all([key[order[1:]] == key[order[:-1]] for key in keys], axis=0)
    if ties.any():
        raise ValueError("not a total order: the last key must be unique")
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def representatives(labels: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best member of every node's cluster.

    Args:
      labels: int64 (n,), equal within a cluster. ranks: distinct int64 (n,), the best is the smallest (`total_order`:
        for instance licence, letterboxed or not, -pixels, -caption score, uid).

    Returns:
      (node int64 (n,): the representative of each node's cluster, size int64 (n,) of the cluster).
    """
    order = np.lexsort((ranks, labels))
    starts = np.flatnonzero(np.concatenate([[True], np.diff(labels[order]) != 0])) if len(order) else order
    sizes = np.diff(starts, append=len(order))
    node, size = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    node[order], size[order] = np.repeat(order[starts], sizes), np.repeat(sizes, sizes)
    return node, size


@dataclasses.dataclass
class Views:
    """Hash rows grouped by image, to compare images by their nearest pair of views (but not probe with probe).

    Attributes:
      rows: sorted by rid, which is 0 .. n-1. bounds: int64 (n + 1,), the rows of image i are bounds[i] : bounds[i+1].
    """

    rows: HashRows
    bounds: np.ndarray

    @classmethod
    def of(cls, rows: HashRows, n: int) -> "Views":
        """Groups rows of images 0 .. n-1; images without rows are far from everything."""
        rows = rows.take(np.argsort(rows.rid, kind="stable"))
        return cls(rows, np.searchsorted(rows.rid, np.arange(n + 1)))

    def distances(self, image: int, others: np.ndarray, k: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """How far `image` is from each of the images `others`, by their nearest pair of views.

        Returns:
          int32 (d64, d256) of the pair of views with the smallest d256 among those with d64 <= k; of the smallest d64
          where there is none such; (64, 256) for images without hashes.
        """
        mine = self.rows.take(np.arange(self.bounds[image], self.bounds[image + 1]))
        counts = self.bounds[others + 1] - self.bounds[others]
        starts = np.cumsum(counts) - counts
        theirs = self.rows.take(np.repeat(self.bounds[others] - starts, counts) + np.arange(counts.sum()))
        nearest = np.full(len(others), FAR)
        if len(mine) and len(theirs):
            short = np.bitwise_count(mine.h64[:, None] ^ theirs.h64).astype(np.int32)
            long = bit_distance(mine.h256[:, None], theirs.h256[None])
            score = np.where(short <= k, long << 8 | short, 1 << 20 | short << 10 | long)
            score[mine.probe[:, None] & theirs.probe] = FAR
            nearest[counts > 0] = np.minimum.reduceat(score.min(axis=0), starts[counts > 0])
        within = nearest < 1 << 20
        d64 = np.where(within, nearest & 255, nearest >> 10 & 1023)
        return d64.astype(np.int32), np.where(within, nearest >> 8, nearest & 1023).astype(np.int32)


def split_components(
    labels: np.ndarray,
    ranks: np.ndarray,
    views: Views,
    same: np.ndarray,
    max_d256: int = DEFAULT_JOIN.max_d256,
    above: int = SPLIT_ABOVE,
) -> np.ndarray:
    """Components of more than `above` members, split so that every member is near its representative.

    The best-ranked member takes all members within `max_d256` of it; the best of the rest takes its own, and so on.

    Args:
      labels: int64 (n,). ranks: see `representatives`. views: hashes of all n images.
      same: int64 (n,), the image whose exact copy each one is (itself if none): copies are never parted.
      max_d256: distance of the 256-bit hashes. above: members.

    Returns:
      labels int64 (n,): the smallest member of each cluster.
    """
    _, size = representatives(labels, ranks)
    result = labels.copy()
    large = np.flatnonzero(size > above)
    large = large[np.argsort(labels[large], kind="stable")]
    for members in np.split(large, np.flatnonzero(np.diff(labels[large])) + 1) if len(large) else []:
        rest = members[np.argsort(ranks[members])]
        while len(rest):
            near = (views.distances(same[rest[0]], same[rest])[1] <= max_d256) | (same[rest] == same[rest[0]])
            result[rest[near]] = rest[near].min()
            rest = rest[~near]
    return result


def cluster(
    measured: Sequence[Mapping[str, Any]], ranks: np.ndarray, join: Join = DEFAULT_JOIN, min_detail: float = MIN_DETAIL
) -> tuple[np.ndarray, np.ndarray, Mapping[str, int]]:
    """All steps in memory, for images 0 .. n-1.

    Arguments as of `near_edges` and `representatives`. Returns (labels as of `split_components`, edges, counts).
    """
    edges, counts = near_edges(np.arange(len(measured)), measured, join, min_detail)
    return label_clusters(edges, measured, ranks, join), edges, counts


def label_clusters(
    edges: np.ndarray, measured: Sequence[Mapping[str, Any]], ranks: np.ndarray, join: Join = DEFAULT_JOIN
) -> np.ndarray:
    """Labels of the clusters that `edges` make: components, the large ones split. Arguments as of `cluster`."""
    n = len(measured)
    labels = union_find(edges, n)
    identity = np.frombuffer(b"".join(item["image_id"] for item in measured), np.uint64).reshape(-1, 2)
    same = union_find(exact_edges(np.arange(n), identity), n)
    return split_components(labels, ranks, Views.of(hash_rows(range(n), measured), n), same, join.max_d256)


def measured_rows(block: pa.Table) -> list[dict[str, Any]]:
    """What `dedup` reads of each row."""
    rows = block.select(list(MEASURED)).to_pylist()
    return [row | {"image_id": bytes.fromhex(row["image_id"])} for row in rows]
