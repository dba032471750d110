"""Writes videos as ArrayRecord files: what training reads fastest from disks and buckets.

    python -m florence_jax.tools.pack_videos --data=my_clips --out=packed --short=256 --workers=8

DATA is a folder with a sub-folder for each class, a table, a list or a public set, see
`florence_jax.data.sources.video.open_videos`; OUT is then data for `--config.data.train=OUT`. With --short larger
frames are made smaller, so that their shorter side is as long, and encoded anew with a key frame every half second and
without sound; all frames stay, at their average rate. Without it the files are taken as they are. Videos of which
nothing can be decoded are left out, counted, and listed in OUT/left_out.csv. Started again, the command goes on with
the files that are not there yet.
"""

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from florence_jax.command_line import enter, exit_code
from florence_jax.data.coco_folder import claim_folder
from florence_jax.data.records import summary_of
from florence_jax.data.sources.video import open_videos
from florence_jax.data.video_containers import VIDEO_INSTALL
from florence_jax.data.video_writer import VIDEO_FORMATS
from florence_jax.errors import UserError, require
from florence_jax.files import csv_bytes, with_home, write_bytes
from florence_jax.tools.pack_videos.shards import Shard, pack_shard

PACK_FILE = "pack.json"  # of what a folder holds, in it
IN_A_FILE = 500  # videos


def pack_videos(data: str, out: Path, short: int | None, kind: str, in_a_file: int, workers: int) -> tuple[int, int]:
    """Writes the files; returns how many videos are in them, and how many were left out.

    Raises:
      UserError: if `out` holds anything else, or no video can be used.
    """
    source = open_videos(data)
    print(summary_of(source).get("says", data), flush=True)
    settings = {"data": data, "videos": len(source), "short": short, "codec": kind, "in_a_file": in_a_file}
    claim_folder(out, PACK_FILE, settings)
    files = math.ceil(len(source) / in_a_file)
    shards = [
        # Every `files`-th video, so that a list in the order of its classes is mixed.
        Shard(
            data, range(number, len(source), files), f"{out}/videos-{number:05}-of-{files:05}.array_record", short, kind
        )
        for number in range(files)
    ]
    packed, left = 0, []
    with tqdm(total=len(source), unit=" videos", disable=None) as bar:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else None
        try:
            results = pool.map(pack_shard, shards) if pool else map(pack_shard, shards)
            for shard, (count, found) in zip(shards, results, strict=True):
                packed, left = packed + count, left + found
                bar.update(len(shard.rows))
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
    write_bytes(out / "left_out.csv", csv_bytes(("key", "reason"), left))
    if not packed:
        raise UserError(
            f"none of the {len(left):,} videos of {data} can be used; the first: {left[0][0]}: {left[0][1]}"
        )
    return packed, len(left)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a user's mistake."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", required=True, help="videos, see above")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a new one, or one of these videos")
    parser.add_argument("--short", type=int, default=None, help="pixels of the shorter side, such as 256")
    parser.add_argument("--codec", choices=VIDEO_FORMATS, default="h264", help="of videos that are made smaller")
    parser.add_argument("--in_a_file", type=int, default=IN_A_FILE, help=f"videos, {IN_A_FILE} unless given")
    parser.add_argument("--workers", type=int, default=1, help="processes")

    def work() -> None:
        args = parser.parse_args(with_home(argv))
        require("av", VIDEO_INSTALL)
        if min(args.in_a_file, args.workers, args.short or 16) < 1 or (args.short or 16) < 16:
            raise UserError("--in_a_file and --workers must be at least 1, --short at least 16")
        packed, left = pack_videos(args.data, args.out, args.short, args.codec, args.in_a_file, args.workers)
        print(
            f"{args.out}: {packed:,} videos" + (f"; {left:,} left out, see {args.out / 'left_out.csv'}" if left else "")
        )

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
