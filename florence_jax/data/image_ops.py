"""Ops on images, uint8 (H, W, 3) from `decode` on; importing this module registers them.

Between two ops that both work on PIL pictures the picture itself is handed on (`link_pictures`): an array made of it
and a picture made of that again would be two copies for nothing.
"""

import abc
import contextlib
import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from florence_jax.data.registry import Example, Op, checked_number, key_of, op
from florence_jax.data.sources import BadRecord
from florence_jax.errors import UserError

GRAY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601 luma, as in PIL
IDENTITY = np.eye(3, dtype=np.float32)
# Luma and chroma (Y, I, Q) of R, G, B, for rotations of the hue.
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
WHITE = (255, 255, 255)
BICUBIC = Image.Resampling.BICUBIC
INTERPOLATIONS = {"bicubic": BICUBIC, "bilinear": Image.Resampling.BILINEAR}  # of PIL, antialiased
MAX_ASPECT = 100  # of a picture; a line of pixels would be resized to gigabytes
# First bytes of the usual formats: PIL otherwise tries a dozen readers on every image.
MAGIC = {b"\xff\xd8": "JPEG", b"\x89P": "PNG", b"RI": "WEBP"}


@op("decode")
class Decode(Op):
    """Encoded bytes (JPEG, PNG, WebP, ...), a PIL picture or uint8 (H, W[, 1 or 3]) -> uint8 (H, W, 3), RGB.

    EXIF orientation is applied, transparency is put on white, 16-bit grey is scaled, of animations the first frame is
    taken. Corrupt images and those narrower than 1:100 are bad records.

    Attributes:
      gives_picture: see `PictureOp`.
    """

    gives_picture = False

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises BadRecord for an image that cannot be decoded."""
        data = example.get("image")
        if isinstance(data, np.ndarray):
            return example | {"image": self._from_array(example, data)}
        if not isinstance(data, (bytes, Image.Image)):
            raise BadRecord(key_of(example), f"its image is {type(data).__name__}, not bytes")
        try:
            with _opened(data) as image:
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise ValueError(f"{image.width} x {image.height} pixels are too narrow")
                picture = _to_rgb(image)
                return example | {"image": picture if self.gives_picture else np.asarray(picture)}
        except Exception as error:  # PIL's decoders raise a dozen unrelated types on corrupt data
            raise BadRecord(key_of(example), f"corrupt image ({type(error).__name__}: {error})"[:300]) from error

    @staticmethod
    def _from_array(example: Example, data: np.ndarray) -> np.ndarray:
        data = data[..., None] if data.ndim == 2 else data
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] not in (1, 3) or not data.size:
            raise BadRecord(key_of(example), f"its image is {data.dtype} {data.shape}, not uint8 (H, W, 1 or 3)")
        return np.repeat(data, 3, axis=2) if data.shape[2] == 1 else data


def _opened(data: bytes | Image.Image) -> contextlib.AbstractContextManager[Image.Image]:
    if isinstance(data, Image.Image):
        return contextlib.nullcontext(data)  # its owner closes it
    known = MAGIC.get(data[:2])
    return Image.open(io.BytesIO(data), formats=[known] if known else None)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if "exif" in image.info or image.format == "TIFF":
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey: converting would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, WHITE)
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


class ImageOp(Op):
    """An op on the image alone: a subclass defines `_image`."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises UserError if the image is not decoded yet."""
        image = example.get("image")
        if not isinstance(image, np.ndarray):
            raise UserError(f"op {self.name!r} needs a decoded image: put decode before it")
        return example | {"image": self._image(image, rng)}

    @abc.abstractmethod
    def _image(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 (H, W, 3) -> the transformed image."""


class PictureOp(Op):
    """An op on the image as PIL has it: a subclass defines `_picture`. Takes and gives arrays as well.

    Attributes:
      gives_picture: whether the image is left as a PIL picture, RGB, for the next op; `link_pictures` sets it.
    """

    gives_picture = False

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises UserError if the image is not decoded yet."""
        image = example.get("image")
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        elif not isinstance(image, Image.Image):
            raise UserError(f"op {self.name!r} needs a decoded image: put decode before it")
        image = self._picture(image, rng)
        return example | {"image": image if self.gives_picture else np.asarray(image)}

    @abc.abstractmethod
    def _picture(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """RGB picture -> the transformed picture; the one given is not changed."""


def link_pictures(ops: Sequence[Op]) -> None:
    """Makes each op that is followed by a `PictureOp` hand its picture on; changes no pixel."""
    for first, after in itertools.pairwise(ops):
        if isinstance(first, (Decode, PictureOp)):
            first.gives_picture = isinstance(after, PictureOp)


@op("resize")
class Resize(PictureOp):
    """Bicubic (antialiased) resize: the shorter side becomes `size`, the other keeps the aspect ratio, rounded down."""

    def __init__(self, size: int):
        self.size = _size(size)

    def _picture(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        short = min(image.size)
        return image.resize(tuple(self.size * side // short for side in image.size), BICUBIC)


@op("resize_exact")
class ResizeExact(PictureOp):
    """Bicubic (antialiased) resize to (height, width), or (height, height), whatever the aspect ratio."""

    def __init__(self, height: int, width: int | None = None):
        self.size = (_size(height if width is None else width), _size(height))

    def _picture(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return image.resize(self.size, BICUBIC)


@op("center_crop")
class CenterCrop(ImageOp):
    """The central (size, size) pixels; smaller images are padded with black, as in torchvision."""

    def __init__(self, size: int):
        self.size = _size(size)

    def _image(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        image = _pad_to(image, self.size, fill=0)
        # Half a pixel is rounded to even, as in torchvision.
        top, left = (round((side - self.size) / 2) for side in image.shape[:2])
        return image[top : top + self.size, left : left + self.size]


@op("crop")
class Crop(ImageOp):
    """Random (size, size) pixels after padding every side by `pad` pixels of `fill`, and as needed to reach `size`."""

    random = True

    def __init__(self, size: int, pad: int = 0, fill: int = 0):
        self.size = _size(size)
        self.pad, self.fill = int(checked_number("pad", pad, 0, 4096)), int(checked_number("fill", fill, 0, 255))

    def _image(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.pad:
            image = np.pad(image, ((self.pad, self.pad), (self.pad, self.pad), (0, 0)), constant_values=self.fill)
        image = _pad_to(image, self.size, self.fill)
        top, left = (int(rng.integers(side - self.size + 1)) for side in image.shape[:2])
        return image[top : top + self.size, left : left + self.size]


@op("rrc")
class RandomResizedCrop(PictureOp):
    """A random box, resized (antialiased) to (size, size): Inception's crop (Szegedy et al. 2014).

    As in torchvision: area and log aspect ratio are uniform; ten tries for a box that fits, then a centred one.

    Args:
      size: pixels.
      scale: range of the box's share of the image's area.
      ratio: range of the box's width / height.
      interpolation: 'bicubic', or 'bilinear', which takes 0.6 times as long.
    """

    random = True

    def __init__(
        self,
        size: int,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
    ):
        if interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation={interpolation!r}: choose one of {', '.join(INTERPOLATIONS)}")
        self.interpolation = INTERPOLATIONS[interpolation]
        self.size = _size(size)
        self.scale = _range("scale", scale, 1.0)
        self.ratio = _range("ratio", ratio, 100.0)

    def _picture(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        box = self._box(image.height, image.width, rng)
        return image.resize((self.size, self.size), self.interpolation, box=box)

    def _box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * rng.random())
            ratio = math.exp(low + (high - low) * rng.random())
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


@op("affine")
class RandomAffine(PictureOp):
    """A random rotation about the centre, scaling, aspect ratio and shift (bilinear); what comes in view is `fill`.

    Unlike `rrc` it also zooms out, for drawings that fill their frame more or less.

    Args:
      degrees: rotation, uniform in [-degrees, degrees].
      scale: range of the zoom, log-uniform; below 1 the picture gets smaller.
      shift: horizontally and vertically, uniform in [-shift, shift] times the side.
      stretch: width over height is changed by a factor in [1 / (1 + stretch), 1 + stretch], log-uniform.
      fill: grey level, 0 to 255.
    """

    random = True

    def __init__(
        self,
        degrees: float,
        scale: Sequence[float] = (1.0, 1.0),
        shift: float = 0.0,
        stretch: float = 0.0,
        fill: int = 255,
    ):
        self.degrees = checked_number("degrees", degrees, 0, 180)
        self.scale = _range("scale", scale, 100.0)
        self.shift, self.stretch = checked_number("shift", shift, 0, 1), checked_number("stretch", stretch, 0, 10)
        self.fill = (int(checked_number("fill", fill, 0, 255)),) * 3

    def _picture(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        width, height = image.size
        angle = math.radians(self.degrees) * (2 * rng.random() - 1)
        low, high = map(math.log, self.scale)
        scale = math.exp(low + (high - low) * rng.random())
        stretch = (1 + self.stretch) ** (rng.random() - 0.5)
        shift = [self.shift * side * (2 * rng.random() - 1) for side in (width, height)]
        cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
        inverse = np.array([[cos / stretch, sin / stretch], [-sin * stretch, cos * stretch]])  # output -> input
        centre = np.array([width / 2, height / 2])
        offset = centre - inverse @ (centre + shift)
        (a, b), (d, e) = inverse.tolist()
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            (a, b, float(offset[0]), d, e, float(offset[1])),
            Image.Resampling.BILINEAR,
            fillcolor=self.fill,
        )


@op("flip")
class Flip(PictureOp):
    """Mirrors left and right with probability `p`."""

    random = True

    def __init__(self, p: float = 0.5):
        self.p = checked_number("p", p, 0, 1)

    def _picture(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < self.p else image


@op("jitter")
class Jitter(PictureOp):
    """Colour jitter: brightness, contrast, saturation by factors in [max(0, 1 - x), 1 + x], hue by up to x turns.

    All are drawn uniformly and make one affine map of the colours, clipped once at the end: brightness scales, contrast
    scales around the image's mean luma, saturation around each pixel's luma, and hue turns the chroma plane of YIQ.
    All keep greys grey.
    """

    random = True

    def __init__(self, brightness: float, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0):
        names = ("brightness", "contrast", "saturation")
        values = (brightness, contrast, saturation)
        self.spans = [checked_number(name, value, 0, 10) for name, value in zip(names, values, strict=True)]
        self.hue = checked_number("hue", hue, 0, 0.5)

    def _picture(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        low = [max(0.0, 1 - span) for span in self.spans]
        brightness, contrast, saturation = (
            a + (1 + span - a) * rng.random() for a, span in zip(low, self.spans, strict=True)
        )
        matrix = saturation * IDENTITY + (1 - saturation) * GRAY
        if self.hue:
            matrix = _hue_matrix(2 * math.pi * self.hue * (2 * rng.random() - 1)) @ matrix
        return recolour(image, brightness * matrix, contrast)


@op("gray")
class Gray(PictureOp):
    """Takes the colour away (luma in all channels) with probability `p`."""

    random = True

    def __init__(self, p: float = 0.2):
        self.p = checked_number("p", p, 0, 1)

    def _picture(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if rng.random() >= self.p:
            return image
        return recolour(image, 0 * IDENTITY + GRAY, 1.0)


def recolour(picture: Image.Image, matrix: np.ndarray, contrast: float) -> Image.Image:
    """`matrix`, float32 (3, 3), on each RGB pixel, then contrast around the mean luma; rounded, clipped."""
    bias = 0.0
    if contrast != 1.0:
        # Whole-number channel means from PIL: fast, and the same on every machine.
        mean = picture.reduce(picture.size).getpixel((0, 0))
        bias = (1 - contrast) * float(GRAY @ matrix @ np.asarray(mean, np.float32))
    rows = (contrast * matrix).tolist()
    return picture.convert("RGB", tuple(x for row in rows for x in (*row, bias)))


def _hue_matrix(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]], np.float32)
    return np.linalg.inv(YIQ) @ turn @ YIQ


@op("normalise")
class Normalise(ImageOp):
    """uint8 (H, W, 3) -> float32 (image / 255 - mean) / std. Training does this on the device instead."""

    def __init__(self, mean: Sequence[float] = (0.485, 0.456, 0.406), std: Sequence[float] = (0.229, 0.224, 0.225)):
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        if self.mean.shape != (3,) or self.std.shape != (3,) or not (self.std > 0).all():
            raise UserError("mean and std must be three numbers each, std positive")

    def _image(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return (image.astype(np.float32) / np.float32(255) - self.mean) / self.std


def _pad_to(image: np.ndarray, size: int, fill: int) -> np.ndarray:
    missing = [max(0, size - side) for side in image.shape[:2]]
    if not any(missing):
        return image
    return np.pad(image, (*((m // 2, m - m // 2) for m in missing), (0, 0)), constant_values=fill)


def _size(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"size must be a positive whole number of pixels, not {value!r}")
    return value


def _range(name: str, value: Any, high: float) -> tuple[float, float]:
    try:
        a, b = map(float, value)
    except (TypeError, ValueError):
        a, b = 0.0, 0.0
    if not 0 < a <= b <= high:
        raise UserError(f"{name} must be two numbers (low, high) with 0 < low <= high <= {high}, not {value!r}")
    return a, b
