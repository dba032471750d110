"""Annotation files of detection sets, read into one columnar table: COCO, LVIS, Objects365, OpenImages, pseudo boxes.

JSON files are streamed item by item (Objects365's is several GB), so memory is that of the columns: about 40 bytes a
box and 200 an image.
"""

import array
import collections
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath

from florence_jax.data.json_stream import json_items
from florence_jax.errors import UserError
from florence_jax.files import csv_cells

# In the order of preference: of two boxes for one object the one of the earlier set is kept.
FORMATS = ("coco", "lvis", "objects365", "openimages", "imagenet")
SPLITS = ("train", "validation")
PAGES = {
    "coco": "https://cocodataset.org/#download",
    "lvis": "https://www.lvisdataset.org/dataset",
    "objects365": "https://www.objects365.org/download.html",
    "openimages": "https://storage.googleapis.com/openimages/web/download.html",
    "imagenet": "https://www.image-net.org/download.php",
}
PROBES = 1000  # files looked for to learn how many leading folders of the names are on disk
IdPairs = tuple[np.ndarray, np.ndarray]
NEGATIVE, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"  # of a picture of LVIS


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One annotated set of images.

    Attributes:
      kind: one of `FORMATS`.
      annotations: the file: JSON, or the boxes CSV of OpenImages.
      images: the folder.
      split: 'train' or 'validation'.
    """

    kind: str
    annotations: str
    images: str
    split: str = "train"

    @property
    def label(self) -> str:
        """For messages and reports: the same wherever the files lie."""
        return f"{self.kind} {self.split} {os.path.basename(self.annotations)}"


@dataclasses.dataclass(frozen=True)
class Category:
    """A class as its set names it.

    Attributes:
      id: within the set ('18', '/m/0bt9lr', 'n02084071').
      name: as the set writes it.
      synonyms: other names that the set gives.
      parents: names of broader classes.
      named_by: the set whose names (and rules for them) a teacher's class follows; '' for the set itself.
    """

    id: str
    name: str
    synonyms: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    named_by: str = ""


@dataclasses.dataclass
class Annotations:
    """One source, N images and M boxes, as columns.

    Attributes:
      spec: where it is from.
      ids: N identities, '<set>:<id>'; COCO and LVIS share the set 'coco'.
      files: N file names below the folder of images; leading folders may be missing on disk.
      sizes: int32 (N, 2), annotated width and height in pixels; 0 where boxes are relative.
      official: N names of the split that the publishers put the image in, '' if not stated.
      categories: the classes.
      box_image, box_category: int32 (M,), indices into ids and categories.
      boxes: float64 (M, 4), x1 y1 x2 y2 in pixels of the annotated size, or relative to the image.
      crowd, group_of: bool (M,).
      scores: float32 (M,), the teacher's; NaN for boxes made by people.
      negative: (image, category) index pairs: people checked that the class is not there.
      not_exhaustive: pairs: there, but not every instance has a box.
      positive: pairs: people (or the set's label) say that the class is there.
      exhaustive: every instance of every category has a box in every image.
      teacher, threshold: of pseudo boxes.
      skipped: counts of what was not read, by reason.
      numbers: N ids of images in a COCO-like file's own numbering.
    """

    spec: SourceSpec
    ids: list[str]
    files: list[str]
    sizes: np.ndarray
    official: list[str]
    categories: list[Category]
    box_image: np.ndarray
    box_category: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    group_of: np.ndarray
    scores: np.ndarray
    negative: IdPairs
    not_exhaustive: IdPairs
    positive: IdPairs
    exhaustive: bool = False
    teacher: str | None = None
    threshold: float | None = None
    skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    numbers: Sequence[int] = ()


def parse_spec(kind: str, text: str) -> SourceSpec:
    """'ANNOTATIONS:IMAGES' or 'ANNOTATIONS:IMAGES:validation' as a SourceSpec; a ':' before '//' belongs to a path.

    Raises:
      UserError: for another number of parts, or a file or folder that does not exist.
    """
    parts = re.split(r":(?!//)", text)
    if len(parts) == 2:
        parts.append("train")
    if len(parts) != 3 or parts[2] not in SPLITS or not all(parts):
        raise UserError(f"--{kind}={text}: write ANNOTATIONS:IMAGES or ANNOTATIONS:IMAGES:validation")
    spec = SourceSpec(kind, *parts)
    need_file(spec, spec.annotations)
    if not epath.Path(spec.images).is_dir():
        raise UserError(f"--{kind}={text}: {spec.images} is not a folder of images; get them from {PAGES[kind]}")
    return spec


def need_file(spec: SourceSpec, *candidates: str) -> str:
    """The first of `candidates` that is a file. Raises UserError, naming them and the download page."""
    for path in candidates:
        if epath.Path(path).exists() and not epath.Path(path).is_dir():
            return path
    raise UserError(f"{spec.kind} needs the file {' or '.join(candidates)}; get it from {PAGES[spec.kind]}")


def file_paths(spec: SourceSpec, files: Sequence[str]) -> list[str]:
    """Paths of the files, whose names may begin with folders that the user's copy lacks ('images/v1/patch8/x.jpg').

    Raises:
      UserError: if none of the first files is in the folder.
    """
    most = max(name.count("/") for name in files)
    for name in files[:PROBES]:
        parts = name.split("/")
        for skip in range(len(parts)):
            if epath.Path(os.path.join(spec.images, *parts[skip:])).exists():
                # Counted from the end: names of one set may differ in depth.
                keep = len(parts) - skip if skip else most + 1
                return [os.path.join(spec.images, *name.split("/")[-keep:]) for name in files]
    raise UserError(
        f"{spec.label}: no image in {spec.images}, for example no {os.path.join(spec.images, files[0])}; "
        f"give the folder of the images of {PAGES[spec.kind]}"
    )


# -- COCO, LVIS, Objects365 -------------------------------------------------------------------------------------------


class CocoColumns:
    """The sections of a COCO-like file; an instance takes items one by one, and refuses what it cannot read.

    Attributes:
      needed: sections without which a file is none.
    """

    needed: tuple[str, ...] = ("images", "categories")

    def __init__(self, spec: SourceSpec):
        self.spec = spec
        self.image_ids, self.sizes = array.array("q"), array.array("i")
        self.files: list[str] = []
        self.official: list[str] = []
        self.categories: list[dict] = []
        self.box_image, self.box_category = array.array("q"), array.array("q")
        self.boxes, self.crowd = array.array("d"), array.array("b")
        self.negative, self.not_exhaustive = array.array("q"), array.array("q")  # row, category id, row, ...

    def read(self) -> None:
        """Raises UserError for JSON that is not complete, a section that is missing, and as `refuse`."""
        take: dict[str, Callable[[dict], None]] = {
            "images": self.take_image,
            "annotations": self.take_box,
            "categories": self.take_category,
        }
        counts: collections.Counter = collections.Counter()
        for section, item in json_items(self.spec.annotations):
            if section in take:
                try:
                    take[section](item)
                except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
                    detail = f"has no {error}" if isinstance(error, KeyError) else f"is not valid ({error})"
                    self.refuse(section, counts[section], detail, error)
            counts[section] += 1
        for section in self.needed:
            if not counts[section]:
                raise UserError(self.without(section, list(counts)))

    def refuse(self, section: str, number: int, detail: str, error: Exception) -> None:
        """For an item that lacks a field. Raises UserError."""
        place = f"{self.spec.annotations}: {section}[{number}]"
        raise UserError(f"{place} {detail}; is it a file of {self.spec.kind}?") from error

    def without(self, section: str, found: Sequence[str]) -> str:
        """What to say of a file that lacks a section; `found`: those that it has."""
        del found
        return f"{self.spec.annotations} has no {section}; get it from {PAGES[self.spec.kind]}"

    def take_category(self, item: dict) -> None:
        """Takes an item of "categories"."""
        self.categories.append(item)

    def take_image(self, item: dict) -> None:
        """Takes an item of "images"."""
        url = item.get("coco_url", "")
        name = "/".join(url.split("/")[-2:]) if url else item["file_name"]
        if self.spec.kind == "lvis":
            if not url:  # LVIS 0.5 has names of the year 2014, 'COCO_val2014_000000391895.jpg', for files of 2017
                name = name[-16:]
            self.take_lists(item)
        self.image_ids.append(item["id"])
        self.sizes.extend((item["width"], item["height"]))
        self.files.append(name)
        self.official.append(url.split("/")[-2] if url.count("/") > 1 else "")

    def take_lists(self, item: dict) -> None:
        """Takes the lists of categories of an item of "images" that comes next, as LVIS has them."""
        row = len(self.files)
        for pairs, field in ((self.negative, NEGATIVE), (self.not_exhaustive, NOT_EXHAUSTIVE)):
            for category in item[field]:
                pairs.extend((row, category))

    def take_box(self, item: dict) -> None:
        """Takes an item of "annotations"."""
        x, y, width, height = item["bbox"]
        self.boxes.extend((x, y, x + width, y + height))
        self.box_image.append(item["image_id"])
        self.box_category.append(item["category_id"])
        self.crowd.append(1 if item.get("iscrowd") else 0)


def read_coco_like(spec: SourceSpec) -> Annotations:
    """Reads COCO (instances_*.json), LVIS (v1 or v0.5) or Objects365 (v1 or v2) annotations.

    Raises:
      UserError: for damaged JSON or missing fields.
    """
    columns = CocoColumns(spec)
    columns.read()
    skipped: collections.Counter = collections.Counter()
    category_rows = rows_by_id(np.array([int(c["id"]) for c in columns.categories], np.int64))
    image_rows = rows_by_id(np.array(columns.image_ids, np.int64))
    box_image = image_rows(np.array(columns.box_image, np.int64))
    box_category = category_rows(np.array(columns.box_category, np.int64))
    skipped["unknown_image"] = int((box_image < 0).sum())
    skipped["unknown_category"] = int(((box_category < 0) & (box_image >= 0)).sum())
    keep = (box_image >= 0) & (box_category >= 0)
    crowd = np.array(columns.crowd, np.int8)[keep].astype(bool)
    return Annotations(
        spec=spec,
        ids=[_identity(spec.kind, i, name) for i, name in zip(columns.image_ids, columns.files, strict=True)],
        files=columns.files,
        sizes=np.array(columns.sizes, np.int32).reshape(-1, 2),
        official=columns.official,
        categories=[_category(c, spec.kind) for c in columns.categories],
        box_image=box_image[keep],
        box_category=box_category[keep],
        boxes=np.array(columns.boxes, np.float64).reshape(-1, 4)[keep],
        crowd=crowd,
        group_of=np.zeros_like(crowd),
        scores=np.full(len(crowd), np.nan, np.float32),
        negative=list_pairs(columns.negative, category_rows),
        not_exhaustive=list_pairs(columns.not_exhaustive, category_rows),
        positive=no_pairs(),
        exhaustive=spec.kind != "lvis",
        skipped=skipped,
        numbers=columns.image_ids,
    )


def _identity(kind: str, image_id: int, file: str) -> str:
    if kind == "objects365":  # the ids of train and val are not promised to differ, the names do
        return f"objects365:{os.path.splitext(os.path.basename(file))[0]}"
    return f"coco:{image_id:012d}"


def _category(item: dict, kind: str) -> Category:
    parent = item.get("supercategory")
    if kind == "objects365" or parent == item["name"]:
        parent = None  # Objects365 has none, or the name again
    return Category(str(item["id"]), item["name"], tuple(item.get("synonyms", ())), (parent,) if parent else ())


def rows_by_id(ids: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from arrays of ids to int32 indices into `ids`, -1 for an unknown one."""
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]

    def rows(wanted: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(ranked, wanted), len(ranked) - 1)
        return np.where(ranked[place] == wanted, order[place], -1).astype(np.int32)

    return rows


