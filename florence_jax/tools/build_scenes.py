"""Writes the composed scenes as COCO's annotations and pictures, for other programs, or to look at.

    python -m florence_jax.tools.build_scenes --out=scenes

Training needs no files: `--config.data.train=scenes:train` composes the same scenes when they are asked for, see
`florence_jax.data.sources.scenes`. Each split is a folder, OUT/SPLIT, of pictures and annotations.json, which is data
for `--config.data.train` as it is. Boxes bound what can be seen of an object; "area" counts its visible pixels, a crowd
("iscrowd") is one box, some pictures have none, and category ids leave numbers out, as COCO's do. The same options
write the same bytes on any machine with the same backgrounds.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from tqdm import tqdm

from florence_jax.command_line import enter, exit_code
from florence_jax.data.coco_folder import CocoFolder, claim_folder
from florence_jax.data.sources.backgrounds import BACKGROUNDS, choose_backgrounds
from florence_jax.data.sources.scenes import SCENE_CLASSES, SCENE_SIDE, SCENE_SPLITS, Scenes
from florence_jax.errors import UserError
from florence_jax.files import with_home

SCENES_FILE = "scenes.json"  # of what a folder holds, in it
WRITTEN = {"train": 2000, "held_out": 200, "new_style": 200, "new_names": 200}  # scenes, unless the options say others


def build_scenes(out: Path, sources: Mapping[str, Scenes]) -> None:
    """Writes each source as the folder of that name in `out`.

    Raises:
      UserError: if `out` holds anything else than these scenes.
    """
    claim_folder(out, SCENES_FILE, {split: source.name for split, source in sources.items()})
    # Whoever passes the pictures on passes this on too.
    shutil.copyfile(str(files("florence_jax.data") / "emoji/licenses/NOTICE.txt"), out / "NOTICE.txt")
    with tqdm(total=sum(map(len, sources.values())), unit=" scenes", disable=None) as bar:
        for split, source in sources.items():
            folder = CocoFolder(out / split, source.class_names, source.category_ids, source.summary["says"])
            for index in range(len(source)):
                record = source[index]
                folder.add(f"{record['key']}.png", record["image"], record)
                bar.update()
            folder.finish()


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
        counts = {split: WRITTEN[split] if count is None else count for split, count in given.items()}
        if args.classes != "groups" and given["new_names"] is None:
            counts["new_names"] = 0  # which are other names
        end = f"{args.classes}:{args.side}:{choose_backgrounds(args.backgrounds)}"
        sources = {split: Scenes(f"scenes:{split}:{count}:{end}") for split, count in counts.items() if count}
        if not sources:
            raise UserError("no scenes to write: give a count above 0")
        build_scenes(args.out, sources)
        for split, source in sources.items():
            print(f"{args.out / split}: {source.summary['says']}")

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
