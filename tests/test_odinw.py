"""The paper's eleven detection sets: their files as GLIP's collection has them, and the command over all of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.detection import box_parts, open_boxes
from florence_jax.data.sources.odinw import ODINW_FILE, ODINW_SETS, PARTS_OF
from florence_jax.errors import UserError
from florence_jax.tools import eleven_sets


def write_part(root, name, part, categories, boxes, file=ODINW_FILE):
    """A part of a set: a picture for each of `boxes`, given as the ids of their classes."""
    known = ODINW_SETS[name]
    folder = root / known.folder / ("" if known.flat else PARTS_OF[part])
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, ids in enumerate(boxes):
        Image.fromarray(np.full((20, 30, 3), number, np.uint8)).save(folder / f"{part}{number}.jpg")
        images.append({"id": number, "file_name": f"{part}{number}.jpg", "width": 30, "height": 20})
        for category in ids:
            box = {"image_id": number, "category_id": category, "bbox": [1 + len(annotations), 2, 9, 9], "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "area": 81, **box})
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / (f"{part}_{file}" if known.flat else file)).write_text(json.dumps(content))


def categories_of(names, first=1):
    return [{"id": number, "name": name, "supercategory": "x"} for number, name in enumerate(names, first)]


def test_the_sets_are_those_of_the_paper():
    assert list(ODINW_SETS) == list(eleven_sets.PAPER_AP) and len(ODINW_SETS) == 11
    counts = {name: len(known.names) for name, known in ODINW_SETS.items()}
    assert list(counts.values()) == [7, 3, 12, 2, 37, 1, 1, 2, 1, 2, 1]
    assert all(len(set(known.names)) == len(known.names) for known in ODINW_SETS.values())
    assert [name for name, known in ODINW_SETS.items() if known.reduced] == ["OxfordPets", "PKLot"]
    zero_shot = [values[2] for values in eleven_sets.PAPER_AP.values()]
    assert np.mean(zero_shot) == pytest.approx(41.5, abs=0.05)  # as the paper's numbers give
    assert ODINW_SETS["OxfordPets"].names[4] == "cat-British_Shorthair"


def test_classes_are_named_as_the_configurations_do(tmp_path):
    """Chess lists an unused first class, and writes its names in another way."""
    names = ["bishop", *(name.replace(" ", "-") for name in ODINW_SETS["ChessPieces"].names)]
    write_part(tmp_path, "ChessPieces", "test", categories_of(names)[::-1], [[2, 13], [8], [1]])
    source = open_boxes(f"odinw:{tmp_path}:chesspieces")
    assert source.class_names == ODINW_SETS["ChessPieces"].names and source.category_ids == tuple(range(2, 14))
    assert [record["class_ids"].tolist() for record in source.metadata()] == [[0, 11], [6], []]
    assert source.problems.counts["unknown_category"] == 1  # counted, and said
    assert len(open_source(f"odinw:{tmp_path}:ChessPieces:test")) == 3
    write_part(tmp_path, "ChessPieces", "val", categories_of(names[1:]), [[1]])
    assert [one["class_ids"].tolist() for one in open_boxes(f"odinw:{tmp_path}:ChessPieces:val").metadata()] == [[0]]


def test_parts_wordings_and_draws(tmp_path):
    names = ODINW_SETS["Aquarium"].names
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        write_part(tmp_path, "Aquarium", part, categories_of(names), [[3, 7]] * count)
    write_part(tmp_path, "Aquarium", "train", categories_of(names), [[3]], "fewshot_train_shot5_seed30.json")
    spec = f"odinw:{tmp_path}:Aquarium"
    assert box_parts(spec) == {"train", "test"} and box_parts(f"{spec}:val") == frozenset()
    assert [len(open_boxes(spec, split)) for split in ("train", "test", "")] == [3, 1, 1]
    assert len(open_boxes(f"{spec}:val", "test")) == 2 and len(open_boxes(f"{spec}:train_5_30")) == 1
    asked = open_boxes(f"{spec}::glip", "train").class_names
    assert [asked[k] for k in (2, 3, 6, 0)] == [
        "penguin, which is black and white",
        "puffin with orange beaks",
        "stingray which is flat and round",
        "fish",
    ]
    write_part(tmp_path, "pistols", "test", categories_of(["pistol"]), [[1], [1]])
    assert len(open_boxes(f"odinw:{tmp_path}:pistols")) == 2
    write_part(tmp_path, "PKLot", "minival", categories_of(ODINW_SETS["PKLot"].names), [[1], [2]])
    assert open_boxes(f"odinw:{tmp_path}:PKLot:minival").class_names == ("space-empty", "space-occupied")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Zebras", "SET one of Aquarium, BCCD"),
        ("BCCD:test:other", "write odinw:FOLDER:SET"),
        ("BCCD:minival", "BCCD has no part 'minival'; parts: train, val, test, train_5_3"),
        ("BCCD:val", "there is no file .*BCCD.v3-raw.coco/valid/annotations_without_background.json; lay out"),
        ("BCCD", "has 2 classes, RBC, WBC; the set has 3: Platelets, RBC, WBC"),
        ("MaskWearing", "in another order than the set's: no-mask, mask"),
    ],
)
def test_mistakes(tmp_path, spec, message):
    write_part(tmp_path, "BCCD", "test", categories_of(["RBC", "WBC"]), [[1]])
    write_part(tmp_path, "MaskWearing", "test", categories_of(["no-mask", "mask"]), [[1]])
    with pytest.raises(UserError, match=message):
        open_boxes(f"odinw:{tmp_path}:{spec}")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two sets, and runs that only write a result; the list of their options."""
    for name in ("BCCD", "Packages"):
        for part in ("train", "test"):
            write_part(tmp_path / "sets", name, part, categories_of(ODINW_SETS[name].names), [[1]])
    started = []

    def fake_run(workdir, settings):
        started.append(settings["extra"])
        return {"eval/test/AP": (0.4 if "BCCD" in str(workdir) else 0.2) + settings["seed"] / 100}

    monkeypatch.setattr(eleven_sets, "train_run", fake_run)
    return started


