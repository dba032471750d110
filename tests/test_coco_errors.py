"""Which found boxes are right and why the others are not, and the page of a detector."""

import dataclasses

import numpy as np
import pytest
from coco_tools import NAMES, DrawnBoxes, answers_like, truth_of

from florence_jax.evaluators.coco_errors import (
    CORRECT,
    FALSE_KINDS,
    IGNORED,
    best_threshold,
    confusion_with_background,
    judge_boxes,
    picture_f1,
)
from florence_jax.evaluators.coco_files import found_boxes
from florence_jax.evaluators.coco_pictures import Painter
from florence_jax.evaluators.coco_report import coco_report
from florence_jax.evaluators.coco_scores import ALL_SIZES, coco_data, coco_eval, coco_scores

pytest.importorskip("pycocotools")


def truth_with(boxes, labels, crowd=None):
    crowd = crowd or [False] * len(labels)
    change = {"boxes": boxes, "class_ids": labels, "iscrowd": crowd, "is_group_of": [False] * len(labels)}
    return truth_of(DrawnBoxes(1, changes={0: change | {"width": 200, "height": 200}}))


def found_in(truth, rows):
    """Rows of (picture, label, corners, score)."""
    image, labels, corners, scores = zip(*rows, strict=True)
    return found_boxes(np.array(image), np.array(labels), np.array(corners, float), np.array(scores), truth)


def many(noise=0.1, seed=0):
    """Truth and noisy findings of 20 pictures."""
    source = DrawnBoxes(20)
    truth, rows = truth_of(source), []
    for row, answer in enumerate(answers_like(source, noise, seed, false=3, wrong=0.2)):
        rows += [(row, label, box, score) for box, score, label in zip(*answer, strict=True)]
    return source, truth, found_in(truth, rows)


def each_kind():
    """Truth and findings of one picture: a right one, each kind of mistake, and some in a crowd."""
    truth = truth_with(
        [[10, 10, 50, 50], [100, 100, 140, 140], [150, 20, 190, 60], [0, 150, 80, 190]], [0, 1, 0, 2], [0, 0, 0, 1]
    )
    found = found_in(
        truth,
        [
            (0, 0, [10, 10, 50, 48], 0.9),  # right
            (0, 0, [10, 10, 50, 50], 0.8),  # nearer, but later: a duplicate
            (0, 0, [100, 100, 140, 141], 0.7),  # another class lies there
            (0, 0, [165, 35, 205, 75], 0.6),  # near one of its class
            (0, 2, [115, 115, 155, 155], 0.5),  # near one of another class
            (0, 1, [60, 60, 90, 90], 0.4),  # background
            (0, 2, [10, 155, 40, 185], 0.3),  # in a crowd of its class
            (0, 1, [10, 155, 40, 185], 0.2),  # in a crowd of another class
        ],
    )
    return truth, found


def test_each_kind_of_mistake():
    truth, found = each_kind()
    judged = judge_boxes(truth, found)
    numbers = [CORRECT, *range(5), IGNORED, FALSE_KINDS.index("background")]
    assert judged.kind.tolist() == numbers
    assert judged.match.tolist() == [0, 0, 1, 2, 1, -1, -1, -1]
    # From .55 on: the right one; RBC on a WBC; a duplicate and one beside what it should have found.
    expected = np.zeros((4, 4), int)
    expected[0, 0], expected[1, 0], expected[3, 0], expected[0, 3] = 1, 1, 2, 1
    assert confusion_with_background(judged, 0.55).tolist() == expected.tolist()
    assert picture_f1(judged, 0.55).tolist() == [2 / (4 + 3)]


