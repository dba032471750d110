"""Answers to questions about pictures: their normal form, the vocabulary that a model answers from, soft targets."""

import collections
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from florence_jax.data.records import Record
from florence_jax.errors import UserError
from florence_jax.files import read_bytes

ANSWERS_FILE = "answers.txt"  # the vocabulary, in the folder of a run
MOST_LABELS = 10  # of an example: more answers than that have the rarest left out
SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)  # by how many people gave the answer; 4 or more: 1
MATCHES = ("raw", "normalised")

# -- the normal form --------------------------------------------------------------------------------------------------

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset(("a", "an", "the"))
NUMBER_WORDS = {"none": "0", "zero": "0"} | {
    word: str(number) for number, word in enumerate("one two three four five six seven eight nine ten".split(), 1)
}
# As they are written; what lacks one of its apostrophes is mapped to them.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTIONS for place, char in enumerate(word) if char == "'"
} | {"somebody'd": "somebodyd"}  # the one that goes the other way
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = 32  # are removed: the official code hands a flag over where a count is expected


@functools.lru_cache(1 << 16)
def normalise_answer(answer: str) -> str:
    """The form in which answers are compared: what VQA's official evaluation makes of them, with all it does oddly.

    Marks of punctuation are removed where one like it has a blank beside it, or where a comma stands between two
    digits, and become blanks elsewhere; periods go unless a digit follows; number words become digits, articles go,
    contractions get their apostrophe.
    """
    answer = stripped(answer)
    text = answer
    in_number = _COMMA_IN_NUMBER.search(answer) is not None
    for mark in PUNCTUATION:
        if mark in answer:
            text = text.replace(mark, "" if in_number or f"{mark} " in answer or f" {mark}" in answer else " ")
    words = (NUMBER_WORDS.get(word, word) for word in _PERIOD.sub("", text, count=MOST_PERIODS).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def stripped(answer: str) -> str:
    """Without blanks at its ends, and with blanks for line breaks and tabs: all that is done where people agree."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def majority_answer(record: Mapping[str, Any]) -> str:
    """The answer that a record states ("answer"), else the commonest of its "answers", the first of equals; or ''."""
    if isinstance(stated := record.get("answer"), str):
        return stated
    answers = record.get("answers") or ()
    return collections.Counter(answers).most_common(1)[0][0] if answers else ""


def answer_type(answers: Sequence[str]) -> str:
    """'yes/no', 'number' or 'other', where a set does not say it: by the commonest answer, as VQA v2 divides them."""
    answer = normalise_answer(majority_answer({"answers": answers}))
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdecimal() else "other"


def question_type(question: str) -> str:
    """Where a set does not say it: the first two words, in small letters."""
    return " ".join(question.lower().split()[:2]).rstrip("?")


def soft_answers(answers: Sequence[str], match: str = "normalised") -> dict[str, float]:
    """What people answered, the commonest first, and how right each is: `SOFT_SCORES`; of one person alone 1.

    Answers of which nothing is left are left out.

    Args:
      answers: of n people.
      match: 'normalised', or 'raw': as they are written, as in METER.
    """
    given = map(normalise_answer, answers) if match == "normalised" else answers
    counts = collections.Counter(filter(None, given)).most_common()
    if len(answers) == 1:
        return {answer: 1.0 for answer, _ in counts}
    return {answer: SOFT_SCORES[min(count, len(SOFT_SCORES) - 1)] for answer, count in counts}


# -- the vocabulary ---------------------------------------------------------------------------------------------------


class AnswerVocabulary:
    """The answers that a model chooses from.

    Args:
      answers: normalised, each once; number k is class k.

    Attributes:
      answers: those.
      notes: sentences about how they were found.

    Raises:
      UserError: for fewer than two, or one that is there twice.
    """

    def __init__(self, answers: Sequence[str], notes: Sequence[str] = ()):
        self.answers, self.notes = tuple(answers), tuple(notes)
        self._numbers = {answer: number for number, answer in enumerate(self.answers)}
        if len(self._numbers) < len(self.answers):
            twice = next(answer for answer, count in collections.Counter(self.answers).items() if count > 1)
            raise UserError(f"the answer {twice!r} is in the vocabulary twice")
        if len(self.answers) < 2:
            raise UserError(
                f"a vocabulary of {len(self.answers)} answers{f' ({self.answers[0]!r})' if self.answers else ''}: "
                "there is nothing to choose between, at least two are needed"
            )

    def __len__(self) -> int:
        return len(self.answers)

    def number(self, answer: str) -> int:
        """The class of an answer as it is written; -1 for one that is not in the vocabulary."""
        return self._numbers.get(answer, -1)

    def targets(self, answers: Sequence[str], match: str = "normalised") -> tuple[np.ndarray, np.ndarray]:
        """Which classes are right for a question, and how much.

        Args:
          answers: of n people.
          match: see `soft_answers`; with 'raw' only answers that are written as in the vocabulary count.

        Returns:
          int32 (10,) numbers, -1 where there are no more, and float32 (10,) their scores, see `soft_answers`.
        """
        labels, scores = np.full(MOST_LABELS, -1, np.int32), np.zeros(MOST_LABELS, np.float32)
        soft = soft_answers(answers, match).items()
        found = [(number, score) for answer, score in soft if (number := self.number(answer)) >= 0][:MOST_LABELS]
        labels[: len(found)] = [number for number, _ in found]
        scores[: len(found)] = [score for _, score in found]
        return labels, scores

    def file(self) -> bytes:
        """What a file `ANSWERS_FILE` has: an answer a line, the first line is class 0."""
        return "".join(f"{answer}\n" for answer in self.answers).encode("utf-8", "replace")

    @classmethod
    def build(cls, records: Iterable[Record], min_count: int = 9) -> "AnswerVocabulary":
        """The normalised majority answers that at least `min_count` questions have, in the order they first come.

        With VQA v2's training and validation questions, and 9, there are 3,129 of them.

        Args:
          records: of the questions that are trained on; those without answers are passed over.

        Raises:
          UserError: if fewer than two answers are found so often.
        """
        raw = collections.Counter(majority for record in records if (majority := majority_answer(record)))
        counts: collections.Counter[str] = collections.Counter()
        for answer, count in raw.items():  # in the order of the first occurrences
            counts[normalise_answer(answer)] += count
        empty = counts.pop("", 0)
        kept = [answer for answer, count in counts.items() if count >= min_count]
        if len(kept) < 2:
            common = ", ".join(f"{answer!r} {count:,}" for answer, count in counts.most_common(3))
            total = sum(counts.values())
            if not counts:
                raise UserError("none of the questions has an answer: there is nothing to learn")
            if len(counts) == 1:
                raise UserError(f"all {total:,} questions have the one answer {common}: there is nothing to learn")
            raise UserError(
                f"{len(kept)} of {len(counts):,} answers are those of at least {min_count} questions (the commonest: "
                f"{common}): lower answers.min_count"
            )
        covered = sum(counts[answer] for answer in kept) / (sum(counts.values()) + empty)
        notes = [
            f"{len(kept):,} answers, the majority answers of at least {min_count} questions each; {covered:.1%} of the "
            "questions have one of them as their majority answer"
        ]
        if empty:
            notes.append(f"{empty:,} majority answers have nothing left when they are normalised, and are left out")
        return cls(kept, notes)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "AnswerVocabulary":
        """Reads a vocabulary: one answer a line, in the order of their numbers.

        Also read: JSON with a list, or with an object of answer -> number or of number -> answer; lines of
        {"answer": ..., "label": ...}.

        Raises:
          UserError: if it is not there, or is none of these.
        """
        try:
            text = read_bytes(path).decode("utf-8-sig")
        except FileNotFoundError as error:
            raise UserError(f"there is no list of answers {path}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: save it as UTF-8") from error
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            if lines and lines[0].lstrip()[0] in "[{":
                return cls(_from_json(text, lines))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise UserError(f"{path}: {error}") from error
            raise UserError(
                f"{path} is no list of answers, one a line in the order of their numbers ({error!r})"
            ) from error
        return cls([line.strip() for line in lines])


def _from_json(text: str, lines: Sequence[str]) -> list[str]:
    """The answers of a file that is JSON, or JSON a line. Raises ValueError, KeyError, TypeError."""
    try:
        value = json.loads(text)
    except ValueError:
        rows = [json.loads(line) for line in lines]
        value = {row["answer"]: row["label"] for row in rows}
    if isinstance(value, dict) and isinstance(value.get("label2ans"), list):
        value = value["label2ans"]
    if isinstance(value, dict) and value and all(isinstance(answer, str) for answer in value.values()):
        value = {answer: number for number, answer in value.items()}
    if isinstance(value, dict):
        answers = sorted(value, key=lambda answer: int(value[answer]))
        if [int(value[answer]) for answer in answers] != list(range(len(answers))):
            raise UserError("the numbers of its answers are not 0, 1, 2, ...")
        return answers
    if not all(isinstance(answer, str) for answer in value):
        raise UserError("its answers are not all texts")
    return list(value)
