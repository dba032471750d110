"""What a set of videos is, and what is wrong with it, before anybody trains on it."""

import concurrent.futures
import html
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from florence_jax.data.records import BadRecord, Record, Source, evenly, summary_of
from florence_jax.data.videos import open_video
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.box_check import READ_THREADS, same_files
from florence_jax.files import csv_bytes
from florence_jax.page import share_bar, table_html

OPENED, WATCHED = 2000, 200  # videos whose packets are counted, and that are decoded to the end, at most
WATCHED_SIDE = 16  # pixels of the shorter side that frames are decoded to: only their number is asked
KEYS_LISTED = 100  # of each kind of mistake
KEYS_SHOWN = 5  # of each kind on the page
CLASS_LINES = 200
# Kind of mistake -> what it is, and what becomes of it.
VIDEO_MISTAKES = {
    "unreadable": ("videos that cannot be read", "passed over in training, left out of a test, counted"),
    "missing": ("videos of the list that are not there", "left out"),
    "undecodable": ("videos of which fewer frames can be decoded than they have", "the frame before is shown again"),
    "declared": ("videos that say another number of frames than they have", "the frames that are there count"),
    "unstamped": ("videos whose frames have no time stamps of their own", "decoded from the start each time: slow"),
    "short": ("videos shorter than a clip", "the clip goes round to the start"),
    "still": ("videos of one frame", "shown in all places of a clip"),
    "same_video": ("videos that are there twice, byte by byte", "both count"),
    "two_classes": ("videos that are there twice, in two classes", "both count: one of them is wrong"),
    "one_video": ("classes with one video", "they cannot be trained and tested"),
}


class _Looked(NamedTuple):
    """What was seen of a video; `watched`: frames that were decoded, None where it was not tried."""

    frames: int
    declared: int
    seconds: float
    size: tuple[int, int]
    codec: str
    stamped: bool
    watched: int | None


