"""`florence_jax.predict` and `Florence.predict` with a head trained on twenty pictures, from its folder alone."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_images import COLOURS, run_main

from florence_jax.errors import UserError
from florence_jax.inference import Florence
from florence_jax.inference.class_names import read_names
from florence_jax.predict import main

CLASSES = sorted(name.replace("_", " ") for name in COLOURS)


@pytest.fixture(scope="module")
def head(weights, pictures, tmp_path_factory):
    """Workdir of a linear head; the folder it was trained on is gone when it is used."""
    workdir, data = tmp_path_factory.mktemp("head"), tmp_path_factory.mktemp("gone") / "pictures"
    shutil.copytree(pictures, data)
    run_main(
        "--config=configs/classify.py:protocol=finetune_linear,runlocal",
        f"--config.init={weights}",
        f"--config.data.train={data}",
        f"--config.data.test={data}",
        f"--workdir={workdir}",
        "--config.total_steps=30",
        "--config.optim.learning_rate=3e-2",
    )
    shutil.rmtree(data)
    return workdir


def test_a_head_is_used_from_python(head, pictures):
    model = Florence(head)
    assert model.classes == tuple(CLASSES)
    files = sorted(Path(pictures).rglob("*.png"))
    found = model.predict(files, top=2)
    right = [file.parent.name.replace("_", " ") for file in files]
    assert np.mean([best[0][0] == name for best, name in zip(found, right, strict=True)]) > 0.7
    probabilities = model.probabilities(files)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert [best[0][1] for best in found] == pytest.approx(probabilities.max(1).tolist())
    assert all(first[1] >= second[1] for first, second in found)


def test_a_head_is_used_from_the_command_line(head, pictures, tmp_path, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(pictures, mine)
    (mine / "broken.png").write_bytes(b"no picture")
    assert main([f"--init={head}", f"--input={mine}", f"--out={tmp_path / 'out'}", "--top=2"]) == 0
    captured = capsys.readouterr()
    assert "20 pictures, 1 not read" in captured.out and "not read: broken.png: corrupt image" in captured.err
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and list(rows[0]) == ["file", "class", "probability", "rank"]
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["file"] for entry in content["pictures"]] == [row["file"] for row in rows[::2]]
    assert content["unread"][0]["file"] == "broken.png" and content["init"] == str(head)
    best = Florence(head).predict([mine / rows[0]["file"]])[0][0]
    assert rows[0]["class"] == best[0] and float(rows[0]["probability"]) == pytest.approx(best[1], abs=1e-4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 20 and "broken.png" in page


def test_a_head_is_evaluated_on_other_pictures(head, pictures, tmp_path):
    run_main(
        "--config=configs/classify.py:protocol=head,runlocal",
        f"--config.init={head}",
        f"--config.data.test={pictures}",
        f"--workdir={tmp_path}",
    )
    result = json.loads((tmp_path / "result.json").read_text())
    trained = json.loads((head / "result.json").read_text())
    assert result["eval/test/top1"] == trained["eval/test/top1"] > 0.7


def test_pretrained_weights_need_names(weights, pictures, tmp_path, capsys):
    arguments = [f"--init={weights}", f"--input={pictures}/grey/0.png", f"--out={tmp_path / 'out'}"]
    assert main(arguments) == 2
    assert "name some with --names" in capsys.readouterr().err
    assert main([*arguments, "--names=cat,dog"]) == 0
    (picture,) = json.loads((tmp_path / "out" / "predictions.json").read_text())["pictures"]
    expected = Florence(weights).classify([f"{pictures}/grey/0.png"], ["cat", "dog"])[0]
    assert picture["file"] == "0.png" and picture["found"][0]["class"] == ["cat", "dog"][int(expected.argmax())]
    assert picture["found"][0]["probability"] == pytest.approx(expected.max(), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--input": "{tmp}/none"}, "does not exist"),
        ({"--input": "{tmp}/broken"}, "none of the 1 records can be used; the last: record 'a.png': corrupt image"),
        ({"--init": "{tmp}"}, "there is no"),
        ({"--top": "0"}, "--top=0"),
        ({"--names": "cat,cat"}, "'cat' is there twice"),
    ],
)
def test_mistakes_are_one_message(head, tmp_path, capsys, change, message):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no")
    given = {"--init": str(head), "--input": str(tmp_path / "broken"), "--out": str(tmp_path / "out"), **change}
    assert main([f"{name}={value.format(tmp=tmp_path)}" for name, value in given.items()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_names_of_a_file(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("# pets\ncat = cat | kitten\n\ngolden retriever\n")
    assert read_names(str(file)) == (("cat", "kitten"), ("golden retriever",))
    file.write_text("cat, dog\n")
    assert read_names(str(file)) == read_names("cat,dog") == (("cat",), ("dog",))
    assert len(read_names("food101")) == 101
    with pytest.raises(UserError, match="names no class"):
        read_names(",")
