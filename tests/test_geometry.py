"""Ops that move pixels: boxes, frames and the way back to the source follow the picture."""

import numpy as np
import pytest

from florence_jax.data.ops.geometry import boxes_to_source, map_boxes
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.records import BadRecord
from florence_jax.errors import UserError

STRAIGHT = [
    "resize(70)",
    "resize_exact(50, 90)",
    "resize_long(80)",
    "shrink(20, times=2)",
    "resize_long(90, short=40)",
    "center_crop(64)",
    "center_crop(160)",
    "crop(64)",
    "crop(150, pad=10)",
    "rrc(72, scale=(0.3, 1))",
    "flip(1)",
    "pad_image(140, 150)",
    "flip(0.5)|rrc(96, scale=(0.5, 1))|flip(0.5)|resize_exact(60, 90)|crop(56, pad=4)",
    "resize_long(110, short=80)|flip(0.5)|pad_image(112)",
    "resize(100)|center_crop(90)|flip(1)|center_crop(99)",
    "resize_short(70, 100)",
    "resize_short((40, 60, 90), longest=110)|flip(0.5)",
    "resize_fit(80, 60, interpolation=bicubic)",
    "lsj(90, 120, low=0.4, high=2)",
    "box_crop(0.5)",
    "box_crop(0.4, p=0.7)|resize_fit(100, 90)|flip(0.5)|pad_image(100, 90)",
]
TURNED = [
    "affine(0, scale=(0.6, 1.4), shift=0.2, stretch=0.3)",
    "affine(30, fill=0)",
    "affine(180, scale=(0.7, 1.2), shift=0.1, stretch=0.2, fill=0)|flip(0.5)",
    "resize(90)|affine(20, shift=0.1, fill=0)|center_crop(80)|flip(1)",
]


def run(spec, example, seed=0):
    generator = np.random.default_rng(seed)
    for op in parse_ops(spec, {}):
        example = op(example, generator)
    return example


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def painted(seed):
    """A black picture with one white rectangle, and its box."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(60, 130, 2)
    x, y = (np.sort(rng.choice(np.arange(3, side - 3), 2, replace=False)) for side in (width, height))
    x[1], y[1] = max(x[1], x[0] + 12), max(y[1], y[0] + 12)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[y[0] : y[1], x[0] : x[1]] = 255
    return picture, np.array([[x[0], y[0], min(x[1], width), min(y[1], height)]], np.float32)


def extent(picture, level):
    """The box of what is lighter than `level`, or None."""
    rows, columns = np.nonzero((picture[..., 0] > level).any(1))[0], np.nonzero((picture[..., 0] > level).any(0))[0]
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) if len(rows) else None


@pytest.mark.parametrize("spec", STRAIGHT)
def test_boxes_follow_painted_rectangles(spec):
    seen = 0
    for seed in range(40):
        picture, box = painted(seed)
        out = run(spec, {"image": picture, "boxes": box.tolist(), "class_ids": [7]}, seed)
        found = extent(out["image"], 127)
        assert out["boxes"].dtype == np.float32 and len(out["boxes"]) == len(out["class_ids"]) == len(out["ignore"])
        if not len(out["boxes"]):
            assert found is None
            continue
        narrow = (out["boxes"][0, 2:] - out["boxes"][0, :2]).min() < 1
        if narrow:  # less than a pixel of it is left: it may be lighter or darker than half
            continue
        assert np.abs(found - out["boxes"][0]).max() <= 1, (seed, found, out["boxes"])
        seen += 1
    assert seen >= 25


@pytest.mark.parametrize("spec", TURNED)
def test_boxes_follow_turned_rectangles(spec):
    """A box that stays inside is the rectangle's hull; one that is cut, or turned twice, holds what is to be seen."""
    inside = 0
    for seed in range(60):
        picture, box = painted(seed)
        out = run(spec, {"image": np.where(picture, picture, 0), "boxes": box}, seed)
        shown = out["image"].copy()
        if "fill=0" not in spec:  # the frame that came in view is white: not the rectangle
            shown[(run(spec, {"image": np.zeros_like(picture)}, seed)["image"] > 0).any(-1)] = 0
        found, whole = extent(shown, 90), map_boxes(box, out["warp"][:2])[0]
        if found is None:
            continue
        height, width = shown.shape[:2]
        got = out["boxes"][0]
        assert (found[:2] >= got[:2] - 1).all() and (found[2:] <= got[2:] + 1).all(), (seed, found, got)
        if (whole[:2] >= 1).all() and whole[2] <= width - 1 and whole[3] <= height - 1:
            np.testing.assert_allclose(got, whole, atol=1e-3)
            assert np.abs(found - whole).max() <= 1.01, (seed, found, whole)
            inside += 1
    assert inside >= 10


