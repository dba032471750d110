"""Writes the composed scenes as COCO's annotations and pictures, for other programs, or to look at.

    python -m florence_jax.tools.build_scenes --out=scenes
    python -m florence_jax.tools.build_scenes --out=some --classes=names20 --names=bell,key --train=300 --first=1000

Training needs no files: `--config.data.train=scenes:train` composes the same scenes when they are asked for, see
`florence_jax.data.sources.scenes`. Each split is a folder, OUT/SPLIT, of pictures and annotations.json, which is data
for `--config.data.train` as it is. Boxes bound what can be seen of an object; "area" counts its visible pixels, a crowd
("iscrowd") is one box, some pictures have none, and category ids leave numbers out, as COCO's do. The same options
write the same bytes on any machine with the same backgrounds.

With `--names` the file has these classes only, as a set has of which nobody boxed the others: their things are in the
pictures all the same. `--first` is the number of the first scene: those of two folders are others.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from tqdm import tqdm

from florence_jax.command_line import enter, exit_code
from florence_jax.data.coco_folder import CocoFolder, claim_folder
from florence_jax.data.records import Record
from florence_jax.data.sources.backgrounds import BACKGROUNDS, choose_backgrounds
from florence_jax.data.sources.scenes import SCENE_CLASSES, SCENE_SIDE, SCENE_SPLITS, Scenes
from florence_jax.errors import UserError
from florence_jax.files import with_home

SCENES_FILE = "scenes.json"  # of what a folder holds, in it
WRITTEN = {"train": 2000, "held_out": 200, "new_style": 200, "new_names": 200}  # scenes, unless the options say others


def build_scenes(out: Path, sources: Mapping[str, Scenes], names: Sequence[str] = (), first: int = 0) -> None:
    """Writes each source as the folder of that name in `out`.

    Args:
      out: folder.
      sources: by the names of their splits.
      names: of the classes that are boxed; () for all.
      first: scene of each source, those before it are left out.

    Raises:
      UserError: if `out` holds anything else than these scenes; for a name that is no class of theirs.
    """
    kept = {split: _chosen(source, names) for split, source in sources.items()}
    some = {"names": sorted(names), "first": first} if names or first else {}
    claim_folder(out, SCENES_FILE, {split: source.name for split, source in sources.items()} | some)
    # Whoever passes the pictures on passes this on too.
    shutil.copyfile(str(files("florence_jax.data") / "emoji/licenses/NOTICE.txt"), out / "NOTICE.txt")
    with tqdm(total=sum(len(source) - first for source in sources.values()), unit=" scenes", disable=None) as bar:
        for split, source in sources.items():
            chosen = kept[split]
            ids, texts = ([each[k] for k in chosen] for each in (source.category_ids, source.class_names))
            folder = CocoFolder(out / split, texts, ids, source.summary["says"])
            for index in range(first, len(source)):
                record = _boxed(source[index], chosen)
                folder.add(f"{record['key']}.png", record["image"], record)
                bar.update()
            folder.finish()


def _chosen(source: Scenes, names: Sequence[str]) -> list[int]:
    """The numbers of the classes that are boxed. Raises UserError."""
    if unknown := [name for name in names if name not in source.class_names]:
        raise UserError(f"--names: {unknown[0]!r} is no class of {source.name}: {', '.join(source.class_names)}")
    return [k for k, name in enumerate(source.class_names) if name in names or not names]


def _boxed(record: Record, chosen: Sequence[int]) -> Record:
    """The record with the objects of these classes alone, whose numbers become their places."""
    kept = np.isin(record["class_ids"], chosen)
    fields = {name: record[name][kept] for name in ("boxes", "iscrowd", "is_group_of", "areas")}
    return record | fields | {"class_ids": np.searchsorted(chosen, record["class_ids"][kept]).astype(np.int32)}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a user's mistake."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a new one, or one of these scenes")
    for split, count in WRITTEN.items():
        parser.add_argument(f"--{split}", type=int, default=None, help=f"scenes of this split, {count} unless given")
    parser.add_argument("--classes", choices=SCENE_CLASSES, default="groups", help="8 groups, or 20 names")
    parser.add_argument("--names", default="", help="NAME,NAME,...: only these of the classes have boxes")
    parser.add_argument("--first", type=int, default=0, help="number of the first scene of each split")
    parser.add_argument("--side", type=int, default=SCENE_SIDE, help="pixels of the longer side")
    parser.add_argument("--backgrounds", choices=BACKGROUNDS, default="", help="photographs, where they are installed")

    def work() -> None:
        args = parser.parse_args(with_home(argv))
        given = {split: getattr(args, split) for split in SCENE_SPLITS}
        counts = {split: WRITTEN[split] if count is None else count for split, count in given.items()}
        if args.classes != "groups" and given["new_names"] is None:
            counts["new_names"] = 0  # which are other names
        end = f"{args.classes}:{args.side}:{choose_backgrounds(args.backgrounds)}"
        first, names = args.first, [name.strip() for name in args.names.split(",") if name.strip()]
        if first < 0:
            raise UserError(f"--first={first} must be at least 0")
        sources = {split: Scenes(f"scenes:{split}:{first + count}:{end}") for split, count in counts.items() if count}
        if not sources:
            raise UserError("no scenes to write: give a count above 0")
        build_scenes(args.out, sources, names, first)
        for split, source in sources.items():
            of = f"; {counts[split]:,} of them, from number {first:,}" if first else ""
            of += f"; boxes of {len(names)} of the classes" if names else ""
            print(f"{args.out / split}: {source.summary['says']}{of}")

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
