"""Whose pixels annotated boxes count: of the picture as it is shown, whatever its file and its annotations say."""

from typing import NamedTuple

import numpy as np

from florence_jax.pictures import Frame

ASPECT_TOLERANCE = 0.01
MIN_SIDE = 1.0  # pixels; a thinner box has nothing to learn from
REASONS = ("ok", "not_finite", "zero_area", "outside", "thin")


class PictureFrames(NamedTuple):
    """The pixels of N picture files.

    Attributes:
      known: bool (N,), whether the file could be read; the rest has no meaning where it could not.
      raw: int32 (N, 2), stored width and height.
      size: int32 (N, 2), width and height as shown, that is after the EXIF orientation.
      orientation: int8 (N,), EXIF's 1 to 8.
    """

    known: np.ndarray
    raw: np.ndarray
    size: np.ndarray
    orientation: np.ndarray


def boxes_in_picture(
    boxes: np.ndarray, box_image: np.ndarray, stated: np.ndarray, frames: PictureFrames
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Boxes in pixels of the picture as shown (EXIF orientation applied), which is what training decodes.

    Relative boxes are scaled. Boxes annotated on the stored pixels of a turned picture are turned with it; those of a
    picture stored at another size are scaled, if the aspect ratio is the same within 1 % or a pixel.

    Args:
      boxes: (M, 4), x1 y1 x2 y2 in pixels of the stated size.
      box_image: int (M,), the image of each.
      stated: int (N, 2), width and height that the annotations say; 0 where boxes are relative.
      frames: of the N images; those that are not known get boxes of no meaning.

    Returns:
      float64 (M, 4), and boolean (N,) arrays "turned", "rescaled" and "size_mismatch" (no way to place the boxes).
    """
    annotated, raw, size = (a.astype(np.float64) for a in (stated, frames.raw, frames.size))
    known = frames.known
    relative = (annotated <= 0).any(1)
    same = (stated == frames.size).all(1) | relative
    turned = known & ~same & (stated == frames.raw).all(1)
    base = np.where(relative[:, None], 1.0, np.where(turned[:, None], raw, annotated))
    scale = np.where((same | turned)[:, None] & ~relative[:, None], 1.0, size / base)
    off = np.abs(annotated[:, 1] * scale[:, 0] - size[:, 1])
    fits = off <= np.maximum(1.0, ASPECT_TOLERANCE * size[:, 1])
    rescaled = known & ~same & ~turned & fits
    boxes = boxes * np.tile(scale, 2)[box_image]
    for orientation in range(5, 9):
        rows = (turned & (frames.orientation == orientation))[box_image]
        boxes[rows] = turn_boxes(boxes[rows], raw[box_image[rows]], orientation)
    return boxes, {"turned": turned, "rescaled": rescaled, "size_mismatch": known & ~same & ~turned & ~fits}


def turn_boxes(boxes: np.ndarray, raw: np.ndarray, orientation: int) -> np.ndarray:
    """Boxes (M, 4) on stored pixels -> on the picture as shown, for the EXIF orientations 5 to 8, which swap the sides.

    Args:
      boxes: x1 y1 x2 y2.
      raw: (M, 2), stored width and height.
      orientation: 5 mirrored along the main diagonal, 6 a quarter turn clockwise, 7 mirrored along the other diagonal,
        8 a quarter turn counter-clockwise.
    """
    x1, y1, x2, y2 = boxes.T
    width, height = raw.T
    if orientation in (6, 7):
        y1, y2 = height - y2, height - y1
    if orientation in (7, 8):
        x1, x2 = width - x2, width - x1
    return np.stack([y1, x1, y2, x2], 1)


# A picture that is turned back is turned by this orientation.
TURNED_BACK = {5: 5, 6: 8, 7: 7, 8: 6}


def boxes_as_stated(boxes: np.ndarray, stated: tuple[int, int], frame: Frame) -> np.ndarray:
    """Boxes (n, 4) of the picture as shown -> pixels of the size that a list states: what `boxes_in_picture` undoes.

    Where it states the stored pixels of a turned picture they are turned back, where it states another size scaled.

    Args:
      boxes: x1 y1 x2 y2.
      stated: width and height; below 1 where the list states none: then the boxes stay as they are.
      frame: of the picture's file.
    """
    if min(stated) < 1 or stated == frame.size:
        return boxes
    if stated == frame.raw:
        size = np.broadcast_to(np.array(frame.size), (len(boxes), 2))
        return turn_boxes(boxes, size, TURNED_BACK[frame.orientation])
    return boxes * np.tile(np.array(stated) / np.array(frame.size), 2)


def clean_boxes(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clips boxes to their pictures.

    Args:
      boxes: (M, 4), x1 y1 x2 y2 in pixels.
      sizes: (M, 2), width and height of the picture of each.

    Returns:
      float32 (M, 4) clipped boxes; int8 (M,) indices into `REASONS`, 0 for a usable box; bool (M,), whether clipping
      moved a side by more than half a pixel.
    """
    reason = np.zeros(len(boxes), np.int8)
    finite = np.isfinite(boxes).all(1)
    boxes = np.where(finite[:, None], boxes, 0.0)
    x1, y1, x2, y2 = boxes.T
    width, height = sizes.T
    clipped = np.clip(boxes, 0, np.tile(sizes, 2)).astype(np.float32)
    # Later lines win.
    reason[(clipped[:, 2:] - clipped[:, :2] < MIN_SIDE).any(1)] = REASONS.index("thin")
    reason[(x2 <= 0) | (y2 <= 0) | (x1 >= width) | (y1 >= height)] = REASONS.index("outside")
    reason[(x2 <= x1) | (y2 <= y1)] = REASONS.index("zero_area")
    reason[~finite] = REASONS.index("not_finite")
    return clipped, reason, (np.abs(clipped - boxes) > 0.5).any(1)