@pytest.mark.parametrize("spec", [*STRAIGHT, *TURNED])
def test_the_warp_takes_boxes_back_to_the_source(spec):
    for seed in range(5):
        picture, box = painted(seed)
        out = run(spec, {"image": picture}, seed)
        assert out["warp"].shape == (3, 3) and out["warp"].dtype == np.float64
        corners = np.array([box[0, :2], box[0, 2:]])
        points = np.concatenate([corners, corners], axis=1)  # boxes without extent: no hull
        there = map_boxes(points, out["warp"][:2])
        np.testing.assert_allclose(boxes_to_source(there, out["warp"].astype(np.float32)), points, atol=1e-3)
        whole = map_boxes(box, out["warp"][:2])
        if spec in STRAIGHT:
            np.testing.assert_allclose(boxes_to_source(whole, out["warp"]), box, atol=1e-6)


@pytest.mark.parametrize(
    "spec", ["rrc(24)", "affine(40, shift=0.1)|flip", "crop(20, pad=5)|jitter(0.4, 0.4, 0.4, 0.1)|gray(0.5)|flip"]
)
def test_frames_and_lists_take_one_draw(spec):
    for seed in range(4):
        frames = np.stack([noise(30, 40, i) for i in range(3)])
        single = [run(spec, {"image": frame}, seed) for frame in frames]
        for video in (frames, frames[:1]):
            out = run(spec.replace(")", ", field=video)").replace("flip", "flip(field=video)"), {"video": video}, seed)
            assert isinstance(out["video"], np.ndarray) and out["video"].dtype == np.uint8
            for frame, one in zip(out["video"], single, strict=False):
                np.testing.assert_array_equal(frame, one["image"])
            np.testing.assert_array_equal(out["warp"], single[0]["warp"])
        pictures = [noise(30, 40, 8), noise(50, 20, 9), noise(30, 40, 10)]
        out = run(
            spec.replace(")", ", field=images)").replace("flip", "flip(field=images)"), {"images": pictures}, seed
        )
        assert isinstance(out["images"], list) and out["warp"].shape == (3, 3, 3)
        np.testing.assert_array_equal(out["images"][0], run(spec, {"image": pictures[0]}, seed)["image"])
        np.testing.assert_array_equal(out["images"][2], run(spec, {"image": pictures[2]}, seed)["image"])
        assert len({picture.tobytes() for picture in out["images"]}) == 3


def test_pictures_of_a_list_are_decoded_and_warped_by_their_own_size():
    pictures = [noise(20, 40), noise(50, 25)]
    out = run("decode(field=images)|resize(10, field=images)|flip(1, field=images)", {"images": pictures})
    assert [picture.shape for picture in out["images"]] == [(10, 20, 3), (20, 10, 3)]
    np.testing.assert_allclose(out["warp"][:, :2, 2], [[20, 0], [10, 0]])  # each is mirrored in its own width
    with pytest.raises(UserError, match="boxes lie in one picture"):
        run("resize(10, field=images)", {"images": pictures, "boxes": [[0, 0, 1, 1]]})
    for empty in ({"images": []}, {"images": np.zeros((0, 4, 4, 3), np.uint8)}):
        with pytest.raises(BadRecord, match="its images is empty"):
            run("resize(10, field=images)", {"key": "k", **empty})


def test_what_is_left_of_boxes():
    example = {
        "key": "k",
        "image": noise(40, 40),
        "boxes": [[0, 0, 10, 10], [4, 10, 14, 20], [8, 10, 18, 20], [20, 20, 30, 30], [25, 25, 25, 30]],
        "class_ids": [0, 1, 2, 3, 4],
        "iscrowd": [0, 1, 0, 0, 0],
        "scores": np.linspace(0, 1, 5),
        "negative_ids": [5, 6],
    }
    out = run("center_crop(20, visible=0.5)", example)  # from (10, 10)
    np.testing.assert_array_equal(out["boxes"], [[0, 0, 4, 10], [0, 0, 8, 10], [10, 10, 20, 20]])
    assert out["class_ids"].tolist() == [1, 2, 3] and out["iscrowd"].tolist() == [1, 0, 0]
    np.testing.assert_allclose(out["scores"], [0.25, 0.5, 0.75])
    assert out["ignore"].tolist() == [True, False, False] and out["negative_ids"] == [5, 6]
    again = run("flip(1)|center_crop(40)", out)  # marks stay with their boxes
    assert again["ignore"].tolist() == [True, False, False]
    np.testing.assert_array_equal(again["boxes"][0], [26, 10, 30, 20])
    assert not run("center_crop(20)", example)["ignore"].any()
    none = run("rrc(8)", {"image": noise(9, 9), "boxes": []})
    assert none["boxes"].shape == (0, 4) and none["ignore"].shape == (0,)
    for boxes, more, message in (
        ([[0, 0, 1]], {}, "not numbers"),
        ([[0, 0, 1, float("nan")]], {}, "a box is not finite"),
        ([[0, 0, 1, 1]], {"class_ids": [1, 2]}, "it has 1 boxes, but not as many class_ids"),
    ):
        with pytest.raises(BadRecord, match=f"'k'.*{message}"):
            run("flip", {"key": "k", "image": noise(4, 4), "boxes": boxes} | more)


