"""Sets of captions whose texts are in one file and whose pictures lie in a folder, as the big sets come."""

import array
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from etils import epath

from florence_jax.data.caption_files import (
    SMALLEST_REGION,
    CaptionRow,
    Mistakes,
    Region,
    TextColumn,
    read_captions,
)
from florence_jax.data.records import BadRecord, BaseSource, Record, evenly, picture_bytes
from florence_jax.data.sources.picture_files import quoted, shown
from florence_jax.data.sources.tables import captions_of, table_records
from florence_jax.errors import UserError
from florence_jax.files import filesystem
from florence_jax.pictures import trouble_of, upright_rgb

KIND_OF_LIST = "captions:"
FILES_LOOKED_FOR = 64  # files of the list, spread over it: where they are is where the others are


class CaptionList(BaseSource):
    """Pictures of a folder with one caption or several each; or parts of pictures, with one.

    A record has "key" (the file in the folder; of a part with '#' and its number), "image" (bytes; of a part a
    picture), "caption", "captions" where any picture has several, and "image_id" where the set numbers its pictures.

    Args:
      name: for messages.
      folder: of the pictures. files: of each record, relative to it.
      captions: of all records. starts: int64 (N + 1,), the first caption of each record, then the number of all.
      image_ids: int64 (N,), -1 for none.
      regions: numbers, int64 (N,), and boxes, float64 (N, 4), where the records are parts of pictures.
      summary: what was found.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        files: TextColumn,
        captions: TextColumn,
        starts: np.ndarray,
        image_ids: np.ndarray,
        regions: tuple[np.ndarray, np.ndarray] | None,
        summary: dict[str, Any],
    ):
        self.name, self.summary = name, summary
        self._folder, self._files, self._captions, self._starts = folder, files, captions, starts
        self._image_ids, self._regions = image_ids, regions
        self._several = len(captions) > len(files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        record = self._described(index)
        data = picture_bytes(os.path.join(self._folder, self._files[index]), record["key"])
        if self._regions is None:
            return record | {"image": data}
        try:
            picture = upright_rgb(data)
        except Exception as error:  # PIL's decoders raise a dozen unrelated types on corrupt data
            raise BadRecord(record["key"], f"corrupt image ({trouble_of(error)})") from error
        left, top, right, bottom = np.rint(self._regions[1][index]).astype(int).tolist()
        box = max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height)
        if min(box[2] - box[0], box[3] - box[1]) < SMALLEST_REGION:
            size = f"{picture.width} x {picture.height}"
            raise BadRecord(record["key"], f"its region {box} is not in the picture of {size} pixels")
        return record | {"image": picture.crop(box)}

    def _described(self, index: int) -> Record:
        captions = [self._captions[k] for k in range(*self._starts[index : index + 2].tolist())]
        part = f"#{self._regions[0][index]}" if self._regions is not None else ""
        record: Record = {"key": self._files[index] + part, "caption": captions[0]}
        if self._several:
            record["captions"] = captions
        if (number := int(self._image_ids[index])) >= 0:
            record["image_id"] = number
        return record

    def metadata(self) -> Iterator[Record]:
        """All records without their pictures, which are not touched."""
        return map(self._described, range(len(self)))

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; no picture is touched."""
        return [self._described(index) for index in evenly(len(self), count).tolist()]


def open_caption_list(spec: str) -> CaptionList:
    """Opens 'captions:FILE:IMAGES', see `caption_files`; 'captions:region_descriptions.json:IMAGES:crop' for regions.

    A picture is IMAGES/NAME; else the file NAME of any sub-folder; of an address the file that has its last part as
    name, or its CRC-32, as downloaders of Conceptual Captions name them. Without ':crop' the texts of all regions of a
    picture are captions of the picture; with it each region is cut out and has its own.

    Raises:
      UserError: for a malformed name, a file that is none of captions, or a folder without its pictures.
    """
    parts = re.split(r":(?!//)", spec.removeprefix(KIND_OF_LIST))
    crop = len(parts) == 3 and parts[2] == "crop"
    if not all(parts) or len(parts) != 2 + crop:
        raise UserError(
            f"data source {spec!r}: write captions:FILE:IMAGES, such as captions:captions_train2017.json:train2017"
        )
    path, folder = parts[:2]
    for there, what in ((path, "file"), (folder, "folder")):
        if not epath.Path(there).exists() or epath.Path(there).is_dir() != (what == "folder"):
            raise UserError(f"data source {spec}: there is no {what} {there}")
    mistakes = Mistakes()
    columns = _Columns(crop, mistakes)
    rows = _table_rows(path) if path.lower().endswith((".csv", ".jsonl", ".parquet")) else read_captions(path, mistakes)
    for row in rows:
        columns.take(row)
    if not columns.files:
        raise UserError(f"data source {spec}: {path} has no {'region' if crop else 'caption'} to use{mistakes.said()}")
    return columns.finish(spec, folder, path)


def _table_rows(path: str) -> Iterator[CaptionRow]:
    records, _, _ = table_records(path)
    return (CaptionRow(row["key"], caption) for row in records for caption in captions_of(row))


