"""What the page of a run shows of answers to questions: accuracy by type beside the prior, confusions, examples."""

import html
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from florence_jax.evaluators.vqa_scores import (
    Answered,
    Prior,
    confusions,
    judge_answers,
    question_accuracy,
    rows_by_value,
    standard_error,
)
from florence_jax.page import Html, figure_html, share_bar, show_number, table_html
from florence_jax.pictures import picture_uri, with_heat

TYPES_SHOWN = 65  # VQA v2 has so many types of questions
CONFUSIONS_SHOWN = 20
EXAMPLES_SHOWN = 8  # right ones, and as many wrong ones
EXAMPLE_SIDE, GAP = 200, 6  # pixels
_RIGHT, _WRONG, _PLAIN = "#3a7d44", "#d1495b", "#1b6ca8"
ATTENTION = (
    "Beside each picture where the last cross-attention of the text's first token looks, the mean over its heads; it "
    "says what was looked at, not why."
)
PEOPLE_SHOWN = 4  # different true answers


class ShownAnswer(NamedTuple):
    """A question that may be shown.

    Attributes:
      asked: fields of its record. record: with its picture.
      answers: the best ones, best first. scores: of each, 0 to 1.
      attention: float (T,), of the image's tokens, or None.
    """

    asked: Mapping[str, Any]
    record: int
    answers: Sequence[str]
    scores: Sequence[float]
    attention: np.ndarray | None


def vqa_report(
    name: str,
    judged: Answered,
    prior: Prior | None,
    examples: Sequence[ShownAnswer],
    see: Callable[[int], np.ndarray | None],
    notes: Sequence[str] = (),
) -> list[str]:
    """HTML fragments about one evaluation.

    Args:
      name: of the evaluator.
      judged: the questions that have true answers. prior: of the training set, if it is known.
      examples: questions that may be shown.
      see: gives the picture of a record as the model saw it, uint8 (H, W, 3); None where it cannot be read any more.
      notes: sentences.
    """
    title = html.escape(name)
    said = "".join(f"<p>{html.escape(note[:1].upper() + note[1:])}.</p>" for note in notes)
    parts = []
    if len(judged.accuracy):
        parts += [
            f"<h2>{title}: accuracy</h2>{said}{_accuracy(judged, prior)}",
            f"<h2>{title}: most frequent confusions</h2>{_confusions(judged)}",
        ]
    return [*parts, *_examples(title, examples, see)]


def _accuracy(judged: Answered, prior: Prior | None) -> str:
    """A table by types, the prior beside it."""
    guesses = judge_answers(judged.asked, [prior.answer(fields) for fields in judged.asked]) if prior else None
    everything = np.arange(len(judged.accuracy))
    sections = [("all questions", everything), *_types(judged, "answer_type"), *_types(judged, "question_type")]
    rows = []
    for what, chosen in sections:
        mean = float(judged.accuracy[chosen].mean())
        beside = [float(guesses.accuracy[chosen].mean())] if guesses else []
        rows.append((what, len(chosen), mean, *beside, share_bar(mean)))
    head = ("", "questions", "accuracy", *(["prior"] if guesses else []), "")
    known = float(judged.known.mean())
    text = (
        f"<p>Standard error of all: {show_number(standard_error(judged))}, questions of one image counted together. "
        f"{known:.1%} of the questions have an answer in the vocabulary; the others count as wrong"
    )
    if 0 < known < 1:
        text += f", without them it is {judged.accuracy[judged.known].mean():.3f}"
    text += ".</p>"
    if guesses:
        text += (
            "<p>Prior: the best answer of the training set for each question's very text, without the picture; where "
            "the text is new, for its type of question.</p>"
        )
    return table_html(head, rows) + text


def _types(judged: Answered, field: str) -> list[tuple[str, np.ndarray]]:
    before = "answers: " if field == "answer_type" else ""
    return [(f"{before}{kind}", rows) for kind, rows in list(rows_by_value(judged, field).items())[:TYPES_SHOWN]]


def _confusions(judged: Answered) -> str:
    rows = [
        (_as_text(true or "(nothing)"), _as_text(answer), count, f"{count / total:.0%} of {total:,}")
        for true, answer, count, total in confusions(judged, CONFUSIONS_SHOWN)
    ]
    head = ("true answer", "answered", "questions", "of those with that true answer")
    return table_html(head, rows) or "<p>No answer is wrong.</p>"


