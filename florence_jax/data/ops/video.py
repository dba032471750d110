"""Ops that make frames of an encoded video, uint8 (T, H, W, 3), which the ops on pictures take with field=video."""

import abc

import numpy as np

from florence_jax.data.frame_numbers import random_clip
from florence_jax.data.ops.registry import Example, Op, key_of, op
from florence_jax.data.records import BadRecord
from florence_jax.data.videos import open_video
from florence_jax.errors import UserError


def checked_count(name: str, value: int) -> int:
    """`value`. Raises UserError, naming it, unless it is a whole number above 0."""
    if type(value) is not int or value < 1:
        raise UserError(f"{name} must be a positive whole number, not {value!r}")
    return value


class FramesOp(Op):
    """An op that reads frames of a video (a path, bytes or frames): a subclass says which.

    Attributes:
      field: of the example.
    """

    def __init__(self, field: str = "video"):
        self.field, self.reads = field, frozenset((field,))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises BadRecord for a video of which nothing can be decoded."""
        if self.field not in example:
            raise BadRecord(key_of(example), f"it has no {self.field}")
        with open_video(example[self.field], key_of(example)) as video:
            return example | {self.field: video.read(self.draw(video.count, rng))}

    @abc.abstractmethod
    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Int64 (T,): numbers of frames, below `count`."""


@op("clip")
class Clip(FramesOp):
    """`frames` frames from a random place on, each `interval` after the one before; a shorter video goes round."""

    random = True

    def __init__(self, frames: int, interval: int = 1, field: str = "video"):
        super().__init__(field)
        self.frames, self.interval = checked_count("frames", frames), checked_count("interval", interval)

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """See the class."""
        return random_clip(count, self.frames, self.interval, rng)
