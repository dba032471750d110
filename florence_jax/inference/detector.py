"""Boxes in pictures, by a trained detector: for `Florence.detect` and for `florence_jax.predict`."""

import argparse
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from florence_jax.data.box_classes import match_classes
from florence_jax.data.box_frames import boxes_as_stated
from florence_jax.data.buckets import Bucket, nearest_sizes
from florence_jax.data.ops.geometry import boxes_to_source
from florence_jax.data.ops.image import Decode
from florence_jax.data.prompts import TEMPLATES
from florence_jax.data.records import BadRecord, Record, Source
from florence_jax.data.sources.image_list import ImageList
from florence_jax.data.sources.picture_files import some
from florence_jax.errors import UserError
from florence_jax.evaluators.coco_files import json_bytes
from florence_jax.evaluators.predictor import Embedder, Predictor
from florence_jax.evaluators.zero_shot_detection import TEXTS_AT_ONCE, class_inputs, name_problems
from florence_jax.inference.base import Answerer, Found
from florence_jax.inference.class_names import read_names
from florence_jax.params.sharding import make_mesh
from florence_jax.pictures import Frame, draw_boxes, open_picture, picture_frame, picture_uri
from florence_jax.tasks.attributes import attributes_of_folder
from florence_jax.tasks.detector import Detector
from florence_jax.tasks.encoder import Encoder
from florence_jax.tasks.zero_shot_detector import ZeroShotDetector, ZeroShotOptions

TOLD_FROM = 0.3  # least score of a box that is told
ATTRIBUTE_FROM = 0.1  # least probability of an attribute that is
# By class, in turn.
CLASS_COLOURS = ("#d1495b", "#2e6f95", "#3a7d44", "#8f5aa8", "#b3661a", "#00798c", "#a8325e", "#5b6c1f")
FILE_SIDE, PAGE_SIDE = 1024, 320  # longer side, in pixels, of a picture with its boxes: as a file, on the page


@dataclasses.dataclass(frozen=True)
class PictureBoxes:
    """What was found in a picture, best first.

    Attributes:
      index: row of the picture in its source. key: its name. frame: of its file.
      boxes: float32 (n, 4), x1 y1 x2 y2 in pixels of the upright picture, within it.
      scores: float32 (n,). labels: int32 (n,), numbers of classes.
      best: score of the best box, also of one that is not told; 0 if there is none.
      attributes: of each box the likely ones and how likely they are; None of a detector that tells none.
    """

    index: int
    key: str
    frame: Frame
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    best: float
    attributes: list[list[tuple[str, float]]] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, upright."""
        return self.frame.size


class BoxFinder:
    """A trained detector on all devices of this process.

    Args:
      detector: of a folder of weights.
      batch_size: most pictures a call of the model.

    Attributes:
      detector. attributes: the folder's head for attributes, if it has one.
    """

    def __init__(self, detector: Detector, batch_size: int = 16):
        self.detector, self.attributes = detector, attributes_of_folder(detector)
        self._mesh, self._batch_size = make_mesh(-1, 1), batch_size
        self._params = self._load()
        part = self.detector.part
        self._sizes = [(height, width) for height, width in part["sizes"]]
        self._ops = f"{part['eval_ops']}|keep(image, valid, key, warp)"
        self._predictors: dict[int, Predictor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""
        return self.detector.classes

    @property
    def category_ids(self) -> Sequence[Any]:
        """Of the classes, in COCO's files."""
        return self.detector.part.get("category_ids") or range(1, len(self.names) + 1)

    def _load(self) -> dict[str, Any]:
        params = self.detector.load_on(self._mesh)
        return params if self.attributes is None else params | self.attributes.load_on(self._mesh)

    @property
    def _inputs(self) -> Any:
        """What `_detect` takes beside a batch."""
        return self._params

    def _detect(self, inputs: Any, batch: dict[str, jax.Array]) -> Mapping[str, jax.Array]:
        return (self.attributes or self.detector).detect(inputs, batch)

    def boxes(self, source: Source, threshold: float, top: int, on_corrupt: str = "skip") -> Iterator[PictureBoxes]:
        """What is found in each readable record, in order.

        Args:
          source: of pictures.
          threshold: least score, from 0 to 1. top: most boxes of a picture.
          on_corrupt: 'skip' or 'error'.

        Raises:
          UserError: for another threshold or top; with 'error', for a picture that cannot be read.
        """
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold={threshold} must be a score from 0 to 1")
        if top < 1:
            raise UserError(f"top={top} must be at least 1")
        buckets, frames = self._buckets(source)
        host = ("key", "warp")
        rows = self._predictor(len(source)).rows(
            self._inputs, source, self._ops, {}, host=host, buckets=buckets, on_corrupt=on_corrupt
        )
        for row in rows:
            width, height = (frame := frames[row["index"]]).size
            chosen = np.flatnonzero((row["labels"] >= 0) & (row["scores"] >= threshold))[:top]
            boxes = boxes_to_source(row["boxes"][chosen], row["warp"]).clip(0, (width, height, width, height))
            found = boxes.astype(np.float32), row["scores"][chosen], row["labels"][chosen]
            best = float(np.max(row["scores"], initial=0, where=row["labels"] >= 0))
            yield PictureBoxes(row["index"], row["key"], frame, *found, best, self._attributes_of(row, chosen))

    def _attributes_of(self, row: Mapping[str, Any], chosen: np.ndarray) -> list[list[tuple[str, float]]] | None:
        if self.attributes is None:
            return None
        names = self.attributes.names
        ids, scores = row["attribute_ids"][chosen].tolist(), row["attribute_scores"][chosen].tolist()
        return [
            [(names[k], score) for k, score in zip(*each, strict=True) if score >= ATTRIBUTE_FROM]
            for each in zip(ids, scores, strict=True)
        ]

    def _predictor(self, count: int) -> Predictor:
        """For batches of a power of two, up to the largest: few sizes are compiled."""
        size = min(self._batch_size, 1 << max(count - 1, 0).bit_length())
        if size not in self._predictors:
            self._predictors[size] = Predictor(self._detect, self._mesh, size)
        return self._predictors[size]

    def _buckets(self, source: Source) -> tuple[tuple[Bucket, ...], list[Frame]]:
        """The rows of each size, and the frame of every picture."""
        frames = [upright_frame(source, index) for index in range(len(source))]
        chosen = nearest_sizes(np.maximum([frame.size[::-1] for frame in frames], 1), self._sizes)
        buckets = (Bucket(np.flatnonzero(chosen == place), size) for place, size in enumerate(self._sizes))
        return tuple(bucket for bucket in buckets if len(bucket.rows)), frames


