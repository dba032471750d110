"""Writes the composed scenes as COCO's annotations and pictures, for other programs, or to look at.

    python -m florence_jax.tools.build_scenes --out=scenes

Training needs no files: `--config.data.train=scenes:train` composes the same scenes when they are asked for, see
`florence_jax.data.sources.scenes`. Each split is a folder, OUT/SPLIT, of pictures and annotations.json, which is data
for `--config.data.train` as it is. Boxes bound what can be seen of an object; "area" counts its visible pixels, a crowd
("iscrowd") is one box, some pictures have none, and category ids leave numbers out, as COCO's do. The same options
write the same bytes on any machine with the same backgrounds.
"""

import argparse
import json
import os
import shutil
import struct
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from florence_jax.command_line import enter, exit_code
from florence_jax.data.sources.backgrounds import BACKGROUNDS, choose_backgrounds
from florence_jax.data.sources.scenes import SCENE_CLASSES, SCENE_SIDE, SCENE_SPLITS, Scenes
from florence_jax.errors import UserError
from florence_jax.files import read_json, with_home, write_json

SETTINGS = "scenes.json"  # of what a folder holds, in it
WRITTEN = {"train": 2000, "held_out": 200, "new_style": 200, "new_names": 200}
STORED = 65535  # bytes of a block of deflate that is not compressed


def stored_png(picture: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a PNG file that is not compressed: compressors differ, so that their files do."""
    height, width = picture.shape[:2]
    raw = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter: none
    raw[:, 1:] = picture.reshape(height, -1)
    data = raw.tobytes()
    blocks = [data[start : start + STORED] for start in range(0, len(data), STORED)]
    packed = [b"\x78\x01"]
    for block in blocks:
        packed.append(struct.pack("<BHH", block is blocks[-1], len(block), len(block) ^ 0xFFFF) + block)
    packed.append(struct.pack(">I", zlib.adler32(data)))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", b"".join(packed)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_split(source: Scenes, folder: Path, bar: tqdm) -> None:
    """Writes the pictures of a split, and when all are there annotations.json."""
    folder.mkdir(parents=True)
    images, annotations = [], []
    for index in range(len(source)):
        record = source[index]
        name = f"{record['key']}.png"
        (folder / name).write_bytes(stored_png(record["image"]))
        images.append({"id": index, "file_name": name, "width": record["width"], "height": record["height"]})
        columns = (record[field].tolist() for field in ("boxes", "class_ids", "iscrowd", "areas"))
        for (x1, y1, x2, y2), label, crowd, area in zip(*columns, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": source.category_ids[label],
                    "bbox": [int(x1), int(y1), int(x2 - x1), int(y2 - y1)],
                    "area": int(area),
                    "iscrowd": int(crowd),
                }
            )
        bar.update()
    named = zip(source.category_ids, source.class_names, strict=True)
    content = {
        "info": {"description": source.summary["says"]},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in named],
    }
    (folder / "annotations.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


def build_scenes(out: Path, counts: dict[str, int], classes: str, side: int, backgrounds: str) -> dict[str, Any]:
    """Writes the splits with a count above 0, see the module; returns the settings that are in scenes.json.

    Raises:
      UserError: if `out` holds anything else than scenes of these settings, or for settings that make no source.
    """
    backgrounds = choose_backgrounds(backgrounds)
    sources = {
        split: Scenes(f"scenes:{split}:{count}:{classes}:{side}:{backgrounds}")
        for split, count in counts.items()
        if count
    }
    if not sources:
        raise UserError("no scenes to write: give a count above 0")
    settings = {"splits": {split: source.name for split, source in sources.items()}}
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and read_json(out / SETTINGS) != settings:
        raise UserError(f"{out} holds something else than these scenes: give another --out, or delete it")
    write_json(out / SETTINGS, settings)
    # Whoever passes the pictures on passes this on too.
    shutil.copyfile(str(files("florence_jax.data") / "emoji/licenses/NOTICE.txt"), out / "NOTICE.txt")
    with tqdm(total=sum(map(len, sources.values())), unit=" scenes", disable=None) as bar:
        for split, source in sources.items():
            shutil.rmtree(out / split, ignore_errors=True)  # of a run that was stopped
            write_split(source, out / split, bar)
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a user's mistake."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a new one, or one of these scenes")
    for split, count in WRITTEN.items():
        parser.add_argument(f"--{split}", type=int, default=None, help=f"scenes of this split, {count} unless given")
    parser.add_argument("--classes", choices=SCENE_CLASSES, default="groups", help="8 groups, or 20 names")
    parser.add_argument("--side", type=int, default=SCENE_SIDE, help="pixels of the longer side")
    parser.add_argument("--backgrounds", choices=BACKGROUNDS, default="", help="photographs, where they are installed")

    def work() -> None:
        args = parser.parse_args(with_home(argv))
        given = {split: getattr(args, split) for split in SCENE_SPLITS}
        counts = {split: WRITTEN[split] if count is None else max(count, 0) for split, count in given.items()}
        if args.classes != "groups" and given["new_names"] is None:
            counts["new_names"] = 0  # which are other names
        settings = build_scenes(args.out, counts, args.classes, args.side, args.backgrounds)
        for split, name in settings["splits"].items():
            print(f"{os.path.join(args.out, split)}: {name}")

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
