"""Ops on pictures: decode, and those that change colours; importing this module registers them.

From `decode` on, a field holds one picture, uint8 (H, W, 3), a list of pictures of any sizes, or the frames of a video,
uint8 (T, H, W, 3). Between two ops that both work on PIL pictures the pictures themselves are handed on
(`link_pictures`): an array made of one and a picture made of that again would be two copies for nothing. To an op that
makes pictures smaller anyway a JPEG is handed on unread: `UnreadJpeg`.
"""

import abc
import contextlib
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from florence_jax.data.ops.registry import Example, Op, checked_number, key_of, op
from florence_jax.data.records import BadRecord
from florence_jax.errors import UserError
from florence_jax.pictures import Box, open_picture, picture_frame, read_reduced, to_rgb, trouble_of

GRAY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601 luma, as in PIL
IDENTITY = np.eye(3, dtype=np.float32)
# Luma and chroma (Y, I, Q) of R, G, B, for rotations of the hue.
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
MAX_ASPECT = 100  # of a picture; a line of pixels would be resized to gigabytes
Change = Callable[[Image.Image], Image.Image]


class UnreadJpeg:
    """A JPEG picture that is opened, but whose pixels are not read: who takes it says how many it needs.

    Args:
      data: encoded.
      image: the same, opened.
      key: of the record, for messages.

    Attributes:
      width, height: upright.
    """

    def __init__(self, data: bytes, image: Image.Image, key: str):
        self._data, self._key = data, key
        self._image: Image.Image | None = image
        self.width, self.height = picture_frame(image).size

    def read(self) -> Image.Image:
        """All its pixels, RGB. Raises BadRecord."""
        with bad_if_it_fails(self._key):
            return to_rgb(self._opened())

    def resize(self, size: tuple[int, int], resample: Image.Resampling, box: Box) -> Image.Image:
        """As PIL's: `box`, resized to (width, height); RGB. Raises BadRecord.

        Where the box is at least twice as large, it is read at a half, a quarter or an eighth of its sides, still at
        least as large as what is wanted: the pixels are slightly others than those of the whole picture.
        """
        with bad_if_it_fails(self._key):
            picture, box = read_reduced(self._opened(), box, size)
        return picture.resize(size, resample, box=box)

    def _opened(self) -> Image.Image:
        """As it was given: reading changes it, so that it serves once, and is opened anew from then on."""
        image, self._image = self._image, None
        return Image.open(io.BytesIO(self._data), formats=["JPEG"]) if image is None else image


@contextlib.contextmanager
def bad_if_it_fails(key: str) -> Iterator[None]:
    """For PIL's decoders, which raise a dozen unrelated types on corrupt data: makes them BadRecord."""
    try:
        yield
    except Exception as error:
        raise BadRecord(key, f"corrupt image ({trouble_of(error)})") from error