def upright_frame(source: Source, index: int) -> Frame:
    """The frame of a record's picture, whose pixels are not decoded; of sides 0 for one that cannot be read."""
    try:
        image = source[index]["image"]
        if isinstance(image, np.ndarray):
            height, width = image.shape[:2]
            return Frame((width, height), (width, height), 1)
        with open_picture(image) as opened:
            return picture_frame(opened)
    except Exception:  # PIL's readers raise a dozen unrelated types; op 'decode' tells which picture it is, and why
        return Frame((0, 0), (0, 0), 1)


class NamedBoxFinder(BoxFinder):
    """As `BoxFinder`, of classes that are told by name: `choose` says which.

    Args:
      encoder: of a folder with a class-agnostic detector and both towers.
      batch_size: most pictures a call of the model.

    Raises:
      UserError: for another folder.
    """

    def __init__(self, encoder: Encoder, batch_size: int = 16):
        self._zero_shot = ZeroShotDetector(encoder, ZeroShotOptions())
        super().__init__(self._zero_shot.detector, batch_size)
        self._names: tuple[tuple[str, ...], ...] = ()
        self._classes: dict[str, np.ndarray] = {}

    def choose(self, names: Sequence[str | Sequence[str]]) -> None:
        """Looks for these classes from now on.

        Args:
          names: of K classes, each a name or several that mean the same.

        Raises:
          UserError: for no names, an empty one, or one that occurs twice.
        """
        groups = check_names(names)
        if groups == self._names:
            return
        tokenizer = self._zero_shot.encoder.tokenizer
        assert tokenizer is not None, "ZeroShotDetector has checked it"
        for problem in name_problems(groups, tokenizer):
            print(problem, flush=True)  # also where warnings are turned off, as in florence_jax.predict
        embedder = Embedder({"text": self._zero_shot.encoder.predict["text"]}, tokenizer, self._mesh, TEXTS_AT_ONCE)
        templates = self._zero_shot.encoder.description.templates or TEMPLATES
        self._classes, self._names = class_inputs(embedder, self._params["towers"], groups, templates), groups

    @property
    def names(self) -> tuple[str, ...]:
        """The first of each class."""
        return tuple(group[0] for group in self._names)

    @property
    def category_ids(self) -> Sequence[Any]:
        """Of the classes, in COCO's files."""
        return range(1, len(self._names) + 1)

    @property
    def _inputs(self) -> Any:
        return self._params | self._classes

    def _load(self) -> dict[str, Any]:
        return self._zero_shot.load_on(self._mesh)

    def _detect(self, inputs: Any, batch: dict[str, jax.Array]) -> Mapping[str, jax.Array]:
        return self._zero_shot.detect(inputs, batch)


