"""Pictures with bright rectangles on dark noise, drawn when they are asked for."""

import re
import zlib
from collections.abc import Iterator

import numpy as np

from florence_jax.data.records import BaseSource, Record
from florence_jax.errors import UserError


class ToyShapes(BaseSource):
    """One to three boxes a picture; half of the pictures are landscape, half portrait.

    Args:
      name: 'toy:SPLIT:COUNT'; a split is a word that pictures depend on.
    """

    def __init__(self, name: str):
        given = re.fullmatch(r"toy:(\w+):(\d+)", name)
        if given is None:
            raise UserError(f"data source {name!r}: write toy:SPLIT:COUNT, such as toy:train:512")
        self.name, self._split, self._count = name, given[1], int(given[2])

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        record, rng = self._layout(index)
        image = rng.integers(0, 60, (record["height"], record["width"], 3), np.uint8)
        for x1, y1, x2, y2 in record["boxes"]:
            image[y1:y2, x1:x2] = rng.integers(140, 256, 3, np.uint8)
        return record | {"image": image}

    def metadata(self) -> Iterator[Record]:
        """All records without pictures: none is drawn."""
        return (self._layout(index)[0] for index in range(len(self)))

    def _layout(self, index: int) -> tuple[Record, np.random.Generator]:
        rng = np.random.default_rng([zlib.crc32(self._split.encode()), index])
        sides = [int(rng.integers(40, 64)), int(rng.integers(24, 40))]
        width, height = sides if rng.random() < 0.5 else sides[::-1]
        size = rng.integers((width // 4, height // 4), (width // 2, height // 2), (int(rng.integers(1, 4)), 2))
        corner = (rng.random(size.shape) * ((width, height) - size)).astype(np.int64)
        boxes = np.concatenate([corner, corner + size], axis=1).tolist()
        name = f"{self._split}-{index:05}"
        return {"key": name, "picture_id": name, "width": width, "height": height, "boxes": boxes}, rng
