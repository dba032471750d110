"""Logistic regression against scikit-learn's, CLIP's search, the probe of a data set, and its benchmark."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression as Theirs

from florence_jax.data.records import ArraySource
from florence_jax.data.sources.labelled import Labelled, open_labelled
from florence_jax.errors import UserError
from florence_jax.evaluators.metrics import roc_auc, softmax
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.probe import LinearProbe, grid_c, judged, search_c, split_validation
from florence_jax.evaluators.solvers.logistic import Fits, LogisticRegression, objective, sklearn_weights
from florence_jax.params.sharding import make_mesh
from florence_jax.tools.bench import __main__ as bench

CS = [1e2, 1e-6, 1e-2, 1.0]
MESH = make_mesh(-1, 1)
ALONE = make_mesh(1, 1, jax.devices()[:1])


def clusters(classes, count=403, size=12, spread=1.0):
    """Overlapping clusters with unequal scales and a common offset, as features have."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    scale = 3.0 / np.arange(1, size + 1)
    features = (rng.normal(size=(classes, size))[labels] + spread * rng.normal(size=(count, size))) * scale + 5
    return features.astype(np.float32), labels.astype(np.int32)


@pytest.fixture(scope="module")
def data():
    return clusters(5)


@pytest.fixture(scope="module")
def fits(data):
    return LogisticRegression(*data, 5, MESH).fit(CS)


def check_against_sklearn(fits, features, labels):
    for row, c in enumerate(fits.cs):
        theirs = Theirs(C=c, tol=1e-9, solver="newton-cholesky").fit(features.astype(np.float64), labels)
        wanted = objective(features, labels, *sklearn_weights(theirs), c)
        ours = objective(features, labels, fits.weights[row], fits.bias[row], c)
        assert ours == pytest.approx(wanted, rel=5e-5)
        assert fits.objective[row] == pytest.approx(wanted, rel=5e-5)
        assert abs((fits.scores(row, features).argmax(1) == labels).mean() - theirs.score(features, labels)) < 0.003


def test_matches_sklearn(data, fits):
    assert fits.converged.all() and list(fits.cs) == CS and fits.iterations.max() < 100
    check_against_sklearn(fits, *data)


def test_matches_sklearn_on_two_classes():
    features, labels = clusters(2)
    check_against_sklearn(LogisticRegression(features, labels, 2, ALONE).fit([1e-3, 1.0]), features, labels)


def test_lanes_and_devices_do_not_change_the_minimum(data, fits):
    for mesh, lanes in ((ALONE, 1), (MESH, 3)):
        other = LogisticRegression(*data, 5, mesh, lanes=lanes).fit(CS)
        np.testing.assert_allclose(other.objective, fits.objective, rtol=5e-5)
        np.testing.assert_allclose(other.scores(2, data[0]), fits.scores(2, data[0]), atol=0.02)


def test_bfloat16_features_keep_float32_weights(data, fits):
    rounded = LogisticRegression(*data, 5, MESH, dtype="bfloat16").fit([1.0, 1e-2])
    assert rounded.converged.all()
    np.testing.assert_allclose(rounded.objective, fits.objective[[3, 2]], rtol=2e-3)


def test_warm_start_saves_iterations_and_hardly_matters(data, fits):
    regression = LogisticRegression(*data, 5, MESH)
    cold, warm = regression.fit([1.0]), regression.fit([1.0], start=fits)
    assert warm.iterations[0] <= 2 < cold.iterations[0]
    far = fits._replace(weights=fits.weights * 0 + 40, bias=fits.bias * 100)
    far.weights[:, 0] = -50
    recovered = regression.fit([1.0], start=far)
    for found in (cold, warm, recovered):
        assert found.objective[0] == pytest.approx(fits.objective[3], rel=5e-5)


