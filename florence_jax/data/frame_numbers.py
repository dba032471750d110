"""Which frames of a video are looked at: functions of how many there are, as the references of each data set have them.

A clip of n frames, i apart, spans n * i frames. All numbers are of frames that there are, however few.
"""

import math

import numpy as np


def random_clips(count: int, clips: int, frames: int, interval: int, rng: np.random.Generator) -> np.ndarray:
    """Int64 (clips, frames): clips that begin at random, one in each of `clips` parts, as Video Swin is trained.

    The parts are gap = (count - frames * interval + 1) // clips long; where nothing is left for them, every clip begins
    at the first frame. A clip that comes to the end goes on from the start.

    Args:
      count: frames of the video, at least 1.
      clips, frames: how many, and how many each.
      interval: from a frame of a clip to the next.
      rng: draws.
    """
    gap = max(0, (count - frames * interval + 1) // clips)
    starts = gap * np.arange(clips) + (rng.integers(gap, size=clips) if gap else 0)
    return (starts[:, None] + interval * np.arange(frames)) % count


def even_clips(count: int, clips: int, frames: int, interval: int) -> np.ndarray:
    """Int64 (clips, frames): clips spread evenly, as Video Swin is tested; arguments as in `random_clips`.

    Clip k begins at floor(k * gap + gap / 2), gap = (count - frames * interval + 1) / clips.
    """
    gap = max(0, count - frames * interval + 1) / clips
    starts = np.floor(np.arange(clips) * gap + gap / 2).astype(np.int64)
    return (starts[:, None] + interval * np.arange(frames)) % count


def segment_frames(count: int, frames: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Int64 (frames,), ascending: one of each of `frames` segments, as SlowFast has it for Something-Something v2.

    Segment k goes from round(k * (count - 1) / frames) to the start of the next, that frame too.

    Args:
      count: frames of the video, at least 1.
      frames: how many.
      rng: draws within each segment; None: the middle of each.
    """
    bounds = np.round((count - 1) / frames * np.arange(frames + 1)).astype(np.int64)
    if rng is None:
        return (bounds[:-1] + bounds[1:]) // 2
    return rng.integers(bounds[:-1], bounds[1:], endpoint=True)


def frames_by_time(times: np.ndarray, frames: int, per_second: float | None = None) -> np.ndarray:
    """Int64 (n,), ascending: what is shown in the middle of each of n parts of equal time.

    Args:
      times: float64 (count,), ascending, when each frame is shown, in seconds.
      frames: how many at most.
      per_second: as many for each second that has begun, until they are `frames`; None: n is `frames`.
    """
    begin, end = float(times[0]), float(times[-1])
    end += (end - begin) / max(1, len(times) - 1)  # the last frame is shown as long as the others are on average
    seconds = end - begin
    wanted = frames if per_second is None else max(1, min(frames, math.ceil(round(seconds * per_second, 6))))
    middles = begin + seconds * (np.arange(wanted) + 0.5) / wanted
    # Half a microsecond, so that what is shown from a moment on is shown at that moment.
    return np.maximum(np.searchsorted(times, middles + 5e-7, side="right") - 1, 0)
