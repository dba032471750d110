"""The embedded drawings cut out of their white ground, turned and scaled: whole numbers only, the same on any machine.

A cut-out is premultiplied RGBA, uint8 (H, W, 4), each colour at most its alpha. What moves or shrinks pixels here is
integer arithmetic in numpy, so that it depends on no library but those that decode pictures.
"""

import functools
import math

import numpy as np
from scipy import ndimage

from florence_jax.data.sources.array_record import ArrayRecordSource
from florence_jax.data.sources.embedded import open_emoji
from florence_jax.pictures import upright_rgb

# The ground is what can be reached from the border over pixels of which no colour is darker than this.
GROUND = 244
# A figure that the fill enters is told by two things: how much of it hangs on the threshold, and how pale its rim is.
STRICT, LOOSE = 250, 232  # thresholds that are compared
DEEP = 3  # pixels below the rim of the stricter figure from which on it counts as lost
MOST_LOST = 0.015  # of the figure
PALE = 60  # a rim pixel is pale if nothing within 2 pixels is this much darker than white
MOST_PALE = 0.1  # of the rim
SPECK = 6  # pixels: smaller islands are noise of the encoder
LEAST_SIDE = 32  # pixels of the longer side of the figure: a smaller one would be enlarged
AROUND = np.ones((3, 3), np.int8)  # corners touch
KEPT_CUTOUTS = 4096  # in memory, of each process: at most 60 MB
ONE = 1 << 16  # of coordinates and angles: 16 bits behind the point
FINE = 8  # bits of the weights between two pixels


def figure(picture: np.ndarray, ground: int) -> np.ndarray:
    """Bool (H, W): what is not reached from the border over pixels of at least `ground` in all colours.

    Args:
      picture: uint8 (H, W, 3).
    """
    light = np.ones([side + 2 for side in picture.shape[:2]], bool)
    light[1:-1, 1:-1] = picture.min(axis=2) >= ground
    regions, _ = ndimage.label(light)
    return regions[1:-1, 1:-1] != regions[0, 0]


def without_specks(inside: np.ndarray) -> np.ndarray:
    """A mask without islands of less than `SPECK` pixels."""
    islands, count = ndimage.label(inside, AROUND)
    if count < 2:
        return inside
    sizes = np.bincount(islands.ravel())
    sizes[0] = 0
    return sizes[islands] >= SPECK


def is_entered(picture: np.ndarray, inside: np.ndarray) -> bool:
    """Whether the fill seems to have entered the figure `inside`: a white one without an outline (clouds, doves)."""
    rim = inside & ~ndimage.binary_erosion(inside, AROUND)
    darkness = np.where(inside, 255 - picture.min(axis=2), 0)
    if (ndimage.maximum_filter(darkness, 5)[rim] < PALE).sum() <= MOST_PALE * rim.sum():
        return False
    strict = figure(picture, STRICT)
    deep = ndimage.distance_transform_cdt(strict, "chessboard") >= DEEP
    return (deep & ~figure(picture, LOOSE)).sum() > MOST_LOST * strict.sum()


