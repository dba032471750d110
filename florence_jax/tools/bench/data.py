"""`bench data`: images a second of the whole input pipeline, beside a bare decode loop over the same records.

The pipeline is the training stream of `configs/pretrain.py` as the trainer reads it: read, decode, random resized crop,
flip, colour jitter, caption, label, prompt, tokenize, batch. The bare loop does not even read: for each encoded picture
already in memory, `PIL.Image.open(...).convert('RGB')` into an array, in one thread. All that the pipeline does beyond
this counts against it. The two take turns within one run, and the stream is timed from its second batch on, by a
reader that never pauses.

Several comparisons, because without worker processes the pipeline works in threads, on more than one core:
  `ratio`            images/s by the clock, for each worker process (as a whole where there are none), over the loop's;
  `cpu_ratio`        images per second of processor time over the loop's: what one core achieves, whatever the number of
                     threads and however busy the machine;
  `image_ops_ratio`  the same over a second bare loop that also crops, resizes, flips and jitters: what is left is the
                     price of reading, text, batching and threads.
The last two are null with worker processes, whose processor time is not seen.
  `reduced_gain`     processor time of decoding, crop and resize with every JPEG decoded in full, over the same as it is
                     done: only as large as the crop needs. Medians; picture by picture in turns, in one thread.

An image size WxH makes JPEG pictures (quality 90) from the source's, enlarged on a noisy gradient so that they take
about as many bytes as web pictures: the embedded ones are 64 px wide and decode in a tenth of a millisecond. 'own'
takes the source's images as they are. Of large ones there are fewer: `MOST_PIXELS` in all. With several sizes the first
is reported at the top level, all under `sizes`.
"""

import argparse
import io
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from florence_jax.config_files import read_config
from florence_jax.data.ops.image import Decode
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.ops.registry import Op
from florence_jax.data.pipeline import Stream
from florence_jax.data.sources.array_record import write_array_record
from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import UserError
from florence_jax.tasks.pretrain import Pretrain
from florence_jax.tools.bench import timing
from florence_jax.train.loop import open_stream

Seconds = Sequence[tuple[float, float]]
JPEG_QUALITY = 90
IMAGE_SIZES = "500x375,800x600,2048x1536,own"
MOST_PIXELS = 2e8  # of the pictures made for one size, which are then used again and again
NOISE = 14.0  # grey levels: 500x375 then takes 70 to 80 kB, within the range of ImageNet pictures of that size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench data`."""
    parser.add_argument("--source", default="emoji:train", help="any source that --config.data.train takes")
    parser.add_argument("--image_size", default=IMAGE_SIZES, help="WxH, or 'own' for the source's; comma-separated")
    parser.add_argument("--noise", type=float, default=NOISE, help="grey levels; less for the same size in fewer bytes")
    parser.add_argument("--res", type=int, default=224, help="side of the training image in pixels")
    parser.add_argument("--batch", type=int, default=32, help="images a batch")
    parser.add_argument("--records", type=int, default=256, help="records of the source to use")
    parser.add_argument("--images", type=int, default=512, help="timed images of each contestant in a round")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are reported")
    parser.add_argument("--workers", type=int, default=0, help="worker processes; 0: threads of this one")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    if min(args.res, args.batch, args.records, args.images, args.rounds) < 1:
        raise UserError("--res, --batch, --records, --images and --rounds must be positive")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl's flags
    sizes = {size: parse_size(size) for size in args.image_size.split(",")}
    originals = take_records(args.source, args.records)
    results = {}
    for name, size in sizes.items():
        results[name] = time_pictures(originals if size is None else enlarged(originals, size, args.noise), args)
    names = ("source", "image_size", "noise", "res", "batch", "workers", "images", "rounds")
    options = {name: getattr(args, name) for name in names} | {"records": len(originals)}
    return options | next(iter(results.values())) | {"sizes": results} | timing.cpu_hardware()


def parse_size(text: str) -> tuple[int, int] | None:
    """'500x375' -> (500, 375); 'own' -> None."""
    if text == "own":
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise UserError(f"--image_size={text!r}: write WIDTHxHEIGHT, such as 500x375, or 'own'")
    return int(match[1]), int(match[2])


def take_records(spec: str, count: int) -> list[dict[str, Any]]:
    """Up to `count` records spread evenly over the source: pictures and texts.

    Raises:
      UserError: as `open_source`, and for a record that cannot be read or decoded.
    """
    source, decode = open_source(spec), Decode()
    records = [source[int(i)] for i in np.linspace(0, len(source) - 1, min(count, len(source)))]
    for record in records:
        decode(record, np.random.default_rng(0))
    return [{name: value for name, value in r.items() if isinstance(value, (bytes, str, list))} for r in records]


