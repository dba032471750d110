"""Pictures and pages: what a page shows is what the model sees; one way to write tables and figures."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from florence_jax import pictures
from florence_jax.data.ops.image import Decode
from florence_jax.page import Html, figure_html, page, table_html
from florence_jax.pictures import thumbnail, upright_rgb


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shown(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def two_halves(mode, left, right):
    image = Image.new(mode, (64, 48), left)
    image.paste(right, (32, 0, 64, 48))
    return image


def kinds():
    exif = Image.Exif()
    exif[0x0112] = 6
    red, white = (255, 0, 0), (255, 255, 255)
    yield "orientation", encoded(two_halves("RGB", red, white), "JPEG", exif=exif, quality=95)
    yield "alpha", encoded(two_halves("RGBA", (255, 0, 0, 255), (0, 0, 0, 0)))
    yield "colour key", encoded(two_halves("RGB", red, (0, 0, 9)), transparency=(0, 0, 9))
    yield "palette", encoded(two_halves("P", 0, 1), transparency=1)
    yield "16 bit", encoded(Image.fromarray(np.uint16([[0, 65535]] * 2).repeat(32, 0).repeat(32, 1)))
    frames = [two_halves("RGB", red, white), Image.new("RGB", (64, 48), (0, 0, 255))]
    yield "animated", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    yield "plain", encoded(two_halves("RGB", red, white))


@pytest.mark.parametrize(("kind", "data"), list(kinds()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_thumbnail_shows_what_the_model_sees(kind, data):
    seen = Decode()({"key": "x", "image": data}, np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(np.asarray(upright_rgb(data)), seen)
    found = np.asarray(shown(thumbnail(data)))
    assert found.shape == seen.shape  # 64 pixels: not reduced
    assert np.abs(found.astype(int) - seen).mean() < 6
    assert thumbnail(data).startswith("data:image/png" if kind == "plain" else "data:image/webp")
    assert max(shown(thumbnail(data, side=20)).size) == 20


def test_pictures_that_cannot_be_shown(monkeypatch):
    assert thumbnail(b"broken") == "" and thumbnail(encoded(Image.new("RGB", (80, 80)), "JPEG")[:-90]) == ""
    monkeypatch.setattr(pictures, "MAX_SHOWN", 99)
    assert thumbnail(encoded(Image.new("L", (10, 10)))) == "" and thumbnail(encoded(Image.new("L", (9, 10))))


def test_tables_escape_texts_and_put_numbers_at_the_right():
    table = table_html(("name", "<n>", "bar"), [("a&b", 1234, Html("<i>x</i>")), ("c", 0.25, "")])
    assert "<td>a&amp;b</td>" in table and '<td class="n">1,234</td>' in table and '<td class="n">0.250</td>' in table
    assert '<th class="n">&lt;n&gt;</th>' in table and "<td><i>x</i></td>" in table and "<th>name</th>" in table
    assert table_html(("a",), []) == ""


def test_figures_and_pages_hold_no_link():
    figure = figure_html(["data:x", ""], "<b>", Html("<br>"), kind="first")
    assert figure.count("<img") == 1 and "no picture" in figure and "&lt;b&gt;<span><br></span>" in figure
    text = page("A & B", figure)
    assert text.startswith("<!doctype html>") and text.count("<h1>A &amp; B</h1>") == 1 and "http" not in text
