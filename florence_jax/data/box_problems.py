"""What is wrong with people's boxes: each kind of mistake by name, counted, the first with their places."""

import collections
from collections.abc import Iterator
from typing import NamedTuple

FLAWS_SHOWN = 500  # of each kind of mistake that are kept with their places


class Mistake(NamedTuple):
    """A kind of mistake.

    Attributes:
      what: of what so many were found, for people.
      done: what becomes of them.
    """

    what: str
    done: str


LEFT_OUT, NOT_USED, _KEPT = "left out", "not used", "kept"
# In the order of reports.
MISTAKES = {
    # files
    "missing_file": Mistake("pictures that are not there", LEFT_OUT),
    "unreadable": Mistake("pictures that cannot be read", LEFT_OUT),
    "file_twice": Mistake("pictures listed twice", "their boxes are joined"),
    "same_picture": Mistake("files with the same bytes as another one", _KEPT),
    "unused_file": Mistake("pictures in the folder that the annotations do not name", NOT_USED),
    "no_annotation": Mistake("pictures without an annotation file", LEFT_OUT),
    "bad_annotation": Mistake("annotation files that cannot be read", "left out with their pictures"),
    # pictures
    "no_size": Mistake("pictures without a stated width and height", "their own are used"),
    "turned": Mistake("pictures turned by EXIF, whose boxes lie on the stored pixels", "the boxes are turned too"),
    "rescaled": Mistake("pictures of another size than stated", "their boxes are scaled"),
    "swapped": Mistake("pictures whose width and height are stated the wrong way round", "their boxes fit, and stay"),
    "size_mismatch": Mistake("pictures of another shape than stated", LEFT_OUT),
    "not_rgb": Mistake("pictures that are not 8-bit RGB (16-bit, grey, palette, transparent)", "read as RGB"),
    "thread": Mistake("pictures of one pixel, or narrower than 1:100", LEFT_OUT),
    "huge": Mistake("pictures with a side of more than 10,000 pixels", "kept; slow to read"),
    "crowded": Mistake("pictures with more than 1,000 boxes", "kept; what a batch has no room for is ignored"),
    # items
    "bad_image": Mistake("pictures without a usable id or a file name", LEFT_OUT),
    "bad_box": Mistake("boxes that are not four numbers, or lack the id of a picture or a class", LEFT_OUT),
    "bad_category": Mistake("classes without an id", LEFT_OUT),
    # boxes
    "not_finite": Mistake("boxes with NaN or infinity", LEFT_OUT),
    "zero_area": Mistake("boxes of zero or negative size", LEFT_OUT),
    "outside": Mistake("boxes outside of the picture", LEFT_OUT),
    "thin": Mistake("boxes thinner than a pixel", _KEPT),
    "clipped": Mistake("boxes that reach beyond the picture", "cut at its edge"),
    "same_box": Mistake("boxes with the same place and class as another one", _KEPT),
    "repeated_box": Mistake("boxes with the very place and class of another one", LEFT_OUT),
    "unknown_image": Mistake("boxes of a picture that is not listed", LEFT_OUT),
    "unknown_category": Mistake("boxes of a class that is not listed", LEFT_OUT),
    "corners": Mistake("files whose boxes look like x1 y1 x2 y2, where x y width height is due", "read so"),
    "sides": Mistake("files whose boxes look like x y width height, where x1 y1 x2 y2 is due", "read so"),
    "relative": Mistake("files whose boxes look like shares of the picture, where pixels are due", "read so"),
    # ids and classes
    "image_id_twice": Mistake("pictures that share their id with another one", "left out with their boxes"),
    "box_id_twice": Mistake("boxes that share their id with another one", _KEPT),
    "box_id_missing": Mistake("boxes without an id", _KEPT),
    "category_id_twice": Mistake("classes that share their id with another one", "the first name counts"),
    "category_name_twice": Mistake("classes that share their name with another one", "joined"),
    "no_name": Mistake("classes without a name", "named by their id"),
    "names_alike": Mistake("classes whose names differ in case or spaces only", _KEPT),
    "text_id": Mistake("ids that are texts, not numbers", _KEPT),
    "denied": Mistake("classes said not to be in a picture that has boxes of them", "the boxes count"),
    "unlisted_label": Mistake("labels of pictures or classes that are not listed", NOT_USED),
    "alias_twice": Mistake("names of a vocabulary that several of its classes have", "the first class counts"),
    "unknown_alias": Mistake("names of objects that are no class of the vocabulary", LEFT_OUT),
    "unknown_attribute": Mistake("names of attributes that are not in the vocabulary", LEFT_OUT),
    "many_attributes": Mistake("attributes of objects that have more than 16", LEFT_OUT),
    "root_class": Mistake("class without boxes that stands above the others (Roboflow's class 0)", LEFT_OUT),
    "no_boxes": Mistake("classes without boxes", _KEPT),
    "one_class": Mistake("only one class", _KEPT),
    "nothing": Mistake("no boxes at all", "an error in training"),
}


# What is told in the sentence about a set, beside what is left out and not used.
CHANGED = (
    "file_twice",
    "turned",
    "rescaled",
    "swapped",
    "clipped",
    "category_id_twice",
    "category_name_twice",
    "denied",
    "alias_twice",
)


class Flaw(NamedTuple):
    """One mistake.

    Attributes:
      kind: of `MISTAKES`.
      where: a file, a picture, a class.
      detail: the value, and its place in the annotations.
    """

    kind: str
    where: str
    detail: str = ""


class Problems:
    """Mistakes as they are met.

    Attributes:
      counts: by kind.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._shown: dict[str, list[Flaw]] = {}

    def add(self, kind: str, where: str = "", detail: str = "", count: int = 1) -> None:
        """Counts a mistake, and keeps its place while there are few."""
        self.counts[kind] += count
        if self.room(kind):
            self._shown.setdefault(kind, []).append(Flaw(kind, where, detail))

    def room(self, kind: str) -> int:
        """How many more of a kind are kept with their places."""
        return FLAWS_SHOWN - len(self._shown.get(kind, ()))

    def __iter__(self) -> Iterator[Flaw]:
        """Those that were kept, in the order of `MISTAKES`."""
        return (problem for kind in MISTAKES for problem in self._shown.get(kind, ()))

    def first(self, kind: str) -> Flaw | None:
        """The first of a kind."""
        return next(iter(self._shown.get(kind, ())), None)

    def sentence(self, done: str) -> str:
        """'boxes of zero or negative size: 2, ...' of the kinds with which that was done; '' for none."""
        return ", ".join(
            f"{mistake.what}: {self.counts[kind]:,}"
            for kind, mistake in MISTAKES.items()
            if self.counts[kind] and mistake.done.startswith(done)
        )

    def said(self) -> str:
        """'; left out: ...; not used: ...; boxes that reach beyond the picture: 3 (cut at its edge)' as there are."""
        parts = [f"; {done}: {found}" for done in (LEFT_OUT, NOT_USED) if (found := self.sentence(done))]
        changed = [(MISTAKES[kind], self.counts[kind]) for kind in CHANGED if self.counts[kind]]
        return "".join([*parts, *(f"; {mistake.what}: {count:,} ({mistake.done})" for mistake, count in changed)])
