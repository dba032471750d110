"""Visual Genome (Krishna et al. 2016): objects by free names, and their attributes."""

import array
import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from florence_jax.data.annotations import IdPairs, no_pairs, rows_by_id
from florence_jax.data.box_problems import Problems
from florence_jax.data.box_table import BoxTable, stated_size
from florence_jax.data.json_stream import json_items
from florence_jax.errors import UserError

OBJECTS, IMAGES, ATTRIBUTES_FILE = "objects.json", "image_data.json", "attributes.json"
OBJECT_NAMES, ATTRIBUTE_NAMES = "objects_vocab.txt", "attributes_vocab.txt"
MOST_ATTRIBUTES = 16  # of an object


class Vocabulary:
    """Names of classes; those of a file, else all that are asked for.

    Args:
      path: of a file with a class a line, its names separated by commas, the first one its own; '' for none.
      problems: those met.

    Attributes:
      names: of the classes, in the order of the file.

    Raises:
      UserError: for a file without names, or with an empty line between others.
    """

    def __init__(self, path: str, problems: Problems):
        self._is_open = not path
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        if not path:
            return
        try:
            lines = epath.Path(path).read_bytes().decode("utf-8-sig").strip().splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error}): convert it") from error
        for line, text in enumerate(lines, 1):
            aliases = [name for name in map(_plain, text.split(",")) if name]
            if not aliases:
                raise UserError(f"{path} line {line} names no class: its number is that of a class, remove the line")
            for name in dict.fromkeys(aliases):
                if self._numbers.setdefault(name, line - 1) != line - 1:
                    problems.add("alias_twice", name, f"lines {self._numbers[name] + 1} and {line}")
            self.names.append(aliases[0])
        if not self.names:
            raise UserError(f"{path} names no class; remove it, and every name that occurs is a class")

    def number(self, name: str) -> int:
        """The class of a name, -1 for an unknown one."""
        plain = _plain(name)
        if self._is_open and plain and plain not in self._numbers:
            self._numbers[plain] = len(self.names)
            self.names.append(plain)
        return self._numbers.get(plain, -1)


def _plain(name: str) -> str:
    return " ".join(name.lower().split())


def read_visual_genome(files: Mapping[str, str], name: str, problems: Problems, chosen: set[int] | None) -> BoxTable:
    """Reads objects.json and image_data.json, and attributes.json where it is there, of versions 1.0 to 1.4.

    An object is of the first of its names that the vocabulary knows; one without such is left out, and counted. Without
    a vocabulary each name is a class. Nobody looked for every class in every picture.

    Args:
      files: paths by the names that they have in the set; the last three may be missing.
      name: for messages.
      problems: those met.
      chosen: ids of the pictures that are wanted; None for all.

    Raises:
      UserError: for damaged JSON, or a vocabulary that is none.
    """
    columns = _Images(problems, chosen)
    for place, (_, item) in enumerate(json_items(files[IMAGES])):
        columns.take(place, item)
    classes = Vocabulary(files.get(OBJECT_NAMES, ""), problems)
    objects = _Objects(columns.rows, columns.files, classes, problems)
    for place, (_, item) in enumerate(json_items(files[OBJECTS])):
        objects.take(place, item)
    has_attributes = ATTRIBUTES_FILE in files
    attributes = Vocabulary(files.get(ATTRIBUTE_NAMES, "") if has_attributes else "", problems)
    pairs = no_pairs()
    if has_attributes:
        pairs = _attributes(files[ATTRIBUTES_FILE], np.array(objects.ids, np.int64), attributes, problems)
    count = len(objects.image)
    return BoxTable(
        name=name,
        files=columns.files,
        image_ids=list(columns.rows),
        sizes=np.array(columns.sizes, np.int32).reshape(-1, 2),
        class_names=classes.names,
        category_ids=list(range(1, len(classes.names) + 1)),
        box_image=np.array(objects.image, np.int32),
        box_class=np.array(objects.classes, np.int32),
        boxes=np.array(objects.boxes, np.float64).reshape(-1, 4),
        crowd=np.zeros(count, bool),
        group_of=np.zeros(count, bool),
        areas=np.full(count, np.nan, np.float32),
        places=np.array(objects.ids, np.int64).astype(np.int32),
        place="object {}",
        problems=problems,
        sides=True,
        exhaustive=False,
        attributes=pairs,
        attribute_names=attributes.names,
        uids=columns.uids,
    )


