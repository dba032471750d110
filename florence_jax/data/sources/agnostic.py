"""Sets of boxes whose classes are all one: what a class-agnostic detector, of proposals, is trained and scored on."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from florence_jax.data.box_classes import class_sets_of, is_exhaustive, judged_classes
from florence_jax.data.records import BadRecord, BaseSource, Record, described, sample_of, summary_of
from florence_jax.data.sources.boxes import LOOKED_FOR, BoxSource

OBJECT = "object"  # the one class
NOT_AGNOSTIC = ("exhaustive", *LOOKED_FOR, "set_index")  # fields about classes that people looked for


class AgnosticBoxes(BaseSource):
    """A `BoxSource` in which every box is of the class `OBJECT`.

    Fields about classes that people looked for are left out. Of a set in which not every class was looked for in every
    picture, a record says by "partly_boxed", bool (), whether any was not: an object without a box may be anywhere
    there. With `config.detector.unknown` 'ignore' what lies in such a picture apart from all boxes is neither object
    nor background in training, see `losses.detection`; with 'background' what nobody boxed is background. So it is in
    scoring, always: of such a set average precision is too low, recall is not.

    Args:
      source: pictures with boxes of any classes.

    Attributes:
      partly_boxed: whether records say so.
    """

    def __init__(self, source: BoxSource):
        self.name, self._source = source.name, source
        self.partly_boxed, self._class_sets = not is_exhaustive(source), class_sets_of(source)
        self.class_names: Sequence[str] = (OBJECT,)
        self.category_ids: Sequence[Any] = (1,)
        found = dict(summary_of(source))
        self.summary = found | {"says": f"{found['says']}; all of them one class, {OBJECT!r}"} if found else {}
        for name in ("shapes", "same"):  # where the source knows them without its records
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return self._agnostic(self._source[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        found = self._source.__getitems__(indices)
        return [record if isinstance(record, BadRecord) else self._agnostic(record) for record in found]

    def metadata(self) -> Iterator[Record]:
        """Of all readable records, in order."""
        return map(self._agnostic, self._source.metadata())

    def described(self, index: int) -> Record:
        """See `records.described`."""
        return self._agnostic(described(self._source, index))

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`."""
        return list(map(self._agnostic, sample_of(self._source, count)))

    def _agnostic(self, record: Record) -> Record:
        kept = {name: value for name, value in record.items() if name not in NOT_AGNOSTIC}
        if self.partly_boxed:
            kept["partly_boxed"] = ~judged_classes(record, self._class_sets).all()
        return kept | {"class_ids": np.zeros(len(record["boxes"]), np.int32)}
