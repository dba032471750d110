"""The command `python -m florence_jax.curation.dedup`: the near-duplicates of a folder or of a parquet file.

    python -m florence_jax.curation.dedup photos/                                               # into runs/dedup
    python -m florence_jax.curation.dedup new.parquet --out=found --index=runs/dedup/index.npz  # against an earlier run

Into --out go `pairs` (each duplicate beside the representative of its cluster, with distances), `clusters` (each
picture: its cluster, whether it is the representative, why it could not be read), both as csv or parquet,
`contact_sheet.html` with a sample of the clusters, `counts.json`, and `index.npz`, which a later run takes as --index:
pictures in it are not read again, and new ones are compared with them. Nothing is deleted.

The representative is the picture without a border, then with the most pixels, the most bytes, the first name.
A parquet file needs a column `image` (bytes, or a struct with `bytes`) or `path`, and may have `key`.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florence_jax.command_line import enter
from florence_jax.curation.dedup import hash_index
from florence_jax.curation.dedup.clusters import Views, cluster, hash_rows, representatives, total_order
from florence_jax.curation.dedup.join import DEFAULT_JOIN, DESIGNS
from florence_jax.curation.dedup.measurements import items_of, measure_new
from florence_jax.data.sources.picture_files import list_pictures
from florence_jax.errors import UserError
from florence_jax.files import replacing, with_home, write_text
from florence_jax.page import FIGURE_SIDE, contact_sheet
from florence_jax.pictures import thumbnail

SHOWN = 12  # members of a cluster on the contact sheet


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code (2 for a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m florence_jax.curation.dedup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", type=Path, help="folder of pictures, searched recursively, or a parquet file")
    parser.add_argument("--out", type=Path, default=Path("runs/dedup"), help="folder to write to")
    parser.add_argument("--index", type=Path, help="index.npz of an earlier run")
    parser.add_argument("--distance", type=int, default=4, choices=sorted(DESIGNS), help="of the 64-bit hashes")
    parser.add_argument("--table", default="csv", choices=("csv", "parquet"), help="format of pairs and clusters")
    parser.add_argument("--sheet", type=int, default=60, help="clusters on the contact sheet")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read pictures")
    args = parser.parse_args(with_home(argv))
    try:
        counts = run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(counts, indent=1))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Hashes, joins and writes; returns the counts. Raises UserError."""
    if not args.input.exists():
        raise UserError(f"{args.input}: no such folder or file")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out={args.out} is a file; name a folder")
    if args.workers < 1 or args.sheet < 0:
        raise UserError("--workers must be at least 1 and --sheet not negative")
    known = hash_index.load_index(args.index) if args.index else {}
    listing = list_pictures(args.input) if args.input.is_dir() else None
    if listing and listing.pictures:
        print(listing.sentence(), file=sys.stderr, flush=True)
    pictures, read = measure_new(items_of(args.input), known, args.workers)
    if not pictures:
        raise UserError(f"no pictures in {listing.sentence() if listing else args.input}")
    usable = {key: item for key, item in pictures.items() if item["status"] == "ok"}
    keys, measured = list(usable), list(usable.values())
    ranks = rank(keys, measured)
    join = dataclasses.replace(DEFAULT_JOIN, k=args.distance)
    labels, _, joined = cluster(measured, ranks, join)
    best, size = representatives(labels, ranks)
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out / f"pairs.{args.table}", PAIR_COLUMNS, pair_rows(keys, measured, best))
    write_rows(args.out / f"clusters.{args.table}", CLUSTER_COLUMNS, cluster_rows(pictures, keys, best, size))
    write_sheet(args, keys, measured, best, size)
    hash_index.save(args.out / "index.npz", pictures)
    counts = {
        "pictures": len(pictures),
        "read_now": read,
        "passed_over": listing.not_pictures() if listing else {},
        "unreadable": dict(Counter(item["status"] for item in pictures.values() if item["status"] != "ok")),
        "clusters_of_several": int((size[best == np.arange(len(best))] > 1).sum()),
        "duplicates": int((best != np.arange(len(best))).sum()),
        "largest_cluster": int(size.max(initial=0)),
        "join": dict(joined),
    }
    write_text(args.out / "counts.json", json.dumps(counts, indent=1))
    return counts


