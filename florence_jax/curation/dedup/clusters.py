"""Near-duplicates: clusters of pictures, their representatives, and copies of benchmark pictures.

    python -m florence_jax.curation.dedup DIR_OR_PARQUET     # finds the duplicates of a folder; --help

The steps, each a function on columns: exact copies first (`exact_edges`), then the covering-design join of what is left
(join.py), connected components (components.py). These are candidates: pairs by their outlines, and chains of them. Then
components are cut into stars (`star_clusters`), in which every picture is near the one that stays, colours and contents
included (views.py), and that one is the representative (`representatives`).

What is not found: off-centre crops, rotations of 5 degrees and more, caption bars, vertical flips, which need
embeddings; drawings that were mirrored, or changed in their colours or light.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from florence_jax.curation.dedup.components import union_find
from florence_jax.curation.dedup.join import DEFAULT_JOIN, Join, candidate_edges
from florence_jax.curation.dedup.views import Views, hash_rows, wide_hashes

MIN_DETAIL = 0.5  # grey levels; below it only equal files are duplicates: the hash of a flat picture means little
ASPECT_STEP = 1.05  # pictures of one h256 are exact copies if their shapes fall into one bucket of this ratio
# Columns that `measured_rows` reads: to find pairs, and to compare them.
HASHED = ("status", "image_id", "h64", "h256", "detail", "aspect", "probes")
MEASURED = (*HASHED, "flatness", "look")


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


def star_clusters(labels: np.ndarray, ranks: np.ndarray, views: Views, join: Join) -> np.ndarray:
    """Components cut into stars: every member is near the one that stays, by `Views.compare`.

    The best-ranked member takes all that are near it, the best of the rest takes its own, and so on; in all components
    at once, so that there are as many rounds as the component with the most stars has. Equal files, which lie in one
    component, count as one.

    Args:
      labels: int64 (n,), equal within a component. ranks: see `representatives`.
      views: of all n images. join: the distances.

    Returns:
      labels int64 (n,): the smallest member of each star.
    """
    n = len(labels)
    order = np.lexsort((ranks, labels))
    codes = np.unique(views.identity[order], axis=0, return_inverse=True)[1].ravel() if n else order
    _, first, copy = np.unique(codes, return_index=True, return_inverse=True)
    files = order[np.sort(first)]  # the best of equal files, by (component, rank)
    star = np.arange(n)
    rest = files
    while len(rest):
        starts = np.flatnonzero(np.diff(labels[rest], prepend=-1))
        centre = np.repeat(rest[starts], np.diff(starts, append=len(rest)))
        near = centre == rest
        near[~near] = views.compare(centre[~near], rest[~near], join).near
        star[rest[near]] = centre[near]
        rest = rest[~near]
    star[order] = star[order[first]][copy]
    smallest = np.full(n, n)
    np.minimum.at(smallest, star, np.arange(n))
    return smallest[star]


def cluster(
    measured: Sequence[Mapping[str, Any]], ranks: np.ndarray, join: Join = DEFAULT_JOIN, min_detail: float = MIN_DETAIL
) -> tuple[np.ndarray, np.ndarray, Mapping[str, int]]:
    """All steps in memory, for images 0 .. n-1.

    Arguments as of `near_edges` and `representatives`. Returns (labels as of `star_clusters`, edges, counts).
    """
    edges, counts = near_edges(np.arange(len(measured)), measured, join, min_detail)
    return label_clusters(edges, measured, ranks, join), edges, counts


def label_clusters(
    edges: np.ndarray, measured: Sequence[Mapping[str, Any]], ranks: np.ndarray, join: Join = DEFAULT_JOIN
) -> np.ndarray:
    """Labels of the clusters that `edges` make: components, cut into stars. Arguments as of `cluster`."""
    labels = union_find(edges, len(measured))
    several = np.flatnonzero(representatives(labels, ranks)[1] > 1)
    views = Views.of([measured[i] for i in several.tolist()])
    result = labels.copy()
    result[several] = several[star_clusters(labels[several], ranks[several], views, join)]
    return result


def measured_rows(block: pa.Table, columns: Sequence[str] = HASHED) -> list[dict[str, Any]]:
    """What `dedup` reads of each row."""
    rows = block.select(list(columns)).to_pylist()
    return [row | {"image_id": bytes.fromhex(row["image_id"])} for row in rows]
