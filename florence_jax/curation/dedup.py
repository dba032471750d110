"""Near-duplicates: clusters of pictures, their representatives, and copies of benchmark pictures.

    python -m florence_jax.curation.dedup DIR_OR_PARQUET     # finds the duplicates of a folder; --help

The steps, each a function on columns: exact copies first (`exact_edges`), then the covering-design join of what is left
(join.py), connected components (components.py), large components split again around representatives so that a chain
of similar pictures does not become one cluster (`split_components`), and one representative each (`representatives`).

What hashes do not see: off-centre crops, rotations of 5 degrees and more, caption bars, vertical flips. They need
embeddings.
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florence_jax.curation.components import union_find
from florence_jax.curation.hashing import bit_distance
from florence_jax.curation.join import DEFAULT_JOIN, HashRows, Join, candidate_edges, compact, covering_tables
from florence_jax.errors import UserError

MIN_DETAIL = 0.5  # grey levels; below it only equal files are duplicates: the hash of a flat picture means little
ASPECT_STEP = 1.05  # pictures of one h256 are exact copies if their shapes fall into one bucket of this ratio
FAR = 1 << 20 | 64 << 10 | 256  # the score of no pair of views
SPLIT_ABOVE = 50  # members; larger components are split around their representatives
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
    return settle(edges, measured, ranks, join), edges, counts


def settle(
    edges: np.ndarray, measured: Sequence[Mapping[str, Any]], ranks: np.ndarray, join: Join = DEFAULT_JOIN
) -> np.ndarray:
    """Labels of the clusters that `edges` make: components, the large ones split. Arguments as of `cluster`."""
    n = len(measured)
    labels = union_find(edges, n)
    identity = np.frombuffer(b"".join(item["image_id"] for item in measured), np.uint64).reshape(-1, 2)
    same = union_find(exact_edges(np.arange(n), identity), n)
    return split_components(labels, ranks, Views.of(hash_rows(range(n), measured), n), same, join.max_d256)


class BenchmarkIndex:
    """Pictures of evaluation sets, to find their exact and resized copies among training pictures.

    Attributes:
      names: of the benchmarks. owner: int64 (images,), the benchmark of each image. ids: uint64 (images, 2), sorted
        bytes hash of each. rows: hash rows of the images (rid = image). join: what counts as a copy.
    """

    def __init__(self, names: Sequence[str], owner: np.ndarray, ids: np.ndarray, rows: HashRows, join: Join):
        self.names, self.owner, self.ids, self.rows, self.join = list(names), owner, ids, rows, join
        self._exact = {}
        for image, pair in enumerate(ids.tolist()):
            self._exact.setdefault(tuple(pair), image)
        self._tables = []
        for mask in covering_tables(join.k):
            keys = compact(rows.h64, mask)
            order = np.argsort(keys, kind="stable")
            self._tables.append((int(mask), keys[order], order))

    @classmethod
    def build(
        cls,
        benchmarks: Mapping[str, Iterable[Mapping[str, Any]]],
        join: Join = DEFAULT_JOIN,
        min_detail: float = MIN_DETAIL,
    ) -> "BenchmarkIndex":
        """Index of measured pictures (`hashing.measure`) by benchmark name, those of status 'ok'.

        Raises:
          UserError: a benchmark without a single usable picture.
        """
        owner, kept = [], []
        for number, (name, pictures) in enumerate(benchmarks.items()):
            usable = [item for item in pictures if item["status"] == "ok"]
            if not usable:
                raise UserError(f"benchmark {name!r} has no readable picture: check its folder")
            kept += usable
            owner += [number] * len(usable)
        ids = np.frombuffer(b"".join(item["image_id"] for item in kept), np.uint64).reshape(-1, 2)
        detailed = [image for image, item in enumerate(kept) if item["detail"] >= min_detail]
        rows = hash_rows(detailed, [kept[image] for image in detailed])
        return cls(list(benchmarks), np.array(owner, np.int64), ids, rows, join)

    def query(
        self, measured: Sequence[Mapping[str, Any]], min_detail: float = MIN_DETAIL
    ) -> list[dict[str, Any] | None]:
        """The nearest benchmark picture to each of these, or None.

        Returns:
          for each picture of status 'ok' that is a copy: `benchmark` (its name), `image` (its number), `kind` ('exact':
          equal bytes, 'near'), `d64`, `d256`; None for the others.
        """
        found: list[dict[str, Any] | None] = [None] * len(measured)
        near = [i for i, m in enumerate(measured) if m["status"] == "ok" and m["detail"] >= min_detail]
        rows = hash_rows(near, [measured[i] for i in near])
        left, right, d64, d256 = self._pairs(rows)
        order = np.lexsort((self.rows.rid[right], d64, d256, rows.rid[left]))
        picture, first = np.unique(rows.rid[left][order], return_index=True)
        for i, at in zip(picture.tolist(), order[first].tolist(), strict=True):
            found[i] = self._match(int(self.rows.rid[right[at]]), "near", int(d64[at]), int(d256[at]))
        for i, item in enumerate(measured):
            image = self._exact.get(tuple(np.frombuffer(item["image_id"], np.uint64).tolist()))
            if image is not None:
                found[i] = self._match(image, "exact", 0, 0)
        return found

    def _match(self, image: int, kind: str, d64: int, d256: int) -> dict[str, Any]:
        return {"benchmark": self.names[self.owner[image]], "image": image, "kind": kind, "d64": d64, "d256": d256}

    def _pairs(self, rows: HashRows) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Verified pairs (row of the query, row of the index, d64, d256)."""
        lefts, rights = [], []
        for mask, keys, order in self._tables:
            wanted = compact(rows.h64, mask)
            low, high = np.searchsorted(keys, wanted), np.searchsorted(keys, wanted, "right")
            counts = high - low
            left = np.repeat(np.arange(len(rows)), counts)
            right = order[np.repeat(low - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())]
            near = np.bitwise_count(rows.h64[left] ^ self.rows.h64[right]) <= self.join.k
            near &= ~(rows.probe[left] & self.rows.probe[right])
            lefts.append(left[near])
            rights.append(right[near])
        left, right = np.concatenate(lefts), np.concatenate(rights)
        d256 = bit_distance(rows.h256[left], self.rows.h256[right])
        left, right, d256 = (values[d256 <= self.join.max_d256] for values in (left, right, d256))
        return left, right, np.bitwise_count(rows.h64[left] ^ self.rows.h64[right]), d256

    def report(self, matches: Iterable[Mapping[str, Any] | None]) -> dict[str, dict[str, int]]:
        """For each benchmark: `images` in the index, and how many queried pictures were `exact` or `near` copies."""
        counts = {
            name: {"images": int((self.owner == i).sum()), "exact": 0, "near": 0} for i, name in enumerate(self.names)
        }
        for match in matches:
            if match is not None:
                counts[match["benchmark"]][match["kind"]] += 1
        return counts

    def save(self, path: str | Path) -> None:
        """Writes the index as .npz, under a temporary name first."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial.npz")
        join = np.array(dataclasses.astuple(self.join))
        fields = {f"rows_{field.name}": getattr(self.rows, field.name) for field in dataclasses.fields(self.rows)}
        np.savez_compressed(partial, names=np.array(self.names), owner=self.owner, ids=self.ids, join=join, **fields)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "BenchmarkIndex":
        """Reads what `save` wrote. Raises UserError if it is not that."""
        try:
            with np.load(path) as file:
                rows = HashRows(*(file[f"rows_{field.name}"] for field in dataclasses.fields(HashRows)))
                return cls(file["names"].tolist(), file["owner"], file["ids"], rows, Join(*file["join"].tolist()))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: not an index of benchmark pictures ({error}); build it again") from error


if __name__ == "__main__":
    from florence_jax.curation import dedup_files

    sys.exit(dedup_files.main())
