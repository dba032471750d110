"""Whether two pictures are one: the nearest of their views by hash, and then what hashes do not see.

Hashes see outlines. Hearts of two colours, cards with other pips in one frame, clocks with other hands have equal or
near hashes. So a pair of views within the distances is looked at once more, on grids of their grey levels and colours,
which are cut and mirrored as the views are:

* Photographs are copied with other light. Grey levels (8 x 8) may differ by a factor and an offset, colours (4 x 4) by
  a factor, and one of the two may be a greyscale copy of the same light; what is left after that is bounded.
* Drawings mean something by their colours, their direction and a few pixels: a letter, an arrow, a pip. Two of them
  (`FLAT`: few grey levels fill each) are compared as they are, in 16 x 16 grey levels, neither mirrored nor cropped.

The bounds lie where dedup.perturb finds as many changed photographs as by the hashes alone.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from florence_jax.curation.dedup.join import HashRows, Join
from florence_jax.curation.ingest.hashing import (
    CHROMA_SIDE,
    CROP_KINDS,
    CROPS,
    LUMA_SIDE,
    PICTURE_LOOK_BYTES,
    VIEW_KINDS,
    bit_distance,
)

FLAT = 0.65  # share of the four most frequent grey levels: more is a drawing
MAX_COLOUR = 20.0  # levels of (Cb, Cr), in any cell
MAX_LUMA = 26.0  # grey levels, in any cell, of photographs
MAX_LUMA_CROPPED = 48.0  # the crops that are tried are 3.6 % apart: a copy lies up to half of that beside one
MAX_LUMA_RMS = 10.0  # over all cells
MAX_LUMA_DRAWN = 16.0  # in any of 16 x 16 cells, of drawings
MAX_GAIN = 2.0  # of light and of colour, and 1 / 2
GREY_COLOUR = 6.0  # levels of colour: less is a grey picture
GREY_GAIN, GREY_OFFSET = 1.18, 10.0  # of light, between a picture and its greyscale copy
MIRRORED = 0.5  # how doubtful a mirrored pair is at least
NEAR_ZERO = 2.0  # levels, added to deviations before they are divided
INDEXED_VIEWS = ("trimmed",)  # kinds of probes that are compared with other pictures' probes as well
CHUNK = 1024  # pairs of pictures compared at once
VIEW_CHANGES = ("", "flip", *CROP_KINDS)  # of a look; "trimmed" is one unchanged
WEIGHT = 1024.0  # of the whole-number weights that cut a grid: sums are exact


def _cuts(side: int, cells: int) -> np.ndarray:
    """float64 (VIEW_CHANGES, cells, side): how the cells of the central part of a grid's side are made of its own."""
    edges = np.arange(side + 1)
    rows = []
    for crop in (1.0, 1.0, *CROPS[1:]):
        ends = ((np.arange(cells + 1) / cells - 0.5) * crop + 0.5) * side
        share = np.minimum(ends[1:, None], edges[1:]) - np.maximum(ends[:-1, None], edges[:-1])
        rows.append(np.rint(share.clip(0) * cells / (side * crop) * WEIGHT))
    return np.stack(rows)


LUMA_CELLS, CHROMA_CELLS = 8, 4
LUMA_CUTS, CHROMA_CUTS = _cuts(LUMA_SIDE, LUMA_CELLS), _cuts(CHROMA_SIDE, CHROMA_CELLS)
FLIPPED = VIEW_CHANGES.index("flip")


def _turned(cuts: np.ndarray) -> np.ndarray:
    """The same for the other axis, (VIEW_CHANGES, side, cells), where a mirrored picture is mirrored."""
    cuts = cuts.copy()
    cuts[FLIPPED] = cuts[FLIPPED, ::-1]
    return np.ascontiguousarray(cuts.transpose(0, 2, 1))