class _Columns:
    """Rows of captions, put together by picture."""

    def __init__(self, crop: bool, mistakes: Mistakes):
        self._crop, self._mistakes = crop, mistakes
        self.files: list[str] = []
        self._row_of: dict[str, int] = {}
        self._image_ids = array.array("q")
        self._captions: list[str] = []
        self._caption_row = array.array("q")
        self._regions: list[Region] = []

    def take(self, row: CaptionRow) -> None:
        """One more caption."""
        if self._crop and not self._take_region(row):
            return
        number = -1 if self._crop else self._row_of.get(row.file, -1)
        if number < 0:
            number = len(self.files)
            self._row_of[row.file] = number
            self.files.append(row.file)
            self._image_ids.append(-1 if row.image_id is None else row.image_id)
        self._caption_row.append(number)
        self._captions.append(row.caption)

    def _take_region(self, row: CaptionRow) -> bool:
        if row.region is None:
            raise UserError(":crop is for files with regions, such as Visual Genome's region_descriptions.json")
        x1, y1, x2, y2 = row.region.box
        if min(x2 - x1, y2 - y1) < SMALLEST_REGION:
            self._mistakes.add("small_region", f"{row.file}#{row.region.number}")
            return False
        self._regions.append(row.region)
        return True

    def finish(self, spec: str, folder: str, path: str) -> CaptionList:
        """The source. Raises UserError where none of the pictures is in the folder."""
        found = _find(self.files, folder, self._mistakes)
        record, first = self._records(found)
        if not first:
            raise UserError(
                f"data source {spec}: none of the {len(found):,} pictures of {path} is in {folder}, such as "
                f"{self.files[0]!r}"
            )
        of_caption = record[np.array(self._caption_row, np.int64)]
        order = np.argsort(of_caption, kind="stable")
        order = order[of_caption[order] >= 0]
        counts = np.bincount(of_caption[order], minlength=len(first))
        files = TextColumn(str(found[k]) for k in first)
        captions = [self._captions[k] for k in order]
        pictures = len({found[k] for k in first})
        says = f"{shown(spec)}: {pictures:,} pictures, {len(captions):,} {'regions' if self._crop else 'captions'}"
        says += f", such as {quoted(captions[0])}{self._mistakes.said()}"
        return CaptionList(
            name=spec,
            folder=folder,
            files=files,
            captions=TextColumn(captions),
            starts=np.concatenate([[0], counts.cumsum()]),
            image_ids=np.array(self._image_ids, np.int64)[first],
            regions=_region_arrays([self._regions[k] for k in first]) if self._crop else None,
            summary={
                "folder": folder,
                "pictures": pictures,
                "captions": len(captions),
                "passed_over": dict(self._mistakes.counts),
                "says": says,
            },
        )

    def _records(self, found: Sequence[str | None]) -> tuple[np.ndarray, list[int]]:
        """int64 (files,), the record of each, -1 for one that is not there; and the first file of each record.

        Several names may be of one file; parts of pictures are records of their own.
        """
        record, first, known = np.full(len(found), -1, np.int64), list[int](), dict[str, int]()
        for k, file in enumerate(found):
            if file is not None:
                record[k] = len(first) if self._crop else known.setdefault(file, len(first))
                if record[k] == len(first):
                    first.append(k)
        return record, first


def _region_arrays(regions: Sequence[Region]) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.array([region.number for region in regions], np.int64)
    return numbers, np.array([region.box for region in regions], np.float64).reshape(-1, 4)


# -- pictures ---------------------------------------------------------------------------------------------------------


def _find(files: Sequence[str], folder: str, mistakes: Mistakes) -> list[str | None]:
    """Of each named file its path below the folder; None for one that is not there.

    Where all of some are found as they are named, all others are taken to be: one that is not there is a bad record
    when it is read. Else the folder is searched once.
    """
    looked = [files[k] for k in evenly(len(files), FILES_LOOKED_FOR).tolist()]
    if all("://" not in file and epath.Path(os.path.join(folder, file)).exists() for file in looked):
        return list(files)
    paths = sorted(_paths_below(folder))
    there, by_name = set(paths), dict[str, str]()
    for path in paths:
        name = path.rpartition("/")[2]
        if by_name.setdefault(name, path) != path:
            mistakes.add("same_name", path)
    found = [
        file if file in there else next((by_name[name] for name in _names_of(file) if name in by_name), None)
        for file in files
    ]
    for file, where in zip(files, found, strict=True):
        if where is None:
            mistakes.add("no_picture", file)
    return found


def _names_of(file: str) -> Iterable[str]:
    """Names that the file of a path or an address may have."""
    if "://" not in file:
        return (file.rpartition("/")[2],)
    last = unquote(urlsplit(file).path).rpartition("/")[2]
    number = str(zlib.crc32(file.encode()))
    return (number, f"{number}.jpg", *filter(None, (last,)))


def _paths_below(folder: str) -> Iterator[str]:
    """Paths of all files at any depth, relative to the folder, with '/'; links to folders are followed."""
    if "://" in folder:
        fs, root = filesystem(folder)
        yield from (path[len(root) :].lstrip("/") for path in fs.find(root))
        return
    for inner, _, names in os.walk(folder, followlinks=True):
        below = os.path.relpath(inner, folder).replace(os.sep, "/")
        yield from (name if below == "." else f"{below}/{name}" for name in names)
