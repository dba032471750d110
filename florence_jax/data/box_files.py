"""People's own boxes as one columnar table: COCO JSON, Pascal VOC XML, a CSV of boxes.

What is wrong in a file is not an error, it is a counted problem: the rest of the file is used.
"""

import array
import collections
import dataclasses
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from florence_jax.data.annotations import CocoColumns, SourceSpec, rows_by_id
from florence_jax.data.box_problems import FLAWS_SHOWN, Problems
from florence_jax.data.records import BadRecord, picture_bytes
from florence_jax.data.sources.fields import FILE_FIELDS, known_field
from florence_jax.errors import UserError
from florence_jax.files import csv_cells, table_rows

# Texts that stand for an id are numbered from here on down.
TEXT_IDS = -(1 << 62)
# Headings of tables of boxes, in lower case; the first that a table has counts.
PICTURE_COLUMNS = (*FILE_FIELDS, "image", "img", "picture", "imageid", "image_id")
NAME_COLUMNS = ("name", "label", "class", "class_name", "classname", "category", "category_name", "label_name")
CORNER_COLUMNS = (
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
    ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"),
)
SIDE_COLUMNS = (
    ("bbox_x", "bbox_y", "bbox_width", "bbox_height"),
    ("x", "y", "w", "h"),
    ("left", "top", "box_width", "box_height"),
)
WIDTH_COLUMNS, HEIGHT_COLUMNS = ("width", "image_width", "img_width"), ("height", "image_height", "img_height")
TABLE_HEADING = "image,x1,y1,x2,y2,name"


@dataclasses.dataclass
class BoxTable:
    """The boxes of one set, N pictures and M boxes, as columns.

    Attributes:
      name: of the file or folder, for messages.
      files: N names of pictures as the set has them.
      image_ids: N ids as the set has them.
      sizes: int32 (N, 2), stated width and height; 0 where it states none.
      class_names: K names. category_ids: K ids as the set has them.
      box_image, box_class: int32 (M,), indices.
      boxes: float64 (M, 4), x1 y1 x2 y2, pixels of the stated size; anything that the set says.
      crowd: bool (M,). areas: float32 (M,), stated areas, NaN where there is none.
      places: int32 (M,), number of each box in the set; `place` makes a text of it.
      place: such as 'annotations[{}]'.
      problems: met so far.
      parents: names of classes that stand above others.
      sides: whether the set writes x, y, width, height.
    """

    name: str
    files: list[str]
    image_ids: Sequence[Any]
    sizes: np.ndarray
    class_names: list[str]
    category_ids: list[Any]
    box_image: np.ndarray
    box_class: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    places: np.ndarray
    place: str
    problems: Problems
    parents: frozenset[str] = frozenset()
    sides: bool = False

    def add(self, kind: str, mask: np.ndarray) -> None:
        """Counts the boxes of a mask (M,) as a problem, and keeps the first with their places."""
        rows = np.flatnonzero(mask)
        room = self.problems.room(kind)
        for row in rows[:room].tolist():
            x1, y1, x2, y2 = self.boxes[row].tolist()
            detail = f"{self.place.format(self.places[row])}: {x1:g} {y1:g} {x2:g} {y2:g}"
            self.problems.add(kind, self.files[self.box_image[row]], detail)
        if len(rows) > room:
            self.problems.add(kind, count=len(rows) - room)

    def keep_boxes(self, mask: np.ndarray) -> None:
        """Drops the other boxes."""
        for name in ("box_image", "box_class", "boxes", "crowd", "areas", "places"):
            setattr(self, name, getattr(self, name)[mask])

    def keep_pictures(self, mask: np.ndarray) -> None:
        """Drops the other pictures, and their boxes."""
        number = np.cumsum(mask) - 1
        rows = np.flatnonzero(mask).tolist()
        self.files, self.image_ids = [self.files[i] for i in rows], [self.image_ids[i] for i in rows]
        self.sizes = self.sizes[mask]
        self.keep_boxes(mask[self.box_image])
        self.box_image = number[self.box_image].astype(np.int32)


# -- COCO -------------------------------------------------------------------------------------------------------------


