"""From a table of boxes and a folder of pictures to boxes that can be trained on; all else is counted."""

import concurrent.futures
import functools
import itertools
import os
import posixpath
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from etils import epath

from florence_jax.data.box_frames import REASONS, PictureFrames, boxes_in_picture, clean_boxes
from florence_jax.data.box_problems import MISTAKES, Problems
from florence_jax.data.box_table import BoxTable
from florence_jax.data.ops.image import MAX_ASPECT
from florence_jax.data.records import evenly
from florence_jax.errors import UserError
from florence_jax.pictures import open_picture, picture_frame

# Files whose first bytes are read when a set is opened: all of a small set, and of any picture without a stated size.
MOST_HEADERS, HEADER_SAMPLE = 10_000, 500
HEADERS_AT_ONCE, HEADER_THREADS, PROGRESS_SECONDS = 64, 8, 10.0  # files at a time; between lines of progress
HUGE_SIDE, CROWDED = 10_000, 1_000  # pixels of a side, boxes of a picture, from which on it is said
MOST_WRONG = 0.5  # share of boxes from which on a mistake is the file's
FORM_FIXES = {
    "corners": "Write bbox as [x, y, width, height], or the boxes as a table image,x1,y1,x2,y2,name",
    "sides": "Write the right and bottom edges, not width and height",
    "relative": "Multiply them by the width and height of their pictures",
}


