"""Image files of detection sets: where they lie, and what they are."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from etils import epath
from PIL import Image

from florence_jax.pictures import picture_frame

_T = TypeVar("_T")
_U = TypeVar("_U")
STATUSES = ("ok", "missing", "corrupt")
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
            frame = picture_frame(image)
            if verify:
                image.load()
    except Exception:  # PIL's readers raise a dozen unrelated types on corrupt data
        return (STATUSES.index("corrupt"), 0, 0, 0, 0, 1), bytes(16)
    return (0, *frame.raw, *frame.size, frame.orientation), image_digest(data)
