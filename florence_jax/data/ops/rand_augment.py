"""RandAugment: a few of many changes of a picture, drawn once for all frames of a video."""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from florence_jax.data.ops.image import Change, PictureOp
from florence_jax.data.ops.registry import Example, checked_number, op
from florence_jax.errors import UserError

STRONGEST = 10  # magnitude
GREY = (128, 128, 128)  # what comes in view
BILINEAR = Image.Resampling.BILINEAR
# Range of each change at the magnitude `STRONGEST`.
MOST_DEGREES, MOST_SHEAR, MOST_SHIFT, MOST_FACTOR, MOST_ADDED = 30.0, 0.3, 0.45, 0.9, 110


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance], level: float, picture: Image.Image) -> Image.Image:
    return kind(picture).enhance(max(0.1, 1 + MOST_FACTOR * level))


def _rotate(level: float, picture: Image.Image) -> Image.Image:
    return picture.rotate(MOST_DEGREES * level, BILINEAR, fillcolor=GREY)


def _move(shear: tuple[float, float], shift: tuple[float, float], level: float, picture: Image.Image) -> Image.Image:
    (across, down), (x, y) = shear, shift
    rows = (1.0, across * level, x * level * picture.width, down * level, 1.0, y * level * picture.height)
    return picture.transform(picture.size, Image.Transform.AFFINE, rows, BILINEAR, fillcolor=GREY)


def _posterize(level: float, picture: Image.Image) -> Image.Image:
    return ImageOps.posterize(picture, max(1, 4 - int(4 * abs(level))))


def _solarize(level: float, picture: Image.Image) -> Image.Image:
    return ImageOps.solarize(picture, 256 - int(256 * abs(level)))


def _solarize_add(level: float, picture: Image.Image) -> Image.Image:
    added = int(MOST_ADDED * abs(level))
    return picture.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


def _without_level(change: Change, level: float, picture: Image.Image) -> Image.Image:
    return change(picture)


# timm's set of increasing strength (rand-m9-...-inc1), each with a level from -1 to 1.
AUGMENTATIONS: tuple[Callable[[float, Image.Image], Image.Image], ...] = (
    functools.partial(_without_level, ImageOps.autocontrast),
    functools.partial(_without_level, ImageOps.equalize),
    functools.partial(_without_level, ImageOps.invert),
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    functools.partial(_enhance, ImageEnhance.Color),
    functools.partial(_enhance, ImageEnhance.Contrast),
    functools.partial(_enhance, ImageEnhance.Brightness),
    functools.partial(_enhance, ImageEnhance.Sharpness),
    functools.partial(_move, (MOST_SHEAR, 0.0), (0.0, 0.0)),
    functools.partial(_move, (0.0, MOST_SHEAR), (0.0, 0.0)),
    functools.partial(_move, (0.0, 0.0), (MOST_SHIFT, 0.0)),
    functools.partial(_move, (0.0, 0.0), (0.0, MOST_SHIFT)),
)


@op("randaugment")
class RandAugment(PictureOp):
    """RandAugment (Cubuk et al. 2019) as timm has it: `n` of `AUGMENTATIONS`, each made with probability `p`.

    Nothing is mirrored. Boxes are not taken along.

    Args:
      n: changes, one after the other, drawn with repetition.
      m: magnitude, 0 to 10.
      spread: standard deviation of the magnitude.
      p: with which probability each is made.
      field: of the pictures.
    """

    random = True

    def __init__(self, n: int = 2, m: float = 9, spread: float = 0.5, p: float = 0.5, field: str = "image"):
        super().__init__(field)
        self.n = int(checked_number("n", n, 0, 100))
        self.m, self.spread = checked_number("m", m, 0, STRONGEST), checked_number("spread", spread, 0, STRONGEST)
        self.p = checked_number("p", p, 0, 1)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises UserError for pictures with boxes, or that are not decoded yet."""
        if "boxes" in example:
            raise UserError(f"op {self.name!r} moves pixels and leaves boxes where they are: leave one of them out")
        return example | {self.field: self._changed(example, self.draw(rng))}

    def draw(self, rng: np.random.Generator) -> Change:
        """One change, for all pictures of an example."""
        steps = []
        for kind in rng.integers(len(AUGMENTATIONS), size=self.n).tolist():
            made, level, sign = rng.random(), rng.normal(self.m, self.spread), rng.random()
            if made < self.p:
                level = min(max(level, 0.0), STRONGEST) / STRONGEST * (1 if sign < 0.5 else -1)
                steps.append(functools.partial(AUGMENTATIONS[kind], level))
        return lambda picture: functools.reduce(lambda changed, step: step(changed), steps, picture)
