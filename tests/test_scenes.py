"""Composed scenes: the same on any machine, boxes that are those of what can be seen, drawings that can be cut out."""

import collections
import hashlib
import pickle

import numpy as np
import pytest

from florence_jax.data.buckets import make_buckets
from florence_jax.data.coco_folder import stored_png
from florence_jax.data.records import sample_of, without_payloads
from florence_jax.data.sources.backgrounds import SCENE_PHOTOGRAPHS, missing_photographs, photograph_crop, smooth_noise
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.cutouts import cut_out, embedded_cutout, turned
from florence_jax.data.sources.detection import open_boxes
from florence_jax.data.sources.scenes import IN_FRAME, OPAQUE, SCENE_NAMES, SCENE_SPLITS, STAYS_VISIBLE, Scenes
from florence_jax.errors import UserError
from florence_jax.pictures import upright_rgb
from florence_jax.tools import build_scenes

photographs = pytest.mark.skipif(bool(missing_photographs()), reason="scikit-image is not installed")


@pytest.fixture(scope="module")
def scenes():
    return open_source("scenes:train:60:groups:128:noise")


def digest(source, count):
    sums = hashlib.sha256()
    for record in map(source.__getitem__, range(count)):
        sums.update(record["image"].tobytes() + record["boxes"].tobytes() + record["class_ids"].tobytes())
    return sums.hexdigest()[:16]


def test_scenes_are_the_same_on_any_machine(scenes):
    assert digest(scenes, 12) == "9775f1cb77ff4ff3"


@photographs
def test_scenes_on_photographs_are_the_same_on_any_machine():
    found = {split: digest(open_source(f"scenes:{split}:4:groups:64"), 4) for split in SCENE_SPLITS}
    assert found == {
        "train": "8e971f1bb806ef36",
        "held_out": "cbbe9cdf7394511f",
        "new_style": "2a554fd6ed346bec",
        "new_names": "34353acd8faeb498",
    }


def test_a_scene_depends_on_its_number_alone(scenes):
    others = pickle.loads(pickle.dumps(open_source("scenes:train:9:groups:128:noise")))
    assert np.array_equal(others[7]["image"], scenes[7]["image"]) and np.array_equal(
        others[7]["boxes"], scenes[7]["boxes"]
    )
    assert not np.array_equal(scenes[7]["image"], open_source("scenes:held_out:9:groups:128:noise")[7]["image"])


def test_metadata_and_shapes_are_those_of_the_records(scenes):
    for row, record in zip(scenes.metadata(), map(scenes.__getitem__, range(len(scenes))), strict=True):
        assert "image" not in row and repr(row) == repr(without_payloads(record))
    assert [row["key"] for row in sample_of(scenes, 3)] == [scenes[i]["key"] for i in (0, 29, 59)]
    sizes = [scenes[i]["image"].shape[:2] for i in range(len(scenes))]
    assert np.array_equal(scenes.shapes(), sizes)
    assert [(row["height"], row["width"]) for row in scenes.metadata()] == sizes
    buckets = make_buckets([scenes], ((128, 128), (64, 128), (128, 64)))
    assert sorted(np.concatenate([bucket.rows for bucket in buckets])) == list(range(60)) and len(buckets) == 3


def test_boxes_bound_what_is_seen_and_all_that_is_drawn_has_one(scenes):
    """Every pixel by the last opaque patch over it, one by one."""
    seen = 0
    for index in range(len(scenes)):
        layout, _ = scenes._layout(index)
        record = scenes[index]
        if any(record["iscrowd"]):
            continue
        top = np.full(layout.owner.shape, -1)
        whole = []
        for number, (patch, left, upper) in enumerate(layout.patches):
            mask = patch[..., 3] >= OPAQUE
            whole.append(mask.sum())
            for y, x in np.argwhere(mask):
                if 0 <= y + upper < top.shape[0] and 0 <= x + left < top.shape[1]:
                    top[y + upper, x + left] = number
        assert len(record["boxes"]) == len(layout.patches)
        for number, (box, area) in enumerate(zip(record["boxes"], record["areas"], strict=True)):
            y, x = np.nonzero(top == number)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1] and area == len(x)
            assert area >= min(STAYS_VISIBLE, IN_FRAME) * whole[number]
            seen += 1
    assert seen > 100


def test_what_scenes_hold(scenes):
    """Empty ones, crowds, all classes, several sizes."""
    records = list(open_source("scenes:train:200:groups:128:noise").metadata())
    counts = [len(record["boxes"]) for record in records]
    assert 0.02 < counts.count(0) / len(records) < 0.12 and max(counts) >= 6
    crowds = [record for record in records if any(record["iscrowd"])]
    assert 0.05 < len(crowds) / len(records) < 0.15 and all(sum(record["iscrowd"]) == 1 for record in crowds)
    classes = collections.Counter(label for record in records for label in record["class_ids"].tolist())
    assert sorted(classes) == list(range(8)) and max(classes.values()) < 2 * min(classes.values())
    assert len({(record["width"], record["height"]) for record in records}) == 5
    assert len(set(scenes.category_ids)) == 8 and max(scenes.category_ids) > 8


