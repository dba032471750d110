"""Several sets of questions as one, such as VQA v2's training and validation questions, which papers train on."""

from collections.abc import Iterator, Sequence

import numpy as np

from florence_jax.data.batches import starts_of
from florence_jax.data.records import BadRecord, BaseSource, Record, Source, described, scattered, summary_of
from florence_jax.data.sources.catalog import open_source, split_mixture
from florence_jax.errors import UserError


class JoinedQuestions(BaseSource):
    """The questions of several sources, one after the other.

    Pictures of different sources are different ones, whatever their ids, unless they are of one folder. "key" and
    "image_id" of a record begin with the number of its source, or of the first with its pictures: '0:42'.

    Args:
      name: for messages.
      sources: of questions, at least one; each knows its `image_ids`.

    Attributes:
      name, summary.
      class_names: of the sources.

    Raises:
      UserError: for sources of other records, or whose classes differ.
    """

    def __init__(self, name: str, sources: Sequence[Source]):
        self.name, self._sources, self._starts = name, list(sources), starts_of(sources)
        if other := [source.name for source in sources if not hasattr(source, "image_ids")]:
            raise UserError(f"data source {other[0]}: its records are no questions")
        classes = {tuple(getattr(source, "class_names", ())) for source in sources}
        if len(classes) > 1:
            raise UserError(f"data {name!r}: the sets have different classes: {', '.join(map(str, sorted(classes)))}")
        self.class_names = classes.pop()
        folders = [summary_of(source).get("folder", f"source {k}") for k, source in enumerate(sources)]
        self._pictures = [folders.index(folder) for folder in folders]
        says = "; ".join(filter(None, (summary_of(source).get("says") for source in sources)))
        self.summary = {"sets": len(sources), "questions": len(self), "says": says}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def image_ids(self) -> list[str]:
        """Of each question."""
        parts = zip(self._pictures, self._sources, strict=True)
        return [f"{number}:{image}" for number, source in parts for image in source.image_ids]  # type: ignore[attr-defined]

    def __getitem__(self, index: int) -> Record:
        (found,) = self.__getitems__([index])
        if isinstance(found, BadRecord):
            raise found
        return found

    def __getitems__(self, indices: Sequence[int]) -> list[Record | BadRecord]:
        places = [self._place(index) for index in indices]
        found: list[Record | BadRecord] = [{}] * len(places)
        for part in {part for part, _ in places}:
            rows = [k for k, (other, _) in enumerate(places) if other == part]
            records = self._sources[part].__getitems__([places[k][1] for k in rows])
            for k, record in zip(rows, records, strict=True):
                found[k] = record if isinstance(record, BadRecord) else self._of(part, record)
        return found

    def described(self, index: int) -> Record:
        """See `records.described`."""
        part, row = self._place(index)
        return self._of(part, described(self._sources[part], row))

    def metadata(self) -> Iterator[Record]:
        """All records without their pictures."""
        return (self._of(part, record) for part, source in enumerate(self._sources) for record in source.metadata())

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`."""
        return list(map(self.described, scattered(len(self), count).tolist()))

    def _place(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])

    def _of(self, part: int, record: Record) -> Record:
        image = f"{self._pictures[part]}:{record['image_id']}"
        return record | {"key": f"{part}:{record['key']}", "image_id": image}


def open_questions(spec: str) -> Source:
    """Opens a set of questions by name, see `catalog.open_source`; several, joined by '|', as one.

    Raises:
      UserError: as `open_source` and `JoinedQuestions`; for a weight.
    """
    parts = split_mixture(spec)
    if weighted := [name for name, weight in parts if weight != 1]:
        raise UserError(f"data source {weighted[0]!r}: sets of questions are joined as they are, without a weight")
    sources = [open_source(name) for name, _ in parts]
    return sources[0] if len(sources) == 1 else JoinedQuestions(spec, sources)
