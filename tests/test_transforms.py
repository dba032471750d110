"""Op strings and each op against a plain reference."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from stream_tools import ListSource

from florence_jax import pictures
from florence_jax.data.batches import BatchMaker
from florence_jax.data.ops import image as image_ops
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.ops.registry import OPS
from florence_jax.data.records import BadRecord
from florence_jax.errors import UserError

TEMPLATES = ("a photo of a {}.", "the {}")


class WordTokenizer:
    """Length-coded words; no tokens in a caption of only '-'."""

    length = 4

    def __call__(self, text):
        words = [len(word) for word in text.split() if word != "-"]
        if not words:
            raise UserError(f"caption {text!r} has no tokens")
        return np.array((words + [0] * 4)[:4], np.int32)

    def lengths(self, ids):
        return np.int32((ids != 0).sum())


CONTEXT = {"tokenizer": WordTokenizer(), "templates": TEMPLATES}


def rng(seed=0):
    return np.random.default_rng(seed)


def run(spec, example, seed=0, context=CONTEXT):
    generator = rng(seed)
    for op in parse_ops(spec, context):
        example = op(example, generator)
    return example


def noise(height=20, width=30, seed=0):
    return rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height=24, width=32):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([60 + 4 * x, 80 + 3 * y, 40 + 2 * (x + y)], -1).astype(np.uint8)


def encode(image, form="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


# -- op strings -------------------------------------------------------------------------------------------------------


def test_parse():
    ops = parse_ops(
        "decode|rrc(32, scale=(0.5, 1))|flip|jitter(0.2)|caption(caption=1, group=2)|keep(image, 'text')", {}
    )
    assert [op.name for op in ops] == ["decode", "rrc", "flip", "jitter", "caption", "keep"]
    assert [op.random for op in ops] == [False, True, True, True, True, False]
    assert (
        ops[1].scale == (0.5, 1.0)
        and ops[4].fields == {"caption": 1.0, "group": 2.0}
        and ops[5].names == ("image", "text")
    )
    assert parse_ops("", {}) == [] and parse_ops(" ", {}) == []
    assert parse_ops("flip()", {})[0].p == 0.5
    assert [op.random for op in parse_ops("prompt", {"templates": TEMPLATES}) + parse_ops("prompt", {})] == [
        True,
        False,
    ]
    assert not parse_ops("caption(keywords=1)", {})[0].random


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("decode|blur", "unknown op 'blur'; known: affine, "),
        ("decode||flip", "cannot parse"),
        ("rrc(", "cannot parse"),
        ("decode+flip", "is not an op"),
        ("a.b", "is not an op"),
        ("rrc", "missing a required argument|missing 1 required.*usage: rrc\\(size"),
        ("rrc(32, sale=1)", "unexpected keyword argument 'sale'.*usage"),
        ("rrc(0)", "positive whole number of pixels, not 0"),
        ("rrc(32.5)", "positive whole number"),
        ("rrc(32, scale=(0.5, 1.5))", "scale must be two numbers"),
        ("rrc(32, scale=0.5)", "scale must be two numbers"),
        ("rrc(32, scale=(1, 0.5))", "scale must be two numbers"),
        ("rrc(32, ratio=(0, 1))", "ratio must be two numbers"),
        ("rrc(32, interpolation=cubic)", "interpolation='cubic': choose one of bicubic, bilinear"),
        ("texts()", "name the caption fields of each text"),
        ("texts('caption=0')", "weight caption"),
        ("rrc(open('x'))", "neither a number, a tuple nor a name"),
        ("resize(True)", "positive whole number"),
        ("flip(1.5)", "p must be a number from 0 to 1"),
        ("flip(half)", "p must be a number"),
        ("gray(-1)", "p must be a number"),
        ("jitter(-1)", "brightness must be"),
        ("jitter(0, 0, 0, 0.7)", "hue must be"),
        ("crop(32, pad=-1)", "pad must be"),
        ("normalise(mean=(0, 0))", "three numbers"),
        ("normalise(std=(0, 1, 1))", "three numbers"),
        ("caption(caption=0)", "weight caption"),
        ("keep", "name the fields"),
        ("tokenize", "needs 'tokenizer'"),
    ],
)
def test_bad_op_strings(spec, message):
    with pytest.raises(UserError, match=message) as error:
        parse_ops(spec, {})
    assert "\n" not in str(error.value)


def test_every_op_can_be_pickled_and_leaves_its_input_alone():
    specs = (
        "decode resize(8) resize_exact(8,9) resize_long(8) shrink(2) center_crop(8) crop(8,pad=2) pad_image(30) rrc(8) "
        "flip(1) affine(9,shift=0.1) jitter(0.5,0.5,0.5,0.1) gray(1) normalise caption(caption=1,tags=1,tags_joined=1) "
        "label prompt tokenize texts('caption=1','tags=1') keep(image,text) resize_short(8) resize_fit(8) lsj(8) "
        "box_crop(0.5) pad_boxes(4)"
    ).split()
    own = {name for name, kind in OPS.items() if kind.__module__.startswith("florence_jax.")}  # not of other tests
    own -= {
        name for name, kind in OPS.items() if kind.__module__.endswith((".video", ".rand_augment"))
    }  # test_video_ops
    elsewhere = {"class_label", "class_prompt"}  # in test_classes
    elsewhere |= {"mask_words", "other", "caption_labels"}  # in test_language_ops, test_pairing
    elsewhere |= {"answer_targets", "stack"}  # in test_answers, test_question_sources
    elsewhere |= {"each_question", "both_pictures"}  # by the runs and shapes of test_vqa
    assert {spec.split("(")[0] for spec in specs} == own - elsewhere
    for spec in specs:
        (op,) = parse_ops(spec, CONTEXT)
        image = encode(noise()) if spec == "decode" else noise()
        example = {"key": "k", "image": image, "caption": "red fox", "tags": ["x", "y"], "text": np.zeros(4, np.int32)}
        example |= {"boxes": [[1, 2, 9, 9]], "class_ids": [0]} if "box" in spec else {}
        before = pickle.dumps(example)
        if isinstance(image, np.ndarray):
            image.flags.writeable = False
        first, second = op(example, rng(1)), pickle.loads(pickle.dumps(op))(example, rng(1))
        assert pickle.dumps(first) == pickle.dumps(second) and pickle.dumps(example) == before, spec


# -- images -----------------------------------------------------------------------------------------------------------


def decode(data):
    image = run("decode", {"key": "the key", "image": data})["image"]
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    return image


def test_decode_plain_and_grey():
    np.testing.assert_array_equal(decode(encode(noise())), noise())
    np.testing.assert_array_equal(decode(encode(noise(), "WEBP", lossless=True)), noise())
    np.testing.assert_array_equal(decode(encode(noise(), "BMP")), noise())
    assert np.abs(decode(encode(smooth(), "JPEG", quality=95)).astype(int) - smooth()).mean() < 3
    grey = noise()[..., 0]
    np.testing.assert_array_equal(decode(encode(grey)), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(decode(encode(grey.astype(np.uint16) * 257)), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(decode(grey), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(decode(noise()), noise())


def test_decode_puts_transparency_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 3] = 255
    rgba[2, :, 3] = 128
    for data in (encode(rgba), encode(rgba, "WEBP", lossless=True, exact=True)):
        image = decode(data)
        assert (image[:2] == 0).all() and (image[3] == 255).all() and (abs(image[2].astype(int) - 127) <= 1).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    np.testing.assert_array_equal(decode(encode(palette, transparency=1)), [[[10, 20, 30], [255, 255, 255]]])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_decode_applies_exif_orientation(form):
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, :8] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: white on top
    turned = decode(encode(image, form, exif=exif))
    assert turned.shape == (16, 8, 3) and (turned[:6] > 200).all() and (turned[10:] < 50).all()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        encode(noise())[:200],
        encode(noise(), "JPEG")[:300],
        encode(noise(), "WEBP")[:60],
        b"\xff\xd8" + b"x" * 50,
        encode(np.zeros((2, 500, 3), np.uint8)),
        None,
        "text",
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 7), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_decode_reports_bad_images(data):
    with pytest.raises(BadRecord, match="the key") as error:
        decode(data)
    assert "\n" not in str(error.value)


# -- JPEGs of which not all pixels are decoded ------------------------------------------------------------------------


def photograph(form="JPEG", mode="RGB", turn=1):
    """403 x 301 pixels stored, which neither 2 nor 4 nor 8 divides."""
    y, x = np.mgrid[:301, :403]
    waves = [127 + 100 * np.sin(x / 40 + y / 90), 127 + 100 * np.sin(y / 35), 127 + 80 * np.cos((x + y) / 60)]
    picture = Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turn
    several = {"save_all": True, "append_images": [picture]} if form == "MPO" else {}
    return encode(picture, form, quality=95, exif=exif, **several)


@pytest.fixture
def decoded(monkeypatch):
    """Widths, as stored, of the pictures that are decoded."""
    widths, to_rgb = [], pictures.to_rgb
    for module in (pictures, image_ops):
        monkeypatch.setattr(module, "to_rgb", lambda picture: (widths.append(picture.width), to_rgb(picture))[1])
    return widths


def reduced_and_whole(spec, example, seed=0):
    """What the ops leave, handed on from one to the next and each for itself, with the next number of the generator."""
    found = []
    for ops in (parse_ops(spec, {}), [op for name in spec.split("|") for op in parse_ops(name, {})]):
        generator, made = rng(seed), example
        for op in ops:
            made = op(made, generator)
        found.append(made | {"next": generator.random()})
    return found


@pytest.mark.parametrize("kind", [("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("MPO", "RGB")])
def test_a_training_crop_has_no_more_of_a_jpeg_decoded_than_it_needs(kind, decoded):
    specs = ("rrc(33)", "rrc(80, scale=(0.9, 1))", "lsj(64, low=0.5)", "shrink(30, times=1)", "resize_short((40, 50))")
    scales = set()
    for turn in range(1, 9):
        example = {"key": "k", "image": photograph(*kind, turn), "boxes": [[20, 30, 300, 290]]}
        for seed, spec in enumerate(specs):
            decoded.clear()
            reduced, whole = reduced_and_whole(f"decode|{spec}|flip(0)", example, seed)
            reduction = 1 / whole["warp"].diagonal()[:2].max()
            scales.add(scale := max(n for n in (1, 2, 4, 8) if n <= reduction))
            assert decoded == [-(-403 // scale), 403], spec
            for name in ("warp", "boxes", "next"):
                np.testing.assert_array_equal(reduced[name], whole[name])
            assert np.abs(reduced["image"].astype(int) - whole["image"]).max() <= 3, (turn, spec)
    assert {2, 4, 8} <= scales


@pytest.mark.parametrize(
    "ops",
    ["rrc(160, scale=(0.5, 1))", "resize(30)|center_crop(30)", "resize_exact(30)", "resize_short(30)", "resize_fit(30)"]
    + ["flip|rrc(30)", "box_crop|resize_exact(30)"],
)
def test_small_crops_and_evaluation_have_whole_jpegs(ops, decoded):
    reduced, whole = reduced_and_whole(f"decode|{ops}", {"key": "k", "image": photograph(turn=6)})
    assert decoded == [403, 403]
    np.testing.assert_array_equal(reduced["image"], whole["image"])


def test_unread_jpegs_serve_again_in_lists_and_in_memory(decoded):
    decode, crop = parse_ops("decode|rrc(33)", {})
    example = decode({"key": "k", "image": [photograph(), photograph(turn=6), encode(noise(50, 40))]}, rng())
    first, second = (crop(example, rng(3))["image"] for _ in range(2))
    assert [made.shape for made in first] == 3 * [(33, 33, 3)]
    np.testing.assert_array_equal(first, second)
    kept = image_ops.read_pictures(example)["image"]
    assert [picture.size for picture in kept] == [(403, 301), (301, 403), (40, 50)]
    ops = parse_ops("decode|rrc(33)|keep(image)", {})
    source = ListSource([{"key": "k", "image": photograph()}])
    maker = BatchMaker([source], ops, seed=0, on_corrupt="error", cache=1 << 20)
    decoded.clear()
    assert maker.train(0, [0, 0])["image"].shape == (2, 33, 33, 3)
    maker.train(2, [0])
    assert decoded == [403]


def test_bad_jpegs_are_bad_records_also_where_they_are_read_late(monkeypatch):
    for data in (photograph()[:4000], photograph()[:300], encode(np.zeros((2, 500, 3), np.uint8), "JPEG")):
        with pytest.raises(BadRecord, match="the key.*corrupt image"):
            run("decode|rrc(8)", {"key": "the key", "image": data})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 403 * 301 // 2 - 1)
    with pytest.raises(BadRecord, match="decompression bomb"):
        run("decode|rrc(8)", {"key": "the key", "image": photograph()})


def test_resizes_and_crops():
    image = noise(20, 30)
    pil = Image.fromarray(image)
    out = run("resize(10)", {"image": image})["image"]
    np.testing.assert_array_equal(out, np.asarray(pil.resize((15, 10), Image.Resampling.BICUBIC)))
    assert run("resize(10)", {"image": noise(31, 20)})["image"].shape == (15, 10, 3)
    assert run("resize_exact(7)", {"image": image})["image"].shape == (7, 7, 3)
    assert run("resize_exact(7, 9)", {"image": image})["image"].shape == (7, 9, 3)
    np.testing.assert_array_equal(run("center_crop(16)", {"image": image})["image"], image[2:18, 7:23])
    padded = run("center_crop(24)", {"image": image})["image"]
    assert padded.shape == (24, 24, 3) and (padded[:2] == 0).all() and (padded[22:] == 0).all()
    np.testing.assert_array_equal(padded[2:22], image[:, 3:27])


def test_random_crop_covers_all_places():
    image = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1).repeat(3, 2)
    seen = {run("crop(3, pad=1, fill=200)", {"image": image}, seed)["image"].tobytes() for seed in range(200)}
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=200)
    assert seen == {padded[t : t + 3, s : s + 3].tobytes() for t in range(3) for s in range(3)}
    assert run("crop(5)", {"image": image})["image"].shape == (5, 5, 3)


def test_rrc_boxes():
    (op,) = parse_ops("rrc(8, scale=(0.2, 0.4), ratio=(0.5, 2))", {})  # all such boxes fit
    generator = rng()
    boxes = np.array([op._box(120, 120, generator) for _ in range(3000)])
    left, top, right, bottom = boxes.T
    assert left.min() == 0 and top.min() == 0 and right.max() == 120 and bottom.max() == 120
    width, height = right - left, bottom - top
    share, ratio = width * height / 120**2, width / height
    assert 0.19 < share.min() < 0.21 and 0.39 < share.max() < 0.41 and abs(share.mean() - 0.3) < 0.01
    assert 0.48 < ratio.min() < 0.52 and 1.95 < ratio.max() < 2.05 and abs(np.log(ratio).mean()) < 0.05
    assert abs((left / np.maximum(120 - width, 1)).mean() - 0.5) < 0.03
    # Nothing fits: the centred largest box of the nearest ratio.
    (op,) = parse_ops("rrc(8, scale=(0.9, 1), ratio=(0.5, 2))", {})
    assert op._box(10, 90, generator) == (35, 0, 55, 10) and op._box(90, 10, generator) == (0, 35, 10, 55)


def test_rrc_is_the_resized_box():
    image = noise(40, 40)
    box = parse_ops("rrc(16)", {})[0]._box(40, 40, rng(5))
    for spec, name in (("rrc(16)", "BICUBIC"), ("rrc(16, interpolation=bilinear)", "BILINEAR")):
        reference = Image.fromarray(image).resize((16, 16), Image.Resampling[name], box=box)
        np.testing.assert_array_equal(run(spec, {"image": image}, 5)["image"], np.asarray(reference))
    np.testing.assert_array_equal(run("rrc(40, scale=(1, 1), ratio=(1, 1))", {"image": image})["image"], image)


def test_affine():
    image = smooth(40, 40)
    np.testing.assert_array_equal(run("affine(0)", {"image": image})["image"], image)
    small = run("affine(0, scale=(0.5, 0.5))", {"image": image})["image"]
    assert (small[:9] == 255).all() and (small[:, 31:] == 255).all()
    assert np.abs(small[11:29, 11:29].astype(int) - image[2:38:2, 2:38:2]).max() <= 6  # every second pixel
    moved = run("affine(0, shift=0.5)", {"image": image}, seed=1)["image"]
    y, x = np.argwhere((moved != 255).all(-1)).min(0)
    assert (y, x) != (0, 0) or (moved[-1] == 255).all() or (moved[:, -1] == 255).all()


def test_affine_rotates_about_the_centre():
    class Fixed:
        def __init__(self, *values):
            self.values = iter(values)

        def random(self):
            return next(self.values)

    image = smooth(40, 40)
    (op,) = parse_ops("affine(90, stretch=0.5)", {})
    quarter = op({"image": image}, Fixed(1.0, 0.0, 0.5, 0.5, 0.5))["image"]
    assert np.abs(quarter[1:-1, 1:-1].astype(int) - np.rot90(image, -1)[1:-1, 1:-1]).max() <= 4
    wide = op({"image": image}, Fixed(0.5, 0.0, 1.0, 0.5, 0.5))["image"]
    painted = (wide != 255).all(-1)
    assert painted.any(0).all() and not painted.any(1).all()  # wider than the frame, and lower


def test_flip():
    image = noise()
    np.testing.assert_array_equal(run("flip(1)", {"image": image})["image"], image[:, ::-1])
    np.testing.assert_array_equal(run("flip(0)", {"image": image})["image"], image)
    flipped = sum((run("flip", {"image": image}, seed)["image"] != image).any() for seed in range(400))
    assert 150 < flipped < 250


class Fixed:
    """A generator that gives these numbers."""

    def __init__(self, *values):
        self.values = list(values)

    def random(self):
        return self.values.pop(0)


@pytest.mark.parametrize(
    ("place", "enhance"), [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)]
)
@pytest.mark.parametrize("factor", [0.6, 0.85, 1.0, 1.3])
def test_jitter_is_pil_enhance(place, enhance, factor):
    (op,) = parse_ops("jitter(0.4, 0.4, 0.4)", {})
    draws = [0.5, 0.5, 0.5]  # factors of 1
    draws[place] = (factor - 0.6) / 0.8
    out = op({"image": smooth()}, Fixed(*draws))["image"].astype(int)
    reference = np.asarray(enhance(Image.fromarray(smooth())).enhance(factor)).astype(int)
    assert np.abs(out - reference).max() <= 2  # PIL rounds luma and result separately


def test_jitter_joint_map_and_hue():
    image = smooth().astype(np.float64)
    b, c, s = 1.2, 0.7, 1.1
    (op,) = parse_ops("jitter(0.4, 0.4, 0.4)", {})
    luma = np.array([0.299, 0.587, 0.114])
    reference = image * b
    reference = (reference - (reference @ luma).mean()) * c + (reference @ luma).mean()
    reference = s * reference + (1 - s) * (reference @ luma)[..., None]
    out = op({"image": smooth()}, Fixed(*((x - 0.6) / 0.8 for x in (b, c, s))))["image"]
    assert np.abs(out - reference.clip(0, 255)).max() <= 1
    # Hue: greys stay, luma stays, a half turn twice is the identity.
    (hue,) = parse_ops("jitter(0, 0, 0, 0.5)", {})
    grey = np.full((4, 4, 3), 77, np.uint8)
    np.testing.assert_array_equal(hue({"image": grey}, Fixed(0, 0, 0, 0.9))["image"], grey)
    mild = (96 + smooth() // 4).astype(np.uint8)
    turned = hue({"image": mild}, Fixed(0, 0, 0, 1.0))["image"]
    assert np.abs(turned @ luma - mild @ luma).max() < 1.5 and np.abs(turned.astype(int) - mild).max() > 10
    back = hue({"image": turned}, Fixed(0, 0, 0, 1.0))["image"]
    assert np.abs(back.astype(int) - mild).max() <= 2


def test_gray():
    out = run("gray(1)", {"image": noise()})["image"]
    reference = np.asarray(Image.fromarray(noise()).convert("L")).astype(int)
    assert (np.abs(out.astype(int) - reference[..., None]) <= 1).all()
    np.testing.assert_array_equal(run("gray(0)", {"image": noise()})["image"], noise())


def test_normalise():
    out = run("normalise(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))", {"image": noise()})["image"]
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, (noise() / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4], atol=1e-5)


def test_image_op_before_decode():
    with pytest.raises(UserError, match="'rrc' needs a decoded image: put decode before it"):
        run("rrc(8)", {"image": b"x"})


# -- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ops",
    [
        "decode|rrc(24)|flip(0.5)|jitter(0.3)",
        "decode|affine(8, scale=(0.8, 1.2))|resize(20)|flip(0.5)",
        "decode|flip(1.0)|resize_exact(16, 24)|center_crop(12)|flip(1.0)",
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
def test_handing_pictures_on_changes_no_pixel(ops, format):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(file, format)
    linked = one_by_one = {"key": "a", "image": file.getvalue()}
    rngs = [np.random.default_rng(1) for _ in range(2)]
    for op in parse_ops(ops, {}):
        linked = op(linked, rngs[0])
    for name in ops.split("|"):
        (op,) = parse_ops(name, {})
        one_by_one = op(one_by_one, rngs[1])
        assert isinstance(one_by_one["image"], np.ndarray)
    assert isinstance(linked["image"], np.ndarray)
    np.testing.assert_array_equal(linked["image"], one_by_one["image"])
