"""How many of the boxes are found: numbers, a chart, pictures, and a file with the records' own ids."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from florence_jax.boxes import iou
from florence_jax.data.buckets import Bucket
from florence_jax.data.ops.geometry import boxes_to_source
from florence_jax.data.ops.image import Decode
from florence_jax.data.records import Source
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.predictor import Predictor
from florence_jax.page import figure_html
from florence_jax.pictures import draw_boxes, picture_uri

PAGE_EXAMPLES = 6  # pictures of the page
# Stay on the host: a string, the true boxes, which are ragged, and the way back to the source picture.
HOST = ("picture_id", "boxes", "warp")


class Detections(NamedTuple):
    """What was found in a picture, best first: boxes float64 (K, 4) in its own pixels, scores (K,)."""

    boxes: np.ndarray
    scores: np.ndarray


def best_boxes(row: Any, least: float = 0.5, most_overlap: float = 0.4) -> Detections:
    """The cells' answers without those that say the same as a better one (greedy non-maximum suppression).

    Args:
      row: of a `Predictor`: "found" (N, 4) and "scores" (N,) of the cells, "warp".
      least: score. most_overlap: IoU of two boxes that are both kept.
    """
    order = np.argsort(-row["scores"], kind="stable")
    order = order[row["scores"][order] >= least]
    kept: list[int] = []
    for place in order.tolist():
        if not kept or iou(row["found"][kept], row["found"][place][None]).max() <= most_overlap:
            kept.append(place)
    return Detections(boxes_to_source(row["found"][kept], row["warp"]), row["scores"][kept])


class BoxRecall(Evaluator):
    """Share of the true boxes that are found.

    Args:
      source: N records with boxes and a "picture_id". ops: up to `pad_image`. buckets: of the source.
      detect: see `Detector.detect`.
      mesh, batch_size: see `Predictor`.
    """

    name = "test"
    charts = (Chart("boxes found", {"recall at IoU 0.5": "recall", "mean IoU": "iou"}),)

    def __init__(
        self,
        source: Source,
        ops: str,
        buckets: Sequence[Bucket],
        detect: Callable[[Any, dict[str, jax.Array]], Mapping[str, jax.Array]],
        mesh: Mesh,
        batch_size: int,
    ):
        self._source, self._buckets = source, buckets
        self._ops = f"{ops}|keep(image, valid, {', '.join(HOST)})"
        self._predictor = Predictor(detect, mesh, batch_size)
        self._found: list[dict[str, Any]] = []

    def run(self, params: Any) -> dict[str, float]:
        """'recall' at IoU 0.5, the mean 'iou' of each true box with the best one found, and the number of 'boxes'."""
        self._found, ious = [], [np.zeros(0)]
        rows = self._predictor.rows(params, self._source, self._ops, {}, host=HOST, buckets=self._buckets)
        for row in rows:
            found, true = best_boxes(row), boxes_to_source(row["boxes"], row["warp"])
            ious.append(iou(true[:, None], found.boxes[None]).max(1, initial=0.0))
            boxes, scores = found.boxes.round(1).tolist(), found.scores.round(4).tolist()
            self._found.append({"id": row["picture_id"], "boxes": boxes, "scores": scores})
        best = np.concatenate(ious)
        count = max(len(best), 1)
        return {"recall": float((best >= 0.5).sum() / count), "iou": float(best.sum() / count), "boxes": len(best)}

    def report(self) -> list[str]:
        """The first pictures, true boxes green, found ones red."""
        figures = []
        for index, found in enumerate(self._found[:PAGE_EXAMPLES]):
            record = self._source[index]
            image, true = Decode()(record, np.random.default_rng(0))["image"], record["boxes"]
            texts = [""] * len(true) + [f"{score:.2f}" for score in found["scores"]]
            colours = ["#3a7d44"] * len(true) + ["#d1495b"] * len(found["boxes"])
            drawn = draw_boxes(image, [*true, *found["boxes"]], texts, colours, side=160)
            figures.append(figure_html([picture_uri(drawn)], found["id"]))
        return ["<h2>Boxes: true (green), found (red)</h2>", f'<div class="tiles">{"".join(figures)}</div>']

    def files(self) -> Mapping[str, bytes]:
        """predictions.json: what was found in each picture, in the order of the source."""
        return {"predictions.json": json.dumps(self._found, indent=1).encode()}
