"""Pseudo boxes: what a teacher detects in images that have no boxes (ImageNet-22K), as in self-training.

Zoph et al. 2020, "Rethinking pre-training and self-training": boxes above a score threshold (0.5) become targets. Every
such box keeps the teacher's name, the score and the threshold.
"""

import dataclasses
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath

from florence_jax.data.annotations import Annotations, Category, SourceSpec, file_paths, read_coco_like
from florence_jax.data.box_frames import boxes_as_stated
from florence_jax.data.json_stream import json_items
from florence_jax.data.ops.image import Decode
from florence_jax.data.records import BadRecord
from florence_jax.errors import UserError
from florence_jax.files import replacing
from florence_jax.pictures import open_picture, picture_frame

THRESHOLD = 0.5
TEACHER_BATCH = 8
SYNSET = re.compile(r"n\d{8}")
# uint8 (H, W, 3) images -> for each a dict of boxes (N, 4) x1 y1 x2 y2 in pixels, scores (N,), category_ids (N,).
Teacher = Callable[[Sequence[np.ndarray]], Sequence[dict[str, np.ndarray]]]


def read_synset_words(path: str) -> dict[str, tuple[str, ...]]:
    """Names of ImageNet classes by WordNet id, from `words.txt`, `synset_words.txt` or `LOC_synset_mapping.txt`.

    Raises:
      UserError: for a line that is not 'n01440764 tench, Tinca tinca' (space or tab), or a file that is not UTF-8.
    """
    words = {}
    try:
        lines = epath.Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); convert it, or get it anew") from error
    for number, line in enumerate(lines, 1):
        synset, _, names = line.replace("\t", " ", 1).partition(" ")
        if not SYNSET.fullmatch(synset) or not names.strip():
            raise UserError(f"{path} line {number}: needs a WordNet id and names, as in 'n01440764 tench, Tinca tinca'")
        words[synset] = tuple(name.strip() for name in names.split(",") if name.strip())
    return words


def read_imagenet(
    spec: SourceSpec,
    predictions: str,
    teacher: str,
    threshold: float = THRESHOLD,
    words: dict[str, tuple[str, ...]] | None = None,
    labels: str = "teacher",
    named_by: str = "",
) -> Annotations:
    """Reads a teacher's detections in ImageNet images.

    Args:
      spec: its annotations are COCO's image-info JSON that the teacher ran on: "images" (id, file_name such as
        'n01440764/n01440764_10026.JPEG', width, height) and "categories", the teacher's classes.
      predictions: COCO-results JSON: a list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}.
      teacher: its name, for the records.
      threshold: boxes with a lower score are left out.
      words: names by WordNet id; given, the class of an image becomes a positive label of it.
      labels: 'teacher': a box has the class that the teacher gave. 'image': the best box of an image has the image's
        own class and there is no other, for teachers that find the labelled object whatever it is.
      named_by: the set whose names the teacher's classes follow ('coco'), so that its rules for names hold for them.

    Raises:
      UserError: for bad files, an image without a known WordNet id where one is needed, or an unknown `labels`.
    """
    if labels not in ("teacher", "image"):
        raise UserError(f"pseudo labels {labels!r}: choose teacher or image")
    if labels == "image" and not words:
        raise UserError("pseudo labels of the images need their names: give --imagenet_words=words.txt")
    if not 0 <= threshold <= 1:
        raise UserError(f"the teacher's threshold must be from 0 to 1, not {threshold}")
    table = read_coco_like(spec)  # its images and categories; it has no boxes
    table.ids = [f"imagenet:{os.path.splitext(os.path.basename(name))[0]}" for name in table.files]
    table.categories = [dataclasses.replace(c, named_by=named_by) for c in table.categories]
    table.exhaustive, table.teacher, table.threshold = False, teacher, threshold
    _take_predictions(table, predictions, threshold)
    if words:
        _add_image_classes(table, words, labels == "image")
    return table


