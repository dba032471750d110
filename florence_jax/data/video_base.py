"""What an opened video is, and how large its frames may be."""

import abc
from collections.abc import Sequence

import numpy as np

from florence_jax.data.records import BadRecord

MAX_FRAME_PIXELS = 4096 * 4096  # a frame of 8K would take 100 MB, a clip of 32 of them 3 GB


class Video(abc.ABC):
    """An opened video.

    Attributes:
      count: of frames, at least 1.
      size: (height, width) of its frames, upright, as far as the file says so.
    """

    count: int
    size: tuple[int, int]

    @abc.abstractmethod
    def times(self) -> np.ndarray:
        """Float64 (count,): when each frame is shown, in seconds after the first."""

    @abc.abstractmethod
    def read(self, numbers: Sequence[int] | np.ndarray, short: int | None = None) -> np.ndarray:
        """The frames with these numbers, in this order, uint8 (T, H, W, 3); a number may be there several times.

        A frame that cannot be decoded is the last before it that can.

        Args:
          numbers: at least one, below `count`.
          short: pixels; frames whose shorter side is longer are made smaller, so that it has them. Frames then need
            less memory and time than if they were made smaller afterwards.

        Raises:
          BadRecord: if no frame can be decoded.
        """

    def checked(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Int64 (T,). Raises ValueError unless all are frames of the video."""
        found = np.asarray(numbers, np.int64)
        if found.ndim != 1 or not len(found) or found.min() < 0 or found.max() >= self.count:
            raise ValueError(f"frames {numbers} of a video with {self.count}")
        return found


def shorter(size: tuple[int, int], short: int | None) -> tuple[int, int]:
    """(height, width) made smaller, the aspect kept, so that the shorter side has at most `short` pixels."""
    height, width = size
    if short is None or min(size) <= short:
        return size
    return short * height // min(size), short * width // min(size)


def too_large(key: str, width: int, height: int) -> BadRecord:
    """The error of frames with more than `MAX_FRAME_PIXELS`."""
    what = f"its frames have {width} x {height} pixels, more than {MAX_FRAME_PIXELS:,}: make them smaller"
    return BadRecord(key, what)
