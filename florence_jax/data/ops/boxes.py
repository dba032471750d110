"""Boxes of a record as arrays of one shape; importing this module registers the op."""

import numpy as np

from florence_jax.boxes import box_areas
from florence_jax.data.ops.registry import Example, Op, checked_pixels, key_of, op
from florence_jax.data.records import BadRecord
from florence_jax.errors import UserError

CROWDS = ("ignore", "background")
IGNORE_SHARE = 8  # one slot of so many is kept for ignored regions where there are more boxes than slots


@op("pad_boxes")
class PadBoxes(Op):
    """Room for `most` boxes a picture; goes after the ops that move pixels, which take the boxes along.

    "boxes" float32 (most, 4), "class_ids" int32 (most,), "objects" and "ignore" bool (most,), both False for padding,
    and "boxes_cut", int32: how many objects had no room.

    Of more boxes than slots the objects of the largest area stay objects (of equal ones the first). The others are cut:
    they are counted, and their places are ignored, never background. For those places, and what was to be ignored
    before, an eighth of the slots is kept; where even that is too few, neighbouring places become one, their hull.

    Args:
      most: slots.
      crowd: what becomes of crowds and groups: 'ignore', or 'background', which leaves them out.
    """

    reads = frozenset(("boxes", "class_ids"))

    def __init__(self, most: int, crowd: str = "ignore"):
        self.most, self.crowd = checked_pixels(most), crowd
        if crowd not in CROWDS:
            raise UserError(f"crowd={crowd!r}: choose one of {', '.join(CROWDS)}")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises BadRecord for fields that do not fit the boxes."""
        boxes = np.asarray(example["boxes"], np.float32).reshape(-1, 4)
        class_ids = np.asarray(example["class_ids"], np.int32)
        crowd, ignore = np.zeros(len(boxes), bool), np.zeros(len(boxes), bool)
        for name in ("iscrowd", "is_group_of", "ignore"):
            if (marks := example.get(name)) is not None:
                marks = np.asarray(marks, bool)
                if marks.shape != ignore.shape:
                    raise BadRecord(key_of(example), f"it has {len(boxes)} boxes, but {len(marks)} {name}")
                ignore |= marks
                crowd |= marks & (name != "ignore")
        if class_ids.shape != ignore.shape:
            raise BadRecord(key_of(example), f"it has {len(boxes)} boxes, but {len(class_ids)} class_ids")
        if self.crowd == "background":
            boxes, class_ids, ignore = boxes[~crowd], class_ids[~crowd], ignore[~crowd]
        cut = 0
        if len(boxes) > self.most:
            boxes, class_ids, ignore, cut = self._fitted(boxes, class_ids, ignore)
        room = self.most - len(boxes)
        padded = {"boxes": np.pad(boxes, ((0, room), (0, 0))), "class_ids": np.pad(class_ids, (0, room))}
        padded |= {"objects": np.pad(~ignore, (0, room)), "ignore": np.pad(ignore, (0, room))}
        return example | padded | {"boxes_cut": np.int32(cut)}

    def _fitted(
        self, boxes: np.ndarray, class_ids: np.ndarray, ignore: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        objects = np.flatnonzero(~ignore)
        largest = objects[np.argsort(-box_areas(boxes[objects]), kind="stable")]
        kept = np.sort(largest[: self.most - max(1, self.most // IGNORE_SHARE)])
        places = boxes[np.setdiff1d(np.arange(len(boxes)), kept)]
        hulls = merge_boxes(places, self.most - len(kept))
        boxes = np.concatenate([boxes[kept], hulls])
        class_ids = np.concatenate([class_ids[kept], np.zeros(len(hulls), np.int32)])
        return boxes, class_ids, np.arange(len(boxes)) >= len(kept), len(objects) - len(kept)


def merge_boxes(boxes: np.ndarray, most: int) -> np.ndarray:
    """At most `most` boxes, (K, 4), that cover (N, 4) boxes: the hulls of neighbours.

    The group with the longest spread of centres is split at its median until there are `most` groups: O(N log N) each.
    """
    if len(boxes) <= most:
        return boxes
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    groups = [np.arange(len(boxes))]
    while len(groups) < most:
        spreads = [np.ptp(centres[group], axis=0) for group in groups]
        widest = int(np.argmax([spread.max() if len(g) > 1 else -1 for spread, g in zip(spreads, groups, strict=True)]))
        group = groups.pop(widest)
        order = group[np.argsort(centres[group, int(np.argmax(spreads[widest]))], kind="stable")]
        groups += [order[: len(order) // 2], order[len(order) // 2 :]]
    return np.stack([np.concatenate([boxes[g, :2].min(0), boxes[g, 2:].max(0)]) for g in groups])