def test_separable_and_degenerate_features():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(3), 4).astype(np.int32)
    features = np.eye(3, 40, dtype=np.float32)[labels] * 1e3  # 37 constant columns, more columns than rows
    features[:, 3] = rng.normal(size=12) * 1e-4
    found = LogisticRegression(features, labels, 3, ALONE).fit([1e-3, 1e4])
    for row in (0, 1):
        assert np.isfinite(found.weights).all() and (found.scores(row, features).argmax(1) == labels).all()
    # A class that never occurs must not stop the others.
    absent = LogisticRegression(features, labels, 4, ALONE).fit([1.0])
    assert np.isfinite(absent.objective).all() and (absent.scores(0, features).argmax(1) == labels).all()


def test_iteration_limit_is_reported(data):
    found = LogisticRegression(*data, 5, MESH).fit([1e2], max_iterations=2)
    assert found.iterations[0] == 2 and not found.converged[0]


def test_mistakes_of_the_regression(data):
    features, labels = data
    for arguments, message in (
        ((features, labels, 4), "labels from 0 to 3"),
        ((features[:5], labels, 5), "N labels"),
        ((features * np.inf, labels, 5), "not finite"),
        ((features, labels, 5, "int8"), "dtype"),
    ):
        with pytest.raises(UserError, match=message):
            LogisticRegression(*arguments[:3], MESH, *arguments[3:])
    with pytest.raises(UserError, match="positive"):
        LogisticRegression(features, labels, 5, MESH).fit([0.0])


def test_search_halves_the_distance_to_the_peak():
    asked = []

    def judge(cs):
        asked.append([round(8 * (np.log10(c) + 6)) for c in cs])
        return [np.array([-abs(i - 43.0)]) for i in asked[-1]]

    c, tried = search_c(judge)
    assert asked[0] == [0, 16, 32, 48, 64, 80, 96] and asked[1] == [40, 56] and len(asked) == 5
    assert c == grid_c(43) and len(tried) == 15 and list(tried) == sorted(tried)


def test_search_prefers_stronger_penalties_and_stays_on_the_grid():
    c, tried = search_c(lambda cs: [np.array([0.5])] * len(cs))
    assert c == pytest.approx(1e-6) and min(tried) == c
    c, tried = search_c(lambda cs: [np.array([np.log(value)]) for value in cs])
    assert c == pytest.approx(1e6) and max(tried) == c


def test_search_takes_the_smallest_that_the_images_cannot_tell_from_the_best():
    right = np.arange(100) < 88

    def judge(cs, gained=3, lost=2):  # the best, at 100, has three images right that others have not, and two wrong
        best = right ^ (np.arange(100) >= 100 - gained) ^ (np.arange(100) < lost)
        kinds = [best if 90 < c < 200 else right if c > 0.05 else right & (np.arange(100) < 50) for c in cs]
        return [kind.astype(np.float64) for kind in kinds]

    assert search_c(judge)[0] == pytest.approx(1.0)  # the smallest tried of those
    assert search_c(lambda cs: judge(cs, gained=6, lost=0))[0] == pytest.approx(100.0)
    assert search_c(judge)[1][grid_c(64)] == pytest.approx(0.89)


def test_of_few_images_c_is_chosen_by_cross_entropy():
    """By what is right of four held-out images the smallest C would be as good, whose answers are all 1/4."""
    digits = open_labelled("digits:train")
    rows = np.concatenate([np.flatnonzero(digits.labels == k)[:5] for k in range(4)])
    images = np.stack([digits.source[int(i)]["image"] for i in rows])
    data = Labelled(ArraySource("few", images, ["-"] * 20), digits.labels[rows], digits.names[:4])
    probe = LinearProbe("few", data, data, "decode", Embedder({"image": pixels}, None, ALONE, 20))
    found = probe.fit(16.0)
    c = found.chosen.cs[0]
    assert found.tried[1e-6] == found.tried[c] == 1.0
    assert 2 * found.entropies[c] < found.entropies[1e-6] == pytest.approx(np.log(4), abs=0.1)
    features = images.reshape(20, -1).astype(np.float32) / 16
    sure = softmax(found.final.scores(0, features))
    assert (sure.argmax(1) == data.labels).all() and sure.max(1).mean() > 0.6