def list_pairs(flat: array.array, category_rows: Callable[[np.ndarray], np.ndarray]) -> IdPairs:
    """The pairs of `CocoColumns.take_lists` whose category is listed, as rows of both."""
    images, categories = np.array(flat, np.int64).reshape(-1, 2).T
    categories = category_rows(categories)
    return images[categories >= 0].astype(np.int32), categories[categories >= 0]


def no_pairs() -> IdPairs:
    """No pairs at all."""
    return np.zeros(0, np.int32), np.zeros(0, np.int32)


# -- OpenImages -------------------------------------------------------------------------------------------------------


BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax", "IsGroupOf")
LABEL_COLUMNS = ("ImageID", "LabelName", "Confidence")


def csv_columns(path: str, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """(line number, the values of `columns`) of a CSV file with a heading.

    Raises:
      UserError: for a missing column, or a line that is no complete row of UTF-8.
    """
    rows = csv_cells(path)
    _, _, header = next(rows, (0, 0, []))
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}, only: {', '.join(header)[:200]}")
    places = [header.index(name) for name in columns]
    last = max(places)
    for line, _, row in rows:
        if len(row) <= last:
            raise UserError(f"{path} line {line}: not a complete row, {len(row)} columns of {len(header)}")
        yield line, [row[i] for i in places]


