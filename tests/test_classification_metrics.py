"""Metrics of classification against their definitions and scikit-learn's, warnings, predictions.csv."""

import csv
import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss, precision_recall_fscore_support, roc_auc_score

from florence_jax.data.records import ArraySource
from florence_jax.evaluators.classification import ClassificationMetrics
from florence_jax.evaluators.classification_report import confusion_html
from florence_jax.evaluators.metrics import (
    answers,
    confusion_matrix,
    log_likelihoods,
    mean_per_class,
    roc_auc,
    sigmoid,
    softmax,
    two_classes,
    voc_average_precision,
)


def test_answers_are_the_definition_with_ties_against_the_right_class():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 4, (50, 7)).astype(np.float32), rng.integers(0, 7, 50)
    given = answers(itertools.chain([scores[:20]], [scores[20:]]), labels)
    for score, label, rank, top in zip(scores, labels, given.ranks, given.top, strict=True):
        order = sorted(range(7), key=lambda k, s=score, y=label: (-s[k], k == y, k))
        assert order.index(label) == rank and order[:5] == top.tolist()
    alike = answers([np.zeros((3, 4), np.float32)], np.array([0, 1, 3]))
    assert alike.ranks.tolist() == [3, 3, 3] and (alike.top[:, 0] != [0, 1, 3]).all()


