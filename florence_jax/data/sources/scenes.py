"""Scenes with exact boxes, composed when they are asked for: the embedded drawings on photographs, or on smooth noise.

The drawings are cut out, scaled, turned, lit and laid over each other; what can still be seen of one is its mask, and
the bounds of the mask are its box. Scenes are composed of real drawings (and photographs), but are no photographs: what
is measured on them compares methods. A scene depends on its split, its number and the options in the name of the
source, not on the machine: chance is numpy's PCG64, pixels are whole numbers.
"""

import dataclasses
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from florence_jax.data.box_problems import Problems
from florence_jax.data.records import BaseSource, Record, evenly
from florence_jax.data.sources.backgrounds import SCENE_PHOTOGRAPHS, choose_backgrounds, photograph_crop, smooth_noise
from florence_jax.data.sources.cutouts import embedded_cutout, lay_over, turned
from florence_jax.data.sources.embedded import open_emoji
from florence_jax.errors import UserError

# Split of scenes -> split of the drawings, side of the photographs.
SCENE_SPLITS = {
    "train": ("train", "train"),
    "held_out": ("train", "held_out"),
    "new_style": ("new_style", "held_out"),
    "new_names": ("new_names", "held_out"),
}
SCENE_COUNTS = {"train": 10000, "held_out": 500, "new_style": 500, "new_names": 500}  # unless the name says another
SCENE_GROUPS = (
    "smileys & emotion",
    "people & body",
    "animals & nature",
    "food & drink",
    "travel & places",
    "activities",
    "objects",
    "symbols",
)
# Things that all three styles draw clearly apart.
SCENE_NAMES = (
    "airplane",
    "alarm clock",
    "automobile",
    "balloon",
    "banana",
    "bell",
    "cactus",
    "carrot",
    "crab",
    "doughnut",
    "elephant",
    "frog",
    "guitar",
    "key",
    "lady beetle",
    "locomotive",
    "pineapple",
    "pizza",
    "sailboat",
    "sunflower",
)
SCENE_CLASSES = {
    "groups": ("group", SCENE_GROUPS),
    "names20": ("caption", SCENE_NAMES),
}  # field of a drawing, its values
SCENE_SIDE, SCENE_SIDES = 128, (32, 2048)  # pixels of the longer side: usual, allowed
# (height, width) in quarters of the side; each is drawn as often as the others.
SHAPES = 4 * ((4, 4),) + 2 * ((3, 4), (4, 3)) + ((2, 4), (4, 2))
NO_OBJECTS = 0.06  # of the scenes have no object,
WITH_CROWD = 0.1  # of the others have a crowd behind their objects
MOST_OBJECTS = 6
OBJECT_SIDES = (0.14, 0.6)  # of the scene's longer side; the logarithm is uniform
CROWD_SIDES, CROWD_COPIES = (0.08, 0.16), (12, 30)
TURN = 30  # degrees to each side, at most
TRIES = 4  # places that are tried for an object
IN_FRAME = 0.7  # of an object's mask must lie in the picture,
STAYS_VISIBLE = 0.4  # of each mask must stay visible when another is laid over it
OPAQUE = 128  # alpha from which on a pixel is of the mask
BLURRED = 0.25  # of the scenes