def read_openimages(spec: SourceSpec) -> Annotations:
    """Reads OpenImages boxes (V4 to V7): `<split>-annotations-bbox.csv`, and beside it the class descriptions, the
    verified image labels and, if present, the class hierarchy. Images without a box row are not part of it.

    Raises:
      UserError: for a missing file or column, or a coordinate that is no number.
    """
    folder = os.path.dirname(spec.annotations)
    match = re.search(r"(train|validation|test)-annotations-bbox", os.path.basename(spec.annotations))
    subset = match[1] if match else spec.split
    places = [os.path.join(folder, prefix) for prefix in ("", "oidv7-", "oidv6-")]
    classes = need_file(spec, *(f"{p}class-descriptions-boxable.csv" for p in places))
    labels = need_file(spec, *(f"{p}{subset}-annotations-human-imagelabels-boxable.csv" for p in places))
    categories = _openimages_classes(classes, os.path.join(folder, "bbox_labels_600_hierarchy.json"))
    numbers = {category.id: i for i, category in enumerate(categories)}
    rows: dict[str, int] = {}
    skipped: collections.Counter = collections.Counter()
    image, category, boxes, group = array.array("i"), array.array("i"), array.array("d"), array.array("b")
    for line, (image_id, label, *values) in csv_columns(spec.annotations, BOX_COLUMNS):
        row = rows.setdefault(image_id, len(rows))
        number = numbers.get(label)
        if number is None:
            skipped["unknown_category"] += 1
            continue
        try:
            boxes.extend(map(float, values[:4]))
        except ValueError as error:
            raise UserError(f"{spec.annotations} line {line}: {error}") from error
        image.append(row)
        category.append(number)
        group.append(values[4] == "1")  # -1 is 'not known'
    if not rows:
        raise UserError(f"{spec.annotations} has no boxes; get it from {PAGES['openimages']}")
    positive, negative = _verified_labels(labels, rows, numbers, skipped)
    group_of = np.array(group, np.int8).astype(bool)
    return Annotations(
        spec=spec,
        ids=[f"openimages:{image_id}" for image_id in rows],
        files=[f"{image_id}.jpg" for image_id in rows],
        sizes=np.zeros((len(rows), 2), np.int32),
        official=[match[1] if match else ""] * len(rows),
        categories=categories,
        box_image=np.array(image, np.int32),
        box_category=np.array(category, np.int32),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        crowd=np.zeros_like(group_of),
        group_of=group_of,
        scores=np.full(len(group_of), np.nan, np.float32),
        negative=negative,
        not_exhaustive=no_pairs(),
        positive=positive,
        skipped=skipped,
    )


