"""What trained weights say about your own pictures, from the weights' folder alone.

    python -m florence_jax.predict --init=runs/mine --input=my_pictures --out=found
    python -m florence_jax.predict --init=runs/pretrain --input=my_pictures --out=found --names=cat,dog,horse

What the folder was trained for decides what is done: a classifier gives its classes; weights of a pretraining classify
by the names that --names gives (zero-shot); actions of videos are told for each second of a long one. --input is a
folder, whose pictures (videos, where the weights are of these) are taken at any depth, one file, or
a data source of the project. Into --out go predictions.csv (a line for each picture and answer), predictions.json (one
object for each picture) and report.html with pictures. Files that cannot be read are listed and passed over.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from florence_jax.command_line import enter, exit_code
from florence_jax.data.records import BadRecord, Source, summary_of
from florence_jax.errors import UserError
from florence_jax.files import csv_bytes, with_home, write_bytes, write_json
from florence_jax.inference.base import Answerer, Found
from florence_jax.page import figure_html, markup, table_html, write_page
from florence_jax.params.weights import describe
from florence_jax.tasks import PRETRAINED, answerer_class

PAGE_PICTURES = 200  # more would make a page that no browser likes
DRAWN = "pictures"  # folder of those that are drawn
FILE_PICTURES, NAME_LENGTH = 1000, 80  # most of them, and letters of a picture's name in the file's
FILE = "file"  # the first column


class Predictions(NamedTuple):
    """All answers of a run, and what could not be read as (file, reason)."""

    found: list[Found]
    unread: list[tuple[str, str]]


def answer_all(answerer: Answerer, source: Source) -> Predictions:
    """Goes through a source, once."""
    found = list(answerer.answers(source))
    missing = np.setdiff1d(np.arange(len(source)), [answer.index for answer in found])
    return Predictions(found, [why_unread(answerer, source, int(index)) for index in missing])


def why_unread(answerer: Answerer, source: Source, index: int) -> tuple[str, str]:
    """(name, reason) of a record without an answer."""
    try:
        record = source[index]
        answerer.check(record)
    except BadRecord as bad:
        return bad.key, bad.reason
    return str(record["key"]), "its answer is not a number"


def write_tables(out: Path, answerer: Answerer, answers: Predictions, facts: dict[str, Any]) -> None:
    """predictions.csv and predictions.json."""
    columns = answerer.columns
    rows = ((found.key, *(row.get(name, "") for name in columns)) for found in answers.found for row in found.rows)
    write_bytes(str(out / "predictions.csv"), csv_bytes((FILE, *columns), rows))
    files = [{FILE: found.key, "found": list(found.rows)} for found in answers.found]
    unread = [{FILE: key, "reason": reason} for key, reason in answers.unread]
    write_json(str(out / "predictions.json"), {**facts, answerer.plural: files, "unread": unread})


def write_pictures(out: Path, answerer: Answerer, source: Source, answers: Predictions) -> None:
    """pictures/: the first pictures with what was found drawn on them, where there is something to draw."""
    for number, found in enumerate(answers.found[:FILE_PICTURES]):
        if (content := answerer.picture_file(source[found.index], found)) is None:
            continue
        name = re.sub(r"[^\w.-]+", "_", Path(found.key).stem)[:NAME_LENGTH]
        (out / DRAWN).mkdir(exist_ok=True)
        write_bytes(str(out / DRAWN / f"{number + 1:05}_{name}.jpg"), content)


def write_predictions_page(
    out: Path, answerer: Answerer, source: Source, answers: Predictions, facts: dict[str, Any]
) -> None:
    """report.html: the first pictures with what was found, and the files that could not be read."""
    shown = answers.found[:PAGE_PICTURES]
    cells = [
        figure_html([answerer.picture(source[found.index], found)], found.text, found.key, answerer.figures)
        for found in shown
    ]
    counts = f"{len(answers.found)} {answerer.plural} of {facts['input']} by {facts['init']}"
    if len(shown) < len(answers.found):
        counts += f"; the first {len(shown)} are shown, all are in predictions.csv"
    remarks = [f"<p>{markup(remark)}</p>" for remark in answerer.remarks(answers.found)]
    parts = [f"<p>{markup(counts)}</p>", *remarks, f'<div class="tiles">{"".join(cells)}</div>']
    if answers.unread:
        parts += [f"<h2>Not read ({len(answers.unread)})</h2>", table_html((FILE, "reason"), answers.unread)]
    write_page(out / "report.html", "Predictions", "\n".join(parts))


def predict(answerer: Answerer, source: Source, out: Path, facts: dict[str, Any]) -> Predictions:
    """Answers about every record of `source`, and writes the tables and the page into `out`.

    Args:
      facts: "init", "input" and whatever else the JSON file is to say at its top.

    Raises:
      UserError: if no picture could be read, or `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out={out}: {error}; choose another folder") from error
    answers = answer_all(answerer, source)
    if not answers.found:
        key, reason = answers.unread[0]
        raise UserError(
            f"none of the {len(source)} {answerer.plural} of {source.name} could be read; the first, {key}: {reason}"
        )
    try:
        write_tables(out, answerer, answers, facts)
        for name, content in answerer.files(answers.found).items():
            write_bytes(str(out / name), content)
        write_pictures(out, answerer, source, answers)
        write_predictions_page(out, answerer, source, answers, facts)
    except OSError as error:
        raise UserError(f"cannot write to --out={out}: {error}; choose a writable folder with space") from error
    return answers


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, type[Answerer]]:
    """The options, among them those of the kind of weights that --init holds, and what answers with such weights."""
    parser = argparse.ArgumentParser(
        prog="python -m florence_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", required=True, help="workdir of a run, its checkpoints/, or an imported folder")
    parser.add_argument("--input", required=True, help="folder of pictures or videos, one file, or a data source")
    parser.add_argument("--out", required=True, help="folder for the tables and the page")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures a call of the model")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--init", default="")
    init = first.parse_known_args(argv)[0].init
    kind = answerer_class(describe(init).task if init else PRETRAINED)  # without --init for --help alone
    kind.add_arguments(parser)
    return parser.parse_args(argv), kind


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (2 for a user's mistake)."""
    logging.set_verbosity(logging.ERROR)  # Orbax reports every phase of a restore, the stream every bad record

    def work() -> None:
        args, kind = parse_arguments(with_home(argv))
        source = kind.open_input(args)
        print(summary_of(source).get("says", f"{source.name}: {len(source):,} {kind.plural}"), flush=True)
        facts = {"init": args.init, "input": args.input}
        answerer = kind.open(args.init, args)
        answers = predict(answerer, source, Path(args.out), facts)
        for key, reason in answers.unread:
            print(f"not read: {key}: {reason}", file=sys.stderr)
        for remark in answerer.remarks(answers.found):
            print(remark)
        read, unread = len(answers.found), len(answers.unread)
        print(f"{read} {kind.plural}, {unread} not read: {args.out}/report.html, predictions.csv, .json")

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
