"""Image-text retrieval: ranks of the matching pairs by cosine similarity, and recall@k in both directions."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from florence_jax.data.captions import caption_label, normalise_caption
from florence_jax.data.records import Record, Source, record_thumbnail
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.karpathy import PREFIX
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator, SourceEvaluator
from florence_jax.evaluators.metrics import positive_places, recalls, retrieval_chance
from florence_jax.evaluators.predictor import Embedder, image_counts
from florence_jax.page import GridCell, matches_html
from florence_jax.params.sharding import place

QUERY_CHUNK = 1024
TARGET_TILE = 16384
CAPTIONS_PER_IMAGE = 5  # of the protocols of Flickr30k 1K and COCO 5K


def positive_ranks_reference(
    queries: np.ndarray, targets: np.ndarray, query_ids: np.ndarray, target_ids: np.ndarray
) -> np.ndarray:
    """The definition of `positive_ranks`, from the whole similarity matrix."""
    return positive_places(queries @ targets.T, query_ids[:, None] == target_ids[None, :])


def rank_chunk(queries: jax.Array, query_ids: jax.Array, targets: jax.Array, target_ids: jax.Array) -> jax.Array:
    """Ranks (q,) of a chunk of queries (q, D), in two passes over tiles of the targets; padding targets have id -1.

    Args:
      queries: (q, D). query_ids: (q,).
      targets: (tiles, t, D). target_ids: (tiles, t).
    """
    tiled = (targets, target_ids)

    def similarity(tile: jax.Array) -> jax.Array:
        return jnp.matmul(queries, tile.T, precision="highest")

    def best(carry: jax.Array, tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        positive = query_ids[:, None] == tile[1][None]
        return jnp.maximum(carry, jnp.where(positive, similarity(tile[0]), -jnp.inf).max(1)), None

    def above(carry: jax.Array, tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        other = (query_ids[:, None] != tile[1][None]) & (tile[1] >= 0)[None]
        return carry + (other & (similarity(tile[0]) >= top[:, None])).sum(1), None

    top, _ = jax.lax.scan(best, jnp.full(len(queries), -jnp.inf), tiled)
    return jax.lax.scan(above, jnp.zeros(len(queries), jnp.int32), tiled)[0]


@functools.cache
def compiled_rank_chunk(devices: int) -> tuple[Any, NamedSharding, NamedSharding]:
    """`rank_chunk` over all devices of all hosts, and the shardings of its queries and of its targets.

    The ranks go to every host.
    """
    mesh = jax.make_mesh((devices,), ("queries",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("queries"))
    return jax.jit(rank_chunk, out_shardings=whole), split, whole


def positive_ranks(
    queries: np.ndarray, targets: np.ndarray, query_ids: np.ndarray, target_ids: np.ndarray
) -> np.ndarray:
    """How many wrong targets are at least as similar to each query as its best right one (0 = found first).

    Ties count against the query, so that a model that maps everything to one point scores at the bottom, not at the
    top. The queries are split over all devices of all hosts; memory on each: the targets and one (1024, 16384) tile of
    similarities, so that 100,000 x 500,000 fits. Every process calls it with the same arrays and gets the same ranks.

    Args:
      queries: float32 (Q, D) unit vectors. targets: float32 (T, D) unit vectors.
      query_ids: (Q,) and target_ids: (T,), integers >= 0; a target is right for a query if their ids are equal.

    Returns:
      int (Q,). A query without any right target gets T.

    Raises:
      UserError: for no queries or no targets.
    """
    if not len(queries) or not len(targets):
        raise UserError(f"retrieval of {len(queries)} queries among {len(targets)} targets: both must be there")
    tile = min(TARGET_TILE, len(targets))
    extra = -len(targets) % tile
    run, split, whole = compiled_rank_chunk(devices := jax.device_count())
    padded = place(np.pad(targets, ((0, extra), (0, 0))).reshape(-1, tile, targets.shape[1]), whole)
    ids = place(np.pad(target_ids.astype(np.int32), (0, extra), constant_values=-1).reshape(-1, tile), whole)
    chunk, ranks = min(QUERY_CHUNK, -(-len(queries) // devices)) * devices, []
    hidden = not sys.stderr.isatty() or jax.process_index() > 0 or len(queries) <= chunk
    for start in tqdm(range(0, len(queries), chunk), desc="ranks", unit="chunk", leave=False, disable=hidden):
        rows = queries[start : start + chunk]
        missing = chunk - len(rows)
        wanted = np.pad(query_ids[start : start + chunk].astype(np.int32), (0, missing))
        found = run(place(np.pad(rows, ((0, missing), (0, 0))), split), place(wanted, split), padded, ids)
        ranks.append(np.asarray(found)[: len(rows)])
    return np.concatenate(ranks)


def two_way_recalls(
    images: np.ndarray, texts: np.ndarray, image_ids: np.ndarray, text_ids: np.ndarray
) -> dict[str, float]:
    """R@1/5/10 of images -> texts ('i2t_r@1', ...) and texts -> images ('t2i_r@1', ...); shapes as `positive_ranks`."""
    return recalls(positive_ranks(images, texts, image_ids, text_ids), "i2t_") | recalls(
        positive_ranks(texts, images, text_ids, image_ids), "t2i_"
    )


def recall_chart(name: str) -> Chart:
    """Of recall@1 both ways."""
    return Chart(f"{name}: recall@1", {"image to text": "i2t_r@1", "text to image": "t2i_r@1"})


class Retrieval(SourceEvaluator):
    """Retrieval on held-out pairs of any source: every image against every distinct caption.

    Args:
      name: prefix of the results.
      source: its field "caption" is used; equal captions (after normalisation) are one text.
      ops: image ops, such as 'decode|resize(224)|center_crop(224)'.
      embedder: of the model.
      on_corrupt: 'skip' leaves unreadable images out, 'error' ends the evaluation.

    Raises:
      UserError: if no record has a caption.
    """

    def __init__(self, name: str, source: Source, ops: str, embedder: Embedder, on_corrupt: str = "skip"):
        super().__init__(name, source)
        self.charts, self._embedder, self._on_corrupt = (recall_chart(name),), embedder, on_corrupt
        found = {normalise_caption(str(row.get("caption", ""))) for row in source.metadata()} - {""}
        if not found:
            raise UserError(f"{source.name}: no record has a caption in the field 'caption'")
        captions = sorted(found)
        numbers = _numbers(np.stack([caption_label(caption) for caption in captions]))
        order = np.argsort(numbers)
        self._captions, self._numbers = [captions[i] for i in order], numbers[order]
        self._ops = f"{ops}|caption|label|keep(image, label)"

    def run(self, params: Any) -> dict[str, float]:
        """'i2t_r@k' and 't2i_r@k', and the number of images."""
        images = self._embedder.images(params, self._source, self._ops, {}, self._on_corrupt)
        texts = self._embedder.texts(params, self._captions, f"{self.name} captions")
        owned = np.searchsorted(self._numbers, _numbers(images["label"]))  # of each image, its caption
        # A caption all of whose images are unreadable is nobody's.
        present = np.unique(owned)
        results = two_way_recalls(images["embedding"], texts[present], owned, present)
        self._chance = retrieval_chance(owned, present)
        pictures = [record_thumbnail(self._source, int(i)) for i in images["index"][:MAX_PICTURES]]
        self._report = [
            matches_report(self.name, images["embedding"][: len(pictures)], pictures, owned, texts, self._captions)
        ]
        return results | image_counts(self._source, images["index"])


def _numbers(labels: np.ndarray) -> np.ndarray:
    """int32 (N, 2) labels as int64 (N,)."""
    return np.ascontiguousarray(labels).view(np.int64)[:, 0]


def owned_captions(name: str, source: Source, most: int = 0) -> tuple[list[str], np.ndarray]:
    """The captions of all records, in "captions" or "caption", and int (T,) the record of each.

    Args:
      name: of the evaluator, for what is printed. source: N records.
      most: of a record, the first ones; 0 for all. What is not used is printed.

    Raises:
      UserError: for a record without captions.
    """
    lists = [_captions(row) for row in source.metadata()]
    if len(lists) != len(source) or not all(lists):
        raise UserError(f"{source.name}: every record needs readable captions, in the field 'captions' or 'caption'")
    total, lists = sum(map(len, lists)), [captions[: most or None] for captions in lists]
    if (unused := total - sum(map(len, lists))) and jax.process_index() == 0:
        print(f"{name}: the first {most} captions of an image count; {unused:,} of {total:,} do not")
    owners = np.repeat(np.arange(len(lists)), [len(captions) for captions in lists])
    return [caption for captions in lists for caption in captions], owners


def _captions(row: Record) -> list[str]:
    value = row.get("captions") or row.get("caption") or ()
    return [value] if isinstance(value, str) else list(value)


class CaptionRetrieval(SourceEvaluator):
    """Retrieval where each image has several captions of its own: the protocols of Flickr30k 1K and COCO 5K.

    Every image against every caption; an image is found by any of its captions, and captions of other images are wrong
    even if they read the same. Results: 'i2t_r@k', 't2i_r@k', 'images', 'captions'.

    Args:
      name: prefix of the results.
      source: records with the list field "captions" (see `data.karpathy`), or several captions in "caption".
      ops, embedder, on_corrupt: as for `Retrieval`.
      per_image: captions used of each image, the first ones; 0 for all. What is not used is printed.

    Raises:
      UserError: if a record has no captions.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        ops: str,
        embedder: Embedder,
        on_corrupt: str = "error",
        per_image: int = 0,
    ):
        super().__init__(name, source)
        self.charts, self._embedder, self._on_corrupt = (recall_chart(name),), embedder, on_corrupt
        self._captions, self._owners = owned_captions(name, source, per_image)
        self._ops = f"{ops}|keep(image)"

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        images = self._embedder.images(params, self._source, self._ops, {}, self._on_corrupt)
        texts = self._embedder.texts(params, self._captions, f"{self.name} captions")
        used = np.isin(self._owners, images["index"])
        results = two_way_recalls(images["embedding"], texts[used], images["index"], self._owners[used])
        self._chance = retrieval_chance(images["index"], self._owners[used])
        pictures = [record_thumbnail(self._source, int(i)) for i in images["index"][:MAX_PICTURES]]
        # In the grids each image stands for its first caption.
        first = np.searchsorted(self._owners, images["index"][: len(pictures)])
        names, ids = [self._captions[i] for i in first], np.arange(len(first))
        shown = images["embedding"][: len(pictures)]
        self._report = [matches_report(self.name, shown, pictures, ids, texts[first], names)]
        return results | image_counts(self._source, images["index"]) | {"captions": float(used.sum())}