def check_names(names: Sequence[str | Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The names of each class; raises UserError for none, an empty one, or one that occurs twice."""
    if isinstance(names, str):
        raise UserError(f"names are given in a list, such as [{names!r}]")
    groups = tuple(tuple(map(str.strip, (given,) if isinstance(given, str) else given)) for given in names)
    flat = [name for group in groups for name in group]
    if not groups or not all(groups) or not all(flat):
        raise UserError(f"names={names!r}: name at least one class, and give each a name")
    if repeated := next((name for name, count in Counter(flat).items() if count > 1), ""):
        raise UserError(f"names: {repeated!r} is there twice")
    return groups


class DetectorAnswerer(Answerer):
    """See `inference.base.Answerer`: a line for each box, perhaps none for a picture.

    Args:
      finder: the detector.
      threshold, top: see `BoxFinder.boxes`.
    """

    def __init__(self, finder: BoxFinder, threshold: float = TOLD_FROM, top: int = 100):
        self.columns = ("x1", "y1", "x2", "y2", "class", "score", *["attributes"] * (finder.attributes is not None))
        self.finder, self.threshold, self.top = finder, threshold, top
        self._list: ImageList | None = None  # that the pictures are of, if any

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Adds the options of detection."""
        parser.add_argument("--threshold", type=float, default=TOLD_FROM, help="score from which on a box is told")
        parser.add_argument("--top", type=int, default=100, help="most boxes of a picture")
        named = "classes by name, of a class-agnostic detector: NAME,NAME,... or a file, a line each: NAME | SYNONYM"
        parser.add_argument("--names", default="", help=named)

    @classmethod
    def open(cls, init: str, args: argparse.Namespace) -> "DetectorAnswerer":
        """Loads the weights."""
        if not args.names:
            finder = BoxFinder(Detector(Encoder(init)), args.batch_size)
        else:
            names = read_names(args.names)  # a mistake in them is told before the weights are loaded
            finder = named = NamedBoxFinder(Encoder(init), args.batch_size)
            named.choose(names)
        return cls(finder, args.threshold, args.top)

    def answers(self, source: Source) -> Iterator[Found]:
        """Of every readable record, in order. Raises UserError for a list of pictures that names other classes."""
        self._list = source if isinstance(source, ImageList) else None
        if self._list is not None:
            listed_classes(self._list, self.finder.names)  # before all pictures are looked at
        for found in self.finder.boxes(source, self.threshold, self.top):
            names = [self.finder.names[label] for label in found.labels]
            # As doubles: a rounded float32 has a dozen digits more.
            boxes, scores = found.boxes.astype(np.float64).round(2), found.scores.astype(np.float64).round(4)
            described = [[", ".join(each)] for each in names_of_attributes(found)] or [[]] * len(names)
            rows = [
                dict(zip(self.columns, (*box, name, score, *more), strict=True))
                for box, name, score, more in zip(boxes.tolist(), names, scores.tolist(), described, strict=True)
            ]
            counts = {name: names.count(name) for name in dict.fromkeys(names)}
            text = ", ".join(f"{count} {name}" if count > 1 else name for name, count in counts.items())
            yield Found(found.index, found.key, rows, text or "nothing", found)

    def remarks(self, answers: Sequence[Found]) -> Sequence[str]:
        """Says which threshold would tell boxes, if this one tells none."""
        best = max((found.details.best for found in answers), default=0.0)
        if best >= self.threshold or not best:
            return ()
        return (
            f"no box scores {self.threshold} or more; the best has {best:.3f}: --threshold={best / 2:.2g} tells more",
        )

    def picture(self, record: Record, found: Found) -> str:
        """The picture with its boxes."""
        drawn = self._drawn(record, found, PAGE_SIDE)
        return "" if drawn is None else picture_uri(drawn)

    def picture_file(self, record: Record, found: Found) -> bytes | None:
        """The picture with its boxes, a JPEG."""
        drawn = self._drawn(record, found, min(FILE_SIDE, max(PAGE_SIDE, *found.details.size)))
        if drawn is None:
            return None
        file = io.BytesIO()
        drawn.save(file, "JPEG", quality=90)
        return file.getvalue()

    def _drawn(self, record: Record, found: Found, side: int) -> Image.Image | None:
        """None for a picture that cannot be read."""
        try:
            image = np.asarray(Decode()(record, np.random.default_rng(0))["image"])
        except BadRecord:
            return None
        boxes, labels, names = found.details.boxes, found.details.labels, self.finder.names
        texts = [f"{names[label]} {score:.2f}" for label, score in zip(labels, found.details.scores, strict=True)]
        if described := names_of_attributes(found.details):
            texts = [" ".join((*each[:1], text)) for each, text in zip(described, texts, strict=True)]
        colours = [CLASS_COLOURS[label % len(CLASS_COLOURS)] for label in labels]
        return draw_boxes(image, boxes.tolist(), texts, colours, side=side)

    def files(self, answers: Sequence[Found]) -> Mapping[str, bytes]:
        """detections.json: images, categories and boxes (annotations with a score) as COCO has them.

        Of the pictures of a list also what `list_results` gives.
        """
        ids = list(self.finder.category_ids)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, answer in enumerate(answers, 1):
            found: PictureBoxes = answer.details
            width, height = found.size
            images.append({"id": number, "file_name": found.key, "width": width, "height": height})
            sides = np.concatenate([found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]], 1).astype(np.float64)
            lines = zip(sides.round(2).tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
            described = names_of_attributes(found)
            for place, (box, score, label) in enumerate(lines):
                annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": ids[label], "bbox": box}
                annotation |= {"area": box[2] * box[3], "iscrowd": 0, "score": round(score, 5)}
                annotations.append(annotation | ({"attributes": described[place]} if described else {}))
        categories = [{"id": number, "name": name} for number, name in zip(ids, self.finder.names, strict=True)]
        content = {"images": images, "categories": categories, "annotations": annotations}
        listed = {} if self._list is None else list_results(self._list, answers, self.finder.names, ids)
        return {"detections.json": json.dumps(content).encode(), **listed}


def names_of_attributes(found: PictureBoxes) -> list[list[str]]:
    """Of each box the likely attributes, the likeliest first; [] of a detector that tells none."""
    return [[name for name, _ in each] for each in found.attributes or ()]


def listed_classes(source: ImageList, names: Sequence[str]) -> np.ndarray:
    """int32 (len(names),): which of a list's classes each name is, -1 for none; in order where it names no classes.

    Raises:
      UserError: where the list names classes, and none of these.
    """
    place = match_classes(names, source.class_names or names)
    if (place < 0).all():
        raise UserError(
            f"{source.name} names none of the detector's classes, such as {names[0]}, but {some(source.class_names)}"
        )
    return place


def list_results(
    source: ImageList, answers: Sequence[Found], names: Sequence[str], ids: Sequence[Any]
) -> dict[str, bytes]:
    """Two files about the pictures of a list, by its ids and in the pixels that it states.

    results.json: COCO's results, as servers take them, and `curation.detection` as --teacher. image_info.json: the list
    with the classes of these results, for its --imagenet.

    Args:
      source: the list. Where it names classes, the results have their ids, and others are left out.
      answers: about its pictures. names, ids: of the detector's classes.

    Raises:
      UserError: as `listed_classes`.
    """
    wanted, numbers = (source.class_names, source.category_ids) if source.class_names else (tuple(names), tuple(ids))
    place = listed_classes(source, names)
    if others := [name for name, found in zip(names, place.tolist(), strict=True) if found < 0]:
        print(f"results.json is without {len(others)} classes that the list does not name: {some(others)}", flush=True)
    results: list[dict[str, Any]] = []
    for answer in answers:
        found: PictureBoxes = answer.details
        width, height = source.sizes[found.index].tolist()
        boxes = boxes_as_stated(found.boxes.astype(np.float64), (width, height), found.frame)
        sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).round(2)
        for box, score, label in zip(sides.tolist(), found.scores.tolist(), place[found.labels].tolist(), strict=True):
            if label >= 0:
                about = {"image_id": source.image_ids[found.index], "category_id": numbers[label]}
                results.append(about | {"bbox": box, "score": round(score, 5)})
    return {"results.json": json_bytes(iter(results)), "image_info.json": source.list_json(wanted, numbers)}
