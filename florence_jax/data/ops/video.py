"""Ops that make frames of an encoded video, uint8 (T, H, W, 3), which the ops on pictures take with field=video.

What is drawn is drawn once for all frames. Test views are frames one after the other until `split_views`.
"""

import abc
import math

import numpy as np

from florence_jax.data.frame_numbers import even_clips, frames_by_time, random_clips, segment_frames
from florence_jax.data.ops.registry import Example, Op, checked_number, checked_pixels, checked_range, key_of, op
from florence_jax.data.records import BadRecord
from florence_jax.data.video_base import Video
from florence_jax.data.videos import open_video
from florence_jax.errors import UserError


class FramesOp(Op):
    """An op that reads frames of a video, which is bytes, a path, or frames: a subclass says which.

    The record's "clip" (start, stop), in seconds, is the part of the video that is meant, see `Video.part`.

    Attributes:
      field: of the example.
      short: pixels; the shorter side of larger frames is made that small while they are read, None: frames are left
        as they are.
    """

    def __init__(self, field: str = "video", short: int | None = None):
        self.field, self.reads = field, frozenset((field,))
        self.short = None if short is None else checked_pixels(short)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises BadRecord for a video of which nothing can be decoded, or without the part that is meant."""
        if self.field not in example:
            raise BadRecord(key_of(example), f"it has no {self.field}")
        with open_video(example[self.field], key_of(example)) as video:
            part = video.part(example.get("clip"), key_of(example))
            return example | self.read(video, part, rng)

    @abc.abstractmethod
    def read(self, video: Video, part: range, rng: np.random.Generator) -> Example:
        """The fields that come of the frames `part` of a video."""

    def _read(self, video: Video, numbers: np.ndarray) -> Example:
        return {self.field: video.read(numbers, self.short)}


def checked_count(name: str, value: int) -> int:
    """`value`. Raises UserError, naming it, unless it is a whole number above 0."""
    if type(value) is not int or value < 1:
        raise UserError(f"{name} must be a positive whole number, not {value!r}")
    return value


@op("clip")
class Clip(FramesOp):
    """`frames` frames from a random place on, each `interval` after the one before; a shorter video goes round."""

    random = True

    def __init__(self, frames: int, interval: int = 1, short: int | None = None, field: str = "video"):
        super().__init__(field, short)
        self.frames, self.interval = checked_count("frames", frames), checked_count("interval", interval)

    def read(self, video: Video, part: range, rng: np.random.Generator) -> Example:
        """See `random_clips`."""
        return self._read(video, part.start + random_clips(len(part), 1, self.frames, self.interval, rng)[0])


@op("views")
class ClipViews(FramesOp):
    """`clips` clips spread evenly over the video, one after the other: (clips * frames, H, W, 3)."""

    def __init__(self, clips: int, frames: int, interval: int = 1, short: int | None = None, field: str = "video"):
        super().__init__(field, short)
        self.clips, self.frames = checked_count("clips", clips), checked_count("frames", frames)
        self.interval = checked_count("interval", interval)

    def read(self, video: Video, part: range, rng: np.random.Generator) -> Example:
        """See `even_clips`."""
        clips = even_clips(len(part), self.clips, self.frames, self.interval)
        return self._read(video, part.start + clips.reshape(-1))


@op("segments")
class Segments(FramesOp):
    """A random frame of each of `frames` parts of the video, or, with middle=True, the one in the middle of each."""

    def __init__(self, frames: int, middle: bool = False, short: int | None = None, field: str = "video"):
        super().__init__(field, short)
        if not isinstance(middle, bool):
            raise UserError(f"middle must be True or False, not {middle!r}")
        self.frames, self.random = checked_count("frames", frames), not middle

    def read(self, video: Video, part: range, rng: np.random.Generator) -> Example:
        """See `segment_frames`."""
        return self._read(video, part.start + segment_frames(len(part), self.frames, rng if self.random else None))


@op("uniform")
class Uniform(FramesOp):
    """`frames` frames, evenly spread by time.

    With `per_second` a short video has fewer: the last is there again for the others; "shown", bool (frames,), is true
    for those that count.
    """

    def __init__(self, frames: int, per_second: float | None = None, short: int | None = None, field: str = "video"):
        super().__init__(field, short)
        self.frames = checked_count("frames", frames)
        self.per_second = None if per_second is None else checked_number("per_second", per_second, 1e-3, 1e3)

    def read(self, video: Video, part: range, rng: np.random.Generator) -> Example:
        """See `frames_by_time`."""
        numbers = part.start + frames_by_time(video.times()[part.start : part.stop], self.frames, self.per_second)
        filled = np.pad(numbers, (0, self.frames - len(numbers)), mode="edge")
        found = self._read(video, filled)
        return found if self.per_second is None else found | {"shown": np.arange(self.frames) < len(numbers)}


class ArrayOp(Op):
    """An op on decoded frames as an array."""

    def __init__(self, field: str = "video"):
        self.field, self.reads = field, frozenset((field,))

    def _frames(self, example: Example) -> np.ndarray:
        """Uint8 (T, H, W, 3). Raises UserError for anything else."""
        value = example.get(self.field)
        if not isinstance(value, np.ndarray) or value.ndim != 4:
            raise UserError(f"op {self.name!r} needs the frames of a {self.field}: put clip, views, ... before it")
        return value


@op("three_crops")
class ThreeCrops(ArrayOp):
    """(size, size) pixels at the start, at the end and in the middle of the longer side: (3 * T, size, size, 3).

    First all frames at the start, then all at the end, then all in the middle, as in Video Swin's tests.
    """

    def __init__(self, size: int, field: str = "video"):
        super().__init__(field)
        self.side = checked_pixels(size)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises UserError for frames that are smaller."""
        frames = self._frames(example)
        height, width = frames.shape[1:3]
        if min(height, width) < self.side:
            raise UserError(
                f"op {self.name!r}: frames of {height} x {width} pixels are smaller than {self.side}: put "
                f"resize({self.side}, field={self.field}) before it"
            )
        top, left = (height - self.side) // 2, (width - self.side) // 2
        places = (0, 2 * left, left) if width > height else (0, 2 * top, top)
        starts = [(top, place) if width > height else (place, left) for place in places]
        crops = [frames[:, y : y + self.side, x : x + self.side] for y, x in starts]
        return example | {self.field: np.concatenate(crops)}