class OwnColumns(CocoColumns):
    """The sections of a COCO-like file that people made: mistakes are counted, not refused."""

    def __init__(self, path: str, problems: Problems):
        super().__init__(SourceSpec("coco", path, ""))
        self.problems = problems
        self.places, self.areas, self.box_ids = array.array("i"), array.array("f"), array.array("q")
        self.category_ids: list[int] = []
        self.names: list[str] = []
        self.parents: set[str] = set()
        self._numbers: dict[str, int] = {}
        self._texts: dict[int, str] = {}
        self._missing_ids = self._seen = 0

    def refuse(self, section: str, number: int, detail: str, error: Exception) -> None:
        """Counts the item."""
        kind = {"images": "bad_image", "annotations": "bad_box", "categories": "bad_category"}[section]
        self.problems.add(kind, "", f"{section}[{number}] {detail}")

    def without(self, section: str, found: Sequence[str]) -> str:
        """See `CocoColumns`."""
        there = f"it has {', '.join(name or 'a list' for name in found)}" if found else "it is empty"
        return (
            f"{self.spec.annotations} has no {section!r}, {there}: a file of COCO's kind has lists 'images' (id, "
            "file_name, width, height), 'annotations' (image_id, category_id, bbox) and 'categories' (id, name)"
        )

    def number(self, given: Any) -> int:
        """The number for an id: itself, or one of a text. Raises ValueError for what is neither."""
        if type(given) is float and given.is_integer():
            given = int(given)
        if type(given) is int:
            return given
        if not isinstance(given, str) or not given.strip():
            raise ValueError(f"id {given!r}")
        text = given.strip()
        if re.fullmatch(r"0|-?[1-9]\d{0,17}", text):  # an annotation may say 7 where its picture says "7"
            return int(text)
        return self._numbers.setdefault(text, TEXT_IDS - len(self._numbers))

    def _own_number(self, given: Any) -> int:
        number = self.number(given)
        if isinstance(given, str):
            self.problems.add("text_id", given)
            self._texts[number] = given
        return number

    def given(self, number: int) -> Any:
        """The id of a picture or class as the file has it."""
        return self._texts.get(number, number)

    def take_image(self, item: dict) -> None:
        """See `CocoColumns`."""
        name = item.get("file_name") or item.get("coco_url") or item["file_name"]
        if not isinstance(name, str):
            raise TypeError(f"file_name {name!r}")
        number = self._own_number(item["id"])
        self.sizes.extend(_stated_size(item.get("width"), item.get("height")))
        self.image_ids.append(number)
        self.files.append(name.rpartition("/")[2] if "://" in name else name)

    def take_box(self, item: dict) -> None:
        """See `CocoColumns`."""
        place, self._seen = self._seen, self._seen + 1
        x, y, width, height = map(float, item["bbox"])
        image, category = self.number(item["image_id"]), self.number(item["category_id"])
        try:
            self.box_ids.append(self.number(item["id"]))
        except (KeyError, ValueError):
            self._missing_ids += 1
        area = item.get("area")
        self.areas.append(area if isinstance(area, (int, float)) and area > 0 else math.nan)
        self.boxes.extend((x, y, x + width, y + height))
        self.box_image.append(image)
        self.box_category.append(category)
        self.crowd.append(1 if item.get("iscrowd") else 0)
        self.places.append(place)

    def take_category(self, item: dict) -> None:
        """See `CocoColumns`."""
        number = self._own_number(item["id"])
        name = item.get("name")
        if name is None or not str(name).strip():
            self.problems.add("no_name", str(item["id"]))
            name = item["id"]
        self.category_ids.append(number)
        self.names.append(str(name).strip())
        parent = item.get("supercategory")
        self.parents |= {parent} if isinstance(parent, str) and parent != name else set()

    def check_box_ids(self) -> None:
        """Counts ids of boxes that are missing, or there twice."""
        if self._missing_ids:
            self.problems.add("box_id_missing", self.spec.annotations, count=self._missing_ids)
        twice = _repeated(np.array(self.box_ids, np.int64))
        for number in twice[:FLAWS_SHOWN].tolist():
            self.problems.add("box_id_twice", "", f"id {self.given(number)}")
        if len(twice) > FLAWS_SHOWN:
            self.problems.add("box_id_twice", count=len(twice) - FLAWS_SHOWN)


