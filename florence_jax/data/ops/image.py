"""Ops on images, uint8 (H, W, 3) from `decode` on; importing this module registers them.

Between two ops that both work on PIL pictures the picture itself is handed on (`link_pictures`): an array made of it
and a picture made of that again would be two copies for nothing.
"""

import abc
import itertools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from florence_jax.data.ops.registry import Example, Op, checked_number, key_of, op
from florence_jax.data.records import BadRecord
from florence_jax.errors import UserError
from florence_jax.pictures import open_picture, to_rgb

GRAY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601 luma, as in PIL
IDENTITY = np.eye(3, dtype=np.float32)
# Luma and chroma (Y, I, Q) of R, G, B, for rotations of the hue.
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
MAX_ASPECT = 100  # of a picture; a line of pixels would be resized to gigabytes


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
            with open_picture(data) as image:
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise ValueError(f"{image.width} x {image.height} pixels are too narrow")
                picture = to_rgb(image)
                return example | {"image": picture if self.gives_picture else np.asarray(picture)}
        except Exception as error:  # PIL's decoders raise a dozen unrelated types on corrupt data
            raise BadRecord(key_of(example), f"corrupt image ({type(error).__name__}: {error})"[:300]) from error

    @staticmethod
    def _from_array(example: Example, data: np.ndarray) -> np.ndarray:
        data = data[..., None] if data.ndim == 2 else data
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] not in (1, 3) or not data.size:
            raise BadRecord(key_of(example), f"its image is {data.dtype} {data.shape}, not uint8 (H, W, 1 or 3)")
        return np.repeat(data, 3, axis=2) if data.shape[2] == 1 else data


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
