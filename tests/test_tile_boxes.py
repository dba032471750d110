"""Large pictures with boxes as tiles: boxes stay where their pixels are, what is cut is neither object nor ground."""

import json

import numpy as np
import pytest
from PIL import Image

from florence_jax.data.sources.detection import open_boxes
from florence_jax.pictures import upright_rgb
from florence_jax.tools import tile_boxes
from florence_jax.tools.tile_boxes import tile_starts

BOXES = [(20, 30, 60, 80), (90, 10, 130, 50), (150, 120, 190, 140), (0, 60, 10, 200)]  # x1 y1 x2 y2


@pytest.mark.parametrize(("length", "overlap"), [(64, 0.1), (100, 0.0), (1000, 0.1), (1001, 0.5), (65, 0.9)])
def test_tiles_cover_a_length_and_overlap(length, overlap):
    starts = tile_starts(length, 64, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, length - 64)
    assert all(0 < step <= 64 * (1 - overlap) for step in np.diff(starts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Painted boxes of shades of their own, each of which is seen in one box only."""
    folder = tmp_path_factory.mktemp("large")
    picture = np.zeros((220, 200, 3), np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(BOXES):
        picture[y1:y2, x1:x2] = 60 * (number + 1)
    Image.fromarray(picture).save(folder / "a b.png")
    Image.fromarray(np.full((40, 30, 3), 9, np.uint8)).save(folder / "small.png")
    sizes = {"a b.png": (200, 220), "small.png": (30, 40)}
    images = [{"id": i, "file_name": n, "width": w, "height": h} for i, (n, (w, h)) in enumerate(sizes.items())]
    boxes = [
        {"id": i, "image_id": 0, "category_id": 5, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": int(i == 3)}
        for i, (x1, y1, x2, y2) in enumerate(BOXES)
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "painted"}]}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def test_boxes_follow_what_is_painted(folder, tmp_path, capsys):
    out = tmp_path / "tiles"
    assert tile_boxes.main([f"--data={folder}", f"--out={out}", "--side=100", "--overlap=0.2"]) == 0
    tiles = open_boxes(str(out))
    assert tiles.class_names == ("painted",) and tuple(tiles.category_ids) == (5,)
    records = [tiles[row] for row in range(len(tiles))]
    assert len(records) == 3 * 3 + 1 and {(r["width"], r["height"]) for r in records} == {(100, 100), (30, 40)}
    found, crowds = np.zeros(4, int), np.zeros(4, int)
    for record in records:
        picture = np.asarray(upright_rgb(record["image"]))[..., 0]
        for box, crowd in zip(record["boxes"].astype(int), record["iscrowd"], strict=True):
            x1, y1, x2, y2 = box
            shade = picture[y1, x1]
            y, x = np.nonzero(picture == shade)
            assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == box.tolist()
            number = int(shade) // 60 - 1
            left, top, right, bottom = BOXES[number]
            share = (x2 - x1) * (y2 - y1) / ((right - left) * (bottom - top))
            assert crowd == (share < 0.5 or number == 3)
            found[number] += not crowd
            crowds[number] += crowd
        shades = set(np.unique(picture).tolist()) - {0, 9}
        assert len(record["boxes"]) == len(shades)  # none is left out
    assert (found[:3] > 0).all() and found[3] == 0 and crowds[3] > 0
    assert "10 tiles of 2 pictures" in capsys.readouterr().out


def test_a_folder_of_other_tiles_is_left_alone(folder, tmp_path, capsys):
    options = [f"--data={folder}", f"--out={tmp_path / 'tiles'}"]
    assert tile_boxes.main(options) == tile_boxes.main(options) == 0
    assert tile_boxes.main([*options, "--side=64"]) == tile_boxes.main([*options, "--side=3"]) == 2
    told = capsys.readouterr().err
    assert "holds something else" in told and "at least 32 pixels" in told


def test_tiles_know_what_was_looked_for(tmp_path):
    Image.fromarray(np.full((64, 128, 3), 9, np.uint8)).save(tmp_path / "a.png")
    lists = {"neg_category_ids": [7], "not_exhaustive_category_ids": [8]}
    image = {"id": 1, "file_name": "a.png", "width": 128, "height": 64} | lists
    box = {"id": 1, "image_id": 1, "category_id": 5, "bbox": [5, 5, 20, 20]}
    categories = [{"id": number, "name": f"class {number}"} for number in (5, 7, 8, 9)]
    (tmp_path / "l.json").write_text(json.dumps({"images": [image], "annotations": [box], "categories": categories}))
    out = tmp_path / "tiles"
    assert tile_boxes.main([f"--data=coco:{tmp_path}/l.json", f"--out={out}", "--side=64", "--overlap=0"]) == 0
    left, right = open_boxes(str(out)).metadata()
    assert left["negative_ids"].tolist() == [1] and right["negative_ids"].tolist() == [0, 1]
    assert left["not_exhaustive_ids"].tolist() == right["not_exhaustive_ids"].tolist() == [2]
