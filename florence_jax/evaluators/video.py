"""Videos: actions from several views of each, retrieval by texts in both directions, and what their pages show."""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from florence_jax.data.captions import normalise_caption
from florence_jax.data.classes import ClassIndex
from florence_jax.data.records import BadRecord, Source
from florence_jax.data.videos import open_video
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Payload, SourceEvaluator, own_files
from florence_jax.evaluators.classification import HINT, Classification
from florence_jax.evaluators.metrics import positive_places, recalls, retrieval_chance, softmax
from florence_jax.evaluators.predictor import Embedder, image_counts
from florence_jax.evaluators.probe import Fitted, LinearProbe
from florence_jax.evaluators.retrieval import positive_ranks
from florence_jax.page import GridCell, matches_html, show_number, table_html
from florence_jax.pictures import data_uri, thumbnail

STRIP, STRIP_SIDE = 5, 72  # frames of a clip in a row, and the height of each
MOVING, MOVING_SIDE, MOVING_MS = 12, 96, 120  # frames of a moving picture, their shorter side, how long each is shown
SHOWN_QUERIES, SHOWN_ANSWERS = 10, 5
AMONG = 5  # of top-5
TEST = "test"  # the evaluator of a run's test videos
# Actions that are each other's reversal in time, or in a mirror.
OPPOSITES = (
    ("left", "right"), ("up", "down"), ("upward", "downward"), ("upwards", "downwards"), ("grow", "shrink"),
    ("grows", "shrinks"), ("growing", "shrinking"), ("clockwise", "anticlockwise"), ("clockwise", "counterclockwise"),
    ("appear", "disappear"), ("appears", "disappears"), ("appearing", "disappearing"), ("open", "close"),
    ("opening", "closing"), ("in", "out"), ("into", "out of"), ("closer", "away"),
)  # fmt: skip


def _some_frames(source: Source, row: int, count: int, side: int) -> np.ndarray | None:
    """uint8 (T, h, w, 3), spread over the video of a record; None where it cannot be read."""
    try:
        with open_video(source[row]["video"], source.name) as video:
            return video.read(np.unique(np.linspace(0, video.count - 1, count).round().astype(int)), side)
    except BadRecord:
        return None


def clip_strip(source: Source, row: int) -> str:
    """Data URI of frames of a record's video in a row; '' if it cannot be read."""
    frames = _some_frames(source, row, STRIP, STRIP_SIDE)
    return "" if frames is None else thumbnail(np.concatenate(list(frames), 1), STRIP * STRIP_SIDE)


def moving_picture(source: Source, row: int) -> str:
    """Data URI of a record's video as an animated WebP, a few frames of it; '' if it cannot be read."""
    frames = _some_frames(source, row, MOVING, MOVING_SIDE)
    if frames is None:
        return ""
    file = io.BytesIO()
    first, *others = (Image.fromarray(frame) for frame in frames)
    first.save(file, "WEBP", save_all=True, append_images=others, duration=MOVING_MS, loop=0, quality=60, method=0)
    return data_uri(file.getvalue(), "image/webp")


OF_VIDEOS = Payload("video", "videos", clip_strip, wide=True)


def reversed_classes(names: Sequence[str]) -> np.ndarray:
    """int (K,): of each class the one that is its reversal by name, as of 'moves left' 'moves right'; -1: none."""
    plain = [re.sub(r"[\s_-]+", " ", re.sub(r"\b(anti|counter)-", r"\1", name.lower())) for name in names]
    places = {name: i for i, name in enumerate(plain)}
    found = np.full(len(names), -1)
    for i, name in enumerate(plain):
        for one, other in OPPOSITES:
            turned = "".join(
                {one: other, other: one}.get(part, part) for part in re.split(rf"\b({one}|{other})\b", name)
            )
            if turned != name and turned in places:
                found[i] = places[turned]
    return found


def within_pair(scores: np.ndarray, labels: np.ndarray, partner: np.ndarray) -> dict[str, float]:
    """'within_pair', the share of rows whose own class scores above its reversal, and 'within_pair_error', its error.

    Ties count against it. {} where no row is of a class that has one.

    Args:
      scores: float (N, K). labels: int (N,). partner: see `reversed_classes`.
    """
    rows = np.flatnonzero(partner[labels] >= 0)
    if not len(rows):
        return {}
    own = labels[rows]
    share = float((scores[rows, own] > scores[rows, partner[own]]).mean())
    return {"within_pair": share, "within_pair_error": math.sqrt(share * (1 - share) / len(rows))}


class PairProbe(LinearProbe):
    """A `LinearProbe` with further results, those of `within_pair`."""

    @property
    def _partner(self) -> np.ndarray:
        return reversed_classes(self._train.names)

    @property
    def chance(self) -> dict[str, float]:
        """What guessing scores."""
        return super().chance | ({"within_pair": 0.5} if (self._partner >= 0).any() else {})

    def _measure(self, fitted: Fitted, test: Mapping[str, np.ndarray]) -> dict[str, float]:
        scores, labels = fitted.final.scores(0, test["embedding"]), self._test.labels[test["index"]]
        return super()._measure(fitted, test) | within_pair(scores, labels, self._partner)


