"""Decode once, measure once: what every later decision about a picture reads, perceptual hashes included.

A picture is reduced to a 96 x 96 grey plane and to 16 x 16 of its lowest cosine coefficients.
`h256` has a bit for each coefficient above their median; `h64` does the same for the lowest 8 x 8. A median threshold
sets exactly half of the bits, so distances are even. The bits of `h64` are in a fixed random order, so that any run of
them mixes low and high frequencies: the blocks of a covering design (join.py) are then equally selective.

The cosines are rounded to integers and the sums stay below 2^53, so that float64 arithmetic is exact: a hash does not
depend on the BLAS library, its threads or the batch, only on the decoded pixels.

Hashes of other views of the picture come at the price of a small matrix product, as `probes`:
  `trimmed`            without its uniform border, if it has one;
  `flip`               mirrored left to right (of the trimmed picture);
  `crop96` ... `crop80`  the central 96 to 80 % of each side, of the trimmed picture; of the whole one
                         too if they differ, since what looks like a border may be a sky.

Hashes see outlines. What they do not see, colours and small contents, stands in `look`: small grids of grey levels and
of colours, of the whole picture and of the trimmed one, with which a pair of equal hashes is checked (dedup/views.py).
"""

import dataclasses
import hashlib
import io
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from florence_jax.data.sources.picture_files import PREFIX_BYTES, picture_reader
from florence_jax.pictures import flat