@op("decode")
class Decode(Op):
    """Encoded bytes (JPEG, PNG, WebP, ...), a PIL picture or uint8 (H, W[, 1 or 3]) -> uint8 (H, W, 3), RGB.

    EXIF orientation is applied, transparency is put on white, 16-bit grey is scaled, of animations the first frame is
    taken. Of a list each is decoded. Corrupt images and those narrower than 1:100 are bad records.

    Attributes:
      gives_picture: see `PictureOp`.
      gives_unread: whether JPEGs are handed on as `UnreadJpeg`; `link_pictures` sets it.
    """

    gives_picture = gives_unread = False

    def __init__(self, field: str = "image"):
        self.field, self.reads = field, frozenset((field,))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises BadRecord for an image that cannot be decoded."""
        data = example.get(self.field)
        if isinstance(data, list):
            return example | {self.field: [self._decoded(example, each) for each in data]}
        return example | {self.field: self._decoded(example, data)}

    def _decoded(self, example: Example, data: Any) -> np.ndarray | Image.Image | UnreadJpeg:
        if isinstance(data, np.ndarray):
            return self._from_array(example, data)
        if not isinstance(data, (bytes, Image.Image)):
            raise BadRecord(key_of(example), f"its {self.field} is {type(data).__name__}, not bytes")
        with bad_if_it_fails(key_of(example)), contextlib.ExitStack() as opened:
            image = opened.enter_context(open_picture(data))
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels are too narrow")
            if self.gives_unread and isinstance(data, bytes) and isinstance(image, JpegImageFile):
                opened.pop_all()  # it holds nothing but memory
                return UnreadJpeg(data, image, key_of(example))
            picture = to_rgb(image)
            return picture if self.gives_picture else np.asarray(picture)

    def _from_array(self, example: Example, data: np.ndarray) -> np.ndarray:
        data = data[..., None] if data.ndim == 2 else data
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] not in (1, 3) or not data.size:
            what = f"its {self.field} is {data.dtype} {data.shape}, not uint8 (H, W, 1 or 3)"
            raise BadRecord(key_of(example), what)
        return np.repeat(data, 3, axis=2) if data.shape[2] == 1 else data


class Frames(list):
    """The frames of a video as PIL pictures, between two ops that work on pictures."""


def picture_sizes(value: Any) -> Any:
    """(height, width) of a decoded picture or of the frames of a video; of a list of pictures a list of them."""
    if type(value) is list:
        return [picture_sizes(each) for each in value]
    if isinstance(value, Frames):
        return picture_sizes(value[0])
    return value.shape[-3:-1] if isinstance(value, np.ndarray) else (value.height, value.width)


class PictureOp(Op):
    """An op on the pictures of a field as PIL has them: one, a list, or the frames of a video. Gives what it took.

    Attributes:
      field: of the example.
      gives_picture: whether pictures are left to the next op as PIL has them, RGB; `link_pictures` sets it.
      takes_unread: whether it takes `UnreadJpeg` too, whose `resize` is all that it then does with it. No op of
        published pre-processing does: pictures of such an evaluation are the same to the bit.
    """

    gives_picture = takes_unread = False

    def __init__(self, field: str = "image"):
        self.field, self.reads = field, frozenset((field,))

    def _changed(self, example: Example, change: Callable[[Any], Image.Image]) -> Any:
        """The field with `change` on each of its pictures, as `takes_unread` says what they are.

        Raises UserError if they are not decoded yet.
        """
        value = example.get(self.field)
        if isinstance(value, (Image.Image, UnreadJpeg, np.ndarray)) and getattr(value, "ndim", 3) == 3:
            return self._left(change(self._picture(value)))
        if isinstance(value, (list, np.ndarray)) and not len(value):
            raise BadRecord(key_of(example), f"its {self.field} is empty")
        if isinstance(value, (Frames, np.ndarray)):
            frames = Frames(change(self._picture(frame)) for frame in value)
            return frames if self.gives_picture else np.stack([np.asarray(frame) for frame in frames])
        if isinstance(value, list):
            return [self._left(change(self._picture(each))) for each in value]
        raise self._undecoded()

    def _picture(self, value: Any) -> Image.Image | UnreadJpeg:
        if isinstance(value, np.ndarray):
            return Image.fromarray(value)
        if isinstance(value, Image.Image) or (self.takes_unread and isinstance(value, UnreadJpeg)):
            return value
        raise self._undecoded()

    def _left(self, picture: Image.Image) -> np.ndarray | Image.Image:
        return picture if self.gives_picture else np.asarray(picture)

    def _undecoded(self) -> UserError:
        return UserError(f"op {self.name!r} needs a decoded {self.field}: put decode before it")


def link_pictures(ops: Sequence[Op]) -> None:
    """Makes each op that is followed by a `PictureOp` of the same field hand its pictures on.

    That changes no pixel, but where JPEGs are handed on unread, to an op that `takes_unread`.
    """
    for first, after in itertools.pairwise(ops):
        if isinstance(first, (Decode, PictureOp)):
            first.gives_picture = isinstance(after, PictureOp) and after.field == first.field
        if isinstance(first, Decode):
            first.gives_unread = isinstance(after, PictureOp) and first.gives_picture and after.takes_unread


def read_pictures(example: Example) -> Example:
    """The example with every `UnreadJpeg` of it, also in lists, read in full: what can be kept. Raises BadRecord."""

    def read(value: Any) -> Any:
        if type(value) is list:
            return [read(each) for each in value]
        return value.read() if isinstance(value, UnreadJpeg) else value

    return {name: read(value) for name, value in example.items()}


class ColourOp(PictureOp):
    """An op on colours: a subclass draws one change, for all pictures of an example."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises UserError if the pictures are not decoded yet."""
        return example | {self.field: self._changed(example, self.draw(rng))}

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator) -> Change:
        """RGB picture -> the changed picture, or itself; the one given is not changed."""


