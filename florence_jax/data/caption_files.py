"""Readers of the files that sets of captions come in, into a `CaptionTable`.

captions_train2017.json                   COCO: {"images": [{"id", "file_name"}], "annotations": [{"image_id",
                                          "caption"}]}
train_annot.json, annot.json              Conceptual Captions, SBU as for ViLT and METER: [[file, caption], ...]
coco.json, vg.json, cc3m_train.json       as for ALBEF and BLIP: [{"image": file, "caption": text or texts}, ...]
sbu-captions-all.json                     SBU: {"image_urls": [...], "captions": [...]}
Train_GCC-training.tsv, cc12m.tsv         caption and address, or address and caption, with a tab, no heading
region_descriptions.json                  Visual Genome: [{"id", "regions": [{"region_id", "phrase", "x", ...}]}]
*.csv, *.jsonl, *.parquet                 tables with a heading, see `sources.tables`
"""

import array
import collections
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from florence_jax.data.json_stream import json_items
from florence_jax.errors import UserError
from florence_jax.files import AS_UTF8

# What becomes of a row, by kind of mistake; in the order of sentences.
CAPTION_MISTAKES = {
    "no_caption": "captions that are empty or no text: {} (left out)",
    "no_file": "rows that name no picture: {} (left out)",
    "unknown_picture": "captions of pictures that are not listed: {} (left out)",
    "small_region": "regions smaller than {side} x {side} pixels: {} (left out)",
    "no_picture": "pictures that are not in the folder: {} (left out, with their captions)",
    "same_name": "pictures whose name another one has too: {} (the first counts)",
}
SMALLEST_REGION = 16  # pixels a side
FILE_NAMES = ("image", "file", "file_name", "image_path", "path", "url")  # where an object names its picture


class Region(NamedTuple):
    """A text about a part of a picture: its number in the set, and the box x1, y1, x2, y2 in pixels."""

    number: int
    box: tuple[float, float, float, float]


class CaptionRow(NamedTuple):
    """One caption: the file of its picture (or its address) as the set names it, the picture's number if it has one."""

    file: str
    caption: str
    image_id: int | None = None
    region: Region | None = None


class TextColumn:
    """Many texts in one block of bytes: a tenth of the memory of as many str, and cheap to send to workers."""

    def __init__(self, texts: Iterable[str]):
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")