LUMA_TURNED, CHROMA_TURNED = _turned(LUMA_CUTS), _turned(CHROMA_CUTS)
# By (has a border, position among the views): which of the two looks it shows, and its change.
_LAST = len(VIEW_KINDS[1]) - len(CROP_KINDS)
LOOK_OF = np.array([[0] * len(VIEW_KINDS[1]), [int(0 < at < _LAST) for at in range(len(VIEW_KINDS[1]))]])
CHANGE_OF = np.zeros((2, len(VIEW_KINDS[1])), np.int64)
for _border, _kinds in enumerate(VIEW_KINDS):
    CHANGE_OF[_border, : len(_kinds)] = [VIEW_CHANGES.index(kind.replace("trimmed", "")) for kind in _kinds]


def wide_hashes(hashes: Sequence[bytes]) -> np.ndarray:
    """32-byte hashes as uint64 (n, 4), as HashRows holds them."""
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 4)


def hash_rows(rids: Sequence[int], measured: Sequence[Mapping[str, Any]]) -> HashRows:
    """Rows to join of measured pictures: the whole picture, and its `probes`.

    Args:
      rids: an integer for each picture.
      measured: of `hashing.measure`, or rows of a table with its columns `h64`, `h256` and `probes`, whose items are
        (kind, h64, h256) or mappings of these names. Only pictures of status 'ok'.
    """
    rid, h64, h256, probe = [], [], [], []
    for number, item in zip(rids, measured, strict=True):
        views = [(p["kind"], p["h64"], p["h256"]) if isinstance(p, Mapping) else p for p in item["probes"]]
        for kind, short, long in [("", item["h64"], item["h256"]), *views]:
            rid.append(number)
            h64.append(short)
            h256.append(long)
            probe.append(kind != "" and kind not in INDEXED_VIEWS)
    return HashRows(np.array(rid, np.int64), np.array(h64, np.uint64), wide_hashes(h256), np.array(probe, bool))


class Comparison(NamedTuple):
    """Pairs of pictures by their nearest pair of views that agrees; each (pairs,).

    Attributes:
      near: bool. Where it is not, the rest is that of no pair.
      d64, d256: int32, of the hashes.
      luma, colour: float64, levels, the largest difference of a cell.
      change: int64, of `VIEW_CHANGES`, what the one view is of the other.
      doubt: float64, 0 to 1: the nearest to its bound of the distances and differences.
    """

    near: np.ndarray
    d64: np.ndarray
    d256: np.ndarray
    luma: np.ndarray
    colour: np.ndarray
    change: np.ndarray
    doubt: np.ndarray

    @classmethod
    def nothing(cls, pairs: int) -> "Comparison":
        """Pairs that are far from each other."""
        fill = (False, 64, 256, 255.0, 255.0, 0, 1.0)
        return cls(*(np.full(pairs, value, np.int32 if value in (64, 256) else None) for value in fill))