class Finder:
    """Where the pictures are that annotations name.

    Args:
      pictures: names below the folder, with '/'.
    """

    def __init__(self, pictures: Iterable[str]):
        self._names = set(pictures)

    def find(self, file: str) -> list[str]:
        """The picture of that name; else those of the same name that share most of its last folders.

        A name may have capitals where its file has none, and lack the suffix.
        """
        name = posixpath.normpath(file.replace("\\", "/"))
        if name in self._names:
            return [name]
        parts = name.casefold().split("/")[::-1]
        found = self._by_base.get(parts[0]) or self._by_stem.get(parts[0], [])
        shared = [_common(parts[1:], other.casefold().split("/")[-2::-1]) for other in found]
        return [other for other, length in zip(found, shared, strict=True) if length == max(shared)]

    @functools.cached_property
    def _by_base(self) -> dict[str, list[str]]:
        return self._by(lambda base: base)

    @functools.cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return self._by(lambda base: os.path.splitext(base)[0])

    def _by(self, part: Callable[[str], str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in sorted(self._names):
            found.setdefault(part(name.rpartition("/")[2]).casefold(), []).append(name)
        return found


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """How many items two lists have in common at their beginnings."""
    return len(os.path.commonprefix([first, second]))


def place_files(table: BoxTable, pictures: Sequence[str]) -> None:
    """Names each picture as the folder does; leaves out those that are not there, joins those listed twice.

    Pictures of the folder that are not listed are counted.
    """
    finder = Finder(pictures)
    rows: dict[str, int] = {}
    target, keep = np.arange(len(table.files)), np.zeros(len(table.files), bool)
    for row, file in enumerate(table.files):
        found, *others = finder.find(file) or [""]
        if not found or others:
            table.problems.add("missing_file", file, f"it may be {found} or {others[0]}" if others else "")
            continue
        target[row] = rows.setdefault(found, row)
        keep[row] = target[row] == row
        table.files[row] = found
        if not keep[row]:
            first, second = table.image_ids[target[row]], table.image_ids[row]
            table.problems.add("file_twice", found, f"ids {first} and {second}")
    named = itertools.chain(rows, *map(finder.find, table.left_out))
    for name in sorted(set(pictures).difference(named)):
        table.problems.add("unused_file", name)
    table.move_pictures(target)
    table.keep_pictures(keep)


# -- sizes ------------------------------------------------------------------------------------------------------------


def read_headers(paths: Sequence[str], problems: Problems, names: Sequence[str]) -> PictureFrames:
    """The sizes of pictures from the first bytes of their files: some 0.1 ms each on a local disk.

    What cannot be read is counted, by its name.
    """
    known, orientation = np.zeros(len(paths), bool), np.ones(len(paths), np.int8)
    raw, size = np.zeros((len(paths), 2), np.int32), np.zeros((len(paths), 2), np.int32)
    chunks = [range(start, min(start + HEADERS_AT_ONCE, len(paths))) for start in range(0, len(paths), HEADERS_AT_ONCE)]
    told = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(HEADER_THREADS) as pool:
        for done, found in zip(chunks, pool.map(lambda rows: [_header(paths[i]) for i in rows], chunks), strict=True):
            for row, header in zip(done, found, strict=True):
                if isinstance(header, str):
                    problems.add("unreadable", names[row], header)
                    continue
                known[row], raw[row], size[row], orientation[row] = True, header[0], header[1], header[2]
                if not header[3]:
                    problems.add("not_rgb", names[row])
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                print(f"sizes of pictures: {done.stop:,} of {len(paths):,} read", flush=True)
    return PictureFrames(known, raw, size, orientation)


def _header(path: str) -> tuple[tuple[int, int], tuple[int, int], int, bool] | str:
    """Stored size, size as shown, orientation, whether it is 8-bit RGB; or what is wrong."""
    try:
        with epath.Path(path).open("rb") as file, open_picture(file) as image:
            return *picture_frame(image), image.mode == "RGB" and not image.has_transparency_data
    except Exception as error:  # PIL's readers raise a dozen unrelated types on corrupt data
        return f"{type(error).__name__}: {error}"[:200]


def place_boxes(table: BoxTable, folder: str) -> None:
    """Sizes and boxes as of the pictures that are shown; leaves out pictures that cannot be read or do not fit.

    Headers are read of the pictures without a stated size; of all others too where there are at most `MOST_HEADERS`,
    else of `HEADER_SAMPLE`, and of all where one of those has another size than stated.
    """
    stated = (table.sizes > 0).all(1)
    if (missing := int((~stated).sum())) and not table.relative:
        table.problems.add("no_size", table.files[int(np.argmin(stated))], count=missing)
    wanted, frames = _frames(table, folder, stated)
    sizes = np.where(stated[:, None], table.sizes, 0 if table.relative else frames.size)
    swapped = _swapped(table, sizes, frames)
    _add_pictures(table, "swapped", swapped, lambda row: f"says {_by(sizes[row])}, is {_by(frames.size[row])}")
    sizes = np.where(swapped[:, None], frames.size, sizes)
    boxes, how = boxes_in_picture(table.boxes, table.box_image, sizes, frames)
    usable = frames.known | ~wanted
    live = usable[table.box_image]
    table.boxes = np.where(live[:, None], boxes, table.boxes)
    scale = frames.size.prod(1) / np.maximum(sizes.prod(1), 1)
    table.areas = (table.areas * np.where(live, scale[table.box_image], 1)).astype(np.float32)
    table.sizes = np.where(frames.known[:, None], frames.size, table.sizes)
    for kind, mask in how.items():
        _add_pictures(table, kind, mask, lambda row: f"says {_by(sizes[row])}, is {_by(frames.size[row])}")
    thread = usable & ((table.sizes.max(1) > MAX_ASPECT * table.sizes.min(1)) | (table.sizes.max(1) < 2))
    _add_pictures(table, "thread", thread, lambda row: _by(table.sizes[row]))
    _add_pictures(table, "huge", usable & ~thread & (table.sizes.max(1) > HUGE_SIDE), lambda row: _by(table.sizes[row]))
    table.keep_pictures(usable & ~how["size_mismatch"] & ~thread)


def _frames(table: BoxTable, folder: str, stated: np.ndarray) -> tuple[np.ndarray, PictureFrames]:
    """Whose headers were read, bool (N,), and what they say; stated sizes where they were not read, or cannot be."""
    few = len(stated) <= MOST_HEADERS and "://" not in folder  # in a bucket each takes a request
    wanted = np.ones(len(stated), bool) if few else ~stated
    if not few and stated.any():
        sample = np.flatnonzero(stated)[evenly(int(stated.sum()), HEADER_SAMPLE)]
        paths = [os.path.join(folder, table.files[row]) for row in sample.tolist()]
        read = read_headers(paths, Problems(), paths)
        wanted |= bool((read.known & (read.size != table.sizes[sample]).any(1)).any())
    rows = np.flatnonzero(wanted)
    if len(rows) > MOST_HEADERS:
        print(f"{table.name}: reading the sizes of {len(rows):,} pictures", flush=True)
    names = [table.files[row] for row in rows.tolist()]
    read = read_headers([os.path.join(folder, name) for name in names], table.problems, names)
    upright = np.ones(len(stated), np.int8)
    frames = PictureFrames(np.zeros(len(stated), bool), table.sizes.copy(), table.sizes.copy(), upright)
    for whole, part in zip(frames, read, strict=True):
        whole[rows] = part
    return wanted, frames


def _swapped(table: BoxTable, sizes: np.ndarray, frames: PictureFrames) -> np.ndarray:
    """bool (N,): pictures whose width is stated as height and height as width, and whose boxes fit them as they are."""
    reverse = (sizes == frames.size[:, ::-1]).all(1) & (sizes != frames.size).any(1)
    swapped = frames.known & reverse & (sizes != frames.raw).any(1)
    beyond = (table.boxes[:, 2:] > frames.size[table.box_image] + 2).any(1)
    swapped[table.box_image[beyond]] = False
    return swapped


def _by(size: np.ndarray) -> str:
    return f"{size[0]} x {size[1]}"


def _add_pictures(table: BoxTable, kind: str, mask: np.ndarray, detail: Callable[[int], str]) -> None:
    for row in np.flatnonzero(mask).tolist():
        table.problems.add(kind, table.files[row], detail(row))


# -- boxes ------------------------------------------------------------------------------------------------------------


def check_form(table: BoxTable, check: bool) -> None:
    """Sees whether most boxes are written in another form than their file's. Mends them where `check`.

    Raises:
      UserError: for such a file, unless `check`.
    """
    finite = np.isfinite(table.boxes).all(1) & (table.sizes[table.box_image] > 0).all(1)
    boxes, sizes = table.boxes[finite], table.sizes[table.box_image[finite]].astype(np.float64)
    if not len(boxes):
        return
    given = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1) if table.sides else boxes
    other = given if table.sides else np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    kind = ""
    if (np.abs(given) <= 1).all() and len(given) > 1 and (sizes > 2).all():
        kind, other = "relative", boxes * np.tile(sizes, 2)
    elif (~_fits(boxes, sizes)).mean() > MOST_WRONG and _fits(other, sizes).mean() > MOST_WRONG:
        kind = "corners" if table.sides else "sides"
    if not kind:
        return
    if not check:
        raise UserError(f"{table.name}: {MISTAKES[kind].what}; the first: {given[0].tolist()}. {FORM_FIXES[kind]}")
    table.problems.add(kind, table.name, f"the first: {given[0].tolist()}")
    table.boxes[finite] = other


def _fits(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which boxes have an area and lie in their pictures, by two pixels."""
    return (boxes[:, 2:] > boxes[:, :2]).all(1) & (boxes[:, :2] >= -2).all(1) & (boxes[:, 2:] <= sizes + 2).all(1)


def drop_bad_boxes(table: BoxTable) -> None:
    """Cuts boxes at the edges of their pictures; leaves out those that are none, see `MISTAKES`."""
    clean, reason, clipped = clean_boxes(table.boxes, table.sizes[table.box_image])
    thin = reason == REASONS.index("thin")
    thin &= (clean[:, 2:] > clean[:, :2]).all(1)  # something is left of it
    for kind in ("not_finite", "zero_area", "outside"):
        table.add(kind, reason == REASONS.index(kind))
    table.add("outside", (reason == REASONS.index("thin")) & ~thin)
    table.add("thin", thin)
    table.add("clipped", clipped & ((reason == 0) | thin))
    order = np.lexsort((*clean.T, table.box_class, table.box_image))
    columns = [table.box_image, table.box_class, *clean.T]
    same = np.all([column[order][1:] == column[order][:-1] for column in columns], axis=0)
    again = np.zeros(len(clean), bool)
    again[order[1:][same]] = True
    table.add("repeated_box" if table.drops_repeats else "same_box", again & (reason == 0))
    keep = ((reason == 0) | thin) & ~(again & table.drops_repeats)
    table.boxes = clean
    table.keep_boxes(keep)
    counts = np.bincount(table.box_image, minlength=len(table.files))
    _add_pictures(table, "crowded", counts > CROWDED, lambda row: f"{counts[row]:,} boxes")


def check_lists(table: BoxTable) -> None:
    """Where a class is said not to be in a picture, and has a box there or not all of its boxes, the boxes win."""
    if not len(table.negative[0]):
        return
    classes = len(table.class_names)
    absent, partly = (
        image.astype(np.int64) * classes + which for image, which in (table.negative, table.not_exhaustive)
    )
    wrong = np.isin(absent, np.union1d(table.box_image.astype(np.int64) * classes + table.box_class, partly))
    rows = np.flatnonzero(wrong)
    room = table.problems.room("denied")
    for row in rows[:room].tolist():
        image, which = (int(column[row]) for column in table.negative)
        table.problems.add("denied", table.files[image], table.class_names[which])
    if len(rows) > room:
        table.problems.add("denied", count=len(rows) - room)
    table.negative = table.negative[0][~wrong], table.negative[1][~wrong]


def check_classes(table: BoxTable) -> None:
    """Leaves out the class above the others that Roboflow writes; tells of classes without boxes, and alike names."""
    counts = np.bincount(table.box_class, minlength=len(table.class_names))
    root = [not counts[k] and name in table.parents for k, name in enumerate(table.class_names)]
    for name in (name for name, is_root in zip(table.class_names, root, strict=True) if is_root):
        table.problems.add("root_class", name)
    keep = ~np.array(root, bool)
    table.keep_classes(keep)
    alike: dict[str, str] = {}
    for name, count in zip(table.class_names, counts[keep].tolist(), strict=True):
        other = alike.setdefault(" ".join(name.replace("_", " ").split()).casefold(), name)
        if other != name:
            table.problems.add("names_alike", name, f"and {other!r}")
        if not count:
            table.problems.add("no_boxes", name)
    if len(table.class_names) == 1:
        table.problems.add("one_class", table.class_names[0])
