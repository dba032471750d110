"""How well questions were answered: the measure of VQA's official evaluation; what the questions alone are worth."""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from florence_jax.data.answers import AnswerVocabulary, majority_answer, normalise_answer, soft_answers, stripped
from florence_jax.data.records import Record

ENOUGH = 3  # people who say the same make an answer right


def question_accuracy(answer: str, answers: Sequence[str]) -> float:
    """How right an answer is, 0 to 1: min(people who gave it / 3, 1), the mean over leaving each of the people out.

    As in the official code, answers are normalised only where people differ. Of one person only (the official formula
    would give 0) it is 1 where both are equal when they are normalised.
    """
    answer, given = stripped(answer), list(map(stripped, answers))
    if len(given) == 1 or len(set(given)) > 1:
        answer, given = normalise_answer(answer), list(map(normalise_answer, given))
    if len(given) == 1:
        return float(answer == given[0])
    count, people = given.count(answer), len(given)
    left_out = min((count - 1) / ENOUGH, 1.0)  # one of those who gave it
    return (count * left_out + (people - count) * min(count / ENOUGH, 1.0)) / people


class Answered(NamedTuple):
    """N questions with answers, and what was answered.

    Attributes:
      asked: of each question its record's fields: question, answers, question_id, ...
      answers: what was answered. accuracy: float64 (N,).
      known: bool (N,), whether one of its answers is in the vocabulary.
    """

    asked: Sequence[Mapping[str, Any]]
    answers: Sequence[str]
    accuracy: np.ndarray
    known: np.ndarray


def judge_answers(
    asked: Sequence[Mapping[str, Any]], answers: Sequence[str], vocabulary: AnswerVocabulary | None = None
) -> Answered:
    """Of questions and answers those questions that have true answers; without a vocabulary all are known."""
    rows = [k for k, fields in enumerate(asked) if fields.get("answers")]
    chosen, said = [asked[k] for k in rows], [answers[k] for k in rows]
    accuracy = [question_accuracy(answer, fields["answers"]) for answer, fields in zip(said, chosen, strict=True)]
    known = [
        vocabulary is None or any(vocabulary.number(normalise_answer(answer)) >= 0 for answer in fields["answers"])
        for fields in chosen
    ]
    return Answered(chosen, said, np.array(accuracy, np.float64), np.array(known, bool))


def accuracies(judged: Answered, types: Sequence[str] = ()) -> dict[str, float]:
    """'accuracy', 'answer_type/...', 'question_type/...', and of NLVR2 'consistency'; {} for no questions.

    Args:
      judged: of N questions. types: of questions that are wanted.
    """
    if not len(judged.accuracy):
        return {}
    found = {"accuracy": float(judged.accuracy.mean())}
    for field in ("answer_type", "question_type"):
        for kind, rows in rows_by_value(judged, field).items():
            if field == "answer_type" or kind in types:
                found[f"{field}/{kind.replace('/', '-')}"] = float(judged.accuracy[rows].mean())
    if sentences := rows_by_value(judged, "sentence_id"):
        found["consistency"] = float(np.mean([judged.accuracy[rows].min() for rows in sentences.values()]))
    return found


def rows_by_value(judged: Answered, field: str) -> dict[str, np.ndarray]:
    """Rows of the questions with each value of a field, the commonest value first."""
    rows: dict[str, list[int]] = collections.defaultdict(list)
    for row, fields in enumerate(judged.asked):
        if isinstance(value := fields.get(field), str):
            rows[value].append(row)
    return {value: np.array(rows[value]) for value in sorted(rows, key=lambda value: -len(rows[value]))}


def standard_error(judged: Answered) -> float:
    """Of the mean accuracy; questions of one image, which go right and wrong together, count together. NaN for one."""
    centred = judged.accuracy - judged.accuracy.mean()
    sums: dict[Any, float] = collections.defaultdict(float)
    for row, (fields, value) in enumerate(zip(judged.asked, centred.tolist(), strict=True)):
        sums[str(fields.get("image_id", row))] += value
    images = len(sums)
    if images < 2:
        return math.nan
    return math.sqrt(sum(value * value for value in sums.values()) * images / (images - 1)) / len(centred)


class Prior:
    """What a question is worth without its picture: the best answer for each question's very text.

    For a text that the training set lacks it is the best answer of its question's type, else of all.

    Args:
      records: of questions with answers, those of the training set.
    """

    def __init__(self, records: Iterable[Record]):
        votes: dict[tuple[str, str], dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
        for record in records:
            for answer, score in soft_answers(record.get("answers") or ()).items():
                for place in self._places(record):
                    votes[place][answer] += score
        self._best = {place: max(scores, key=scores.__getitem__) for place, scores in votes.items()}

    @staticmethod
    def _places(record: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
        text = " ".join(str(record.get("question", "")).lower().split())
        return (("question", text), ("type", str(record.get("question_type", ""))), ("", ""))

    def answer(self, record: Mapping[str, Any]) -> str:
        """The answer; '' where there is nothing to go by."""
        return next((self._best[place] for place in self._places(record) if place in self._best), "")

    @property
    def majority(self) -> str:
        """The commonest answer of all."""
        return self._best.get(("", ""), "")


def confusions(judged: Answered, most: int) -> list[tuple[str, str, int, int]]:
    """(true answer, what was answered, how often, questions with that true answer), the most frequent first.

    True is the majority's answer, normalised; only answers of which no part is right count.
    """
    pairs: collections.Counter[tuple[str, str]] = collections.Counter()
    totals: collections.Counter[str] = collections.Counter()
    for fields, answer, accuracy in zip(judged.asked, judged.answers, judged.accuracy.tolist(), strict=True):
        true = normalise_answer(majority_answer(fields))
        totals[true] += 1
        if accuracy == 0:
            pairs[true, answer] += 1
    return [(true, answer, count, totals[true]) for (true, answer), count in pairs.most_common(most)]
