"""The questions about one picture as one record, so that it is read, and encoded, once for all of them."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np

from florence_jax.data.records import BadRecord, BaseSource, Record, Source, Subset, described, evenly, summary_of
from florence_jax.errors import UserError


class QuestionGroups(BaseSource):
    """Questions, up to `places` about one picture in a record.

    Those about a picture are taken in their order; what does not fill a record is in one with fewer. A record has "key"
    and "image" (or "images") of its first question, and "questions", the records of all of them without pictures.

    Args:
      source: of the questions. places: of a record, at least 1.

    Attributes:
      name, summary: of the source. places: of a record.

    Raises:
      UserError: for a source that does not know its pictures, or has no questions.
    """

    def __init__(self, source: Source, places: int):
        self.name, self.summary, self._source, self.places = source.name, summary_of(source), source, places
        numbers = picture_numbers(source)
        if not len(numbers):
            raise UserError(f"data source {source.name} has no questions")
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        starts = np.flatnonzero(place % places == 0)
        self._order, self._bounds = order, np.append(starts, len(order))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def rows(self, index: int) -> list[int]:
        """Rows of the source that are in a record."""
        return self._order[self._bounds[index] : self._bounds[index + 1]].tolist()

    def __getitem__(self, index: int) -> Record:
        (found,) = self.__getitems__([index])
        if isinstance(found, BadRecord):
            raise found
        return found

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        firsts = self._source.__getitems__([self.rows(index)[0] for index in indices])
        return [
            first if isinstance(first, BadRecord) else first | self._questions(index)
            for first, index in zip(firsts, indices, strict=True)
        ]

    def metadata(self) -> Iterator[Record]:
        """All records without pictures, which are not touched."""
        return map(self.described, range(len(self)))

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; no picture is touched."""
        return list(map(self.described, evenly(len(self), count).tolist()))

    def described(self, index: int) -> Record:
        """See `records.described`."""
        questions = self._questions(index)
        return questions["questions"][0] | questions

    def _questions(self, index: int) -> Record:
        return {"questions": [described(self._source, row) for row in self.rows(index)]}


def picture_numbers(source: Source) -> np.ndarray:
    """int64 (N,): equal numbers for questions about the same picture, in the order in which pictures first come.

    Raises:
      UserError: for a source that does not know its pictures.
    """
    if isinstance(source, Subset):
        return _renumbered(picture_numbers(source.whole)[source.rows])
    ids = getattr(source, "image_ids", None)
    if ids is None:
        raise UserError(f"data source {source.name} has no questions about pictures; see docs/vision_language.md")
    if isinstance(ids, np.ndarray):
        return _renumbered(ids)
    known: dict[str, int] = {}
    return np.fromiter((known.setdefault(str(each), len(known)) for each in ids), np.int64, len(ids))


def _renumbered(numbers: np.ndarray) -> np.ndarray:
    _, first, place = np.unique(numbers, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[place]


def hold_out_pictures(source: Source, count: int) -> tuple[Subset, Subset]:
    """All questions but those about `count` pictures; and those.

    Which pictures, their ids say by a hash: the same ones whatever else a set has, and in whatever order.

    Raises:
      UserError: as `picture_numbers`.
    """
    numbers = picture_numbers(source)
    first = np.unique(numbers, return_index=True)[1]
    ids = [str(source.image_ids[row]) for row in first.tolist()]  # type: ignore[attr-defined]
    order = sorted(range(len(ids)), key=lambda k: (blake2b(ids[k].encode(), digest_size=8).digest(), ids[k]))
    held = np.isin(numbers, order[:count])
    name = f"{source.name} ({count:,} of {len(ids):,} pictures)"
    return Subset(source, np.flatnonzero(~held), source.name), Subset(source, np.flatnonzero(held), name)
