"""Questions about pictures, answered and scored as VQA's official evaluation does."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from florence_jax.data.answers import ANSWERS_FILE, AnswerVocabulary, normalise_answer, stripped
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.records import BadRecord, Record, Source, WithCopy, described, sample_of, scattered
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.metrics import TOP
from florence_jax.evaluators.predictor import Predictor
from florence_jax.evaluators.vqa_report import ShownAnswer, vqa_report
from florence_jax.evaluators.vqa_scores import (
    Answered,
    Prior,
    accuracies,
    judge_answers,
    rows_by_value,
    standard_error,
)

ASKED = "asked"  # the host field with what is asked
ASKED_FIELDS = (
    *("key", "image_id", "question", "question_id", "question_type"),
    *("answers", "answer", "answer_type", "sentence_id"),
)
QUESTIONS = "questions"  # of a record of one picture with several: a list of theirs
PRIOR_QUESTIONS = 50_000  # of a training set, at most, that the prior is counted on
TYPES_IN_RESULTS = 20  # a result for each type of question of at most so many
CANDIDATES = 256  # records, spread over the source, of which the page shows some


class Best(NamedTuple):
    """The best answers to a question.

    Attributes:
      record: of those that were read, where the picture is.
      answers: numbers, best first. scores: float32, 0 to 1, of each.
      attention: float32 (T,) over the image's tokens, or None.
    """

    record: int
    answers: np.ndarray
    scores: np.ndarray
    attention: np.ndarray | None


class VqaEvaluator(Evaluator):
    """Accuracy of answers to the questions of a source.

    Attributes:
      metric: the headline, accuracy.

    Results: 'accuracy', and its 'accuracy_stderr' (questions of one image count together); 'accuracy_answerable' of
    those questions of which an answer is in the vocabulary (which METER's own validation gives), 'answerable', their
    share; 'answer_type/...', 'question_type/...' (of at most 20 types); for NLVR2 'consistency', the share of the
    sentences that are judged rightly of each of their pairs of pictures; 'majority_accuracy' of the commonest answer of
    the training set; 'questions', and where some have no true answer 'unlabelled' ones; 'skipped' ones if any. Of a
    test set without answers only the counts.

    Args:
      source: questions; or pictures with up to K "questions" each, which share the encoding of their picture.
      ops: of a record, up to what `answer` takes, without `keep`.
      context: of the ops.
      fields: names that `answer` takes, such as ('image', 'text', 'text_length').
      answer: pure function (params, batch) -> {"answer_logits" (B, A), and perhaps "attention" (B, T)}; of
        pictures with questions (B, K, A) and (B, K, T).
      mesh, batch_size: see `Predictor`.
      vocabulary: of A answers.
      name: prefix of the results.
      train: sources of the training, for `chance`: the prior, see `Prior`; () for none.
      on_corrupt: 'skip' leaves questions of unreadable pictures out, 'error' ends the evaluation.

    Raises:
      UserError: for a source whose records are no questions.
    """

    def __init__(
        self,
        source: Source,
        ops: str,
        context: Mapping[str, Any],
        fields: Sequence[str],
        answer: Callable[[Any, dict[str, jax.Array]], Mapping[str, jax.Array]],
        mesh: Mesh,
        batch_size: int,
        vocabulary: AnswerVocabulary,
        name: str = "test",
        train: Sequence[Source] = (),
        on_corrupt: str = "error",
    ):
        self.name, self.metric = name, "accuracy"
        self.vocabulary = vocabulary
        self._source, self._context, self._train, self._on_corrupt = source, context, tuple(train), on_corrupt
        self._ops = f"{ops}|keep({', '.join((*fields, ASKED))})"
        top = min(TOP, len(vocabulary))

        def best(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            found = answer(params, batch)
            each = {name: found[name].astype(jnp.float32) for name in ("answer_logits", "attention") if name in found}
            each = {name: value if value.ndim > 2 else value[:, None] for name, value in each.items()}
            logits = each.pop("answer_logits")
            highest, answers = jax.lax.top_k(logits, top)
            return {
                "answers": answers,
                "scores": jax.nn.sigmoid(highest),
                "finite": jnp.isfinite(logits).all(-1),
            } | each

        self._predictor = Predictor(best, mesh, batch_size)
        self._records = WithCopy(source, ASKED, (*ASKED_FIELDS, QUESTIONS))
        looked = [question for record in sample_of(source, 8) for question in questions_of(record)]
        if not any("question" in record for record in looked):
            raise UserError(f"data source {source.name}: its records are no questions")
        types = sorted({str(record.get("answer_type")) for record in looked if record.get("answer_type")})
        series = {"all": "accuracy"} | {kind: f"answer_type/{kind.replace('/', '-')}" for kind in types}
        self.charts = (Chart(f"{name}: accuracy", series),) if any("answers" in record for record in looked) else ()
        self._asked: list[Mapping[str, Any]] = []
        self._best: list[int] = []
        self._shown: dict[int, Best] = {}
        self._unread = 0  # questions whose picture could not be read
        self._judged: Answered | None = None

    @property
    def sources(self) -> Sequence[Source]:
        """See `Evaluator`."""
        return (self._source,)

    @property
    def chance(self) -> Mapping[str, float]:
        """What the prior scores."""
        return self._prior_scores

    @functools.cached_property
    def _prior(self) -> Prior | None:
        """Of the training set; None without one."""
        if not self._train:
            return None
        each = PRIOR_QUESTIONS // len(self._train)
        records = (record for source in self._train for record in sample_of(source, each))
        return Prior(question for record in records for question in questions_of(record))

    @functools.cached_property
    def _prior_scores(self) -> Mapping[str, float]:
        """The prior's accuracy by types; {} without a training set."""
        if self._prior is None:
            return {}
        asked = [each for record in self._source.metadata() for each in questions_of(record) if each.get("answers")]
        judged = judge_answers(asked, [self._prior.answer(record) for record in asked])
        return accuracies(judged, result_types(judged))

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        self._answer_all(params)
        words = [self.vocabulary.answers[number] for number in self._best]
        self._judged = judged = judge_answers(self._asked, words, self.vocabulary)
        found = {"questions": float(len(self._asked))}
        if self._unread:
            found["skipped"] = float(self._unread)
        if without := len(self._asked) - len(judged.asked):
            found["unlabelled"] = float(without)
        if not len(judged.accuracy):
            return found
        found |= accuracies(judged, result_types(judged))
        found |= {"accuracy_stderr": standard_error(judged), "answerable": float(judged.known.mean())}
        if judged.known.any():
            found["accuracy_answerable"] = float(judged.accuracy[judged.known].mean())
        if self._prior is not None:
            always = judge_answers(judged.asked, [self._prior.majority] * len(judged.asked))
            found["majority_accuracy"] = float(always.accuracy.mean())
        return found

    def _answer_all(self, params: Any) -> None:
        """Answers every question; the same on every process."""
        self._asked, self._best, self._shown = [], [], {}
        candidates = set(scattered(len(self._source), CANDIDATES).tolist())
        bad, read = 0, []
        rows = self._predictor.rows(
            params,
            self._records,
            self._ops,
            self._context,
            host=(ASKED,),
            on_corrupt=self._on_corrupt,
            what=self.name,
        )
        for row in rows:
            read.append(row["index"])
            for place, fields in enumerate(questions_of(row[ASKED])):
                bad += not row["finite"][place]
                if row["index"] in candidates:
                    seen = row["attention"][place] if "attention" in row else None
                    self._shown[len(self._asked)] = Best(
                        row["index"], row["answers"][place], row["scores"][place], seen
                    )
                self._asked.append(fields)
                self._best.append(int(row["answers"][place, 0]))
        if bad:
            raise UserError(
                f"{self.name}: the answers to {bad:,} of {len(self._asked):,} questions are not finite: the weights "
                "are broken, take an earlier checkpoint or import them again"
            )
        unread = np.setdiff1d(np.arange(len(self._source)), read).tolist()
        self._unread = sum(self._count(row) for row in unread)

    def _count(self, row: int) -> int:
        """Questions of a record; of one that cannot be read it is 1."""
        try:
            return len(questions_of(described(self._source, row)))
        except BadRecord:
            return 1

    def notes(self) -> list[str]:
        """What is to be said of the true answers of the last `run`."""
        odd = [fields for fields in self._judged.asked if _cannot_be_met(fields["answers"])] if self._judged else []
        if not odd:
            return []
        example = odd[0]["answers"][0]
        return [
            f"the people asked agree in {len(odd):,} questions on an answer that is not in its normal form, such as "
            f"{example!r}: the official measure compares it as it is written, so {normalise_answer(example)!r} is wrong"
        ]

    def report(self) -> list[str]:
        """See `vqa_report`."""
        if self._judged is None:
            return []
        examples = [
            ShownAnswer(
                self._asked[place],
                best.record,
                [self.vocabulary.answers[number] for number in best.answers.tolist()],
                best.scores.tolist(),
                best.attention,
            )
            for place, best in self._shown.items()
        ]
        return vqa_report(self.name, self._judged, self._prior, examples, self._see, self.notes())

    def _see(self, record: int) -> np.ndarray | None:
        """The picture of a record as the model sees it, uint8 (H, W, 3); None where it cannot be read any more."""
        try:
            example = self._records[record]
            for op in parse_ops(self._ops, self._context):
                example = op(example, np.random.default_rng(0))
        except BadRecord:
            return None
        image = np.asarray(example.get("image", example.get("images")))
        if image.ndim == 4:  # several pictures, beside each other
            image = np.concatenate(list(image), axis=1)
        return image if image.ndim == 3 and image.dtype == np.uint8 else None

    def files(self) -> Mapping[str, bytes]:
        """'answers_NAME.json' as VQA's server takes it, question_id and answer of every question that was read; and the
        vocabulary, 'answers.txt'."""
        if not self._asked:
            return {}
        rows = [
            {"question_id": fields.get("question_id", fields.get("key")), "answer": self.vocabulary.answers[number]}
            for fields, number in zip(self._asked, self._best, strict=True)
        ]
        given = json.dumps(rows, ensure_ascii=False).encode("utf-8", "replace")
        return {f"answers_{self.name}.json": given, ANSWERS_FILE: self.vocabulary.file()}


def questions_of(record: Record) -> Sequence[Record]:
    """The questions of a record: itself, or where it is a picture with several, those."""
    return record.get(QUESTIONS, (record,))


def result_types(judged: Answered) -> list[str]:
    """The commonest types of questions, at most `TYPES_IN_RESULTS`."""
    return list(rows_by_value(judged, "question_type"))[:TYPES_IN_RESULTS]


def _cannot_be_met(answers: Sequence[str]) -> bool:
    """Whether several people agree on an answer that no vocabulary has."""
    first = stripped(answers[0])
    return len(answers) > 1 and len(set(map(stripped, answers))) == 1 and normalise_answer(first) != first
