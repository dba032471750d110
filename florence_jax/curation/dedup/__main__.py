"""The command `python -m florence_jax.curation.dedup`: the near-duplicates of a folder or of a parquet file.

    python -m florence_jax.curation.dedup photos/                                               # into runs/dedup
    python -m florence_jax.curation.dedup new.parquet --out=found --index=runs/dedup/index.npz  # against an earlier run

Into --out go `pairs` (each duplicate beside the representative of its cluster, with distances), `clusters` (each
picture: its cluster, whether it is the representative, why it could not be read), both as csv or parquet,
`contact_sheet.html` with some of the clusters, the doubtful ones first, `counts.json`, and `index.npz`, which a later
run takes as --index: pictures in it are not read again, and new ones are compared with them. Nothing is deleted.

The representative is the picture without a border, then with the most pixels, the most bytes, the first name.
A parquet file needs a column `image` (bytes, or a struct with `bytes`) or `path`, and may have `key`.
"""

import argparse
import csv
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florence_jax.command_line import enter, exit_code
from florence_jax.curation.dedup import hash_index
from florence_jax.curation.dedup.clusters import cluster, representatives, total_order
from florence_jax.curation.dedup.join import DEFAULT_JOIN, DESIGNS
from florence_jax.curation.dedup.measurements import items_of, measure_new
from florence_jax.curation.dedup.sheet import SEEN_AS, Duplicates, Sheet, sheet_html
from florence_jax.data.sources.picture_files import list_pictures, shown
from florence_jax.errors import UserError
from florence_jax.files import check_store, replacing, with_home, write_text
from florence_jax.page import FIGURE_SIDE
from florence_jax.pictures import thumbnail


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code (2 for a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m florence_jax.curation.dedup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", help="folder of pictures, searched recursively, or a parquet file")
    parser.add_argument("--out", type=Path, default=Path("runs/dedup"), help="folder to write to")
    parser.add_argument("--index", type=Path, help="index.npz of an earlier run")
    parser.add_argument("--distance", type=int, default=4, choices=sorted(DESIGNS), help="of the 64-bit hashes")
    parser.add_argument("--table", default="csv", choices=("csv", "parquet"), help="format of pairs and clusters")
    parser.add_argument("--sheet", type=int, default=60, help="clusters on the contact sheet")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read pictures")
    return exit_code(lambda: print(json.dumps(run(parser.parse_args(with_home(argv))), indent=1)))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Hashes, joins and writes; returns the counts. Raises UserError."""
    source = local_path(args.input)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out={args.out} is a file; name a folder")
    if args.workers < 1 or args.sheet < 0:
        raise UserError("--workers must be at least 1 and --sheet not negative")
    known = hash_index.load_index(args.index) if args.index else {}
    listing = list_pictures(source) if source.is_dir() else None
    if listing and listing.pictures:
        print(listing.sentence(), file=sys.stderr, flush=True)
    pictures, read = measure_new(items_of(source), known, args.workers)
    if not pictures:
        raise UserError(f"no pictures in {listing.sentence() if listing else source}")
    usable = {key: item for key, item in pictures.items() if item["status"] == "ok"}
    keys, measured = list(usable), list(usable.values())
    ranks = rank(keys, measured)
    join = dataclasses.replace(DEFAULT_JOIN, k=args.distance)
    labels, _, joined = cluster(measured, ranks, join)
    best, size = representatives(labels, ranks)
    args.out.mkdir(parents=True, exist_ok=True)
    pairs = Duplicates.of(measured, best, join)
    write_rows(args.out / f"pairs.{args.table}", PAIR_COLUMNS, pair_rows(keys, pairs))
    write_rows(args.out / f"clusters.{args.table}", CLUSTER_COLUMNS, cluster_rows(pictures, keys, best, size))
    sheet = sheet_html(
        Sheet(keys, measured, f"{source}/", pairs, join, args.sheet), lambda wanted: thumbnails(source, wanted)
    )
    write_text(args.out / "contact_sheet.html", sheet)
    hash_index.save(args.out / "index.npz", pictures)
    counts = {
        "pictures": len(pictures),
        "read_now": read,
        "passed_over": listing.not_pictures() if listing else {},
        "unreadable": dict(Counter(item["status"] for item in pictures.values() if item["status"] != "ok")),
        "clusters_of_several": int((size[best == np.arange(len(best))] > 1).sum()),
        "duplicates": len(pairs.other),
        "equal_files": int(pairs.equal.sum()),
        "largest_cluster": int(size.max(initial=0)),
        "join": dict(joined),
    }
    write_text(args.out / "counts.json", json.dumps(counts, indent=1))
    return counts


def local_path(given: str) -> Path:
    """The folder or file. Raises UserError where there is none, and for a URL."""
    if "://" in given:
        check_store(given)
        raise UserError(f"{given}: near-duplicates are looked for on a local disk; copy the pictures there first")
    if not Path(given).exists():
        raise UserError(f"{given}: no such folder or file")
    return Path(given)


def rank(keys: Sequence[str], measured: Sequence[dict[str, Any]]) -> np.ndarray:
    """The order of preference, see the module's docstring: int64 (n,), the best is the smallest."""
    names = np.empty(len(keys), np.int64)
    names[np.argsort(np.array(keys, str))] = np.arange(len(keys))
    bordered = np.array([any(kind == "trimmed" for kind, _, _ in item["probes"]) for item in measured], bool)
    pixels = np.array([item["width"] * item["height"] for item in measured], np.int64)
    return total_order(bordered, -pixels, -np.array([item["bytes"] for item in measured], np.int64), names)


PAIR_COLUMNS = ("representative", "duplicate", "d64", "d256", "light", "colour", "view", "doubt", "equal_bytes")
CLUSTER_COLUMNS = ("key", "status", "representative", "size", "is_representative", "width", "height", "bytes")


def pair_rows(keys: Sequence[str], pairs: Duplicates) -> Iterator[tuple]:
    """Each duplicate with the representative of its cluster."""
    found = pairs.found
    columns = [pairs.first, pairs.other, found.d64, found.d256, found.luma, found.colour, found.change, found.doubt]
    for first, other, d64, d256, luma, colour, change, doubt, equal in zip(
        *(column.tolist() for column in [*columns, pairs.equal]), strict=True
    ):
        differences = round(luma, 1), round(colour, 1), SEEN_AS[change], round(doubt, 3)
        yield keys[first], keys[other], d64, d256, *differences, equal


def cluster_rows(
    pictures: dict[str, dict[str, Any]], keys: Sequence[str], best: np.ndarray, size: np.ndarray
) -> Iterator[tuple]:
    """Every picture, unreadable ones without a cluster."""
    place = {key: i for i, key in enumerate(keys)}
    for key, item in pictures.items():
        i = place.get(key)
        group = ("", 0, False) if i is None else (keys[best[i]], int(size[i]), bool(best[i] == i))
        yield key, item["status"], *group, item["width"], item["height"], item["bytes"]


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[tuple]) -> None:
    """Writes csv or parquet, by the suffix; parquet escapes in names what is not UTF-8, csv keeps the bytes.

    Raises:
      UserError: where pyarrow is missing.
    """
    if path.suffix == ".csv":
        with (
            replacing(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)
    else:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise UserError("--table=parquet needs pyarrow: pip install pyarrow") from error
        listed = [[shown(value) if isinstance(value, str) else value for value in row] for row in rows]
        with replacing(path) as temporary:
            pq.write_table(pa.table({name: [row[i] for row in listed] for i, name in enumerate(columns)}), temporary)


def thumbnails(path: Path, wanted: set[str]) -> dict[str, str]:
    """Data URIs of the pictures of the input with these keys, '' for what cannot be shown."""
    return {key: thumbnail(bytes_at(where), FIGURE_SIDE) for key, _, where in items_of(path) if key in wanted}


def bytes_at(where: bytes | Path) -> bytes:
    """The bytes of a picture; b'' if its file has gone."""
    try:
        return where.read_bytes() if isinstance(where, Path) else where
    except OSError:
        return b""


if __name__ == "__main__":
    enter(main)
