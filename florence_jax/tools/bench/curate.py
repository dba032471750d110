"""`bench curate`: images a second of the hash stage, and the cost of the near-duplicate join at three billion.

The hash stage is `curation.hashing.measure`: SHA-256, decoding, borders, both hashes of the picture and of its other
views. In turns with it runs a plain loop over the same files, in one thread as well: SHA-256, `Image.open`, the same
reduced decode, a 64 x 64 resize, one cosine transform and the two hashes of the picture alone, with nothing checked.
  `hash_images_per_s_core`  of the stage, by processor time (what one core achieves, however busy the machine);
  `plain_ratio`             the stage's speed over the plain loop's;
  `beam_ratio`              speed of the hash stage in Beam's direct runner, pictures read from tars, over that of the
                            stage alone, pictures in memory, by processor time; null without apache_beam;
  `measure_ratio`           the same of all that the pipeline does with a raw pair before it decides: also the scores of
                            the caption, its language among them, and writing the table;
  `join_core_hours`         of the whole join of 3e9 hashes (k = 4, 15 tables), projected from one block as large as a
                            task gets there (732,000 rows, 1,135 in a bucket on average); `join_found` of the pairs
                            planted in it, `join_planted`.
Pictures are those of `bench data` at 0.2 megapixels.
"""

import argparse
import hashlib
import importlib.util
import io
import itertools
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from florence_jax.curation.dedup.join import HashRows, block_edges, compact, covering_tables
from florence_jax.curation.ingest.hashing import COSINES, DECODE_SIDE, DEFAULT_LIMITS, GRID, hash_bits, measure
from florence_jax.errors import UserError
from florence_jax.tools.bench import timing
from florence_jax.tools.bench.data import enlarge, parse_size, take_records

CORPUS = 3e9  # images
BUCKET = 1135  # rows: 3e9 hashes over the 21.3 bits of a key
PLANTED = 2000  # pairs
SHARD = 256  # pictures in a tar; img2dataset writes 10,000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench curate`."""
    parser.add_argument("--image_size", default="520x390", help="WxH of the pictures made, 0.2 megapixels")
    parser.add_argument("--records", type=int, default=128, help="different pictures")
    parser.add_argument("--images", type=int, default=512, help="timed images of each contestant in a round")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; medians are reported")
    parser.add_argument("--block", type=int, default=732_000, help="rows of the join's block")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    if min(args.records, args.images, args.rounds) < 1 or args.block < 2 * PLANTED:
        raise UserError(f"--records, --images, --rounds must be positive, --block at least {2 * PLANTED}")
    size = parse_size(args.image_size)
    if size is None:
        raise UserError("--image_size: write WIDTHxHEIGHT")
    files = [enlarge(record, size, i)["image"] for i, record in enumerate(take_records("emoji:train", args.records))]
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds + 1):
            times = [timing.time_loop(function, files, args.images)[1] for function in (measure, plain_hash)]
            rounds.append([*times, *beam_seconds(Path(folder) / "shards", files, 2 * args.images)])
    # The first round warms up.
    cpu, plain, beam, measuring = (
        None if times[0] is None else np.median(times[1:]) for times in zip(*rounds, strict=True)
    )
    report = {
        "hash_images_per_s_core": 1 / cpu,
        "plain_images_per_s_core": 1 / plain,
        "plain_ratio": plain / cpu,
        "beam_ratio": beam and cpu / beam,
        "measure_ratio": measuring and cpu / measuring,
        "kilobytes_per_image": sum(map(len, files)) / len(files) / 1000,
        **join_block(args.block),
    }
    options = {name: getattr(args, name) for name in ("image_size", "images", "rounds", "block")}
    rounded = {
        name: timing.round_significant(float(value), 4) if isinstance(value, float) else value
        for name, value in report.items()
    }
    return options | rounded | {"records": len(files)} | timing.cpu_hardware()


def plain_hash(data: bytes) -> tuple[np.ndarray, np.ndarray, bytes]:
    """The yardstick: what a script would do."""
    identity = hashlib.sha256(data).digest()
    image = Image.open(io.BytesIO(data))
    image.draft("L", (DECODE_SIDE, DECODE_SIDE))
    plane = np.asarray(image.convert("L").resize((GRID, GRID), Image.Resampling.BILINEAR)).astype(np.float64)
    rows = COSINES[0]
    return *hash_bits((rows @ plane @ rows.T)[None]), identity


