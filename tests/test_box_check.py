"""protocol=check: a set of boxes is looked at before anybody trains on it."""

import csv
import io
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from planted_boxes import PLANTED, good_folder, picture, planted_folder

from florence_jax.data.box_problems import FLAWS_SHOWN, MISTAKES, Problems
from florence_jax.data.sources.catalog import split_mixture
from florence_jax.data.sources.detection import open_boxes
from florence_jax.errors import UserError
from florence_jax.evaluators import box_check
from florence_jax.evaluators.box_check import BoxCheck, same_files
from florence_jax.page import page
from florence_jax.tasks.box_check import BoxCheckSuite


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A check of the planted mistakes, and its results."""
    folder = planted_folder(tmp_path_factory.mktemp("planted"))
    check = BoxCheck(open_boxes(str(folder), check=True))
    return check, check.run({})


def test_all_planted_mistakes_are_in_one_report(checked):
    check, results = checked
    assert len(PLANTED) > 15
    for kind in PLANTED:
        assert results[f"problems/{kind}"] >= 1, kind
    assert results["problems"] == len(PLANTED) + 1  # two pictures share an id
    assert results["images"] == 13 and results["boxes"] == 21 and results["decoded"] == 13  # the rest is usable
    assert results["images_without_boxes"] == 3 and results["classes"] == 4 and results["most_boxes"] == 5
    files = check.files()
    rows = list(csv.DictReader(io.StringIO(files["test_problems.csv"].decode())))
    for kind, (where, detail) in PLANTED.items():
        assert any(r["kind"] == kind and r["where"] == where and detail in r["detail"] for r in rows), kind
    content = json.loads(files["test_problems.json"])
    assert content["problems"]["turned"] == {"count": 1, **MISTAKES["turned"]._asdict()}
    assert content["classes"][1] == {"name": "bee", "id": 4, "boxes": 3, "images": 3, "crowds": 0, "median_side": 25}
    body = "".join(check.report())
    for kind in PLANTED:
        assert MISTAKES[kind].what in body, kind
    for text in (
        "test: mistakes",
        "test: sizes",
        "60 x 40",
        "0.1 to 0.2",
        "40 x 60, boxes: 1; turned<",
        "13 of 13 pictures",
    ):
        assert text in body, text
    assert body.count("<figure") == 13 and page("x", body)


def test_a_good_set_has_no_mistakes_and_damage_inside_is_found(tmp_path):
    good_folder(tmp_path, 4)
    check = BoxCheck(open_boxes(str(tmp_path), check=True), "train", pictures=3)
    results = check.run({})
    assert results["problems"] == 0 and results["decoded"] == 3 and "None was found" in check.report()[1]
    data = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(data[: len(data) // 2])  # its header is whole
    assert BoxCheck(open_boxes(str(tmp_path))).run({})["problems/unreadable"] == 1
    assert check.files().keys() == {"train_problems.csv", "train_problems.json"}


def test_any_source_with_boxes_is_checked():
    check = BoxCheck(open_boxes("scenes:held_out:6"))
    results = check.run({})
    assert results["images"] == 6 and results["classes"] == 8 and results["decoded"] == 6
    assert not any(name.startswith("problems/") and value for name, value in results.items() if "no_boxes" not in name)
    assert "".join(check.report()).count("<figure") == 6


def test_same_files(tmp_path, monkeypatch):
    contents = [b"a" * 9000, b"b" + b"a" * 8999, b"a" * 9000, b"c" * 9000, b"x", b"", b"", b"a" * 9000]
    paths = [str(tmp_path / f"{i}") for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        open(path, "wb").write(content)
    assert same_files([*paths, str(tmp_path / "none")]) == [(0, 2), (5, 6), (0, 7)]
    monkeypatch.setattr(box_check, "SAME_BYTES", 100)
    assert same_files(paths) == []


def test_few_of_many_mistakes_are_kept_with_their_places():
    problems = Problems()
    for i in range(FLAWS_SHOWN + 50):
        problems.add("outside", f"{i}.png")
    problems.add("zero_area", count=3)
    assert problems.counts == {"outside": FLAWS_SHOWN + 50, "zero_area": 3}
    kept = list(problems)
    assert len(kept) == FLAWS_SHOWN + 1 and kept[0].kind == "zero_area" and kept[1].where == "0.png"


def test_the_suite_checks_each_part(tmp_path):
    good_folder(tmp_path / "a", 2)
    good_folder(tmp_path / "b", 3)
    config = ConfigDict({"task": "detect", "protocol": "check"})
    config.data = {"train": f"{tmp_path}/a*2|{tmp_path}/b", "test": f"{tmp_path}/b"}
    suite = BoxCheckSuite(config)
    assert [check.name for check in suite.evaluators(None)] == ["train", "train_2", "test"]
    assert suite.load(None) == {} and suite.description["parts"] == {}
    assert suite.identity["data.test"] == f"{tmp_path}/b"
    assert split_mixture("a*2|b") == [("a", 2.0), ("b", 1.0)]
    config.data.train = config.data.test = ""
    with pytest.raises(UserError, match="nothing to check: give --config.data.test=DATA"):
        BoxCheckSuite(config)


def test_sizes_that_are_too_large_to_be_true(tmp_path):
    """10,000 boxes on a picture, a side of 20,000 pixels."""
    picture(tmp_path / "many.png", 0, (400, 300))
    Image.new("RGB", (20000, 210), "#888").save(tmp_path / "long.png")
    corner = np.random.default_rng(0).integers(0, 280, (10000, 2))
    lines = [f"many.png,{x},{y},{x + 9},{y + 9},cell" for x, y in corner.tolist()]
    (tmp_path / "boxes.csv").write_text("\n".join(["image,x1,y1,x2,y2,name", *lines, "long.png,5,5,1500,200,cell"]))
    source = open_boxes(str(tmp_path))
    kinds = source.problems.counts
    assert kinds["crowded"] == 1 and kinds["huge"] == 1 and kinds["one_class"] == 1 and len(source) == 2
    results = BoxCheck(source).run({})
    assert results["most_boxes"] == 10000 and results["decoded"] == 2 and "problems/unreadable" not in results
