"""Few-shot classification by the protocol of the cross-domain benchmark CD-FSL (arXiv 1912.07200): 600 episodes of 5
classes, 5, 20 or 50 examples and 15 queries a class; mean accuracy and its 95 % interval.
"""

import concurrent.futures
import functools
import html
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.pipeline import to_global
from florence_jax.data.records import BadRecord, record_thumbnail
from florence_jax.data.sources.labelled import Labelled
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.classification import PREDICTIONS_FILE
from florence_jax.evaluators.predictor import COMPILED, Embedder, Predict
from florence_jax.evaluators.solvers.adapt import Recipe, adapt_and_classify, embed_cached, embed_images
from florence_jax.files import csv_bytes
from florence_jax.page import GridCell, curve, matches_html
from florence_jax.params.sharding import batch_sharding, place, replicated

MODES = ("head", "backbone")
HEAD_LANES = 64
BACKBONE_LANES = 8  # on a device; more of them are hardly faster, on a CPU not at all
LANES_BYTES = 2**31  # on a device: parameters, velocities and gradients of all lanes
PICTURES = 5  # of each class in the report
PREDICTION_COLUMNS = ("file", "label", "prediction", "score", "shots", "episode")  # of predictions.csv
READERS = 8  # threads that decode images
RECIPE = Recipe()


class Episode(NamedTuple):
    """Rows of a data set. classes: (ways,). support: (ways, shots). query: (ways, queries)."""

    classes: np.ndarray
    support: np.ndarray
    query: np.ndarray


class EpisodeAnswers(NamedTuple):
    """What was answered about the queries of E episodes, each with Q of them, in the order of `Episode.query`.

    Attributes:
      called: int (E, Q), the best of the episode's classes, by its place among them.
      scores: float (E, Q), its probability among them.
      right: float64 (E,), share of right answers.
    """

    called: np.ndarray
    scores: np.ndarray
    right: np.ndarray


class EpisodeSampler:
    """Draws episodes; each depends on the seed and its number only.

    The queries of a class are drawn before its examples: an episode with more shots has the same queries, and its
    examples contain those of the episode with fewer, as long as the same classes are large enough.

    Args:
      labels: (N,), class of each row.
      ways, shots, queries: classes, examples of each and queries of each in an episode.
      seed: of the draws.

    Raises:
      UserError: if fewer than `ways` classes have `shots + queries` rows.
    """

    def __init__(self, labels: np.ndarray, ways: int, shots: int, queries: int, seed: int):
        if min(shots, queries) < 1 or ways < 2:
            raise UserError(f"an episode needs 2 ways, 1 shot and 1 query or more, not {ways}, {shots} and {queries}")
        classes, counts = np.unique(labels, return_counts=True)
        self._classes = classes[counts >= shots + queries]
        if len(self._classes) < ways:
            raise UserError(
                f"only {len(self._classes)} classes have {shots + queries} images ({shots} shots and {queries} "
                f"queries), of {ways} needed; use fewer shots, queries or ways"
            )
        self._rows = {int(k): np.flatnonzero(labels == k) for k in self._classes}
        self._ways, self._shots, self._queries, self._seed = ways, shots, queries, seed

    def __call__(self, number: int) -> Episode:
        """Episode `number` >= 0."""
        rng = np.random.default_rng([self._seed, number])
        classes = rng.choice(self._classes, self._ways, replace=False)
        seeds = rng.integers(0, 2**32, self._ways)  # one a class, so that its rows do not depend on the others' sizes
        drawn = [
            np.random.default_rng(int(s)).permutation(self._rows[int(k)])[: self._queries + self._shots]
            for s, k in zip(seeds, classes, strict=True)
        ]
        rows = np.stack(drawn)
        return Episode(classes, rows[:, self._queries :], rows[:, : self._queries])