def test_scenes_of_names():
    for split in ("train", "held_out", "new_style"):
        source = open_source(f"scenes:{split}:3:names20:64:noise")
        assert source.class_names == SCENE_NAMES and source[1]["image"].shape[:2] <= (64, 64)
        # A class of which no drawing can be cut out would never be found.
        assert all(any(embedded_cutout(SCENE_SPLITS[split][0], int(row)) for row in rows) for rows in source._rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scenes:test", "SPLIT of train, held_out"),
        ("scenes:train:0", "write scenes:SPLIT"),
        ("scenes:train:9:names", "CLASSES of groups, names20"),
        ("scenes:new_names:9:names20", "new_names has the classes groups only"),
        ("scenes:train:9:groups:8", "32 to 2048 pixels"),
        ("scenes:train:9:groups:64:clouds", "photographs or noise"),
        ("scenes:train:9:groups:64:noise:1", "write scenes:SPLIT"),
    ],
)
def test_a_wrong_name_is_told(name, message):
    with pytest.raises(UserError, match=message):
        open_source(name)


def test_photographs_that_are_missing_are_told(monkeypatch):
    monkeypatch.setattr("florence_jax.data.sources.backgrounds.photograph_path", lambda name: None)
    missing_photographs.cache_clear()
    assert "smooth noise" in open_source("scenes:train").summary["says"]
    with pytest.raises(UserError, match=r"pip install ..\[scenes\]"):
        open_source("scenes:train:9:groups:64:photographs")
    missing_photographs.cache_clear()


def test_photographs_are_held_out():
    assert not set(SCENE_PHOTOGRAPHS["train"]) & set(SCENE_PHOTOGRAPHS["held_out"])


@pytest.mark.parametrize("size", [(128, 96), (32, 64)])
def test_noise_is_smooth_and_of_all_colours(size):
    picture = smooth_noise(size, np.random.default_rng(0)).astype(int)
    assert picture.shape == (*size, 3) and 100 < picture.mean() < 156 and np.ptp(picture) > 100
    steps = np.concatenate([np.abs(np.diff(picture, axis=axis)).ravel() for axis in (0, 1)])
    assert steps.max() < 256 * 12 / min(size) and steps.mean() < 8


@photographs
def test_a_crop_of_a_photograph_lies_in_it():
    """Also one that is larger than the photograph; mirrored or not."""
    for size in ((128, 128), (64, 128), (700, 600)):
        crop = photograph_crop("held_out", size, np.random.default_rng(1))
        assert crop.shape == (*size, 3) and crop.std() > 5 and np.abs(np.diff(crop[:, -8:].astype(int), axis=1)).any()


# -- cut-outs ---------------------------------------------------------------------------------------------------------


def disc(colour, radius=20):
    """A disc on white, its rim mixed with white."""
    y, x = np.mgrid[:64, :64] - 31.5
    alpha = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)[..., None]
    return np.round(alpha * colour + (1 - alpha) * 255).astype(np.uint8)