def _examples(title: str, examples: Sequence[ShownAnswer], see: Callable[[int], np.ndarray | None]) -> list[str]:
    """Right ones and wrong ones; of a set without true answers any."""
    answered = [example for example in examples if example.asked.get("answers")]
    groups: list[tuple[str, list[ShownAnswer]]] = [("answers", [e for e in examples if not e.asked.get("answers")])]
    if answered:
        right = [question_accuracy(e.answers[0], e.asked["answers"]) >= 0.5 for e in answered]
        groups = [
            ("right answers", [e for e, is_right in zip(answered, right, strict=True) if is_right]),
            ("wrong answers", [e for e, is_right in zip(answered, right, strict=True) if not is_right]),
        ]
    parts = []
    for what, chosen in groups:
        if chosen:
            spread = np.unique(np.linspace(0, len(chosen) - 1, min(EXAMPLES_SHOWN, len(chosen))).astype(int))
            figures = "".join(_figure(chosen[k], see(chosen[k].record)) for k in spread.tolist())
            looked = any(example.attention is not None for example in chosen)
            note = f"<p>{ATTENTION}</p>" if looked else ""
            parts.append(f'<h2>{title}: {what}</h2>{note}<div class="tiles">{figures}</div>')
    return parts


def _figure(example: ShownAnswer, picture: np.ndarray | None) -> str:
    """A picture with its question, the best answers with bars, and the true ones."""
    true = example.asked.get("answers") or ()
    rows = []
    for answer, score in zip(example.answers, example.scores, strict=True):
        share = question_accuracy(answer, true) if true else 0.0
        colour = _RIGHT if share else _WRONG if true else _PLAIN
        bar = f'<i style="width:{100 * score:.0f}%;background:{colour}"></i>'
        text = f'<div class="bar" style="width:140px;height:12px">{bar}</div>'
        rows.append((_as_text(answer), Html(text), f"{score:.2f}"))
    above = f"<b>{html.escape(str(example.asked['question']))}</b>{table_html(('', '', ''), rows)}"
    return figure_html([_picture(picture, example.attention)], Html(above), _people(true), kind="large")


def _as_text(answer: str) -> Html:
    """For a cell of a table, in which a number is no number to be added."""
    return Html(f"<span>{html.escape(answer)}</span>")


def _people(true: Sequence[str]) -> str:
    """'true: red (7), orange (3)'; '' for none."""
    if len(true) < 2:
        return f"true: {true[0]}" if true else ""
    counts = Counter(true).most_common()
    more = f" and {len(counts) - PEOPLE_SHOWN} more" if len(counts) > PEOPLE_SHOWN else ""
    return "true: " + ", ".join(f"{answer} ({count})" for answer, count in counts[:PEOPLE_SHOWN]) + more


def _picture(picture: np.ndarray | None, attention: np.ndarray | None) -> str:
    """Data URI: of the picture, and beside it of the same with the attention laid over it; '' without a picture."""
    if picture is None:
        return ""
    return attended_picture(picture, picture, [] if attention is None else [attention], EXAMPLE_SIDE)


def attended_picture(shown: np.ndarray, seen: np.ndarray, attentions: Sequence[np.ndarray], height: int) -> str:
    """Data URI of a picture, beside it for each attention what the model saw with that laid over it.

    Args:
      shown, seen: uint8 (H, W, 3), made to fit into 2 `height` x `height` pixels.
      attentions: float (T,) of the tokens; what makes no grid is left out.
    """
    grids = [_grid(attention, seen.shape[0] / seen.shape[1]) for attention in attentions]
    view = _fitted(seen, height)
    beside = [_fitted(shown, height), *(with_heat(view, grid) for grid in grids if grid is not None)]
    tallest = max(each.height for each in beside)
    both = Image.new("RGB", (sum(each.width + GAP for each in beside) - GAP, tallest), "#f2f2f2")
    left = 0
    for each in beside:
        both.paste(each, (left, (tallest - each.height) // 2))
        left += each.width + GAP
    return picture_uri(both)


def _fitted(picture: np.ndarray, height: int) -> Image.Image:
    """As large as fits into 2 `height` x `height` pixels."""
    image = Image.fromarray(picture)
    scale = min(height / image.height, 2 * height / image.width)
    return image.resize([max(1, round(edge * scale)) for edge in image.size], Image.Resampling.BICUBIC)


def _grid(attention: np.ndarray, aspect: float) -> np.ndarray | None:
    """(h, w) of (T,): image tokens row by row, perhaps behind one of the class; None where they make no grid."""
    for tokens in (attention, attention[1:]):
        high = round(math.sqrt(len(tokens) * aspect))
        if high and len(tokens) % high == 0 and abs(len(tokens) / high**2 * aspect - 1) < 0.1:
            return tokens.reshape(high, -1)
    return None
