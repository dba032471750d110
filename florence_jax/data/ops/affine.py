"""Ops that turn, zoom, shift and mirror pictures within their frame."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from florence_jax.data.ops.crops import CropWarp
from florence_jax.data.ops.geometry import GeometricOp
from florence_jax.data.ops.registry import checked_number, checked_range, op


class FlipWarp(NamedTuple):
    """Left and right change places; a `Warp`."""

    size: tuple[int, int]

    @property
    def matrix(self) -> np.ndarray:
        """See `Warp`."""
        return np.array([[-1.0, 0.0, self.size[1]], [0.0, 1.0, 0.0]])

    def picture(self, picture: Image.Image) -> Image.Image:
        """See `Warp`."""
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


class AffineWarp(NamedTuple):
    """A linear map and a shift, bilinear; what comes in view is `fill`. A `Warp`.

    Attributes:
      inverse: rows (a, b, c) and (d, e, f), target -> source.
    """

    inverse: tuple[tuple[float, float, float], tuple[float, float, float]]
    size: tuple[int, int]
    fill: int

    @property
    def matrix(self) -> np.ndarray:
        """See `Warp`."""
        return np.linalg.inv(np.array([*self.inverse, (0.0, 0.0, 1.0)]))[:2]

    def picture(self, picture: Image.Image) -> Image.Image:
        """See `Warp`."""
        first, second = self.inverse
        return picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            (*first, *second),
            Image.Resampling.BILINEAR,
            fillcolor=(self.fill,) * 3,
        )


@op("affine")
class RandomAffine(GeometricOp):
    """A random rotation about the centre, scaling, aspect ratio and shift (bilinear); what comes in view is `fill`.

    Unlike `rrc` it also zooms out, for drawings that fill their frame more or less.

    Args:
      degrees: rotation, uniform in [-degrees, degrees].
      scale: range of the zoom, log-uniform; below 1 the picture gets smaller.
      shift: horizontally and vertically, uniform in [-shift, shift] times the side.
      stretch: width over height is changed by a factor in [1 / (1 + stretch), 1 + stretch], log-uniform.
      fill: grey level, 0 to 255.
      visible, field: see `GeometricOp`.
    """

    random = True

    def __init__(
        self,
        degrees: float,
        scale: Sequence[float] = (1.0, 1.0),
        shift: float = 0.0,
        stretch: float = 0.0,
        fill: int = 255,
        visible: float = 0.0,
        field: str = "image",
    ):
        super().__init__(field, visible)
        self.degrees = checked_number("degrees", degrees, 0, 180)
        self.scale = checked_range("scale", scale, 100.0)
        self.shift, self.stretch = checked_number("shift", shift, 0, 1), checked_number("stretch", stretch, 0, 10)
        self.fill = int(checked_number("fill", fill, 0, 255))

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> AffineWarp:
        """See the class."""
        height, width = size
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
        return AffineWarp(((a, b, float(offset[0])), (d, e, float(offset[1]))), size, self.fill)


@op("flip")
class Flip(GeometricOp):
    """Mirrors left and right with probability `p`."""

    random = True

    def __init__(self, p: float = 0.5, field: str = "image"):
        super().__init__(field)
        self.p = checked_number("p", p, 0, 1)

    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> CropWarp | FlipWarp:
        """See the class."""
        return FlipWarp(size) if rng.random() < self.p else CropWarp(0, 0, size)