@op("jitter")
class Jitter(ColourOp):
    """Colour jitter: brightness, contrast, saturation by factors in [max(0, 1 - x), 1 + x], hue by up to x turns.

    All are drawn uniformly and make one affine map of the colours, clipped once at the end: brightness scales, contrast
    scales around the image's mean luma, saturation around each pixel's luma, and hue turns the chroma plane of YIQ.
    All keep greys grey.
    """

    random = True

    def __init__(
        self,
        brightness: float,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        field: str = "image",
    ):
        super().__init__(field)
        names = ("brightness", "contrast", "saturation")
        values = (brightness, contrast, saturation)
        self.spans = [checked_number(name, value, 0, 10) for name, value in zip(names, values, strict=True)]
        self.hue = checked_number("hue", hue, 0, 0.5)

    def draw(self, rng: np.random.Generator) -> Change:
        """See the class."""
        low = [max(0.0, 1 - span) for span in self.spans]
        brightness, contrast, saturation = (
            a + (1 + span - a) * rng.random() for a, span in zip(low, self.spans, strict=True)
        )
        matrix = saturation * IDENTITY + (1 - saturation) * GRAY
        if self.hue:
            matrix = _hue_matrix(2 * math.pi * self.hue * (2 * rng.random() - 1)) @ matrix
        return lambda picture: recolour(picture, brightness * matrix, contrast)


@op("gray")
class Gray(ColourOp):
    """Takes the colour away (luma in all channels) with probability `p`."""

    random = True

    def __init__(self, p: float = 0.2, field: str = "image"):
        super().__init__(field)
        self.p = checked_number("p", p, 0, 1)

    def draw(self, rng: np.random.Generator) -> Change:
        """See the class."""
        if rng.random() >= self.p:
            return lambda picture: picture
        return lambda picture: recolour(picture, 0 * IDENTITY + GRAY, 1.0)


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


@op("stack")
class Stack(Op):
    """The pictures of a list, all of one size, as one array: stack(images) -> uint8 (K, H, W, 3)."""

    def __init__(self, field: str = "images"):
        self.field, self.reads = field, frozenset((field,))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises UserError for pictures of several sizes."""
        pictures = [np.asarray(picture) for picture in example[self.field]]
        if len(shapes := {picture.shape for picture in pictures}) > 1:
            raise UserError(
                f"op {self.name!r}: pictures of the sizes {sorted(shapes)} cannot be one array: resize them"
            )
        return example | {self.field: np.stack(pictures)}


@op("normalise")
class Normalise(Op):
    """uint8 (..., 3) -> float32 (image / 255 - mean) / std. Training does this on the device instead."""

    def __init__(
        self,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        field: str = "image",
    ):
        self.field, self.reads = field, frozenset((field,))
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        if self.mean.shape != (3,) or self.std.shape != (3,) or not (self.std > 0).all():
            raise UserError("mean and std must be three numbers each, std positive")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises UserError if the pictures are not decoded yet."""
        value = example.get(self.field)
        if isinstance(value, list):
            return example | {self.field: [self._scaled(each) for each in value]}
        return example | {self.field: self._scaled(value)}

    def _scaled(self, image: Any) -> np.ndarray:
        if not isinstance(image, np.ndarray):
            raise UserError(f"op {self.name!r} needs a decoded {self.field}: put decode before it")
        return (image.astype(np.float32) / np.float32(255) - self.mean) / self.std