def test_a_cut_out_is_the_figure_without_its_ground():
    cut = cut_out(disc((200, 30, 60)))
    assert cut.shape in {(40, 40, 4), (42, 42, 4)}
    on_white = cut[..., :3].astype(int) + 255 - cut[..., 3:]
    whole = disc((200, 30, 60))[(64 - len(cut)) // 2 :][: len(cut), (64 - len(cut)) // 2 :][:, : len(cut)]
    assert np.abs(on_white - whole).max() <= 2  # on white it is the drawing again,
    rim = cut[(cut[..., 3] > 60) & (cut[..., 3] < 255)].astype(float)
    assert len(rim) and np.abs(255 * rim[:, :3] / rim[:, 3:] - (200, 30, 60)).max() < 8  # and no white rim elsewhere


def test_a_white_figure_is_left_out():
    """Shaded as clouds are: the fill enters it from a side where nothing bounds it."""
    shade = np.linspace(225, 255, 64)[None, :, None]
    cloud = np.where((disc((0, 0, 0)) < 128).any(2, keepdims=True), shade, 255).astype(np.uint8).repeat(3, 2)[..., :3]
    assert cut_out(cloud) is None and cut_out(disc((90, 90, 90), radius=10)) is None


def left_out(step):
    """Of every so many drawings of each file those that cannot be cut out, and how many were looked at."""
    counts = {}
    for split in ("train", "new_style", "new_names"):
        source = open_source(f"emoji:{split}")
        rows = range(0, len(source), step)
        cut = (cut_out(np.asarray(upright_rgb(source[row]["image"]))) for row in rows)
        counts[split] = (sum(each is None for each in cut), len(rows))
    return counts


def test_some_of_the_embedded_drawings_are_left_out():
    assert left_out(16) == {"train": (11, 176), "new_style": (5, 89), "new_names": (0, 14)}


@pytest.mark.slow
def test_247_of_the_4437_embedded_drawings_are_left_out():
    assert left_out(1) == {"train": (167, 2806), "new_style": (62, 1414), "new_names": (18, 217)}


def test_turning_keeps_the_figure():
    steps = embedded_cutout("train", 0)
    plain = turned(steps, max(steps[0].shape[:2]) - 2, 0)
    area = (steps[0][..., 3] >= OPAQUE).sum()
    assert abs((plain[..., 3] >= OPAQUE).sum() / area - 1) < 0.02
    for degrees, side in ((90, 64), (17, 40), (-30, 20)):
        patch = turned(steps, side, degrees)
        scale = (side / (max(steps[0].shape[:2]) - 2)) ** 2
        assert abs((patch[..., 3] >= OPAQUE).sum() / (area * scale) - 1) < 0.1
        border = np.concatenate([patch[0], patch[-1], patch[:, 0], patch[:, -1]])
        assert border[:, 3].max() < OPAQUE  # nothing is cut off
        assert (patch[..., :3] <= patch[..., 3:]).all()


def test_scenes_is_what_the_catalog_opens(scenes):
    assert isinstance(scenes, Scenes)


# -- files ------------------------------------------------------------------------------------------------------------


def test_written_scenes_are_the_composed_ones(tmp_path, capsys):
    """Read back as any COCO set; a stopped run is done again; the same bytes; what else lies there is left alone."""
    options = ["--held_out=0", "--new_style=0", "--train=24", "--new_names=5", "--side=64", "--backgrounds=noise"]
    out = tmp_path / "scenes"
    assert build_scenes.main([f"--out={out}", *options]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["NOTICE.txt", "new_names", "scenes.json", "train"]
    found = open_boxes(f"coco:{out}/train/annotations.json:{out}/train")
    composed = open_boxes("scenes:train:24:groups:64:noise")
    assert found.class_names == composed.class_names and tuple(found.category_ids) == composed.category_ids
    for row in range(24):
        one, other = found[row], composed[row]
        for field in ("boxes", "class_ids", "iscrowd", "areas", "width", "height", "image_id"):
            assert np.array_equal(one[field], other[field]), field
        assert np.array_equal(np.asarray(upright_rgb(one["image"])), other["image"])
    assert open_boxes(str(out / "new_names")).class_names == composed.class_names

    first = {path.name: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    (out / "train" / "annotations.json").unlink()
    assert build_scenes.main([f"--out={out}", *options]) == 0
    assert {path.name: path.read_bytes() for path in out.rglob("*.*") if path.is_file()} == first
    capsys.readouterr()
    assert build_scenes.main([f"--out={out}", "--train=3"]) == build_scenes.main([f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err.count("holds something else") == 2


def test_some_classes_of_some_scenes_are_written(tmp_path, capsys):
    """As a set has them of which nobody boxed the other classes; what another set of them has are other scenes."""
    out = tmp_path / "some"
    options = ["--classes=names20", "--train=6", "--held_out=0", "--new_style=0", "--side=64", "--backgrounds=noise"]
    options += ["--names=pizza, bell,key,crab", "--first=5", f"--out={out}"]
    assert build_scenes.main(options) == 0 and "6 of them, from number 5; boxes of 4" in capsys.readouterr().out
    found, composed = open_boxes(str(out / "train")), open_boxes("scenes:train:11:names20:64:noise")
    names = ["bell", "crab", "key", "pizza"]
    assert len(found) == 6 and list(found.class_names) == names and list(found.category_ids) == [11, 17, 27, 35]
    boxed = 0
    for row in range(6):
        one, other = found[row], composed[5 + row]
        kept = [k for k, label in enumerate(other["class_ids"]) if composed.class_names[label] in names]
        assert [names[k] for k in one["class_ids"]] == [composed.class_names[other["class_ids"][k]] for k in kept]
        np.testing.assert_array_equal(one["boxes"], other["boxes"][kept])
        np.testing.assert_array_equal(np.asarray(upright_rgb(one["image"])), other["image"])
        boxed += len(kept)
    assert boxed
    assert build_scenes.main([*options, "--first=4"]) == build_scenes.main([*options, "--names=zebra"]) == 2
    said = capsys.readouterr().err
    assert "holds something else" in said and "'zebra' is no class" in said


def test_a_picture_of_several_blocks_is_a_png():
    picture = np.random.default_rng(0).integers(0, 256, (160, 200, 3), np.uint8)
    assert np.array_equal(np.asarray(upright_rgb(stored_png(picture))), picture)
