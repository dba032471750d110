"""Ops that need a second record: the others of an example's source, drawn by its place in the order of examples."""

import abc
import functools
from collections.abc import Callable, Sequence

import numpy as np

from florence_jax.data.ops.registry import Example, Op
from florence_jax.data.records import PAYLOADS, BadRecord, Record
from florence_jax.errors import UserError

OF_A_STEP, OF_A_ROW = 0, 1  # what is drawn: counters of the generators, beside those of the augmentations


class Others:
    """Where an example is in the endless order of examples, and other records of its source.

    All that is drawn depends on the seed and the place alone: the same for any number of hosts and workers, and after a
    resume.

    Args:
      key: uint64 (2,), of the seed.
      position: of the example in the endless order.
      batch_size: of the global batches.
      rows: numbers of the source's records.
      read: number -> the record; where pictures are cached, as the cached ops leave it.
      before: the ops before the one that needs another record, for the other record; those a cache does not keep.

    Attributes:
      row: of the example in its global batch of `batch_size` rows.
      rng: for what is drawn beside the example's own augmentations.
    """

    def __init__(
        self,
        key: np.ndarray,
        position: int,
        batch_size: int,
        *,
        rows: range,
        read: Callable[[int], Record | BadRecord],
        before: Sequence[Op],
    ):
        self.row, self.batch_size = position % batch_size, batch_size
        self._key, self._step = key, position // batch_size
        self._rows, self._read, self._before = rows, read, before
        self.rng = _generator(key, OF_A_ROW, position)
        self._first: int | None = None  # drawn, not used yet
        self._number, self._record = 0, Record()

    def start(self, number: int, record: Record) -> None:
        """Says which record the example is made of."""
        self._number, self._record = number, record

    @property
    def rank(self) -> int:
        """Place of the row in an order of its global batch's rows that is drawn anew for each step."""
        return int(_ranks(*self._key.tolist(), self._step, self.batch_size)[self.row])

    def ahead(self, number: int) -> int:
        """The record that `draw` gives first to an example of record `number`: so that it can be read with others."""
        self._first = self._step_aside()
        return self._beside(number, self._first)

    def draw(self) -> Record | BadRecord:
        """Any other record of the source, uniformly: as it is read, no op has seen it."""
        step = self._step_aside() if self._first is None else self._first
        self._first = None
        return self._read(self._beside(self._number, step))

    def _step_aside(self) -> int:
        if len(self._rows) < 2:
            raise UserError("a data source of one record has no other one to draw: use more data, or leave it out")
        return int(self.rng.integers(1, len(self._rows)))

    def _beside(self, number: int, step: int) -> int:
        return self._rows[(number - self._rows.start + step) % len(self._rows)]

    def has_same_picture(self, record: Record) -> bool:
        """Whether another record is known to show the example's picture: its "image_id", or the same bytes."""
        mine = self._record
        if mine.get("image_id") is not None and mine["image_id"] == record.get("image_id"):
            return True
        return any(_equal(mine[name], record[name]) for name in PAYLOADS if name in mine and name in record)

    def prepare(self, record: Record) -> Example:
        """A record after the ops before the one that needs it, with draws of its own. Raises BadRecord."""
        for op in self._before:
            record = op(record, self.rng)
        return record


class PairOp(Op):
    """An op that needs another record of the example's source beside it; at most one in a chain of ops.

    A training stream calls `pair` in place of the op itself, which is for a record that has no others.
    """

    random = True

    @abc.abstractmethod
    def needs_other(self, others: Others) -> bool:
        """Whether the example at this place draws another record: that is then read together with the batch's own."""

    @abc.abstractmethod
    def pair(self, example: Example, rng: np.random.Generator, others: Others) -> Example:
        """The transformed example. Raises BadRecord where no other record fits."""


def _equal(mine: object, other: object) -> bool:
    if isinstance(mine, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(mine, other)  # type: ignore[arg-type]
    return type(mine) is type(other) and mine == other


def _generator(key: np.ndarray, what: int, number: int) -> np.random.Generator:
    # The augmentations of an example have the counter [0, 0, 0, position].
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 1 + what, number]))


@functools.lru_cache(maxsize=64)
def _ranks(low: int, high: int, step: int, batch_size: int) -> np.ndarray:
    return _generator(np.array([low, high], np.uint64), OF_A_STEP, step).permutation(batch_size)
