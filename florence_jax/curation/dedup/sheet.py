"""The contact sheet: clusters to be looked at, the doubtful ones first, equal files apart."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from florence_jax.curation.dedup.join import Join
from florence_jax.curation.dedup.views import VIEW_CHANGES, Comparison, Views
from florence_jax.data.sources.picture_files import shown
from florence_jax.page import contact_sheet

FILES_SHOWN = 12  # different files of a cluster
NAMES_BESIDE = 3  # of equal files
SEEN_AS = ("same", "mirrored", *["cropped"] * (len(VIEW_CHANGES) - 2))  # of `views.VIEW_CHANGES`


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Every duplicate beside the representative of its cluster, cluster by cluster.

    Attributes:
      first, other: int64 (duplicates,), pictures. equal: bool, files of equal bytes. found: how they compare.
    """

    first: np.ndarray
    other: np.ndarray
    equal: np.ndarray
    found: Comparison

    @classmethod
    def of(cls, measured: Sequence[Mapping[str, Any]], best: np.ndarray, join: Join) -> "Duplicates":
        """Compares pictures with their representatives `best`, int64 (n,)."""
        other = np.flatnonzero(best != np.arange(len(best)))
        other = other[np.argsort(best[other], kind="stable")]
        used, place = np.unique(np.concatenate([best[other], other]), return_inverse=True)
        views = Views.of([measured[i] for i in used.tolist()])
        left, right = np.split(place, 2)
        equal = (views.identity[left] == views.identity[right]).all(axis=1)
        return cls(best[other], other, equal, views.compare(left, right, join))

    def clusters(self) -> Iterator[np.ndarray]:
        """int64 (members,) for each cluster: its rows here."""
        if len(self.first):
            yield from np.split(np.arange(len(self.first)), np.flatnonzero(np.diff(self.first)) + 1)

    def text(self, row: int, join: Join) -> str:
        """What people read of a pair."""
        found = self.found
        parts = [f"distance {found.d64[row]} of {join.k}, {found.d256[row]} of {join.max_d256}"]
        parts += [f"light {found.luma[row]:.0f}, colour {found.colour[row]:.0f}"]
        view = SEEN_AS[found.change[row]]
        return ", ".join(parts + [view] * (view != "same"))


@dataclasses.dataclass(frozen=True)
class Sheet:
    """What the page is made of.

    Attributes:
      keys, measured: of all pictures. folder: what is left out of the keys that are in it.
      duplicates: of all clusters. join: the distances.
      limit: clusters with pictures, and lines of equal files, on the page.
    """

    keys: Sequence[str]
    measured: Sequence[Mapping[str, Any]]
    folder: str
    duplicates: Duplicates
    join: Join
    limit: int

    def chosen(self) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], int]:
        """(the most doubtful clusters; others, drawn by a hash; clusters of equal files; how many are of different)."""
        pairs = self.duplicates
        clusters = list(pairs.clusters())
        different = [rows for rows in clusters if not pairs.equal[rows].all()]
        equal = [rows for rows in clusters if pairs.equal[rows].all()]
        different.sort(key=self._doubt)
        half = self.limit - self.limit // 2
        drawn = sorted(sorted(different[half:], key=self._draw)[: self.limit - half], key=self._doubt)
        return different[:half], drawn, sorted(equal, key=self._draw)[: self.limit], len(different)

    def _doubt(self, rows: np.ndarray) -> tuple[float, str]:
        return -float(self.duplicates.found.doubt[rows].max()), self.key(rows)

    def _draw(self, rows: np.ndarray) -> bytes:
        return hashlib.blake2b(self.key(rows).encode(errors="surrogateescape")).digest()

    def key(self, rows: np.ndarray) -> str:
        """Of the representative of a cluster."""
        return self.keys[self.duplicates.first[rows[0]]]

    def name(self, picture: int) -> str:
        """Of a picture, for people."""
        return shown(self.keys[picture].removeprefix(self.folder))

    def files(self, rows: np.ndarray) -> list[tuple[int, str, int]]:
        """(picture, how it compares, number of equal files) of a cluster: the representative, then by doubt."""
        pairs = self.duplicates
        first = int(pairs.first[rows[0]])
        copies = Counter(self.measured[i]["image_id"] for i in [first, *pairs.other[rows].tolist()])
        files = {self.measured[first]["image_id"]: (first, "stays")}
        for row in sorted(rows.tolist(), key=lambda row: (-pairs.found.doubt[row], self.keys[pairs.other[row]])):
            picture = int(pairs.other[row])
            files.setdefault(self.measured[picture]["image_id"], (picture, pairs.text(row, self.join)))
        return [(picture, text, copies[identity]) for identity, (picture, text) in files.items()]


def sheet_html(sheet: Sheet, thumbnails: Callable[[set[str]], Mapping[str, str]]) -> str:
    """The page. `thumbnails` gives data URIs of pictures by their keys, those that it can."""
    doubtful, drawn, equal, different = sheet.chosen()
    figures = {id(rows): sheet.files(rows)[:FILES_SHOWN] for rows in [*doubtful, *drawn]}
    wanted = {sheet.keys[picture] for files in figures.values() for picture, _, _ in files}
    wanted |= {sheet.key(rows) for rows in equal}
    pictures = thumbnails(wanted)

    def figure(picture: int, text: str, copies: int) -> tuple[str, str, str]:
        item, key = sheet.measured[picture], sheet.keys[picture]
        note = f"{text}; {copies} equal files" if copies > 1 else text
        return pictures.get(key, ""), f"{sheet.name(picture)} ({item['width']} x {item['height']})", note

    def group(rows: np.ndarray) -> tuple[str, list[tuple[str, str, str]]]:
        files = figures[id(rows)]
        total = 1 + len(rows)
        heading = f"{total} pictures" + (f", {len(files)} different ones shown" if total > len(files) else "")
        return heading, [figure(*one) for one in files]

    def names(rows: np.ndarray) -> tuple[str, str, str]:
        others = [sheet.name(i) for i in sheet.duplicates.other[rows].tolist()]
        more = f" and {len(others) - NAMES_BESIDE:,} more" if len(others) > NAMES_BESIDE else ""
        first = int(sheet.duplicates.first[rows[0]])
        return pictures.get(sheet.keys[first], ""), sheet.name(first), "= " + ", ".join(others[:NAMES_BESIDE]) + more

    clusters = sum(1 for _ in sheet.duplicates.clusters())
    note = (
        "The picture that stays is first and outlined. Distances are bits of the two hashes; light and colour are the "
        "largest difference of a cell, in levels. Pictures of an earlier run are shown by name if they are not in the "
        "input."
    )
    sections = [
        (f"The most doubtful of {different:,} clusters of different files", [group(rows) for rows in doubtful]),
        ("Others, drawn by a hash of the name", [group(rows) for rows in drawn]),
        (
            f"{len(equal):,} of {clusters - different:,} clusters of equal files",
            [("", [names(rows) for rows in equal])],
        ),
    ]
    return contact_sheet("Near-duplicates", note, sections)
