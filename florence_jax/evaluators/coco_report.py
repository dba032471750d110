"""What the page of a run shows of a detector: numbers beside the mean boxes', curves, classes, mistakes, pictures."""

import html
from collections.abc import Mapping, Sequence

import numpy as np

from florence_jax.evaluators.classification_report import TABLE_CLASSES, confusion_html
from florence_jax.evaluators.coco_baseline import TRAINING_PICTURES
from florence_jax.evaluators.coco_errors import (
    CORRECT,
    FALSE_KINDS,
    Judged,
    Threshold,
    best_threshold,
    confusion_with_background,
    judge_boxes,
    picture_f1,
)
from florence_jax.evaluators.coco_files import FoundBoxes, GroundTruth
from florence_jax.evaluators.coco_pictures import Painter
from florence_jax.evaluators.coco_scores import AGNOSTIC, COCO_METRICS, FIXED_AP, LVIS_AP, CocoScores, absent_words
from florence_jax.page import curve, share_bar, table_html

METRIC_MEANINGS = {
    "AP": "average precision, mean over IoU .50, .55, ... .95",
    "AP50": "at IoU .50",
    "AP75": "at IoU .75",
    "APs": "of small boxes, below 32 x 32 pixels",
    "APm": "of medium boxes, to 96 x 96 pixels",
    "APl": "of large boxes",
    "AR1": "average recall with one box a picture",
    "AR10": "with 10",
    "AR100": "with 100",
    "ARs": "with 100, of small boxes",
    "ARm": "of medium boxes",
    "ARl": "of large boxes",
    AGNOSTIC: "AP50 whatever the classes, a thing's boxes of several classes counted once",
    LVIS_AP: "AP of up to 300 boxes a picture, as LVIS has it",
    "APr": "of these the rare classes, in 1 to 10 pictures of LVIS's training set",
    "APc": "the common ones, to 100",
    "APf": "the frequent ones",
    FIXED_AP: "AP of the 10,000 best boxes of each class, however many a picture has",
    f"{FIXED_AP}r": "of these the rare classes",
    f"{FIXED_AP}c": "the common ones",
    f"{FIXED_AP}f": "the frequent ones",
}
FALSE_MEANINGS = (
    "a box of its class lies there (IoU .5), but another has found it",
    "a box of another class lies there (IoU .5)",
    "a box of its class is near (IoU .1 to .5)",
    "a box of another class is near (IoU .1 to .5)",
    "no box is near",
)
SHOWN = 4  # pictures of each sort
SIZE_RANGES = (("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, np.inf))


def coco_report(
    name: str,
    truth: GroundTruth,
    found: FoundBoxes,
    scores: CocoScores,
    chance: Mapping[str, float],
    notes: Sequence[str],
    painter: Painter,
) -> list[str]:
    """HTML fragments about one evaluation.

    Args:
      name: of the evaluator.
      truth, found, scores: of the evaluation.
      chance: what the mean boxes score.
      notes: sentences that were said before.
      painter: of the pictures of `truth`.
    """
    judged = judge_boxes(truth, found)
    threshold = best_threshold(judged)
    title = html.escape(name)
    sampled = f" {len(judged.rows):,} of {len(truth.keys):,} pictures, evenly spread, were looked at for all of this."
    said = f"<p>{sampled}</p>" if len(judged.rows) < len(truth.keys) else ""
    parts = [
        f"<h2>{title}: average precision</h2>{_notes(notes)}{_metrics(scores, chance)}",
        f"<h2>{title}: precision and recall</h2>{_curves(scores)}",
        f"<h2>{title}: classes</h2>{_classes(truth, scores)}",
        f"<h2>{title}: boxes</h2>{_statistics(truth, found, threshold)}",
    ]
    if np.isnan(threshold.score):
        return [*parts, "<p>Nothing was found, or there was nothing to find: there are no mistakes to show.</p>"]
    names = [*truth.class_names, "background"]
    return [
        *parts,
        f"<h2>{title}: a threshold</h2>{_threshold(threshold)}{said}",
        confusion_html(name, confusion_with_background(judged, threshold.score), names),
        "<p>Boxes from the threshold on, at IoU .5; the last column has true boxes that nothing found, the last row "
        "what was found where nothing is. Crowds count neither way.</p>",
        f"<h2>{title}: false positives</h2>{_false_positives(judged, threshold.score, painter)}",
        _examples(title, judged, threshold.score, painter),
    ]


def _notes(notes: Sequence[str]) -> str:
    return "".join(f"<p>{html.escape(note[:1].upper() + note[1:])}.</p>" for note in notes)


def _metrics(scores: CocoScores, chance: Mapping[str, float]) -> str:
    """The table; beside the numbers those of the mean boxes, where they are known."""
    rows = [
        (metric, scores.values[metric], *([chance.get(metric, "")] if chance else []), meaning)
        for metric, meaning in METRIC_MEANINGS.items()
        if metric in scores.values
    ]
    absent = absent_words([metric for metric in COCO_METRICS if metric not in scores.values])
    below = f"<p>{html.escape(absent[:1].upper() + absent[1:])}.</p>" if absent else ""
    if chance:
        below += (
            "<p>Mean boxes: what a detector scores that finds in every picture the mean box of each class of the "
            f"training set, with the class's share of all boxes as its score ({TRAINING_PICTURES} pictures of the "
            "training set at most were looked at).</p>"
        )
    return table_html(("metric", "value", *(["mean boxes"] if chance else []), "meaning"), rows) + below


def _curves(scores: CocoScores) -> str:
    """Of the mean over classes, as COCO interpolates them: the highest precision at a recall or more."""
    there = ~np.isnan(scores.precision[0, 0])
    if not there.any():
        return "<p>There are no boxes.</p>"
    mean = scores.precision[:, :, there].mean(2)
    series = {"IoU .5": mean[0].tolist(), "IoU .75": mean[5].tolist(), "IoU .5 to .95": mean.mean(0).tolist()}
    note = "<p>Mean over the classes; the areas below the lines are AP50, AP75 and AP.</p>"
    return curve("precision over recall (%)", range(101), series) + note


def _classes(truth: GroundTruth, scores: CocoScores) -> str:
    """AP of each class with boxes, worst first."""
    ap, ap50, counts = scores.class_ap(), scores.class_ap(0), truth.counts()
    order = [k for k in np.argsort(ap, kind="stable").tolist() if not np.isnan(ap[k])]
    rows = [(truth.class_names[k], int(counts[k]), float(ap[k]), float(ap50[k]), share_bar(ap[k])) for k in order]
    table = table_html(("class", "true boxes", "AP", "AP50", ""), rows)
    opened = " open" if len(order) <= TABLE_CLASSES else ""
    return f"<details{opened}><summary>{len(order)} classes, worst first</summary>{table}</details>"


def _statistics(truth: GroundTruth, found: FoundBoxes, threshold: Threshold) -> str:
    real, areas = truth.areas[~truth.crowd], found.boxes[:, 2] * found.boxes[:, 3]
    taken = areas[found.scores >= threshold.score] if not np.isnan(threshold.score) else areas[:0]
    rows: list[tuple[str, int, float, int, float]] = []
    for name, low, high in SIZE_RANGES:
        counts = [int(((sizes >= low) & (sizes < high)).sum()) for sizes in (real, taken)]
        shares = [count / max(len(sizes), 1) for count, sizes in zip(counts, (real, taken), strict=True)]
        rows.append((name, counts[0], shares[0], counts[1], shares[1]))
    table = table_html(("size", "true boxes", "share", "found, from the threshold on", "share"), rows)
    each = np.bincount(truth.image[~truth.crowd], minlength=len(truth.keys))
    facts = [
        f"{len(truth.keys):,} pictures, {int((each == 0).sum()):,} of them without boxes",
        f"{len(real):,} true boxes, {len(real) / max(len(each), 1):.1f} a picture, at most {each.max(initial=0):,}",
        f"{int(truth.crowd.sum()):,} crowds, in which what is found counts neither way",
        f"{len(found.scores):,} boxes found, of any score",
    ]
    if many := int((each > 100).sum()):
        lost = int(np.maximum(each - 100, 0).sum())
        facts.append(f"{many:,} pictures have more than the 100 boxes that are counted: {lost:,} cannot be found")
    return f"<p>{'; '.join(facts)}.</p>{table}"


def _threshold(threshold: Threshold) -> str:
    return (
        f"<p>Boxes with a score of at least <b>{threshold.score:.3f}</b> have the best F1 at IoU .5, "
        f"{threshold.f1:.3f}, with precision {threshold.precision:.3f} and recall {threshold.recall:.3f} over all "
        "classes together. It was chosen on these very pictures, so these numbers are a little too good; the average "
        "precision does not depend on it. What follows shows boxes from this score on.</p>"
    )


def _false_positives(judged: Judged, threshold: float, painter: Painter) -> str:
    kept = judged.kept(threshold)
    total = int((kept & (judged.kind != CORRECT)).sum())
    rows, sections = [], []
    for number, (kind, meaning) in enumerate(zip(FALSE_KINDS, FALSE_MEANINGS, strict=True)):
        chosen = np.flatnonzero(kept & (judged.kind == number))
        rows.append((kind, len(chosen), len(chosen) / max(total, 1), meaning, share_bar(len(chosen) / max(total, 1))))
        best = chosen[np.argsort(-judged.found.scores[chosen], kind="stable")]
        _, first = np.unique(judged.found.image[best], return_index=True)  # one of each picture
        figures = [painter.mistake(judged, box) for box in best[np.sort(first)[:SHOWN]].tolist()]
        if figures:
            sections.append(f'<h3>{kind}</h3><div class="tiles">{"".join(figures)}</div>')
    true, right = int((~judged.truth.crowd).sum()), int((kept & (judged.kind == CORRECT)).sum())
    note = (
        f"<p>{total:,} of {int(kept.sum()):,} boxes from the threshold on are wrong, each of the first kind that fits; "
        f"{true - right:,} of {true:,} true boxes are not found. The pictures have those with the highest scores in "
        "red, the nearest true box in green.</p>"
    )
    table = table_html(("kind", "boxes", "share", "meaning", ""), rows)
    return f"{table}{note}{''.join(sections)}"


def _examples(title: str, judged: Judged, threshold: float, painter: Painter) -> str:
    f1 = picture_f1(judged, threshold)
    judgeable = np.flatnonzero(~np.isnan(f1))
    each = np.bincount(judged.truth.image[~judged.truth.crowd], minlength=len(f1))
    # Of equals those with more boxes: they say more.
    order = judgeable[np.lexsort((-each[judgeable], -f1[judgeable]))]
    best, others = order[: -(-len(order) // 2)][:SHOWN], order[-(-len(order) // 2) :]
    worst = others[np.lexsort((-each[others], f1[others]))][:SHOWN]
    rest = np.setdiff1d(np.arange(len(f1)), np.concatenate([best, worst]))
    drawn = np.random.default_rng(0).permutation(rest)[:SHOWN]
    note = "Left the true boxes, red where they are not found; right the boxes found, red where they are wrong."
    parts = [f"<h2>{title}: pictures</h2><p>{note}</p>"]
    for heading, rows in (("best", best), ("worst", worst), ("random", np.sort(drawn))):
        figures = [painter.picture(judged, row, threshold, float(f1[row])) for row in rows.tolist()]
        if figures:
            parts.append(f'<h3>{heading}</h3><div class="tiles">{"".join(figures)}</div>')
    return "".join(parts)