def choose_retrieval(
    name: str, source: Source, ops: str, embedder: Embedder, on_corrupt: str = "skip", per_image: int = 0
) -> Evaluator:
    """`CaptionRetrieval` for a source whose records have a list of captions (see there), else `Retrieval`."""
    first = next(iter(source.metadata()), {})
    if any(isinstance(first.get(field), list) for field in ("captions", "caption")):
        return CaptionRetrieval(name, source, ops, embedder, on_corrupt, per_image)
    return Retrieval(name, source, ops, embedder, on_corrupt)


def open_retrieval(name: str, spec: str, ops: str, embedder: Embedder, on_corrupt: str = "skip") -> Evaluator:
    """`choose_retrieval` of a named source (see `sources.catalog.open_source`): all captions of every image, but five
    of Karpathy's splits.
    """
    per_image = CAPTIONS_PER_IMAGE if spec.startswith(PREFIX) else 0
    return choose_retrieval(name, open_source(spec), ops, embedder, on_corrupt, per_image)


MAX_PICTURES = 2000  # in the grids of a report: thumbnails are kept in memory


def matches_report(
    title: str,
    images: np.ndarray,
    pictures: Sequence[str],
    image_ids: np.ndarray,
    texts: np.ndarray,
    names: Sequence[str],
    rows: int = 12,
) -> str:
    """HTML grids: `rows` images with their nearest texts and the cosines, and as many texts with their nearest images.

    Args:
      title: of the section.
      images: (N, D). pictures: N data URIs. image_ids: (>= N,), index of each image's own text.
      texts: (T, D). names: T strings.
      rows: of each grid, spread evenly over the set; no text stands for a query twice.
    """
    chosen = np.linspace(0, len(images) - 1, min(rows, len(images))).astype(int)
    image_rows = []
    for i in chosen:
        cosines = texts @ images[i]
        nearest = np.argsort(-cosines, kind="stable")[:5]
        answers = [GridCell(names[j], None, bool(j == image_ids[i]), f"{cosines[j]:.2f}") for j in nearest]
        image_rows.append((GridCell(names[image_ids[i]], pictures[i], True), answers))
    text_rows = []
    queries = np.unique(image_ids[: len(images)])
    for query in queries[np.linspace(0, len(queries) - 1, min(rows, len(queries))).astype(int)]:
        cosines = images @ texts[query]
        nearest = np.argsort(-cosines, kind="stable")[:5]
        answers = [
            GridCell(names[image_ids[j]], pictures[j], bool(image_ids[j] == query), f"{cosines[j]:.2f}")
            for j in nearest
        ]
        text_rows.append((GridCell(names[query], None, True), answers))
    return matches_html(f"{title}: image to text", image_rows) + matches_html(f"{title}: text to image", text_rows)
