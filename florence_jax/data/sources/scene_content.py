"""Scenes whose content is known to the last: what is where, how often, in which colour; for questions and captions.

A scene has a grid of three rows and three columns. Two things are there once, each painted in a colour of its own, in
different rows and different columns, so that it is clear which is left of, and which is above, the other. A third kind
of thing is there none to four times, painted or in its own colours. All is drawn evenly and independently, so that a
question alone says little about its answer.

A thing is *painted*: its drawing keeps its light and shade and takes the colour, so that a colour is true by
construction. Nothing is ever asked, or said, about the colour of what is not painted.

Each thing has one colour that it is painted in only in the split new_pairs: there it is always one of the two.
"""

import functools
import zlib
from typing import NamedTuple

import numpy as np

from florence_jax.data.sources.cutouts import embedded_cutout, turned
from florence_jax.data.sources.embedded import open_emoji
from florence_jax.data.sources.scenes import SCENE_NAMES, painted

CONTENT_SPLITS = {  # split -> split of the drawings, side of the photographs
    "train": ("train", "train"),
    "held_out": ("train", "held_out"),
    "new_style": ("new_style", "held_out"),
    "new_pairs": ("train", "held_out"),
}
CONTENT_COUNTS = {"train": 10000, "held_out": 500, "new_style": 500, "new_pairs": 500}
PAINTS = {
    "red": (225, 45, 45),
    "yellow": (250, 210, 40),
    "green": (50, 170, 70),
    "blue": (55, 100, 230),
    "purple": (160, 60, 200),
}
COLOUR_NAMES = tuple(PAINTS)
OWN_COLOURS = -1  # instead of the number of a colour: not painted
GRID_SIDE = 3  # rows, columns
MOST_COPIES = 4  # of the third kind of thing
CONTENT_SIDE, CONTENT_SIDES = 96, (32, 1024)  # pixels: usual, allowed
THING_SIDES = (0.24, 0.34)  # of the scene's side
TURNED = 20  # degrees to each side, at most
JITTER = 0.035  # of the scene's side, from the middle of a cell
CARD = (150, 150, 150, 255)  # RGBA
LIGHTS = (215, 290)  # of 256, what a drawing's colours are multiplied by


class Thing(NamedTuple):
    """One thing of a scene.

    Attributes:
      name: number in `SCENE_NAMES`. colour: number in `COLOUR_NAMES`, or `OWN_COLOURS`.
      row, column: from the upper left.
    """

    name: int
    colour: int
    row: int
    column: int


class Content(NamedTuple):
    """What is in a scene.

    Attributes:
      first, second: those that are there once.
      third: the name of the third kind, whether it is there or not.
      copies: of it.
    """

    first: Thing
    second: Thing
    third: int
    copies: tuple[Thing, ...]

    @property
    def free(self) -> list[tuple[int, int]]:
        """The cells where nothing is, rows and columns."""
        taken = {(thing.row, thing.column) for thing in self.things}
        return [cell for cell in np.ndindex(GRID_SIDE, GRID_SIDE) if cell not in taken]

    @property
    def things(self) -> tuple[Thing, ...]:
        """All of them."""
        return (self.first, self.second, *self.copies)


def withheld_colour(name: int) -> int:
    """The colour that a thing is painted in only in the split new_pairs; each colour is that of as many things."""
    return name % len(COLOUR_NAMES)


def is_new_pair(name: int, colour: int) -> bool:
    """Whether a thing in this colour is seen in the split new_pairs only."""
    return colour == withheld_colour(name)


def below(rng: np.random.Generator, count: int) -> int:
    """A whole number from 0 to count - 1, each as often."""
    return int(rng.random() * count)


def content_rng(split: str, index: int, what: str) -> np.random.Generator:
    """The source of chance for one side of a scene, such as its content or its picture."""
    return np.random.Generator(np.random.PCG64([zlib.crc32(f"{split} {what}".encode()), index]))