# Readers by first bytes. They are called directly: `Image.open` would warn about, or refuse, a large picture before
# its size is known to us, and would try formats that no web page shows.
PICTURE_READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"GIF8", GifImagePlugin.GifImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
)
OTHER_FORMATS = frozenset(("AVIF", "HEIF", "JPEG2000", "PPM"))  # whose first bytes are not always the same
ORIENTATION = 0x0112  # the EXIF tag
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DECODE_SIDE = 128  # the shorter side of the decoded picture is at least this, where the picture has it
GRID = 96  # side of the plane whose cosine transform is taken
SIDE = 16  # coefficients of h256 per axis
CROPS = (1.0, 0.964, 0.929, 0.896, 0.864, 0.833, 0.803)  # of each side, 3.6 % apart; the first is the whole picture
CROP_KINDS = tuple(f"crop{round(100 * crop)}" for crop in CROPS[1:])
# The views of a picture without and with a border, itself first; what follows "trimmed" shows the trimmed picture, but
# the last crops the whole one.
VIEW_KINDS = (("", "flip", *CROP_KINDS), ("", "trimmed", "flip", *CROP_KINDS, *CROP_KINDS))
SCALE = 2.0**21  # of the integer cosines: 255 * (2 * SCALE)^2 < 2^53
BIT_ORDER = np.random.default_rng(2111_11432).permutation(64)
BORDER_RANGE = 20  # grey levels: a border's rows vary less than this within and among themselves
MIN_TRIMMED = 24  # pixels of the decoded picture; a smaller rest is not worth trimming to
LUMA_SIDE, CHROMA_SIDE = 16, 8  # of the grids of a look: grey levels, and the two colour differences
PICTURE_LOOK_BYTES = LUMA_SIDE**2 + 2 * CHROMA_SIDE**2  # of one picture, whole or trimmed
FREQUENT_LEVELS = 4  # grey levels that a drawing consists of, for the most part
BLACK_LEVELS = 24  # darker levels do not count there: a stage or a night sky is no drawing


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is not decoded.

    Attributes:
      max_pixels: width x height as the header states them; more is a decompression bomb.
      max_bytes: of the file.
      max_aspect: longer side over shorter side; a line of pixels has no thumbnail.
      animated: whether an animation is measured by its first frame, instead of refused.
    """

    max_pixels: int = 64_000_000
    max_bytes: int = 64_000_000
    max_aspect: float = 100.0
    animated: bool = False

    def by_status(self) -> dict[str, float]:
        """The limits by the `status` of the pictures beyond them."""
        return {
            "too_many_pixels": self.max_pixels,
            "too_many_bytes": self.max_bytes,
            "too_narrow": self.max_aspect,
        }


DEFAULT_LIMITS = Limits()


class Unusable(Exception):
    """A picture that is not measured further: the reason code is its argument."""


def measure(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """Everything that curation needs to know of a picture. Never raises on bad data: `status` says what is wrong.

    Args:
      data: an encoded picture (JPEG, PNG, WebP, GIF, BMP, TIFF).
      limits: what is refused before its pixels are decoded.

    Returns:
      `status`: 'ok', or a reason: 'empty', 'too_many_bytes', 'unsupported' (format), 'corrupt', 'truncated',
        'too_many_pixels', 'too_narrow', 'animated'.
      `image_id`: the first 16 bytes of the SHA-256 of `data`. `bytes`: their number.
      `width`, `height`: pixels, after the EXIF orientation is applied (0 where the header is unreadable).
      `format`, `mode`: Pillow's names, '' if unreadable. `orientation`: EXIF, 1 to 8. `has_alpha`.
      `h64`: uint64 as int. `h256`: 32 bytes. Both of the whole picture; 0 and b'' where the status is not 'ok'.
      `detail`: grey levels; how far coefficients typically are from the median that decides their bits. Near zero for
        flat pictures, smooth gradients and single strokes, whose hashes mean little.
      `flatness`: share of the four most frequent grey levels in the trimmed picture, black ones left out; a drawing's
        is large.
      `look`: PICTURE_LOOK_BYTES of the whole picture, and as many of the trimmed one where they differ: 16 x 16 grey
        levels, 8 x 8 of either colour difference (Cb, Cr, 128 for grey). b'' where the status is not 'ok'.
      `aspect`: width over height of the trimmed picture.
      `probes`: list of (kind, h64, h256) of other views, see the module's docstring.
    """
    result: dict[str, Any] = {
        "status": "ok",
        "width": 0,
        "height": 0,
        "bytes": len(data),
        "format": "",
        "mode": "",
        "orientation": 1,
        "has_alpha": False,
        "image_id": hashlib.sha256(data).digest()[:16],
        "h64": 0,
        "h256": b"",
        "detail": 0.0,
        "flatness": 0.0,
        "look": b"",
        "aspect": 0.0,
        "probes": [],
    }
    try:
        plane, colours = _decode(data, limits, result)
    except Unusable as error:
        result["status"] = str(error)
    except Exception as error:  # Pillow's readers raise a dozen unrelated types on corrupt data
        result["status"] = "truncated" if _is_truncation(error) else "corrupt"
    else:
        result.update(hash_plane(plane, result["width"] / result["height"], colours))
    return result


def _is_truncation(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, EOFError) or "truncated" in text or "not enough" in text or "unexpected end" in text


Planes = tuple[Image.Image, tuple[Image.Image, ...]]  # grey; Cb and Cr, or () where all is grey


def _decode(data: bytes, limits: Limits, result: dict[str, Any]) -> Planes:
    """Fills in the header's facts and returns the picture, upright, on white, reduced."""
    if not data:
        raise Unusable("empty")
    if len(data) > limits.max_bytes:
        raise Unusable("too_many_bytes")
    reader = next((reader for prefix, reader in PICTURE_READERS if data.startswith(prefix)), None)
    reader = reader or picture_reader(data[:PREFIX_BYTES], OTHER_FORMATS)
    if reader is None:
        raise Unusable("unsupported")
    with reader(io.BytesIO(data)) as image:
        orientation = _orientation(image)
        tiff = image.format == "TIFF"  # Pillow turns it when it decodes, and since version 12 gives its size upright
        width, height = image.size[::-1] if orientation > 4 and not tiff else image.size
        alpha = image.has_transparency_data
        result.update(width=width, height=height, format=image.format, mode=image.mode)
        result.update(orientation=orientation, has_alpha=alpha)
        if width * height > limits.max_pixels:
            raise Unusable("too_many_pixels")
        if max(width, height) > limits.max_aspect * min(width, height):
            raise Unusable("too_narrow")
        if not limits.animated and getattr(image, "is_animated", False):
            raise Unusable("animated")
        plane, colours = _to_planes(image)
        if tiff:
            result.update(width=image.width, height=image.height)
    if orientation in TRANSPOSE and not tiff:
        turn = TRANSPOSE[orientation]
        return plane.transpose(turn), tuple(colour.transpose(turn) for colour in colours)
    return plane, colours


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info and image.format != "TIFF":
        return 1
    value = image.getexif().get(ORIENTATION, 1)
    return value if value in TRANSPOSE else 1


