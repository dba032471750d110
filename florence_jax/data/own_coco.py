"""People's own files of COCO's form: what is wrong in one is not an error, it is a counted problem."""

import array
import collections
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from florence_jax.data.annotations import (
    NEGATIVE,
    NOT_EXHAUSTIVE,
    CocoColumns,
    IdPairs,
    SourceSpec,
    list_pairs,
    rows_by_id,
)
from florence_jax.data.box_problems import FLAWS_SHOWN, Problems
from florence_jax.data.box_table import BoxTable, stated_size
from florence_jax.errors import UserError

# Texts that stand for an id are numbered from here on down.
TEXT_IDS = -(1 << 62)


class OwnColumns(CocoColumns):
    """The sections of a COCO-like file that people made: mistakes are counted, not refused.

    Attributes:
      has_lists: whether a picture has LVIS's lists of classes that were looked for.
    """

    def __init__(self, path: str, problems: Problems, kind: str):
        super().__init__(SourceSpec(kind, path, ""))
        self.has_lists = False
        self.problems = problems
        self.places, self.areas, self.box_ids = array.array("i"), array.array("f"), array.array("q")
        self.category_ids: list[int] = []
        self.names: list[str] = []
        self.frequencies: list[str] = []
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
        if self.spec.kind == "lvis" and not item.get("coco_url"):
            name = name[-16:]  # LVIS 0.5 has names of the year 2014 for files of 2017
        lists = [[self.number(each) for each in item.get(field, ())] for field in (NEGATIVE, NOT_EXHAUSTIVE)]
        number = self._own_number(item["id"])
        self.has_lists |= NEGATIVE in item
        self.take_lists(dict(zip((NEGATIVE, NOT_EXHAUSTIVE), lists, strict=True)))
        self.sizes.extend(stated_size(item.get("width"), item.get("height")))
        self.image_ids.append(number)
        self.files.append("/".join(name.split("/")[-2:]) if "://" in name else name)

    def take_box(self, item: dict) -> None:
        """See `CocoColumns`."""
        place, self._seen = self._seen, self._seen + 1
        box, image, category = item["bbox"], item["image_id"], item["category_id"]
        if type(box) is not list or len(box) != 4:
            raise ValueError(f"bbox {str(box)[:100]}")
        x, y, width, height = map(float, box)
        if type(image) is not int or type(category) is not int:
            image, category = self.number(image), self.number(category)
        number, area = item.get("id"), item.get("area")
        try:
            self.box_ids.append(number if type(number) is int else self.number(number))
        except ValueError:
            self._missing_ids += 1
        self.areas.append(area if isinstance(area, (int, float)) and area > 0 else math.nan)
        self.boxes.extend((x, y, x + width, y + height))
        self.box_image.append(image)
        self.box_category.append(category)
        self.crowd.append(item.get("iscrowd") in (1, "1"))
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
        self.frequencies.append(str(item.get("frequency", "")))
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


def read_own_coco(path: str, problems: Problems, kind: str = "coco") -> BoxTable:
    """Reads a file of COCO's kind: images, annotations with bbox (x, y, width, height), categories.

    Pictures with LVIS's "neg_category_ids" and "not_exhaustive_category_ids" make a set of which people looked for some
    classes only, whatever the kind.

    Args:
      path: of the file.
      problems: those met.
      kind: 'coco', 'lvis', whose pictures must have these lists, or 'objects365', whose file has boxes several times.

    Raises:
      UserError: for damaged JSON, or a file without images or categories.
    """
    columns = OwnColumns(path, problems, kind)
    columns.read()
    if kind == "lvis" and not columns.has_lists:
        raise UserError(
            f"{path}: its images have no {NEGATIVE!r}: is it a file of LVIS? A file of COCO's is coco:{path}"
        )
    columns.check_box_ids()
    names, category_ids, frequencies, class_of = _classes(columns, problems)
    boxes = np.array(columns.boxes, np.float64).reshape(-1, 4)
    image_rows = rows_by_id(np.array(columns.image_ids, np.int64))
    category_rows = rows_by_id(np.array(columns.category_ids, np.int64))
    box_image = image_rows(np.array(columns.box_image, np.int64))
    category = category_rows(np.array(columns.box_category, np.int64))
    places = np.array(columns.places, np.int32)
    _tell_unknown(columns, "unknown_image", box_image < 0, columns.box_image, box_image)
    wrong = (box_image >= 0) & (category < 0)
    _tell_unknown(columns, "unknown_category", wrong, columns.box_category, box_image)
    keep = (box_image >= 0) & (category >= 0)
    table = BoxTable(
        name=path,
        files=columns.files,
        image_ids=[columns.given(number) for number in columns.image_ids],
        sizes=np.array(columns.sizes, np.int32).reshape(-1, 2),
        class_names=names,
        category_ids=category_ids,
        frequencies=frequencies,
        box_image=box_image[keep],
        box_class=class_of[category[keep]],
        boxes=boxes[keep],
        crowd=np.array(columns.crowd, bool)[keep],
        group_of=np.zeros(int(keep.sum()), bool),
        areas=np.array(columns.areas, np.float32)[keep],
        places=places[keep],
        place="annotations[{}]",
        problems=problems,
        parents=frozenset(columns.parents),
        sides=True,
        numbered=True,
        exhaustive=not columns.has_lists,
        negative=_list_pairs(columns, columns.negative, category_rows, class_of),
        not_exhaustive=_list_pairs(columns, columns.not_exhaustive, category_rows, class_of),
        drops_repeats=kind == "objects365",
    )
    _drop_shared_ids(table, np.array(columns.image_ids, np.int64))
    return table


def _tell_unknown(
    columns: OwnColumns, kind: str, wrong: np.ndarray, numbers: Sequence[int], box_image: np.ndarray
) -> None:
    """Counts the boxes of a mask, whose picture or class of these numbers is not listed."""
    rows = np.flatnonzero(wrong)
    for row in rows[:FLAWS_SHOWN].tolist():
        where = columns.files[box_image[row]] if box_image[row] >= 0 else ""
        what = f"{kind.removeprefix('unknown_')}_id {columns.given(numbers[row])}"
        columns.problems.add(kind, where, f"annotations[{columns.places[row]}]: {what}")
    if len(rows) > FLAWS_SHOWN:
        columns.problems.add(kind, count=len(rows) - FLAWS_SHOWN)


def _list_pairs(
    columns: OwnColumns, flat: array.array, category_rows: Callable[[np.ndarray], np.ndarray], class_of: np.ndarray
) -> IdPairs:
    """Pairs (picture, class) of LVIS's lists; categories that are not listed are counted."""
    images, categories = list_pairs(flat, category_rows)
    if missing := len(flat) // 2 - len(images):
        columns.problems.add("unlisted_label", columns.spec.annotations, count=missing)
    return images, class_of[categories]


def _classes(columns: OwnColumns, problems: Problems) -> tuple[list[str], list[Any], list[str], np.ndarray]:
    """Names, ids and frequencies of classes, and int32 (C,): the class of each category of the file."""
    names: dict[str, int] = {}
    category_ids: list[Any] = []
    frequencies: list[str] = []
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
            frequencies.append(columns.frequencies[i])
        class_of[i] = names[name]
    return list(names), category_ids, frequencies, class_of


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
