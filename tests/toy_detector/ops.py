"""Boxes of a record as arrays of one shape; importing this module registers the op."""

import numpy as np

from florence_jax.data.ops.registry import Example, Op, key_of, op
from florence_jax.data.records import BadRecord


@op("toy_pad_boxes")
class PadBoxes(Op):
    """Room for `most` boxes: "boxes" float32 (most, 4), "objects" and "ignore" bool (most,), both False for padding.

    Goes after the ops that move pixels, which take the boxes along and say which are to be ignored.
    """

    reads = frozenset(("boxes",))

    def __init__(self, most: int):
        self.most = most

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises BadRecord for more boxes: none is left out without a word."""
        boxes = np.asarray(example["boxes"], np.float32).reshape(-1, 4)
        ignore = np.asarray(example.get("ignore", np.zeros(len(boxes))), bool)
        room = self.most - len(boxes)
        if room < 0:
            raise BadRecord(key_of(example), f"it has {len(boxes)} boxes, a batch has room for {self.most}")
        padded = {"boxes": np.pad(boxes, ((0, room), (0, 0)))}
        return example | padded | {"objects": np.pad(~ignore, (0, room)), "ignore": np.pad(ignore, (0, room))}
