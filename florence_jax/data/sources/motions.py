"""Clips of one motion each: an embedded drawing that moves, grows, turns or appears before a photograph.

Motions come in pairs that are each other's time reversal, and so do the clips: one of the second motion of a pair is
one of the first, drawn anew, with its frames in reverse order. As sets of frames the clips of a pair are alike, so that
no single frame, and no mean over frames, tells which of the two it is. A clip depends on its split, its number, its
size and the kind of backgrounds, not on the machine: chance is numpy's PCG64, pixels are whole numbers.
"""

import functools
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from florence_jax.data.records import BaseSource, Record, evenly
from florence_jax.data.sources.backgrounds import (
    SCENE_PHOTOGRAPHS,
    choose_backgrounds,
    photograph_crop,
    smooth_noise,
)
from florence_jax.data.sources.cutouts import embedded_cutout, lay_over, turned
from florence_jax.data.sources.embedded import open_emoji
from florence_jax.data.sources.scenes import SCENE_SPLITS
from florence_jax.data.video_containers import VIDEO_INSTALL
from florence_jax.data.video_writer import VIDEO_FORMATS, encode_video
from florence_jax.errors import UserError, require

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
# Of a source 'motions:SPLIT', unless its name says others.
MOTION_KIND = "motions"
MOTION_COUNTS = {"train": 32_000, "held_out": 500, "new_style": 500, "new_names": 500}
MOTION_SIDE, MOTION_FRAMES, MOTION_RATE = 64, 16, 8  # pixels, frames, frames a second


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
        record, steps, rng = self._drawn(index)
        kind, backwards = divmod(index % len(MOTIONS), 2)
        frames = self._painted(steps, _POSES[kind](self._side, self._frames, rng), rng)
        return record | {"frames": frames[::-1] if backwards else frames}

    def described(self, index: int) -> Record:
        """The record without its frames; nothing is painted."""
        return self._drawn(index)[0]

    def _drawn(self, index: int) -> tuple[Record, tuple[np.ndarray, ...], np.random.Generator]:
        """What moves in a clip and how it is called, and the chance that draws the rest."""
        label = MOTIONS[index % len(MOTIONS)]
        rng = np.random.Generator(np.random.PCG64([zlib.crc32(self.split.encode()), index]))
        name, steps = self._drawing(index % len(MOTIONS) // 2, rng)
        article = "an" if name[0] in "aeiou" else "a"
        return (
            {"key": f"{self.split}-{index:05}", "label": label, "caption": f"{article} {name} {label}"},
            steps,
            rng,
        )

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


class MotionVideos(BaseSource):
    """Clips of motions as videos, 'motions:SPLIT[:COUNT[:CODEC[:BACKGROUND]]]', composed when they are asked for.

    SPLIT as in `MotionClips`; CODEC of `VIDEO_FORMATS`, in which each is encoded when it is asked for, or nothing for
    frames as they are; BACKGROUND photographs or noise; photographs, where they are installed.

    "video" is bytes or uint8 (T, H, W, 3), "class_id" the number of the motion, "caption" a sentence.

    Args:
      spec: as above, which is also its name.

    Attributes:
      name, summary: as of other sources. class_names: the motions.

    Raises:
      UserError: for another name, photographs that are not installed, a codec without PyAV.
    """

    def __init__(self, spec: str):
        self.name, self.class_names = spec, MOTIONS
        split, count, self._codec, backgrounds = _parse(spec)
        if self._codec:
            require("av", VIDEO_INSTALL)
        self._count, self._backgrounds = count, choose_backgrounds(backgrounds)
        self._clips = MotionClips(split, MOTION_SIDE, MOTION_FRAMES, self._backgrounds)

    @property
    def summary(self) -> dict[str, Any]:
        """What clips are composed of."""
        drawings, photographs = SCENE_SPLITS[self._clips.split]
        on = {
            "photographs": f"{len(SCENE_PHOTOGRAPHS[photographs])} photographs of scikit-image and scikit-learn",
            "noise": "smooth noise",
        }[self._backgrounds]
        says = f"{self.name}: {self._count:,} clips of {len(MOTIONS)} motions, composed when they are asked for, of "
        says += f"embedded drawings (emoji:{drawings}) on {on}"
        says += f", encoded by {self._codec}" if self._codec else ", as frames"
        return {"videos": self._count, "backgrounds": self._backgrounds, "says": says}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        record = self._clips[index]
        frames = record.pop("frames")
        video = encode_video(frames, MOTION_RATE, self._codec, exact=True) if self._codec else frames
        return record | {"class_id": index % len(MOTIONS), "video": video}

    def described(self, index: int) -> Record:
        """See `records.described`; nothing is painted."""
        return self._clips.described(index) | {"class_id": index % len(MOTIONS)}

    def metadata(self) -> Iterator[Record]:
        """All records without their videos; nothing is painted."""
        return map(self.described, range(len(self)))

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; nothing is painted."""
        return [self.described(index) for index in evenly(len(self), count).tolist()]


def _parse(spec: str) -> tuple[str, int, str, str]:
    """Split, count, codec, backgrounds. Raises UserError."""
    split, count, codec, backgrounds, *more = spec.split(":")[1:] + [""] * 4
    wrong = any(more) or (count and not re.fullmatch(r"[1-9]\d{0,8}", count)) or codec not in ("", *VIDEO_FORMATS)
    if split not in SCENE_SPLITS or wrong:
        raise UserError(
            f"data source {spec!r}: write {MOTION_KIND}:SPLIT[:COUNT[:CODEC[:BACKGROUND]]] with SPLIT of "
            f"{', '.join(SCENE_SPLITS)}, CODEC of {', '.join(VIDEO_FORMATS)}; such as motions:train:1000:h264"
        )
    return split, int(count or MOTION_COUNTS[split]), codec, backgrounds


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
