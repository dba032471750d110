"""One file of packed videos: what the command's worker processes run."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from florence_jax.data.records import BadRecord, Record, picture_bytes
from florence_jax.data.sources.array_record import META, write_array_record
from florence_jax.data.sources.video import open_videos
from florence_jax.data.video_writer import encode_video
from florence_jax.data.videos import open_video
from florence_jax.files import exists, read_json, write_bytes

LEFT_OUT_NOTE = ".left_out.json"  # beside a file: [key, reason] of the videos that are not in it


class Shard(NamedTuple):
    """A file to write.

    Attributes:
      data: the source, see `open_videos`.
      rows: of the source.
      path: of the file.
      short: pixels of the shorter side that larger frames are made smaller to; None: videos stay as they are.
      kind: of `VIDEO_FORMATS`, for videos that are made smaller.
    """

    data: str
    rows: Sequence[int]
    path: str
    short: int | None
    kind: str


def pack_shard(shard: Shard) -> tuple[int, list[tuple[str, str]]]:
    """Writes a file, unless it is there whole; returns how many videos it has, and (key, reason) of those left out."""
    note = shard.path.removesuffix(".array_record") + LEFT_OUT_NOTE
    if all(map(exists, (shard.path, shard.path + META, note))):
        found = [(key, reason) for key, reason in read_json(note)]
        return len(shard.rows) - len(found), found
    left: list[tuple[str, str]] = []
    source = open_videos(shard.data)

    def records() -> Iterator[Record]:
        for row in shard.rows:
            try:
                record = _packed(source[row], shard)
            except BadRecord as bad:
                left.append((bad.key, bad.reason))
                continue
            yield record
        write_bytes(note, json.dumps(left, indent=1).encode("utf-8", "backslashreplace"))

    packed = records()
    first = next(packed, None)
    if first is None:  # all are left out: there is no such file
        return 0, left
    return write_array_record(shard.path, _chain(first, packed)), left


def _chain(first: Record, others: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from others


def _packed(record: Record, shard: Shard) -> Record:
    """The record with the bytes of its video. Raises BadRecord for one of which no frame can be decoded."""
    key, data = record["key"], record["video"]
    with open_video(data, key) as video:
        part = video.part(record.get("clip"), key)
        if shard.short is None:
            video.read([part.start])
            content = data if isinstance(data, bytes) else picture_bytes(os.fspath(data), key)
            return record | {"video": content}
        seconds = float(video.times()[-1])
        rate = Fraction((video.count - 1) / seconds if seconds > 0 else 25).limit_denominator(1001)
        group = max(1, math.ceil(rate / 2))  # half a second from a key frame to the next: clips begin anywhere
        made = encode_video(video.each(part, shard.short), rate, shard.kind, group)
    return {name: value for name, value in record.items() if name != "clip"} | {"video": made}
