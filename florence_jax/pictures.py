"""Bytes to an upright RGB picture on white, thumbnails, boxes drawn: one place for what models and people see."""

import base64
import contextlib
import functools
import importlib.util
import io
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from florence_jax.errors import UserError

WHITE = (255, 255, 255)
# First bytes of the usual formats: PIL otherwise tries a dozen readers on every image.
USUAL_FORMATS = {b"\xff\xd8": "JPEG", b"\x89P": "PNG", b"RI": "WEBP"}
HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
HEIF_INSTALL = "for HEIC pictures: pip install pillow-heif"
THUMBNAIL_SIDE = 96  # pixels of the longer side
EXIF_ORIENTATION = 274
# Orientations whose stored pictures are mirrored along x, and along y, of the upright one.
MIRRORED_X, MIRRORED_Y = frozenset((2, 3, 6, 7)), frozenset((3, 4, 7, 8))
REDUCTIONS = (8, 4, 2)  # by which Pillow divides the sides of a JPEG while it decodes
HEAT = (214, 40, 40)
TINY = 48  # pictures of fewer pixels are enlarged
MAX_SHOWN = 64_000_000  # pixels; a larger picture has no thumbnail


def draw_boxes(
    image: np.ndarray,
    boxes: Sequence[Sequence[float]],
    texts: Sequence[str],
    colours: Sequence[str],
    thin: Sequence[bool] = (),
    side: int = 420,
    most_texts: int = 24,
) -> Image.Image:
    """The picture, its longer side `side` pixels, with boxes on it.

    Args:
      image: uint8 (H, W, 3).
      boxes: (x1, y1, x2, y2) each, in pixels of `image`.
      texts: what is written beside each box; only the first `most_texts` are.
      colours: of each box, as '#rrggbb'.
      thin: boxes drawn with a thin line; () for none.
      side: pixels.
      most_texts: more would hide the picture.
    """
    scale = side / max(image.shape[:2])
    size = [max(1, round(edge * scale)) for edge in image.shape[1::-1]]
    canvas = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    scaled = [[value * scale for value in box] for box in boxes]
    for i, (x1, y1, x2, y2) in enumerate(scaled):
        width = 1 if thin and thin[i] else 2
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colours[i], width=width)
    taken: list[tuple[float, ...]] = []
    for (x, y, _, _), text, colour in list(zip(scaled, texts, colours, strict=True))[:most_texts]:
        _write_label(draw, font, taken, (x, y, text, colour), canvas.size)
    return canvas


def _write_label(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont,
    taken: list[tuple[float, ...]],
    label: tuple[float, float, str, str],
    size: tuple[int, int],
) -> None:
    """Writes a name at the box's corner, moved down past the names already there; not at all if there is no room."""
    x, y, text, colour = label
    width, height = draw.textlength(text, font) + 4, 15
    x, y = min(max(0, x), max(0, size[0] - width)), max(0, y)
    while any(x < r and x + width > left and y < b and y + height > t for left, t, r, b in taken):
        y += height
    if y + height > size[1]:
        return
    taken.append((x, y, x + width, y + height))
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + 2, y), text, fill="#fff", font=font)