def _to_planes(image: Image.Image) -> Planes:
    """Decodes to luma and colour differences (ITU-R 601), transparency on white, both sides divided by one number."""
    if image.format == "JPEG":
        image.draft("YCbCr", (DECODE_SIDE, DECODE_SIDE))  # as they are stored
    image.load()
    if image.mode != "YCbCr":
        image = flat(image)
    factor = min(image.size) // DECODE_SIDE
    if factor > 1:
        image = image.reduce(factor)
    if image.mode == "L":
        return image, ()
    luma, *colours = image.convert("YCbCr").split()
    return luma if image.mode == "YCbCr" else image.convert("L"), tuple(colours)


def hash_plane(plane: Image.Image, aspect: float, colours: tuple[Image.Image, ...] = ()) -> dict[str, Any]:
    """Hashes and look of a picture.

    Args:
      plane: its luma, mode 'L', any size. aspect: width over height of the picture that it was reduced from.
      colours: Cb and Cr, of the size of `plane`; () for a grey picture.

    Returns:
      `h64`, `h256`, `detail`, `flatness`, `look`, `aspect`, `probes` as `measure` documents them.
    """
    pixels = np.asarray(plane)
    box = trim(pixels)
    grid = _grid(plane, None)
    whole = views = cosines(grid)
    looks = _look(grid, colours, None)
    extra = []
    if box is not None:
        grid = _grid(plane, box)
        views = cosines(grid)
        looks += _look(grid, colours, box)
        pixels = pixels[box[1] : box[3], box[0] : box[2]]
        extra = [views[:1]]
        aspect *= (box[2] - box[0]) / plane.width / ((box[3] - box[1]) / plane.height)
    stack = [whole[:1], *extra, views[:1] * FLIP, views[1:], *([whole[1:]] if box is not None else [])]
    h64, h256 = hash_bits(np.concatenate(stack))
    values = views[0].ravel()
    margins = np.abs(values - np.partition(values, 127)[127])
    levels = np.bincount(pixels.ravel(), minlength=256)[BLACK_LEVELS:]
    return {
        "h64": int(h64[0]),
        "h256": h256[0].tobytes(),
        "detail": float(np.partition(margins, 127)[127]) / SCALE**2,
        "flatness": float(np.partition(levels, -FREQUENT_LEVELS)[-FREQUENT_LEVELS:].sum() / pixels.size),
        "look": looks,
        "aspect": aspect,
        "probes": [(kind, int(h64[i]), h256[i].tobytes()) for i, kind in enumerate(VIEW_KINDS[bool(extra)]) if i],
    }


def trim(plane: np.ndarray) -> tuple[int, int, int, int] | None:
    """The box (left, upper, right, lower) inside the uniform border of uint8 (H, W); None without such a border."""
    top, bottom = _extent(plane.max(axis=1), plane.min(axis=1))
    rows = plane[top:bottom]
    if not len(rows):
        return None
    left, right = _extent(rows.max(axis=0), rows.min(axis=0))
    if right - left < MIN_TRIMMED or bottom - top < MIN_TRIMMED:
        return None
    return (left, top, right, bottom) if (bottom - top, right - left) != plane.shape else None