def beam_seconds(folder: Path, files: Sequence[bytes], count: int) -> tuple[float | None, float | None]:
    """Processor seconds per image inside Beam, in this process: of the hash stage, and of all of measuring.

    The start of the runner is not counted: it is the difference between many shards and one that is divided by the
    images. (None, None) without Beam.

    Args:
      folder: for the shards and the parts of the table. files: the pictures. count: images to time.
    """
    if importlib.util.find_spec("apache_beam") is None:
        return None, None
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    from florence_jax.curation.ingest.inputs import ReadPairs, list_splits
    from florence_jax.curation.ingest.measure import MeasureRules, measure_split

    rules = MeasureRules(DEFAULT_LIMITS, (), None, (), "0" * 32)
    options = PipelineOptions(["--runner=FnApiRunner", "--direct_running_mode=in_memory", "--direct_num_workers=1"])
    extra = -(-count // SHARD)
    if not folder.exists():
        write_shards(folder, files, 1 + extra)
    splits = list_splits(str(folder), SHARD)
    hashing: list[float] = []
    measuring: list[float] = []
    for part in (splits[:1], splits):
        began = time.process_time()
        with beam.Pipeline(options=options) as pipeline:
            _ = pipeline | beam.Create(part) | ReadPairs() | beam.Map(lambda pair: measure(pair["image"]))
        hashing.append(time.process_time() - began)
        with tempfile.TemporaryDirectory() as workdir:
            began = time.process_time()
            with beam.Pipeline(options=options) as pipeline:
                _ = pipeline | beam.Create(part) | beam.Reshuffle() | beam.Map(measure_split, workdir, rules)
            measuring.append(time.process_time() - began)
    return tuple((seconds[1] - seconds[0]) / (extra * SHARD) for seconds in (hashing, measuring))


def write_shards(folder: Path, files: Sequence[bytes], shards: int) -> None:
    """WebDataset tars of SHARD pictures each, with captions, the pictures in turn from `files`."""
    folder.mkdir()
    data = itertools.cycle(files)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(SHARD):
                for name, body in ((f"{i:05d}.jpg", next(data)), (f"{i:05d}.txt", b"a picture of something small")):
                    info = tarfile.TarInfo(name)
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))


def join_block(n: int) -> dict[str, Any]:
    """Joins a block of `n` random hashes whose buckets are as full as those of 3e9 hashes."""
    rng = np.random.default_rng(0)
    mask = covering_tables(4)[0]
    h64 = rng.integers(0, 2**64, n, np.uint64)
    values = np.unique(rng.integers(0, 2**64, max(1, n // BUCKET), np.uint64) & mask)
    h64 = h64 & ~mask | values[rng.integers(0, len(values), n)]
    wide = rng.integers(0, 2**64, (n, 4), np.uint64)
    free = np.array([1 << bit for bit in range(64) if not int(mask) >> bit & 1], np.uint64)
    flips = free[np.argsort(rng.random((PLANTED, len(free))), axis=1)[:, :4]]
    h64[1 : 2 * PLANTED : 2] = h64[: 2 * PLANTED : 2] ^ np.bitwise_or.reduce(flips, axis=1)
    wide[1 : 2 * PLANTED : 2] = wide[: 2 * PLANTED : 2]
    began = time.thread_time()
    edges, counts = block_edges(HashRows(np.arange(n), h64, wide, np.zeros(n, bool)), int(mask))
    seconds = time.thread_time() - began
    found = ((edges[:, 0] % 2 == 0) & (edges[:, 1] == edges[:, 0] + 1) & (edges[:, 0] < 2 * PLANTED)).sum()
    per_row = seconds / n * (BUCKET / (n / len(np.unique(compact(h64, int(mask))))))  # work grows with the bucket
    return {
        "join_core_hours": per_row * CORPUS * len(covering_tables(4)) / 3600,
        "join_seconds": seconds,
        "join_comparisons_per_s": counts["comparisons"] / seconds,
        "join_found": int(found),
        "join_planted": PLANTED,
    }