class VideoCheck(Evaluator):
    """Counts and mistakes of a set of videos; parameters play no part.

    Up to `opened` videos, evenly spread, are opened and their packets counted; up to `watched` of them are decoded to
    the end. Files of the same length are compared.

    Args:
      source: see `data.sources.video.open_videos`.
      name: of the evaluator, and of its files.
      span: frames from the first of a clip to its last.
      opened, watched: how many videos, at most.
    """

    def __init__(self, source: Source, name: str, span: int, opened: int = OPENED, watched: int = WATCHED):
        self.name, self._source, self._span = name, source, span
        self._opened, self._watched = opened, watched
        self._found: dict[str, list[tuple[str, str]]] = {}
        self._counts: Counter[str] = Counter()
        self._looked: dict[str, _Looked] = {}
        self._classes: Counter[str] = Counter()

    @property
    def sources(self) -> Sequence[Source]:
        """See `Evaluator`."""
        return (self._source,)

    def run(self, params: Any) -> dict[str, float]:
        """'videos', 'classes', 'opened', 'watched', 'frames', 'seconds', 'problems', and of each kind."""
        self._found, self._counts, self._looked = defaultdict(list), Counter(), {}
        rows = list(self._source.metadata())
        labels = [_label(row) for row in rows]
        self._classes = Counter(labels)
        for name, count in self._classes.items():
            if count == 1 and len(self._classes) < len(rows):
                self._add("one_video", name, "")
        self._add_missing()
        self._look(len(rows))
        self._compare([row["key"] for row in rows], labels)
        if jax.process_index() == 0:
            print("\n".join(f"{self.name}: {line}" for line in self._lines()), flush=True)
        problems = {f"problems/{kind}": float(self._counts[kind]) for kind in VIDEO_MISTAKES if self._counts[kind]}
        return self._totals() | {"problems": float(sum(self._counts.values()))} | problems

    def _add(self, kind: str, where: str, detail: str, count: int = 1) -> None:
        self._counts[kind] += count
        if len(self._found[kind]) < KEYS_LISTED:
            self._found[kind].append((where, detail))

    def _add_missing(self) -> None:
        summary = summary_of(self._source)
        for key in summary.get("missing_first", ()):
            self._add("missing", key, "")
        self._counts["missing"] = summary.get("missing", 0)

    def _look(self, count: int) -> None:
        """Opens and watches videos."""
        opened = evenly(count, self._opened)
        watched = set(opened[evenly(len(opened), self._watched)].tolist())

        def look(row: int) -> tuple[str, _Looked | BadRecord]:
            try:
                record = self._source[row]
            except BadRecord as bad:
                return bad.key, bad
            try:
                return record["key"], _look_at(record, row in watched)
            except BadRecord as bad:
                return record["key"], bad

        with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:
            for key, seen in pool.map(look, opened.tolist()):
                if isinstance(seen, BadRecord):
                    self._add("unreadable", key, seen.reason)
                    continue
                self._looked[key] = seen
                self._judge(key, seen)

    def _judge(self, key: str, seen: _Looked) -> None:
        if seen.declared and seen.declared != seen.frames:
            self._add("declared", key, f"says {seen.declared:,}, has {seen.frames:,}")
        if seen.watched is not None and seen.watched != seen.frames:
            self._add("undecodable", key, f"{seen.watched:,} of {seen.frames:,}")
        if not seen.stamped:
            self._add("unstamped", key, seen.codec)
        if seen.frames == 1:
            self._add("still", key, "")
        elif seen.frames < self._span:
            self._add("short", key, f"{seen.frames:,} frames, a clip spans {self._span:,}")

    def _compare(self, keys: Sequence[str], labels: Sequence[str]) -> None:
        """Looks for files that are there twice."""
        if not hasattr(self._source, "folder"):
            return
        for first, second in same_files([os.path.join(self._source.folder, key) for key in keys]):
            if labels[first] == labels[second]:
                self._add("same_video", keys[second], f"as {keys[first]}")
            else:
                self._add("two_classes", keys[second], f"as {keys[first]}")

    def _totals(self) -> dict[str, float]:
        looked = self._looked.values()
        return {
            "videos": float(len(self._source)),
            "classes": float(len(self._classes)),
            "opened": float(len(looked)),
            "watched": float(sum(seen.watched is not None for seen in looked)),
            "frames": float(np.median([seen.frames for seen in looked])) if looked else 0.0,
            "seconds": float(np.median([seen.seconds for seen in looked])) if looked else 0.0,
        }

    def _lines(self) -> Iterator[str]:
        """A line for each kind of mistake, with the place of the first."""
        for kind, (what, done) in VIDEO_MISTAKES.items():
            if count := self._counts[kind]:
                where, detail = self._found[kind][0]
                yield f"{count:,} {what} ({done}): {where}" + (f" ({detail})" if detail else "")
        if not sum(self._counts.values()):
            yield "no mistake was found"

    def report(self) -> list[str]:
        """What was found, mistakes, classes, and lengths, rates, sizes and codecs."""
        title, said = html.escape(self.name), html.escape(str(summary_of(self._source).get("says", self._source.name)))
        mistakes = []
        for kind, (what, done) in VIDEO_MISTAKES.items():
            if count := self._counts[kind]:
                places = [" ".join(filter(None, place)) for place in self._found[kind][:KEYS_SHOWN]]
                mistakes.append((count, what, done, "; ".join(places)))
        table = table_html(("count", "what", "what becomes of it", "such as"), mistakes) or "<p>None was found.</p>"
        totals = self._totals()
        read = f"{totals['opened']:,.0f} of {totals['videos']:,.0f} videos, evenly spread, were opened, "
        read += f"{totals['watched']:,.0f} of them decoded to the end."
        looked = self._looked.values()
        kinds = {
            "frames": [_band(seen.frames, (1, 16, 32, 64, 128, 256, 512, 1024, 4096)) for seen in looked],
            "frames a second": [f"{seen.frames / seen.seconds:.3g}" if seen.seconds else "?" for seen in looked],
            "pixels": ["{1} x {0}".format(*seen.size) for seen in looked],
            "codec": [seen.codec or "frames" for seen in looked],
        }
        return [
            f"<h2>{title}: videos</h2><p>{said}</p>",
            f"<h2>{title}: mistakes</h2>{table}<p>{read}</p>",
            f"<h2>{title}: classes</h2>{_shares('class', self._classes)}",
            *(f"<h2>{title}: {kind}</h2>{_shares(kind, Counter(values))}" for kind, values in kinds.items()),
        ]

    def files(self) -> Mapping[str, bytes]:
        """NAME_problems.csv, a line for each of the first mistakes of each kind; NAME_videos.json, all counts."""
        lines = [
            (kind, *VIDEO_MISTAKES[kind], where, detail)
            for kind in VIDEO_MISTAKES
            for where, detail in self._found.get(kind, ())
        ]
        content = {
            "data": self._source.name,
            "found": summary_of(self._source).get("says", ""),
            "counts": self._totals(),
            "classes": dict(self._classes.most_common()),
            "problems": {kind: self._counts[kind] for kind in VIDEO_MISTAKES if self._counts[kind]},
            "listed_of_each": KEYS_LISTED,
        }
        return {
            f"{self.name}_problems.csv": csv_bytes(("kind", "what", "done", "where", "detail"), lines),
            f"{self.name}_videos.json": (json.dumps(content, indent=1, default=str) + "\n").encode("utf-8", "replace"),
        }


def _label(row: Record) -> str:
    found = row.get("label", row.get("class_id"))
    return str(row.get("caption", "") if found is None else found)


def _look_at(record: Record, watch: bool) -> _Looked:
    """Raises BadRecord for a video of which no frame can be read."""
    key = record["key"]
    if "video" not in record:
        raise UserError(f"{key} has no video: protocol=check of configs/video.py is for videos")
    with open_video(record["video"], key) as video:
        watched = sum(1 for _ in video.each(range(video.count), WATCHED_SIDE)) if watch else None
        if watched == 0:
            raise BadRecord(key, "none of its frames can be decoded")
        times = video.times()
        seconds = float(times[-1]) * (1 + 1 / max(1, len(times) - 1))
        return _Looked(video.count, video.declared, seconds, video.size, video.codec, video.stamped, watched)


def _band(value: float, edges: Sequence[int]) -> str:
    """The band of a number, such as '32 to 63'."""
    for low, high in zip(edges, edges[1:], strict=False):
        if value < high:
            return f"{low} to {high - 1}" if high - low > 1 else str(low)
    return f"{edges[-1]:,} and more"


def _shares(what: str, counts: Counter[str]) -> str:
    total = max(1, sum(counts.values()))
    rows = [(name, count, share_bar(count / total)) for name, count in counts.most_common(CLASS_LINES)]
    left = len(counts) - CLASS_LINES
    return table_html((what, "videos", ""), rows) + (f"<p>{left:,} rarer ones are not shown.</p>" if left > 0 else "")