def _extent(high: np.ndarray, low: np.ndarray) -> tuple[int, int]:
    """First and last + 1 of the lines that do not belong to a border, from each line's extreme grey levels."""
    high, low = high.astype(np.int16), low.astype(np.int16)
    ends = []
    for upper, lower in ((high, low), (high[::-1], low[::-1])):
        inside = np.maximum.accumulate(upper) - np.minimum.accumulate(lower) > BORDER_RANGE
        ends.append(int(inside.argmax()) if inside.any() else len(inside))
    return ends[0], len(high) - ends[1]


def _grid(plane: Image.Image, box: tuple[int, int, int, int] | None) -> np.ndarray:
    resized = plane.resize((GRID, GRID), Image.Resampling.BILINEAR, box=box)  # a triangle as wide as the reduction
    return np.asarray(resized).astype(np.float64)


def _look(grid: np.ndarray, colours: tuple[Image.Image, ...], box: tuple[int, int, int, int] | None) -> bytes:
    """PICTURE_LOOK_BYTES of the picture inside the box, whose `_grid` is given."""
    step = GRID // LUMA_SIDE
    sums = grid.reshape(LUMA_SIDE, step, LUMA_SIDE, step).sum(axis=(1, 3))  # whole numbers
    luma = np.floor(sums / step**2 + 0.5).astype(np.uint8).tobytes()
    size = (CHROMA_SIDE, CHROMA_SIDE)
    small = [colour.resize(size, Image.Resampling.BILINEAR, box=box).tobytes() for colour in colours]
    return luma + (b"".join(small) or b"\x80" * (2 * CHROMA_SIDE**2))


def _cosine_rows() -> np.ndarray:
    """(crops, SIDE, GRID): integrals over each pixel of 2 cos(pi k t), t from 0 to 1 across the crop, k < SIDE."""
    rows = np.zeros((len(CROPS), SIDE, GRID))
    k = np.pi * np.arange(1, SIDE)[:, None]
    for i, crop in enumerate(CROPS):
        edges = ((np.arange(GRID + 1) / GRID - 0.5) / crop + 0.5).clip(0, 1)
        rows[i, 0] = 2 * np.diff(edges)
        rows[i, 1:] = 2 * np.diff(np.sin(k * edges), axis=1) / k
    return np.rint(rows * SCALE)


COSINES = _cosine_rows()
COSINES_TURNED = np.ascontiguousarray(COSINES.transpose(0, 2, 1))
FLIP = np.where(np.arange(SIDE) % 2, -1.0, 1.0)  # of horizontal coefficients, when left and right change places


def cosines(grid: np.ndarray) -> np.ndarray:
    """Cosine coefficients of the central crops.

    Args:
      grid: float64 (GRID, GRID), whole grey levels.

    Returns:
      float64 (len(CROPS), SIDE, SIDE), whole numbers in units of SCALE^-2 grey levels; [crop, vertical, horizontal].
    """
    # Crop by crop: products so small stay in this thread. One of all crops is handed to BLAS threads, for which every
    # picture then waits where as many processes as cores do the same.
    return COSINES @ grid @ COSINES_TURNED


def hash_bits(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median-thresholded bits of float (n, SIDE, SIDE): h64 as uint64 (n,), h256 as uint8 (n, 32)."""
    n = len(coefficients)
    wide = coefficients.reshape(n, -1)
    h256 = np.packbits(wide > np.partition(wide, 127, axis=1)[:, 127:128], axis=1)
    low = coefficients[:, :8, :8].reshape(n, 64).take(BIT_ORDER, axis=1)
    h64 = np.packbits(low > np.partition(low, 31, axis=1)[:, 31:32], axis=1)
    return h64.view(">u8")[:, 0].astype(np.uint64), h256


def bit_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Hamming distance of uint64 arrays (..., words), summed over the last axis; any broadcastable shapes."""
    return np.bitwise_count(a ^ b).sum(axis=-1, dtype=np.int32)