@dataclasses.dataclass
class _Layout:
    """A scene before it is painted.

    Attributes:
      owner: int16 (H, W), what is seen at each pixel: 0 background, else 1 + the number of the object.
      patches: what is laid down in turn: premultiplied RGBA, left, top.
      whole: of each object the pixels of its mask, seen or not.
      class_ids, crowds: of each object.
    """

    owner: np.ndarray
    patches: list[tuple[np.ndarray, int, int]] = dataclasses.field(default_factory=list)
    whole: list[int] = dataclasses.field(default_factory=list)
    class_ids: list[int] = dataclasses.field(default_factory=list)
    crowds: list[bool] = dataclasses.field(default_factory=list)

    def place(self, patch: np.ndarray, left: int, top: int, number: int) -> bool:
        """Lays a patch down as part of object `number` (from 1), unless it would hide too much, or be outside."""
        height, width = self.owner.shape
        mask = patch[..., 3] >= OPAQUE
        inner = mask[max(0, -top) : height - top, max(0, -left) : width - left]
        region = self.owner[max(0, top) : top + patch.shape[0], max(0, left) : left + patch.shape[1]]
        total = int(mask.sum())
        if int(inner.sum()) < IN_FRAME * total or not total:
            return False
        hidden = np.bincount(region[inner], minlength=len(self.whole) + 1)
        seen = np.bincount(self.owner.ravel(), minlength=len(self.whole) + 1)
        left_over = seen - hidden
        if any(left_over[k] < STAYS_VISIBLE * self.whole[k - 1] for k in range(1, len(self.whole) + 1) if k != number):
            return False
        region[inner] = number
        self.patches.append((patch, left, top))
        if number > len(self.whole):
            self.whole.append(0)
        self.whole[number - 1] += total
        return True