def _repeated(values: np.ndarray) -> np.ndarray:
    """The values that occur again, once for each time."""
    ranked = np.sort(values)
    return ranked[1:][ranked[1:] == ranked[:-1]]


def _stated_size(width: Any, height: Any) -> tuple[int, int]:
    """Whole pixels; (0, 0) for what is none."""
    try:
        size = int(float(width)), int(float(height))
    except (TypeError, ValueError, OverflowError):
        return 0, 0
    return size if 0 < min(size) and max(size) < 1 << 31 else (0, 0)


def read_own_coco(path: str, problems: Problems) -> BoxTable:
    """Reads a file of COCO's kind: images, annotations with bbox (x, y, width, height), categories.

    Raises:
      UserError: for damaged JSON, or a file without images or categories.
    """
    columns = OwnColumns(path, problems)
    columns.read()
    columns.check_box_ids()
    names, category_ids, class_of = _classes(columns, problems)
    boxes = np.array(columns.boxes, np.float64).reshape(-1, 4)
    image_rows = rows_by_id(np.array(columns.image_ids, np.int64))
    category_rows = rows_by_id(np.array(columns.category_ids, np.int64))
    box_image = image_rows(np.array(columns.box_image, np.int64))
    category = category_rows(np.array(columns.box_category, np.int64))
    places = np.array(columns.places, np.int32)
    for kind, wrong, numbers, what in (
        ("unknown_image", box_image < 0, columns.box_image, "image_id"),
        ("unknown_category", (box_image >= 0) & (category < 0), columns.box_category, "category_id"),
    ):
        rows = np.flatnonzero(wrong)
        for row in rows[:FLAWS_SHOWN].tolist():
            where = columns.files[box_image[row]] if box_image[row] >= 0 else ""
            problems.add(kind, where, f"annotations[{places[row]}]: {what} {columns.given(numbers[row])}")
        if len(rows) > FLAWS_SHOWN:
            problems.add(kind, count=len(rows) - FLAWS_SHOWN)
    keep = (box_image >= 0) & (category >= 0)
    table = BoxTable(
        name=path,
        files=columns.files,
        image_ids=[columns.given(number) for number in columns.image_ids],
        sizes=np.array(columns.sizes, np.int32).reshape(-1, 2),
        class_names=names,
        category_ids=category_ids,
        box_image=box_image[keep],
        box_class=class_of[category[keep]],
        boxes=boxes[keep],
        crowd=np.array(columns.crowd, bool)[keep],
        areas=np.array(columns.areas, np.float32)[keep],
        places=places[keep],
        place="annotations[{}]",
        problems=problems,
        parents=frozenset(columns.parents),
        sides=True,
    )
    _drop_shared_ids(table, np.array(columns.image_ids, np.int64))
    return table


def _classes(columns: OwnColumns, problems: Problems) -> tuple[list[str], list[Any], np.ndarray]:
    """Names, ids, and int32 (C,): the class of each category of the file."""
    names: dict[str, int] = {}
    category_ids: list[Any] = []
    seen: dict[int, str] = {}
    class_of = np.zeros(len(columns.names), np.int32)
    for i, (number, name) in enumerate(zip(columns.category_ids, columns.names, strict=True)):
        if number in seen:
            problems.add("category_id_twice", name, f"id {columns.given(number)}, also {seen[number]!r}")
            continue
        seen[number] = name
        if name in names:
            problems.add("category_name_twice", name, f"ids {category_ids[names[name]]} and {columns.given(number)}")
        else:
            names[name] = len(names)
            category_ids.append(columns.given(number))
        class_of[i] = names[name]
    return list(names), category_ids, class_of