class _Images:
    """image_data.json."""

    def __init__(self, problems: Problems, chosen: set[int] | None):
        self._problems, self._chosen = problems, chosen
        self.rows: dict[int, int] = {}
        self.files: list[str] = []
        self.sizes = array.array("i")
        self.uids: dict[int, str] = {}

    def take(self, place: int, item: Any) -> None:
        try:
            number = int(item["image_id"] if "image_id" in item else item["id"])
            size, coco = stated_size(item.get("width"), item.get("height")), item.get("coco_id")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self._problems.add("bad_image", "", f"{IMAGES}[{place}] {error!r}")
            return
        if self._chosen is not None and number not in self._chosen:
            return
        if number in self.rows:
            self._problems.add("file_twice", f"{number}.jpg", f"{IMAGES}[{place}]")
            return
        self.rows[number] = len(self.files)
        self.files.append(f"{number}.jpg")
        self.sizes.extend(size)
        if isinstance(coco, int):
            self.uids[number] = f"coco:{coco:012d}"


class _Objects:
    """objects.json."""

    def __init__(self, rows: Mapping[int, int], files: Sequence[str], classes: Vocabulary, problems: Problems):
        self._rows, self._files, self._vocabulary, self._problems = rows, files, classes, problems
        self.ids, self.image, self.classes = array.array("q"), array.array("i"), array.array("i")
        self.boxes = array.array("d")

    def take(self, place: int, item: Any) -> None:
        try:
            number = int(item["image_id"] if "image_id" in item else item["id"])
            objects = item["objects"]
        except (KeyError, TypeError, ValueError) as error:
            self._problems.add("bad_image", "", f"{OBJECTS}[{place}] {error!r}")
            return
        row = self._rows.get(number)
        if row is None:
            self._problems.add("unknown_image", f"{number}.jpg", f"{OBJECTS}[{place}]", count=len(objects))
            return
        for thing in objects:
            self._take(row, thing)

    def _take(self, row: int, thing: Any) -> None:
        try:
            box = [float(thing[side]) for side in ("x", "y", "w", "h")]
            number = int(thing["object_id"] if "object_id" in thing else thing["id"])
            names = [str(name) for name in thing["names"]]
        except (KeyError, TypeError, ValueError) as error:
            self._problems.add("bad_box", self._files[row], f"{error!r}")
            return
        known = next((k for k in map(self._vocabulary.number, names) if k >= 0), -1)
        if known < 0:
            self._problems.add("unknown_alias", self._files[row], f"object {number}: {', '.join(names)}"[:200])
            return
        self.ids.append(number)
        self.image.append(row)
        self.classes.append(known)
        self.boxes.extend((box[0], box[1], box[0] + box[2], box[1] + box[3]))


def _attributes(path: str, object_ids: np.ndarray, known: Vocabulary, problems: Problems) -> IdPairs:
    """Pairs (box, attribute), each once; those of objects that are not used are left out with them."""
    objects, numbers = array.array("q"), array.array("i")
    for number, name in _attribute_names(path):
        attribute = known.number(name)
        if attribute < 0:
            problems.add("unknown_attribute", "", f"object {number}: {name}"[:200])
            continue
        objects.append(number)
        numbers.append(attribute)
    if not len(objects) or not len(object_ids):
        return no_pairs()
    rows = rows_by_id(object_ids)(np.array(objects, np.int64))
    pairs = np.unique(np.stack([rows, np.array(numbers, np.int32)])[:, rows >= 0], axis=1)
    if many := int(np.maximum(np.bincount(pairs[0]) - MOST_ATTRIBUTES, 0).sum()):
        problems.add("many_attributes", path, count=many)
    return pairs[0].astype(np.int32), pairs[1].astype(np.int32)


def _attribute_names(path: str) -> Iterator[tuple[int, str]]:
    """(object id, name of an attribute)."""
    for place, (_, item) in enumerate(json_items(path)):
        try:
            for thing in item["attributes"]:
                number = int(thing["object_id"] if "object_id" in thing else thing["id"])
                for name in thing.get("attributes") or ():
                    yield number, str(name)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: item {place} is none of Visual Genome's attributes ({error!r})") from error


def find_files(folder: str, names: Sequence[str]) -> dict[str, str]:
    """Paths of the set's files among names below a folder; an archive may have unpacked into a folder of its own.

    Raises:
      UserError: where objects.json or image_data.json is missing, or one is there twice.
    """
    wanted = (OBJECTS, IMAGES, ATTRIBUTES_FILE, OBJECT_NAMES, ATTRIBUTE_NAMES)
    found = collections.defaultdict(list)
    for name in names:
        if (base := name.rpartition("/")[2]) in wanted:
            found[base].append(name)
    for name in wanted:
        if len(found[name]) > 1 or (not found[name] and name in (OBJECTS, IMAGES)):
            there = f"several, {', '.join(found[name])}" if found[name] else "none"
            raise UserError(
                f"Visual Genome in {folder} needs one {name}, there is {there}; get it from "
                "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
            )
    return {name: str(epath.Path(folder) / each[0]) for name, each in found.items() if each}
