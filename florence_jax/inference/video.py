"""Actions in videos, for `florence_jax.predict` and `Florence`; videos as vectors."""

import argparse
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from florence_jax.data.records import BaseSource, Record, Source, without_payloads
from florence_jax.data.sources.video import open_clips
from florence_jax.data.videos import open_video
from florence_jax.errors import UserError
from florence_jax.evaluators.predictor import Predictor
from florence_jax.evaluators.video import clip_strip
from florence_jax.inference.base import SHOWN_CLASSES, Answerer, Found, best_classes
from florence_jax.page import Html, share_bar, table_html
from florence_jax.params.sharding import make_mesh
from florence_jax.tasks.encoder import Encoder
from florence_jax.tasks.video_tower import LOOKED_BY, VIDEO_HEAD, VideoTower

EMBEDDED_FRAMES = 8  # of a video, by the image tower
SHOWN_SPANS = 20  # stretches of one action on the page, of each video
LONG_VIDEO = 2.0  # times as long as a clip, from which on a video is told second by second


class Parts(BaseSource):
    """Records at hand, such as parts of one video, each with a "clip" (start, stop) in seconds."""

    def __init__(self, name: str, records: Sequence[Record]):
        self.name, self._records = name, list(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def metadata(self) -> Iterator[Record]:
        """All records; no video is touched."""
        return map(without_payloads, self._records)


class VideoReader:
    """The video tower of a folder, and its classifier of actions where it has one, on all devices.

    Args:
      encoder: the folder's towers.
      batch_size: most videos a call.
      towers: their parameters, where they are at hand; else they are loaded when they are needed.

    Attributes:
      tower: see `VideoTower`.
    """

    def __init__(self, encoder: Encoder, batch_size: int, towers: Any = None):
        self.tower = VideoTower(encoder)
        self._mesh, self._batch_size, self._towers = make_mesh(-1, 1), batch_size, towers
        self._predictors: dict[tuple[str, int], Predictor] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the actions. Raises UserError for a folder without a classifier of them."""
        if VIDEO_HEAD not in self.tower.encoder.description.parts:
            folder = self.tower.encoder.description.folder
            raise UserError(f"{folder} holds no classifier of actions: train one with configs/video.py")
        return self.tower.classes

    def rows(self, what: str, source: Source, ops: str, on_corrupt: str = "skip") -> Iterator[tuple[int, np.ndarray]]:
        """(row of the source, what `VideoTower.predict` has by that name) of every readable video, in order."""
        size = min(self._batch_size, 1 << max(len(source) - 1, 0).bit_length())
        if (what, size) not in self._predictors:
            function = self.tower.predict[what]
            self._predictors[what, size] = Predictor(lambda p, b: {"out": function(p, b)}, self._mesh, size)
        if what == "frames":
            self._towers = self._towers or self.tower.encoder.load_on(self._mesh)
        params = self._towers if what == "frames" else self._video_params
        kept = f"{ops}|keep(video)"
        for row in self._predictors[what, size].rows(params, source, kept, {}, on_corrupt=on_corrupt):
            yield row["index"], row["out"]

    @functools.cached_property
    def _video_params(self) -> Any:
        return self.tower.load_on(self._mesh)

    def probabilities(self, source: Source, on_corrupt: str = "skip") -> Iterator[tuple[int, np.ndarray]]:
        """(row, float32 (K,)) of every readable video: the mean over its views."""
        _ = self.classes
        for index, views in self.rows("views", source, self.tower.view_ops, on_corrupt):
            yield index, views.mean(0)

    def seconds(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Of a long video int (S,), its seconds, and float32 (S, K), of the clip from each on; else none."""
        with open_video(record["video"], str(record["key"])) as video:
            times = video.times()
        length = len(times)
        each = float(times[-1]) / max(length - 1, 1)
        clip = self.tower.frames * self.tower.sampling["interval"] * each
        end = float(times[-1]) + each
        if end < LONG_VIDEO * clip or end < LONG_VIDEO:
            return np.zeros(0, int), np.zeros((0, len(self.classes)), np.float32)
        starts = np.arange(max(int(end - clip), 0) + 1)
        parts = [record | {"clip": (float(start), float(start) + clip)} for start in starts]
        n, res = self.tower.frames, self.tower.encoder.model.config.res
        one = f"views(1, {n}, interval={self.tower.sampling['interval']}, short={res})"
        ops = f"{one}|resize({res}, field=video)|center_crop({res}, field=video)|split_views({n})"
        found = list(self.rows("views", Parts(str(record["key"]), parts), ops))
        return starts[[index for index, _ in found]], np.array([views[0] for _, views in found])

    def vectors(self, source: Source, frames: int | None, tower: str, on_corrupt: str) -> dict[str, np.ndarray]:
        """See `Florence.embed_video_source`."""
        if tower not in LOOKED_BY:
            raise UserError(f"tower={tower!r}: choose 'image' or 'video'")
        what = "frames" if tower == "image" else tower
        if frames is None:
            frames = self.tower.frames if tower == "video" else EMBEDDED_FRAMES
        found = list(self.rows(what, source, self.tower.frame_ops(frames), on_corrupt))
        if not found:
            raise UserError(f"none of the {len(source)} videos of {source.name} could be read")
        vectors = np.stack([vector for _, vector in found])
        return {"embedding": vectors, "index": np.array([index for index, _ in found], np.int32)}


class ActionAnswerer(Answerer):
    """See `inference.base.Answerer`: the actions of a video, and of a long one those of each second.

    Args:
      reader: of weights with a classifier of actions.
      top: classes of each video in the tables; of each second there is one.

    Raises:
      UserError: for weights without a classifier, and a top below 1.
    """

    columns = ("second", "class", "probability", "rank")
    plural = "videos"
    figures = "pair"

    def __init__(self, reader: VideoReader, top: int = 1):
        if top < 1:
            raise UserError(f"--top={top} must be at least 1")
        self._reader, self._names, self._top = reader, reader.classes, top

    @staticmethod
    def open_input(args: argparse.Namespace) -> Source:
        """See `data.sources.video.open_clips`."""
        return open_clips(args.input)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Adds the options of videos."""
        parser.add_argument("--top", type=int, default=1, help="classes of each video in the tables")

    @classmethod
    def open(cls, init: str, args: argparse.Namespace) -> "ActionAnswerer":
        """Loads the weights of the folder `init`."""
        return cls(VideoReader(Encoder(init), args.batch_size), args.top)

    def check(self, record: Record) -> None:
        """See `Answerer`."""
        with open_video(record["video"], str(record["key"])) as video:
            video.read([0])

    def answers(self, source: Source) -> Iterator[Found]:
        """Of every readable video, in order."""
        for index, row in self._reader.probabilities(source):
            record = source[index]
            best = best_classes(row, self._names, max(self._top, SHOWN_CLASSES))
            rows: list[dict[str, Any]] = [
                {"second": "", "class": name, "probability": round(value, 6), "rank": rank}
                for rank, (name, value) in enumerate(best[: self._top], 1)
            ]
            told: list[dict[str, Any]] = []
            for second, probabilities in zip(*self._reader.seconds(record), strict=True):
                ((name, value),) = best_classes(probabilities, self._names, 1)
                told.append({"second": int(second), "class": name, "probability": round(value, 6), "rank": 1})
            yield Found(index, str(record["key"]), rows + told, Html(_bars(best) + _spans(told)))

    def picture(self, record: Record, found: Found) -> str:
        """Frames of the video in a row."""
        del found
        return clip_strip(Parts("videos", [record]), 0)


def _bars(best: Sequence[tuple[str, float]]) -> str:
    return table_html(("action", "probability", ""), [(name, value, share_bar(value)) for name, value in best])


def _spans(told: Sequence[Mapping[str, Any]]) -> str:
    """Of the lines of seconds, each stretch of one action."""
    spans = []
    for name, group in itertools.groupby(told, key=lambda row: row["class"]):
        seconds = [row["second"] for row in group]
        spans.append((str(seconds[0]) if len(seconds) == 1 else f"{seconds[0]} to {seconds[-1]}", name))
    left = len(spans) - SHOWN_SPANS
    more = f"<p>{left:,} more are in predictions.csv.</p>" if left > 0 else ""
    return table_html(("second", "action"), spans[:SHOWN_SPANS]) + more