def test_right_ones_are_pycocotools_matches_and_the_threshold_is_the_best():
    _, truth, found = many()
    judged = judge_boxes(truth, found)
    kinds = dict(zip(judged.found.scores.tolist(), judged.kind.tolist(), strict=True))
    assert len(kinds) == len(found.scores)  # a score belongs to one box
    result = coco_eval(coco_data(truth, found), **ALL_SIZES)
    seen = 0
    for image in filter(None, result.evalImgs):
        for score, match, ignored in zip(image["dtScores"], image["dtMatches"][0], image["dtIgnore"][0], strict=True):
            seen += 1
            assert (kinds[score] == CORRECT) == (match > 0 and not ignored) and (kinds[score] == IGNORED) == ignored
    assert seen == len(found.scores) and IGNORED in kinds.values()
    best, total = best_threshold(judged), int((~truth.crowd).sum())
    counted = judged.kind != IGNORED
    scores, hits = judged.found.scores[counted], judged.kind[counted] == CORRECT
    f1s = {s: 2 * (hits & (scores >= s)).sum() / ((scores >= s).sum() + total) for s in scores.tolist()}
    assert best.f1 == pytest.approx(max(f1s.values())) == pytest.approx(f1s[best.score])
    assert best.recall == pytest.approx((hits & (scores >= best.score)).sum() / total)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 2.0])
def test_a_confusion_matrix_counts_each_box_once(threshold):
    _, truth, found = many()
    judged = judge_boxes(truth, found)
    matrix = confusion_with_background(judged, threshold)
    assert matrix[:3].sum(1).tolist() == truth.counts().tolist() and matrix[3, 3] == 0
    assert matrix[:, :3].sum() == judged.kept(threshold).sum()
    # A box of another class may stand where a right one was not found: there are no fewer right ones.
    assert np.trace(matrix[:3, :3]) >= (judged.kept(threshold) & (judged.kind == CORRECT)).sum()


def test_many_pictures_are_sampled(monkeypatch):
    _, truth, found = many()
    monkeypatch.setattr("florence_jax.evaluators.coco_errors.MOST_JUDGED", 5)
    judged = judge_boxes(truth, found)
    assert judged.rows.tolist() == [0, 4, 9, 14, 19] and len(judged.truth.keys) == 5
    whole = set(found.subset(np.isin(found.image, judged.rows)).scores.tolist())
    assert set(judged.found.scores.tolist()) == whole


def report_of(source, truth, found, chance=None, notes=()):
    painter = Painter(source, np.arange(len(truth.keys)))
    return "".join(coco_report("test", truth, found, coco_scores(truth, found), chance or {}, notes, painter))


def test_the_page():
    source, truth, found = many()
    page = report_of(source, truth, found, {"AP": 0.0123}, ["all is well"])
    assert "<p>All is well.</p>" in page and ">0.012</td>" in page
    assert "precision over recall (%)" in page and page.count("<polyline") == 3
    assert all(f"<h3>{what}</h3>" in page for what in ("best", "worst", "random", "class"))
    assert page.count('class="pair"') == 12 and "chosen on these very pictures" in page
    assert "No APl and ARl: the test set has no large boxes." in page
    empty = 20 - len(np.unique(truth.image[~truth.crowd]))
    assert f"20 pictures, {empty} of them without boxes" in page and "called background" in page
    for name in NAMES:
        assert f"<td>{name}</td>" in page


def test_the_page_of_a_detector_that_finds_nothing_and_of_no_boxes():
    source, truth, found = many()
    page = report_of(source, truth, found.subset(np.zeros(0, int)))
    assert "mean boxes" not in page
    assert "Nothing was found, or there was nothing to find" in page
    empty = dataclasses.replace(truth, crowd=np.ones_like(truth.crowd))
    page = report_of(source, empty, found)
    assert "Nothing was found" in page and "There are no boxes." in page


def test_every_kind_of_mistake_has_a_picture_and_an_unreadable_one_is_grey():
    source, (truth, found) = DrawnBoxes(1), each_kind()
    judged = judge_boxes(truth, found)
    for number, name in enumerate(FALSE_KINDS):
        box = int(np.flatnonzero(judged.kind == number)[0])
        shown = Painter(source, np.arange(1)).mistake(judged, box)
        assert "data:image" in shown and ("in truth" in shown) == ("class" in name)
    painter = Painter(DrawnBoxes(1, unreadable=[0]), np.arange(1))
    assert "data:image" in painter.picture(judged, 0, 0.0, 0.5)
