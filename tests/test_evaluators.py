"""Embedding over devices, zero-shot classes, the evaluators on known embeddings, and the report."""

import base64
import io
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from florence_jax.data.buckets import make_buckets
from florence_jax.data.records import ArraySource, BadRecord, BaseSource, record_thumbnail, without_payloads
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.folder import FolderSource
from florence_jax.data.tokenizers import load_tokenizer
from florence_jax.errors import UserError
from florence_jax.evaluators.base import chance_levels, evaluate
from florence_jax.evaluators.emoji import EmojiSplit
from florence_jax.evaluators.predictor import Embedder, Predictor
from florence_jax.evaluators.retrieval import Retrieval
from florence_jax.evaluators.zero_shot import class_embeddings
from florence_jax.page import curve
from florence_jax.params.sharding import make_mesh
from florence_jax.train.report import results_table, write_report

TOKENIZER = load_tokenizer("sentencepiece", 16)
OPS = "decode|resize(8)|center_crop(8)"


def predict_image(params, batch):
    pixels = batch["image"].astype(jnp.float32).reshape(len(batch["image"]), -1)
    pixels = pixels @ params
    return pixels / jnp.linalg.norm(pixels, axis=1, keepdims=True)


def predict_text(params, batch):
    ids = batch["text"].astype(jnp.float32) @ params[:16]
    return ids / jnp.maximum(jnp.linalg.norm(ids, axis=1, keepdims=True), 1e-9)


PREDICT = {"image": predict_image, "text": predict_text}
PARAMS = jnp.asarray(np.random.default_rng(0).normal(size=(192, 12)), jnp.float32)


def embedder(batch_size, mesh=None):
    return Embedder(PREDICT, TOKENIZER, mesh or make_mesh(-1, 1), batch_size)


def test_embedding_covers_every_record_whatever_the_batch():
    source = open_source("emoji:new_names")
    whole = embedder(256).images(PARAMS, source, f"{OPS}|keep(image)")
    parts = embedder(24).images(PARAMS, source, f"{OPS}|keep(image)")
    assert len(whole["embedding"]) == len(source) == 217
    np.testing.assert_array_equal(parts["index"], np.arange(217))
    np.testing.assert_allclose(parts["embedding"], whole["embedding"], atol=1e-6)
    texts = [f"{i} spiders" for i in range(19)]
    np.testing.assert_allclose(embedder(8).texts(PARAMS, texts), embedder(32).texts(PARAMS, texts), atol=1e-6)


class Shapes(BaseSource):
    """Pictures of three shapes, each of one grey; record 5 cannot be read."""

    name = "shapes"

    def __len__(self):
        return 21

    def __getitem__(self, index):
        if index == 5:
            raise BadRecord("r5", "broken")
        return self._row(index)

    def _row(self, index):
        h, w = ((4, 8), (8, 4), (6, 6))[index * index % 7 % 3]
        image = np.full((h, w, 3), index, np.uint8)
        return {"key": f"r{index}", "image": image, "height": h, "width": w, "words": ["w"] * (index % 3)}

    def metadata(self):
        return (without_payloads(self._row(i)) for i in range(21))


@pytest.mark.parametrize("sizes", [(), [(4, 8), (8, 4), (6, 6)]])
def test_predictor_gives_each_row_in_order_with_its_host_fields(sizes):
    traced = []

    def predict(params, batch):
        traced.append(batch["image"].shape)
        return {"mean": batch["image"].mean((1, 2, 3)) * params, "rows": batch["image"][:, 0, :, 0]}

    source = Shapes()
    size = "{height}, {width}" if sizes else "6"
    ops = f"decode|resize_exact({size})|keep(image, key, words)"
    buckets = make_buckets([source], sizes) if sizes else ()
    predictor = Predictor(predict, make_mesh(-1, 1), 5)
    assert predictor.batch_size == 8
    options = {"host": ("key", "words"), "buckets": buckets}
    with pytest.raises(UserError, match="record 'r5': broken"):
        list(predictor.rows(2.0, source, ops, {}, **options))
    for _ in range(2):
        rows = list(predictor.rows(2.0, source, ops, {}, on_corrupt="skip", **options))
    assert [row["index"] for row in rows] == [i for i in range(21) if i != 5]
    for row in rows:
        i = row["index"]
        assert (row["key"], row["words"]) == (f"r{i}", ["w"] * (i % 3)) and row["mean"] == 2 * i
        assert row["rows"].tolist() == [i] * (source._row(i)["width"] if sizes else 6)
    assert sorted(set(traced)) == sorted(traced)  # one compilation for each shape
    assert len(traced) == max(len(sizes), 1)


