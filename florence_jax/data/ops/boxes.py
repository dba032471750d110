"""Boxes of a record as arrays of one shape; importing this module registers the op."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from florence_jax.boxes import box_areas
from florence_jax.data.box_classes import judged_classes
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

    "attribute_ids" (n, A), where a record has them, become int32 (most, A), -1 for none.

    Args:
      most: slots.
      crowd: what becomes of crowds and groups: 'ignore', or 'background', which leaves them out.
      judged: whether to add "judged", bool (K,): of which of K classes people said where they are and where not. Of the
        others what has no box is unknown, not background. A class of which all boxes are cut away counts as unknown.
      context: has "class_sets", bool (S, K), of the source; see `data.box_classes`.
    """

    reads = frozenset(("boxes", "class_ids"))

    def __init__(
        self, most: int, crowd: str = "ignore", judged: bool = False, context: Mapping[str, Any] | None = None
    ):
        self.most, self.crowd = checked_pixels(most), crowd
        if crowd not in CROWDS:
            raise UserError(f"crowd={crowd!r}: choose one of {', '.join(CROWDS)}")
        class_sets = (context or {}).get("class_sets")
        if judged and class_sets is None:
            raise UserError("judged needs 'class_sets' in the context")
        self.class_sets = np.asarray(class_sets, bool) if judged else None

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
        more: Example = {}
        if self.class_sets is not None:
            more["judged"] = judged_classes(example, self.class_sets)
        attributes = np.asarray(example.get("attribute_ids", np.zeros((len(boxes), 0))), np.int32)
        if self.crowd == "background":
            boxes, class_ids, ignore, attributes = (each[~crowd] for each in (boxes, class_ids, ignore, attributes))
        cut = 0
        if len(boxes) > self.most:
            boxes, class_ids, ignore, attributes, cut = self._fitted(boxes, class_ids, ignore, attributes)
        room = self.most - len(boxes)
        if "attribute_ids" in example:
            more["attribute_ids"] = np.pad(attributes, ((0, room), (0, 0)), constant_values=-1)
        padded = {"boxes": np.pad(boxes, ((0, room), (0, 0))), "class_ids": np.pad(class_ids, (0, room))}
        padded |= {"objects": np.pad(~ignore, (0, room)), "ignore": np.pad(ignore, (0, room))}
        return example | padded | more | {"boxes_cut": np.int32(cut)}

    def _fitted(
        self, boxes: np.ndarray, class_ids: np.ndarray, ignore: np.ndarray, attributes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        objects = np.flatnonzero(~ignore)
        largest = objects[np.argsort(-box_areas(boxes[objects]), kind="stable")]
        kept = np.sort(largest[: self.most - max(1, self.most // IGNORE_SHARE)])
        places = boxes[np.setdiff1d(np.arange(len(boxes)), kept)]
        hulls = merge_boxes(places, self.most - len(kept))
        boxes = np.concatenate([boxes[kept], hulls])
        class_ids = np.concatenate([class_ids[kept], np.zeros(len(hulls), np.int32)])
        attributes = np.pad(attributes[kept], ((0, len(hulls)), (0, 0)), constant_values=-1)
        return boxes, class_ids, np.arange(len(boxes)) >= len(kept), attributes, len(objects) - len(kept)


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
