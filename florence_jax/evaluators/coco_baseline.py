"""What a detector scores that has not looked at the pictures: the mean boxes of the training set."""

import itertools
from collections.abc import Sequence

import numpy as np

from florence_jax.data.box_classes import match_classes
from florence_jax.data.records import Record, sample_of
from florence_jax.data.sources.boxes import BoxSource
from florence_jax.evaluators.coco_check import sample_rows
from florence_jax.evaluators.coco_files import FoundBoxes, GroundTruth, found_boxes
from florence_jax.evaluators.coco_scores import coco_scores

TRAINING_PICTURES = 500  # that the mean boxes are of, at most
MOST_FOUND = 100  # boxes of a picture
BASELINE_METRICS = ("AP", "AP50", "AP75", "agnostic_AP50")


def mean_boxes(
    sources: Sequence[BoxSource], class_names: Sequence[str], count: int = TRAINING_PICTURES
) -> tuple[np.ndarray, np.ndarray]:
    """The mean box of each class, in shares of the picture, and the class's share of all boxes.

    Args:
      sources: of the training, with `class_names` of their own.
      class_names: K wanted classes.
      count: pictures that are looked at, spread over each source, all sources together: the cost is bounded.

    Returns:
      float64 (K, 4), x1, y1, x2, y2 from 0 to 1, and float64 (K,); both 0 for classes without boxes. Crowds and groups
      do not count.
    """
    sums, counts = np.zeros((len(class_names), 4)), np.zeros(len(class_names), np.int64)
    for source in sources:
        place = match_classes(source.class_names, class_names)
        for record in sample_of(source, max(count // len(sources), 1)):
            boxes, labels = _shares(record)
            labels = place[labels]
            known = labels >= 0
            np.add.at(sums, labels[known], boxes[known])
            counts += np.bincount(labels[known], minlength=len(counts))
    return sums / np.maximum(counts, 1)[:, None], counts / max(counts.sum(), 1)


def _shares(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of a record in shares of its picture (n, 4), and their classes (n,); without crowds and groups."""
    boxes = np.asarray(record["boxes"], np.float64).reshape(-1, 4)
    whole = ~(np.asarray(record["iscrowd"], bool) | np.asarray(record["is_group_of"], bool))
    size = np.tile([record["width"], record["height"]], 2)
    labels = np.asarray(record["class_ids"], np.int64)
    return (boxes / size)[whole], labels[whole]


def mean_box_scores(truth: GroundTruth, sources: Sequence[BoxSource]) -> dict[str, float]:
    """BASELINE_METRICS of a detector that finds in every picture the mean box of each class, scored by its frequency.

    The 100 most frequent classes, on the pictures of `coco_check.sample_rows`.

    Args:
      truth: of the test set. sources: of the training.
    """
    truth = truth.subset(sample_rows(len(truth.keys), len(truth.class_names)))
    boxes, shares = mean_boxes(sources, truth.class_names)
    classes = np.argsort(-shares, kind="stable")[:MOST_FOUND]
    found = found_everywhere(truth, classes[shares[classes] > 0], boxes, shares)
    values = coco_scores(truth, found, by_size=False).values
    return {name: values[name] for name in BASELINE_METRICS if name in values}


def found_everywhere(truth: GroundTruth, classes: np.ndarray, boxes: np.ndarray, scores: np.ndarray) -> FoundBoxes:
    """The box (K, 4), in shares of a picture, of each of some classes in every picture, with the class's score."""
    pairs = np.array(list(itertools.product(range(len(truth.keys)), classes.tolist())), np.int64).reshape(-1, 2)
    image, labels = pairs.T
    return found_boxes(image, labels, boxes[labels] * np.tile(truth.sizes[image], 2), scores[labels], truth)
