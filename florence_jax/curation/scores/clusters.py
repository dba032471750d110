"""Clusters of picture embeddings on Beam: mini-batch k-means of a keyed sample, then the nearest centre of each."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.curation.keyed import fractions, keyed_hash, keyed_hashes
from florence_jax.curation.table import load_array, read_table, save_array, with_column, write_table
from florence_jax.errors import UserError
from florence_jax.files import exists

SAMPLE = 256  # pairs a cluster that the centres are fitted to, on average; all pairs where there are fewer
KMEANS_BATCH = 1024  # embeddings a step of k-means, at least


def cluster_embeddings(folder: str, count: int, clusters: int, seed: int, run: Callable[[Callable], None]) -> str:
    """Adds "embedding_cluster" to the scores.

    Only pairs that are alive in this run count: scores of others, left by other thresholds, must not move the clusters.
    A pair without an embedding is in cluster -1.

    Args:
      folder: of the scores.
      count: parts.
      clusters: at most as many as there are embeddings.
      seed: of the sample, and of what k-means draws.
      run: runs a pipeline.

    Returns:
      Folder of the new parts, which have no embeddings.

    Raises:
      UserError: for embeddings that are not finite.
    """
    run(lambda root: root | beam.Create(range(count)) | ClusterEmbeddings(folder, clusters, seed))
    return f"{folder}/clustered"


class ClusterEmbeddings(beam.PTransform):
    """Numbers of parts of the scores -> `clustered/part-00000.parquet`, ... in their folder.

    One worker holds the sample, SAMPLE embeddings a cluster; all others hold one part and the centres.
    """

    def __init__(self, folder: str, clusters: int, seed: int):
        super().__init__()
        self._folder, self._clusters, self._seed = folder, clusters, seed

    def expand(self, numbers: beam.PCollection[int]) -> beam.PCollection[None]:
        """Three passes over the embeddings: to count, to draw the sample, to find the nearest centres."""
        numbers = numbers | "Spread" >> beam.Reshuffle()
        total = numbers | "Count" >> beam.Map(_count, self._folder) | beam.CombineGlobally(sum)
        fit = functools.partial(_fit, path=f"{self._folder}/centres.npy", clusters=self._clusters, seed=self._seed)
        centres = (
            numbers
            | "Sample"
            >> beam.FlatMap(_sample, self._folder, self._seed, SAMPLE * self._clusters, beam.pvalue.AsSingleton(total))
            | "Meet" >> beam.GroupByKey()
            | "Fit" >> beam.MapTuple(fit)
        )
        return numbers | "Nearest" >> beam.Map(_write_nearest, self._folder, beam.pvalue.AsList(centres))


def _alive(folder: str, number: int) -> pa.Table:
    """The scores of the pairs of a part that are alive in this run."""
    table = read_table(f"{folder}/part-{number:05d}.parquet")
    path = f"{folder}/alive/part-{number:05d}.parquet"
    if not exists(path):
        return table.slice(0, 0)
    return table.filter(pc.is_in(table["uid"], value_set=read_table(path)["uid"].combine_chunks()))


def _embedded(table: pa.Table) -> np.ndarray:
    """bool (N,): which rows have an embedding."""
    if "embedding" not in table.column_names:
        return np.zeros(len(table), bool)
    return pc.is_valid(table["embedding"]).to_numpy()


def _matrix(embeddings: pa.ChunkedArray) -> np.ndarray:
    """float32 (N, D) of N > 0 lists of equal length."""
    return pc.list_flatten(embeddings).to_numpy().astype(np.float32, copy=False).reshape(len(embeddings), -1)


def _count(number: int, folder: str) -> int:
    return int(_embedded(_alive(folder, number)).sum())


def _sample(number: int, folder: str, seed: int, size: int, total: int) -> Iterator[tuple[int, pa.Table]]:
    """The rows of a part whose keyed hash is in the first `size` of `total` parts of its range."""
    table = _alive(folder, number)
    table = table.filter(pa.array(_embedded(table)))
    uids = table["uid"].to_pylist()
    drawn = fractions(keyed_hashes(seed, uids, ["sample"] * len(uids))) * total < size
    if drawn.any():
        yield 0, table.select(["uid", "embedding"]).filter(pa.array(drawn))


def _fit(_: int, tables: Iterable[pa.Table], path: str, clusters: int, seed: int) -> str:
    sample = pa.concat_tables(tables).sort_by("uid")
    save_array(path, kmeans(_matrix(sample["embedding"]), clusters, seed))
    return path


def _write_nearest(number: int, folder: str, centres: list[str]) -> None:
    table = _alive(folder, number)
    embedded = _embedded(table)
    found = np.full(len(table), -1, np.int64)
    if embedded.any():
        found[embedded] = nearest(_matrix(table["embedding"].filter(pa.array(embedded))), load_array(centres[0]))
    table = table.select([name for name in table.column_names if name != "embedding"])
    table = with_column(table, "embedding_cluster", found, pa.int64())
    write_table(f"{folder}/clustered/part-{number:05d}.parquet", table)


def kmeans(embeddings: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Centres of mini-batch k-means (Sculley 2010) as scikit-learn has it, in one thread: the same on every run.

    Args:
      embeddings: float32 (N, D), rows in an order that does not depend on workers (sort by uid).
      clusters: at most N are used.
      seed: of what is drawn.

    Returns:
      float32 (K, D).

    Raises:
      UserError: for no rows, or for values that are not finite.
    """
    from sklearn.cluster import MiniBatchKMeans  # takes a second to load, which few runs need

    if not len(embeddings) or not np.isfinite(embeddings).all():
        raise UserError("k-means needs at least one embedding, and finite values")
    clusters = min(clusters, len(embeddings))
    with _one_thread():
        model = MiniBatchKMeans(
            clusters,
            batch_size=max(KMEANS_BATCH, 4 * clusters),
            n_init=1,
            random_state=keyed_hash(seed, "kmeans") >> 32,
        )
        return model.fit(embeddings).cluster_centers_


def nearest(embeddings: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """int64 (N,): the nearest row of `centres` (K, D) for each of (N, D), a few at a time.

    Raises:
      UserError: for values that are not finite.
    """
    from sklearn.metrics import pairwise_distances_argmin

    if not np.isfinite(embeddings).all():
        raise UserError("embedding clusters need finite embeddings; the checkpoint that scores gives others")
    with _one_thread():
        return pairwise_distances_argmin(embeddings, centres)


def _one_thread() -> Any:
    """So that sums have one order; Beam's workers share the cores anyway."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)