class Mistakes:
    """How many mistakes of each kind of `CAPTION_MISTAKES` there are, and where the first of each is."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._first: dict[str, str] = {}

    def add(self, kind: str, where: Any, count: int = 1) -> None:
        """Counts some."""
        if count:
            self.counts[kind] += count
            self._first.setdefault(kind, str(where)[:100])

    def said(self) -> str:
        """'; captions that are empty or no text: 2 (left out), the first: ...' as there are."""
        return "".join(
            f"; {text.replace('{side}', str(SMALLEST_REGION)).format(f'{self.counts[kind]:,}')}, the first: "
            f"{self._first[kind]}"
            for kind, text in CAPTION_MISTAKES.items()
            if self.counts[kind]
        )


def read_captions(path: str, mistakes: Mistakes) -> Iterator[CaptionRow]:
    """The rows of a file of captions (.json, .tsv); see the module.

    Raises:
      UserError: for a file of none of these kinds, or one that is damaged.
    """
    if path.lower().endswith(".json"):
        return _json_rows(path, mistakes)
    return _tab_rows(path, mistakes)


# -- JSON -------------------------------------------------------------------------------------------------------------


def _json_rows(path: str, mistakes: Mistakes) -> Iterator[CaptionRow]:
    items = json_items(path)
    first = next(items, None)
    if first is None:
        raise UserError(f"{path} is an empty list")
    items = itertools.chain([first], items)
    if first[0]:
        return _sections(path, items, mistakes)
    read = _kind_of_item(first[1])
    if read is None:
        raise UserError(
            f"{path}: its items are no captions: they must be [file, caption], objects with 'image' and 'caption', or "
            f"Visual Genome's regions, not {str(first[1])[:80]}"
        )
    return (row for place, (_, item) in enumerate(items) for row in read(item, f"item {place}", mistakes))


def _kind_of_item(item: Any) -> Callable[[Any, str, Mistakes], Iterator[CaptionRow]] | None:
    if isinstance(item, list) and len(item) == 2:
        return _pair
    if isinstance(item, dict) and isinstance(item.get("regions"), list):
        return _regions
    if isinstance(item, dict) and _file_of(item) is not None and "caption" in item:
        return _object
    return None


def _pair(item: Any, where: str, mistakes: Mistakes) -> Iterator[CaptionRow]:
    file, caption = item if isinstance(item, list) and len(item) == 2 else (None, None)
    yield from _rows(file, caption, None, where, mistakes)


def _object(item: Any, where: str, mistakes: Mistakes) -> Iterator[CaptionRow]:
    item = item if isinstance(item, dict) else {}
    yield from _rows(_file_of(item), item.get("caption"), None, where, mistakes)


def _file_of(item: dict) -> Any:
    return next(
        (item[name] for name in ("image", "file", "file_name", "image_path", "path", "url") if name in item), None
    )


def _rows(
    file: Any, captions: Any, image_id: int | None, where: str, mistakes: Mistakes, region: Region | None = None
) -> Iterator[CaptionRow]:
    if not isinstance(file, str) or not file.strip():
        mistakes.add("no_file", where)
        return
    for caption in captions if isinstance(captions, list) else [captions]:
        if isinstance(caption, str) and caption.strip():
            yield CaptionRow(file.strip(), caption.strip(), image_id, region)
        else:
            mistakes.add("no_caption", where)


def _regions(item: Any, where: str, mistakes: Mistakes) -> Iterator[CaptionRow]:
    """Of a picture of Visual Genome, whose file is its number."""
    try:
        regions = item["regions"]
        # The item's own number is missing in some copies.
        number = int(next(x for x in (item.get("id"), item.get("image_id"), *_first_id(regions)) if x is not None))
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError):
        mistakes.add("no_file", where)
        return
    for region in regions:
        try:
            x, y, w, h = (float(region[side]) for side in ("x", "y", "width", "height"))
            part = Region(int(region["region_id"] if "region_id" in region else region["id"]), (x, y, x + w, y + h))
            phrase = region["phrase"]
        except (KeyError, TypeError, ValueError) as error:
            mistakes.add("no_caption", f"{where}: {error!r}")
            continue
        yield from _rows(f"{number}.jpg", phrase, number, f"region {part.number}", mistakes, part)


def _first_id(regions: Any) -> list:
    return [regions[0].get("image_id")] if regions and isinstance(regions[0], dict) else []


def _sections(path: str, items: Iterator[tuple[str, Any]], mistakes: Mistakes) -> Iterator[CaptionRow]:
    """COCO's and SBU's: a section for the pictures, one for the captions, in any order."""
    files: dict[int, str] = {}
    ids, captions = array.array("q"), list[Any]()
    addresses, texts = list[Any](), list[Any]()
    seen = collections.Counter[str]()
    for section, item in items:
        try:
            if section == "images":
                files[int(item["id"])] = str(item["file_name"])
            elif section == "annotations":
                captions.append(item["caption"])
                ids.append(int(item["image_id"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: {section}[{seen[section]}] has no {error}; is it a file of captions?") from error
        if section == "image_urls":
            addresses.append(item)
        elif section == "captions":
            texts.append(item)
        seen[section] += 1
    if addresses and len(addresses) == len(texts):
        for k, (address, text) in enumerate(zip(addresses, texts, strict=True)):
            yield from _rows(address, text, None, f"captions[{k}]", mistakes)
    elif files and captions:
        for k, (number, text) in enumerate(zip(ids, captions, strict=True)):
            if number in files:
                yield from _rows(files[number], text, number, f"annotations[{k}]", mistakes)
            else:
                mistakes.add("unknown_picture", f"annotations[{k}], image {number}")
    else:
        found = ", ".join(f"{count:,} {name}" for name, count in seen.items())
        raise UserError(f"{path} has {found}; captions need 'images' and 'annotations', or 'image_urls' and 'captions'")


# -- tables -----------------------------------------------------------------------------------------------------------


def _tab_rows(path: str, mistakes: Mistakes) -> Iterator[CaptionRow]:
    """Two cells a line and a tab between, in the order that the first lines show; a heading is passed over.

    No quotes: captions of these sets begin with single ones.
    """
    try:
        with epath.Path(path).open("rb") as file:
            lines = (line.decode().rstrip("\r\n").split("\t") for line in file)
            head = list(itertools.islice(lines, 64))
            if head and not any(map(_names_picture, head[0])):
                del head[0]
            votes = [sum(len(cells) > k and _names_picture(cells[k]) for cells in head) for k in (0, 1)]
            if not head or max(votes) < len(head) / 2:
                raise UserError(f"{path}: its lines must be a caption and a file or an address, with a tab between")
            at = int(votes[1] > votes[0])
            for number, cells in enumerate(itertools.chain(head, lines), 1):
                if len(cells) < 2:
                    mistakes.add("no_file", f"line {number}")
                    continue
                name = re.sub(r"#\d+$", "", cells[at])  # Flickr30k numbers the captions of a picture
                yield from _rows(name, cells[1 - at], None, f"line {number}", mistakes)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}): {AS_UTF8}") from error


def _names_picture(cell: str) -> bool:
    """An address, a path, or a name with a suffix: no words."""
    cell = cell.strip()
    return bool(cell) and " " not in cell and ("/" in cell or "." in cell[1:-1])