@dataclasses.dataclass
class Views:
    """Hashes and looks of pictures 0 .. n-1, to compare any two of them.

    Attributes:
      rows: views, sorted by picture. bounds: int64 (n + 1,), the views of picture i are bounds[i] : bounds[i+1].
      look, change: int64 (views,), the row of `luma` and `chroma` that each shows, and how, of `VIEW_CHANGES`.
      luma: uint8 (looks, 16, 16). chroma: uint8 (looks, 2, 8, 8).
      flatness: float64 (n,). identity: uint64 (n, 2), equal for equal bytes.
    """

    rows: HashRows
    bounds: np.ndarray
    look: np.ndarray
    change: np.ndarray
    luma: np.ndarray
    chroma: np.ndarray
    flatness: np.ndarray
    identity: np.ndarray

    @classmethod
    def of(cls, measured: Sequence[Mapping[str, Any]]) -> "Views":
        """Of measured pictures of status 'ok' (see `hash_rows`), also with `image_id`, `flatness` and `look`."""
        n = len(measured)
        rows = hash_rows(range(n), measured)
        bounds = np.searchsorted(rows.rid, np.arange(n + 1))
        looks = np.frombuffer(b"".join(item["look"] for item in measured), np.uint8).reshape(-1, PICTURE_LOOK_BYTES)
        border = np.array([len(item["look"]) // PICTURE_LOOK_BYTES - 1 for item in measured], np.int64)
        firsts = np.cumsum(border + 1) - border - 1
        at = np.arange(len(rows)) - bounds[rows.rid]
        kind = border[rows.rid]
        return cls(
            rows,
            bounds,
            firsts[rows.rid] + LOOK_OF[kind, at],
            CHANGE_OF[kind, at],
            looks[:, : LUMA_SIDE**2].reshape(-1, LUMA_SIDE, LUMA_SIDE),
            looks[:, LUMA_SIDE**2 :].reshape(-1, 2, CHROMA_SIDE, CHROMA_SIDE),
            np.array([item["flatness"] for item in measured], float),
            np.frombuffer(b"".join(item["image_id"] for item in measured), np.uint64).reshape(-1, 2),
        )

    def compare(self, left: np.ndarray, right: np.ndarray, join: Join) -> Comparison:
        """Compares pictures `left` with pictures `right`, int64 (pairs,) each; files of equal bytes are near."""
        parts = [self._compare(left[i : i + CHUNK], right[i : i + CHUNK], join) for i in range(0, len(left), CHUNK)]
        columns = zip(*(parts or [Comparison.nothing(0)]), strict=True)
        result = Comparison(*(np.concatenate(column) for column in columns))
        equal = (self.identity[left] == self.identity[right]).all(axis=1)
        for values, value in zip(result, (True, 0, 0, 0.0, 0.0, 0, 0.0), strict=True):
            values[equal] = value
        return result

    def _compare(self, left: np.ndarray, right: np.ndarray, join: Join) -> Comparison:
        rows, result = self.rows, Comparison.nothing(len(left))
        across = self.bounds[right + 1] - self.bounds[right]
        counts = (self.bounds[left + 1] - self.bounds[left]) * across
        pair = np.repeat(np.arange(len(left)), counts)
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        i, j = (
            self.bounds[left][pair] + place // across[pair],
            self.bounds[right][pair] + place % across[pair],
        )
        d64 = np.bitwise_count(rows.h64[i] ^ rows.h64[j]).astype(np.int32)
        found = np.flatnonzero((d64 <= join.k) & ~(rows.probe[i] & rows.probe[j]))
        pair, i, j, d64 = pair[found], i[found], j[found], d64[found]
        d256 = bit_distance(rows.h256[i], rows.h256[j])
        found = np.flatnonzero(d256 <= join.max_d256)
        pair, i, j, d64, d256 = pair[found], i[found], j[found], d64[found], d256[found]
        change = np.maximum(self.change[i], self.change[j])
        drawn = np.minimum(self.flatness[left], self.flatness[right])[pair] >= FLAT
        luma, colour, doubt = self._differences(i, j, change, drawn)
        doubt = np.maximum(doubt, d256 / max(join.max_d256, 1))
        agree = np.flatnonzero(doubt <= 1)
        order = agree[np.lexsort((j[agree], i[agree], doubt[agree], pair[agree]))]
        which, first = np.unique(pair[order], return_index=True)
        best = order[first]
        for values, found in zip(result, (None, d64, d256, luma, colour, change, doubt), strict=True):
            values[which] = True if found is None else found[best]
        return result

    def _differences(
        self, i: np.ndarray, j: np.ndarray, change: np.ndarray, drawn: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of pairs of views: (`luma`, `colour`, `doubt` without the hashes; above 1 if they do not agree)."""
        parts = [np.zeros((3, 0))]
        for some in _chunks(len(i), 4 * CHUNK):
            luma = [self._cells(self.luma, k[some], LUMA_CUTS, LUMA_TURNED) for k in (i, j)]
            chroma = [self._cells(self.chroma, k[some], CHROMA_CUTS, CHROMA_TURNED) for k in (i, j)]
            fine = [self.luma[self.look[k[some]]].reshape(-1, LUMA_SIDE**2).astype(np.float64) for k in (i, j)]
            as_drawn = _differences_drawn(fine, chroma, change[some])
            as_taken = _differences_taken(luma, chroma, change[some])
            parts.append(np.where(drawn[some], as_drawn, as_taken))
        return tuple(np.concatenate(parts, axis=1))

    def _cells(self, grids: np.ndarray, view: np.ndarray, cuts: np.ndarray, turned: np.ndarray) -> np.ndarray:
        """float64 (views, [2,] cells^2): the grids of these views."""
        change = self.change[view]
        wanted = grids[self.look[view]].astype(np.float64)
        down, across = cuts[change], turned[change]
        if wanted.ndim == 4:
            wanted -= 128  # a grey cell
            down, across = down[:, None], across[:, None]
        cells = down @ wanted @ across / WEIGHT**2
        return cells.reshape(*cells.shape[:-2], -1)


def _chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))


TwoGrids = Sequence[np.ndarray]


def _differences_drawn(luma: TwoGrids, chroma: TwoGrids, change: np.ndarray) -> np.ndarray:
    """float64 (3, pairs) of drawings: as they are, `luma` uncut."""
    light = np.abs(luma[0] - luma[1]).max(axis=-1)
    colour = _largest(chroma[0] - chroma[1])
    doubt = np.maximum(light / MAX_LUMA_DRAWN, colour / MAX_COLOUR)
    return np.stack([light, colour, np.where(change > 0, np.inf, doubt)])


def _differences_taken(luma: TwoGrids, chroma: TwoGrids, change: np.ndarray) -> np.ndarray:
    """float64 (3, pairs) of photographs: less a factor and an offset of the light, and a factor of the colours."""
    means = [values.mean(axis=-1, keepdims=True) for values in luma]
    gain, light = _residue([values - mean for values, mean in zip(luma, means, strict=True)])
    size = len(luma[0]), chroma[0].shape[-1] * 2
    _, residue = _residue([values.reshape(size) for values in chroma])
    largest, rms = np.abs(light).max(axis=-1), np.sqrt((light**2).mean(axis=-1))
    colour = _largest(residue.reshape(chroma[0].shape))
    grey = np.minimum(*(np.abs(values).max(axis=(1, 2)) for values in chroma)) <= GREY_COLOUR
    grey &= np.abs(means[0] - means[1])[:, 0] <= GREY_OFFSET
    grey &= np.maximum(gain, 1 / gain) <= GREY_GAIN
    bound = np.where(change > FLIPPED, MAX_LUMA_CROPPED, MAX_LUMA)
    doubt = np.maximum(np.maximum(largest / bound, rms / MAX_LUMA_RMS), np.where(grey, 0, colour / MAX_COLOUR))
    doubt[np.maximum(gain, 1 / gain) > MAX_GAIN] = np.inf
    return np.stack([largest, colour, np.where(change == FLIPPED, np.maximum(doubt, MIRRORED), doubt)])


def _residue(values: TwoGrids) -> tuple[np.ndarray, np.ndarray]:
    """(factor between the two, (n,); what differs after each has taken half of it, at most MAX_GAIN, (n, cells))."""
    first, second = (np.sqrt((part**2).mean(axis=-1)) + NEAR_ZERO for part in values)
    gain = second / first
    half = np.sqrt(gain.clip(1 / MAX_GAIN, MAX_GAIN))[:, None]
    return gain, values[0] * half - values[1] / half


def _largest(colours: np.ndarray) -> np.ndarray:
    """(n,): the longest (Cb, Cr) of float64 (n, 2, cells)."""
    return np.sqrt((colours**2).sum(axis=1)).max(axis=-1)
