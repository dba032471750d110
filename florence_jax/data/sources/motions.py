"""Clips of one motion each: an embedded drawing that moves, grows, turns or appears before a photograph.

Motions come in pairs that are each other's time reversal, and so do the clips: one of the second motion of a pair is
one of the first, drawn anew, with its frames in reverse order. As sets of frames the clips of a pair are alike, so that
no single frame, and no mean over frames, tells which of the two it is. A clip depends on its split, its number, its
size and the kind of backgrounds, not on the machine: chance is numpy's PCG64, pixels are whole numbers.
"""

import functools
import zlib
from typing import NamedTuple

import numpy as np

from florence_jax.data.records import Record
from florence_jax.data.sources.backgrounds import photograph_crop, smooth_noise
from florence_jax.data.sources.cutouts import embedded_cutout, lay_over, turned
from florence_jax.data.sources.embedded import open_emoji
from florence_jax.data.sources.scenes import SCENE_SPLITS

# Each with its time reversal.
MOTION_PAIRS = (
    ("moves to the left", "moves to the right"),
    ("moves up", "moves down"),
    ("grows", "shrinks"),
    ("turns clockwise", "turns anticlockwise"),
    ("appears", "disappears"),
)
MOTIONS = tuple(motion for pair in MOTION_PAIRS for motion in pair)
# Shares of the frame's side.
MOVED_SIDES = (0.3, 0.5)  # the longer side of the object
SMALL_SIDES, LARGE_SIDES = (0.15, 0.3), (0.5, 0.8)  # the same, at both ends of growing
LEAST_WAY = 0.35  # from start to end of a movement
LEAST_TURN, MOST_TURN = 60, 240  # degrees
STARTS, LASTS = 0.3, 0.5  # of the clip: appearing begins up to the one share of it, and lasts at least the other
TURN_SEEN = 14  # of 255: the mean difference that turning by 45 degrees makes; below it a drawing is round


class _Pose(NamedTuple):
    """Where a drawing is, of each frame (T,): its centre in pixels, its longer side, its turn, its opacity of 255."""

    x: np.ndarray
    y: np.ndarray
    side: np.ndarray
    degrees: np.ndarray
    opacity: np.ndarray


