"""Questions about pictures, as columns in memory: about 700 bytes a question with ten answers."""

import collections
import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from florence_jax.data.answers import answer_type, question_type
from florence_jax.data.records import Record
from florence_jax.errors import UserError

# What becomes of a question, or of what belongs to one, by kind of mistake; in the order of sentences.
QUESTION_MISTAKES = {
    "no_picture": "questions whose picture is not there: {} (left out)",
    "no_question": "empty questions: {} (left out)",
    "no_annotation": "questions without an annotation: {} (left out)",
    "unknown_annotation": "annotations of questions that are not listed: {} (not used)",
    "no_answer": "questions without an answer: {} (left out)",
    "no_label": "pairs that people did not agree on: {} (left out)",
    "same_picture": "pictures with the bytes of another one: {} (taken for one, also where pictures are held out)",
    "same_number": "pictures with the number of another one: {} (the first counts)",
}


@dataclasses.dataclass
class QuestionTable:
    """N questions about I pictures.

    Attributes:
      files: names of the pictures, of each question one, or several ('a.png', 'b.png'), as the set gives them.
      image_ids: of each question.
      questions, ids: of each question; ids are unique.
      answers: of each question, what people said; () where none is known.
      fields: of each question what else its record has.
      mistakes: how many of each kind of `QUESTION_MISTAKES`. first: where the first of each is.
      shared: the different `fields`.
    """

    files: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    image_ids: list[Any] = dataclasses.field(default_factory=list)
    questions: list[str] = dataclasses.field(default_factory=list)
    ids: list[Any] = dataclasses.field(default_factory=list)
    answers: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    fields: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    mistakes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)
    shared: dict[tuple[Any, ...], Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.questions)

    def wrong(self, kind: str, where: Any) -> None:
        """Counts a mistake."""
        self.mistakes[kind] += 1
        self.first.setdefault(kind, str(where))

    def add(
        self,
        files: Sequence[str],
        image_id: Any,
        question: str,
        question_id: Any,
        answers: Iterable[str] = (),
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        """One more question; one that is empty is counted and left out.

        "question_type" and "answer_type" are made where `fields` lack them.
        """
        if not question.strip():
            self.wrong("no_question", question_id)
            return
        given, fields = tuple(map(sys.intern, answers)), fields or {}
        if not fields.get("question_type"):
            fields = {**fields, "question_type": sys.intern(question_type(question))}
        if given and not fields.get("answer_type"):
            fields = {**fields, "answer_type": answer_type(given)}
        self.files.append(tuple(files))
        self.image_ids.append(image_id)
        self.questions.append(question.strip())
        self.ids.append(question_id)
        self.answers.append(given)
        # Most questions share what else is known of them.
        self.fields.append(self.shared.setdefault(tuple(fields.items()), fields))

    def kept(self, keep: np.ndarray) -> None:
        """Leaves out the questions for which bool (N,) `keep` is not set."""
        for name in ("files", "image_ids", "questions", "ids", "answers", "fields"):
            column = getattr(self, name)
            setattr(self, name, [column[k] for k in np.flatnonzero(keep)])

    def check_ids(self, where: str) -> None:
        """Raises UserError if a question's id is that of another one."""
        counts = collections.Counter(map(str, self.ids))
        twice = [number for number, count in counts.items() if count > 1]
        if twice:
            raise UserError(
                f"{where}: {len(twice):,} ids of questions are there twice, such as {twice[0]!r}: give each its own"
            )

    def record(self, index: int) -> Record:
        """The record of a question, without its picture."""
        answers = {"answers": list(self.answers[index])} if self.answers[index] else {}
        return {
            "key": str(self.ids[index]),
            "image_id": self.image_ids[index],
            "question": self.questions[index],
            "question_id": self.ids[index],
            **answers,
            **self.fields[index],
        }

    def said(self) -> str:
        """'; questions whose picture is not there: 2 (left out), the first: ...' as there are."""
        return "".join(
            f"; {text.format(f'{self.mistakes[kind]:,}')}, the first: {self.first[kind]}"
            for kind, text in QUESTION_MISTAKES.items()
            if self.mistakes[kind]
        )