def flip_pair(features: Predict) -> Predict:
    """A prediction function whose (B, 2 D) output is the features of the images, then those of their mirror images."""

    def predict(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        both = (batch["image"], batch["image"][:, :, ::-1])
        return jnp.concatenate([features(params, batch | {"image": image}) for image in both], axis=1)

    return predict


class FewShot(Evaluator):
    """The episodes of one data set. Results: '<k>shot_accuracy', the mean over the episodes, and '<k>shot_ci95', the
    half width of its 95 % interval, 1.96 standard errors.

    Args:
      name: prefix of the results.
      data: images and classes.
      ops: image ops that give the model's input size.
      embedder: in mode 'head', its image function must be `flip_pair(features)`; else only its mesh is used.
      features: uint8 images -> (B, D); needed for mode 'backbone', which trains through it.
      backbone: gives the part of the parameters that `features` reads: in mode 'backbone' each episode trains a copy.
      mode: 'head' trains the head on features computed once, 'backbone' both, as Florence does.
      ways, queries: of an episode. shots: one or several numbers of examples a class.
      episodes: how many. seed: of the episodes and their training.
      recipe: of the training.
      lanes: episodes trained at once, under vmap; 0: 64 on cached features, else up to 8 a device, as fits in 2 GiB.

    Raises:
      UserError: for an unknown mode, no episodes, or a data set that is too small for them.
    """

    def __init__(
        self,
        name: str,
        data: Labelled,
        ops: str,
        embedder: Embedder,
        features: Predict | None = None,
        backbone: Callable[[Any], Any] = lambda params: params,
        *,
        mode: str = "head",
        ways: int = 5,
        shots: Sequence[int] = (5, 20, 50),
        queries: int = 15,
        episodes: int = 600,
        seed: int = 0,
        recipe: Recipe = RECIPE,
        lanes: int = 0,
    ):
        if mode not in MODES or (mode == "backbone" and features is None):
            raise UserError(f"few-shot mode {mode!r}: choose 'head', or 'backbone' with a features function")
        if episodes < 1 or not shots or seed < 0 or lanes < 0:
            raise UserError(
                f"few-shot: episodes={episodes} must be positive, shots={shots} not empty, seed={seed} not < 0, "
                f"lanes={lanes} not < 0"
            )
        if data.labels.ndim != 1:
            raise UserError(f"few-shot needs one class an image, which {data.source.name} has not")
        if drawn := [op.name for op in parse_ops(ops, {}) if op.random]:
            raise UserError(f"few-shot ops {ops!r}: {drawn[0]!r} is random; the recipe itself flips, use fixed ops")
        self.name, self._data, self._embedder, self._mode = name, data, embedder, mode
        self._ops, self._episodes, self._seed = f"{ops}|keep(image)", episodes, seed
        self._samplers = {k: EpisodeSampler(data.labels, ways, k, queries, seed) for k in shots}
        self._chance = {f"{k}shot_accuracy": 1 / ways for k in shots}
        self._wanted_lanes, self._epochs, self._backbone = lanes, recipe.epochs, backbone
        self._run = self._compiled(embed_images(features) if features and mode == "backbone" else None, recipe, ways)
        self._report: list[str] = []
        self._answers: dict[int, EpisodeAnswers] = {}

    def _compiled(self, embed: Any, recipe: Recipe, ways: int) -> Any:
        """jit of (params, table, batch) -> (lanes, Q) classes and scores of the queries, (lanes,) episodes' numbers."""

        def episode(
            params: Any, table: Any, support: jax.Array, query: jax.Array, key: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            if table is not None:
                support, query = table[support], table[query]
            scores = adapt_and_classify(embed or embed_cached, params, support, query, key, recipe, ways)
            return scores.argmax(1), jax.nn.softmax(scores).max(1)

        lanes = jax.vmap(episode, in_axes=(None, None, 0, 0, 0))

        def run(params: Any, table: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(self._seed)))(batch["number"])
            return *lanes(params, table, batch["support"], batch["query"], keys), batch["number"]

        return jax.jit(run, out_shardings=replicated(self._embedder.mesh))

    @property
    def chance(self) -> Mapping[str, float]:
        """One in `ways`."""
        return self._chance

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        table = None
        if self._mode == "head":
            params, table = None, self._table(params)
        else:
            params = self._backbone(params)
        self._lanes = self._choose_lanes(params)
        results = {}
        for shots, sampler in self._samplers.items():
            self._answers[shots] = self._ask(params, table, sampler, f"{self.name}, {shots} shots")
            right = self._answers[shots].right
            results[f"{shots}shot_accuracy"] = float(right.mean())
            results[f"{shots}shot_ci95"] = float(1.96 * right.std() / np.sqrt(len(right)))
        self._report = [self._page(results)]
        return results

    def report(self) -> list[str]:
        """A table: shots, accuracy, interval; their curve; pictures of the first episode."""
        return self._report

    def files(self) -> dict[str, bytes]:
        """predictions.csv: each query of each episode, for each number of shots.

        A picture is asked about in many episodes, each of which has a few of the classes and learns from pictures of
        its own, so that it has a line, with another score, in each.
        """
        keys = [record["key"] for record in self._data.source.metadata()]
        return {PREDICTIONS_FILE: csv_bytes(PREDICTION_COLUMNS, self._lines(keys))}

    def _lines(self, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
        names = self._data.names
        for shots, found in self._answers.items():
            for number in range(self._episodes):
                classes, _, query = self._samplers[shots](number)
                called, labels = classes[found.called[number]], np.repeat(classes, query.shape[1])
                columns = (query.ravel(), labels, called, found.scores[number])
                for row, label, answer, score in zip(*(column.tolist() for column in columns), strict=True):
                    yield keys[row], names[label], names[answer], f"{score:.6f}", str(shots), str(number)

    def _choose_lanes(self, params: Any) -> int:
        """Episodes at once: batches of equal size, as far as it is a multiple of the devices."""
        devices = self._embedder.mesh.size
        lanes = self._wanted_lanes or HEAD_LANES
        if params is not None and not self._wanted_lanes:
            each = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            lanes = devices * max(1, min(BACKBONE_LANES, LANES_BYTES // each))
        batches = -(-self._episodes // lanes)
        return -(-self._episodes // (batches * devices)) * devices

    def _table(self, params: Any) -> jax.Array:
        """(N, 2, D): features of each image and of its mirror image."""
        out = self._embedder.images(params, self._data.source, self._ops)
        pairs = out["embedding"].astype(np.float32).reshape(len(out["embedding"]), 2, -1)
        return place(pairs, replicated(self._embedder.mesh))

    def _ask(self, params: Any, table: jax.Array | None, sampler: EpisodeSampler, what: str) -> EpisodeAnswers:
        """Trains on each episode and asks about its queries."""
        sharding, found, began = batch_sharding(self._embedder.mesh), [], 0.0
        starts, started = range(0, self._episodes, self._lanes), time.perf_counter()
        hidden = not sys.stderr.isatty() or jax.process_index() > 0
        local = self._lanes // jax.process_count()
        for start in tqdm(starts, desc=what, unit="batch", leave=False, disable=hidden):
            first = start + jax.process_index() * local
            batch = to_global(self._batch(sampler, range(first, first + local), table is None), sharding)
            found.append(jax.device_get(self._run(params, table, batch)))
            began = began or time.perf_counter()  # the first batch compiles
        if jax.process_index() == 0:
            rest = self._episodes - self._lanes
            count, since, note = (rest, began, "") if rest > 0 else (self._episodes, started, COMPILED)
            rate = count / (time.perf_counter() - since)
            speed = f"{rate:.2f} episodes/s, {rate * self._images_an_episode(sampler):.0f} img/s{note}"
            print(f"{what}: {self._episodes} episodes, {speed}", flush=True)
        called, scores, numbers = (np.concatenate(column) for column in zip(*found, strict=True))
        # In the order of the numbers, whatever the order of the hosts' devices in the mesh; the rest is padding.
        order = np.argsort(numbers)[: self._episodes]
        called, ways = called[order], len(sampler(0).classes)
        right = (called == np.repeat(np.arange(ways), called.shape[1] // ways)[None]).mean(1)
        return EpisodeAnswers(called, scores[order], right)

    def _images_an_episode(self, sampler: EpisodeSampler) -> int:
        """How many go through the head: each example in every epoch, each query and its mirror image once."""
        episode = sampler(0)
        return episode.support.size * self._epochs + 2 * episode.query.size

    def _batch(self, sampler: EpisodeSampler, numbers: Sequence[int], read: bool) -> dict[str, np.ndarray]:
        """Numbers (E,), support (E, ways * shots, ...), query (E, ways * queries, ...): rows, or images if `read`."""
        episodes = [sampler(number) for number in numbers]
        batch = {
            "support": np.stack([episode.support.ravel() for episode in episodes]).astype(np.int32),
            "query": np.stack([episode.query.ravel() for episode in episodes]).astype(np.int32),
        }
        if read:
            batch = {name: self._images(rows) for name, rows in batch.items()}
        return batch | {"number": np.array(numbers, np.int32)}

    def _images(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (*rows.shape, H, W, 3). Raises BadRecord, a UserError, for an unreadable image."""
        ops, rng = parse_ops(self._ops, {}), np.random.default_rng(0)

        def read(row: int) -> np.ndarray:
            (example,) = self._data.source.__getitems__([row])
            if isinstance(example, BadRecord):
                raise example
            for op in ops:
                example = op(example, rng)
            return example["image"]

        needed, inverse = np.unique(rows, return_inverse=True)
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            images = np.stack(list(pool.map(read, needed.tolist())))
        return images[inverse.reshape(rows.shape)]

    def _page(self, results: dict[str, float]) -> str:
        rows = "".join(
            f'<tr><td class="n">{k}</td><td class="n">{100 * results[f"{k}shot_accuracy"]:.2f}</td>'
            f'<td class="n">&plusmn; {100 * results[f"{k}shot_ci95"]:.2f}</td></tr>'
            for k in self._samplers
        )
        trained = "head on cached features" if self._mode == "head" else "head and backbone"
        shots = list(self._samplers)
        line = curve("accuracy, %, over shots", shots, {"": [100 * results[f"{k}shot_accuracy"] for k in shots]})
        name, ways = html.escape(self.name), len(self._samplers[shots[0]](0).classes)
        return (
            f"<h2>{name}: few-shot</h2><p>{self._episodes} episodes of {ways} classes, trained: {trained}.</p>"
            f"<table><tr><th>shots</th><th>accuracy, %</th><th>95 %</th></tr>{rows}</table>{line}{self._example()}"
        )

    def _example(self) -> str:
        """The first pictures of each class of episode 0."""
        episode, source = next(iter(self._samplers.values()))(0), self._data.source
        lines = []
        for k, rows in zip(episode.classes, episode.support, strict=True):
            pictures = [GridCell("", record_thumbnail(source, int(row)) or None, True) for row in rows[:PICTURES]]
            lines.append((GridCell(self._data.names[int(k)], None, True), pictures))
        return matches_html(f"{self.name}: examples of the first episode", lines, judged=False)
