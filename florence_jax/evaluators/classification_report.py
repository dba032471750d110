"""What the page of a run shows of a classifier: confusion matrix, accuracy by class, right and wrong images."""

import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from florence_jax.data.records import Source
from florence_jax.evaluators.base import OF_IMAGES, Payload
from florence_jax.evaluators.metrics import TOP, Answers, TwoClasses
from florence_jax.page import GridCell, matches_html
from florence_jax.pictures import data_uri

TABLE_CLASSES = 20  # a confusion matrix of more classes is drawn as a picture
EXAMPLE_ROWS = 6


def confusion_html(title: str, confusion: np.ndarray, names: Sequence[str]) -> str:
    """A table for up to 20 classes, else a picture; and the commonest mistakes."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    head = f"<h2>{html.escape(title)}: confusion</h2><p>Rows: the right class; columns: what it was called.</p>"
    if len(names) <= TABLE_CLASSES:
        columns = "".join(f'<th class="turn"><span>{html.escape(name)}</span></th>' for name in names)
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th>"
            + "".join(
                f'<td style="background:{_shade(share, i == j)}">{count or ""}</td>'
                for j, (count, share) in enumerate(zip(confusion[i], shares[i], strict=True))
            )
            + "</tr>"
            for i, name in enumerate(names)
        )
        body = f'<table class="confusion"><tr><th></th>{columns}</tr>{rows}</table>'
    else:
        pixels = (255 - 255 * np.sqrt(shares)).astype(np.uint8)
        size = len(names) * max(1, 600 // len(names))
        file = io.BytesIO()
        Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).save(file, "PNG", optimize=True)
        body = (
            f'<img src="{data_uri(file.getvalue(), "image/png")}" alt="confusion matrix" style="border:1px solid #ccc">'
            f"<p>{len(names)} classes in the order of their numbers; darker: a larger share of the row.</p>"
        )
    wrong = confusion * (1 - np.eye(len(names), dtype=confusion.dtype))
    pairs = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None, kind="stable")[:10]]
    mistakes = "".join(
        f"<li>{html.escape(names[i])} called {html.escape(names[j])}: {wrong[i, j]} of {confusion[i].sum()}</li>"
        for i, j in pairs
        if wrong[i, j]
    )
    return head + body + (f"<p>Commonest mistakes:</p><ol>{mistakes}</ol>" if mistakes else "")


def _shade(share: float, right: bool) -> str:
    strength = 0.85 * float(share)
    return f"rgba({'58,125,68' if right else '209,73,91'},{strength:.2f})"


def classes_table(
    title: str, names: Sequence[str], values: np.ndarray, counts: np.ndarray, what: str, plural: str = OF_IMAGES.plural
) -> str:
    """Numbers of each class that has images, or whatever `plural` says, worst first; `what` they are."""
    order = [k for k in np.argsort(values, kind="stable") if counts[k]]
    rows = "".join(
        f'<tr><td>{html.escape(names[k])}</td><td class="n">{values[k]:.3f}</td><td class="n">{counts[k]}</td></tr>'
        for k in order
    )
    return (
        f"<h2>{html.escape(title)}: classes</h2><details{' open' if len(order) <= TABLE_CLASSES else ''}><summary>"
        f"{len(order)} classes, worst first</summary><table><tr><th>class</th><th>{what}</th><th>{plural}</th></tr>"
        f"{rows}</table></details>"
    )


def examples_html(
    title: str,
    source: Source,
    given: Answers,
    index: np.ndarray,
    names: Sequence[str],
    payload: Payload = OF_IMAGES,
    rows: int = EXAMPLE_ROWS,
) -> str:
    """Images with the classes they were given and their scores, best first: `rows` right ones, as many wrong ones."""
    body = ""
    for what, chosen in (
        ("right", np.flatnonzero(given.ranks == 0)),
        ("wrong", np.flatnonzero(given.ranks > 0)),
    ):
        if not len(chosen):
            continue
        chosen = chosen[np.linspace(0, len(chosen) - 1, min(rows, len(chosen))).astype(int)]
        lines = []
        for i in chosen:
            right = int(given.labels[i])
            picture = payload.thumbnail(source, int(index[i])) or None
            query = GridCell(names[right], picture, True, wide=payload.wide)
            shown = zip(given.top[i].tolist(), given.scores[i].tolist(), strict=True)
            bars = [
                GridCell(names[k], None, k == right, f"{score:.2f}", share=score if payload.wide else None)
                for k, score in shown
            ]
            lines.append((query, bars))
        body += matches_html(f"{title}: {what} answers", lines)
    return body


def several_html(
    title: str,
    source: Source,
    scores: np.ndarray,
    labels: np.ndarray,
    index: np.ndarray,
    names: Sequence[str],
    payload: Payload = OF_IMAGES,
    rows: int = EXAMPLE_ROWS,
) -> str:
    """Images with several classes each: those that are told best and worst, and random ones, `rows` of each.

    An image is told the better the further its lowest right class stands above its highest wrong one. Beside each are
    the classes with the highest scores, and the right ones that are not among them.

    Args:
      title: of the section. source: the images.
      scores: float (N, K), as people read them. labels: int8 (N, K) of 1, 0 and -1 (not judged).
      index: (N,), rows of the source. names: of the classes. payload: what the source has instead of images.
    """
    right, wrong = labels > 0, labels == 0
    lowest, highest = np.where(right, scores, np.inf).min(1), np.where(wrong, scores, -np.inf).max(1)
    told = np.flatnonzero(right.any(1) & wrong.any(1))
    told = told[np.argsort((highest - lowest)[told], kind="stable")]
    half = len(told) // 2
    best, worst = told[: min(rows, len(told) - half)], told[::-1][: min(rows, half)]
    others = np.setdiff1d(np.arange(len(labels)), np.concatenate([best, worst]))
    drawn = np.sort(np.random.default_rng(0).permutation(others)[:rows])
    body = ""
    for what, chosen in (("told best", best), ("told worst", worst), ("random images", drawn)):
        if len(chosen):
            lines = [_told(source, scores[i], labels[i], int(index[i]), names, payload) for i in chosen]
            body += matches_html(f"{title}: {what}", lines)
    return body


def _told(
    source: Source, scores: np.ndarray, labels: np.ndarray, row: int, names: Sequence[str], payload: Payload
) -> tuple[GridCell, list[GridCell]]:
    """An image with its classes, (K,) scores and labels, for `matches_html`."""
    order = np.argsort(-scores, kind="stable").tolist()
    missed = [k for k in order[TOP:] if labels[k] > 0][:TOP]
    said = ", ".join(names[k] for k in np.flatnonzero(labels > 0).tolist()) or "none"
    cells = [
        GridCell(names[k], None, bool(labels[k] > 0), f"{scores[k]:.2f}" + ("" if labels[k] >= 0 else ", not judged"))
        for k in [*order[:TOP], *missed]
    ]
    return GridCell(said, payload.thumbnail(source, row) or None, True), cells


def two_classes_html(title: str, names: Sequence[str], found: TwoClasses) -> str:
    """What the numbers of two classes are of, and how to use the threshold."""
    other, positive = map(html.escape, names)
    return (
        f"<h2>{html.escape(title)}: {other} or {positive}</h2><p>Precision {found.precision:.3f}, recall "
        f"{found.recall:.3f} and F1 {found.f1:.3f} are of <b>{positive}</b>, the second class in the order of the "
        f"class names. Called so from a score of {found.best_threshold:.3f} on, instead of 0.5, its F1 is "
        f"{found.best_f1:.3f}, the best here; chosen on these very images, it is a little too good.</p>"
    )
