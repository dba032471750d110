"""Retrieval in two steps: two towers find the first k for each query, a fusion puts these in order."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from florence_jax.data.records import Source
from florence_jax.data.tokenizers import Tokenizer
from florence_jax.errors import UserError
from florence_jax.evaluators.base import SourceEvaluator
from florence_jax.evaluators.metrics import positive_places, recalls, retrieval_chance
from florence_jax.evaluators.predictor import Embedder, Predictor, image_counts
from florence_jax.evaluators.retrieval import owned_captions
from florence_jax.evaluators.vlp import error_of_mean


class Reranking(SourceEvaluator):
    """R@1/5/10 of two towers, and after a fusion has put the first k of each query in order, both ways.

    An image is found by any of its captions. Results: 'i2t_r@k', 't2i_r@k' with 'i2t_r@1_stderr', 't2i_r@1_stderr', and
    'towers_...', before; 'gain' of both ways' R@1 and its standard error 'gain_stderr', over the queries; 'images',
    'captions'.

    Args:
      name: prefix of the results.
      source: records with "captions" or "caption".
      ops: of images.
      embedder: of the towers. load: gives their parameters on the devices of a mesh.
      tokenizer: of the fusion.
      encode: pure function (params, batch) -> {"tokens" (B, T, C)} of images.
      score: pure function (params, batch) -> {"score" (B,)}, how well "image_tokens", "text", "text_length" fit.
      mesh, batch_size: see `Predictor`.
      k: of each query. on_corrupt: 'skip' or 'error'.

    Raises:
      UserError: for a k below 2, or records without captions.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        ops: str,
        embedder: Embedder,
        load: Callable[[Mesh], Any],
        tokenizer: Tokenizer,
        encode: Callable[[Any, dict[str, jax.Array]], Mapping[str, jax.Array]],
        score: Callable[[Any, dict[str, jax.Array]], Mapping[str, jax.Array]],
        mesh: Mesh,
        batch_size: int,
        k: int,
        on_corrupt: str = "skip",
    ):
        if k < 2:
            raise UserError(f"config.rerank.k={k} must be at least 2: of one there is no order")
        super().__init__(name, source)
        self._k, self._on_corrupt = k, on_corrupt
        self._ops = f"{ops}|keep(image)"
        self._embedder, self._load, self._tokenizer, self._mesh = embedder, load, tokenizer, mesh
        self._encode, self._score = Predictor(encode, mesh, batch_size), Predictor(score, mesh, batch_size)
        self._captions, self._owners = owned_captions(name, source)

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        tokens = {
            row["index"]: row["tokens"]
            for row in self._encode.rows(params, self._source, self._ops, {}, on_corrupt=self._on_corrupt)
        }
        towers = self._load(self._mesh)
        found = self._embedder.images(towers, self._source, self._ops, {}, self._on_corrupt)
        texts = self._embedder.texts(towers, self._captions, f"{self.name} captions")
        used = np.flatnonzero(np.isin(self._owners, found["index"]))
        images, owners = found["index"], self._owners[used]
        similarity = found["embedding"] @ texts[used].T
        rows = np.stack([tokens[index] for index in images.tolist()])
        ids = self._tokenizer.encode_batch([self._captions[i] for i in used])
        results = image_counts(self._source, images) | {"captions": float(len(used))}
        self._chance = retrieval_chance(images, owners)
        gains = []
        for way, matrix, mine, theirs in (
            ("i2t_", similarity, images, owners),
            ("t2i_", similarity.T, owners, images),
        ):
            first = np.argsort(-matrix, axis=1, kind="stable")[:, : self._k]
            right = mine[:, None] == theirs[None]
            queries = np.repeat(np.arange(len(mine)), first.shape[1])
            pairs = (queries, first.ravel()) if way == "i2t_" else (first.ravel(), queries)
            scores = self._scores(params, rows, ids, *pairs).reshape(first.shape)
            before = positive_places(matrix, right)
            after = reranked_places(before, scores, np.take_along_axis(right, first, axis=1))
            results |= recalls(after, way) | recalls(before, f"towers_{way}")
            results[f"{way}r@1_stderr"] = error_of_mean(after < 1)
            gains.append((after < 1).astype(np.float64) - (before < 1))
        gain = np.concatenate(gains)
        return results | {"gain": float(gain.mean()), "gain_stderr": error_of_mean(gain)}

    def _scores(
        self, params: Any, tokens: np.ndarray, ids: np.ndarray, images: np.ndarray, texts: np.ndarray
    ) -> np.ndarray:
        """float32 (P,) of pairs of rows of images and of texts."""
        size, lengths = self._score.batch_size, self._tokenizer.lengths(ids)

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for start in range(0, len(images), size):
                places = np.arange(start, start + size) % len(images)  # the last one is filled with the first pairs
                yield {
                    "image_tokens": tokens[images[places]],
                    "text": ids[texts[places]],
                    "text_length": lengths[texts[places]],
                    "mask": np.arange(start, start + size) < len(images),
                    "index": np.arange(start, start + size, dtype=np.int32),
                }

        columns = self._score.batches(params, batches(), what=self.name, total=len(images), unit="pair")
        return np.concatenate([found["score"] for found in columns])


def reranked_places(before: np.ndarray, scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """int (Q,): the places after the first k of each query have been put in the order of their scores.

    A query none of whose right targets is among them keeps its place, behind all of them.

    Args:
      before: (Q,). scores: (Q, k), of the first k. right: bool (Q, k).
    """
    after = positive_places(scores, right)
    return np.where(right.any(1), after, np.maximum(before, scores.shape[1]))
