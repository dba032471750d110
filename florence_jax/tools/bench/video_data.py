"""`bench video_data`: frames a second of reading clips of videos, by codec, beside bare loops over PyAV.

Of each video the same random clips are read by four contestants: `op`, the op 'clip' of training; `ops`, that and the
other ops of training; `bare`, the least that a hand-written loop does: open, seek to the key frame before, decode,
convert the frames that are wanted; `sequential`, the same from the start of the file. Frames count that are wanted, not
those that had to be decoded for them. `op_ratio` and `ops_ratio` are processor time of `bare` over that of the other.

Without --videos they are made: a drawing that moves before noise, encoded by each of --codecs.
"""

import argparse
import functools
import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florence_jax.data.frame_numbers import random_clips
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.ops.registry import Op
from florence_jax.data.sources.motions import MotionClips
from florence_jax.data.sources.video import open_clips
from florence_jax.data.video_containers import VIDEO_INSTALL
from florence_jax.data.video_writer import VIDEO_FORMATS, encode_video
from florence_jax.data.videos import open_video
from florence_jax.errors import UserError, require
from florence_jax.tools.bench import timing

MADE_RATE = 25  # frames a second of made videos
Loop = Callable[[bytes, int, np.ndarray], Any]  # of a video, the seed of a clip, and the numbers of its frames


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench video_data`."""
    parser.add_argument("--videos", default="", help="a folder of videos, or one, instead of made ones")
    parser.add_argument("--codecs", default="h264,vp9,mpeg4,ffv1", help=f"of made videos: {', '.join(VIDEO_FORMATS)}")
    parser.add_argument("--side", type=int, default=256, help="pixels of the square frames of made videos")
    parser.add_argument("--length", type=int, default=300, help="frames of a made video")
    parser.add_argument("--key_every", type=int, default=50, help="frames from a key frame of made videos to the next")
    parser.add_argument("--frames", type=int, default=32, help="of a clip")
    parser.add_argument("--interval", type=int, default=2, help="frames from one of a clip to the next")
    parser.add_argument("--clips", type=int, default=8, help="of each video, in a round")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are reported")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring."""
    require("av", VIDEO_INSTALL)
    if min(args.length, args.key_every, args.frames, args.interval, args.clips, args.rounds) < 1 or args.side < 16:
        raise UserError("--side must be at least 16, all other numbers must be positive")
    if unknown := [kind for kind in args.codecs.split(",") if kind not in VIDEO_FORMATS]:
        raise UserError(f"--codecs: {unknown[0]!r} is none of {', '.join(VIDEO_FORMATS)}")
    results = {name: _time(data, args) for name, data in _videos(args).items()}
    names = ("videos", "side", "length", "key_every", "frames", "interval", "clips", "rounds")
    return {name: getattr(args, name) for name in names} | {"results": results} | timing.cpu_hardware()


def _videos(args: argparse.Namespace) -> dict[str, bytes]:
    if args.videos:
        source = open_clips(args.videos)
        return {source[i]["key"]: Path(source[i]["video"]).read_bytes() for i in range(len(source))}
    frames = MotionClips("train", args.side, args.length, "noise")[0]["frames"]
    return {kind: encode_video(frames, MADE_RATE, kind, args.key_every) for kind in args.codecs.split(",")}


def _time(data: bytes, args: argparse.Namespace) -> dict[str, float]:
    """Frames a second of each contestant, and ratios of processor time."""
    with open_video(data) as video:
        count = video.count
    if count < args.frames * args.interval:
        raise UserError(f"a clip spans {args.frames * args.interval} frames, a video has {count}: --frames, --interval")
    # What the op draws.
    drawn = [random_clips(count, 1, args.frames, args.interval, np.random.default_rng(k))[0] for k in range(args.clips)]
    contestants = _contestants(args)
    clocks: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for turn in range(args.rounds + 1):
        for name, loop in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for seed, numbers in enumerate(drawn):
                loop(data, seed, numbers)
            if turn:  # the first is for warming up
                clocks[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    frames = args.frames * args.clips
    rates = {name: round(frames / statistics.median(w for w, _ in found), 1) for name, found in clocks.items()}
    cpu = {name: statistics.median(c for _, c in found) for name, found in clocks.items()}
    return rates | {f"{name}_ratio": round(cpu["bare"] / cpu[name], 3) for name in ("op", "ops")}


def _contestants(args: argparse.Namespace) -> dict[str, Loop]:
    clip, side = f"clip({args.frames}, interval={args.interval})", args.side * 7 // 8
    whole = f"{clip}|rrc({side}, scale=(0.5, 1.0), field=video)|flip(field=video)|keep(video)"
    return {
        "bare": lambda data, seed, numbers: bare_frames(data, numbers, seeks=True),
        "sequential": lambda data, seed, numbers: bare_frames(data, numbers, seeks=False),
        "op": functools.partial(_by_ops, parse_ops(clip, {})),
        "ops": functools.partial(_by_ops, parse_ops(whole, {})),
    }


def _by_ops(ops: Sequence[Op], data: bytes, seed: int, numbers: np.ndarray) -> None:
    example, rng = {"key": "video", "video": data}, np.random.default_rng(seed)
    for op in ops:
        example = op(example, rng)


def bare_frames(data: bytes, numbers: np.ndarray, seeks: bool) -> np.ndarray:
    """Uint8 (T, H, W, 3): frames of a video at a constant rate, their numbers ascending, by a loop over PyAV.

    Args:
      data: of a file.
      numbers: of the frames.
      seeks: whether to begin at the key frame before the first.
    """
    import av

    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        step = 1 / (stream.average_rate * stream.time_base)
        first = stream.start_time or 0
        wanted, found = set(numbers.tolist()), []
        if seeks:
            file.seek(first + round(int(numbers[0]) * step), stream=stream)
        for frame in file.decode(stream):
            if round((frame.pts - first) / step) in wanted:
                found.append(frame.to_ndarray(format="rgb24", threads=1))
                if len(found) == len(numbers):
                    break
    return np.stack(found)