def test_mean_per_class_leaves_out_classes_without_images():
    confusion = confusion_matrix(np.array([0, 0, 0, 2]), np.array([0, 0, 1, 1]), 3)
    assert confusion.tolist() == [[2, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert mean_per_class(confusion) == pytest.approx((2 / 3 + 0) / 2)


def test_voc_average_precision_by_hand():
    # Ranks of the positives 1 and 3 of 4: precision 1 up to recall 0.5, then 2/3: (6 * 1 + 5 * 2 / 3) / 11.
    scores, targets = np.array([0.9, 0.8, 0.7, 0.1]), np.array([1, 0, 1, 0])
    assert voc_average_precision(scores, targets) == pytest.approx((6 + 5 * 2 / 3) / 11)
    unsure = np.array([1, -1, 1, 0])  # the second is not judged
    assert voc_average_precision(scores, unsure) == 1.0
    for order in itertools.permutations(range(4)):  # equal scores: the order of the images says nothing
        assert voc_average_precision(np.ones(4), targets[list(order)]) == pytest.approx(0.5)
    assert math.isnan(voc_average_precision(scores, np.zeros(4)))


def test_roc_auc_is_the_chance_of_the_right_order():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    assert roc_auc(scores, positive) == pytest.approx(np.mean(pairs))
    assert math.isnan(roc_auc(scores, np.ones(40, bool)))


def test_two_classes_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    for few in (True, False):  # few distinct scores, so that many are equal
        scores = rng.integers(0, 8, 60) / 8 if few else rng.random(60)
        positive, called = rng.random(60) < 0.3, scores > 0.4
        found = two_classes(scores, positive, called)
        precision, recall, f1, _ = precision_recall_fscore_support(positive, called, average="binary")
        assert found[:3] == pytest.approx((precision, recall, f1))
        f1_at = [f1_score(positive, scores >= threshold) for threshold in np.unique(scores)]
        assert found.best_f1 == pytest.approx(max(f1_at))
        assert f1_score(positive, scores >= found.best_threshold) == pytest.approx(max(f1_at))
        assert roc_auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    none = two_classes(scores, np.zeros(60, bool), np.zeros(60, bool))
    assert none[:3] == (0, 0, 0) and math.isnan(none.best_f1)


def test_probabilities():
    scores = np.random.default_rng(0).normal(size=(4, 3)) * 5
    np.testing.assert_allclose(softmax(scores), np.exp(scores) / np.exp(scores).sum(1, keepdims=True))
    np.testing.assert_allclose(sigmoid(scores), 1 / (1 + np.exp(-scores)))
    assert sigmoid(np.array([-1e4, 1e4])).tolist() == [0, 1]  # without a warning


def test_log_likelihoods_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores, labels = (2 * rng.normal(size=(20, 3))).astype(np.float32), rng.integers(0, 3, 20)
    each = [-log_loss([k], softmax(row)[None], labels=[0, 1, 2]) for row, k in zip(scores, labels, strict=True)]
    np.testing.assert_allclose(log_likelihoods(scores, labels), each, rtol=1e-4)
    assert log_likelihoods(scores * 1e4, scores.argmin(1)).max() < -1e3  # where the probability is 0
    several = np.array([[1, 0, -1], [-1, -1, -1], [0, 0, 1]], np.int8)
    found = log_likelihoods(scores[:3], several)
    p = sigmoid(scores[:3].astype(np.float64))
    by_hand = [np.log(p[0, 0] * (1 - p[0, 1])) / 2, np.log((1 - p[2, 0]) * (1 - p[2, 1]) * p[2, 2]) / 3]
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)


def test_several_classes_an_image_are_shown_with_their_scores():
    """Six images, of which the first is told best, the second worst; of the last nothing is judged."""
    names = [f"class {k}" for k in range(7)]
    labels = np.zeros((6, 7), np.int8)
    labels[range(5), [0, 1, 2, 3, 4]] = 1
    labels[0, 1], labels[3, 6], labels[5] = 1, -1, -1
    scores = np.where(labels > 0, 1.0, -1.0) + 0.01 * np.arange(7)[None]
    scores[0, :2], scores[1] = 4, np.arange(7.0)[::-1]
    scores[1, 1] = -5
    scores[3, 6] = 3
    source = ArraySource("x", np.zeros((6, 4, 4, 3), np.uint8), ["-"] * 6)
    metrics = ClassificationMetrics("many", source, names, "voc_map", multi=True)
    metrics([scores], labels, np.arange(6), [f"{i}.jpg" for i in range(6)])
    page = "".join(metrics.report)
    best, worst, others = (page.index(f"many: {what}") for what in ("told best", "told worst", "random images"))
    assert page.index("many: classes") < best < worst < others and page.count("<img") == 6
    first, last = page[best:worst], page[worst:others]
    assert first.index("class 0, class 1") < first.index('cell right"><div>class 0</div><div class="soft">0.98')
    assert last.index('cell query"><img') < last.index("<div>class 1</div>") < last.index('cell wrong"><div>class 0<')
    # The class that is there stands behind the five of the highest scores.
    assert 'cell right"><div>class 1</div><div class="soft">0.01' in last
    assert "0.95, not judged" in page and "<div>none</div>" in page[others:]


def test_confusion_of_many_classes_is_a_picture():
    few, many = confusion_html("few", np.eye(3, dtype=int), list("abc")), np.eye(30, dtype=int)
    many[4, 5] = 7
    text = confusion_html("many", many, [f"<{i}>" for i in range(30)])
    assert "<img" not in few and "data:image/png" in text and "&lt;4&gt; called &lt;5&gt;: 7 of 8" in text


def yes_no(yes, wrong):
    """Metrics of 100 images, `yes` of them yes (drawn by chance), of which `wrong` of either class are called wrong."""
    source = ArraySource("x", np.zeros((100, 4, 4, 3), np.uint8), ["-"] * 100)
    labels = (np.random.default_rng(0).permutation(100) < yes).astype(int)
    called = labels.copy()
    for k in (0, 1):
        called[np.flatnonzero(labels == k)[:wrong]] = 1 - k
    keys = [f"{i:02d}, \udcff.jpg" for i in range(100)]  # a name that is not UTF-8
    metrics = ClassificationMetrics("zs", source, ["no", "yes"], "top1")
    results = metrics([np.eye(2)[called[:60]] * 3, np.eye(2)[called[60:]] * 3], labels, np.arange(100), keys)
    return metrics, results, labels, called


def test_classes_out_of_balance_are_compared_with_the_larger_one(caplog):
    metrics, results, _, _ = yes_no(31, 14)  # .72 is no better than the .69 of "no" alone
    assert results["top1"] == pytest.approx(0.72) and results["majority_share"] == pytest.approx(0.69)
    assert "zs: top1 0.720 is near or below what always answering with the largest class scores (0.690)" in caplog.text
    assert "largest class" in metrics.report[0] and metrics.chance["top1"] == 0.5
    assert list(results)[:2] == ["top1", "majority_share"] and "largest class" not in "".join(yes_no(31, 1)[0].report)
    assert "majority_share" not in yes_no(48, 14)[1]  # as two drawn by chance are


@pytest.mark.parametrize("count,said", [(4, "too few images to tell any result from chance (0.500)"), (40, "")])
def test_of_too_few_images_no_result_is_told_from_chance(count, said):
    source, labels = ArraySource("x", np.zeros((count, 4, 4, 3), np.uint8), ["-"] * count), np.arange(count) % 2
    metrics = ClassificationMetrics("zs", source, ["a", "b"], "top1")
    assert metrics([np.eye(2)[labels]], labels, np.arange(count), map(str, labels))["top1"] == 1.0
    assert ("zs: top1 1.000: these are " + said in metrics.report[0]) == bool(said)


def test_two_classes_have_precision_recall_and_a_threshold():
    metrics, results, labels, called = yes_no(31, 5)
    wanted = precision_recall_fscore_support(labels, called, average="binary")[:3]
    assert (results["precision"], results["recall"], results["f1"]) == pytest.approx(wanted)
    assert results["roc_auc"] == pytest.approx(roc_auc_score(labels, called))
    assert results["best_f1"] == pytest.approx(wanted[2])
    assert results["best_threshold"] == pytest.approx(sigmoid(np.array(3.0)))
    assert metrics.chance["precision"] == pytest.approx(0.31) and metrics.chance["roc_auc"] == 0.5
    assert metrics.chance["best_f1"] == pytest.approx(f1_score(labels, np.ones(100)))
    assert "are of <b>yes</b>" in "".join(metrics.report)


def test_predictions_are_a_line_for_each_image():
    metrics, _, labels, called = yes_no(31, 5)
    text = metrics.files()["predictions.csv"].decode("utf-8", "surrogateescape")
    rows = list(csv.DictReader(text.splitlines()))
    names = ["no", "yes"]
    assert [row["file"] for row in rows] == [f"{i:02d}, \udcff.jpg" for i in range(100)]
    assert [row["label"] for row in rows] == [names[k] for k in labels]
    assert [row["prediction"] for row in rows] == [names[k] for k in called]
    assert {row["score"] for row in rows} == {f"{sigmoid(np.array(3.0)):.6f}"}
