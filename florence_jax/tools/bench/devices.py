"""`bench devices`: what it costs to spread the pretraining step over more devices, at a fixed batch on each.

On simulated CPU devices, which share the same cores, n devices with n times the batch must take longer than one device
with its own. What the cores explain is taken out by comparing with one device on the same cores that does the same
work: the same global batch at once, or --batch pairs n times. For every number of devices, timed in turns:
  `seconds`             of a step of n devices with n times --batch pairs;
  `seconds_one_device`  of the same step, the same pairs, on one device (which also has every core to itself);
  `ratio`               the first over the second. 1 = nothing but the work itself; the rest is communication between
                        devices and waiting for each other. At n = 1 both are the same program: its `ratio` and
                        `ratio_range` are the noise of the measurement;
  `ratio_of_repeats`    `seconds` over n times `seconds_one_device` of n = 1; above 1, spreading costs more than one
                        device takes for the parts one after the other. Null if --counts has no 1.
On real devices, each with its own cores, the ideal is 1 / n; there compare `seconds` with that of n = 1.

The step is the trainer's own, of configs/pretrain.py, on random pairs. With --zero the parameters, gradients and
optimizer state are split over the devices, otherwise replicated.
"""

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from florence_jax.config_files import read_config
from florence_jax.errors import UserError
from florence_jax.models.sizes import VARIANTS
from florence_jax.params.sharding import batch_sharding
from florence_jax.tasks import create_task
from florence_jax.tools.bench import step, timing
from florence_jax.train.loop import Trainer
from florence_jax.train.state import init_state


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench devices`."""
    parser.add_argument("--variant", default="ti", choices=list(VARIANTS), help="row of the variants table")
    parser.add_argument("--batch", type=int, default=16, help="image-text pairs of each device")
    parser.add_argument("--counts", default="1,2,4,8", help="numbers of devices")
    parser.add_argument("--zero", action="store_true", help="split the parameters over the devices")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each; medians are reported")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    counts = [int(count) for count in args.counts.split(",") if count.isdigit()]
    if not counts or min(*counts, args.batch, args.steps) < 1 or len(counts) != args.counts.count(",") + 1:
        raise UserError("--counts takes numbers such as 1,2,4; they, --batch and --steps must be positive")
    devices = take_devices(max(counts))
    steps = {}
    for count in counts:
        steps["many", count] = DeviceStep(args, count, devices[:count])
        steps["one", count] = DeviceStep(args, count, devices[:1])
    times = timing.interleaved(steps, args.steps)
    table = {}
    single = timing.median(times["one", 1]) if 1 in counts else None
    for count in counts:
        many, one = times["many", count], times["one", count]
        table[count] = {
            "seconds": timing.median(many),
            "seconds_one_device": timing.median(one),
            **timing.ratio_report(one, many),
            "ratio_of_repeats": single and timing.round_significant(timing.median(many) / (count * single), 4),
        }
    options = {name: getattr(args, name) for name in ("variant", "batch", "zero", "steps")}
    return {"devices": table} | options | step.device()


def take_devices(count: int) -> list[Any]:
    """`count` devices; simulated where JAX only has the CPU and has not started yet.

    Raises:
      UserError: there are not so many.
    """
    with contextlib.suppress(RuntimeError):  # JAX has started: it keeps the devices it has
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        raise UserError(f"--counts asks for {count} devices; there are {len(devices)}")
    return devices


class DeviceStep:
    """The trainer's step over `devices`, for as many pairs as `count` devices take; each call runs one and waits."""

    def __init__(self, args: argparse.Namespace, count: int, devices: list[Any]):
        config = read_config(f"configs/pretrain.py:variant={args.variant}")
        config.batch_size, config.precision = args.batch * count, "float32"
        if args.zero:
            config.mesh.data, config.mesh.fsdp = 1, len(devices)
        trainer = Trainer(config.lock(), create_task(config), Path(config.workdir), devices)
        ema = config.optim.ema_decay > 0
        make = jax.jit(lambda key: init_state(trainer.task.init(key), trainer.optimizer.transform, ema=ema))
        self._state = jax.device_put(make(jax.random.key(0)), trainer.shardings)
        self._batch = jax.device_put(random_batch(trainer.task.batches[0]), batch_sharding(trainer.mesh))
        self._step = trainer.make_step()

    def __call__(self) -> None:
        """One step."""
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))


def random_batch(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Random pairs, all of different captions."""
    rng = np.random.default_rng(0)
    size, *rest = shapes["label"].shape
    return {
        "image": rng.integers(0, 256, shapes["image"].shape, np.uint8),
        "text": rng.integers(4, 500, shapes["text"].shape, np.int32),
        "text_length": np.full(shapes["text_length"].shape, shapes["text"].shape[-1], np.int32),
        "label": np.tile(np.arange(size, dtype=np.int32)[:, None, None], (1, *rest)),
        "corrupt": np.zeros(size, np.int32),
    }
