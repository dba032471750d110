"""What moves pixels: a warp, drawn once and applied to everything that lies in the picture.

Coordinates are of edges, in pixels: x to the right, y down, the centre of the first pixel at (0.5, 0.5). Boxes are x1,
y1, x2, y2.
"""

import abc
import copy
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from florence_jax.data.ops.image import PictureOp
from florence_jax.data.ops.registry import Example, Op, checked_number, key_of
from florence_jax.data.records import BadRecord
from florence_jax.errors import UserError

# Fields with one value a box, which go where their boxes go.
PER_BOX = ("class_ids", "iscrowd", "is_group_of", "scores", "ignore", "attribute_ids")


class Warp(Protocol):
    """A map of pictures of one size to pictures of one size."""

    @property
    def matrix(self) -> np.ndarray:
        """Float64 (2, 3), source -> target: (x', y') = matrix @ (x, y, 1)."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the target."""

    def picture(self, picture: Image.Image) -> Image.Image:
        """The target; the picture given is not changed, but may be what comes back."""


class GeometricOp(PictureOp):
    """An op that moves pixels: a subclass draws a `Warp`.

    Frames of a video all take the one warp that is drawn. Pictures of a list may have several sizes: one warp for each
    size, from the same random numbers.

    "boxes", (N, 4), go along. They are clipped to the picture; one of which nothing is left is dropped, with what
    belongs to it in the fields `PER_BOX`; one of which less than `visible` is left is marked in "ignore", bool (N,),
    neither an object nor background. After a rotation a box is the hull of its turned corners.

    "warp", float64 (3, 3), is composed of those of all ops, so that what is found in the target can be taken back to
    the source by `boxes_to_source`; of a list of K pictures it is (K, 3, 3).

    A warp is of the true size of a picture, also of one that is not read yet (`takes_unread`): neither what is drawn
    nor boxes depend on how it is read.

    Attributes:
      visible: share of a box's area, as it came to this op, from which on it counts; 0: whatever is left of it.
      by_centre: whether a box whose centre is not in the picture any more is marked in "ignore" too.
      gives_warp: whether an op after this one may use "warp"; `link_warps` sets it.
    """

    by_centre = False
    gives_warp = True

    def __init__(self, field: str = "image", visible: float = 0.0):
        super().__init__(field)
        self.visible = checked_number("visible", visible, 0, 1)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises UserError if the pictures are not decoded yet or padded already; BadRecord for boxes that are none."""
        if "valid" in example:
            raise UserError(f"op {self.name!r} comes after pad_image, which must be the last op that moves pixels")
        several = type(example.get(self.field)) is list  # not Frames, which all take one warp
        start = copy.deepcopy(rng) if several else rng
        drawn: dict[tuple[int, int], Warp] = {}
        used: list[Warp] = []

        def change(picture: Any) -> Image.Image:
            size = picture.height, picture.width
            if size not in drawn:
                drawn[size] = self.draw(size, copy.deepcopy(start) if drawn else rng)
            used.append(drawn[size])
            return used[-1].picture(picture)

        changed = example | {self.field: self._changed(example, change)}
        if self.gives_warp:
            steps = np.stack([_square(warp.matrix) for warp in used]) if several else _square(used[0].matrix)
            changed["warp"] = steps @ example["warp"] if "warp" in example else steps
        if "boxes" in example:
            if len(drawn) > 1:
                raise UserError(f"op {self.name!r}: boxes lie in one picture, the {self.field} are of several sizes")
            changed |= carry_boxes(example, used[0], self.visible, self.by_centre)
        return changed

    @abc.abstractmethod
    def draw(self, size: tuple[int, int], rng: np.random.Generator) -> Warp:
        """The warp for pictures of a size (height, width)."""


def link_warps(ops: Sequence[Op]) -> None:
    """Lets geometric ops leave "warp" out where no op after them reads it and a `keep` drops it.

    Raises:
      UserError: for geometric ops on two fields: there is one "warp", and one place for boxes.
    """
    fields = {op.field for op in ops if isinstance(op, GeometricOp)}
    if len(fields) > 1:
        raise UserError(f"ops that move pixels of {' and of '.join(sorted(fields))}: boxes and 'warp' are of one field")
    for place, op in enumerate(ops):
        if isinstance(op, GeometricOp):
            after = ops[place + 1 :]
            used, kept = any("warp" in later.reads for later in after), all(later.name != "keep" for later in after)
            op.gives_warp = used or kept


def map_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Boxes (..., 4) through a map (2, 3): float64 (..., 4), the hulls of the mapped corners."""
    boxes, matrix = np.asarray(boxes, np.float64), np.asarray(matrix, np.float64)
    centre, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    centre = centre @ matrix[:, :2].T + matrix[:, 2]
    half = half @ np.abs(matrix[:, :2]).T
    return np.concatenate([centre - half, centre + half], axis=-1)


def boxes_to_source(boxes: np.ndarray, warp: np.ndarray) -> np.ndarray:
    """Boxes (..., 4) in the picture that the ops left -> float64 (..., 4) in the source picture, not clipped.

    Args:
      boxes: x1, y1, x2, y2 in pixels.
      warp: (3, 3), as `GeometricOp` leaves it.
    """
    return map_boxes(boxes, np.linalg.inv(np.asarray(warp, np.float64))[:2])


def carry_boxes(example: Example, warp: Warp, visible: float, by_centre: bool = False) -> Example:
    """ "boxes", float32 (M, 4), "ignore" and the other fields of `PER_BOX` that there are; see `GeometricOp`.

    Raises:
      BadRecord: for boxes that are not (N, 4) finite numbers, or a field that has not one value a box.
    """
    try:
        boxes = np.asarray(example["boxes"], np.float64).reshape(-1, 4)
        per_box = {name: np.asarray(example[name]) for name in PER_BOX if example.get(name) is not None}
    except (TypeError, ValueError) as error:
        raise BadRecord(key_of(example), f"its boxes are not numbers (N, 4): {error}") from error
    wrong = [name for name, values in per_box.items() if values.shape[:1] != (len(boxes),)]
    if wrong or not np.isfinite(boxes).all():
        problem = f"it has {len(boxes)} boxes, but not as many {wrong[0]}" if wrong else "a box is not finite"
        raise BadRecord(key_of(example), problem)
    whole = map_boxes(boxes, warp.matrix)
    height, width = warp.size
    clipped = whole.clip(0, (width, height, width, height))
    left, all_of_it = _areas(clipped), _areas(whole)
    there = left > 0
    gone = left < visible * all_of_it
    if by_centre:
        middles = (whole[:, :2] + whole[:, 2:]) / 2
        gone |= (middles < 0).any(1) | (middles > (width, height)).any(1)
    per_box["ignore"] = per_box.get("ignore", np.zeros(len(boxes), bool)) | gone
    return {"boxes": clipped[there].astype(np.float32)} | {name: values[there] for name, values in per_box.items()}


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(axis=1)


def _square(matrix: np.ndarray) -> np.ndarray:
    square = np.eye(3)
    square[:2] = matrix
    return square
