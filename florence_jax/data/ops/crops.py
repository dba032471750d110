"""Ops that cut and pad pictures, pixel by pixel."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from florence_jax.data.ops.geometry import GeometricOp
from florence_jax.data.ops.image import picture_sizes
from florence_jax.data.ops.registry import Example, checked_number, checked_pixels, key_of, op
from florence_jax.data.records import BadRecord


class CropWarp(NamedTuple):
    """What lies at (left, top) and right and below of it, `size` pixels; beside the picture `fill`. A `Warp`."""

    left: int
    top: int
    size: tuple[int, int]
    fill: int = 0

    @property
    def matrix(self) -> np.ndarray:
        """See `Warp`."""
        return np.array([[1.0, 0.0, -self.left], [0.0, 1.0, -self.top]])

    def picture(self, picture: Image.Image) -> Image.Image:
        """See `Warp`."""
        (height, width), left, top = self.size, self.left, self.top
        box = (left, top, left + width, top + height)
        if box == (0, 0, *picture.size):
            return picture
        inside = left >= 0 and top >= 0 and box[2] <= picture.width and box[3] <= picture.height
        if inside or not self.fill:
            return picture.crop(box)  # black outside
        target = Image.new(picture.mode, (width, height), (self.fill,) * 3)
        target.paste(picture, (-left, -top))
        return target


@op("center_crop")
class CenterCrop(GeometricOp):
    """The central (size, size) pixels; smaller images are padded with black, as in torchvision."""

    def __init__(self, size: int, visible: float = 0.0, field: str = "image"):
        super().__init__(field, visible)
        self.side = checked_pixels(size)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> CropWarp:
        """Draws nothing."""
        top, left = (self._start(side) for side in size)
        return CropWarp(left, top, (self.side, self.side))

    def _start(self, side: int) -> int:
        # Half a pixel of a larger picture is rounded to even, of a smaller one down, as in torchvision.
        return round((side - self.side) / 2) if side > self.side else -((self.side - side) // 2)


@op("crop")
class Crop(GeometricOp):
    """Random (size, size) pixels after padding every side by `pad` pixels of `fill`, and as needed to reach `size`."""

    random = True

    def __init__(self, size: int, pad: int = 0, fill: int = 0, visible: float = 0.0, field: str = "image"):
        super().__init__(field, visible)
        self.side = checked_pixels(size)
        self.pad, self.fill = int(checked_number("pad", pad, 0, 4096)), int(checked_number("fill", fill, 0, 255))

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> CropWarp:
        """See the class."""
        top, left = (self._start(side + 2 * self.pad, rng) for side in size)
        return CropWarp(left, top, (self.side, self.side), self.fill)

    def _start(self, padded: int, rng: np.random.Generator) -> int:
        missing = max(0, self.side - padded)
        return int(rng.integers(padded + missing - self.side + 1)) - missing // 2 - self.pad


@op("box_crop")
class BoxCrop(GeometricOp):
    """A random part of a picture; a box whose centre is in it stays an object, what is left of others is ignored.

    Args:
      low: the part's height and width are a share of the picture's, each uniform in [low, 1].
      p: with which probability the picture is cut at all.
      visible, field: see `GeometricOp`.
    """

    random = by_centre = True

    def __init__(self, low: float = 0.3, p: float = 1.0, visible: float = 0.0, field: str = "image"):
        super().__init__(field, visible)
        self.low, self.p = checked_number("low", low, 0.01, 1), checked_number("p", p, 0, 1)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> CropWarp:
        """See the class."""
        if rng.random() >= self.p:
            return CropWarp(0, 0, size)
        height, width = (max(1, round(side * (self.low + (1 - self.low) * rng.random()))) for side in size)
        top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
        return CropWarp(left, top, (height, width))


@op("pad_image")
class PadImage(GeometricOp):
    """Pads at the bottom and on the right to (height, width) with `fill`, so that pictures of a batch have one shape.

    Adds "valid", int32 (2,): the true height and width; of a list of K pictures (K, 2). Goes last of the ops that move
    pixels. A larger picture is a bad record.
    """

    def __init__(self, height: int, width: int | None = None, fill: int = 0, field: str = "image"):
        super().__init__(field)
        self.size = checked_pixels(height), checked_pixels(height if width is None else width)
        self.fill = int(checked_number("fill", fill, 0, 255))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises BadRecord for a picture that is larger."""
        out = super().__call__(example, rng)
        valid = np.array(picture_sizes(example[self.field]), np.int32)
        if (valid > self.size).any():
            what = f"its {self.field}, {valid.tolist()} pixels high and wide, does not fit pad_image{self.size}"
            raise BadRecord(key_of(example), what)
        return out | {"valid": valid}

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> CropWarp:
        """Draws nothing."""
        return CropWarp(0, 0, self.size, self.fill)