def test_hold_out_is_stratified_and_repeatable():
    labels = np.array([0] * 10 + [1] * 5 + [2])
    rest, held = split_validation(labels, 0.2, 3)
    assert np.bincount(labels[held], minlength=3).tolist() == [2, 1, 0]
    assert sorted([*rest, *held]) == list(range(16))
    assert np.array_equal(split_validation(labels, 0.2, 3)[1], held) and not np.array_equal(
        split_validation(labels, 0.2, 4)[1], held
    )
    for share, message in ((0.0, "between"), (0.01, "holds none out")):
        with pytest.raises(UserError, match=message):
            split_validation(labels, share, 0)


def test_what_c_is_chosen_by():
    scores, labels = np.eye(3)[[0, 0, 0, 0, 2]], np.array([0, 0, 0, 2, 2])
    assert judged("top1", scores, labels).tolist() == [1, 1, 1, 0, 1]
    assert judged("mean_per_class", scores, labels).mean() == pytest.approx(0.75)
    assert judged("voc_map", np.eye(2), np.eye(2, dtype=np.int8)).mean() == 1.0
    rng = np.random.default_rng(0)
    for share in (0.3, 0.7):
        labels = (rng.random(50) < share).astype(np.int64)
        scores = np.stack([np.zeros(50), labels + rng.normal(size=50).round(1)], axis=1)
        values = judged("roc_auc", scores, labels)
        assert len(values) == min(labels.sum(), 50 - labels.sum())
        assert values.mean() == pytest.approx(roc_auc(scores[:, 1], labels == 1))


def several(count=300):
    """Features and labels of four classes that occur together; one label in ten is not judged."""
    rng = np.random.default_rng(0)
    labels = (rng.random((count, 4)) < [0.5, 0.3, 0.2, 0.1]).astype(np.int8)
    features = labels @ rng.normal(size=(4, 10)) + rng.normal(size=(count, 10)) + 2
    labels[rng.random(labels.shape) < 0.1] = -1
    return features.astype(np.float32), labels


def test_several_classes_an_example_are_a_regression_each():
    features, labels = several()
    fits = LogisticRegression(features, labels, 4, ALONE).fit([1e-2, 1.0, 1e2])
    assert fits.converged.all()
    for row, c in enumerate(fits.cs):
        total = 0.0
        for k in range(4):
            judged = labels[:, k] >= 0
            data = features[judged].astype(np.float64), labels[judged, k]
            theirs = Theirs(C=c, tol=1e-9, solver="newton-cholesky").fit(*data)
            np.testing.assert_allclose(fits.weights[row][:, k], theirs.coef_[0], atol=0.02)
            total += objective(*data, *sklearn_weights(theirs), c)
        assert fits.objective[row] == pytest.approx(total, rel=5e-5)
    with pytest.raises(UserError, match=r"\(N, 3\) labels of 1, 0 and -1"):
        LogisticRegression(features, labels, 3, ALONE)


def pixels(params, batch):
    return batch["image"].astype(jnp.float32).mean(-1).reshape(len(batch["image"]), -1) / params


def by_rows(split, rows):
    source = split.source
    captions = [row["caption"] for row in source.metadata()][rows]
    images = np.stack([source[i]["image"] for i in range(len(source))[rows]])
    return Labelled(ArraySource("part", images, captions), split.labels[rows], split.names)