class MotionClips:
    """The clips of a split, composed when they are asked for.

    Args:
      split: a key of `SCENE_SPLITS`, whose drawings and photographs it has.
      side: pixels of the square frames. frames: of a clip, at least 2.
      backgrounds: of `backgrounds.BACKGROUNDS`.
    """

    def __init__(self, split: str, side: int, frames: int, backgrounds: str):
        self.split, self._side, self._frames, self._backgrounds = split, side, frames, backgrounds
        self._drawings, self._photographs = SCENE_SPLITS[split]

    def __getitem__(self, index: int) -> Record:
        """ "key", "frames", uint8 (T, side, side, 3), "label", a motion, each in turn, and "caption", a sentence."""
        motion = index % len(MOTIONS)
        kind, backwards = divmod(motion, 2)
        rng = np.random.Generator(np.random.PCG64([zlib.crc32(self.split.encode()), index]))
        name, steps = self._drawing(kind, rng)
        pose = _POSES[kind](self._side, self._frames, rng)
        frames = self._painted(steps, pose, rng)
        article = "an" if name[0] in "aeiou" else "a"
        return {
            "key": f"{self.split}-{index:05}",
            "frames": frames[::-1] if backwards else frames,
            "label": MOTIONS[motion],
            "caption": f"{article} {name} {MOTIONS[motion]}",
        }

    def _drawing(self, kind: int, rng: np.random.Generator) -> tuple[str, tuple[np.ndarray, ...]]:
        """The name and the cut-out of a drawing; of those that turn, one that can be seen to."""
        names = _names(self._drawings)
        while True:
            row = int(rng.random() * len(names))
            steps = embedded_cutout(self._drawings, row)
            if steps is not None and (_POSES[kind] is not _turn or _turn_seen(self._drawings, row)):
                return names[row], steps

    def _painted(self, steps: tuple[np.ndarray, ...], pose: _Pose, rng: np.random.Generator) -> np.ndarray:
        size = self._side, self._side
        if self._backgrounds == "photographs":
            canvas = photograph_crop(self._photographs, size, rng)
        else:
            canvas = smooth_noise(size, rng)
        light = 190 + int(130 * rng.random())  # of 256
        frames, made, patch = [], (-1, -1), canvas
        for x, y, side, degrees, opacity in zip(*(values.tolist() for values in pose), strict=True):
            if made != (side, degrees):
                made, patch = (side, degrees), turned(steps, side, degrees).astype(np.int32)
                patch[..., :3] = np.minimum(patch[..., :3] * light >> 8, patch[..., 3:])
            frames.append(canvas.astype(np.int32))
            lay_over(frames[-1], patch * opacity // 255, x - patch.shape[1] // 2, y - patch.shape[0] // 2)
        return np.stack(frames).astype(np.uint8)


@functools.cache
def _names(drawings: str) -> list[str]:
    return [record["caption"] for record in open_emoji(f"emoji:{drawings}").metadata()]


@functools.cache
def _turn_seen(drawings: str, row: int) -> bool:
    """Whether a drawing looks another when it is turned."""
    steps = embedded_cutout(drawings, row)
    if steps is None:
        return False
    middles = []
    for degrees in (0, 45):
        patch = np.pad(turned(steps, 32, degrees).astype(np.int32), ((16, 16), (16, 16), (0, 0)))
        top, left = (patch.shape[0] - 32) // 2, (patch.shape[1] - 32) // 2
        middles.append(patch[top : top + 32, left : left + 32])
    return float(np.abs(middles[0] - middles[1]).mean()) >= TURN_SEEN


# -- the first motion of each pair ------------------------------------------------------------------------------------


def _between(low: float, high: float, rng: np.random.Generator) -> float:
    return low + (high - low) * rng.random()


def _line(start: float, end: float, frames: int) -> np.ndarray:
    """Int64 (frames,), from one to the other at one speed."""
    return np.round(start + (end - start) * np.arange(frames) / (frames - 1)).astype(np.int64)


def _still(side: int, frames: int, rng: np.random.Generator, room: float) -> _Pose:
    """A drawing that stays where it is, its centre `room` pixels or more from the border."""
    x, y = (_between(room, side - room, rng) for _ in range(2))
    values = x, y, side * _between(*MOVED_SIDES, rng), _between(-20, 20, rng), 255
    return _Pose(*(_line(value, value, frames) for value in values))


def _way(side: int, rng: np.random.Generator) -> tuple[float, float]:
    """Ends of a movement along an axis, the far one first."""
    room = side * MOVED_SIDES[0] / 2
    while True:
        near, far = sorted(_between(room, side - room, rng) for _ in range(2))
        if far - near >= LEAST_WAY * side:
            return far, near


def _across(side: int, frames: int, rng: np.random.Generator) -> _Pose:
    return _still(side, frames, rng, side * MOVED_SIDES[0] / 2)._replace(x=_line(*_way(side, rng), frames))


def _upwards(side: int, frames: int, rng: np.random.Generator) -> _Pose:
    return _still(side, frames, rng, side * MOVED_SIDES[0] / 2)._replace(y=_line(*_way(side, rng), frames))


def _grow(side: int, frames: int, rng: np.random.Generator) -> _Pose:
    small, large = (side * _between(*range_, rng) for range_ in (SMALL_SIDES, LARGE_SIDES))
    return _still(side, frames, rng, side * LARGE_SIDES[0] / 2)._replace(side=_line(small, large, frames))


def _turn(side: int, frames: int, rng: np.random.Generator) -> _Pose:
    start, turn = _between(0, 360, rng), _between(LEAST_TURN, MOST_TURN, rng)
    return _still(side, frames, rng, side * MOVED_SIDES[1] / 2)._replace(degrees=_line(start, start - turn, frames))


def _appear(side: int, frames: int, rng: np.random.Generator) -> _Pose:
    start = _between(0, STARTS, rng)
    end = start + _between(LASTS, 1 - start, rng)
    share = (np.arange(frames) / (frames - 1) - start) / (end - start)
    opacity = np.round(255 * share.clip(0, 1)).astype(np.int64)
    return _still(side, frames, rng, side * MOVED_SIDES[0] / 2)._replace(opacity=opacity)


_POSES = (_across, _upwards, _grow, _turn, _appear)