def rank(keys: Sequence[str], measured: Sequence[dict[str, Any]]) -> np.ndarray:
    """The order of preference, see the module's docstring: int64 (n,), the best is the smallest."""
    names = np.empty(len(keys), np.int64)
    names[np.argsort(np.array(keys, str))] = np.arange(len(keys))
    bordered = np.array([any(kind == "trimmed" for kind, _, _ in item["probes"]) for item in measured], bool)
    pixels = np.array([item["width"] * item["height"] for item in measured], np.int64)
    return total_order(bordered, -pixels, -np.array([item["bytes"] for item in measured], np.int64), names)


PAIR_COLUMNS = ("representative", "duplicate", "d64", "d256", "equal_bytes")
CLUSTER_COLUMNS = ("key", "status", "representative", "size", "is_representative", "width", "height", "bytes")


def pair_rows(keys: Sequence[str], measured: Sequence[dict[str, Any]], best: np.ndarray) -> Iterator[tuple]:
    """Each duplicate with the representative of its cluster."""
    views = Views.of(hash_rows(range(len(keys)), measured), len(keys))
    others = np.flatnonzero(best != np.arange(len(best)))
    others = others[np.argsort(best[others], kind="stable")]
    for members in np.split(others, np.flatnonzero(np.diff(best[others])) + 1) if len(others) else []:
        first = int(best[members[0]])
        d64, d256 = views.distances(first, members)
        for member, short, long in zip(members.tolist(), d64.tolist(), d256.tolist(), strict=True):
            equal = measured[member]["image_id"] == measured[first]["image_id"]
            yield keys[first], keys[member], short, long, equal


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
    """Writes csv or parquet, by the suffix. Raises UserError where pyarrow is missing."""
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
        listed = list(rows)
        with replacing(path) as temporary:
            pq.write_table(pa.table({name: [row[i] for row in listed] for i, name in enumerate(columns)}), temporary)


def write_sheet(
    args: argparse.Namespace,
    keys: Sequence[str],
    measured: Sequence[dict[str, Any]],
    best: np.ndarray,
    size: np.ndarray,
) -> None:
    """The contact sheet: clusters drawn by a hash of their representative's key, largest first."""
    firsts = np.flatnonzero((best == np.arange(len(best))) & (size > 1)).tolist()
    drawn = sorted(firsts, key=lambda i: hashlib.blake2b(keys[i].encode(errors="surrogateescape")).digest())
    drawn = sorted(drawn[: args.sheet], key=lambda i: (-size[i], keys[i]))
    members = {first: [first] + [i for i in np.flatnonzero(best == first).tolist() if i != first] for first in drawn}
    wanted = {keys[i] for group in members.values() for i in group[:SHOWN]}
    thumbnails = {}
    for key, _, where in items_of(args.input):
        if key in wanted:
            data = bytes_at(where)
            thumbnails[key] = thumbnail(data, FIGURE_SIDE)
    groups = []
    for group in members.values():
        heading = f"{len(group)} pictures" + (f", {SHOWN} shown" if len(group) > SHOWN else "")
        captions = [f"{keys[i]} ({measured[i]['width']} x {measured[i]['height']})" for i in group[:SHOWN]]
        groups.append(
            (heading, [(thumbnails.get(keys[i], ""), text) for i, text in zip(group, captions, strict=False)])
        )
    note = (
        f"{len(drawn)} of {len(firsts)} clusters, drawn by a hash of the representative's name. The representative is "
        "first and outlined. Pictures of an earlier run are shown by name if they are not in the input."
    )
    write_text(args.out / "contact_sheet.html", contact_sheet("Near-duplicates", note, groups))


def bytes_at(where: bytes | Path) -> bytes:
    """The bytes of a picture; b'' if its file has gone."""
    try:
        return where.read_bytes() if isinstance(where, Path) else where
    except OSError:
        return b""


if __name__ == "__main__":
    enter(main)
