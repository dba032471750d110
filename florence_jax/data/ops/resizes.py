"""Ops that resize a picture, or a box of it, bicubic or bilinear and antialiased, as PIL does."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from florence_jax.data.ops.geometry import GeometricOp
from florence_jax.data.ops.image import UnreadJpeg
from florence_jax.data.ops.registry import checked_number, checked_pixels, checked_range, op
from florence_jax.errors import UserError

BICUBIC = Image.Resampling.BICUBIC
INTERPOLATIONS = {"bicubic": BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def checked_interpolation(name: str) -> Image.Resampling:
    """PIL's filter; raises UserError unless `name` is of `INTERPOLATIONS`."""
    if name not in INTERPOLATIONS:
        raise UserError(f"interpolation={name!r}: choose one of {', '.join(INTERPOLATIONS)}")
    return INTERPOLATIONS[name]


class ResizeWarp(NamedTuple):
    """Box (left, top, right, bottom) of the source, resized to `size`; a `Warp`."""

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    resampling: Image.Resampling = BICUBIC

    @property
    def matrix(self) -> np.ndarray:
        """See `Warp`."""
        (left, top, right, bottom), (height, width) = self.box, self.size
        x, y = width / (right - left), height / (bottom - top)
        return np.array([[x, 0.0, -left * x], [0.0, y, -top * y]])

    def picture(self, picture: Image.Image | UnreadJpeg) -> Image.Image:
        """See `Warp`; of a JPEG that is not read yet no more is read than this needs."""
        height, width = self.size
        return picture.resize((width, height), self.resampling, box=self.box)


@op("resize")
class Resize(GeometricOp):
    """Resize, bicubic or 'bilinear': the shorter side becomes `size`, the other keeps the aspect, rounded down."""

    def __init__(self, size: int, interpolation: str = "bicubic", field: str = "image"):
        super().__init__(field)
        self.side, self.interpolation = checked_pixels(size), checked_interpolation(interpolation)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> ResizeWarp:
        """Draws nothing."""
        (height, width), short = size, min(size)
        target = self.side * height // short, self.side * width // short
        return ResizeWarp((0, 0, width, height), target, self.interpolation)


