"""Ops that move pixels: resize, crops, affine maps, mirroring."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from florence_jax.data.ops.image import ImageOp, PictureOp
from florence_jax.data.ops.registry import checked_number, op
from florence_jax.errors import UserError

BICUBIC = Image.Resampling.BICUBIC
INTERPOLATIONS = {"bicubic": BICUBIC, "bilinear": Image.Resampling.BILINEAR}  # of PIL, antialiased


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
