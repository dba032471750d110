"""Several sets of boxes as one: one list of classes, and for each picture which of them people looked for."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from florence_jax.data.box_classes import NO_CLASSES, class_sets_of, is_exhaustive, join_classes
from florence_jax.data.box_problems import Problems
from florence_jax.data.buckets import shapes_of
from florence_jax.data.records import BadRecord, BaseSource, Record, described, sample_of, summary_of
from florence_jax.data.sources.boxes import LOOKED_FOR, BoxSource, FileBoxSource, RecordBoxSource, pictures_by_class
from florence_jax.data.sources.picture_files import shown

RECORDS_COMPARED = 2000  # records of a set of records that are looked at for pictures that another set has too
# Names of pictures that several sets share: COCO's and LVIS's, Objects365's, OpenImages's.
NUMBERED = (
    (re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})"), "coco"),
    (re.compile(r"(objects365_v\d_\d{8})"), "objects365"),
    (re.compile(r"([0-9a-f]{16})"), "openimages"),
)


class MergedBoxSource(BaseSource):
    """The pictures of several sets, one set after the other.

    Classes of the same name are one. What has no box is background for the classes only that its own set looked for:
    "set_index" of a record says which row of `class_sets` that is, see `data.box_classes`. Keys and image ids begin
    with the number of the set: '1:000000000139.jpg'.

    Pictures of two sets are the same where `uids` says so. Both are used, each with the boxes and classes of its set.

    Args:
      spec: for messages.
      parts: the sets.

    Attributes:
      class_names, category_ids, class_sets: see `BoxSource`; ids are the numbers of classes.
      same: int64 (len(self),): pictures with one number are the same, as far as it is known.
    """

    def __init__(self, spec: str, parts: Sequence[BoxSource]):
        self.name, self._parts, self.problems = spec, tuple(parts), Problems()
        self._starts = np.cumsum([0, *map(len, parts)])
        names, self._places = join_classes([part.class_names for part in parts])
        self.class_names, self.category_ids = tuple(names), tuple(range(len(names)))
        sets = [class_sets_of(part) for part in parts]
        self._first_set = np.cumsum([0, *map(len, sets)])
        self.class_sets = np.zeros((self._first_set[-1], len(names)), bool)
        for first, rows, place in zip(self._first_set[:-1].tolist(), sets, self._places, strict=True):
            self.class_sets[first : first + len(rows), place] = rows
        self.same, said = self._same_pictures()
        self.summary = self._summary(said)

    def _summary(self, said: str) -> dict[str, Any]:
        known: set[int] = set()
        of_part = []
        for part, place in zip(self._parts, self._places, strict=True):
            common = len(known.intersection(place.tolist()))
            of_part.append(f"{len(place):,} of {shown(part.name)}" + (f" ({common:,} of them known)" if known else ""))
            known.update(place.tolist())
        says = f"joined: {len(self):,} pictures, {len(self.class_names):,} classes: {', '.join(of_part)}"
        if not all(map(is_exhaustive, self._parts)) or not self.class_sets.all():
            says += "; what has no box is background for the classes only that its set looked for"
        lines = [summary_of(part).get("says", "") for part in self._parts]
        return {
            "folder": self.name,
            "pictures": len(self),
            "texts": "boxes",
            "parts": [dict(summary_of(part)) for part in self._parts],
            "says": "\n".join(filter(None, [*lines, says + said])),
        }

    def _same_pictures(self) -> tuple[np.ndarray, str]:
        """`same`, and what is to be said of it."""
        same = np.arange(len(self))
        first: dict[str, int] = {}
        twice, example = 0, ""
        for start, part in zip(self._starts.tolist(), self._parts, strict=False):
            own: dict[str, int] = {}
            for row, names in enumerate(uids(part)):
                known = [name for name in names if name in first]
                place = next((first[name] for name in known if first[name] >= 0), -1)
                if known:
                    twice, example = twice + 1, example or known[0]
                if not _is_sampled(part):  # else the row is not that of the record: nobody knows where that is
                    same[start + row] = place = place if place >= 0 else start + row
                own.update(dict.fromkeys(names, place))
            first |= {name: place for name, place in own.items() if first.get(name, -1) < 0}
        said = ""
        if twice:
            said = (
                f"; {twice:,} pictures are in another of the sets too, such as {example!r}: each is used with the "
                "boxes of its set; florence_jax.curation.detection makes one record of them"
            )
        large = [shown(part.name) for part in self._parts if _is_sampled(part)]
        return same, said + "".join(
            f"; of {name} {RECORDS_COMPARED:,} pictures were compared with the others" for name in large
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def shapes(self) -> np.ndarray:
        """float32 (N, 2): height and width of all pictures, for `make_buckets`."""
        return np.concatenate([shapes_of(part) for part in self._parts])

    def pictures_by_class(self) -> np.ndarray:
        """float64 (K,): in how many pictures each class has a box, a picture of several sets once for each."""
        found = np.zeros(len(self.class_names))
        for part, place in zip(self._parts, self._places, strict=True):
            np.add.at(found, place, pictures_by_class(part))
        return found

    def __getitem__(self, index: int) -> Record:
        part, row = self._place(index)
        return self._joined(part, self._parts[part][row])

    def _place(self, index: int) -> tuple[int, int]:
        """Set, and row of it."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        parts = np.searchsorted(self._starts, np.asarray(indices, np.int64), side="right") - 1
        found: list[Record | BadRecord] = [{}] * len(indices)
        for part in np.unique(parts).tolist():
            places = np.flatnonzero(parts == part).tolist()
            records = self._parts[part].__getitems__([indices[i] - int(self._starts[part]) for i in places])
            for place, record in zip(places, records, strict=True):
                found[place] = record if isinstance(record, BadRecord) else self._joined(part, record)
        return found

    def metadata(self) -> Iterator[Record]:
        """All records in order."""
        for number, part in enumerate(self._parts):
            for record in part.metadata():
                yield self._joined(number, record)

    def described(self, index: int) -> Record:
        """See `records.described`."""
        part, row = self._place(index)
        return self._joined(part, described(self._parts[part], row))

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`: of each set as many."""
        each = -(-count // len(self._parts))
        return [self._joined(i, record) for i, part in enumerate(self._parts) for record in sample_of(part, each)]

    def _joined(self, part: int, record: Record) -> Record:
        place = self._places[part]
        ids = {name: place[np.asarray(record.get(name, NO_CLASSES), np.int32)] for name in ("class_ids", *LOOKED_FOR)}
        row = int(self._first_set[part]) + int(record.get("set_index", 0))
        looked_for = {"exhaustive": bool(record.get("exhaustive", True)), "set_index": np.int32(row)}
        names = {"key": f"{part + 1}:{record['key']}", "image_id": f"{part + 1}:{record['image_id']}"}
        return record | names | ids | looked_for


def uids(source: BoxSource) -> Iterator[Iterable[str]]:
    """Names of each picture of a source by which another source may have it too.

    They are the ids that `curation.detection` gives, 'coco:000000000139'; of other files their name and size. Of many
    records some are looked at.
    """
    if isinstance(source, FileBoxSource):
        sizes = source.sizes.tolist()
        for row, (file, image_id) in enumerate(zip(source.files, source.image_ids, strict=True)):
            yield (source.uids.get(image_id) or picture_uid(file, *sizes[row]),)
    elif isinstance(source, RecordBoxSource):
        for record in source.sample(RECORDS_COMPARED) if _is_sampled(source) else source.metadata():
            yield record.get("image_ids") or (record["key"],)


def _is_sampled(source: BoxSource) -> bool:
    return isinstance(source, RecordBoxSource) and len(source) > RECORDS_COMPARED


def picture_uid(file: str, width: int, height: int) -> str:
    """How another set may know a picture file."""
    stem, suffix = os.path.splitext(file.rpartition("/")[2])
    for pattern, kind in NUMBERED:
        if match := pattern.fullmatch(stem):
            return f"{kind}:{match[1]}"
    return f"{stem}{suffix} of {width} x {height}"
