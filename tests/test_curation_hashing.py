"""Hashing: what is refused and why, determinism, and hashes that follow the picture and not its file."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from florence_jax.curation.ingest import hashing
from florence_jax.curation.ingest.hashing import Limits, hash_plane, measure


def scene(width=320, height=240, seed=0):
    """Smooth random colours with structure at many scales, as photographs have."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for side in (4, 8, 16, 32):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8).astype(np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float64) / side
    total = (total - total.min()) / (total.max() - total.min())
    return Image.fromarray((255 * total).astype(np.uint8))


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def distance(a, b):
    return (a["h64"] ^ b["h64"]).bit_count(), int.from_bytes(
        bytes(x ^ y for x, y in zip(a["h256"], b["h256"], strict=True)), "big"
    ).bit_count()


def view(measured, kind):
    return next({"h64": h64, "h256": h256} for name, h64, h256 in measured["probes"] if name == kind)


def bomb():
    """A 60-byte PNG that claims 50,000 x 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


JPEG = encode(scene(), "JPEG", quality=90)
FRAMES = [scene(40, 40, seed).convert("P") for seed in (1, 2)]
ANIMATION = encode(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:])


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (JPEG, "ok"),
        (b"", "empty"),
        (b"<html>not found</html>", "unsupported"),
        (b"\xff\xd8\xff" + bytes(100), "corrupt"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "corrupt"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "corrupt"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (encode(scene())[:-5000], "truncated"),
        (bomb(), "too_many_pixels"),
        (encode(Image.new("RGB", (2000, 3))), "too_narrow"),
        (ANIMATION, "animated"),
        (JPEG + bytes(64_000_000), "too_many_bytes"),
    ],
)
def test_status(data, status):
    result = measure(data)
    assert result["status"] == status
    assert (result["h256"] == b"") == (status != "ok") == (not result["probes"])
    assert len(result["image_id"]) == 16 and result["bytes"] == len(data)


def test_header_is_reported_of_what_is_refused():
    assert (measure(bomb())["width"], measure(bomb())["format"]) == (50_000, "PNG")
    assert measure(JPEG, Limits(max_pixels=1000))["height"] == 240
    assert measure(ANIMATION, Limits(animated=True))["status"] == "ok"


def test_never_raises_on_damaged_files():
    rng = np.random.default_rng(0)
    small = scene(64, 48)
    files = [encode(small, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    for data in files:
        for _ in range(25):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), 8):
                damaged[at] = rng.integers(256)
            assert isinstance(measure(bytes(damaged[: rng.integers(1, len(data) + 1)]))["status"], str)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_format_and_size_hardly_matter(kind):
    plain = measure(encode(scene(700, 525)))
    d64, d256 = distance(plain, measure(encode(scene(700, 525).resize((350, 262), Image.Resampling.LANCZOS), kind)))
    assert d64 <= 2 and d256 <= 20


def test_modes():
    image = scene()
    plain = measure(encode(image))
    grey = measure(encode(image.convert("L")))
    assert grey["mode"] == "L" and distance(plain, grey)[0] <= 2
    cmyk = measure(encode(image.convert("CMYK"), "JPEG", quality=95))
    assert cmyk["mode"] == "CMYK" and distance(plain, cmyk)[0] <= 4
    wide = measure(encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)))
    assert distance(grey, wide) == (0, 0)
    assert not plain["has_alpha"]


def test_transparency_is_white():
    image = scene()
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (160, 0, 320, 240))
    shown = image.copy()
    shown.paste((255, 255, 255), (160, 0, 320, 240))
    clear = image.copy()
    clear.putalpha(alpha)
    result = measure(encode(clear))
    assert result["has_alpha"] and distance(result, measure(encode(shown))) == (0, 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, kind):
    image = scene()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(hashing.TRANSPOSE[orientation]) if orientation > 1 else image
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    exif[0x0112] = undo
    result = measure(encode(stored, kind, exif=exif))
    assert (result["width"], result["height"], result["orientation"]) == (320, 240, undo)
    assert distance(result, measure(encode(image)))[1] <= 6
    assert result["aspect"] == pytest.approx(4 / 3)


def test_half_of_the_bits_are_set_and_distances_even():
    first, second = measure(encode(scene(seed=1))), measure(encode(scene(seed=2)))
    assert first["h64"].bit_count() == 32
    assert sum(byte.bit_count() for byte in first["h256"]) == 128
    d64, d256 = distance(first, second)
    assert d64 % 2 == d256 % 2 == 0 and d64 > 10 and d256 > 80


def test_views():
    image = scene()
    plain = measure(encode(image))
    flip = measure(encode(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    assert distance(view(plain, "flip"), flip)[1] <= 2
    assert "trimmed" not in [kind for kind, _, _ in plain["probes"]]
    framed = Image.new("RGB", (400, 340), (250, 250, 250))
    framed.paste(image, (40, 50))
    result = measure(encode(framed))
    assert distance(view(result, "trimmed"), plain)[1] <= 20 < distance(result, plain)[1]
    assert result["aspect"] == pytest.approx(320 / 240, rel=0.03)
    cut = measure(encode(image.crop((16, 12, 304, 228))))  # 90 % of each side
    nearest = min(distance(view(plain, f"crop{n}"), cut)[1] for n in (93, 90))
    assert nearest <= 30 < distance(plain, cut)[1]


def test_cosines_are_exact_whole_numbers():
    for grid in (np.full((96, 96), 255.0), np.random.default_rng(0).integers(0, 256, (96, 96)).astype(float)):
        expected = hashing.COSINES[0].astype(int).tolist()
        row = [sum(c * int(v) for c, v in zip(expected[3], grid[:, x], strict=True)) for x in range(96)]
        value = sum(c * v for c, v in zip(expected[5], row, strict=True))
        assert hashing.cosines(grid)[0, 3, 5] == value
    assert np.abs(hashing.cosines(np.full((96, 96), 255.0))).max() < 2**53


def test_cosines_are_those_of_the_picture():
    t = (np.arange(96) + 0.5) / 96
    grid = np.rint(128 + 100 * np.cos(np.pi * 2 * t)[:, None] * np.cos(np.pi * 3 * t))
    coefficients = hashing.cosines(grid)[0] / hashing.SCALE**2
    coefficients[0, 0] = 0
    assert np.unravel_index(np.abs(coefficients).argmax(), (16, 16)) == (2, 3)
    assert coefficients[2, 3] == pytest.approx(100, rel=0.01)


def test_detail_tells_flat_from_textured():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (200, 1)))
    for plain in (Image.new("L", (200, 200), 90), ramp):
        assert hash_plane(plain, 1.0)["detail"] < 0.1
    assert hash_plane(scene().convert("L"), 1.0)["detail"] > 0.5


def test_border_needs_a_picture_inside():
    plane = np.full((100, 100), 200, np.uint8)
    assert hashing.trim(plane) is None
    plane[40:50, 40:50] = 0
    assert hashing.trim(plane) is None  # a dot: too small to stand for the picture
    plane[20:80, 10:90] = np.arange(80, dtype=np.uint8) * 3
    assert hashing.trim(plane) == (10, 20, 90, 80)
