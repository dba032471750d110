"""Pictures with true and found boxes, for the page of a detector."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from florence_jax.data.ops.image import Decode
from florence_jax.data.records import BadRecord, Source
from florence_jax.evaluators.coco_errors import CORRECT, FALSE_KINDS, Judged, corners_of
from florence_jax.page import FIGURE_SIDE, figure_html
from florence_jax.pictures import draw_boxes, picture_uri

TRUE, WRONG, APART = "#3a7d44", "#d1495b", "#8a8a8a"  # colours: right or true; wrong or not found; crowds
PAIR_SIDE = 256  # pixels, of the longer side of a picture
CROP, SMALLEST_CROP = 2.5, 64  # a mistake is shown with so many times its size around it, and at least so many pixels


class Painter:
    """Draws pictures of a source.

    Args:
      source: the pictures. rows: int (N,), numbers of the records of the ground truth's pictures.
    """

    def __init__(self, source: Source, rows: np.ndarray):
        self._source, self._rows = source, rows

    def picture(self, judged: Judged, row: int, threshold: float, f1: float) -> str:
        """A figure of a picture with its true boxes, and beside it with those found from a score on."""
        image = self._image(judged, row)
        truth, found = judged.truth, judged.found
        true = np.flatnonzero(truth.image == row)
        ours = np.flatnonzero((found.image == row) & judged.kept(threshold))
        crowd, hit = truth.crowd[true], np.isin(true, judged.match[ours][judged.kind[ours] == CORRECT])
        left = _drawn(
            image,
            corners_of(truth.boxes[true]),
            [truth.class_names[k] for k in truth.labels[true].tolist()],
            np.select([crowd, hit], [APART, TRUE], WRONG).tolist(),
            crowd.tolist(),
        )
        scored = zip(found.labels[ours].tolist(), found.scores[ours].tolist(), strict=True)
        right = _drawn(
            image,
            corners_of(found.boxes[ours]),
            [f"{truth.class_names[k]} {score:.2f}" for k, score in scored],
            [TRUE if kind == CORRECT else WRONG for kind in judged.kind[ours].tolist()],
        )
        both = Image.new("RGB", (left.width + right.width + 6, left.height), "#ffffff")
        both.paste(left, (0, 0))
        both.paste(right, (left.width + 6, 0))
        said = f"{int((~crowd).sum())} true, {len(ours)} found" + (f", F1 {f1:.2f}" if not np.isnan(f1) else "")
        return figure_html([picture_uri(both)], truth.keys[row], said, kind="pair")

    def mistake(self, judged: Judged, box: int) -> str:
        """A figure of a found box, and the true box that is nearest, with what is around them."""
        truth, found = judged.truth, judged.found
        row, near = int(found.image[box]), int(judged.match[box])
        image = self._image(judged, row)
        boxes, colours, note = [corners_of(found.boxes[box])], [WRONG], ""
        if near >= 0:
            boxes, colours = [corners_of(truth.boxes[near]), *boxes], [TRUE, WRONG]
            note = truth.class_names[truth.labels[near]] if "class" in FALSE_KINDS[judged.kind[box]] else ""
        image, shifted = _crop(image, np.stack(boxes))
        drawn = draw_boxes(image, shifted.tolist(), [""] * len(boxes), colours, side=FIGURE_SIDE, most_texts=0)
        caption = f"{truth.class_names[found.labels[box]]} {found.scores[box]:.2f}"
        return figure_html([picture_uri(drawn)], caption, f"in truth {note}" if note else truth.keys[row])

    def _image(self, judged: Judged, row: int) -> np.ndarray:
        """uint8 (H, W, 3); grey where the picture cannot be read any more."""
        try:
            return Decode()(self._source[int(self._rows[judged.rows[row]])], np.random.default_rng(0))["image"]
        except BadRecord:
            width, height = judged.truth.sizes[row].tolist()
            return np.full((height, width, 3), 128, np.uint8)


def _drawn(
    image: np.ndarray,
    boxes: np.ndarray,
    texts: Sequence[str],
    colours: Sequence[str],
    thin: Sequence[bool] = (),
) -> Image.Image:
    return draw_boxes(image, boxes.tolist(), texts, colours, thin, side=PAIR_SIDE)


def _crop(image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A square around boxes (n, 4), as far as it lies in the picture, and the boxes in it."""
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    half = max(CROP * (high - low).max(), SMALLEST_CROP) / 2
    centre, size = (low + high) / 2, np.array(image.shape[1::-1])
    start = np.floor((centre - half).clip(0, size - 1)).astype(int)
    stop = np.ceil((centre + half).clip(start + 1, size)).astype(int)
    return image[start[1] : stop[1], start[0] : stop[0]], boxes - np.tile(start, 2)