class Scenes(BaseSource):
    """A `BoxSource`, 'scenes:SPLIT[:COUNT[:CLASSES[:SIDE[:BACKGROUND]]]]'; a part may be empty for its default.

    SPLIT is train, held_out (the drawings of train, arranged anew on other photographs), new_style (a third vendor's
    drawings of the names of train) or new_names (of other names). CLASSES: groups, 8 of them, or names20. SIDE: pixels
    of the longer side. BACKGROUND: photographs or noise; photographs, where they are installed.

    "image" is uint8 (H, W, 3), "areas" are the visible pixels of each object.

    Args:
      name: as above.
      check: nothing is wrong with scenes.

    Attributes:
      name, summary, problems: as of other sets of boxes.
      class_names, category_ids: see `BoxSource`; not all numbers are used as ids.

    Raises:
      UserError: for another name, a class without drawings, or photographs that are not installed.
    """

    def __init__(self, name: str, check: bool = False):
        del check
        self.name, self.problems = name, Problems()
        split, count, classes, side, backgrounds = _parse(name)
        self._split, self._count, self._classes = split, count, classes
        self._side, self._backgrounds = side, choose_backgrounds(backgrounds)
        self._drawings, self._photographs = SCENE_SPLITS[split]
        field, names = SCENE_CLASSES[classes]
        rows: dict[str, list[int]] = {each: [] for each in names}
        for row, drawing in enumerate(open_emoji(f"emoji:{self._drawings}").metadata()):
            rows.get(drawing[field], []).append(row)
        if lacking := [each for each in names if not rows[each]]:
            what = f"its drawings are of other names, {lacking[0]!r} is not among them"
            raise UserError(f"data source {name!r}: {what}; {split} has the classes groups only")
        self._rows = tuple(np.asarray(rows[each], np.int32) for each in names)
        self.class_names = names
        self.category_ids = tuple(range(1, 2 * len(names), 2))

    @property
    def summary(self) -> dict[str, Any]:
        """What scenes are composed of."""
        on = {
            "photographs": f"{len(SCENE_PHOTOGRAPHS[self._photographs])} photographs of scikit-image and scikit-learn",
            "noise": "smooth noise",
        }[self._backgrounds]
        drawings = sum(map(len, self._rows))
        says = (
            f"{self.name}: {self._count:,} scenes, composed when they are asked for, of {drawings:,} embedded drawings "
            f"(emoji:{self._drawings}, {len(self.class_names)} classes) on {on}; they are no photographs"
        )
        return {"scenes": self._count, "backgrounds": self._backgrounds, "drawings": drawings, "says": says}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        layout, rng = self._layout(index)
        image = painted(layout.owner.shape, layout.patches, self._backgrounds, self._photographs, rng)
        return self._record(index, layout) | {"image": image}

    def metadata(self) -> Iterator[Record]:
        """All records without their pictures: the masks are laid out, nothing is painted."""
        return (self._record(index, self._layout(index)[0]) for index in range(len(self)))

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; nothing is painted."""
        return [self._record(index, self._layout(index)[0]) for index in evenly(len(self), count).tolist()]

    def shapes(self) -> np.ndarray:
        """float32 (N, 2): height and width of all scenes, for `make_buckets`; none is laid out."""
        return np.array([self._size(self._rng(index)) for index in range(len(self))], np.float32).reshape(-1, 2)

    # -- layout -----------------------------------------------------------------------------------------------------

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([zlib.crc32(self._split.encode()), index]))

    def _size(self, rng: np.random.Generator) -> tuple[int, int]:
        """(height, width)."""
        high, wide = SHAPES[int(rng.random() * len(SHAPES))]
        return self._side * high // 4, self._side * wide // 4

    def _layout(self, index: int) -> tuple[_Layout, np.random.Generator]:
        """The scene `index`, and the source of chance for how it is painted."""
        rng = self._rng(index)
        layout = _Layout(np.zeros(self._size(rng), np.int16))
        if rng.random() >= NO_OBJECTS:
            if rng.random() < WITH_CROWD:
                self._add_crowd(layout, rng)
            for _ in range(1 + int(rng.random() * MOST_OBJECTS)):
                self._add_object(layout, rng)
        return layout, rng

    def _drawing(self, rng: np.random.Generator) -> tuple[int, tuple[np.ndarray, ...]]:
        """A class, each as often as the others, and one of its drawings that can be cut out."""
        label = int(rng.random() * len(self._rows))
        while True:
            row = int(self._rows[label][int(rng.random() * len(self._rows[label]))])
            if (steps := embedded_cutout(self._drawings, row)) is not None:
                return label, steps

    def _add_object(self, layout: _Layout, rng: np.random.Generator) -> None:
        label, steps = self._drawing(rng)
        patch = self._patch(steps, OBJECT_SIDES, rng)
        for _ in range(TRIES):
            if layout.place(patch, *_corner(layout.owner.shape, patch, rng), len(layout.whole) + 1):
                layout.class_ids.append(label)
                layout.crowds.append(False)
                return

    def _add_crowd(self, layout: _Layout, rng: np.random.Generator) -> None:
        """Many small copies of one drawing, close together: one object."""
        label, steps = self._drawing(rng)
        height, width = layout.owner.shape
        region = int(height * (0.4 + 0.4 * rng.random())), int(width * (0.4 + 0.5 * rng.random()))
        top, left = int(rng.random() * (height - region[0])), int(rng.random() * (width - region[1]))
        copies = CROWD_COPIES[0] + int(rng.random() * (CROWD_COPIES[1] - CROWD_COPIES[0]))
        for _ in range(copies):
            patch = self._patch(steps, CROWD_SIDES, rng)
            x, y = _corner(region, patch, rng)
            layout.place(patch, left + x, top + y, 1)
        if layout.whole:
            layout.class_ids.append(label)
            layout.crowds.append(True)
            layout.whole[0] = int((layout.owner == 1).sum())  # copies hide each other

    def _patch(self, steps: tuple[np.ndarray, ...], sides: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
        """A cut-out, scaled, turned, and lighter or darker."""
        small, large = sides
        side = max(6, int(self._side * small * (large / small) ** rng.random()))
        patch = turned(steps, side, int((2 * TURN + 1) * rng.random()) - TURN).astype(np.int32)
        light = 190 + int(130 * rng.random())  # of 256
        patch[..., :3] = np.minimum(patch[..., :3] * light >> 8, patch[..., 3:])
        return patch.astype(np.uint8)

    # -- records ----------------------------------------------------------------------------------------------------

    def _record(self, index: int, layout: _Layout) -> Record:
        height, width = layout.owner.shape
        places = ndimage.find_objects(layout.owner, len(layout.whole))
        areas = np.bincount(layout.owner.ravel(), minlength=len(places) + 1)[1:]
        boxes = np.array([[x.start, y.start, x.stop, y.stop] for y, x in places], np.float32).reshape(-1, 4)
        return {
            "key": f"{self._split}-{index:06}",
            "image_id": index,
            "width": width,
            "height": height,
            "boxes": boxes,
            "class_ids": np.array(layout.class_ids, np.int32),
            "iscrowd": np.array(layout.crowds, bool),
            "is_group_of": np.zeros(len(boxes), bool),
            "areas": areas.astype(np.float32),
        }


def painted(
    size: tuple[int, int],
    patches: Sequence[tuple[np.ndarray, int, int]],
    backgrounds: str,
    photographs: str,
    rng: np.random.Generator,
) -> np.ndarray:
    """A scene's picture, uint8 (H, W, 3): patches on a background, sometimes blurred, lit at random.

    Args:
      size: (H, W).
      patches: premultiplied RGBA, left, top, in the order in which they are laid down.
      backgrounds: one of `backgrounds.BACKGROUNDS`. photographs: of which side.
      rng: source of chance.
    """
    if backgrounds == "photographs":
        canvas = photograph_crop(photographs, size, rng).astype(np.int32)
    else:
        canvas = smooth_noise(size, rng).astype(np.int32)
    for patch, left, top in patches:
        lay_over(canvas, patch, left, top)
    if rng.random() < BLURRED:
        canvas = _blurred(canvas)
    return _lit(canvas, rng)


def _corner(size: Sequence[int], patch: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Left and top of a patch whose centre is anywhere in a region (height, width) but near its border."""
    x, y = (int(edge * (0.08 + 0.84 * rng.random())) for edge in size[::-1])
    return x - patch.shape[1] // 2, y - patch.shape[0] // 2


