"""Writes clips of motions: the embedded drawings, moving before photographs, encoded by a real codec.

    python -m florence_jax.tools.build_clips --out=clips

Each split is a folder with a sub-folder for each of ten motions, data for `--config.data.train=clips/train` as it is,
and a table beside it, such as clips/train.csv, that has a sentence for each clip ("a red fox moves to the left"). The
motions are five pairs of which one is the other in reverse, see `florence_jax.data.sources.motions`. Splits: train;
held_out, with its drawings before photographs not seen in it; new_style, with the same things in another style;
new_names, with other things. The same options write the same bytes, given the same PyAV and the same backgrounds.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from tqdm import tqdm

from florence_jax.command_line import enter, exit_code
from florence_jax.data.coco_folder import claim_folder
from florence_jax.data.sources.backgrounds import BACKGROUNDS, choose_backgrounds
from florence_jax.data.sources.motions import MOTIONS, MotionClips
from florence_jax.data.sources.scenes import SCENE_SPLITS
from florence_jax.data.video_containers import VIDEO_INSTALL
from florence_jax.data.video_writer import VIDEO_FORMATS, encode_video
from florence_jax.errors import UserError, require
from florence_jax.files import csv_bytes, with_home, write_bytes

CLIPS_FILE = "clips.json"  # of what a folder holds, in it
CLIPS_WRITTEN = {"train": 1000, "held_out": 200, "new_style": 200, "new_names": 200}  # unless the options say others
CLIP_SIDE, CLIP_FRAMES, CLIP_RATE = 80, 24, 12  # pixels, frames, frames a second


def build_clips(out: Path, counts: Mapping[str, int], side: int, frames: int, backgrounds: str, codec: str) -> None:
    """Writes as many clips of each split as `counts` says.

    Raises:
      UserError: if `out` holds anything else than these clips.
    """
    import av

    settings = {"counts": dict(counts), "side": side, "frames": frames, "codec": codec, "backgrounds": backgrounds}
    claim_folder(out, CLIPS_FILE, settings | {"av": av.__version__})
    # Whoever passes the clips on passes this on too.
    shutil.copyfile(str(files("florence_jax.data") / "emoji/licenses/NOTICE.txt"), out / "NOTICE.txt")
    with tqdm(total=sum(counts.values()), unit=" clips", disable=None) as bar:
        for split, count in counts.items():
            shutil.rmtree(out / split, ignore_errors=True)  # of a run that was stopped
            for motion in MOTIONS:
                (out / split / motion.replace(" ", "_")).mkdir(parents=True)
            clips, rows = MotionClips(split, side, frames, backgrounds), []
            for index in range(count):
                record = clips[index]
                name = f"{record['label'].replace(' ', '_')}/{record['key']}{VIDEO_FORMATS[codec].suffix}"
                (out / split / name).write_bytes(encode_video(record["frames"], CLIP_RATE, codec, exact=True))
                rows.append((f"{split}/{name}", record["caption"], record["label"]))
                bar.update()
            write_bytes(out / f"{split}.csv", csv_bytes(("file", "caption", "label"), rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a user's mistake."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a new one, or one of these clips")
    for split, count in CLIPS_WRITTEN.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"clips of this split, {count} unless given")
    parser.add_argument("--side", type=int, default=CLIP_SIDE, help="pixels of the square frames")
    parser.add_argument("--frames", type=int, default=CLIP_FRAMES, help=f"of a clip, {CLIP_RATE} a second")
    parser.add_argument("--codec", choices=VIDEO_FORMATS, default="h264")
    parser.add_argument("--backgrounds", choices=BACKGROUNDS, default="", help="photographs, where they are installed")

    def work() -> None:
        args = parser.parse_args(with_home(argv))
        require("av", VIDEO_INSTALL)
        counts = {split: count for split in SCENE_SPLITS if (count := getattr(args, split)) > 0}
        if not counts:
            raise UserError("no clips to write: give a count above 0")
        if not 16 <= args.side <= 2048 or args.side % 2 or not 2 <= args.frames <= 10_000:
            raise UserError("--side must be an even number from 16 to 2048, --frames from 2 to 10000")
        backgrounds = choose_backgrounds(args.backgrounds)
        build_clips(args.out, counts, args.side, args.frames, backgrounds, args.codec)
        for split, count in counts.items():
            says = f"{count:,} clips of {len(MOTIONS)} motions, {args.frames} frames each, on {backgrounds}"
            print(f"{args.out / split}: {says}")

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
