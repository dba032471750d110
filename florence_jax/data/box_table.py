"""The boxes of one set as columns, whatever files they were read from."""

import array
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from florence_jax.data.annotations import IdPairs, no_pairs
from florence_jax.data.box_problems import Problems


@dataclasses.dataclass
class BoxTable:
    """The boxes of one set, N pictures and M boxes, as columns.

    Attributes:
      name: of the file or folder, for messages.
      files: N names of pictures as the set has them.
      image_ids: N ids as the set has them.
      sizes: int32 (N, 2), stated width and height; 0 where it states none.
      class_names: K names. category_ids: K ids as the set has them.
      frequencies: LVIS's letters for how many pictures have each of the K classes, see `BoxSource`; () for none.
      box_image, box_class: int32 (M,), indices.
      boxes: float64 (M, 4), x1 y1 x2 y2, pixels of the stated size; anything that the set says.
      crowd, group_of: bool (M,). areas: float32 (M,), stated areas, NaN where there is none.
      places: int32 (M,), number of each box in the set; `place` makes a text of it.
      place: such as 'annotations[{}]'.
      problems: met so far.
      parents: names of classes that stand above others.
      sides: whether the set writes x, y, width, height.
      numbered: whether the ids of classes are the set's own.
      left_out: names of pictures that were dropped.
      exhaustive: whether all classes were looked for in all pictures; then the two below are empty.
      negative, not_exhaustive: pairs (picture, class): looked for and not there; there, but not all have a box.
      attributes: pairs (box, attribute). attribute_names: of those.
      uids: by which other sets know a picture, by its id here.
      relative: whether boxes are in shares of their pictures, of which the set states no sizes.
      drops_repeats: whether boxes with the place and class of another one are left out.
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
    group_of: np.ndarray
    areas: np.ndarray
    places: np.ndarray
    place: str
    problems: Problems
    parents: frozenset[str] = frozenset()
    sides: bool = False
    numbered: bool = False
    left_out: list[str] = dataclasses.field(default_factory=list)
    exhaustive: bool = True
    negative: IdPairs = dataclasses.field(default_factory=no_pairs)
    not_exhaustive: IdPairs = dataclasses.field(default_factory=no_pairs)
    attributes: IdPairs = dataclasses.field(default_factory=no_pairs)
    attribute_names: Sequence[str] = ()
    uids: Mapping[Any, str] = dataclasses.field(default_factory=dict)
    drops_repeats: bool = False
    relative: bool = False
    frequencies: Sequence[str] = ()

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
        self.attributes = _renumbered(self.attributes, np.where(mask, np.cumsum(mask) - 1, -1))
        for name in ("box_image", "box_class", "boxes", "crowd", "group_of", "areas", "places"):
            setattr(self, name, getattr(self, name)[mask])

    def keep_pictures(self, mask: np.ndarray) -> None:
        """Drops the other pictures, and their boxes."""
        number = np.cumsum(mask) - 1
        rows = np.flatnonzero(mask).tolist()
        self.left_out += [self.files[i] for i in np.flatnonzero(~mask).tolist()]
        self.files, self.image_ids = [self.files[i] for i in rows], [self.image_ids[i] for i in rows]
        self.sizes = self.sizes[mask]
        self.keep_boxes(mask[self.box_image])
        self.move_pictures(np.where(mask, number, -1))

    def move_pictures(self, target: np.ndarray) -> None:
        """Gives what is of picture i to target[i], int (N,); -1, which no box may have, for nobody."""
        self.box_image = target[self.box_image].astype(np.int32)
        self.negative, self.not_exhaustive = (
            _renumbered(pairs, target) for pairs in (self.negative, self.not_exhaustive)
        )

    def keep_classes(self, keep: np.ndarray) -> None:
        """Drops the other classes, which have no boxes; `keep`: bool (K,)."""
        number = np.where(keep, np.cumsum(keep) - 1, -1)
        self.box_class = number[self.box_class].astype(np.int32)
        self.negative, self.not_exhaustive = (
            _renumbered(pairs[::-1], number)[::-1] for pairs in (self.negative, self.not_exhaustive)
        )
        rows = np.flatnonzero(keep).tolist()
        self.class_names, self.category_ids = [self.class_names[k] for k in rows], [self.category_ids[k] for k in rows]
        self.frequencies = [self.frequencies[k] for k in rows] if self.frequencies else ()


def _renumbered(pairs: IdPairs, number: np.ndarray) -> IdPairs:
    """The pairs with other first members, without those that have none."""
    first = number[pairs[0]]
    return first[first >= 0].astype(np.int32), pairs[1][first >= 0]


class TableBuilder:
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
        numbers = {name: k for k, name in enumerate(names)}
        order = np.array([numbers[name] for name in self._names], np.int32)
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
            group_of=np.zeros(len(boxes), bool),
            areas=np.full(len(boxes), np.nan, np.float32),
            places=np.array(self._places, np.int32),
            place=self.place,
            problems=self.problems,
            sides=sides,
        )


def stated_size(width: Any, height: Any) -> tuple[int, int]:
    """Whole pixels; (0, 0) for what is none."""
    try:
        size = int(float(width)), int(float(height))
    except (TypeError, ValueError, OverflowError):
        return 0, 0
    return size if 0 < min(size) and max(size) < 1 << 31 else (0, 0)