def test_probe_of_the_digits():
    train, test = by_rows(open_labelled("digits:train"), slice(300)), open_labelled("digits:test")
    probe = LinearProbe("digits", train, test, "decode", Embedder({"image": pixels}, None, ALONE, 400))
    results = probe.run(16.0)
    assert results["images"] == 797 and probe.chance["top1"] == 0.1
    features = [np.stack([s.source[i]["image"].ravel() / 16 for i in range(len(s.labels))]) for s in (train, test)]
    theirs = Theirs(C=10 ** results["log10_c"], tol=1e-8, solver="newton-cholesky").fit(features[0], train.labels)
    assert results["top1"] == pytest.approx(theirs.score(features[1], test.labels), abs=0.0026)
    assert results["top1"] > 0.8 and results["validation_top1"] > 0.85
    page = "".join(probe.report())
    assert "polyline" in page and "digits: confusion" in page and "near chance" not in page


def test_probe_of_several_classes_an_image(tmp_path):
    features, labels = several()
    low, high = features.min(), features.max()
    images = np.round((features - low) / (high - low) * 255).astype(np.uint8)[:, None]
    names = tuple("abcd")
    train, test = (
        Labelled(ArraySource("many", images[rows], ["-"] * len(images[rows])), labels[rows], names)
        for rows in (slice(200), slice(200, None))
    )
    embedder = Embedder({"image": pixels}, None, ALONE, 200)
    probe = LinearProbe("many", train, test, "decode", embedder, metric="voc_map")
    results = probe.run(64.0)
    assert results["voc_map"] > 0.75 > probe.chance["voc_map"] > 0.2 and results["images"] == 100
    assert results["validation_voc_map"] > 0.7 and "AP" in "".join(probe.report())
    with pytest.raises(UserError, match="one class an image"):
        LinearProbe("many", train, test, "decode", embedder, metric="voc_map", compare=True)


def test_probe_with_a_validation_split(monkeypatch):
    train, test = by_rows(open_labelled("digits:train"), slice(100)), by_rows(open_labelled("digits:test"), slice(100))
    embedder = Embedder({"image": pixels}, None, ALONE, 100)
    probe = LinearProbe("d", train, test, "decode", embedder, validation=test, compare=True)
    monkeypatch.setattr("florence_jax.evaluators.probe.search_c", lambda judge: (1.0, {1.0: judge([1.0])[0].mean()}))
    results = probe.run(16.0)
    # The last fit has seen the split that C was chosen on.
    assert results["top1"] > results["validation_top1"] > 0.5 and results["log10_c"] == 0
    assert results["sklearn_top1"] == pytest.approx(results["top1"], abs=0.011)
    assert abs(results["sklearn_objective_diff"]) < 1e-4 and probe.chance["sklearn_top1"] == 0.1
    with pytest.raises(UserError, match="different classes"):
        LinearProbe("d", train, open_labelled("emoji:new_names"), "decode", embedder)


def test_join_and_take(fits):
    again = Fits.join([fits.take(np.array([1])), fits.take(np.array([0, 2]))])
    assert again.cs.tolist() == [CS[1], CS[0], CS[2]] and again.weights.shape == (3, 12, 5)


def test_bench_prints_one_line(capsys):
    arguments = "probe --examples 400 --test 200 --dimensions 16 --classes 4 --cs 1e-2,1 --separation 0.5"
    assert bench.main(arguments.split()) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result["objective_diff"] < 1e-4 and result["accuracy_diff"] <= 1.0
    assert result["speedup"] == pytest.approx(result["sklearn_seconds"] / result["seconds"], rel=0.01)
    assert len(result["objective_diff_default"]) == 2 and result["seconds_again"] > 0
    assert bench.main(["probe", "--cs", "1,-2"]) == 2


def test_a_probe_beside_another_evaluator_writes_a_file_of_its_own():
    """`all_files` refuses two of one name."""
    probe = object.__new__(LinearProbe)
    probe._metrics = SimpleNamespace(files=lambda: {"predictions.csv": b"file"})
    for name, file in (("probe", "predictions.csv"), ("test_frames", "test_frames_predictions.csv")):
        probe.name = name
        assert probe.files() == {file: b"file"}
