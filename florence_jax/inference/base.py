"""What `python -m florence_jax.predict` asks of the weights of a task: one answer for every picture of a source."""

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from florence_jax.data.ops.image import Decode
from florence_jax.data.records import Record, Source
from florence_jax.data.sources.catalog import open_pictures

SHOWN_CLASSES = 3  # below a picture of the page


@dataclasses.dataclass(frozen=True)
class Found:
    """The answer for one record.

    Attributes:
      index: row of the record in its source. key: its name.
      rows: a line of the CSV file each, as values by column; a detector has one for every box, perhaps none.
      text: what the page says below the picture.
      details: what the answerer wants to see again, for `picture` and `files`.
    """

    index: int
    key: str
    rows: Sequence[Mapping[str, Any]]
    text: str
    details: Any = None


class Answerer(Protocol):
    """Trained weights that answer about pictures; named by their task in `tasks.TASKS`.

    Attributes:
      columns: of the CSV file, after the one with the file's name.
      plural: what it answers about.
      figures: kind of the page's figures, see `page.figure_html`.
    """

    columns: tuple[str, ...]
    plural: str = "pictures"
    figures: str = ""

    @staticmethod
    def open_input(args: argparse.Namespace) -> Source:
        """What is answered about, by the name that a user gives, `args.input`. Raises UserError."""
        return open_pictures(args.input)

    def check(self, record: Record) -> None:
        """Raises BadRecord, which says why, for a record about which nothing can be answered."""
        Decode()(record, np.random.default_rng(0))

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Adds the options that only this kind of weights has."""

    @classmethod
    def open(cls, init: str, args: argparse.Namespace) -> "Answerer":
        """Loads the weights of the folder `init`. Raises UserError, also for options that do not fit them."""

    def answers(self, source: Source) -> Iterator[Found]:
        """Of every readable record, in order; unreadable ones are left out."""

    def picture(self, record: Record, found: Found) -> str:
        """Data URI of the picture for the page, with what was found drawn on it; '' if it cannot be read."""

    def picture_file(self, record: Record, found: Found) -> bytes | None:
        """The picture with what was found drawn on it, a JPEG file; None for no such file."""
        del record, found
        return None

    def remarks(self, answers: Sequence[Found]) -> Sequence[str]:
        """Sentences about all answers, for the terminal and the page."""
        del answers
        return ()

    def files(self, answers: Sequence[Found]) -> Mapping[str, bytes]:
        """Further files about all answers, by name."""
        del answers
        return {}


def best_classes(probabilities: np.ndarray, names: Sequence[str], top: int) -> list[tuple[str, float]]:
    """(name, probability) of the `top` likeliest of K classes, best first; of equals the first."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [(names[place], float(probabilities[place])) for place in order]
