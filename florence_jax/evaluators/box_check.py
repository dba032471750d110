"""What a set of boxes is, and what is wrong with it, before anybody trains on it."""

import concurrent.futures
import copy
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from florence_jax.data.box_problems import FLAWS_SHOWN, MISTAKES, Problems
from florence_jax.data.ops.image import Decode
from florence_jax.data.records import BadRecord, Source, evenly, summary_of
from florence_jax.data.sources.boxes import BoxSource, FileBoxSource, read_columns
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.box_report import BoxStatistics, box_report
from florence_jax.files import csv_bytes

DECODED = 2000  # pictures that are read whole, at most: some 10 ms a megapixel
READ_THREADS = 8
TAIL = 4096  # last bytes of files of one length, by which most are told apart
SAME_BYTES = 4 << 30  # of files that are read whole to see whether they are the same, at most


class BoxCheck(Evaluator):
    """Counts, mistakes and pictures of a set of boxes; parameters play no part.

    Everything that was counted when the source was opened is told. Up to `pictures` pictures, evenly spread, are
    decoded, which finds damaged ones; files of the same length are compared, which finds those that are there twice.

    Args:
      source: opened with `check`, see `data.sources.detection.open_boxes`.
      name: of the evaluator, and of its files.
      pictures: that are decoded, at most.
    """

    def __init__(self, source: BoxSource, name: str = "test", pictures: int = DECODED):
        self.name, self._source, self._pictures = name, source, pictures
        self._problems = Problems()
        self._statistics: BoxStatistics | None = None

    @property
    def sources(self) -> Sequence[Source]:
        """See `Evaluator`."""
        return (self._source,)

    def run(self, params: Any) -> dict[str, float]:
        """'images', 'boxes', 'classes', 'crowds', 'images_without_boxes', 'decoded', 'problems', and of each kind."""
        keys, sizes, columns = read_columns(self._source)
        self._problems = copy.deepcopy(getattr(self._source, "problems", Problems()))
        decoded = evenly(len(keys), self._pictures)
        self._read(keys, sizes, decoded)
        if isinstance(self._source, FileBoxSource):
            paths = [os.path.join(self._source.folder, key) for key in keys]
            for first, second in same_files(paths):
                self._problems.add("same_picture", keys[second], f"as {keys[first]}")
        self._statistics = BoxStatistics(
            keys=keys,
            sizes=sizes,
            columns=columns,
            class_names=tuple(self._source.class_names),
            category_ids=tuple(self._source.category_ids),
            decoded=len(decoded),
        )
        counts = self._problems.counts
        if jax.process_index() == 0:
            print("\n".join(f"{self.name}: {line}" for line in self._lines()), flush=True)
        found = self._statistics.totals() | {"problems": float(sum(counts.values()))}
        return found | {f"problems/{kind}": float(counts[kind]) for kind in MISTAKES if counts[kind]}

    def _lines(self) -> Iterator[str]:
        """A line for each kind of mistake, with the place of the first."""
        for kind, mistake in MISTAKES.items():
            if count := self._problems.counts[kind]:
                flaw = next(flaw for flaw in self._problems if flaw.kind == kind)
                place = " ".join(filter(None, (flaw.where, flaw.detail and f"({flaw.detail})")))
                yield f"{count:,} {mistake.what} ({mistake.done})" + (f": {place}" if place else "")
        if not self._problems.counts:
            yield "no mistake was found"

    def _read(self, keys: Sequence[str], sizes: np.ndarray, rows: np.ndarray) -> None:
        """Decodes pictures; counts those that cannot be, and those of another size than their record says."""
        digests: dict[bytes, str] = {}
        by_content = not isinstance(self._source, FileBoxSource)
        with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:
            for row, read in zip(rows.tolist(), pool.map(self._decoded, rows.tolist()), strict=True):
                if isinstance(read, BadRecord):
                    self._problems.add("unreadable", read.key, read.reason)
                    continue
                size, digest = read
                if size != tuple(sizes[row].tolist()):
                    said = "{} x {}".format(*sizes[row].tolist())
                    self._problems.add("size_mismatch", keys[row], f"says {said}, is {size[0]} x {size[1]}")
                if by_content and digests.setdefault(digest, keys[row]) != keys[row]:
                    self._problems.add("same_picture", keys[row], f"as {digests[digest]}")

    def _decoded(self, row: int) -> tuple[tuple[int, int], bytes] | BadRecord:
        """Width and height, and a digest of the content."""
        try:
            record = self._source[row]
            image = Decode()(record, np.random.default_rng(0))["image"]
        except BadRecord as bad:
            return bad
        data = record["image"] if isinstance(record["image"], bytes) else np.ascontiguousarray(image).tobytes()
        return (image.shape[1], image.shape[0]), hashlib.sha256(data).digest()

    def report(self) -> list[str]:
        """What was found, mistakes, classes, sizes, and a sheet of pictures with their boxes."""
        if self._statistics is None:
            raise UserError(f"{self.name}: nothing was checked yet")
        said = str(summary_of(self._source).get("says", self._source.name))
        return box_report(self.name, said, self._statistics, self._problems, self._source)

    def files(self) -> Mapping[str, bytes]:
        """NAME_problems.csv, a line for each of the first mistakes of each kind; NAME_problems.json, all counts."""
        if self._statistics is None:
            return {}
        lines = [(p.kind, MISTAKES[p.kind].what, MISTAKES[p.kind].done, p.where, p.detail) for p in self._problems]
        content = {
            "data": self._source.name,
            "found": summary_of(self._source).get("says", ""),
            "counts": self._statistics.totals(),
            "classes": self._statistics.classes(),
            "problems": {
                kind: {"count": self._problems.counts[kind], "what": mistake.what, "done": mistake.done}
                for kind, mistake in MISTAKES.items()
                if self._problems.counts[kind]
            },
            "listed_of_each": FLAWS_SHOWN,
        }
        return {
            f"{self.name}_problems.csv": csv_bytes(("kind", "what", "done", "where", "detail"), lines),
            f"{self.name}_problems.json": (json.dumps(content, indent=1, default=str) + "\n").encode(),
        }


def same_files(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of files with the same bytes: of each file the first that is the same.

    Only files of the same length and with the same last bytes are read whole, up to `SAME_BYTES`.
    """
    lengths = [_length(path) for path in paths]
    groups = _groups(enumerate(lengths))
    groups = [rows for group in groups for rows in _groups((row, _tail(paths[row])) for row in group)]
    pairs, left = [], SAME_BYTES
    for group in groups:
        left -= sum(lengths[row] or 0 for row in group)
        if left < 0:
            break
        for rows in _groups((row, _digest(paths[row])) for row in group):
            pairs += [(rows[0], row) for row in rows[1:]]
    return sorted(pairs, key=lambda pair: pair[1])


def _groups(keyed: Iterable[tuple[int, Any]]) -> list[list[int]]:
    """Rows that share a key, where several do; None is shared with nobody."""
    rows = defaultdict(list)
    for row, key in keyed:
        if key is not None:
            rows[key].append(row)
    return [group for group in rows.values() if len(group) > 1]


def _length(path: str) -> int | None:
    try:
        return epath.Path(path).stat().length
    except OSError:
        return None


def _tail(path: str) -> bytes | None:
    try:
        with epath.Path(path).open("rb") as file:
            file.seek(-min(TAIL, file.seek(0, os.SEEK_END)), os.SEEK_END)
            return file.read()
    except OSError:
        return None


def _digest(path: str) -> bytes | None:
    try:
        return hashlib.sha256(epath.Path(path).read_bytes()).digest()
    except OSError:
        return None
