"""Clusters of picture embeddings, by k-means."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.curation.keyed import fractions, keyed_hashes
from florence_jax.curation.table import read_table, with_column, write_table
from florence_jax.errors import UserError
from florence_jax.files import exists


def cluster_embeddings(folder: str, count: int, clusters: int, seed: int) -> str:
    """Adds "embedding_cluster" to the scores: k-means of the image embeddings, in memory and in the order of uids.

    Only of pairs that are alive in this run: scores of others, left by other thresholds, must not move the clusters. A
    pair without an embedding is in cluster -1.

    Returns:
      Folder of the new parts, which have no embeddings.
    """
    tables = [_alive(folder, number) for number in range(count)]
    embeddings = [t["embedding"].to_pylist() if "embedding" in t.column_names else [None] * len(t) for t in tables]
    vectors = [np.array([e for e in part if e is not None], np.float32) for part in embeddings]
    vectors = [part for part in vectors if len(part)]
    labels = iter(kmeans(np.concatenate(vectors), clusters, seed)[0].tolist() if vectors else ())
    for number, (table, part) in enumerate(zip(tables, embeddings, strict=True)):
        table = table.select([name for name in table.column_names if name != "embedding"])
        found = [-1 if e is None else next(labels) for e in part]
        table = with_column(table, "embedding_cluster", found, pa.int64())
        write_table(f"{folder}/clustered/part-{number:05d}.parquet", table)
    return f"{folder}/clustered"


def _alive(folder: str, number: int) -> pa.Table:
    """The scores of the pairs of a part that are alive in this run."""
    table = read_table(f"{folder}/part-{number:05d}.parquet")
    path = f"{folder}/alive/part-{number:05d}.parquet"
    if not exists(path):
        return table.slice(0, 0)
    return table.filter(pc.is_in(table["uid"], value_set=read_table(path)["uid"].combine_chunks()))


def kmeans(embeddings: np.ndarray, clusters: int, seed: int, iterations: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's k-means with k-means++ seeding (Arthur and Vassilvitskii 2007); the same result on every run.

    Args:
      embeddings: float (N, D), rows in an order that does not depend on workers (sort by uid).
      clusters: at most N are used.
      seed: of the keyed hash that draws the first centres.
      iterations: upper bound; stops when no row moves.

    Returns:
      int64 (N,) cluster of each row and float64 (K, D) centres. A cluster that loses its last row keeps its centre.

    Raises:
      UserError: for no rows, or for values that are not finite.
    """
    x = np.asarray(embeddings, np.float64)
    if not len(x) or not np.isfinite(x).all():
        raise UserError("k-means needs at least one embedding, and finite values")
    centres = _first_centres(x, min(clusters, len(x)), seed)
    labels = np.full(len(x), -1)
    for _ in range(iterations):
        nearest = _nearest(x, centres)
        if (nearest == labels).all():
            break
        labels = nearest
        sizes = np.bincount(labels, minlength=len(centres))
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, x)
        filled = sizes > 0
        centres[filled] = sums[filled] / sizes[filled, None]
    return labels, centres


def _first_centres(x: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    draws = fractions(keyed_hashes(seed, [str(i) for i in range(clusters)], ["kmeans"] * clusters))
    chosen = [int(draws[0] * len(x))]
    distances = ((x - x[chosen[0]]) ** 2).sum(1)
    for draw in draws[1:]:
        total = np.cumsum(distances)
        chosen.append(min(int(np.searchsorted(total, draw * total[-1], side="right")), len(x) - 1))
        distances = np.minimum(distances, ((x - x[chosen[-1]]) ** 2).sum(1))
    return x[chosen].copy()


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((centres**2).sum(1)[None] - 2 * x @ centres.T).argmin(1)
