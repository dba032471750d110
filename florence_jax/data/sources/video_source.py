"""Video files with what is known of each: the source, and how the files of a list are found in a folder."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from florence_jax.data.records import BaseSource, Record, evenly
from florence_jax.data.sources.picture_files import Listing, list_pictures, shown, some
from florence_jax.errors import UserError

# Suffixes of pictures that are taken for animations where videos are looked for.
ANIMATED_SUFFIXES = (".gif", ".webp", ".apng")
MISSING_LISTED = 100  # keys of missing files that a summary names


class VideoSource(BaseSource):
    """Video files; nothing of them is read here: "video" is the path, and ops read the frames that they need.

    Args:
      name: for messages.
      folder: where the files are.
      rows: a dict for each record with "key" (file name relative to the folder) and further fields.
      summary: what was found.
      class_names: of the numbers in "class_id"; () where classes are texts.

    Attributes:
      name, folder, summary, class_names: as given.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        rows: Sequence[Record],
        summary: Mapping[str, Any] | None = None,
        class_names: Sequence[str] = (),
    ):
        self.name, self.summary, self.class_names = name, dict(summary or {}), tuple(class_names)
        self.folder, self._rows = folder, list(rows)
        if not self._rows:
            raise UserError(f"data source {name} has no records")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        return row | {"video": os.path.join(self.folder, row["key"])}

    def metadata(self) -> Iterator[Record]:
        """All rows in order; no video is touched."""
        return map(dict, self._rows)

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; no video is touched."""
        return [dict(self._rows[i]) for i in evenly(len(self), count).tolist()]


def list_videos(folder: str | os.PathLike) -> Listing:
    """The listing of a folder with its videos, and the pictures that may be animated by their names, as `pictures`.

    Other pictures are among what is passed over, videos are not.

    Raises:
      UserError: if there is no such folder.
    """
    found = list_pictures(folder)
    animated = [name for name in found.pictures if name.lower().endswith(ANIMATED_SUFFIXES)]
    still = _suffixes(set(found.pictures).difference(animated))
    passed_over = found.passed_over - _suffixes(found.videos) + still
    return dataclasses.replace(found, pictures=sorted(found.videos + animated), videos=[], passed_over=passed_over)


def _suffixes(names: Iterable[str]) -> Counter[str]:
    return Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in names)


def videos_by_stem(folder: str | os.PathLike) -> dict[str, str]:
    """Name without suffix and folders -> the video of a folder; of several the first by its path."""
    found: dict[str, str] = {}
    for name in list_videos(folder).pictures:
        found.setdefault(os.path.splitext(name.rpartition("/")[2])[0], name)
    return found


def listed_videos(
    name: str,
    folder: str,
    rows: Iterable[tuple[str, str | None, Record]],
    class_names: Sequence[str] = (),
) -> VideoSource:
    """The source of what a list says of videos; those that are not there are left out, counted and said.

    Args:
      name: of the source, for messages.
      folder: where the videos are.
      rows: for each what the list calls it, its file relative to the folder or None where it is missing, and the
        further fields of its record.
      class_names: see `VideoSource`.

    Raises:
      UserError: if none is there.
    """
    records, missing = [], []
    for listed, file, fields in rows:
        if file is None:
            missing.append(listed)
        else:
            records.append({"key": file} | fields)
    total = len(records) + len(missing)
    if not records:
        what = (
            f"none of the {total:,} videos of the list is in {folder}, such as {missing[0]}" if total else "no videos"
        )
        raise UserError(f"data source {name}: {what}")
    says = f"{shown(name)}: {len(records):,} videos"
    captions = dict.fromkeys(record["caption"] for record in records)
    if any(record.get("captions") for record in records):
        says += f", {sum(len(record.get('captions', ())) for record in records):,} captions"
    else:
        says += f", {len(captions):,} different captions or classes: {some(captions)}"
    if missing:
        says += (
            f"; {len(missing):,} of {total:,} in the list ({len(missing) / total:.1%}) are not in {shown(folder)} and "
        )
        says += f"are left out: {some(missing)}"
    summary = {"videos": len(records), "missing": len(missing), "missing_first": missing[:MISSING_LISTED], "says": says}
    return VideoSource(name, folder, records, summary, class_names)
