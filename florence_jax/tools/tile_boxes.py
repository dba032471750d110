"""Cuts large pictures with boxes into tiles, a data set of its own: for aerial photographs, scans, microscopes.

    python -m florence_jax.tools.tile_boxes --data=my_folder --out=my_tiles --side=400

DATA is what `--config.data.train` takes: a folder with boxes, coco:, voc: or boxes:. OUT gets the tiles and
annotations.json in COCO's form, and is such a folder itself. Tiles of a picture are spread evenly over it and overlap;
a smaller picture is one tile. A box is cut at the tile's edge; where less than --visible of its area is left it is
marked "iscrowd": neither an object nor background, in training and in scoring.
"""

import argparse
import collections
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from florence_jax.boxes import box_areas
from florence_jax.command_line import enter, exit_code
from florence_jax.data.box_classes import class_sets_of, judged_classes
from florence_jax.data.coco_folder import CocoFolder, claim_folder
from florence_jax.data.records import BadRecord, Record
from florence_jax.data.sources.boxes import BoxSource
from florence_jax.data.sources.detection import open_boxes
from florence_jax.errors import UserError
from florence_jax.files import with_home
from florence_jax.pictures import upright_rgb

TILES_FILE = "tiles.json"  # of what a folder holds, in it


def tile_starts(length: int, side: int, overlap: float) -> list[int]:
    """First pixels of tiles along a length: spread evenly from edge to edge, overlapping by at least that share."""
    if length <= side:
        return [0]
    steps = -(-(length - side) // max(1, int(side * (1 - overlap))))
    return [(length - side) * step // steps for step in range(steps + 1)]


def cut_boxes(record: Record, left: int, top: int, size: tuple[int, int], visible: float) -> Record:
    """The boxes of a tile (height, width), in its pixels; see the module for those at its edge."""
    boxes = np.asarray(record["boxes"], np.float32) - np.array([left, top, left, top], np.float32)
    inside = boxes.clip(0, np.array([size[1], size[0]] * 2, np.float32))
    share = box_areas(inside) / np.maximum(box_areas(boxes), 1e-6)
    there = share > 0
    return {
        "boxes": inside[there],
        "class_ids": record["class_ids"][there],
        "iscrowd": (record["iscrowd"] | record["is_group_of"] | (share < visible))[there],
        "is_group_of": np.zeros(int(there.sum()), bool),
        "areas": (record["areas"] * share)[there],
    }


def picture_tiles(
    record: Record, side: int, overlap: float, visible: float
) -> Iterator[tuple[str, np.ndarray, Record]]:
    """Name, pixels and boxes of each tile of a record."""
    picture = np.asarray(upright_rgb(record["image"]))
    stem = re.sub(r"[^\w.-]+", "_", str(record["key"]))
    height, width = picture.shape[:2]
    for top in tile_starts(height, side, overlap):
        for left in tile_starts(width, side, overlap):
            tile = picture[top : top + side, left : left + side]
            yield f"{stem}_{top}_{left}.png", tile, cut_boxes(record, left, top, tile.shape[:2], visible)


def tile_source(source: BoxSource, out: Path, side: int, overlap: float, visible: float) -> collections.Counter:
    """Writes the tiles of a source; returns counts of "pictures", "tiles", "objects", "cut", boxes marked, "skipped".

    Raises:
      UserError: if `out` holds anything else.
    """
    settings = {"data": source.name, "side": side, "overlap": overlap, "visible": visible}
    claim_folder(out, TILES_FILE, settings)
    what = f"tiles of {side} pixels of {source.name}"
    folder = CocoFolder(out / "tiles", source.class_names, source.category_ids, what)
    counts: collections.Counter = collections.Counter()
    known = class_sets_of(source)
    for index in tqdm(range(len(source)), unit=" pictures", disable=None):
        try:
            record = source[index]
        except BadRecord as bad:
            counts["skipped"] += 1
            print(f"left out: {bad}", flush=True)
            continue
        counts["pictures"] += 1
        for name, tile, boxes in picture_tiles(record, side, overlap, visible):
            folder.add(name, tile, boxes if known.all() else boxes | _lists(record, boxes, known))
            counts["tiles"] += 1
            counts["objects"] += int((~boxes["iscrowd"]).sum())
            counts["cut"] += int(boxes["iscrowd"].sum())
    folder.finish()
    return counts


def _lists(record: Record, boxes: Record, class_sets: np.ndarray) -> Record:
    """Which classes are not in a tile, and of which not all objects have boxes, as far as people looked for them."""
    absent = judged_classes(record, class_sets)
    absent[boxes["class_ids"]] = False
    return {"negative_ids": np.flatnonzero(absent), "not_exhaustive_ids": record["not_exhaustive_ids"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a user's mistake."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", required=True, help="pictures with boxes")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a new one, or one of these tiles")
    parser.add_argument("--side", type=int, default=400, help="pixels of a tile")
    parser.add_argument(
        "--overlap", type=float, default=0.1, help="share of a tile that the next one has too, at least"
    )
    parser.add_argument("--visible", type=float, default=0.5, help="share of a box from which on it is an object")

    def work() -> None:
        args = parser.parse_args(with_home(argv))
        if args.side < 32 or not 0 <= args.overlap <= 0.9 or not 0 < args.visible <= 1:
            raise UserError("--side is of at least 32 pixels, --overlap of 0 to 0.9, --visible above 0 and at most 1")
        source = open_boxes(args.data)
        counts = tile_source(source, args.out, args.side, args.overlap, args.visible)
        print(
            f"{args.out}: {counts['tiles']:,} tiles of {counts['pictures']:,} pictures, {counts['objects']:,} boxes, "
            f"{counts['cut']:,} regions that are neither object nor background; {counts['skipped']:,} pictures left out"
        )

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
