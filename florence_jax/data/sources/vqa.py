"""Sets of questions about pictures that people have, as sources."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from florence_jax.data.question_files import read_own_questions
from florence_jax.data.question_table import QuestionTable
from florence_jax.data.records import BaseSource, Record, evenly, picture_bytes
from florence_jax.data.sources.picture_files import list_pictures, quoted, shown
from florence_jax.errors import UserError

OWN_QUESTIONS = ("questions.jsonl", "questions.csv", "questions.tsv")


class QuestionSource(BaseSource):
    """Questions with their pictures.

    A record has "key", "image" (bytes), or "images" where a question is about several, "image_id", "question",
    "question_id", "question_type", and where they are known "answers" and "answer_type".

    Args:
      name: for messages.
      table: of the questions. folder: of the pictures.
      summary: what was found.
    """

    def __init__(self, name: str, table: QuestionTable, folder: str, summary: dict[str, Any]):
        self.name, self.summary = name, summary
        self._table, self._folder = table, folder

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:
        record, files = self._table.record(index), self._table.files[index]
        pictures = [picture_bytes(os.path.join(self._folder, file), record["key"]) for file in files]
        return record | ({"image": pictures[0]} if len(pictures) == 1 else {"images": pictures})

    def metadata(self) -> Iterator[Record]:
        """All records without their pictures, which are not touched."""
        return map(self._table.record, range(len(self)))

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; no picture is touched."""
        return [self._table.record(index) for index in evenly(len(self), count).tolist()]


def open_own_questions(spec: str) -> QuestionSource:
    """A folder with questions.jsonl, or such a table itself; see `question_files.read_own_questions`."""
    path = spec
    if epath.Path(spec).is_dir():
        path = next((os.path.join(spec, name) for name in OWN_QUESTIONS if (epath.Path(spec) / name).exists()), "")
        if not path:
            raise UserError(
                f"data source {spec}: it has no {OWN_QUESTIONS[0]} with lines of image, question and answer"
            )
    return finish_questions(spec, read_own_questions(path), os.path.dirname(path) or ".", os.path.basename(path))


def is_questions(spec: str) -> bool:
    """Whether it is a folder with a table of questions, or such a table by its name."""
    base = spec.rstrip("/").rpartition("/")[2]
    names = [spec] if base in OWN_QUESTIONS else [os.path.join(spec, name) for name in OWN_QUESTIONS]
    return any(epath.Path(name).exists() for name in names)


def finish_questions(spec: str, table: QuestionTable, folder: str, text: str) -> QuestionSource:
    """The source of a table: looks for the pictures, says what there is.

    Args:
      spec: for messages. table: is changed. folder: of the pictures. text: of what it was read.

    Raises:
      UserError: if no question is left.
    """
    named = len(table)
    if "://" not in folder:  # in a bucket looking takes long
        wanted = {file for files in table.files for file in files}
        there = set(list_pictures(folder).pictures)
        missing = {file for file in wanted - there if not os.path.isfile(os.path.join(folder, file))}
        keep = np.array([missing.isdisjoint(files) for files in table.files], bool)
        for row in np.flatnonzero(~keep).tolist():
            table.wrong("no_picture", next(file for file in table.files[row] if file in missing))
        table.kept(keep)
    if not len(table):
        raise UserError(f"data source {spec}: none of the {named:,} questions of {text} can be used{table.said()}")
    pictures = len(set(map(str, table.image_ids)))
    answered = sum(map(bool, table.answers))
    said = f"{len(table):,} questions about {pictures:,} pictures" + ("" if answered else ", without answers")
    says = f"{shown(spec)}: {said}, such as {quoted(table.questions[0])}{table.said()}"
    summary = {"folder": folder, "questions": len(table), "pictures": pictures, "answered": answered, "says": says}
    return QuestionSource(spec, table, folder, summary)


# How a set is opened whose name begins with 'KIND:'.
QUESTION_KINDS: dict[str, Callable[[str], QuestionSource]] = {}