def _blurred(canvas: np.ndarray) -> np.ndarray:
    """Means with the weights 1 2 1 along both axes."""
    wide = np.pad(canvas, ((1, 1), (1, 1), (0, 0)), "edge")
    rows = wide[:-2] + 2 * wide[1:-1] + wide[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:] + 8) >> 4


def _lit(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8: brighter or darker, and more so towards one side, with a tint."""
    height, width = canvas.shape[:2]
    level, *tint = (int(span * (2 * rng.random() - 1)) for span in (50, 16, 16, 16))
    across, down = (int(61 * rng.random()) - 30 for _ in range(2))
    slope = (
        across * (2 * np.arange(width)[None] - width) // width
        + down * (2 * np.arange(height)[:, None] - height) // height
    )
    gain = 256 + level + slope[..., None] + np.array(tint)
    return (canvas * gain >> 8).clip(0, 255).astype(np.uint8)


def _parse(name: str) -> tuple[str, int, str, int, str]:
    """Split, count, classes, side, backgrounds. Raises UserError."""
    _, _, given = name.partition(":")
    parts = given.split(":") + [""] * 4
    split, count, classes, side, backgrounds = parts[:5]
    numbers = [word for word in (count, side) if word and not re.fullmatch(r"[1-9]\d{0,8}", word)]
    if split not in SCENE_SPLITS or (classes or "groups") not in SCENE_CLASSES or numbers or any(parts[5:]):
        raise UserError(
            f"data source {name!r}: write scenes:SPLIT[:COUNT[:CLASSES[:SIDE[:BACKGROUND]]]] with SPLIT of "
            f"{', '.join(SCENE_SPLITS)}, CLASSES of {', '.join(SCENE_CLASSES)}; such as scenes:train:1000:names20"
        )
    pixels = int(side or SCENE_SIDE)
    if not SCENE_SIDES[0] <= pixels <= SCENE_SIDES[1]:
        raise UserError(
            f"data source {name!r}: the longer side of scenes is of {SCENE_SIDES[0]} to {SCENE_SIDES[1]} pixels"
        )
    return split, int(count or SCENE_COUNTS[split]), classes or "groups", pixels, backgrounds
