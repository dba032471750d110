"""Videos with a class or captions each: folders."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from florence_jax.data.records import BaseSource, Record, Source, evenly
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.folder import class_name, class_rows
from florence_jax.data.sources.picture_files import Listing, list_pictures, shown, some
from florence_jax.errors import UserError

# Suffixes of pictures that are taken for animations where videos are looked for.
ANIMATED_SUFFIXES = (".gif", ".webp", ".apng")


class VideoSource(BaseSource):
    """Video files; nothing of them is read here: "video" is the path, and ops read the frames that they need.

    Args:
      name: for messages.
      folder: where the files are.
      rows: a dict for each record with "key" (file name relative to the folder) and further fields.
      summary: what was found.
    """

    def __init__(self, name: str, folder: str, rows: Sequence[Record], summary: Mapping[str, Any] | None = None):
        self.name, self.summary = name, dict(summary or {})
        self._folder, self._rows = folder, list(rows)
        if not self._rows:
            raise UserError(f"data source {name} has no records")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        return row | {"video": os.path.join(self._folder, row["key"])}

    def metadata(self) -> Iterator[Record]:
        """All rows in order; no video is touched."""
        return map(dict, self._rows)

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; no video is touched."""
        return [dict(self._rows[i]) for i in evenly(len(self), count).tolist()]


def open_videos(spec: str) -> Source:
    """Opens videos with a class each, the caption of the record.

    Args:
      spec: a folder with a sub-folder for each class; or any other source, see `catalog.open_source`.

    Raises:
      UserError: for a folder without videos in sub-folders, or as `open_source`.
    """
    listing = list_videos(spec) if Path(spec).is_dir() else None
    if listing is None or not listing.pictures:
        return open_source(spec)
    rows = class_rows(listing)
    if not rows:
        raise UserError(f"{spec} has videos, but no sub-folder of videos for each class: {some(listing.pictures)}")
    return _class_folders(listing, rows)


def list_videos(folder: str) -> Listing:
    """The listing of a folder with its videos, and its animated pictures by their names, as `pictures`."""
    found = list_pictures(folder)
    animated = [name for name in found.pictures if name.lower().endswith(ANIMATED_SUFFIXES)]
    return dataclasses.replace(found, pictures=sorted(found.videos + animated))


def _class_folders(listing: Listing, rows: Sequence[tuple[str, str]]) -> VideoSource:
    records = [{"key": key, "caption": class_name(folder).replace("_", " ")} for key, folder in rows]
    names = list(dict.fromkeys(record["caption"] for record in records))
    says = (
        f"{shown(listing.folder)}: {len(records):,} videos, {len(names):,} classes from the names of the sub-folders: "
    )
    says += some(names)
    return VideoSource(listing.folder, listing.folder, records, {"videos": len(records), "says": says})