def test_the_command_over_the_sets(tmp_path, runs, capsys):
    options = [f"--odinw={tmp_path}/sets", "--sets=Packages,BCCD", "--seeds=0,2", f"--workdir={tmp_path}/out"]
    assert eleven_sets.main([*options, "--config=configs/detect.py:protocol=fewshot", "--glip"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == "BCCD 41.0 ± 1.4 62.6 40.6 15.3".split()
    assert rows[3] == "Packages 21.0 ± 1.4 52.0 32.8 79.6".split()
    assert rows[4] == "mean of 2 31.0 ± 1.4 57.3 36.7 47.4".split()
    assert runs[0] == [
        f"--config.data.test=odinw:{tmp_path}/sets:BCCD:test:glip",
        f"--config.data.train=odinw:{tmp_path}/sets:BCCD:train:glip",
    ]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["mean"] == pytest.approx([0.3, 0.32])
    assert "mean of 2" in (tmp_path / "out" / "report.html").read_text()
    evaluated = ["--config=configs/detect.py:protocol=eval", f"--workdir={tmp_path}/eval", "--config.init=DIR"]
    assert eleven_sets.main([*options[:2], *evaluated]) == 0
    assert runs[-1] == [f"--config.data.test=odinw:{tmp_path}/sets:Packages:test", "--config.init=DIR"]


def test_nothing_starts_where_a_set_is_missing(tmp_path, runs, capsys):
    options = [f"--odinw={tmp_path}/sets", "--config=configs/detect.py", f"--workdir={tmp_path}/out"]
    for more, message in (([], "there is no file"), (["--sets=Cats"], "unknown set 'Cats'"), (["--x=1"], "--x=1")):
        assert eleven_sets.main([*options, *more]) == 2
        assert message in capsys.readouterr().err
    assert not runs and not Path(tmp_path / "out").exists()
