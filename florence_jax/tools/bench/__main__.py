"""Benchmarks: `python -m florence_jax.tools.bench NAME [options]` prints one JSON line on stdout, messages on stderr.

    python -m florence_jax.tools.bench step              # seconds of a training step; beside PyTorch if installed
    python -m florence_jax.tools.bench precision         # a step in float32 beside one with bfloat16 factors
    python -m florence_jax.tools.bench attention         # forms of window attention, by stage of a tower
    python -m florence_jax.tools.bench grad_cache        # a step with the gradient cache beside one without
    python -m florence_jax.tools.bench remat             # memory and time of every recomputation policy
    python -m florence_jax.tools.bench devices           # a step over 1, 2, 4, 8 (simulated) devices, fixed local batch
    python -m florence_jax.tools.bench data              # images a second of the input pipeline; beside bare decoding
    python -m florence_jax.tools.bench boxes             # the same of a detector's input, with boxes
    python -m florence_jax.tools.bench video_data        # frames a second of clips of videos, by codec
    python -m florence_jax.tools.bench video             # the video tower: steps by frames, views, memory of windows
    python -m florence_jax.tools.bench still_clips       # an inflated video tower beside its image tower
    python -m florence_jax.tools.bench detect            # the detector: deformable convolution, steps by size of image
    python -m florence_jax.tools.bench vocabulary        # memory of a detector of 25,190 classes, before and after
    python -m florence_jax.tools.bench vl                # vision and language: the fusion's layers, its training steps
    python -m florence_jax.tools.bench start             # bytes and seconds before the first step, by size of the data
    python -m florence_jax.tools.bench curate            # images a second of curation's hash stage, and its join
    python -m florence_jax.tools.bench curate_memory     # memory of curation's main process by the number of pairs
    python -m florence_jax.tools.bench probe             # a sweep of linear probes, beside scikit-learn
    python -m florence_jax.tools.bench step --help

A benchmark is a module of this folder with `add_arguments(parser)` and `run(args) -> dict`, named in `BENCHMARKS`. Only
the chosen one is imported, so each needs no more packages than it uses.
"""

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Sequence

from florence_jax.command_line import enter, exit_code
from florence_jax.files import with_home
from florence_jax.jobs.host_memory import keep_freed_memory

BENCHMARKS: dict[str, tuple[str, str]] = {
    "step": ("florence_jax.tools.bench.step", "seconds of a training step, compared with PyTorch if installed"),
    "precision": ("florence_jax.tools.bench.precision", "a training step in float32 beside one of bfloat16 factors"),
    "attention": ("florence_jax.tools.bench.attention", "forms of window attention in blocks, by stage of a tower"),
    "grad_cache": ("florence_jax.tools.bench.grad_cache", "time, memory and exactness of the gradient cache"),
    "remat": ("florence_jax.tools.bench.remat", "memory and time of a training step by recomputation policy"),
    "devices": ("florence_jax.tools.bench.devices", "a training step by number of devices, at a fixed batch on each"),
    "data": ("florence_jax.tools.bench.data", "images a second of the input pipeline, compared with bare decoding"),
    "boxes": ("florence_jax.tools.bench.boxes", "images a second of a detector's input, compared with bare decoding"),
    "video_data": ("florence_jax.tools.bench.video_data", "frames a second of clips, compared with bare decoding"),
    "video": ("florence_jax.tools.bench.video", "the video tower: steps by frames, views, memory of its windows"),
    "still_clips": ("florence_jax.tools.bench.still_clips", "an inflated video tower beside its image tower"),
    "detect": ("florence_jax.tools.bench.detect", "the detector: its deformable convolution, steps by size of image"),
    "vocabulary": ("florence_jax.tools.bench.vocabulary", "memory of a detector of many classes, all at once or not"),
    "vl": ("florence_jax.tools.bench.vl", "the fusion of image and text: its layers beside PyTorch's, training steps"),
    "start": ("florence_jax.tools.bench.start", "bytes read and seconds before the first step, by size of the data"),
    "curate": ("florence_jax.tools.bench.curate", "images a second of curation's hash stage, cost of its join"),
    "curate_memory": ("florence_jax.tools.bench.curate_memory", "memory of curation's main process, by pairs"),
    "probe": ("florence_jax.tools.bench.probe", "a sweep of linear probes over C, compared with scikit-learn"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark named first in `argv`; returns the exit code (2 for a user's mistake)."""
    argv = with_home(argv)
    keep_freed_memory()  # as training does
    parser = argparse.ArgumentParser(prog="python -m florence_jax.tools.bench", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="benchmark", required=True)
    chosen = None
    for name, (module, text) in BENCHMARKS.items():
        command = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        if argv[:1] == [name]:
            chosen = importlib.import_module(module)
            chosen.add_arguments(command)

    def work() -> None:
        args = parser.parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the JSON line's alone
            result = chosen.run(args)
        print(json.dumps({"benchmark": args.benchmark, **result}))

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