@op("shrink")
class Shrink(GeometricOp):
    """Bicubic resize down to `times` as many pixels as are wanted in the end: a smaller picture is left as it is.

    Put right after `decode`, it makes that and all ops after it fast on photographs, and a cache of pictures small.

    Args:
      size: the shorter side that the ops after it leave.
      times: the shorter side becomes at most `times * size` pixels.
      field: of the pictures.
    """

    takes_unread = True

    def __init__(self, size: int, times: float = 4, field: str = "image"):
        super().__init__(field)
        self.side = round(checked_pixels(size) * checked_number("times", times, 1, 100))

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> ResizeWarp:
        """Draws nothing."""
        (height, width), short = size, min(size)
        target = size if short <= self.side else (self.side * height // short, self.side * width // short)
        return ResizeWarp((0, 0, width, height), target)


@op("resize_exact")
class ResizeExact(GeometricOp):
    """Resize, bicubic or 'bilinear', to (height, width), or (height, height), whatever the aspect ratio."""

    def __init__(self, height: int, width: int | None = None, interpolation: str = "bicubic", field: str = "image"):
        super().__init__(field)
        self.size = checked_pixels(height), checked_pixels(height if width is None else width)
        self.interpolation = checked_interpolation(interpolation)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> ResizeWarp:
        """Draws nothing."""
        return ResizeWarp((0, 0, size[1], size[0]), self.size, self.interpolation)


@op("resize_long")
class ResizeLong(GeometricOp):
    """Bicubic resize that keeps the aspect ratio: the longer side becomes `size`, the other is rounded.

    Args:
      size: pixels.
      short: what the shorter side may be at most; where it would be more, it is this, and the longer side below `size`.
      field: of the pictures.
    """

    def __init__(self, size: int, short: int | None = None, field: str = "image"):
        super().__init__(field)
        self.long, self.short = checked_pixels(size), checked_pixels(size if short is None else short)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> ResizeWarp:
        """Draws nothing."""
        height, width = size
        scale = min(self.long / max(size), self.short / min(size))
        target = max(1, round(height * scale)), max(1, round(width * scale))
        return ResizeWarp((0, 0, width, height), target)


@op("resize_short")
class ResizeShort(GeometricOp):
    """Resize that keeps the aspect ratio: the shorter side becomes `short`, the longer at most `longest`.

    Args:
      short: pixels; of several one is drawn, as DETR does (Carion et al. 2020).
      longest: what the longer side may be at most; where it would be more, it is this, and the shorter side less.
      interpolation: 'bilinear', as detectors have it, or 'bicubic'.
      field: of the pictures.
    """

    def __init__(
        self,
        short: int | Sequence[int],
        longest: int | None = None,
        interpolation: str = "bilinear",
        field: str = "image",
    ):
        super().__init__(field)
        self.interpolation = checked_interpolation(interpolation)
        self.shorts = tuple(map(checked_pixels, [short] if isinstance(short, int) else short))
        if not self.shorts:
            raise UserError("short must be a number of pixels, or several")
        self.longest = None if longest is None else checked_pixels(longest)
        self.random = self.takes_unread = len(self.shorts) > 1

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> ResizeWarp:
        """See the class."""
        short = self.shorts[int(rng.integers(len(self.shorts)))] if self.random else self.shorts[0]
        scale = short / min(size)
        if self.longest is not None:
            scale = min(scale, self.longest / max(size))
        return ResizeWarp((0, 0, size[1], size[0]), _scaled(size, scale), self.interpolation)


@op("resize_fit")
class ResizeFit(GeometricOp):
    """Resize that keeps the aspect ratio, as large as fits into (height, width): then `pad_image` of that size.

    With the size of a bucket, {height} and {width}, no picture is too large for it, whichever its aspect ratio.
    'bilinear', as detectors have it, or 'bicubic'.
    """

    def __init__(self, height: int, width: int | None = None, interpolation: str = "bilinear", field: str = "image"):
        super().__init__(field)
        self.size = checked_pixels(height), checked_pixels(height if width is None else width)
        self.interpolation = checked_interpolation(interpolation)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> ResizeWarp:
        """Draws nothing."""
        target = _scaled(size, _fitting(size, self.size), self.size)
        return ResizeWarp((0, 0, size[1], size[0]), target, self.interpolation)


def _fitting(size: tuple[int, int], room: tuple[int, int]) -> float:
    """By how much a picture may grow to fill the room."""
    return min(room[0] / size[0], room[1] / size[1])


def _scaled(size: tuple[int, int], scale: float, most: tuple[float, float] = (math.inf, math.inf)) -> tuple[int, int]:
    """(height, width) times `scale`, rounded."""
    height, width = (int(min(max(1, round(side * scale)), room)) for side, room in zip(size, most, strict=True))
    return height, width


@op("lsj")
class LargeScaleJitter(GeometricOp):
    """Large-scale jitter (Ghiasi et al. 2021): the picture as it fits into (height, width), times a random factor.

    What is larger than (height, width) then is cut to it at a random place; what is smaller stays so, for `pad_image`.

    Args:
      height, width: pixels.
      low, high: range of the factor, uniform.
      interpolation: 'bilinear', as detectors have it, or 'bicubic'.
      visible, field: see `GeometricOp`; of a box with less than a quarter in view nobody knows what it is.
    """

    random = takes_unread = True

    def __init__(
        self,
        height: int,
        width: int | None = None,
        low: float = 0.1,
        high: float = 2.0,
        interpolation: str = "bilinear",
        visible: float = 0.25,
        field: str = "image",
    ):
        super().__init__(field, visible)
        self.interpolation = checked_interpolation(interpolation)
        self.size = checked_pixels(height), checked_pixels(height if width is None else width)
        self.range = checked_range("(low, high)", (low, high), 100.0)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> ResizeWarp:
        """See the class."""
        low, high = self.range
        grown = _scaled(size, _fitting(size, self.size) * (low + (high - low) * rng.random()))
        starts, stops, target = [], [], []
        for side, scaled, room in zip(size, grown, self.size, strict=True):
            kept = min(scaled, room)
            start = int(rng.random() * (scaled - kept + 1))
            starts.append(start * side / scaled)
            stops.append(min((start + kept) * side / scaled, side))
            target.append(kept)
        return ResizeWarp((starts[1], starts[0], stops[1], stops[0]), (target[0], target[1]), self.interpolation)


@op("rrc")
class RandomResizedCrop(GeometricOp):
    """A random box, resized (antialiased) to (size, size): Inception's crop (Szegedy et al. 2014).

    As in torchvision: area and log aspect ratio are uniform; ten tries for a box that fits, then a centred one.

    Args:
      size: pixels.
      scale: range of the box's share of the image's area.
      ratio: range of the box's width / height.
      interpolation: 'bicubic', or 'bilinear', which takes 0.6 times as long.
      visible, field: see `GeometricOp`.
    """

    random = takes_unread = True

    def __init__(
        self,
        size: int,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
        visible: float = 0.0,
        field: str = "image",
    ):
        super().__init__(field, visible)
        self.interpolation = checked_interpolation(interpolation)
        self.side = checked_pixels(size)
        self.scale = checked_range("scale", scale, 1.0)
        self.ratio = checked_range("ratio", ratio, 100.0)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> ResizeWarp:
        """See the class."""
        return ResizeWarp(self._box(*size, rng), (self.side, self.side), self.interpolation)

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
