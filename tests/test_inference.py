"""Trained weights from Python, and the notebook that shows how."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from florence_jax.data.prompts import TEMPLATES
from florence_jax.data.records import ListSource
from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import UserError
from florence_jax.inference.florence import Florence
from florence_jax.params.weights import make_description, save_pretrained
from florence_jax.tasks.encoder import Encoder

NOTEBOOK = Path(__file__).parents[1] / "docs" / "colab.ipynb"
NAMES = ["a red thing", "something blue", "grey"]


@pytest.fixture(scope="module")
def model(weights):
    return Florence(Path(weights).parent)  # the workdir


def test_pictures_of_every_kind_give_one_vector(model, pictures):
    path = Path(pictures) / "grey" / "3.png"
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
        clear = picture.convert("RGBA")
    vectors = model.embed_images([str(path), path, pixels, Image.fromarray(pixels), clear])
    assert vectors.shape == (5, 16) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors, np.broadcast_to(vectors[:1], vectors.shape))
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    np.testing.assert_array_equal(model.embed_images([grey, grey[..., None]]).std(0), 0)
    np.testing.assert_array_equal(model.embed_images(np.stack([pixels, pixels])), vectors[:2])


def test_vectors_are_the_encoders_whatever_the_batch(model, weights, pictures):
    encoder = Encoder(weights)
    pixels = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8)  # of the model's size
    for found, tower in ((model.embed_images(pixels), "image"), (model.features(pixels), "features")):
        expected = jax.jit(encoder.predict[tower])(model.params, {"image": pixels})
        np.testing.assert_allclose(found, expected, atol=1e-5)
    small = Florence(weights, batch_size=8)
    np.testing.assert_allclose(small.embed_images(pixels), model.embed_images(pixels), atol=1e-5)
    np.testing.assert_allclose(small.embed_texts(NAMES * 5), model.embed_texts(NAMES * 5), atol=1e-5)
    files = sorted(Path(pictures).rglob("*.png"))
    found = small.embed_source(open_source(pictures), quiet=True)
    assert found["index"].tolist() == list(range(20))
    np.testing.assert_allclose(found["embedding"], model.embed_images(files), atol=1e-5)


def test_classification_is_the_softmax_of_scaled_cosines(model, pictures):
    files = [f"{pictures}/red_things/0.png", f"{pictures}/grey/0.png"]
    found = model.classify(files, NAMES, templates=("{}",))
    assert found.shape == (2, 3) and found.dtype == np.float32
    logits = np.exp(model.params["logit_scale"]) * model.embed_images(files) @ model.embed_texts(NAMES).T
    np.testing.assert_allclose(found, jax.nn.softmax(logits), atol=1e-5)
    prompts = [[f"{name}.", f"not {name}"] for name in NAMES]
    classes = model.embed_texts(sum(prompts, [])).reshape(3, 2, -1).mean(1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    logits = np.exp(model.params["logit_scale"]) * model.embed_images(files) @ classes.T
    np.testing.assert_allclose(model.classify(files, NAMES, ("{}.", "not {}")), jax.nn.softmax(logits), atol=1e-5)


def test_prompts_are_those_of_the_fine_tuning_unless_others_are_given(model, pictures, monkeypatch):
    files, source = [f"{pictures}/red_things/0.png"], ListSource("one", [f"{pictures}/red_things/0.png"])
    given, plain = model.classify(files, NAMES, ("no {}!",)), model.classify(files, NAMES)
    assert np.abs(given - plain).max() > 1e-3
    monkeypatch.setattr(model.encoder, "description", model.encoder.description._replace(templates=("no {}!",)))
    np.testing.assert_allclose(model.classify(files, NAMES), given, atol=1e-6)
    np.testing.assert_allclose(model.classify(files, NAMES, TEMPLATES), plain, atol=1e-6)
    ((_, _, found),) = model.each_probability(source, NAMES)
    np.testing.assert_allclose(found, given[0], atol=1e-5)
    ((_, _, found),) = model.each_probability(source, NAMES, TEMPLATES)
    np.testing.assert_allclose(found, plain[0], atol=1e-5)


def test_few_sizes_are_compiled(model):
    pixels = np.zeros((40, 40, 3), np.uint8)
    for count in (1, 3, 5, 8, 7):
        assert len(model.embed_images([pixels] * count)) == count
    sizes = {size for tower, size in model._embedders if tower == "image"}
    assert sizes <= {1, 2, 4, 8, 16, 32}


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda m: m.embed_images("cat.jpg"), "images are given in a list"),
        (lambda m: m.embed_images([]), "no images given"),
        (lambda m: m.embed_images(["gone.jpg"]), r"record 'gone\.jpg': cannot read the file: No such file"),
        (lambda m: m.embed_images([np.zeros((4, 4, 3))]), "record 'number 0': its image is float64"),
        (lambda m: m.embed_images([None]), "record 'number 0': its image is NoneType"),
        (lambda m: m.embed_images(np.zeros((4, 4, 3), np.uint8)), "is one image"),
        (lambda m: m.embed_texts("a cat"), r"texts are given in a list, such as \['a cat'\]"),
        (lambda m: m.embed_texts(["a cat", " "]), "empty"),
        (lambda m: m.classify([np.zeros((4, 4, 3), np.uint8)], "cat"), "names are given in a list"),
        (lambda m: m.classify([np.zeros((4, 4, 3), np.uint8)], ["cat"], ["a photo"]), "a photo"),
        (lambda m: m.classify([np.zeros((4, 4, 3), np.uint8)], ["cat"], []), "template"),
    ],
)
def test_mistakes(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)


def test_mistakes_of_weights(model, weights, tmp_path):
    with pytest.raises(UserError, match="no weights at"):
        Florence(tmp_path / "gone")
    with pytest.raises(UserError, match="batch_size=0"):
        Florence(weights, batch_size=0)
    towers = model.encoder.towers_part() | {"entries": ["image"]}
    save_pretrained(
        str(tmp_path / "w"), {"image": model.params["image"]}, make_description("import", {"towers": towers})
    )
    tower = Florence(tmp_path / "w")
    pixels = [np.zeros((40, 40, 3), np.uint8)]
    assert tower.embed_images(pixels).shape == (1, 8)
    for call in (lambda: tower.embed_texts(["x"]), lambda: tower.classify(pixels, ["x"])):
        with pytest.raises(UserError, match="holds no text tower"):
            call()


# -- the notebook -----------------------------------------------------------------------------------------------------


def notebook_cells():
    return ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]


def test_the_cells_of_the_notebook_work_on_a_runs_folder(weights, monkeypatch, capsys, tmp_path):
    workdir, shown = shutil.copytree(Path(weights).parent, tmp_path / "run"), []
    (workdir / "report.html").write_text("<p>what it learned</p>")
    stand_in = SimpleNamespace(HTML=str, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython.display", stand_in)
    _, train, *rest = notebook_cells()
    assert re.match(r'WORKDIR = "runs/pretrain"\n!python -m florence_jax\.main .*--workdir=\$WORKDIR$', train)
    scope = {"WORKDIR": str(workdir)}
    for cell in rest:
        exec(compile(cell, "colab.ipynb", "exec"), scope)
    assert shown[0] == "<p>what it learned</p>" and len(shown) == 1 + 8 + 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "217 pictures" and lines[1].startswith("prompts of 8 classes: 2 of 648 are cut")
    assert len(lines) == 10 and lines[2].count("%") == 3
    assert all(isinstance(picture, Image.Image) for picture in shown[1:])
