"""What COCO's format says of a test set and of what was found in it: columns of numbers, and the two files.

Boxes are x, y, width, height of the upright source picture here, as in the files; elsewhere x1, y1, x2, y2.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from florence_jax.data.box_classes import NO_CLASSES, class_sets_of, is_exhaustive, judged_classes
from florence_jax.data.records import Record, Source, WithCopy
from florence_jax.data.sources.boxes import BoxSource
from florence_jax.errors import UserError

BOX_DIGITS, SCORE_DIGITS = 3, 7  # decimals in the files: float32 numbers of usual sizes have no more
NAMED = 5  # at most so many ids, or names, in a message


@dataclasses.dataclass(frozen=True, eq=False)
class GroundTruth:
    """The true boxes of N pictures; M boxes, K classes.

    Attributes:
      keys: of the records. image_ids: as the source has them, whole numbers or texts.
      sizes: int32 (N, 2), width and height.
      class_names, category_ids: of the K classes, the ids as the source has them.
      image: int32 (M,), rows of the pictures, ascending. labels: int32 (M,), classes by number.
      boxes: float64 (M, 4), x, y, width, height.
      crowd: bool (M,), regions of several objects: what is found in them counts neither way.
      areas: float64 (M,), by which a box is small, medium or large: those of the file, of masks in COCO's.
      judged: bool (N, K), which classes people looked for; what is found of others counts neither way. None: all.
      frequencies: K letters, see `BoxSource`; () for none.
    """

    keys: tuple[str, ...]
    image_ids: tuple[int | str, ...]
    sizes: np.ndarray
    class_names: tuple[str, ...]
    category_ids: tuple[Any, ...]
    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    judged: np.ndarray | None = None
    frequencies: tuple[str, ...] = ()

    def subset(self, rows: np.ndarray) -> "GroundTruth":
        """Of some pictures; `rows` ascending."""
        place = np.full(len(self.keys), -1, np.int32)
        place[rows] = np.arange(len(rows))
        chosen = place[self.image] >= 0
        columns = {name: getattr(self, name)[chosen] for name in ("labels", "boxes", "crowd", "areas")}
        return dataclasses.replace(
            self,
            keys=tuple(self.keys[i] for i in rows.tolist()),
            image_ids=tuple(self.image_ids[i] for i in rows.tolist()),
            sizes=self.sizes[rows],
            image=place[self.image][chosen],
            judged=None if self.judged is None else self.judged[rows],
            **columns,
        )

    def counts(self) -> np.ndarray:
        """int64 (K,): boxes of each class, without crowds."""
        return np.bincount(self.labels[~self.crowd], minlength=len(self.class_names))

    def dataset(self) -> dict[str, Any]:
        """In COCO's format. Ids of boxes begin with 1: pycocotools takes a match with box 0 for none."""
        images = [
            {"id": image_id, "file_name": key, "width": width, "height": height}
            for image_id, key, (width, height) in zip(self.image_ids, self.keys, self.sizes.tolist(), strict=True)
        ]
        columns = zip(
            self.image.tolist(),
            self.labels.tolist(),
            self.boxes.round(BOX_DIGITS).tolist(),
            self.areas.round(BOX_DIGITS).tolist(),
            self.crowd.tolist(),
            strict=True,
        )
        annotations = [
            {
                "id": number,
                "image_id": self.image_ids[row],
                "category_id": self.category_ids[label],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (row, label, box, area, crowd) in enumerate(columns, 1)
        ]
        names = zip(self.category_ids, self.class_names, strict=True)
        categories = [{"id": category_id, "name": name} for category_id, name in names]
        return {"images": images, "annotations": annotations, "categories": categories}


def make_truth(records: Iterable[Record], source: BoxSource) -> GroundTruth:
    """The boxes of records of a source. Groups ("is_group_of") are crowds.

    Where only some objects of a class have boxes, the rest of the picture is a crowd of it: what is found beside those
    counts neither way, as LVIS has it.

    Raises:
      UserError: for ids of pictures that are not unique or of two kinds.
    """
    keys, image_ids, sizes, parts = [], [], [], []
    class_sets, judged = None if is_exhaustive(source) else class_sets_of(source), []
    for row, record in enumerate(records):
        keys.append(str(record["key"]))
        image_ids.append(record["image_id"])
        sizes.append((record["width"], record["height"]))
        parts.append(_boxes_of(record, row))
        if class_sets is not None:
            judged.append(judged_classes(record, class_sets))
            judged[-1][np.asarray(record["not_exhaustive_ids"], np.int32)] = True
    _check_ids(source.name, image_ids)
    image, labels, boxes, crowd, areas = map(np.concatenate, zip(*parts, strict=True))
    return GroundTruth(
        keys=tuple(keys),
        image_ids=tuple(image_ids),
        sizes=np.array(sizes, np.int32),
        class_names=tuple(source.class_names),
        category_ids=tuple(source.category_ids),
        image=image,
        labels=labels,
        boxes=boxes,
        crowd=crowd,
        areas=areas,
        judged=None if class_sets is None else np.stack(judged),
        frequencies=tuple(getattr(source, "frequencies", ())),
    )


def _boxes_of(record: Record, row: int) -> tuple[np.ndarray, ...]:
    """Image, labels, boxes, crowd and areas of the boxes of a record."""
    boxes = np.array(record["boxes"], np.float64).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    crowd = np.asarray(record["iscrowd"], bool) | np.asarray(record["is_group_of"], bool)
    labels, areas = np.asarray(record["class_ids"], np.int32), np.asarray(record["areas"], np.float64)
    partly = np.asarray(record.get("not_exhaustive_ids", NO_CLASSES), np.int32)
    if len(partly):
        whole = np.tile([[0.0, 0.0, record["width"], record["height"]]], (len(partly), 1))
        boxes, labels = np.concatenate([boxes, whole]), np.concatenate([labels, partly])
        crowd = np.concatenate([crowd, np.ones(len(partly), bool)])
        areas = np.concatenate([areas, whole[:, 2:].prod(1)])
    return np.full(len(boxes), row, np.int32), labels, boxes, crowd, areas


# What is true of a picture is what its record says: the metadata may be of one that is turned, or of another size.
TRUE_FIELDS = (
    *("key", "image_id", "width", "height", "boxes", "class_ids", "iscrowd", "is_group_of", "areas"),
    *("exhaustive", "negative_ids", "not_exhaustive_ids", "set_index"),  # where a record has them
)


def with_truth(source: Source) -> WithCopy:
    """A source of pictures with boxes whose records also have "truth": a copy of `TRUE_FIELDS`, which no op moves."""
    return WithCopy(source, "truth", TRUE_FIELDS)


def _check_ids(name: str, image_ids: Sequence[Any]) -> None:
    if len({isinstance(image_id, str) for image_id in image_ids}) > 1:
        raise UserError(f"{name}: some ids of pictures are numbers and some are texts: give them one kind")
    if len(set(image_ids)) < len(image_ids):
        twice = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
        raise UserError(
            f"{name}: {len(twice)} ids belong to several pictures, such as {', '.join(map(str, twice[:NAMED]))}: "
            "results could not be told apart, give each picture its own"
        )


class FoundBoxes(NamedTuple):
    """D boxes that were found, as the result file has them.

    Attributes:
      image: int32 (D,), rows of the pictures in the ground truth. labels: int32 (D,), classes of the ground truth.
      boxes: float64 (D, 4), x, y, width, height. scores: float64 (D,).
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def rows(self, truth: GroundTruth) -> Iterator[dict[str, Any]]:
        """In COCO's format; written as JSON and read again they are the same to the last bit."""
        columns = (self.image.tolist(), self.labels.tolist(), self.boxes.tolist(), self.scores.tolist())
        for row, label, box, score in zip(*columns, strict=True):
            ids = {"image_id": truth.image_ids[row], "category_id": truth.category_ids[label]}
            yield {**ids, "bbox": box, "score": score}

    def subset(self, chosen: np.ndarray) -> "FoundBoxes":
        """Some of them; `chosen`: a mask or numbers."""
        return FoundBoxes(*(column[chosen] for column in self))


def found_boxes(
    image: np.ndarray, labels: np.ndarray, corners: np.ndarray, scores: np.ndarray, truth: GroundTruth
) -> FoundBoxes:
    """What was found, as it goes into the file: clipped to the pictures, rounded, without what is then empty.

    What is found of classes that nobody looked for in the picture is left out.

    Args:
      image, labels: int (D,), as in `FoundBoxes`.
      corners: (D, 4), x1, y1, x2, y2 in pixels of the source pictures.
      scores: (D,).
    """
    low, high = np.zeros(2), truth.sizes[image].astype(np.float64)
    corners = np.asarray(corners, np.float64).reshape(-1, 2, 2).clip(low, high[:, None]).round(BOX_DIGITS)
    boxes = np.concatenate([corners[:, 0], (corners[:, 1] - corners[:, 0]).round(BOX_DIGITS)], axis=1)
    scores = np.asarray(scores, np.float64).round(SCORE_DIGITS)
    found = FoundBoxes(np.asarray(image, np.int32), np.asarray(labels, np.int32), boxes, scores)
    there = boxes[:, 2:].min(axis=1, initial=1) > 0
    if truth.judged is not None:
        there &= truth.judged[found.image, found.labels]
    return found.subset(np.flatnonzero(there))


def json_bytes(value: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> bytes:
    """A JSON object, or a list with an item a line."""
    if isinstance(value, Mapping):
        return json.dumps(value).encode()
    return ("[" + ",\n".join(map(json.dumps, value)) + "]\n").encode()
