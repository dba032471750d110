"""Sources of pictures with boxes: of a columnar table and the files of a folder, or of records."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from florence_jax.data.annotations import IdPairs
from florence_jax.data.box_classes import NO_CLASSES, ClassLists, Hierarchy
from florence_jax.data.box_frames import PictureFrames, boxes_in_picture
from florence_jax.data.box_problems import Problems
from florence_jax.data.records import (
    BadRecord,
    BaseSource,
    Record,
    Source,
    Subset,
    evenly,
    picture_bytes,
    sample_of,
)
from florence_jax.data.sources.array_record import ArrayRecordSource
from florence_jax.data.visual_genome import MOST_ATTRIBUTES
from florence_jax.errors import UserError
from florence_jax.pictures import Frame, open_picture, picture_frame, trouble_of

LOOKED_FOR = ("negative_ids", "not_exhaustive_ids")  # of a record, see `data.box_classes`


class BoxSource(Source, Protocol):
    """Pictures with boxes.

    A record has "key", "image_id" (as the set has it), "image", "width" and "height" of the upright picture, and of
    its n boxes "boxes" float32 (n, 4), x1 y1 x2 y2 in pixels of the upright picture, "class_ids" int32 (n,), indices
    into `class_names`, "iscrowd" and "is_group_of" bool (n,), and "areas" float32 (n,), by which sizes are told apart.

    Of a set in which people did not look for every class in every picture it has "exhaustive", "negative_ids" and
    "not_exhaustive_ids", and the source `class_sets`, see `data.box_classes`. Of one with attributes it has also
    "attribute_ids" int32 (n, 16), indices into `attribute_names`, -1 where there are no more.

    Attributes:
      class_names: in the order of class ids.
      category_ids: the id of each class in the set's own numbering.
      frequencies: of LVIS's classes 'r' (rare: in 1 to 10 pictures of its training set), 'c' (common: to 100) or 'f'
        (frequent), '' for a class of which it does not say; () or absent for another set.
    """

    class_names: Sequence[str]
    category_ids: Sequence[Any]


class BoxColumns:
    """The boxes of N pictures, M in all, in the order of the pictures: 27 bytes a box.

    Attributes:
      offsets: int64 (N + 1,): picture i has boxes offsets[i] to offsets[i + 1].
      boxes: float32 (M, 4). class_ids: int32 (M,). crowd, group_of: bool (M,). areas: float32 (M,).
      attributes: of the M boxes, where there are any.
    """

    def __init__(
        self,
        pictures: int,
        box_image: np.ndarray,
        boxes: np.ndarray,
        class_ids: np.ndarray,
        crowd: np.ndarray,
        areas: np.ndarray,
        group_of: np.ndarray | None = None,
        attributes: IdPairs | None = None,
    ):
        order = np.argsort(box_image, kind="stable")
        self.offsets = np.concatenate([[0], np.cumsum(np.bincount(box_image, minlength=pictures))]).astype(np.int64)
        self.boxes, self.class_ids = boxes[order].astype(np.float32), class_ids[order].astype(np.int32)
        self.crowd, self.areas = crowd[order].astype(bool), areas[order].astype(np.float32)
        self.group_of = np.zeros_like(self.crowd) if group_of is None else group_of[order].astype(bool)
        self.attributes: ClassLists | None = None
        if attributes is not None:
            place = np.empty(len(order), np.int64)
            place[order] = np.arange(len(order))
            self.attributes = ClassLists(len(order), place[attributes[0]], attributes[1])
        for column in (self.offsets, self.boxes, self.class_ids, self.crowd, self.group_of, self.areas):
            column.flags.writeable = False  # records have views of them

    def pictures_by_class(self, classes: int) -> np.ndarray:
        """float64 (classes,): in how many pictures each class has a box."""
        pictures = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        pairs = np.unique(pictures * classes + self.class_ids)
        return np.bincount(pairs % classes, minlength=classes).astype(np.float64)

    def of(self, picture: int) -> Record:
        """The fields of a record about boxes."""
        rows = slice(*self.offsets[picture : picture + 2].tolist())
        fields = {
            "boxes": self.boxes[rows],
            "class_ids": self.class_ids[rows],
            "iscrowd": self.crowd[rows],
            "is_group_of": self.group_of[rows],
            "areas": self.areas[rows],
        }
        return (
            fields
            if self.attributes is None
            else fields | {"attribute_ids": self.attributes.padded(rows, MOST_ATTRIBUTES)}
        )


COUNTED = 20_000  # records that frequencies of classes are counted in


def pictures_by_class(source: BoxSource) -> np.ndarray:
    """float64 (K,): in how many pictures each class has a box; no picture is read.

    Of a source that knows it without its records, which then has a method of this name, all are counted, else those of
    20,000 records, for all. Of a part of a source the whole is counted.
    """
    if isinstance(source, Subset):
        return pictures_by_class(source.whole)
    if hasattr(source, "pictures_by_class"):
        return source.pictures_by_class()
    return _sampled_pictures(source)


def _sampled_pictures(source: BoxSource) -> np.ndarray:
    found = np.zeros(len(source.class_names))
    records = sample_of(source, COUNTED)
    for record in records:
        found[np.unique(record["class_ids"])] += 1
    return found * (len(source) / max(len(records), 1))


def read_columns(source: BoxSource) -> tuple[list[str], np.ndarray, BoxColumns]:
    """Keys, int32 (N, 2) widths and heights, and boxes of all N records; no picture is read. Groups are crowds."""
    if isinstance(source, FileBoxSource):
        columns = copy.copy(source.columns)
        columns.crowd = columns.crowd | columns.group_of
        return source.files, source.sizes, columns
    keys, sizes, parts = [], [], []
    for row, record in enumerate(source.metadata()):
        keys.append(str(record["key"]))
        sizes.append((record["width"], record["height"]))
        boxes = np.asarray(record["boxes"], np.float32).reshape(-1, 4)
        marks = [np.asarray(record.get(name, np.zeros(len(boxes))), bool) for name in ("iscrowd", "is_group_of")]
        areas = np.asarray(record.get("areas", (boxes[:, 2:] - boxes[:, :2]).prod(1)), np.float32)
        class_ids = np.asarray(record["class_ids"], np.int32)
        parts.append((np.full(len(boxes), row), boxes, class_ids, marks[0] | marks[1], areas))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return keys, np.array(sizes, np.int32).reshape(-1, 2), BoxColumns(len(keys), *columns)


class FileBoxSource(BaseSource):
    """Pictures of a folder, with boxes in memory.

    Args:
      name: for messages.
      folder: where the files are.
      files: N names below it, different ones; the keys.
      image_ids: N.
      sizes: int32 (N, 2), width and height that the boxes are of. Of a file that has another size when it is read the
        boxes are turned or scaled, or it is a bad record.
      columns: the boxes.
      class_names, category_ids: see `BoxSource`.
      summary: what was found, see `FolderSource`.
      problems: what is wrong with the set.
      looked_for: of a set in which not all classes were looked for the classes that are not in each picture, and those
        of which only some objects have boxes.
      attribute_names: of the numbers in `columns.attributes`.
      uids: by which other sets know a picture, by its image id.
      frequencies: see `BoxSource`.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        files: Sequence[str],
        image_ids: Sequence[Any],
        sizes: np.ndarray,
        columns: BoxColumns,
        class_names: Sequence[str],
        category_ids: Sequence[Any],
        summary: Mapping[str, Any],
        problems: Problems,
        looked_for: tuple[ClassLists, ClassLists] | None = None,
        attribute_names: Sequence[str] = (),
        uids: Mapping[Any, str] | None = None,
        frequencies: Sequence[str] = (),
    ):
        self.name, self.folder, self.files, self.image_ids = name, folder, list(files), list(image_ids)
        self.sizes, self.columns = np.asarray(sizes, np.int32), columns
        self.class_names, self.category_ids = tuple(class_names), tuple(category_ids)
        self.summary, self.problems = dict(summary), problems
        self._looked_for, self.attribute_names, self.uids = looked_for, tuple(attribute_names), uids or {}
        self.class_sets = np.full((1, len(self.class_names)), looked_for is None)
        self.frequencies = tuple(frequencies)

    def __len__(self) -> int:
        return len(self.files)

    def shapes(self) -> np.ndarray:
        """float32 (N, 2): height and width of all pictures, for `make_buckets`."""
        return self.sizes[:, ::-1].astype(np.float32)

    def __getitem__(self, index: int) -> Record:
        record = self.described(index)
        data = picture_bytes(os.path.join(self.folder, record["key"]), record["key"])
        try:
            with open_picture(data) as image:
                frame = picture_frame(image)
        except Exception as error:  # PIL's readers raise a dozen unrelated types on corrupt data
            raise BadRecord(record["key"], f"corrupt image ({trouble_of(error)})") from error
        if frame.size != (record["width"], record["height"]):
            record |= _in_frame(record, frame)
        return record | {"image": data}

    def described(self, index: int) -> Record:
        """See `records.described`; no file is touched."""
        width, height = self.sizes[index].tolist()
        key = self.files[index]
        head = {"key": key, "image_id": self.image_ids[index], "width": width, "height": height}
        lists = (NO_CLASSES, NO_CLASSES) if self._looked_for is None else [each.of(index) for each in self._looked_for]
        looked_for = {"exhaustive": self._looked_for is None, **dict(zip(LOOKED_FOR, lists, strict=True))}
        return head | self.columns.of(index) | looked_for

    def pictures_by_class(self) -> np.ndarray:
        """float64 (K,): in how many pictures each class has a box."""
        return self.columns.pictures_by_class(len(self.class_names))

    def metadata(self) -> Iterator[Record]:
        """All records in order; no file is touched."""
        return map(self.described, range(len(self)))

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; no file is touched."""
        return [self.described(i) for i in evenly(len(self), count).tolist()]


def _in_frame(record: Record, frame: Frame) -> Record:
    """The fields of a record whose file is of another size than its boxes. Raises BadRecord."""
    stated = np.array([[record["width"], record["height"]]], np.int32)
    raw, size = np.array([frame.raw], np.int32), np.array([frame.size], np.int32)
    frames = PictureFrames(np.ones(1, bool), raw, size, np.array([frame.orientation], np.int8))
    boxes, how = boxes_in_picture(record["boxes"], np.zeros(len(record["boxes"]), np.int64), stated, frames)
    (width, height), (raw_width, raw_height) = frame.size, frame.raw
    if how["size_mismatch"][0]:
        what = f"its annotations say {record['width']} x {record['height']} pixels, it has {raw_width} x {raw_height}"
        raise BadRecord(record["key"], what)
    grown = width * height / (record["width"] * record["height"])
    areas = (record["areas"] * np.float32(grown)).astype(np.float32)
    return {"width": width, "height": height, "boxes": boxes.astype(np.float32), "areas": areas}


class RecordBoxSource(BaseSource):
    """Records in ArrayRecord files that have boxes, such as those of `curation.detection`.

    Classes above one that has a box in a picture, such as 'animal' above 'dog', are not exhaustive there; those below
    one that is not there are not there either. What a record says against its own boxes is left out.

    Args:
      records: with "boxes", "class_ids", "width", "height".
      class_names: of their class ids.
      summary: what was found, see `FolderSource`.
      exhaustive: which classes each of the "sources" of a record looked for in all its pictures; sources that are not
        named looked for no class so. None: there is no such thing, every class was looked for.
      parents: of each class the numbers of those right above it; () for none.
      pictures: float64 (K,), in how many records each class has a box; None where nobody counted.
    """

    def __init__(
        self,
        records: ArrayRecordSource,
        class_names: Sequence[str],
        summary: Mapping[str, Any],
        exhaustive: Mapping[str, Sequence[int]] | None = None,
        parents: Sequence[Sequence[int]] = (),
        pictures: np.ndarray | None = None,
    ):
        self.name, self._records, self._pictures = records.name, records, pictures
        self.class_names, self.category_ids = tuple(class_names), tuple(range(len(class_names)))
        self.summary, self.problems = dict(summary), Problems()
        self.class_sets: np.ndarray | None = None
        self._hierarchy = Hierarchy(parents)
        self._bits = {name: 1 << bit for bit, name in enumerate(sorted(exhaustive or {}))}
        if exhaustive is not None:  # a record may have several sources: its part is the set of those
            self.class_sets = np.zeros((1 << len(exhaustive), len(class_names)), bool)
            for name, bit in self._bits.items():
                parts = np.flatnonzero(np.arange(len(self.class_sets)) & bit)
                self.class_sets[np.ix_(parts, np.asarray(exhaustive[name], np.int64))] = True

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._with_arrays(self._records[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        found = self._records.__getitems__(indices)
        return [record if isinstance(record, BadRecord) else self._arrays_or_bad(record) for record in found]

    def _arrays_or_bad(self, record: Record) -> Record | BadRecord:
        try:
            return self._with_arrays(record)
        except BadRecord as bad:
            return bad

    def pictures_by_class(self) -> np.ndarray:
        """See the function of this name."""
        return _sampled_pictures(self) if self._pictures is None else self._pictures

    def metadata(self) -> Iterator[Record]:
        """All readable records in order, from the side files. Raises UserError for one that is of other classes."""
        return map(self._fitting, self._records.metadata())

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; of the side files. Raises UserError as `metadata`."""
        return list(map(self._fitting, self._records.sample(count)))

    def _fitting(self, record: Record) -> Record:
        try:
            return self._with_arrays(record)
        except BadRecord as bad:
            raise UserError(
                f"{self.name}: {bad.key}: {bad.reason}; are the records and their classes.json of one build?"
            ) from bad

    def _with_arrays(self, record: Record) -> Record:
        record = _with_arrays(record)
        class_ids = record["class_ids"]
        if len(class_ids) and not 0 <= class_ids.min() <= class_ids.max() < len(self.class_names):
            raise BadRecord(record["key"], f"class {class_ids.max()} of {len(self.class_names)}")
        return record if self.class_sets is None else record | self._looked_for(record, self.class_sets)

    def _looked_for(self, record: Record, class_sets: np.ndarray) -> Record:
        """See `data.box_classes`."""
        part = sum(self._bits.get(name, 0) for name in set(record.get("sources", ())))
        boxed = np.unique(record["class_ids"])
        absent, partly = (np.asarray(record.get(name, ()), np.int32) for name in LOOKED_FOR)
        if self._hierarchy:
            partly = np.union1d(partly, self._hierarchy.above(boxed, boxed)[1])
            absent = np.union1d(absent, self._hierarchy.below(absent, absent)[1])
        partly = partly[~class_sets[part][partly]]
        absent = np.setdiff1d(absent, np.union1d(boxed, partly))
        return {"exhaustive": part > 0, "set_index": np.int32(part)} | dict(
            zip(LOOKED_FOR, (absent, partly), strict=True)
        )


def _with_arrays(record: Record) -> Record:
    """The record with its boxes as `BoxSource` has them; without scores where people made all boxes."""
    try:
        boxes = np.asarray(record["boxes"], np.float32).reshape(-1, 4)
        class_ids = np.asarray(record["class_ids"], np.int32).reshape(-1)
        marks = {name: np.asarray(record.get(name, [False] * len(boxes)), bool) for name in ("iscrowd", "is_group_of")}
    except (KeyError, TypeError, ValueError) as error:
        raise BadRecord(record["key"], f"it has no boxes with classes ({type(error).__name__}: {error})") from error
    if any(len(values) != len(boxes) for values in (class_ids, *marks.values())):
        raise BadRecord(record["key"], f"it has {len(boxes)} boxes, but not as many class_ids, iscrowd or is_group_of")
    made = {"boxes": boxes, "class_ids": class_ids, **marks, "areas": (boxes[:, 2:] - boxes[:, :2]).prod(1)}
    scores = record.get("scores")
    if scores is not None and any(score is not None for score in scores):
        made["scores"] = np.array([np.nan if score is None else score for score in scores], np.float32)
    else:
        record = {name: value for name, value in record.items() if name != "scores"}
    return {"image_id": record["key"]} | record | made
