"""Texts beside pictures, read by a trained fusion: for `Florence.answer`, `match`, `fill`, and for predict."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from florence_jax.data.ops.image import Decode
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.records import Record, Source
from florence_jax.data.sources.catalog import open_pictures, open_source
from florence_jax.data.sources.question_groups import QuestionGroups
from florence_jax.data.sources.vqa import is_questions, open_own_questions
from florence_jax.errors import UserError
from florence_jax.evaluators.predictor import Predictor
from florence_jax.evaluators.vqa_report import ATTENTION, attended_picture
from florence_jax.inference.base import Answerer, Found
from florence_jax.params.sharding import make_mesh
from florence_jax.tasks.encoder import Encoder
from florence_jax.tasks.fusion import FusedTowers, text_ids

ALL_OF_A_PICTURE = 1 << 30  # questions about one picture, whose encoding they share
QUESTION_TABLES = (".jsonl", ".csv", ".tsv")
PAGE_ANSWERS = 3  # below a picture of the page
PAGE_QUESTIONS, FIGURE_HEIGHT = 3, 160  # whose attention is beside it; height of both in pixels
HEAD_OF = {"answers": "vqa", "match": "itm", "words": "mlm"}  # by what is asked
TRAINED_BY = {"vqa": "configs/vqa.py", "itm": "configs/vlp.py", "mlm": "configs/vlp.py"}


class Beside(NamedTuple):
    """A text beside a picture.

    Attributes:
      tokens: (T, C), of the picture. text: int32 (L,). length: its tokens. place: of the word that is asked for.
    """

    tokens: np.ndarray
    text: np.ndarray
    length: int
    place: int = 0


class QuestionAnswers(NamedTuple):
    """What was answered to a question.

    Attributes:
      best: answers with their probabilities, best first. attention: float16 (T,), over the picture's tokens.
    """

    best: list[tuple[str, float]]
    attention: np.ndarray


class FusionReader:
    """A trained fusion on all devices of this process.

    Args:
      fused: of a folder of weights.
      batch_size: most pictures, and most texts, a call of the model.
    """

    def __init__(self, fused: FusedTowers, batch_size: int = 64):
        self.fused, self._batch_size, self._mesh = fused, batch_size, make_mesh(-1, 1)
        self._params = fused.load_on(self._mesh)
        res = fused.encoder.model.config.res
        self._ops = fused.part.get("eval_ops", f"decode|resize_exact({res})")
        self._predictors: dict[Any, Predictor] = {}

    def check(self, what: str) -> None:
        """Raises UserError where the folder cannot give it: 'answers', 'match' or 'words'."""
        head, folder = HEAD_OF[what], self.fused.encoder.description.folder
        if head not in self.fused.heads:
            raise UserError(
                f"{folder} was trained for {', '.join(self.fused.heads)}, not for {head}: train it with "
                f"python -m florence_jax.main --config={TRAINED_BY[head]} --config.init={folder}"
            )

    def pictures(
        self, source: Source, host: Sequence[str] = (), on_corrupt: str = "skip"
    ) -> Iterator[Mapping[str, Any]]:
        """Each readable record's "tokens" (T, C), "index", and the fields `host`."""
        ops = f"{self._ops}|keep({', '.join(('image', *host))})"
        encode = self._predictor("tokens", len(source))
        return encode.rows(self._params, source, ops, {}, host=host, on_corrupt=on_corrupt)

    def answers(self, texts: Iterable[Beside], top: int, count: int) -> Iterator[QuestionAnswers]:
        """Of each question the `top` best answers with their probabilities; `count` questions in all, about."""
        self.check("answers")
        names = self.fused.answers
        for row in self._read("answers", texts, count):
            scores = row["answers"]
            best = np.argsort(-scores, kind="stable")[:top]
            named = [(names[number], float(scores[number])) for number in best]
            yield QuestionAnswers(named, row["attention"].astype(np.float16))

    def match(self, texts: Sequence[Beside]) -> np.ndarray:
        """float32 (N,): the probability that text and picture belong together."""
        self.check("match")
        return np.array([row["match"] for row in self._read("match", texts, len(texts))], np.float32)

    def words(self, texts: Sequence[Beside], top: int) -> list[list[tuple[str, float]]]:
        """Of each text the `top` likeliest words at its place, with their probabilities."""
        self.check("words")
        tokenizer, found = self.fused.tokenizer, []
        for row in self._read("words", texts, len(texts)):
            best = np.argsort(-row["words"], kind="stable")[:top]
            found.append([(tokenizer.token_text(int(token)), float(row["words"][token])) for token in best])
        return found

    def _read(self, what: str, texts: Iterable[Beside], count: int) -> Iterator[dict[str, Any]]:
        predictor = self._predictor(what, count)
        for columns in predictor.batches(self._params, _batches(texts, predictor.batch_size), total=count, unit="text"):
            for place in range(len(columns["index"])):
                yield {name: values[place] for name, values in columns.items()}

    def see(self, record: Record) -> np.ndarray:
        """The picture of a record as the model sees it, uint8 (H, W, 3). Raises BadRecord."""
        for op in parse_ops(self._ops, {}):
            record = op(record, np.random.default_rng(0))
        return np.asarray(record["image"])

    def _predictor(self, what: str, count: int) -> Predictor:
        """For batches of a power of two, up to the largest: few sizes are compiled."""
        size = min(self._batch_size, 1 << max(count - 1, 0).bit_length())
        if (what, size) not in self._predictors:
            functions: Mapping[str, Callable[..., Any]] = {"tokens": self._tokens}
            self._predictors[what, size] = Predictor(functions.get(what, self._fuse(what)), self._mesh, size)
        return self._predictors[what, size]

    def _tokens(self, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {"tokens": self.fused.encode(params, batch["image"])["image_tokens"]}

    def _fuse(self, what: str) -> Callable[[Any, Mapping[str, jax.Array]], dict[str, jax.Array]]:
        def read(params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            names = ("image_tokens", "text", "text_length", *(["places"] if what == "words" else []))
            out = self.fused.fuse(params, {name: batch[name] for name in names})
            if what == "answers":
                return {what: jax.nn.sigmoid(out["answer_logits"]), "attention": out["attention"]}
            if what == "match":
                return {what: jax.nn.softmax(out["itm_logits"])[:, 1]}
            return {what: jax.nn.softmax(out["mlm_logits"][:, 0])}

        return read


def _batches(texts: Iterable[Beside], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Full batches; the last is padded with its first text."""
    waiting: list[Beside] = []
    start = 0
    for text in texts:
        waiting.append(text)
        if len(waiting) == size:
            yield _batch(waiting, size, start)
            start, waiting = start + size, []
    if waiting:
        yield _batch(waiting, size, start)


def _batch(texts: Sequence[Beside], size: int, start: int) -> dict[str, np.ndarray]:
    rows = [*texts, *[texts[0]] * (size - len(texts))]
    return {
        "image_tokens": np.stack([row.tokens for row in rows]),
        "text": np.stack([row.text for row in rows]),
        "text_length": np.array([row.length for row in rows], np.int32),
        "places": np.array([[row.place] for row in rows], np.int32),
        "mask": np.arange(size) < len(texts),
        "index": np.arange(start, start + size, dtype=np.int32),
    }


class QuestionAnswerer(Answerer):
    """See `inference.base.Answerer`: answers to questions about pictures, a line each.

    Args:
      reader: the fusion.
      questions: asked about every picture; () for those of the source.
      top: answers of each question in the tables.

    Raises:
      UserError: for weights that answer no questions, an empty question, or a top below 1.
    """

    columns = ("question", "answer", "probability", "rank")
    plural = "questions"
    figures = "large"

    def __init__(self, reader: FusionReader, questions: Sequence[str] = (), top: int = 1):
        if top < 1:
            raise UserError(f"--top={top} must be at least 1")
        reader.check("answers")
        self.reader, self.top = reader, top
        self.questions = [(question, *text_ids(reader.fused.tokenizer, question)) for question in questions]

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Adds the options of answering."""
        parser.add_argument(
            "--question", action="append", default=[], help="asked about every picture; may be given several times"
        )
        parser.add_argument("--top", type=int, default=1, help="answers of each question in the tables")

    @classmethod
    def open(cls, init: str, args: argparse.Namespace) -> "QuestionAnswerer":
        """Loads the weights."""
        return cls(FusionReader(FusedTowers(Encoder(init)), args.batch_size), args.question, args.top)

    @staticmethod
    def open_input(args: argparse.Namespace) -> Source:
        """Pictures where --question is given, else questions."""
        if args.question:
            return open_pictures(args.input)
        if is_questions(args.input) or (args.input.endswith(QUESTION_TABLES) and Path(args.input).is_file()):
            return open_own_questions(args.input)
        source = open_source(args.input)
        if not hasattr(source, "image_ids"):
            raise UserError(
                f"--input={args.input} has no questions: ask one about every picture with --question='What is this?', "
                "or give a file questions.jsonl, with lines of image and question"
            )
        return source

    def answers(self, source: Source) -> Iterator[Found]:
        """Of every question whose picture can be read, in order; prints how many there were a second."""
        began = time.perf_counter()
        found: list[tuple[int, Mapping[str, Any], QuestionAnswers]] = []
        asked = self._of_pictures(source) if self.questions else self._of_source(source)
        records: list[tuple[int, Mapping[str, Any]]] = []

        def texts() -> Iterator[Beside]:
            for index, record, text in asked:
                records.append((index, record))
                yield text

        total = len(source) * max(len(self.questions), 1)
        for answered in self.reader.answers(texts(), max(self.top, PAGE_ANSWERS), total):
            found.append((*records[len(found)], answered))
        seconds = time.perf_counter() - began
        print(f"{len(found):,} questions answered, {len(found) / seconds:.1f} a second with compilation", flush=True)
        rows: dict[int, list[tuple[Mapping[str, Any], QuestionAnswers]]] = {}
        for index, record, answered in found:
            rows.setdefault(index, []).append((record, answered))
        return (self._found(index, rows[index]) for index in sorted(rows))

    def _of_pictures(self, source: Source) -> Iterator[tuple[int, Mapping[str, Any], Beside]]:
        for row in self.reader.pictures(source, ("key",)):
            for question, text, length in self.questions:
                yield row["index"], {"question": question, "key": row["key"]}, Beside(row["tokens"], text, length)

    def _of_source(self, source: Source) -> Iterator[tuple[int, Mapping[str, Any], Beside]]:
        groups = QuestionGroups(source, ALL_OF_A_PICTURE)
        for row in self.reader.pictures(groups, ("questions",)):
            for index, record in zip(groups.rows(row["index"]), row["questions"], strict=True):
                text, length = text_ids(self.reader.fused.tokenizer, record["question"])
                yield index, record, Beside(row["tokens"], text, length)

    def _found(self, index: int, answered: Sequence[tuple[Mapping[str, Any], QuestionAnswers]]) -> Found:
        lines = [
            {"question": record["question"], "answer": answer, "probability": round(score, 6), "rank": rank}
            for record, said in answered
            for rank, (answer, score) in enumerate(said.best[: self.top], 1)
        ]
        texts = (
            f"{record['question']} {', '.join(f'{answer} {score:.2f}' for answer, score in said.best[:PAGE_ANSWERS])}"
            for record, said in answered
        )
        record = answered[0][0]
        key = str(record.get("image_id", record["key"]))
        return Found(index, key, lines, "; ".join(texts), answered)

    def picture(self, record: Record, found: Found) -> str:
        """The picture, small, and where the answers to its first questions looked."""
        whole = Decode()(record, np.random.default_rng(0))["image"]
        looked = [said.attention.astype(np.float32) for _, said in found.details[:PAGE_QUESTIONS]]
        return attended_picture(whole, self.reader.see(record), looked, FIGURE_HEIGHT)

    def remarks(self, answers: Sequence[Found]) -> Sequence[str]:
        """What the page shows beside the pictures."""
        several = len(self.questions) > 1
        each = f", of the first {PAGE_QUESTIONS} questions" if len(self.questions) > PAGE_QUESTIONS else ""
        return [f"{ATTENTION}{' One for each question' + each + '.' if several else ''}"] if answers else []

    def files(self, answers: Sequence[Found]) -> Mapping[str, bytes]:
        """answers.json as VQA's server takes it, where the questions have ids."""
        rows = [
            {"question_id": record["question_id"], "answer": said.best[0][0]}
            for answer in answers
            for record, said in answer.details
            if "question_id" in record
        ]
        return {"answers.json": json.dumps(rows, ensure_ascii=False).encode()} if rows else {}