def test_boxes_follow_through_random_chains():
    """Any ops one after another: painted rectangles stay under their boxes to a pixel, and the warp takes them back."""
    rng, seen = np.random.default_rng(7), 0
    straight = [spec for spec in STRAIGHT if "|" not in spec and "pad_image" not in spec]
    for seed in range(60):
        spec = "|".join(rng.choice(straight, 3)) + "|resize_fit(120, 100)|pad_image(120, 100)"
        picture, box = painted(seed)
        out = run(spec, {"image": picture, "boxes": box}, seed)
        whole = map_boxes(box, out["warp"][:2])
        np.testing.assert_allclose(boxes_to_source(whole, out["warp"]), box, atol=1e-6)
        growth = np.sqrt(abs(np.linalg.det(out["warp"][:2, :2])))
        if len(out["boxes"]) and (out["boxes"][0, 2:] - out["boxes"][0, :2]).min() >= 4 and growth < 2:
            assert np.abs(extent(out["image"], 127) - out["boxes"][0]).max() <= 1.5, (spec, seed)
            seen += 1
    assert seen >= 20


def test_a_crop_keeps_boxes_by_their_centre():
    boxes = [[0, 0, 30, 30], [0, 0, 14, 14], [20, 20, 40, 40]]
    for seed in range(20):
        out = run("box_crop(0.5)", {"image": noise(40, 40), "boxes": boxes, "class_ids": [0, 1, 2]}, seed)
        height, width = out["image"].shape[:2]
        middle = map_boxes(np.array(boxes, float), out["warp"][:2]).reshape(3, 2, 2).mean(1)
        inside = ((middle >= 0) & (middle <= (width, height))).all(1)
        assert 20 <= height <= 40 and 20 <= width <= 40
        np.testing.assert_array_equal(~out["ignore"], inside[out["class_ids"]])
    assert run("box_crop(p=0)", {"image": noise(9, 8)})["image"].shape == (9, 8, 3)


def test_large_scale_jitter_and_the_sizes_of_detectors():
    image = noise(40, 80)
    shapes = [run("lsj(64, 64, low=0.1, high=2)", {"image": image}, seed)["image"].shape[:2] for seed in range(200)]
    assert min(shapes)[0] <= 5 and max(shapes) == (64, 64) and all(max(shape) <= 64 for shape in shapes)
    assert len({shape[1] for shape in shapes}) > 30 and (32, 64) not in shapes[:1]
    assert run("lsj(50, 60, low=1, high=1)", {"image": image})["image"].shape[:2] == (30, 60)
    drawn = {run("resize_short((20, 30))", {"image": image}, seed)["image"].shape[:2] for seed in range(20)}
    assert drawn == {(20, 40), (30, 60)}
    assert not parse_ops("resize_short(20, 60)", {})[0].random and parse_ops("resize_short((20, 30))", {})[0].random
    for spec, shape in (
        ("resize_short(20)", (20, 40)),
        ("resize_short(30, 50)", (25, 50)),
        ("resize_fit(100, 30)", (15, 30)),
        ("resize_fit(10, 99)", (10, 20)),
    ):
        assert run(spec, {"image": image})["image"].shape[:2] == shape
    for spec, message in (("resize_short(())", "short must be"), ("lsj(9, low=0)", "low"), ("box_crop(2)", "low must")):
        with pytest.raises(UserError, match=message):
            parse_ops(spec, {})


# -- boxes as arrays of one shape -------------------------------------------------------------------------------------


