"""Boxes in people's own pictures, for `florence_jax.predict`."""

import argparse
from collections.abc import Iterator

import numpy as np

from florence_jax.data.ops.image import Decode
from florence_jax.data.records import Record, Source
from florence_jax.evaluators.predictor import Predictor
from florence_jax.inference.base import Answerer, Found
from florence_jax.params.sharding import make_mesh
from florence_jax.pictures import draw_boxes, picture_uri
from florence_jax.tasks.encoder import Encoder
from toy_detector.detector import DETECTOR, Detector
from toy_detector.evaluator import best_boxes


class ToyAnswerer(Answerer):
    """See `inference.base.Answerer`: a line for each box, perhaps none for a picture."""

    columns = ("x1", "y1", "x2", "y2", "score")

    def __init__(self, init: str, least: float, batch_size: int):
        self._detector, self._least = Detector(Encoder(init)), least
        mesh = make_mesh(-1, 1)
        self._params = self._detector.load_on(mesh)
        self._predictor = Predictor(self._detector.detect, mesh, batch_size)
        side = self._detector.encoder.description.parts[DETECTOR]["side"]
        self._ops = f"decode|resize_long({side})|pad_image({side})|keep(image, valid, key, warp)"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Adds the least score."""
        parser.add_argument("--least", type=float, default=0.5, help="score from which on a box is told")

    @classmethod
    def open(cls, init: str, args: argparse.Namespace) -> "ToyAnswerer":
        """Loads the weights."""
        return cls(init, args.least, args.batch_size)

    def answers(self, source: Source) -> Iterator[Found]:
        """Of every readable record, in order."""
        host = ("key", "warp")
        for row in self._predictor.rows(self._params, source, self._ops, {}, host=host, on_corrupt="skip"):
            found = best_boxes(row, self._least)
            values = np.column_stack([found.boxes.round(1), found.scores.round(4)]).tolist()
            rows = [dict(zip(self.columns, line, strict=True)) for line in values]
            yield Found(row["index"], row["key"], rows, f"{len(rows)} boxes")

    def picture(self, record: Record, found: Found) -> str:
        """The picture with its boxes."""
        image = Decode()(record, np.random.default_rng(0))["image"]
        boxes = [[row[name] for name in self.columns[:4]] for row in found.rows]
        texts = [f"{row['score']:.2f}" for row in found.rows]
        return picture_uri(draw_boxes(image, boxes, texts, ["#d1495b"] * len(boxes), side=160))
