"""What an opened video is, and how large its frames may be."""

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from florence_jax.data.records import BadRecord

CUT_ALREADY = 1.2  # times as long as the part that is meant: such a video is that part
AT_ONCE = 32  # frames that are read at once, where all are
MAX_FRAME_PIXELS = 4096 * 4096  # a frame of 8K would take 100 MB, a clip of 32 of them 3 GB


class Video(abc.ABC):
    """An opened video.

    Attributes:
      count: of frames, at least 1.
      size: (height, width) of its frames as they are stored.
      codec: FFmpeg's or Pillow's name of how it is encoded; '' for frames in memory.
      declared: frames that the file says it has, 0 where it does not say.
      stamped: whether each frame has a time stamp of its own; if not, reading starts at the first frame each time.
    """

    count: int
    size: tuple[int, int]
    codec: str = ""
    declared: int = 0
    stamped: bool = True

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

    def each(self, part: range, short: int | None = None) -> Iterator[np.ndarray]:
        """The frames of a part, uint8 (H, W, 3), one after the other; few are in memory. See `read`."""
        for start in range(part.start, part.stop, AT_ONCE):
            yield from self.read(range(start, min(start + AT_ONCE, part.stop)), short)

    def part(self, clip: Any, key: str) -> range:
        """The numbers of the frames of a part (start, stop) in seconds; of all frames for None.

        A video that is not longer than the part is the part, cut out already.

        Raises:
          BadRecord: for something else than two numbers, or a part that begins when the video has ended.
        """
        if clip is None:
            return range(self.count)
        try:
            start, stop = map(float, clip)
        except (TypeError, ValueError) as error:
            raise BadRecord(key, f"its clip is {clip!r}, not (start, stop) in seconds") from error
        times = self.times()
        end = float(times[-1]) * (1 + 1 / max(1, len(times) - 1))
        if end <= CUT_ALREADY * (stop - start):
            return range(self.count)
        first, last = np.searchsorted(times, (start, stop)).tolist()
        if first >= last:
            raise BadRecord(key, f"it ends after {end:.1f} s, before its part from {start:g} to {stop:g} s")
        return range(first, last)

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
