"""Which frames of a video are looked at: functions of how many there are, as the references of each data set have them.

A clip of n frames, i apart, spans n * i frames. All numbers are below the number of frames, whatever that is.
"""

import numpy as np


def random_clip(count: int, frames: int, interval: int, rng: np.random.Generator) -> np.ndarray:
    """Int64 (frames,): one clip at a random place, as Video Swin is trained; a shorter video goes round."""
    gap = count - frames * interval + 1
    start = int(rng.integers(gap)) if gap > 0 else 0
    return (start + interval * np.arange(frames)) % count


def even_clips(count: int, clips: int, frames: int, interval: int) -> np.ndarray:
    """Int64 (clips, frames): clips spread evenly, as Video Swin is tested; all at 0 where the video is shorter."""
    gap = (count - frames * interval + 1) / clips if count >= frames * interval else 0.0
    starts = np.floor(np.arange(clips) * gap + gap / 2).astype(np.int64)
    return (starts[:, None] + interval * np.arange(frames)) % count
