"""The index of benchmark pictures that must not be trained on."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florence_jax.curation.dedup.clusters import MIN_DETAIL
from florence_jax.curation.dedup.join import DEFAULT_JOIN, HashRows, Join, compact, covering_tables
from florence_jax.curation.dedup.views import hash_rows
from florence_jax.curation.ingest.hashing import bit_distance
from florence_jax.errors import UserError
from florence_jax.files import replacing


class BenchmarkIndex:
    """Pictures of evaluation sets, to find their exact and resized copies among training pictures.

    By the hashes alone, colours are not compared: a false match costs a pair, a missed one an evaluation.

    Attributes:
      names: of the benchmarks. owner: int64 (images,), the benchmark of each image. ids: uint64 (images, 2), sorted
        bytes hash of each. rows: hash rows of the images (rid = image). join: what counts as a copy.
    """

    def __init__(self, names: Sequence[str], owner: np.ndarray, ids: np.ndarray, rows: HashRows, join: Join):
        self.names, self.owner, self.ids, self.rows, self.join = list(names), owner, ids, rows, join
        self._exact = {}
        for image, pair in enumerate(ids.tolist()):
            self._exact.setdefault(tuple(pair), image)
        self._tables = []
        for mask in covering_tables(join.k):
            keys = compact(rows.h64, mask)
            order = np.argsort(keys, kind="stable")
            self._tables.append((int(mask), keys[order], order))

    @classmethod
    def build(
        cls,
        benchmarks: Mapping[str, Iterable[Mapping[str, Any]]],
        join: Join = DEFAULT_JOIN,
        min_detail: float = MIN_DETAIL,
    ) -> "BenchmarkIndex":
        """Index of measured pictures (`hashing.measure`) by benchmark name, those of status 'ok'.

        Raises:
          UserError: a benchmark without a single usable picture.
        """
        owner, kept = [], []
        for number, (name, pictures) in enumerate(benchmarks.items()):
            usable = [item for item in pictures if item["status"] == "ok"]
            if not usable:
                raise UserError(f"benchmark {name!r} has no readable picture: check its folder")
            kept += usable
            owner += [number] * len(usable)
        ids = np.frombuffer(b"".join(item["image_id"] for item in kept), np.uint64).reshape(-1, 2)
        detailed = [image for image, item in enumerate(kept) if item["detail"] >= min_detail]
        rows = hash_rows(detailed, [kept[image] for image in detailed])
        return cls(list(benchmarks), np.array(owner, np.int64), ids, rows, join)

    def query(
        self, measured: Sequence[Mapping[str, Any]], min_detail: float = MIN_DETAIL
    ) -> list[dict[str, Any] | None]:
        """The nearest benchmark picture to each of these, or None.

        Returns:
          for each picture of status 'ok' that is a copy: `benchmark` (its name), `image` (its number), `kind` ('exact':
          equal bytes, 'near'), `d64`, `d256`; None for the others.
        """
        found: list[dict[str, Any] | None] = [None] * len(measured)
        near = [i for i, m in enumerate(measured) if m["status"] == "ok" and m["detail"] >= min_detail]
        rows = hash_rows(near, [measured[i] for i in near])
        left, right, d64, d256 = self._pairs(rows)
        order = np.lexsort((self.rows.rid[right], d64, d256, rows.rid[left]))
        picture, first = np.unique(rows.rid[left][order], return_index=True)
        for i, at in zip(picture.tolist(), order[first].tolist(), strict=True):
            found[i] = self._match(int(self.rows.rid[right[at]]), "near", int(d64[at]), int(d256[at]))
        for i, item in enumerate(measured):
            image = self._exact.get(tuple(np.frombuffer(item["image_id"], np.uint64).tolist()))
            if image is not None:
                found[i] = self._match(image, "exact", 0, 0)
        return found

    def _match(self, image: int, kind: str, d64: int, d256: int) -> dict[str, Any]:
        return {"benchmark": self.names[self.owner[image]], "image": image, "kind": kind, "d64": d64, "d256": d256}

    def _pairs(self, rows: HashRows) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Verified pairs (row of the query, row of the index, d64, d256)."""
        lefts, rights = [], []
        for mask, keys, order in self._tables:
            wanted = compact(rows.h64, mask)
            low, high = np.searchsorted(keys, wanted), np.searchsorted(keys, wanted, "right")
            counts = high - low
            left = np.repeat(np.arange(len(rows)), counts)
            right = order[np.repeat(low - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())]
            near = np.bitwise_count(rows.h64[left] ^ self.rows.h64[right]) <= self.join.k
            near &= ~(rows.probe[left] & self.rows.probe[right])
            lefts.append(left[near])
            rights.append(right[near])
        left, right = np.concatenate(lefts), np.concatenate(rights)
        d256 = bit_distance(rows.h256[left], self.rows.h256[right])
        left, right, d256 = (values[d256 <= self.join.max_d256] for values in (left, right, d256))
        return left, right, np.bitwise_count(rows.h64[left] ^ self.rows.h64[right]), d256

    def report(self, matches: Iterable[Mapping[str, Any] | None]) -> dict[str, dict[str, int]]:
        """For each benchmark: `images` in the index, and how many queried pictures were `exact` or `near` copies."""
        counts = {
            name: {"images": int((self.owner == i).sum()), "exact": 0, "near": 0} for i, name in enumerate(self.names)
        }
        for match in matches:
            if match is not None:
                counts[match["benchmark"]][match["kind"]] += 1
        return counts

    def save(self, path: str | Path) -> None:
        """Writes the index as .npz, in one step."""
        join = np.array(dataclasses.astuple(self.join))
        fields = {f"rows_{field.name}": getattr(self.rows, field.name) for field in dataclasses.fields(self.rows)}
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, names=np.array(self.names), owner=self.owner, ids=self.ids, join=join, **fields)

    @classmethod
    def load(cls, path: str | Path) -> "BenchmarkIndex":
        """Reads what `save` wrote. Raises UserError if it is not that."""
        try:
            with np.load(path) as file:
                rows = HashRows(*(file[f"rows_{field.name}"] for field in dataclasses.fields(HashRows)))
                return cls(file["names"].tolist(), file["owner"], file["ids"], rows, Join(*file["join"].tolist()))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: not an index of benchmark pictures ({error}); build it again") from error