def test_a_prediction_cannot_take_the_names_of_the_rows():
    predictor = Predictor(lambda params, batch: {"index": batch["image"]}, make_mesh(-1, 1), 8)
    with pytest.raises(ValueError, match="cannot be named 'index'"):
        next(iter(predictor.rows(None, Shapes(), "decode|resize_exact(6)|keep(image)", {}, on_corrupt="skip")))


def test_embeddings_of_broken_weights_are_an_error():
    """Every rank among numbers that are not finite would be the best one."""
    broken = PARAMS.at[0, 0].set(jnp.nan)
    with pytest.raises(UserError, match="new_names: 217 of 217 images have embeddings that are not finite"):
        evaluate([EmojiSplit("new_names", OPS, embedder(256))], broken)
    with pytest.raises(UserError, match="captions: 3 of 3 texts have embeddings that are not finite"):
        embedder(8).texts(broken, ["cat", "dog", "bird"], "captions")


def test_class_embeddings_are_means_of_unit_prompts_made_unit():
    made = class_embeddings(embedder(8), PARAMS, ["cat", "dog, hot"], ("{}.", "a photo of {}"))
    prompts = ["cat.", "a photo of cat", "dog hot.", "a photo of dog hot"]
    mean = embedder(8).texts(PARAMS, prompts).reshape(2, 2, -1).mean(1)
    np.testing.assert_allclose(made, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-5)


def test_synonyms_are_further_prompts_of_their_class():
    made = class_embeddings(embedder(8), PARAMS, [("sofa", "couch", "settee"), "cat"], ("{}.", "a photo of {}"))
    prompts = ["sofa.", "a photo of sofa", "couch.", "a photo of couch", "settee.", "a photo of settee"]
    means = [embedder(8).texts(PARAMS, texts).mean(0) for texts in (prompts, ["cat.", "a photo of cat"])]
    np.testing.assert_allclose(made, [mean / np.linalg.norm(mean) for mean in means], rtol=1e-5)
    with pytest.raises(UserError, match="without a name"):
        class_embeddings(embedder(8), PARAMS, ["cat", ()], ("{}.",))


@pytest.fixture(scope="module")
def emoji():
    return EmojiSplit("new_names", OPS, embedder(256))