def _drop_shared_ids(table: BoxTable, numbers: np.ndarray) -> None:
    """Leaves out pictures that share an id: nobody can say whose the boxes are. One listed twice is one."""
    shared = set(_repeated(numbers).tolist())
    if not shared:
        return
    files: dict[int, set[str]] = collections.defaultdict(set)
    seen: set[int] = set()
    keep = np.ones(len(numbers), bool)
    for row in np.flatnonzero(np.isin(numbers, list(shared))).tolist():
        files[int(numbers[row])].add(table.files[row])
    for row in np.flatnonzero(np.isin(numbers, list(shared))).tolist():
        number = int(numbers[row])
        if len(files[number]) == 1:
            keep[row] = number not in seen
            seen.add(number)
            if not keep[row]:
                table.problems.add("file_twice", table.files[row], f"id {table.image_ids[row]}")
        else:
            keep[row] = False
            table.problems.add("image_id_twice", table.files[row], f"id {table.image_ids[row]}")
    table.keep_pictures(keep)


# -- Pascal VOC, and tables -------------------------------------------------------------------------------------------


class _Builder:
    """Columns that are filled a picture and a box at a time."""

    def __init__(self, name: str, place: str, problems: Problems):
        self.name, self.place, self.problems = name, place, problems
        self.files: list[str] = []
        self.image_ids: list[str] = []
        self.sizes = array.array("i")
        self._names: dict[str, int] = {}
        self._image, self._class, self._places = array.array("i"), array.array("i"), array.array("i")
        self._boxes, self._crowd = array.array("d"), array.array("b")

    def add_picture(self, file: str, image_id: str, size: tuple[int, int]) -> int:
        """Its row."""
        self.files.append(file)
        self.image_ids.append(image_id)
        self.sizes.extend(size)
        return len(self.files) - 1

    def add_box(self, row: int, name: str, box: Iterable[float], crowd: bool, place: int) -> None:
        """`name`: of the class; `place`: see `BoxTable`."""
        self._boxes.extend(box)
        self._image.append(row)
        self._class.append(self._names.setdefault(name, len(self._names)))
        self._crowd.append(crowd)
        self._places.append(place)

    def table(self, sides: bool = False) -> BoxTable:
        """Classes by their names, sorted: the order is that of any other part of the data set with the same classes."""
        names = sorted(self._names)
        order = np.array([names.index(name) for name in self._names], np.int32)
        boxes = np.array(self._boxes, np.float64).reshape(-1, 4)
        return BoxTable(
            name=self.name,
            files=self.files,
            image_ids=self.image_ids,
            sizes=np.array(self.sizes, np.int32).reshape(-1, 2),
            class_names=names,
            category_ids=list(range(1, len(names) + 1)),
            box_image=np.array(self._image, np.int32),
            box_class=order[np.array(self._class, np.int32)] if names else np.zeros(0, np.int32),
            boxes=boxes,
            crowd=np.array(self._crowd, bool),
            areas=np.full(len(boxes), np.nan, np.float32),
            places=np.array(self._places, np.int32),
            place=self.place,
            problems=self.problems,
            sides=sides,
        )


def read_voc(folder: str, files: Mapping[str, str], problems: Problems) -> BoxTable:
    """Reads Pascal VOC XML.

    Files of the VOC challenges themselves (their <database> says so) count pixels from 1; all others are taken as they
    are, from 0. What is <difficult> is a crowd: neither an object nor background.

    Args:
      folder: of the XML files, for messages and their paths.
      files: name of each XML file, below `folder` -> that of the picture beside it, '' where there is none.
      problems: those met.
    """
    builder = _Builder(folder, "object {}", problems)
    for name, picture in files.items():
        try:
            root = ElementTree.fromstring(picture_bytes(os.path.join(folder, name), name))
            if root.tag != "annotation":
                raise ValueError(f"its root is <{root.tag}>, not <annotation>")
        except (BadRecord, ElementTree.ParseError, ValueError) as error:
            problems.add("bad_annotation", name, getattr(error, "reason", str(error)))
            continue
        _add_voc(builder, root, name, picture)
    return builder.table()


