"""What the sources of scenes with a known content share."""

import functools
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from florence_jax.data.records import BaseSource, Record, scattered
from florence_jax.data.sources.backgrounds import SCENE_PHOTOGRAPHS, choose_backgrounds
from florence_jax.data.sources.scene_content import (
    COLOUR_NAMES,
    CONTENT_COUNTS,
    CONTENT_SIDE,
    CONTENT_SIDES,
    CONTENT_SPLITS,
    ContentPainter,
    compose,
)
from florence_jax.data.sources.scenes import SCENE_NAMES
from florence_jax.errors import UserError


class ContentSource(BaseSource):
    """Records of scenes, `each` of every scene; a subclass says what they are.

    Args:
      name: 'KIND:SPLIT[:COUNT[:SIDE[:BACKGROUND]]]'.

    Attributes:
      name, split, count: the number of scenes.

    Raises:
      UserError: for another name, or photographs that are not installed.
    """

    kind: str
    each = 1

    def __init__(self, name: str):
        self.name = name
        self.split, self.count, self._side, backgrounds = _parse(name, self.kind)
        self._backgrounds = choose_backgrounds(backgrounds)

    @functools.cached_property
    def painter(self) -> ContentPainter:
        """Makes the pictures."""
        return ContentPainter(self.split, self._side, self._backgrounds)

    def __len__(self) -> int:
        return self.each * self.count

    def __getitem__(self, index: int) -> Record:
        return self.described(index) | self.pictures(index)

    @abstractmethod
    def described(self, index: int) -> Record:
        """See `records.described`; nothing is painted."""

    def pictures(self, index: int) -> Record:
        """What of a record is not in `described`."""
        scene = index // self.each
        return {"image": self.painter.picture(scene, compose(self.split, scene))}

    def metadata(self) -> Iterator[Record]:
        """All records without their pictures; nothing is painted."""
        return map(self.described, range(len(self)))

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; nothing is painted."""
        return list(map(self.described, scattered(len(self), count).tolist()))

    @property
    def image_ids(self) -> np.ndarray:
        """int (N,): the scene of each record."""
        return np.arange(len(self)) // self.each

    def sizes(self, scene: int) -> Record:
        """The fields that every record of a scene has."""
        return {"image_id": scene, "width": self._side, "height": self._side}

    def found(self, what: str) -> dict[str, Any]:
        """The summary of a source; `what` it is."""
        on = "smooth noise"
        if self._backgrounds == "photographs":
            count = len(SCENE_PHOTOGRAPHS[CONTENT_SPLITS[self.split][1]])
            on = f"{count} photographs of scikit-image and scikit-learn"
        says = (
            f"{self.name}: {what}, composed when they are asked for, of embedded drawings "
            f"(emoji:{CONTENT_SPLITS[self.split][0]}, {len(SCENE_NAMES)} things, {len(COLOUR_NAMES)} colours) on "
            f"{on}; they are no photographs"
        )
        return {"scenes": self.count, "backgrounds": self._backgrounds, "says": says}


def _parse(name: str, kind: str) -> tuple[str, int, int, str]:
    """Split, count, side, backgrounds. Raises UserError."""
    parts: Sequence[str] = name.partition(":")[2].split(":") + [""] * 4
    split, count, side, backgrounds = parts[:4]
    numbers = [word for word in (count, side) if word and not re.fullmatch(r"[1-9]\d{0,8}", word)]
    if split not in CONTENT_SPLITS or numbers or any(parts[4:]):
        raise UserError(
            f"data source {name!r}: write {kind}:SPLIT[:COUNT[:SIDE[:BACKGROUND]]] with SPLIT of "
            f"{', '.join(CONTENT_SPLITS)}; such as {kind}:train:1000"
        )
    pixels = int(side or CONTENT_SIDE)
    if not CONTENT_SIDES[0] <= pixels <= CONTENT_SIDES[1]:
        raise UserError(f"data source {name!r}: the side is of {CONTENT_SIDES[0]} to {CONTENT_SIDES[1]} pixels")
    return split, int(count or CONTENT_COUNTS[split]), pixels, backgrounds