def test_emoji_split_of_a_perfect_model_is_perfect(emoji, monkeypatch):
    one_hot = np.eye(len(emoji._names), dtype=np.float32)
    monkeypatch.setattr(emoji._embedder, "images", lambda *a: {"embedding": one_hot[emoji._name_ids]})

    def texts(params, prompts, what):
        del params
        names = emoji._names if "names" in what or len(prompts) > 1000 else None
        if names is None:  # groups: the sum of their names
            groups = np.stack([one_hot[emoji._name_ids[emoji._group_ids == g]].sum(0) for g in range(8)])
            return np.repeat(groups, len(prompts) // 8, axis=0)
        return np.repeat(one_hot, len(prompts) // len(names), axis=0)

    monkeypatch.setattr(emoji._embedder, "texts", texts)
    results = emoji.run(PARAMS)
    assert {name: value for name, value in results.items() if value != 1.0} == {}
    assert set(results) == set(emoji.chance)
    assert emoji.chance["group_top1"] == 0.125 and abs(emoji.chance["name_r@10"] - 10 / 217) < 1e-9


def test_emoji_split_of_a_random_model_is_near_chance(emoji):
    results = evaluate([emoji], PARAMS)
    assert results["eval/new_names/name_r@10"] < 0.15
    (grid,) = emoji.report()
    assert grid.count("data:image/webp") > 50 and "cell right" not in grid.split("image to text")[0]


def test_candidates_of_new_style_are_all_names():
    assert len(EmojiSplit("new_style", OPS, embedder(256))._names) == 1636


def test_retrieval_leaves_unreadable_images_out(tmp_path):
    rows = []
    for i, caption in enumerate(["Red", "green", "red", "blue"]):
        name = f"{i}.png"
        if i != 3:
            Image.new("RGB", (9, 9), caption.lower()).save(tmp_path / name)
        rows.append({"key": name, "caption": caption})
    evaluator = Retrieval("held_out", FolderSource(str(tmp_path), rows), OPS, embedder(8))
    results = evaluate([evaluator], PARAMS)
    assert results["eval/held_out/images"] == 3
    assert results["eval/held_out/i2t_r@5"] == 1.0  # two captions are left, "red" and "green"
    assert chance_levels([evaluator])["eval/held_out/i2t_r@1"] == 0.5
    assert "image to text" in evaluator.report()[0]


def test_report_is_one_page_without_outside_references(tmp_path, emoji):
    history = [{"step": s, "train/loss": 3.0 / s, "train/floor": 0.1} for s in (1, 2, 3)] + [{"step": 3, "eval/x": 1.0}]
    write_report(
        tmp_path / "report.html",
        title="a <run>",
        facts={"weights": "<w>", "data": "mine", "tested on": "held_out", "nothing": ""},
        config={"seed": 0},
        history=history,
        charts=[],
        results={"eval/x": 0.25},
        chance={"eval/x": 0.125},
        fragments=["<p>pictures</p>"],
    )
    text = (tmp_path / "report.html").read_text()
    assert (
        "a &lt;run&gt;" in text
        and "polyline" in text
        and "0.250" in text
        and "0.125" in text
        and "&quot;seed&quot;: 0" in text
        and "<p>weights: &lt;w&gt;; data: mine; tested on: held_out</p>" in text
    )
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["report.html"]'


def test_curve_skips_what_is_not_finite():
    line = curve("loss", [1, 2, 3], {"a": [1.0, float("nan"), 2.0], "b": [None, 1.5, 1.0]})
    assert [len(points.split()) for points in re.findall(r'points="([^"]*)"', line)] == [2, 2]
    assert curve("empty", [1, 2], {"a": [None, None]}) == ""
    assert "nothing" not in curve("loss", [1, 2], {"a": [1.0, 2.0], "nothing": [None, None]})


def test_ticks_of_a_curve_differ():
    labels = re.findall(r'text-anchor="end">([^<]+)</text>', curve("scale", [1, 2], {"": [15.31, 15.39]}))
    assert labels == ["15.31", "15.33", "15.35", "15.37", "15.39"]


def test_table_shows_chance_beside_each_number():
    results = {"eval/a": 0.5, "step": 1500.0, "diff": -2.7e-5, "c": 0.0, "d": math.nan, "e": -math.inf}
    lines = results_table(results, {"eval/a": 0.125}).splitlines()
    assert lines[1].split() == ["eval/a", "0.500", "0.125"] and lines[2].split() == ["step", "1500"]
    assert lines[3].split() == ["diff", "-3e-05"] and lines[4].split() == ["c", "0.000"]
    assert lines[5].split() == ["d", "nan"] and lines[6].split() == ["e", "-inf"]


def test_thumbnails_of_tiny_pictures_are_enlarged():
    for size, shown in ((8, 48), (30, 30), (200, 96)):
        source = ArraySource("s", np.zeros((1, size, size), np.uint8), ["x"])
        data = base64.b64decode(record_thumbnail(source, 0).split(",")[1])
        assert Image.open(io.BytesIO(data)).size == (shown, shown)


def test_thumbnail_of_an_unreadable_image_is_empty(tmp_path):
    assert record_thumbnail(FolderSource(str(tmp_path), [{"key": "none.png", "caption": "x"}]), 0) == ""
