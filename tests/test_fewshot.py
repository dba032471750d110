"""Episodes, their training against plain SGD, both modes, and the layouts of the benchmark's four sets."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from florence_jax.data.records import BadRecord
from florence_jax.data.sources.labelled import open_labelled
from florence_jax.errors import UserError
from florence_jax.evaluators.fewshot import EpisodeAnswers, EpisodeSampler, FewShot, flip_pair
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.solvers.adapt import Recipe, adapt_and_classify, embed_cached
from florence_jax.params.sharding import make_mesh

MESH = make_mesh(-1, 1)
LABELS = np.repeat(np.arange(7), [40, 9, 40, 40, 40, 40, 40])
QUICK = Recipe(epochs=6, batch=5, head_momentum=0.9)


def test_episodes_depend_on_seed_and_number_only():
    sampler = EpisodeSampler(LABELS, 5, 5, 15, seed=3)
    later = [sampler(i) for i in (7, 2, 0)]
    again = EpisodeSampler(LABELS, 5, 5, 15, seed=3)(2)
    for one, other in zip(later[1], again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(later[0].query, later[1].query)
    assert not np.array_equal(EpisodeSampler(LABELS, 5, 5, 15, seed=4)(2).query, again.query)


def test_episodes_are_disjoint_and_nested():
    few, many = (EpisodeSampler(LABELS, 5, shots, 15, seed=0) for shots in (5, 20))
    for number in range(20):
        one, other = few(number), many(number)
        rows = np.concatenate([other.support, other.query], axis=1)
        assert len(np.unique(rows)) == 5 * 35 and 1 not in other.classes  # class 1 is too small
        assert (LABELS[rows] == other.classes[:, None]).all()
        np.testing.assert_array_equal(one.query, other.query)
        np.testing.assert_array_equal(one.support, other.support[:, :5])
    drawn = np.bincount(np.concatenate([few(i).classes for i in range(300)]), minlength=7)
    assert drawn[1] == 0 and drawn[drawn > 0].min() > 0.75 * drawn.max()


def test_episodes_that_do_not_fit_are_an_error():
    with pytest.raises(UserError, match="6 classes have 35 images"):
        EpisodeSampler(LABELS, 7, 20, 15, 0)
    with pytest.raises(UserError, match="2 ways"):
        EpisodeSampler(LABELS, 1, 5, 15, 0)
    with pytest.raises(UserError, match="dropout"):
        Recipe(dropout=1.0)


def test_training_is_plain_sgd():
    rng = np.random.default_rng(0)
    support, query = (jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(2))
    recipe = Recipe(epochs=5, batch=6, head_rate=0.1, dropout=0.0)
    pairs = jnp.stack([support, support], axis=1)
    queries = jnp.stack([query, query * 0.5], axis=1)
    scores = adapt_and_classify(embed_cached, None, pairs, queries, jax.random.key(0), recipe, 3)
    weights, bias, target = np.zeros((4, 3)), np.zeros(3), np.eye(3)[[0, 0, 1, 1, 2, 2]]
    speed = [np.zeros_like(weights), np.zeros_like(bias)]
    for _ in range(5):
        logits = np.asarray(support) @ weights + bias
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        grads = np.asarray(support).T @ (p - target) / 6, (p - target).mean(0)
        speed = [0.99 * v + g for v, g in zip(speed, grads, strict=True)]
        weights, bias = weights - 0.1 * speed[0], bias - 0.1 * speed[1]
    np.testing.assert_allclose(scores, 0.75 * np.asarray(query) @ weights + bias, rtol=1e-3, atol=1e-5)


def test_the_last_batch_may_be_smaller_and_dropout_is_random():
    rng = np.random.default_rng(0)
    pairs, queries = (jnp.asarray(rng.normal(size=(6, 2, 4)), jnp.float32) for _ in range(2))

    recipe = Recipe(epochs=2, batch=4)
    run = jax.jit(lambda key: adapt_and_classify(embed_cached, None, pairs, queries, key, recipe, 3))
    scores = [np.asarray(run(jax.random.key(seed))) for seed in (0, 0, 1)]
    assert np.isfinite(scores[0]).all() and not np.allclose(scores[0], scores[2])
    np.testing.assert_array_equal(scores[0], scores[1])


def encode(params, batch):
    pixels = batch["image"].astype(jnp.float32).mean(-1).reshape(len(batch["image"]), -1) / 16
    return jnp.tanh(pixels @ params["kernel"])


@pytest.fixture(scope="module")
def params():
    return {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(64, 48)) / 16, jnp.float32)}


def few_shot(mode, lanes=0, recipe=QUICK, episodes=16, shots=(5,), **changes):
    embedder = Embedder({"image": flip_pair(encode)}, None, MESH, 600)
    return FewShot(
        "digits",
        open_labelled("digits"),
        "decode",
        embedder,
        encode,
        mode=mode,
        shots=shots,
        episodes=episodes,
        recipe=recipe,
        lanes=lanes,
        **changes,
    )


def test_digits_from_features(params):
    evaluator = few_shot("head", shots=(5, 20))
    results = evaluator.run(params)
    assert 0.6 < results["5shot_accuracy"] < results["20shot_accuracy"] < 1
    assert evaluator.chance == {"5shot_accuracy": 0.2, "20shot_accuracy": 0.2}
    page = evaluator.report()[0]
    assert "16 episodes of 5 classes" in page and "<polyline" in page and page.count("<img") == 25
    check_predictions(evaluator, results)
    assert few_shot("head", lanes=8).run(params)["5shot_accuracy"] == results["5shot_accuracy"]


def check_predictions(evaluator, results):
    """Every query of every episode has a line, from which the results follow."""
    rows = list(csv.DictReader(evaluator.files()["predictions.csv"].decode().splitlines()))
    assert list(rows[0]) == ["file", "label", "prediction", "score", "shots", "episode"]
    assert len(rows) == 2 * 16 * 75 and len({(row["shots"], row["episode"], row["file"]) for row in rows}) == len(rows)
    data = open_labelled("digits")
    label_of = {record["key"]: data.names[k] for record, k in zip(data.source.metadata(), data.labels, strict=True)}
    for shots in (5, 20):
        of = [row for row in rows if row["shots"] == str(shots)]
        right = np.mean([row["prediction"] == row["label"] for row in of])
        assert right == pytest.approx(results[f"{shots}shot_accuracy"])
        for number in (0, 15):
            episode = [row for row in of if row["episode"] == str(number)]
            classes = {row["label"] for row in episode}
            assert len(classes) == 5 and {row["prediction"] for row in episode} <= classes
    assert all(label_of[row["file"]] == row["label"] and 0.2 <= float(row["score"]) <= 1 for row in rows)


def test_interval_is_of_the_mean(params, monkeypatch):
    evaluator = few_shot("head")
    shares = np.linspace(0.5, 0.9, 16)
    monkeypatch.setattr(evaluator, "_ask", lambda *a: EpisodeAnswers(np.zeros((16, 5)), np.zeros((16, 5)), shares))
    results = evaluator.run(params)
    assert results["5shot_accuracy"] == pytest.approx(0.7)
    assert results["5shot_ci95"] == pytest.approx(1.96 * shares.std() / np.sqrt(16))


def test_backbone_mode_without_its_learning_rate_is_head_mode(params):
    frozen = Recipe(epochs=2, backbone_rate=0.0)
    head = few_shot("head", recipe=frozen, episodes=8).run(params)
    assert few_shot("backbone", recipe=frozen, episodes=8).run(params) == pytest.approx(head, abs=0.01)
    trained = few_shot("backbone", recipe=Recipe(epochs=2, backbone_rate=1e-3), episodes=8).run(params)
    assert 1e-3 < abs(trained["5shot_accuracy"] - head["5shot_accuracy"]) < 0.1


def test_backbones_side_by_side_are_those_one_by_one(params, monkeypatch, capsys):
    recipe = Recipe(epochs=1, backbone_rate=1e-3)
    alone = few_shot("backbone", lanes=8, recipe=recipe)  # one a device
    results = alone.run(params)
    together = few_shot("backbone", recipe=recipe, backbone=lambda params: {"kernel": params["kernel"]})
    assert together.run(params | {"unused": jnp.zeros(9)}) == pytest.approx(results, abs=0.003)
    speeds = [line for line in capsys.readouterr().out.splitlines() if "episodes/s" in line]
    assert "compilation" not in speeds[0] and speeds[1].endswith("img/s with compilation")
    assert together._choose_lanes(params) == 16  # as many as there are episodes
    monkeypatch.setattr("florence_jax.evaluators.fewshot.LANES_BYTES", 3 * params["kernel"].nbytes)
    assert together._choose_lanes(params) == 8 and together._choose_lanes(None) == 16


def test_mistakes_of_the_evaluator(params):
    for changes, message in (
        ({"mode": "all"}, "mode 'all'"),
        ({"mode": "head", "seed": -1}, "seed=-1"),
        ({"mode": "head", "lanes": -1}, "lanes=-1"),
    ):
        with pytest.raises(UserError, match=message):
            few_shot(**changes)
    embedder = Embedder({"image": flip_pair(encode)}, None, MESH, 8)
    with pytest.raises(UserError, match="'flip' is random"):
        FewShot("digits", open_labelled("digits"), "decode|flip", embedder)


# -- sets -------------------------------------------------------------------------------------------------------------


def picture(path, colour=(1, 2, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def test_isic(tmp_path):
    lines = ["image,MEL,NV,BCC,AKIEC,BKL,DF,VASC", "ISIC_1,0.0,1.0,0.0,0.0,0.0,0.0,0.0", "ISIC_2,1.0" + ",0.0" * 6]
    table = tmp_path / "ISIC2018_Task3_Training_GroundTruth" / "ISIC2018_Task3_Training_GroundTruth.csv"
    table.parent.mkdir()
    table.write_text("\n".join(lines) + "\n")
    for name in ("ISIC_1", "ISIC_2"):
        picture(tmp_path / "ISIC2018_Task3_Training_Input" / f"{name}.jpg")
    found = open_labelled(f"isic:{tmp_path}")
    assert found.labels.tolist() == [1, 0] and found.names[1] == "NV" and len(found.names) == 7
    assert found.source[0]["key"] == "ISIC_1.jpg" and len(found.source[1]["image"]) > 100
    table.write_text("\n".join([*lines, "ISIC_3" + ",1.0" * 7]))
    with pytest.raises(UserError, match="exactly one"):
        open_labelled(f"isic:{tmp_path}")


def test_eurosat_and_cropdisease(tmp_path):
    for name in ("River", "Forest"):
        picture(tmp_path / "2750" / name / f"{name}_1.jpg")
        picture(tmp_path / "plants" / "dataset" / "train" / f"Apple___{name}" / "a.JPG")
    found = open_labelled(f"eurosat:{tmp_path}")
    assert found.names == ("Forest", "River") and found.labels.tolist() == [0, 1]
    plants = open_labelled(f"cropdisease:{tmp_path / 'plants'}")
    assert plants.names == ("Apple___Forest", "Apple___River")
    assert len(plants.source[0]["image"]) > 100
    assert open_labelled(str(tmp_path / "2750")).names == found.names


def test_chestx_keeps_single_findings_of_the_benchmark(tmp_path):
    rows = ["Image Index,Finding Labels,Follow-up #", "a.png,Mass,0", "b.png,Mass|Nodule,0", "c.png,No Finding,0"]
    rows += ["d.png,Pneumonia,0", "e.png,Pneumothorax,1", "f.png,Hernia,0"]
    (tmp_path / "Data_Entry_2017.csv").write_text("\n".join(rows))
    picture(tmp_path / "images_001" / "images" / "a.png")
    (tmp_path / "images_001.tar.gz").write_bytes(b"the archive it comes from")
    with pytest.raises(UserError, match="1 of 2 images are missing, the first: e.png"):
        open_labelled(f"chestx:{tmp_path}")
    picture(tmp_path / "images_002" / "images" / "e.png")
    found = open_labelled(f"chestx:{tmp_path}")
    assert [found.names[k] for k in found.labels] == ["Mass", "Pneumothorax"]
    assert found.source[1]["image"][:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("spec", "message"),
    [("isic:{}", "no file"), ("eurosat:{}", "no sub-folders"), ("chestx:{}", "no file"), ("nothing", "does not exist")],
)
def test_missing_sets_are_one_message(tmp_path, spec, message):
    with pytest.raises(UserError, match=message):
        open_labelled(spec.format(tmp_path))


def test_emoji_and_digits():
    found = open_labelled("emoji:new_names")
    assert len(found.names) == 8 and len(found.labels) == 217
    part = open_labelled("digits:test")
    assert len(part.labels) == 797 and part.source[3]["image"].max() == 255
    assert open_labelled("digits").labels[1000:].tolist() == part.labels.tolist()
    with pytest.raises(UserError, match="digits:val"):
        open_labelled("digits:val")
    assert not any(isinstance(row, BadRecord) for row in part.source.__getitems__([0, 1]))