def _add_voc(builder: _Builder, root: ElementTree.Element, name: str, picture: str) -> None:
    stem = os.path.splitext(name.rpartition("/")[2])[0]
    stated = (root.findtext("filename") or "").strip()
    size = _stated_size(root.findtext("size/width"), root.findtext("size/height"))
    row = builder.add_picture(picture or stated or stem, stem, size)
    from_one = "VOC" in (root.findtext("source/database") or "")
    for number, item in enumerate(root.iter("object")):
        place = f"{name}: object {number}"
        label = (item.findtext("name") or "").strip()
        try:
            box = [float(item.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError:
            builder.problems.add("bad_box", builder.files[row], place)
            continue
        if not label:
            builder.problems.add("unknown_category", builder.files[row], f"{place} has no name")
            continue
        if from_one:
            box[0], box[1] = box[0] - 1, box[1] - 1
        builder.add_box(row, label, box, (item.findtext("difficult") or "0").strip() == "1", number)


def read_box_table(path: str, problems: Problems) -> BoxTable:
    """Reads a table with a row for each box; a row without numbers is a picture without boxes.

    The columns are found by the usual names (`PICTURE_COLUMNS`, `NAME_COLUMNS`, ...); a table without heading has
    image, x1, y1, x2, y2, name, as keras-retinanet's. Without a column for the class there is one class, 'object'.

    Raises:
      UserError: for a file that cannot be read, or lacks columns.
    """
    builder = _Builder(path, "line {}", problems)
    heading, rows = _table(path)
    picture, name = known_field(heading, PICTURE_COLUMNS), known_field(heading, NAME_COLUMNS)
    width, height = known_field(heading, WIDTH_COLUMNS), known_field(heading, HEIGHT_COLUMNS)
    corners = _four(heading, CORNER_COLUMNS)
    sides = None if corners else _four(heading, SIDE_COLUMNS)
    columns = corners or sides
    if picture is None or columns is None:
        raise UserError(
            f"{path} has no columns {TABLE_HEADING} (or xmin, ymin, xmax, ymax, label, image_path, ...), only: "
            f"{', '.join(heading)[:300]}; rename them"
        )
    known: dict[str, int] = {}
    for line, fields in rows:
        file = (fields.get(picture) or "").strip()
        if not file:
            problems.add("bad_image", path, f"line {line} names no picture")
            continue
        if file not in known:
            size = _stated_size(fields.get(width), fields.get(height)) if width and height else (0, 0)
            known[file] = builder.add_picture(file, file, size)
        values = [(fields.get(column) or "").strip() for column in columns]
        if not any(values):
            continue
        label = (fields.get(name) or "").strip() if name else "object"
        try:
            x1, y1, x2, y2 = map(float, values)
        except ValueError:
            problems.add("bad_box", file, f"line {line}: {' '.join(values)}"[:200])
            continue
        if not label:
            problems.add("unknown_category", file, f"line {line} names no class")
            continue
        box = (x1, y1, x1 + x2, y1 + y2) if sides else (x1, y1, x2, y2)
        builder.add_box(known[file], label, box, False, line)
    return builder.table(sides is not None)


def _four(heading: Sequence[str], known: Sequence[tuple[str, ...]]) -> list[str] | None:
    """The four columns of the first set of names that the heading has."""
    for names in known:
        found = [known_field(heading, (name,)) for name in names]
        if None not in found:
            return found
    return None


def _table(path: str) -> tuple[list[str], Iterable[tuple[int, dict[str, Any]]]]:
    """The heading, and (line, fields) of each row."""
    _, _, first = next(csv_cells(path), (0, 0, []))
    if len(first) == 6 and (_are_numbers(first[1:5]) or not any(first[1:])) and "." in first[0]:
        heading = TABLE_HEADING.split(",")
        return heading, ((line, dict(zip(heading, row, strict=False))) for line, _, row in csv_cells(path))
    rows = table_rows(path)
    begun = next(rows, None)
    if begun is None:
        raise UserError(f"{path} has no rows")
    heading = list(begun.fields)

    def all_rows() -> Iterable[tuple[int, dict[str, Any]]]:
        yield begun.line, begun.fields
        yield from ((row.line, row.fields) for row in rows)

    return heading, all_rows()


def _are_numbers(cells: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(cell)) for cell in cells)
    except ValueError:
        return False