def _take_predictions(table: Annotations, path: str, threshold: float) -> None:
    """Fills the boxes of `table`, best first within an image."""
    rows = {image_id: row for row, image_id in enumerate(table.numbers)}
    numbers = {category.id: number for number, category in enumerate(table.categories)}
    image, category, boxes, scores = [], [], [], []
    for place, (_, item) in enumerate(json_items(path)):
        try:
            (x, y, width, height), score = item["bbox"], float(item["score"])
            row, number = rows.get(item["image_id"]), numbers.get(str(item["category_id"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: item {place} is no COCO result ({type(error).__name__}: {error})") from error
        if row is None or number is None:
            table.skipped["unknown_image" if row is None else "unknown_category"] += 1
        elif not score >= threshold:
            table.skipped["below_threshold"] += 1
        else:
            image.append(row)
            category.append(number)
            boxes.append((x, y, x + width, y + height))
            scores.append(score)
    order = np.lexsort((-np.array(scores), np.array(image)))
    table.box_image = np.array(image, np.int32)[order]
    table.box_category = np.array(category, np.int32)[order]
    table.boxes = np.array(boxes, np.float64).reshape(-1, 4)[order]
    table.scores = np.array(scores, np.float32)[order]
    table.crowd, table.group_of = np.zeros((2, len(order)), bool)


def _add_image_classes(table: Annotations, words: dict[str, tuple[str, ...]], relabel: bool) -> None:
    """The images' own classes become categories and positive labels; `relabel`: also the class of the best box."""
    first = len(table.categories)
    numbers: dict[str, int] = {}
    classes = np.full(len(table.files), -1, np.int32)
    for row, name in enumerate(table.files):
        match = SYNSET.search(name)
        if match and match[0] in words:
            classes[row] = numbers.setdefault(match[0], first + len(numbers))
        elif relabel:
            raise UserError(f"{table.spec.annotations}: {name} has no WordNet id that the words file knows")
        else:
            table.skipped["image_without_class"] += 1
    table.categories += [Category(synset, words[synset][0], words[synset][1:]) for synset in numbers]
    known = np.flatnonzero(classes >= 0).astype(np.int32)
    table.positive = known, classes[known]
    if relabel:
        best = np.unique(table.box_image, return_index=True)[1]
        table.skipped["not_the_best_box"] = len(table.box_image) - len(best)
        for column in ("box_image", "boxes", "scores", "crowd", "group_of"):
            setattr(table, column, getattr(table, column)[best])
        table.box_category = classes[table.box_image]


# -- a live teacher ---------------------------------------------------------------------------------------------------


def load_teacher(name: str) -> Teacher:
    """The callable 'package.module:attribute'. Raises UserError if it cannot be imported."""
    module, _, attribute = name.partition(":")
    try:
        teacher = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--teacher={name}: {error}; give RESULTS.json or package.module:callable") from error
    if not callable(teacher):
        raise UserError(f"--teacher={name} cannot be called")
    return teacher


def run_teacher(spec: SourceSpec, teacher: Teacher, path: str, batch: int = TEACHER_BATCH) -> int:
    """Runs a teacher over the images of `spec` and writes its detections as COCO-results JSON.

    Images that cannot be read have none.

    Args:
      spec: of kind 'imagenet'.
      teacher: see `Teacher`; pads its own batches.
      path: the file to write, under its name only when complete.
      batch: images in one call.

    Returns:
      The number of boxes written.

    Raises:
      UserError: if the teacher returns something else than promised.
    """
    table = read_coco_like(spec)
    paths = file_paths(spec, table.files)
    count = 0
    with replacing(path) as temporary, open(temporary, "w") as file:
        for start in range(0, len(paths), batch):
            for item in _detect(table, range(start, min(start + batch, len(paths))), teacher, paths):
                file.write(("[" if not count else ",") + "\n" + json.dumps(item))
                count += 1
        file.write("\n]\n" if count else "[]\n")
    return count


def _detect(table: Annotations, rows: range, teacher: Teacher, paths: Sequence[str]) -> Iterator[dict]:
    decode, rng = Decode(), np.random.default_rng(0)  # decoding draws nothing
    images, kept, frames = [], [], []
    for row in rows:
        try:
            data = epath.Path(paths[row]).read_bytes()
            images.append(decode({"key": table.ids[row], "image": data}, rng)["image"])
            kept.append(row)
            with open_picture(data) as opened:
                frames.append(picture_frame(opened))
        except (OSError, BadRecord):
            continue  # the build meets the file again and counts it
    results = list(teacher(images)) if images else []
    if len(results) != len(images):
        raise UserError(f"the teacher gave {len(results)} results for {len(images)} images")
    for row, frame, result in zip(kept, frames, results, strict=True):
        boxes = np.asarray(result["boxes"], np.float64).reshape(-1, 4)
        scores, classes = np.asarray(result["scores"]), np.asarray(result["category_ids"])
        if not len(boxes) == len(scores) == len(classes):
            raise UserError(f"the teacher gave {len(boxes)} boxes, {len(scores)} scores, {len(classes)} categories")
        width, height = table.sizes[row].tolist()
        boxes = boxes_as_stated(boxes, (width, height), frame)  # results are in annotated pixels
        for (x1, y1, x2, y2), score, category in zip(boxes.tolist(), scores.tolist(), classes.tolist(), strict=True):
            yield {
                "image_id": table.numbers[row],
                "category_id": category,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }


def missing_predictions(spec: SourceSpec) -> UserError:
    """The error for ImageNet without a teacher."""
    return UserError(
        f"--imagenet={spec.annotations} needs --teacher=RESULTS.json (COCO results) or "
        "--teacher=package.module:callable"
    )
