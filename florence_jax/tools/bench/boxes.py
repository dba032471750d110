"""`bench boxes`: images a second of the input pipeline of a detector, beside a bare decode loop over its pictures.

The pipeline is the training stream of `configs/detect.py`: read, decode, flip, large-scale jitter, pad, boxes as
arrays, batch. The bare loops and the meaning of `ratio`, `cpu_ratio` and `image_ops_ratio` are those of `bench data`.

Without --data the pictures are JPEG of --image_size made of the embedded ones, with --boxes random boxes each.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.pipeline import TrainData, train_stream
from florence_jax.data.sources.boxes import BoxSource
from florence_jax.data.sources.detection import open_boxes
from florence_jax.errors import UserError
from florence_jax.files import csv_bytes
from florence_jax.tools.bench import timing
from florence_jax.tools.bench.data import (
    decode_image,
    enlarge,
    make_augment,
    parse_size,
    speed_report,
    take_records,
    time_pipeline,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench boxes`."""
    parser.add_argument("--data", default="", help="a folder with boxes, coco:, voc: or boxes:, as in detect.py")
    parser.add_argument("--image_size", default="640x480", help="WxH of made pictures")
    parser.add_argument("--boxes", type=int, default=10, help="boxes of a made picture")
    parser.add_argument("--bucket", default="256x256", help="WxH of the training image")
    parser.add_argument("--batch", type=int, default=16, help="images a batch")
    parser.add_argument("--records", type=int, default=128, help="made pictures")
    parser.add_argument("--images", type=int, default=256, help="timed images of each contestant in a round")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are reported")
    parser.add_argument("--workers", type=int, default=0, help="worker processes; 0: threads of this one")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring."""
    if min(args.boxes, args.batch, args.records, args.images, args.rounds) < 1:
        raise UserError("--boxes, --batch, --records, --images and --rounds must be positive")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl's flags
    size, bucket = parse_size(args.image_size), parse_size(args.bucket)
    if size is None or bucket is None:
        raise UserError("--image_size and --bucket: write WIDTHxHEIGHT, such as 640x480")
    names = ("data", "image_size", "boxes", "bucket", "batch", "records", "workers", "images", "rounds")
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            _make(Path(folder), size, args)
        report = _time(open_boxes(args.data or folder, "train"), bucket, args)
    return {name: getattr(args, name) for name in names} | report | timing.cpu_hardware()


def _make(folder: Path, size: tuple[int, int], args: argparse.Namespace) -> None:
    """A folder of pictures with boxes.csv."""
    rng, rows = np.random.default_rng(0), []
    originals = take_records("emoji:train", args.records)
    for i in range(args.records):
        (folder / f"{i}.jpg").write_bytes(enlarge(originals[i % len(originals)], size, i)["image"])
        corners = np.sort(rng.uniform(0, size, (args.boxes, 2, 2)), axis=1).reshape(-1, 4).round(1)
        rows += [(f"{i}.jpg", *corner, f"class {k % 5}") for k, corner in enumerate(corners.tolist())]
    (folder / "boxes.csv").write_bytes(csv_bytes(("image", "x1", "y1", "x2", "y2", "name"), rows))


def _time(source: BoxSource, bucket: tuple[int, int], args: argparse.Namespace) -> dict[str, Any]:
    """The contestants, in turns."""
    width, height = bucket
    ops = f"decode|lsj({height}, {width}, low=0.8, high=1.25)|flip(0.5)|pad_image({height}, {width})"
    images = [source[i]["image"] for i in range(min(len(source), args.records))]
    if not all(isinstance(image, bytes) for image in images):
        raise UserError(f"{source.name}: its pictures are made, not decoded; give pictures in files")
    keep = "pad_boxes(100)|keep(image, valid, boxes, class_ids, objects, ignore, boxes_cut)"
    data = TrainData([source], None, f"{ops}|{keep}", {})
    decode, image_ops, pipeline = [], [], []
    augment = make_augment(parse_ops(ops, {}))
    for _ in range(args.rounds):
        decode.append(timing.time_loop(decode_image, images, args.images))
        image_ops.append(timing.time_loop(augment, images, args.images))
        stream = train_stream(data, batch_size=args.batch, seed=0, workers=args.workers)
        pipeline.append(time_pipeline(stream, args))
    return speed_report(decode, image_ops, pipeline, images, args.workers)