@functools.lru_cache(64)  # the questions of a scene are mostly asked for together
def compose(split: str, index: int) -> Content:
    """The content of scene `index`; no picture is made."""
    rng = content_rng(split, index, "content")
    pairs = [_pair(rng, split == "new_pairs"), _pair(rng, False)]
    while pairs[0][0] == pairs[1][0] or pairs[0][1] == pairs[1][1]:
        pairs = [_pair(rng, split == "new_pairs"), _pair(rng, False)]
    row, column = below(rng, GRID_SIDE), below(rng, GRID_SIDE)
    other_row, other_column = ((at + 1 + below(rng, GRID_SIDE - 1)) % GRID_SIDE for at in (row, column))
    first, second = Thing(*pairs[0], row, column), Thing(*pairs[1], other_row, other_column)
    third = below(rng, len(SCENE_NAMES))
    while third in (first.name, second.name):
        third = below(rng, len(SCENE_NAMES))
    others = [k for k in range(len(COLOUR_NAMES)) if k not in (first.colour, second.colour, withheld_colour(third))]
    colour = OWN_COLOURS if rng.random() < 0.5 else others[below(rng, len(others))]
    taken = {(first.row, first.column), (second.row, second.column)}
    free = [cell for cell in np.ndindex(GRID_SIDE, GRID_SIDE) if cell not in taken]
    copies = []
    for _ in range(below(rng, MOST_COPIES + 1)):
        copies.append(Thing(third, colour, *free.pop(below(rng, len(free)))))
    return Content(first, second, third, tuple(copies))


def _pair(rng: np.random.Generator, new: bool) -> tuple[int, int]:
    """A name and a colour: one that is withheld, or one of the others, each as often."""
    name = below(rng, len(SCENE_NAMES))
    if new:
        return name, withheld_colour(name)
    return name, (withheld_colour(name) + 1 + below(rng, len(COLOUR_NAMES) - 1)) % len(COLOUR_NAMES)


class ContentPainter:
    """Makes the pictures.

    Args:
      split: of `CONTENT_SPLITS`. side: pixels. backgrounds: one of `backgrounds.BACKGROUNDS`.
    """

    def __init__(self, split: str, side: int, backgrounds: str):
        self._split, self._side, self._backgrounds = split, side, backgrounds
        self._drawings, self._photographs = CONTENT_SPLITS[split]
        rows: dict[str, list[int]] = {name: [] for name in SCENE_NAMES}
        for row, drawing in enumerate(open_emoji(f"emoji:{self._drawings}").metadata()):
            rows.get(drawing["caption"], []).append(row)
        self._rows = list(rows.values())

    def picture(self, index: int, content: Content, card: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 (side, side, 3): scene `index`; a grey card covers the cell `card`, a row and a column."""
        rng = content_rng(self._split, index, "picture")
        patches = [self._patch(thing, rng) for thing in content.things]
        if card is not None:
            cell, (row, column) = self._side // GRID_SIDE, card
            patches.append((np.full((cell, cell, 4), CARD, np.uint8), column * cell, row * cell))
        return painted((self._side, self._side), patches, self._backgrounds, self._photographs, rng)

    def _patch(self, thing: Thing, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
        """A thing's cut-out, and its left and top."""
        rows = self._rows[thing.name]
        steps = embedded_cutout(self._drawings, rows[below(rng, len(rows))])
        assert steps is not None, "scenes are of things that can be cut out"
        small, large = THING_SIDES
        side = max(6, int(self._side * (small + (large - small) * rng.random())))
        patch = turned(steps, side, below(rng, 2 * TURNED + 1) - TURNED).astype(np.int32)
        if thing.colour != OWN_COLOURS:
            patch[..., :3] = _in_colour(patch, PAINTS[COLOUR_NAMES[thing.colour]])
        light = LIGHTS[0] + below(rng, LIGHTS[1] - LIGHTS[0])
        patch[..., :3] = np.minimum(patch[..., :3] * light >> 8, patch[..., 3:])
        centre = [
            int(self._side * ((2 * at + 1) / (2 * GRID_SIDE) + JITTER * (2 * rng.random() - 1)))
            for at in (thing.column, thing.row)
        ]
        return patch.astype(np.uint8), centre[0] - patch.shape[1] // 2, centre[1] - patch.shape[0] // 2


def _in_colour(patch: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Colours (h, w, 3) of a patch, premultiplied int32 (h, w, 4), that keep its light and shade and have this hue."""
    light = patch[..., :3] @ np.array([77, 150, 29]) >> 8  # at most alpha
    strength = 96 * patch[..., 3] + 160 * light >> 8
    return strength[..., None] * np.array(colour) // 255
