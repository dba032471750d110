"""`bench start`: bytes read and seconds from a task's configuration to its first batch, by size of the training set.

Each size is one ArrayRecord file of embedded pictures with captions that all differ. Every process of a run is a child
process of this one, as many at once as the run has; it opens the data of `configs/pretrain.py`, checks it and makes its
rows of the first batch, as a training does before its first step. Imports, the model and its compilation do not depend
on the data and are not counted: the child has made a batch of another small set before.

`bytes_read` is what read calls have returned to a process (rchar of /proc/self/io, so Linux only), from memory or disk
alike; of several processes the most. `file_bytes` is the size of the file, beside it: who walks over the data reads it.
"""

import argparse
import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from florence_jax.config_files import read_config
from florence_jax.data.pipeline import Process, train_stream
from florence_jax.data.sources.array_record import write_array_record
from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import UserError
from florence_jax.tools.bench import timing

COUNTERS = Path("/proc/self/io")
WARM_UP = "emoji:new_names"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench start`."""
    parser.add_argument("--records", default="1000,10000,100000", help="sizes of the training set, comma-separated")
    parser.add_argument("--processes", default="1,2", help="processes of a run, comma-separated")
    parser.add_argument("--batch", type=int, default=64, help="pairs a batch, over all processes")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    sizes, counts = parse_counts("--records", args.records), parse_counts("--processes", args.processes)
    if wrong := [count for count in counts if args.batch < 1 or args.batch % count]:
        raise UserError(f"--batch={args.batch} must be a positive multiple of the {wrong[0]} processes")
    if not COUNTERS.exists():
        raise UserError(f"bench start counts bytes by {COUNTERS}, which this system does not have: run it on Linux")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {size: Path(folder) / f"{size}.array_record" for size in sizes}
        for size, path in paths.items():
            write_pairs(str(path), size)
        for count in counts:
            for size, found in zip(
                sizes, start_processes(list(map(str, paths.values())), count, args.batch), strict=True
            ):
                facts = {"records": size, "file_bytes": paths[size].stat().st_size, "processes": count}
                results.append(facts | {name: max(one[name] for one in found) for name in found[0]})
    return {"batch": args.batch, "results": results} | timing.cpu_hardware()


def parse_counts(option: str, text: str) -> list[int]:
    """'1000,10000' -> [1000, 10000]."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option}={text!r}: write positive numbers, joined by commas")
    return [int(part) for part in parts]


def write_pairs(path: str, count: int) -> None:
    """`count` pairs: the embedded ones over and over, with captions that all differ."""
    source = open_source(WARM_UP)
    records = [source[i] for i in range(len(source))]
    pairs = (records[i % len(records)] | {"key": f"{i}"} for i in range(count))
    write_array_record(path, (pair | {"caption": f"{pair['caption']} {pair['key']}"} for pair in pairs))


def start_processes(paths: Sequence[str], count: int, batch: int) -> list[list[dict[str, Any]]]:
    """What `first_batch` says of each path in each of `count` processes that start together."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(context.Pool(1)) for _ in range(count)]
        found = []
        for path in (WARM_UP, *paths):
            starts = [pool.apply_async(first_batch, (path, (i, count), batch)) for i, pool in enumerate(processes)]
            found.append([start.get() for start in starts])
    return found[1:]


def first_batch(path: str, process: tuple[int, int], batch: int) -> dict[str, Any]:
    """{"bytes_read", "seconds"} until this process has its rows of the first batch of `path`."""
    from florence_jax.tasks import create_task  # here, so that the parent loads no model

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    config = read_config("configs/pretrain.py:variant=ti")
    config.batch_size = batch
    config.data.train = path
    task = create_task(config)
    before, began = bytes_read(), time.perf_counter()
    place = Process(*process)
    with train_stream(task.train_data(), batch_size=batch, seed=config.seed, process=place, prefetch=0) as stream:
        next(stream)
    seconds = timing.round_significant(time.perf_counter() - began, 3)
    return {"bytes_read": bytes_read() - before, "seconds": seconds}


def bytes_read() -> int:
    """What read calls have returned to this process so far."""
    return int(COUNTERS.read_text().split()[1])