def with_heat(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """The picture, greyer, with a weight for each cell of a grid over it in red: the largest is the brightest.

    Args:
      image: RGB. weights: float (h, w), at least 0.
    """
    heat = np.sqrt(np.maximum(weights, 0) / max(float(weights.max()), 1e-12))
    levels = Image.fromarray((255 * heat).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    grey = image.convert("L").convert("RGB")
    pale = Image.blend(grey, Image.new("RGB", image.size, WHITE), 0.35)
    return Image.composite(Image.new("RGB", image.size, HEAT), pale, levels.point(lambda level: level * 7 // 10))


def open_picture(data: bytes | BinaryIO | Image.Image) -> contextlib.AbstractContextManager[Image.Image]:
    """A picture to use in a `with` statement; PIL's own exceptions pass through.

    Of an open file only the first bytes are read until the pixels are asked for.

    Raises:
      UserError: for HEIC without pillow-heif.
    """
    if isinstance(data, Image.Image):
        return contextlib.nullcontext(data)  # its owner closes it
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    prefix = file.read(64)
    file.seek(0)
    if is_heif(prefix):
        register_heif()
    known = USUAL_FORMATS.get(prefix[:2])
    return Image.open(file, formats=[known] if known else None)


def trouble_of(error: Exception) -> str:
    """Why a picture cannot be read, for people, from what was raised."""
    unknown = isinstance(error, UnidentifiedImageError)  # its own words are of a place in memory
    return "no format that Pillow reads" if unknown else f"{type(error).__name__}: {error}"[:300]


def is_heif(prefix: bytes) -> bool:
    """Whether the first 64 bytes of a file are those of HEIC, which Pillow reads only with pillow-heif."""
    if prefix[4:8] != b"ftyp":
        return False
    general = prefix[8:12] in (b"mif1", b"msf1") and b"avi" not in prefix[16:]  # AVIF is of that family too
    return prefix[8:12] in HEIF_BRANDS or general


@functools.cache
def has_heif() -> bool:
    """Whether HEIC can be read here."""
    return importlib.util.find_spec("pillow_heif") is not None


@functools.cache
def register_heif() -> None:
    """Makes Pillow open HEIC. Raises UserError where pillow-heif is missing."""
    if not has_heif():
        raise UserError(HEIF_INSTALL)
    import pillow_heif

    pillow_heif.register_heif_opener()


def flat(image: Image.Image) -> Image.Image:
    """A loaded picture in 8 bits without transparency: 'L' where it is grey, else 'RGB'.

    Transparent parts are laid on white; 16-bit grey is given by its upper byte.
    """
    if image.mode.startswith("I"):  # converting would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, WHITE)
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


class Frame(NamedTuple):
    """The pixels of a picture file.

    Attributes:
      raw: stored (width, height).
      size: (width, height) as shown, that is after the EXIF orientation.
      orientation: EXIF's 1 to 8.
    """

    raw: tuple[int, int]
    size: tuple[int, int]
    orientation: int


def picture_frame(image: Image.Image) -> Frame:
    """Of an opened picture, whose pixels are not read."""
    orientation = image.getexif().get(EXIF_ORIENTATION, 1) if _may_be_turned(image) else 1
    if orientation not in range(5, 9):
        return Frame(image.size, image.size, orientation if orientation in range(1, 5) else 1)
    turned = image.size[::-1]
    # Pillow says the size of a TIFF as it is shown.
    return Frame(turned, image.size, orientation) if image.format == "TIFF" else Frame(image.size, turned, orientation)


def _may_be_turned(image: Image.Image) -> bool:
    return "exif" in image.info or image.format == "TIFF"


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture upright (EXIF), in RGB, transparent parts on white, 16-bit grey by its upper byte."""
    image.load()
    if _may_be_turned(image):
        image = ImageOps.exif_transpose(image)
    image = flat(image)
    return image if image.mode == "RGB" else image.convert("RGB")


Box = tuple[float, float, float, float]


def read_reduced(image: Image.Image, box: Box, size: tuple[int, int]) -> tuple[Image.Image, Box]:
    """`to_rgb` of an opened picture; of a JPEG with its sides divided by 2, 4 or 8 as far as that leaves pixels enough.

    Pixels that are not made cost no time. Undivided, the picture is bit for bit that of `to_rgb`.

    Args:
      image: opened, its pixels not read.
      box: left, top, right, bottom of the part that is wanted, in the upright picture.
      size: (width, height) of which the part keeps at least as many pixels.

    Returns:
      The picture and where the part lies in it.
    """
    frame, (left, top, right, bottom) = picture_frame(image), box
    most = min((right - left) / size[0], (bottom - top) / size[1])
    scale = next((scale for scale in REDUCTIONS if scale <= most), 1)
    # Its sides are rounded up; more than `scale` Pillow does not divide by for these numbers.
    if scale == 1 or image.draft(None, (frame.raw[0] // scale, frame.raw[1] // scale)) is None:
        return to_rgb(image), box
    picture = to_rgb(image)
    # A last pixel that is cut by the border of the source comes first where the stored picture is mirrored.
    x = picture.width - frame.size[0] / scale if frame.orientation in MIRRORED_X else 0.0
    y = picture.height - frame.size[1] / scale if frame.orientation in MIRRORED_Y else 0.0
    return picture, (left / scale + x, top / scale + y, right / scale + x, bottom / scale + y)


def upright_rgb(data: bytes | Image.Image) -> Image.Image:
    """`to_rgb` of an encoded picture; PIL's own exceptions pass through."""
    with open_picture(data) as image:
        return to_rgb(image)


def thumbnail(data: bytes | Image.Image | np.ndarray, side: int = THUMBNAIL_SIDE) -> str:
    """Data URI of a picture as the model sees it, its longer side at most `side` pixels.

    '' for one that cannot be read, or of more than `MAX_SHOWN` pixels.

    Args:
      data: encoded, or a PIL picture, or uint8 (H, W), (H, W, 1) or (H, W, 3). Tiny ones are enlarged.
      side: pixels.
    """
    try:
        if isinstance(data, np.ndarray):
            data = Image.fromarray(np.squeeze(data))
        with open_picture(data) as image:
            if image.width * image.height > MAX_SHOWN:
                return ""
            if isinstance(data, bytes) and TINY <= max(image.size) <= side and _is_plain(image):
                image.load()
                return data_uri(data, Image.MIME[image.format])
            image.draft("RGB", (side, side))
            image = to_rgb(image)
    except Exception:  # PIL's decoders raise a dozen unrelated types on corrupt data and for too many pixels
        return ""
    if (times := TINY // max(image.size)) > 1:
        image = image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
    image.thumbnail((side, side))
    return picture_uri(image)


def _is_plain(image: Image.Image) -> bool:
    """Whether a browser shows the file as the model sees it: one opaque upright RGB frame of a format it knows."""
    moves = getattr(image, "is_animated", False)
    shown = image.format in USUAL_FORMATS.values() and image.mode == "RGB" and "exif" not in image.info
    return shown and not moves and not image.has_transparency_data


def picture_uri(image: Image.Image) -> str:
    """An RGB picture as a data URI."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return data_uri(file.getvalue(), "image/webp")


def data_uri(data: bytes, mime: str) -> str:
    """The bytes as a URI that a page can hold."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