@op("split_views")
class SplitViews(ArrayOp):
    """(V * frames, H, W, 3) -> (V, frames, H, W, 3), after `views` and `three_crops`: view crop * clips + clip."""

    def __init__(self, frames: int, field: str = "video"):
        super().__init__(field)
        self.frames = checked_count("frames", frames)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises UserError for a number of frames that is no multiple."""
        frames = self._frames(example)
        if len(frames) % self.frames:
            raise UserError(f"op {self.name!r}: {len(frames)} frames are no views of {self.frames} each")
        return example | {self.field: frames.reshape(-1, self.frames, *frames.shape[1:])}


@op("erase")
class Erase(ArrayOp):
    """Random erasing (Zhong et al. 2017): with probability `p` a box is noise, the same box in all frames.

    Args:
      p: probability.
      area: range of the box's share of the frame.
      ratio: range of its height / width, log-uniform.
      field: of the frames.
    """

    random = True

    def __init__(
        self,
        p: float = 0.25,
        area: tuple[float, float] = (0.02, 1 / 3),
        ratio: tuple[float, float] = (0.3, 10 / 3),
        field: str = "video",
    ):
        super().__init__(field)
        self.p = checked_number("p", p, 0, 1)
        self.area, self.ratio = checked_range("area", area, 1.0), checked_range("ratio", ratio, 100.0)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """See the class; as in timm, ten tries for a box that fits, then none."""
        frames = self._frames(example)
        if rng.random() >= self.p:
            return example
        (count, height, width), (low, high) = frames.shape[:3], map(math.log, self.ratio)
        for _ in range(10):
            area = height * width * (self.area[0] + (self.area[1] - self.area[0]) * rng.random())
            ratio = math.exp(low + (high - low) * rng.random())
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < h < height and 0 < w < width:
                y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                frames = frames.copy()
                frames[:, y : y + h, x : x + w] = rng.integers(0, 256, (count, h, w, 3), np.uint8)
                return example | {self.field: frames}
        return example
