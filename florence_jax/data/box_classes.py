"""Classes of sets of boxes: names that different people gave them, and which of them people looked for in a picture.

Unknown is not absent: whether a class is in a picture of LVIS or OpenImages is known of some classes only. A record of
such a set says so in "exhaustive" bool (), whether all classes of its own part were looked for, "negative_ids" int32
(k,), classes that were looked for and not found, and "not_exhaustive_ids" int32 (k,), classes of which only some have
boxes. A source says in `class_sets` bool (S, K) which classes each of its S parts looked for, the part of a record is
its "set_index" int32 (), 0 where there is none; a source without `class_sets`, such as COCO, looked for all.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

NO_CLASSES = np.zeros(0, np.int32)
NO_CLASSES.flags.writeable = False


def match_classes(names: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """int32 (len(names),): the place of each name in `wanted`, -1 where it is not there.

    Names are the same where they are to the letter, else where only capitals, '_' and '-' tell them apart, if that is
    the only such name.
    """
    exact = {name: place for place, name in enumerate(wanted)}
    given = set(names)
    loose: dict[str, list[int]] = {}
    for place, name in enumerate(wanted):
        if name not in given:
            loose.setdefault(_plain(name), []).append(place)
    times = Counter(_plain(name) for name in names if name not in exact)
    found = []
    for name in names:
        near = loose.get(_plain(name), [])
        found.append(exact.get(name, near[0] if len(near) == times[_plain(name)] == 1 else -1))
    return np.array(found, np.int32).reshape(-1)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def join_classes(parts: Sequence[Sequence[str]]) -> tuple[list[str], list[np.ndarray]]:
    """The names of all parts, and int32 (len(part),) of each: the place of its names among them.

    Names of two parts are one class where `match_classes` says so; then the earlier part's name stays.
    """
    names: list[str] = []
    places = []
    for part in parts:
        place = match_classes(part, names)
        new = np.flatnonzero(place < 0)
        place[new] = len(names) + np.arange(len(new))
        names += [part[k] for k in new.tolist()]
        places.append(place)
    return names, places


# -- what people looked for -------------------------------------------------------------------------------------------


class ClassLists:
    """A list of classes for each of N owners, pictures or boxes, as columns.

    Args:
      count: N.
      owners, class_ids: int (P,), the pairs, in any order; each counts once.

    Attributes:
      offsets: int64 (N + 1,): owner i has class_ids[offsets[i] : offsets[i + 1]].
      class_ids: int32 (P',), ascending for each owner.
    """

    def __init__(self, count: int, owners: np.ndarray, class_ids: np.ndarray):
        order = np.lexsort((class_ids, owners))
        owners, class_ids = np.asarray(owners)[order], np.asarray(class_ids, np.int32)[order]
        first = np.ones(len(order), bool)
        first[1:] = (owners[1:] != owners[:-1]) | (class_ids[1:] != class_ids[:-1])
        counts = np.bincount(owners[first], minlength=count)
        self.offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.class_ids = class_ids[first]
        self.class_ids.flags.writeable = False  # records have views of it

    def of(self, owner: int) -> np.ndarray:
        """int32 (k,), a view."""
        return self.class_ids[self.offsets[owner] : self.offsets[owner + 1]]

    def padded(self, owners: slice, room: int) -> np.ndarray:
        """int32 (n, room): those of several owners, -1 where there are no more."""
        offsets = self.offsets[owners.start : owners.stop + 1]
        counts = np.diff(offsets)
        columns = np.arange(offsets[-1] - offsets[0]) - np.repeat(offsets[:-1] - offsets[0], counts)
        found = np.full((len(counts), room), -1, np.int32)
        shown = columns < room
        rows = np.repeat(np.arange(len(counts)), counts)
        found[rows[shown], columns[shown]] = self.class_ids[offsets[0] : offsets[-1]][shown]
        return found


class Hierarchy:
    """Which of K classes stand above others.

    Args:
      parents: of each class, numbers of those right above it.
    """

    def __init__(self, parents: Sequence[Iterable[int]]):
        above = [_ancestors(k, parents) for k in range(len(parents))]
        lower = np.repeat(np.arange(len(above)), np.array([len(each) for each in above], np.int64))
        upper = np.fromiter((k for each in above for k in each), np.int64, len(lower))
        self._above, self._below = ClassLists(len(above), lower, upper), ClassLists(len(above), upper, lower)

    def __bool__(self) -> bool:
        return bool(len(self._above.class_ids))

    def above(self, owners: np.ndarray, class_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (owner, class) of all classes that stand above those of pairs (P,)."""
        return _expanded(self._above, owners, class_ids)

    def below(self, owners: np.ndarray, class_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (owner, class) of all classes that stand below those of pairs (P,)."""
        return _expanded(self._below, owners, class_ids)


def _ancestors(start: int, parents: Sequence[Iterable[int]]) -> list[int]:
    found: dict[int, None] = {}
    waiting = [start]
    while waiting:
        for parent in parents[waiting.pop()]:
            if parent not in found and parent != start:
                found[parent] = None
                waiting.append(parent)
    return list(found)


def _expanded(lists: ClassLists, owners: np.ndarray, class_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    owners, class_ids = np.asarray(owners), np.asarray(class_ids)
    first = lists.offsets[class_ids]
    counts = lists.offsets[class_ids + 1] - first
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(owners, counts), lists.class_ids[np.repeat(first, counts) + inside]


def class_sets_of(source: Any) -> np.ndarray:
    """bool (S, K): which classes each part of a source with boxes looked for."""
    sets = getattr(source, "class_sets", None)
    return np.ones((1, len(source.class_names)), bool) if sets is None else sets


def is_exhaustive(source: Any) -> bool:
    """Whether every class was looked for in every picture of a source: what has no box is background."""
    return bool(class_sets_of(source).all())


def judged_classes(record: Mapping[str, Any], class_sets: np.ndarray) -> np.ndarray:
    """bool (K,): the classes of which a record says where they are and where not.

    These are the classes that its part looked for, the negative ones, and those that have a box; not those of which
    only some objects have one.

    Args:
      record: of a source with boxes, see the module.
      class_sets: of the source.
    """
    judged = np.zeros(class_sets.shape[1], bool)
    if record.get("exhaustive", True):
        judged |= class_sets[record.get("set_index", 0)]
    for name, value in (("negative_ids", True), ("class_ids", True), ("not_exhaustive_ids", False)):
        judged[np.asarray(record.get(name, NO_CLASSES), np.int32)] = value
    return judged
