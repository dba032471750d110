"""Videos with a class or captions each: folders, tables, lists, ArrayRecord files, public sets."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from florence_jax.data.records import Record, Source
from florence_jax.data.sources.action_sets import VIDEO_KINDS
from florence_jax.data.sources.array_record import ArrayRecordSource, array_record_paths
from florence_jax.data.sources.folder import class_name, class_rows
from florence_jax.data.sources.picture_files import VIDEO_SUFFIXES, Listing, shown, some
from florence_jax.data.sources.tables import TABLE_SUFFIXES, table_records
from florence_jax.data.sources.video_source import (
    ANIMATED_SUFFIXES,
    VideoSource,
    list_videos,
    listed_videos,
)
from florence_jax.errors import UserError

LIST_SUFFIX = ".txt"


def open_videos(spec: str) -> Source:
    """Opens videos with a class or captions each.

    Args:
      spec: a folder with a sub-folder for each class; a table of videos (.csv, .tsv, .jsonl, .parquet; columns file and
        caption or label), or a list, a line 'path label' each (.txt), with paths from where it lies; ArrayRecord files;
        or 'kinetics:...', 'ssv2:...', 'ucf101:...', 'hmdb51:...', 'msrvtt:...', 'motions:...', see `action_sets`.

    Raises:
      UserError: for anything else, or where no videos are found.
    """
    kind, colon, _ = spec.partition(":")
    if colon and kind in VIDEO_KINDS:
        return VIDEO_KINDS[kind](spec)
    if paths := array_record_paths(spec):
        return ArrayRecordSource(paths, spec)
    if Path(spec).is_dir():
        return _class_folders(list_videos(spec))
    if Path(spec).is_file() and spec.lower().endswith(TABLE_SUFFIXES):
        return _table(spec)
    if Path(spec).is_file() and spec.lower().endswith(LIST_SUFFIX):
        return _list(spec)
    what = "is neither a folder, nor a table or list of videos" if Path(spec).exists() else "does not exist"
    raise UserError(
        f"data source {spec!r} {what}; use a folder with a sub-folder of videos for each class, a table (.csv), a list "
        f"(.txt), *.array_record, or one of {', '.join(f'{name}:' for name in VIDEO_KINDS)}"
    )


def open_clips(spec: str) -> Source:
    """Videos to be looked at, whether anything is known of them or not.

    Args:
      spec: a folder, whose videos are taken at any depth, sorted; one video; or as in `open_videos`.

    Raises:
      UserError: for a folder without videos, or as `open_videos`.
    """
    path = Path(spec)
    if path.is_dir() and not array_record_paths(spec):
        listing = list_videos(spec)
        if not listing.pictures:
            raise _no_videos(listing)
        says = f"{shown(spec)}: {len(listing.pictures):,} videos{listing.passed_over_text()}"
        rows = [{"key": name, "caption": ""} for name in listing.pictures]
        return VideoSource(spec, spec, rows, {"videos": len(rows), "says": says})
    if path.is_file() and path.suffix.lower() in (*VIDEO_SUFFIXES, *ANIMATED_SUFFIXES, ".png"):
        return VideoSource(spec, str(path.parent), [{"key": path.name, "caption": ""}])
    return open_videos(spec)


def _no_videos(listing: Listing) -> UserError:
    files = ", ".join(f"{count:,} {suffix}" for suffix, count in listing.not_pictures().items())
    return UserError(f"no videos in {shown(listing.folder)}. Found: {listing.files:,} files{files and f', {files}'}")


# -- a sub-folder for each class --------------------------------------------------------------------------------------


def _class_folders(listing: Listing) -> VideoSource:
    if not listing.pictures:
        raise _no_videos(listing)
    rows = class_rows(listing)
    if not rows:
        raise UserError(
            f"data source {listing.folder}: its videos must lie in a sub-folder for each class, or be in a table "
            f"(columns file, label), which is then named itself; found {some(listing.pictures)}"
        )
    records = [{"key": key, "caption": class_name(folder).replace("_", " ")} for key, folder in rows]
    names = list(dict.fromkeys(record["caption"] for record in records))
    without = len(listing.pictures) - len(rows)
    says = f"{shown(listing.folder)}: {len(records):,} videos, {len(names):,} classes from the names of the "
    says += f"sub-folders: {some(names)}"
    says += f"; {without:,} videos beside the sub-folders have no class and are left out" if without else ""
    says += listing.passed_over_text()
    return VideoSource(listing.folder, listing.folder, records, {"videos": len(records), "says": says})


# -- tables and lists -------------------------------------------------------------------------------------------------


def _table(path: str) -> VideoSource:
    records, _, said = table_records(path)
    folder = os.path.dirname(path) or "."
    found = listed_videos(path, folder, ((row["key"], _there(folder, row["key"]), row) for row in records))
    found.summary["says"] += said
    return found


def _there(folder: str, key: str) -> str | None:
    """The file, if it exists."""
    return key if os.path.isfile(os.path.join(folder, key)) else None


def _list(path: str) -> VideoSource:
    """Lines 'path label', as in mmaction: labels are all numbers, or names."""
    rows = list(_lines(path))
    if not rows:
        raise UserError(f"{path} names no videos: it needs a line 'path label' each")
    numbers = [label.isdecimal() for _, _, label in rows]
    if any(numbers) and not all(numbers):
        number, _, label = rows[numbers.index(False)]
        raise UserError(f"{path} line {number}: the label {label!r} is no number, those of other lines are")
    folder = os.path.dirname(path) or "."

    def fields(label: str) -> Record:
        known: dict[str, Any] = {"class_id": int(label)} if numbers[0] else {}
        return known | {"caption": label.replace("_", " ")}

    return listed_videos(path, folder, ((file, _there(folder, file), fields(label)) for _, file, label in rows))


def _lines(path: str) -> Iterator[tuple[int, str, str]]:
    """(line, path, label) of each line that is not empty."""
    try:
        lines: Sequence[str] = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            file, _, label = line.strip().rpartition("\t" if "\t" in line else " ")
            if not file.strip():
                raise UserError(f"{path} line {number}: {line.strip()!r} is not a path, a blank and a label")
            yield number, file.strip(), label.strip()