def _openimages_classes(path: str, hierarchy: str) -> list[Category]:
    rows = [row for _, _, row in csv_cells(path) if row[0] != "LabelName"]  # V4 to V6 have no header
    if not rows or any(len(row) != 2 for row in rows):
        raise UserError(f"{path} must have two columns, label and name; get it from {PAGES['openimages']}")
    parents: dict[str, set[str]] = collections.defaultdict(set)
    if epath.Path(hierarchy).exists():
        try:
            _add_parents(json.loads(epath.Path(hierarchy).read_bytes()), dict(rows), parents)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{hierarchy} is no class hierarchy ({detail}); get it from {PAGES['openimages']} or remove it"
            ) from error
    return [Category(label, name, (), tuple(sorted(parents[label]))) for label, name in rows]


def _add_parents(root: dict, names: dict[str, str], parents: dict[str, set[str]]) -> None:
    """Adds to each label the names of the labels that it stands below."""
    todo = [root]
    while todo:
        node = todo.pop()
        for child in node.get("Subcategory", ()):
            if node["LabelName"] in names:  # the root, 'Entity', has no name
                parents[child["LabelName"]].add(names[node["LabelName"]])
            todo.append(child)


def _verified_labels(
    path: str, rows: dict[str, int], numbers: dict[str, int], skipped: collections.Counter
) -> tuple[IdPairs, IdPairs]:
    """Positive and negative (image, category) pairs that people verified."""
    columns = {True: (array.array("i"), array.array("i")), False: (array.array("i"), array.array("i"))}
    for line, (image_id, label, confidence) in csv_columns(path, LABEL_COLUMNS):
        row, number = rows.get(image_id), numbers.get(label)
        if row is None or number is None:
            skipped["label_of_other_image" if row is None else "label_of_other_category"] += 1
            continue
        try:
            images, categories = columns[float(confidence) > 0.5]
        except ValueError as error:
            raise UserError(f"{path} line {line}: {error}") from error
        images.append(row)
        categories.append(number)
    return tuple(tuple(np.array(c, np.int32) for c in columns[positive]) for positive in (True, False))


def read_annotations(spec: SourceSpec) -> Annotations:
    """Reads a source made by people. For pseudo boxes see `detection_pseudo.read_imagenet`."""
    return read_openimages(spec) if spec.kind == "openimages" else read_coco_like(spec)