def cut_out(picture: np.ndarray) -> np.ndarray | None:
    """A drawing on white, uint8 (H, W, 3), as a cut-out of its bounding box; None for one that is left out.

    Left out are figures that the fill enters (`is_entered`) and those below `LEAST_SIDE` pixels. A pixel of the rim is
    a mixture of the figure and white: its alpha is its darkness as a share of the darkest pixel beside it.
    """
    inside = without_specks(figure(picture, GROUND))
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows) or max(np.ptp(rows), np.ptp(columns)) + 1 < LEAST_SIDE or is_entered(picture, inside):
        return None
    dark = np.where(inside[..., None], 255 - picture.astype(np.int32), 0)
    total = dark.sum(axis=2)
    share = 255 * total // np.maximum(ndimage.maximum_filter(total, 3), 1)
    rim = inside & ~ndimage.binary_erosion(inside, AROUND, border_value=1)
    alpha = np.where(rim, share, np.where(inside, 255, 0))[..., None]
    cut = np.concatenate([np.clip(alpha - dark, 0, alpha), alpha], axis=2).astype(np.uint8)
    return cut[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def halves(picture: np.ndarray, shortest: int = 8) -> tuple[np.ndarray, ...]:
    """uint8 (H, W, C) and its means over 2 x 2 pixels, over 4 x 4, ..., to a side of about `shortest` pixels."""
    steps = [picture]
    while min(steps[-1].shape[:2]) >= 2 * shortest:
        last = steps[-1].astype(np.uint16)
        rows = last[::2] + last[np.minimum(np.arange(1, len(last) + 1, 2), len(last) - 1)]
        total = rows[:, ::2] + rows[:, np.minimum(np.arange(1, last.shape[1] + 1, 2), last.shape[1] - 1)]
        steps.append(((total + 2) >> 2).astype(np.uint8))
    return tuple(steps)


@functools.cache
def _drawings(split: str) -> ArrayRecordSource:
    return open_emoji(f"emoji:{split}")


@functools.lru_cache(KEPT_CUTOUTS)
def embedded_cutout(split: str, row: int) -> tuple[np.ndarray, ...] | None:
    """Of an embedded drawing the cut-out and its `halves`, with a clear pixel around each; None where it is left out.

    Args:
      split: of the emoji set. row: its record.
    """
    cut = cut_out(np.asarray(upright_rgb(_drawings(split)[row]["image"])))
    if cut is None:
        return None
    return tuple(np.pad(step, ((1, 1), (1, 1), (0, 0))) for step in halves(cut))


def sample(picture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A picture between its pixels, bilinear; beyond its border the border goes on.

    Args:
      picture: uint8 (H, W, C).
      x, y: int64, broadcast to (h, w), in units of 1 / `ONE` pixel; 0 is the centre of the first pixel.

    Returns:
      uint8 (h, w, C).
    """
    height, width = picture.shape[:2]
    pixels = picture.reshape(height * width, -1)
    x, y = x.clip(0, (width - 1) * ONE), y.clip(0, (height - 1) * ONE)
    left, top = x >> 16, y >> 16
    right, below = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    across = ((x & (ONE - 1)) >> (16 - FINE)).astype(np.int32)[..., None]
    down = ((y & (ONE - 1)) >> (16 - FINE)).astype(np.int32)[..., None]
    rows = []
    for row in (top * width, below * width):
        here, beside = pixels.take(row + left, axis=0), pixels.take(row + right, axis=0)
        rows.append((here.astype(np.int32) << FINE) + (beside.astype(np.int16) - here) * across)
    upper, lower = rows
    return ((upper << FINE) + (lower - upper) * down + (1 << (2 * FINE - 1)) >> (2 * FINE)).astype(np.uint8)


def turned(steps: tuple[np.ndarray, ...], side: int, degrees: int) -> np.ndarray:
    """A cut-out, its longer side `side` pixels, turned about its centre: premultiplied RGBA, uint8 (h, w, 4).

    Args:
      steps: of `embedded_cutout`.
      side: pixels, before it is turned. degrees: anticlockwise.
    """
    long = max(steps[0].shape[:2]) - 2
    level = 0
    while level + 1 < len(steps) and long >> (level + 1) >= side:
        level += 1
    picture = steps[level]
    height, width = picture.shape[0] - 2, picture.shape[1] - 2
    ratio = ONE * max(height, width) // side  # source pixels a target pixel
    cos, sin = (round(ONE * turn(math.radians(degrees))) for turn in (math.cos, math.sin))
    # The hull of the turned rectangle, and a pixel more.
    spans = (abs(cos) * width + abs(sin) * height, abs(sin) * width + abs(cos) * height)
    columns, rows = (span // ratio + 2 for span in spans)
    # Twice the distance from the centre, so that it is whole.
    u = 2 * np.arange(columns, dtype=np.int64)[None] - (columns - 1)
    v = 2 * np.arange(rows, dtype=np.int64)[:, None] - (rows - 1)
    x = ((cos * u - sin * v) * ratio >> 17) + (picture.shape[1] - 1) * ONE // 2
    y = ((sin * u + cos * v) * ratio >> 17) + (picture.shape[0] - 1) * ONE // 2
    return sample(picture, x, y)


def lay_over(canvas: np.ndarray, patch: np.ndarray, left: int, top: int) -> None:
    """Lays a cut-out on a canvas, int32 (H, W, 3), which is changed; what reaches beyond it is not there.

    Args:
      canvas: of values from 0 to 255.
      patch: premultiplied RGBA, (h, w, 4).
      left, top: of the patch, in pixels of the canvas.
    """
    height, width = canvas.shape[:2]
    inner = patch[max(0, -top) : height - top, max(0, -left) : width - left].astype(np.int32)
    region = canvas[max(0, top) : top + patch.shape[0], max(0, left) : left + patch.shape[1]]
    region[:] = inner[..., :3] + (region * (255 - inner[..., 3:]) + 127) // 255
