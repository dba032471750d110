"""Zero-shot detection: classes of proposals by name, scored as COCO does, beside chance and the ceiling."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from florence_jax.data.buckets import Bucket
from florence_jax.data.sources.boxes import BoxSource
from florence_jax.data.tokenizers import Tokenizer
from florence_jax.evaluators.base import Chart
from florence_jax.evaluators.coco import CocoEvaluator
from florence_jax.evaluators.coco_files import NAMED, FoundBoxes, GroundTruth
from florence_jax.evaluators.coco_scores import ALL_SIZES, coco_data, coco_eval
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.zero_shot import class_embeddings
from florence_jax.page import table_html

TEXTS_AT_ONCE = 256  # prompts
DRAWS = 3  # of classes at random
MOST_TRUE = 100  # true boxes of a picture that are classified
CHANCES = tuple(f"chance{draw}_" for draw in range(DRAWS))
HOST_FIELDS = "truth, warp"


def class_inputs(
    embedder: Embedder, params: Any, names: Sequence[Sequence[str]], templates: Sequence[str]
) -> dict[str, np.ndarray]:
    """What a zero-shot detector takes for K classes, with room for the next power of two: few sizes are compiled.

    Args:
      embedder, params: of the towers.
      names, templates: see `zero_shot.class_embeddings`.

    Returns:
      "classes" float32 (room, D), unit vectors or 0, and "known" bool (room,), False where there is no class.
    """
    vectors = class_embeddings(embedder, params, names, templates)
    room = 1 << (len(vectors) - 1).bit_length()
    padded = np.pad(vectors, ((0, room - len(vectors)), (0, 0)))
    return {"classes": padded, "known": np.arange(room) < len(vectors)}


def name_problems(names: Sequence[Sequence[str]], tokenizer: Tokenizer) -> list[str]:
    """Sentences about names that the model cannot tell apart: those whose tokens are the same."""
    flat = [(name, k) for k, group in enumerate(names) for name in group]
    rows = tokenizer.encode_batch([name for name, _ in flat])
    alike: dict[bytes, list[int]] = {}
    for place, row in enumerate(np.asarray(rows)):
        alike.setdefault(row.tobytes(), []).append(place)
    pairs = [found for found in alike.values() if len({flat[place][1] for place in found}) > 1]
    if not pairs:
        return []
    said = "; ".join(" and ".join(repr(flat[place][0]) for place in found) for found in pairs[:NAMED])
    more = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    return [f"names of different classes that are the same to the model, which finds both or none: {said}{more}"]


class ZeroShotDetection(CocoEvaluator):
    """Average precision of a detector that is told the names of classes.

    Results: those of `CocoEvaluator`, and 'chance_AP50', what the same proposals score with classes drawn at random
    (mean of three draws), with 'chance_AP50_deviation'; 'true_boxes_AP50', what the classifier scores where the
    proposals are the true boxes, its ceiling, and 'true_boxes_top1', the share of them whose likeliest class is right;
    'proposals_AR100', the mean recall over IoU .50 to .95 of the first 100 proposals of a picture, whatever the class.

    Args:
      source, ops, buckets, mesh, batch_size, name, on_corrupt: see `CocoEvaluator`.
      judge: pure function (params, batch) as `tasks.zero_shot_detector.ZeroShotDetector.judge` with `DRAWS` draws.
      labels: K names of classes, as the test set has them.
      names: what goes into the prompts for each, one or more.
      templates: prompts with one '{}' each.
      embedder: of the towers' texts.
      tokenizer: of the texts.
    """

    answers = {"": True, "true_": True, "proposal_": False} | dict.fromkeys(CHANCES, True)

    def __init__(
        self,
        source: BoxSource,
        ops: str,
        buckets: Sequence[Bucket],
        judge: Callable[[Any, dict[str, jax.Array]], Mapping[str, jax.Array]],
        mesh: Mesh,
        batch_size: int,
        labels: Sequence[str],
        names: Sequence[Sequence[str]],
        templates: Sequence[str],
        embedder: Embedder,
        tokenizer: Tokenizer,
        name: str = "test",
        on_corrupt: str = "error",
    ):
        super().__init__(source, ops, buckets, judge, mesh, batch_size, labels, name, (), on_corrupt)
        self.charts = (*self.charts, Chart(f"{name}: AP50", {"": "AP50", "chance": "chance_AP50"}))
        self._names, self._templates, self._embedder = tuple(names), tuple(templates), embedder
        each = np.bincount(self._stated.image, minlength=1)
        room = int(min(max(each.max(), 1), MOST_TRUE))
        self._ops = f"{ops}|pad_boxes({room})|keep(image, valid, boxes, class_ids, objects, {HOST_FIELDS})"
        said = name_problems(names, tokenizer)
        if cut := int(np.maximum(each - room, 0).sum()):
            said.append(f"of pictures with more than {room} boxes {cut:,} are not in 'true_boxes_AP50'")
        if said and jax.process_index() == 0:
            print("\n".join(f"{name}: {note}" for note in said), flush=True)
        self.notes += said
        self._right: list[np.ndarray] = []
        self._compared: dict[str, float] = {}

    @property
    def chance(self) -> Mapping[str, float]:
        """What classes at random score: AP50 of the last run."""
        guess = {"true_boxes_top1": 1 / len(self._names)}
        return guess | ({"AP50": self._compared["chance_AP50"]} if self._compared else {})

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        self._right = []
        inputs = class_inputs(self._embedder, params["towers"], self._names, self._templates)
        return super().run(params | inputs)

    def _see(self, row: Mapping[str, Any]) -> None:
        objects = row["true_objects"]
        self._right.append(self._class_of[row["true_best"][objects]] == row["true_class_ids"][objects])

    def _judge(self, truth: GroundTruth, found: Mapping[str, FoundBoxes]) -> dict[str, float]:
        results = super()._judge(truth, found)
        if "AP50" not in results:  # no true boxes
            return results
        draws = [ap50(truth, found[word]) for word in CHANCES]
        right = np.concatenate(self._right)
        self._compared = {
            "chance_AP50": float(np.mean(draws)),
            "chance_AP50_deviation": float(np.std(draws, ddof=1)),
            "true_boxes_AP50": ap50(truth, found["true_"]),
            "true_boxes_top1": float(right.mean()) if len(right) else 0.0,
            "proposals_AR100": recall_of_boxes(truth, found["proposal_"]),
        }
        return results | self._compared

    def report(self) -> list[str]:
        """What bounds the numbers, then as `CocoEvaluator`."""
        fragments = super().report()
        if not self._compared or self._scores is None:
            return fragments
        rows = [
            ("zero-shot", self._scores.values["AP50"], "the names of classes, on the proposals"),
            (
                "chance",
                self._compared["chance_AP50"],
                f"classes at random on the same proposals, mean of {DRAWS} draws",
            ),
            ("ceiling", self._compared["true_boxes_AP50"], "the names of classes, on the true boxes"),
        ]
        recall, top1 = self._compared["proposals_AR100"], self._compared["true_boxes_top1"]
        said = (
            f"<p>Proposals: average recall {recall:.3f} with 100 a picture, whatever the class. Of the true boxes "
            f"{top1:.3f} have the right class as the likeliest.</p>"
        )
        title = f"<h2>{html.escape(self.name)}: what bounds zero-shot detection</h2>"
        return [f"{title}{table_html(('', 'AP50', 'meaning'), rows)}{said}", *fragments]


def ap50(truth: GroundTruth, found: FoundBoxes) -> float:
    """AP at IoU .5, mean over the classes with boxes, of boxes of any size."""
    there = [truth.category_ids[k] for k in np.unique(truth.labels).tolist()]
    result = coco_eval(coco_data(truth, found), catIds=there, iouThrs=np.array([0.5]), **ALL_SIZES)
    precision = result.eval["precision"][..., 0, -1]
    some = precision[precision > -1]
    return float(some.mean()) if len(some) else 0.0


def recall_of_boxes(truth: GroundTruth, found: FoundBoxes, most: int = 100) -> float:
    """Mean recall over IoU .50 to .95 of the first boxes of each picture, whatever their classes."""
    result = coco_eval(coco_data(truth, found), useCats=0, maxDets=[most], **ALL_SIZES)
    recall = result.eval["recall"]
    some = recall[recall > -1]
    return float(some.mean()) if len(some) else 0.0