def test_pad_boxes():
    example = {"boxes": [[0, 0, 9, 9], [1, 1, 5, 5], [2, 2, 4, 4]], "class_ids": [5, 6, 7], "iscrowd": [0, 1, 0]}
    out = run("pad_boxes(5)", example | {"ignore": [False, False, True]})
    assert out["boxes"].dtype == np.float32 and out["class_ids"].dtype == np.int32 and out["objects"].dtype == bool
    np.testing.assert_array_equal(out["boxes"], [*example["boxes"], [0] * 4, [0] * 4])
    assert out["class_ids"].tolist() == [5, 6, 7, 0, 0] and out["boxes_cut"] == 0
    assert out["objects"].tolist() == [True, *[False] * 4] and out["ignore"].tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
    out = run("pad_boxes(5, crowd=background)", example)
    assert out["objects"].tolist() == [True, True, False, False, False] and not out["ignore"].any()
    assert out["class_ids"].tolist() == [5, 7, 0, 0, 0]
    none = run("pad_boxes(3)", {"boxes": np.zeros((0, 4)), "class_ids": []})
    assert none["boxes"].shape == (3, 4) and not none["objects"].any() and not none["ignore"].any()
    with pytest.raises(UserError, match="crowd='x': choose one of ignore, background"):
        parse_ops("pad_boxes(3, crowd=x)", {})
    with pytest.raises(BadRecord, match="it has 3 boxes, but 2 class_ids"):
        run("pad_boxes(5)", example | {"key": "k", "class_ids": [1, 2]})


@pytest.mark.parametrize(("most", "count"), [(16, 17), (16, 300), (64, 10000), (1, 3), (2, 9)])
def test_what_is_cut_is_ignored_never_background(most, count):
    rng = np.random.default_rng(count)
    corner = rng.uniform(0, 500, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 60, (count, 2))], 1).astype(np.float32)
    crowd = rng.random(count) < 0.1
    out = run(f"pad_boxes({most})", {"boxes": boxes, "class_ids": np.arange(count), "iscrowd": crowd})
    again = run(f"pad_boxes({most})", {"boxes": boxes, "class_ids": np.arange(count), "iscrowd": crowd})
    for name in ("boxes", "class_ids", "objects", "ignore"):
        np.testing.assert_array_equal(out[name], again[name])
        assert out[name].shape[0] == most
    kept = out["class_ids"][out["objects"]]
    assert out["boxes_cut"] == (~crowd).sum() - len(kept) and len(kept) == min(most - max(1, most // 8), (~crowd).sum())
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    np.testing.assert_array_equal(boxes[kept], out["boxes"][out["objects"]])
    rest = np.setdiff1d(np.arange(count), kept)
    if len(kept):
        assert areas[kept].min() >= areas[rest[~crowd[rest]]].max(initial=0)
    places = out["boxes"][out["ignore"]]
    inside = (places[None, :, :2] <= boxes[rest, None, :2]) & (places[None, :, 2:] >= boxes[rest, None, 2:])
    assert inside.all(-1).any(1).all()  # each is under one place that is ignored


def test_padding_and_the_longer_side():
    image = noise(30, 50)
    out = run("pad_image(40, 64, fill=9)", {"image": image})
    np.testing.assert_array_equal(out["image"][:30, :50], image)
    assert (out["image"][30:] == 9).all() and (out["image"][:, 50:] == 9).all()
    assert out["valid"].dtype == np.int32 and out["valid"].tolist() == [30, 50]
    several = run("pad_image(64, field=images)", {"images": [image, noise(64, 7)]})
    assert several["valid"].tolist() == [[30, 50], [64, 7]] and several["images"][1].shape == (64, 64, 3)
    video = run("resize(8, field=video)|pad_image(16, field=video)", {"video": np.stack([image, image])})
    assert video["valid"].tolist() == [8, 13] and video["video"].shape == (2, 16, 16, 3)
    with pytest.raises(BadRecord, match=r"'k'.*\[30, 50\] pixels high and wide, does not fit pad_image\(40, 49\)"):
        run("pad_image(40, 49)", {"key": "k", "image": image})
    with pytest.raises(UserError, match="'flip' comes after pad_image"):
        run("pad_image(64)|flip", {"image": image})
    for spec, shape in (
        ("resize_long(25)", (15, 25)),
        ("shrink(10, times=2)", (20, 33)),
        ("shrink(15)", (30, 50)),
        ("resize_long(100)", (60, 100)),
        ("resize_long(50, 15)", (15, 25)),
    ):
        assert run(spec, {"image": image})["image"].shape[:2] == shape
    assert run("resize_long(10)", {"image": noise(1, 90)})["image"].shape[:2] == (1, 10)


def test_the_warp_is_made_for_those_who_read_it():
    image = noise(20, 20)
    for spec, there in (("flip", True), ("flip|keep(image)", False), ("flip|keep(image, warp)", True)):
        assert ("warp" in run(spec, {"image": image})) == there
    # An op in between may hide in neither keep nor the end.
    ops = parse_ops("resize(8)|flip|keep(image, warp)|keep(image)", {})
    assert [op.gives_warp for op in ops[:2]] == [True, True]
    with pytest.raises(UserError, match="ops 'resize.*move pixels of image and of video"):
        parse_ops("resize(8)|resize(8, field=video)", {})
