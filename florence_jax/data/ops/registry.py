"""The registry of transforms: what an op is, and the table that op strings look names up in."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from florence_jax.data.records import Source
from florence_jax.errors import UserError

Example = dict[str, Any]


class Op(abc.ABC):
    """Base of the transforms: `__call__(example, rng) -> example`, a new dict; no other state.

    Attributes:
      name: as in op strings.
      random: whether it draws from `rng`.
      reads: fields that it needs, of the record or made by ops before it; a stream looks for them when it opens
        (`batches.check_fields`).

    Raises (on call):
      BadRecord: if the record, not the configuration, is at fault.
    """

    name = ""
    random = False
    reads: frozenset[str] = frozenset()

    @abc.abstractmethod
    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """The transformed example."""

    def check(self, sources: Sequence[Source], batch_size: int) -> None:
        """What an op demands of the data of a training stream, looked at when that opens. Raises UserError.

        The cost must not grow with the data: see `records.sample_of`.
        """
        del sources, batch_size  # most ops take any


OPS: dict[str, type[Op]] = {}


def op(name: str) -> Callable[[type[Op]], type[Op]]:
    """Class decorator: makes an `Op` known to `parse_ops` as `name`."""

    def register(cls: type[Op]) -> type[Op]:
        cls.name = name
        OPS[name] = cls
        return cls

    return register


def checked_number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float. Raises UserError, naming it, unless it is a number in [low, high]."""
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"{name} must be a number from {low} to {high}, not {value!r}")
    return float(value)


def checked_pixels(value: Any) -> int:
    """`value`, a number of pixels. Raises UserError unless it is a positive int."""
    if type(value) is not int or value < 1:
        raise UserError(f"size must be a positive whole number of pixels, not {value!r}")
    return value


def checked_range(name: str, value: Any, high: float) -> tuple[float, float]:
    """`value` as two floats. Raises UserError, naming it, unless they are 0 < a <= b <= high."""
    try:
        a, b = map(float, value)
    except (TypeError, ValueError):
        a, b = 0.0, 0.0
    if not 0 < a <= b <= high:
        raise UserError(f"{name} must be two numbers (low, high) with 0 < low <= high <= {high}, not {value!r}")
    return a, b


def key_of(example: Example) -> str:
    """The record's key, for messages."""
    return str(example.get("key", "without key"))