class ActionRecognition(Classification):
    """Actions from several views of each video: clips x crops, whose probabilities are averaged.

    Results: those of `ClassificationMetrics` over all views, 'top1_error' and, with more than five classes,
    'top5_error', standard errors; 'top1_1x1', 'top1_<clips>x1' and 'top5_...' of fewer views: one clip is the one after
    the middle, one crop the one in the middle; and of classes that are each other's reversal by name (see
    `reversed_classes`) those of `within_pair`.

    Args:
      name, source, classes, ops, metric, on_corrupt: see `Classification`; the ops end with views, crop * clips + clip.
      embedder: gives probabilities (B, views, K).
      clips, crops: of a video.
      hint: see `ClassificationMetrics`.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        classes: ClassIndex,
        ops: str,
        embedder: Embedder,
        clips: int,
        crops: int,
        metric: str = "top1",
        on_corrupt: str = "error",
        hint: str | None = HINT,
    ):
        super().__init__(name, source, classes, ops, embedder, self._scores, metric, on_corrupt)
        self._clips, self._crops, self._hint = clips, crops, hint
        self._partner = reversed_classes(classes.first_names)
        if (self._partner >= 0).any():
            self.charts = (*self.charts, Chart(f"{name}: own class above its reversal", {"": "within_pair"}))
        self._table: list[tuple[str, ...]] = []

    def _scores(self, params: Any, features: np.ndarray) -> Any:
        views = features.reshape(len(features), self._crops, self._clips, -1)
        self._views = views
        return lambda start, stop: np.log(np.maximum(views[start:stop].mean((1, 2)), 1e-30))

    @property
    def chance(self) -> dict[str, float]:
        """What guessing scores."""
        chance = dict(super().chance)
        for name in list(chance):
            chance |= {f"{name}_{views}": chance[name] for views in self._fewer if name in ("top1", "top5")}
        return chance | ({"within_pair": 0.5} if (self._partner >= 0).any() else {})

    @property
    def _fewer(self) -> dict[str, tuple[slice, slice]]:
        """Crops and clips of the smaller numbers of views."""
        middle = slice(self._crops - 1, self._crops)  # the crops are start, end, middle
        one = slice(self._clips // 2, self._clips // 2 + 1)
        found = {"1x1": (middle, one), f"{self._clips}x1": (middle, slice(None))}
        found.pop(f"{self._clips}x{self._crops}", None)
        return found

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        context = {"classes": self._classes}
        found = self._embedder.images(params, self._source, self._ops, context, self._on_corrupt, keys=True)
        labels, score = found["label"], self._scores(params, found["embedding"])
        results = self._metrics([score(0, len(labels))], labels, found["index"], found["key"], self._hint)
        self._table = []
        further: dict[str, float] = {}
        views = {f"{self._clips}x{self._crops}": (slice(None), slice(None))}
        for name, (crops, clips) in (self._fewer | views).items():
            mean = self._views[:, crops, clips].mean((1, 2))
            own = mean[np.arange(len(labels)), labels]
            above = (mean >= own[:, None]).sum(1) - 1  # ties count against it
            values = {"top1": above < 1} | ({"top5": above < AMONG} if mean.shape[1] > AMONG else {})
            line = [name]
            for what, right in values.items():
                share = float(right.mean())
                error = math.sqrt(share * (1 - share) / len(labels))
                line.append(f"{share:.3f} ± {error:.3f}")
                further |= {f"{what}_error": error} if name in views else {f"{what}_{name}": share}
            per_class = [float(values["top1"][labels == k].mean()) for k in np.unique(labels)]
            self._table.append((*line, f"{np.mean(per_class):.3f}"))
        return results | further | within_pair(self._views.mean((1, 2)), labels, self._partner)

    def report(self) -> list[str]:
        """The table of views, then as `ClassificationMetrics`."""
        if not self._table:
            return []
        top = ["top-1", *(["top-5"] if len(self._table[0]) > 3 else [])]
        head = ("clips x crops", *(f"{name} ± standard error" for name in top), "mean per class")
        return [f"<h2>{html.escape(self.name)}: views</h2>", table_html(head, self._table), *super().report()]

    def files(self) -> dict[str, bytes]:
        """predictions.csv; with the name before it where that is not 'test'."""
        return own_files(self.name, TEST, super().files())


class TextToVideo(SourceEvaluator):
    """Retrieval of videos by texts and of texts by videos. Equal captions are one text, unless records have lists.

    Results, of the last number of frames 't2v_r@1', '@5', '@10', 't2v_median_rank', 't2v_mean_rank' and the same of
    'v2t', ranks from 1; of the other numbers the same with '_<n>frames'. Ties count against the query.

    Args:
      name: prefix of the results.
      source: videos with "caption" or "captions".
      ops: number of frames -> ops that leave so many of them.
      embedder: of videos and texts.
      dual_softmax: also 'dual_softmax_t2v_r@k': similarities weighted by their softmax over all queries of the test,
        which a search in use does not have. It is a number of its own, never the headline.
      on_corrupt: 'skip' or 'error'.

    Raises:
      UserError: if no record has a caption.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        ops: Mapping[int, str],
        embedder: Embedder,
        dual_softmax: bool = False,
        on_corrupt: str = "skip",
    ):
        super().__init__(name, source)
        self._embedder, self._on_corrupt = embedder, on_corrupt
        self.charts = (Chart(f"{name}: recall@1", {"text to video": "t2v_r@1", "video to text": "v2t_r@1"}),)
        self._ops, self._dual = dict(ops), dual_softmax
        self._texts, self._text_ids, self._video_ids = _captions(source)

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        texts = self._embedder.texts(params, self._texts, f"{self.name} captions")
        further: dict[str, float] = {}
        table: list[tuple[str, ...]] = []
        for frames, ops in self._ops.items():
            found = self._embedder.images(params, self._source, f"{ops}|keep(video)", {}, self._on_corrupt)
            videos, ids = found["embedding"], self._video_ids[found["index"]]
            there = np.isin(self._text_ids, ids)
            results = self._measured(videos, texts[there], ids, self._text_ids[there])
            table.append((str(frames), *map(show_number, results.values())))
            further |= (
                {f"{name}_{frames}frames": value for name, value in results.items()} if len(self._ops) > 1 else {}
            )
        chance = retrieval_chance(ids, self._text_ids[there])
        self._chance = {name.replace("i2t", "v2t").replace("t2i", "t2v"): value for name, value in chance.items()}
        head = f"<h2>{html.escape(self.name)}: frames of each video</h2>"
        self._report = [head, table_html(("frames", *results), table), self._grid(videos, found["index"], texts)]
        return results | further | image_counts(self._source, found["index"], OF_VIDEOS.plural)

    def _measured(
        self, videos: np.ndarray, texts: np.ndarray, video_ids: np.ndarray, text_ids: np.ndarray
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        ways = {"t2v": (texts, videos, text_ids, video_ids), "v2t": (videos, texts, video_ids, text_ids)}
        for way, arguments in ways.items():
            ranks = positive_ranks(*arguments)
            found |= recalls(ranks, f"{way}_")
            found |= {f"{way}_median_rank": float(np.median(ranks + 1)), f"{way}_mean_rank": float(ranks.mean() + 1)}
        if self._dual:
            found |= recalls(dual_softmax_ranks(texts, videos, text_ids, video_ids), "dual_softmax_t2v_")
        return found

    def _grid(self, videos: np.ndarray, index: np.ndarray, texts: np.ndarray) -> str:
        """Some texts with the videos that are nearest, as moving pictures."""
        queries = np.flatnonzero(np.isin(self._text_ids, self._video_ids[index]))
        queries = queries[np.linspace(0, len(queries) - 1, min(SHOWN_QUERIES, len(queries))).astype(int)]
        lines = []
        for query in queries:
            cosines = videos @ texts[query]
            nearest = np.argsort(-cosines, kind="stable")[:SHOWN_ANSWERS]
            answers = [
                GridCell(
                    "",
                    moving_picture(self._source, int(index[j])) or None,
                    bool(self._video_ids[index[j]] == self._text_ids[query]),
                    f"{cosines[j]:.2f}",
                )
                for j in nearest
            ]
            lines.append((GridCell(self._texts[query], None, True), answers))
        return matches_html(f"{self.name}: text to video", lines)


def _captions(source: Source) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(T texts, int (T,) their ids, int (N,) ids of the records): a text is right for a record if the ids are equal.

    Raises:
      UserError: for a record without a caption.
    """
    given = [row.get("captions") or row.get("caption") for row in source.metadata()]
    if not given or not all(given):
        raise UserError(f"{source.name}: every record needs a caption, in its field 'caption' or 'captions'")
    if any(isinstance(texts, list) for texts in given):
        lists = [list(texts) if isinstance(texts, list) else [str(texts)] for texts in given]
        flat, owners = [text for texts in lists for text in texts], [len(texts) for texts in lists]
        return flat, np.repeat(np.arange(len(lists)), owners), np.arange(len(lists))
    plain = [normalise_caption(str(text)) for text in given]
    number = {text: i for i, text in enumerate(dict.fromkeys(plain))}
    return list(number), np.arange(len(number)), np.array([number[text] for text in plain])


def dual_softmax_ranks(
    queries: np.ndarray, targets: np.ndarray, query_ids: np.ndarray, target_ids: np.ndarray, temperature: float = 100.0
) -> np.ndarray:
    """As `positive_ranks`, of similarities times their softmax over all queries (Cheng et al. 2021)."""
    similarity = temperature * (queries @ targets.T)
    similarity = similarity * softmax(similarity.T).T
    return positive_places(similarity, query_ids[:, None] == target_ids[None, :])