def enlarged(records: Sequence[dict[str, Any]], size: tuple[int, int], noise: float) -> list[dict[str, Any]]:
    """The records with pictures of `size`, as many of them as `MOST_PIXELS` allows."""
    most = max(1, int(MOST_PIXELS / (size[0] * size[1])))
    made = [enlarge(record, size, i, noise) for i, record in enumerate(records[:most])]
    return [{**record, "image": made[i % most]["image"]} for i, record in enumerate(records)]


def enlarge(record: dict[str, Any], size: tuple[int, int], seed: int, noise: float = NOISE) -> dict[str, Any]:
    """The record with its picture, enlarged and blended into a noisy colour gradient, as a JPEG of `size`."""
    width, height = size
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 255, (2, 2, 3))
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    canvas = (1 - y) * ((1 - x) * corners[0, 0] + x * corners[0, 1]) + y * ((1 - x) * corners[1, 0] + x * corners[1, 1])
    picture = Image.open(io.BytesIO(record["image"])).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    canvas = 0.3 * canvas + 0.7 * np.asarray(picture, np.float64) + rng.normal(0, noise, canvas.shape)
    file = io.BytesIO()
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=JPEG_QUALITY)
    return {**record, "image": file.getvalue()}


def time_pictures(records: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """All contestants on these records, in turns."""
    images = [record["image"] for record in records]
    decode, image_ops, pipeline = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.array_record"
        write_array_record(str(path), records)
        config = make_config(str(path), args)
        task = Pretrain(config)
        augment = make_augment(parse_ops(task.train_ops, {}))
        for _ in range(args.rounds):
            decode.append(timing.time_loop(decode_image, images, args.images))
            image_ops.append(timing.time_loop(augment, images, args.images))
            pipeline.append(time_pipeline(open_stream(config, task, task.train_data()), args))
    crop, whole = timing.time_in_turns(cropping(task.train_ops), images, args.images)
    report = speed_report(decode, image_ops, pipeline, images, args.workers)
    return report | {"reduced_gain": timing.round_significant(float(np.median(whole) / np.median(crop)), 4)}


def speed_report(
    decode: Seconds, image_ops: Seconds, pipeline: Seconds, images: Sequence[bytes], workers: int
) -> dict[str, Any]:
    """The keys of the module's docstring, of seconds and processor seconds an image in each round."""
    decode_wall, decode_cpu = np.median(decode, axis=0)
    image_ops_wall, image_ops_cpu = np.median(image_ops, axis=0)
    pipeline_wall, pipeline_cpu = np.median(pipeline, axis=0)
    report = {
        "decode_images_per_s": 1 / decode_wall,
        "image_ops_images_per_s": 1 / image_ops_wall,
        "pipeline_images_per_s": 1 / pipeline_wall,
        "ratio": decode_wall / pipeline_wall / max(workers, 1),
        "cpu_ratio": None if workers else decode_cpu / pipeline_cpu,
        "image_ops_ratio": None if workers else image_ops_cpu / pipeline_cpu,
        "kilobytes_per_image": sum(map(len, images)) / len(images) / 1000,
    }
    return {name: value and timing.round_significant(value, 4) for name, value in report.items()}


def make_config(path: str, args: argparse.Namespace) -> ConfigDict:
    """The pretraining config on the records of `path`."""
    config = read_config(f"configs/pretrain.py:variant=T,res={args.res}")
    config.batch_size = args.batch
    config.data.train = path
    config.data.workers = args.workers
    return config


def decode_image(data: bytes) -> np.ndarray:
    """Encoded picture -> uint8 (H, W, 3), and nothing else."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def cropping(ops: str) -> tuple[Callable[[bytes], np.ndarray], Callable[[bytes], np.ndarray]]:
    """The first two of the ops, decode and a crop: as they are, and with JPEGs decoded in full."""
    usual, whole = parse_ops(ops, {})[:2], parse_ops(ops, {})[:2]
    decode = whole[0]
    assert isinstance(decode, Decode)  # as in configs/pretrain.py
    decode.gives_unread = False
    return make_augment(usual), make_augment(whole)


def make_augment(ops: Sequence[Op]) -> Callable[[bytes], np.ndarray]:
    """Image ops as a function of the encoded picture."""
    rng = np.random.default_rng(0)

    def augment(data: bytes) -> np.ndarray:
        example = {"key": "", "image": data}
        for op in ops:
            example = op(example, rng)
        return np.asarray(example["image"])

    return augment


def time_pipeline(stream: Stream, args: argparse.Namespace) -> tuple[float, float]:
    """(seconds, processor seconds of this process) per image of the training stream."""
    batches = -(-args.images // args.batch)
    for _ in range(1 + args.workers):
        next(stream)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(stream)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    stream.close()
    return wall / (batches * args.batch), cpu / (batches * args.batch)
