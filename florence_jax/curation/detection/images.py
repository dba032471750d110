"""Image files of detection sets: where they lie, what they are, and whose pixels the annotated boxes count."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from etils import epath
from PIL import Image

from florence_jax.data.annotations import PAGES, Annotations, SourceSpec
from florence_jax.errors import UserError

_T = TypeVar("_T")
_U = TypeVar("_U")
STATUSES = ("ok", "missing", "corrupt")
EXIF_ORIENTATION = 274
PROBES = 1000  # files looked for to learn how many leading folders of the names are on disk
ASPECT_TOLERANCE = 0.01
WINDOW = 64  # files read ahead


@dataclasses.dataclass
class ImageFacts:
    """What N image files are.

    Attributes:
      paths: of the files.
      status: int8 (N,), indices into `STATUSES`.
      digest: bytes (N, 16), the first half of the file's sha256.
      raw: int32 (N, 2), stored width and height.
      size: int32 (N, 2), width and height as shown, that is after the EXIF orientation.
      orientation: int8 (N,), EXIF's 1 to 8.
    """

    paths: list[str]
    status: np.ndarray
    digest: np.ndarray
    raw: np.ndarray
    size: np.ndarray
    orientation: np.ndarray


def image_digest(data: bytes) -> bytes:
    """The identity of a file's bytes: the first 16 bytes of their sha256."""
    return hashlib.sha256(data).digest()[:16]


def file_paths(spec: SourceSpec, files: Sequence[str]) -> list[str]:
    """Paths of the files, whose names may begin with folders that the user's copy lacks ('images/v1/patch8/x.jpg').

    Raises:
      UserError: if none of the first files is in the folder.
    """
    most = max(name.count("/") for name in files)
    for name in files[:PROBES]:
        parts = name.split("/")
        for skip in range(len(parts)):
            if epath.Path(os.path.join(spec.images, *parts[skip:])).exists():
                # Counted from the end: names of one set may differ in depth.
                keep = len(parts) - skip if skip else most + 1
                return [os.path.join(spec.images, *name.split("/")[-keep:]) for name in files]
    raise UserError(
        f"{spec.label}: no image in {spec.images}, for example no {os.path.join(spec.images, files[0])}; "
        f"give the folder of the images of {PAGES[spec.kind]}"
    )


def ordered_map(function: Callable[[_T], _U], items: Iterable[_T], workers: int) -> Iterator[_U]:
    """`map` by threads that stay at most `WINDOW` items ahead; the results are in order."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        items = iter(items)
        running = collections.deque(pool.submit(function, item) for item in itertools.islice(items, WINDOW))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(function, item) for item in itertools.islice(items, 1))


def image_facts(paths: Sequence[str], workers: int, verify: bool = False) -> ImageFacts:
    """Reads each distinct file once.

    Args:
      paths: of the files; one may occur several times.
      workers: threads.
      verify: decode the pixels too, which finds truncated files; otherwise only the header is looked at.
    """
    places: dict[str, int] = {}
    index = np.array([places.setdefault(path, len(places)) for path in paths])
    rows = list(ordered_map(lambda path: _probe(path, verify), places, workers))
    numbers = np.array([row[0] for row in rows], np.int32)[index]
    digest = np.frombuffer(b"".join(row[1] for row in rows), np.uint8).reshape(-1, 16)[index]
    return ImageFacts(
        paths=list(paths),
        status=numbers[:, 0].astype(np.int8),
        digest=digest,
        raw=numbers[:, 1:3],
        size=numbers[:, 3:5],
        orientation=numbers[:, 5].astype(np.int8),
    )


def _probe(path: str, verify: bool) -> tuple[tuple[int, ...], bytes]:
    try:
        data = epath.Path(path).read_bytes()
    except OSError:
        return (STATUSES.index("missing"), 0, 0, 0, 0, 1), bytes(16)
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            if verify:
                image.load()
    except Exception:  # PIL's readers raise a dozen unrelated types on corrupt data
        return (STATUSES.index("corrupt"), 0, 0, 0, 0, 1), bytes(16)
    orientation = orientation if orientation in range(1, 9) else 1
    shown = (height, width) if orientation >= 5 else (width, height)
    return (0, width, height, *shown, orientation), image_digest(data)


def boxes_in_picture(table: Annotations, facts: ImageFacts) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Boxes in pixels of the picture as shown (EXIF orientation applied), which is what training decodes.

    Relative boxes are scaled. Boxes annotated on the stored pixels of a turned picture are turned with it; those of a
    picture stored at another size are scaled, if the aspect ratio is the same within 1 % or a pixel.

    Args:
      table: M boxes in N images.
      facts: of the N images; those that are not ok get boxes of no meaning.

    Returns:
      float64 (M, 4), and boolean (N,) arrays "turned", "rescaled" and "size_mismatch" (no way to place the boxes).
    """
    annotated, raw, size = (a.astype(np.float64) for a in (table.sizes, facts.raw, facts.size))
    ok = facts.status == 0
    relative = (annotated <= 0).any(1)
    same = (table.sizes == facts.size).all(1) | relative
    turned = ok & ~same & (table.sizes == facts.raw).all(1)
    base = np.where(relative[:, None], 1.0, np.where(turned[:, None], raw, annotated))
    scale = np.where((same | turned)[:, None] & ~relative[:, None], 1.0, size / base)
    off = np.abs(annotated[:, 1] * scale[:, 0] - size[:, 1])
    fits = off <= np.maximum(1.0, ASPECT_TOLERANCE * size[:, 1])
    rescaled = ok & ~same & ~turned & fits
    boxes = table.boxes * np.tile(scale, 2)[table.box_image]
    for orientation in range(5, 9):
        rows = (turned & (facts.orientation == orientation))[table.box_image]
        boxes[rows] = turn_boxes(boxes[rows], raw[table.box_image[rows]], orientation)
    return boxes, {"turned": turned, "rescaled": rescaled, "size_mismatch": ok & ~same & ~turned & ~fits}


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
