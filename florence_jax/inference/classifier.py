"""Classes of pictures, for `florence_jax.predict`: by a trained head, or by name (zero-shot)."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from florence_jax.data.classes import choose_templates
from florence_jax.data.records import Record, Source
from florence_jax.errors import UserError
from florence_jax.inference.base import SHOWN_CLASSES, Answerer, Found, best_classes
from florence_jax.inference.class_names import read_names
from florence_jax.inference.florence import Florence
from florence_jax.pictures import thumbnail


class Classifier(Answerer):
    """See `inference.base.Answerer`.

    Args:
      model: the weights.
      names: those of each class, for zero-shot; () for the classes that the weights were trained for.
      top: classes of each picture in the tables.
      templates: for the prompts of the names, see `Florence.classify`; None for its default.

    Raises:
      UserError: for weights that were not trained for classes, where no names are given.
    """

    columns = ("class", "probability", "rank")

    def __init__(
        self,
        model: Florence,
        names: Sequence[Sequence[str]] = (),
        top: int = 1,
        templates: Sequence[str] | None = None,
    ):
        if top < 1:
            raise UserError(f"--top={top} must be at least 1")
        if not names and not model.classes:
            raise UserError(
                f"the weights in {model.encoder.description.folder} were not trained for classes: name some with "
                "--names=cat,dog or --names=FILE, a name a line (zero-shot)"
            )
        self.model, self.top, self.templates = model, top, templates
        self.names = tuple(given[0] for given in names) or model.classes
        by_name = bool(names) or model.encoder.head is None
        self._prompted = (tuple(names) or model.encoder.description.names) if by_name else ()

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Adds the options of classification."""
        parser.add_argument("--names", default="", help="classes: NAME,NAME,... or a file, a line each: NAME | SYNONYM")
        parser.add_argument(
            "--templates",
            default="",
            help="prompts of the names: a file, a line each with {} for the name, or a set's name, such as food101; "
            "default: those of the fine-tuning, else CLIP's",
        )
        parser.add_argument("--top", type=int, default=1, help="classes of each picture in the tables")
        parser.add_argument("--res", type=int, default=None, help="image size in pixels; default: the weights' own")
        parser.add_argument("--tokenizer", default="", help="default: the one that the weights were trained with")

    @classmethod
    def open(cls, init: str, args: argparse.Namespace) -> "Classifier":
        """Loads the weights of the folder `init`."""
        model = Florence(init, args.res, args.tokenizer, batch_size=args.batch_size)
        templates = choose_templates(args.templates) if args.templates else None
        return cls(model, read_names(args.names), args.top, templates)

    def answers(self, source: Source) -> Iterator[Found]:
        """Of every readable record, in order."""
        for index, key, row in self.model.each_probability(source, self._prompted, self.templates):
            best = best_classes(row, self.names, max(self.top, SHOWN_CLASSES))
            rows: list[dict[str, Any]] = [
                {"class": name, "probability": round(value, 6), "rank": rank}
                for rank, (name, value) in enumerate(best[: self.top], 1)
            ]
            yield Found(index, key, rows, ", ".join(f"{name} {value:.2f}" for name, value in best[:SHOWN_CLASSES]))

    def picture(self, record: Record, found: Found) -> str:
        """The picture, small."""
        del found
        return thumbnail(record["image"])
