"""`bench precision`: a training step in float32, and with the factors of its products rounded to bfloat16, in turns.

It is the trainer's own step of `configs/pretrain.py` on its first batch, both precisions from the same parameters in
one process. Each has `seconds` and `processor_seconds` (of all threads) a step, `ratio` and `processor_ratio` say how
many times longer float32 takes. `data_processor_seconds` is what making a batch takes, once the pictures that
`--config.data.cache` keeps are there: `loop_ratio` is `processor_ratio` with that added to both, the ratio of whole
loops where nothing else keeps the cores from working. `losses` are those of the last step of each.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from florence_jax.config_files import read_config
from florence_jax.data.pipeline import to_global
from florence_jax.errors import UserError
from florence_jax.jobs.hardware import multiplies_bfloat16
from florence_jax.models.products import ROUNDED
from florence_jax.models.sizes import VARIANTS
from florence_jax.params.sharding import batch_sharding
from florence_jax.tasks import create_task
from florence_jax.tools.bench import step, timing
from florence_jax.train.loop import Trainer, open_stream

PRECISIONS = ("float32", ROUNDED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench precision`."""
    parser.add_argument("--variant", default="ti", choices=list(VARIANTS), help="row of the variants table")
    parser.add_argument("--batch", type=int, default=0, help="image-text pairs a step; 0: the configuration's")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each; medians are reported")
    parser.add_argument("--batches", type=int, default=60, help="batches made; the second half is timed")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    if min(args.rounds, args.batches) < 2 or args.batch < 0:
        raise UserError("--rounds and --batches must be at least 2, and --batch not negative")
    steps = {precision: PrecisionStep(args, precision) for precision in PRECISIONS}
    times = timing.interleaved(steps, args.rounds)
    results = {
        precision: {
            "seconds": timing.median(times[precision]),
            "processor_seconds": timing.median(steps[precision].processor_seconds[1:]),  # without the warm-up
            "compile_seconds": timing.round_significant(steps[precision].compile_seconds, 3),
            "loss": timing.round_significant(steps[precision].loss),
        }
        for precision in PRECISIONS
    }
    slow, fast = (results[precision]["processor_seconds"] for precision in PRECISIONS)
    data = data_seconds(args)
    return {
        "variant": args.variant,
        "rounds": args.rounds,
        **results,
        **timing.ratio_report(times[ROUNDED], times["float32"]),
        "processor_ratio": timing.round_significant(slow / fast, 4),
        "data_processor_seconds": timing.round_significant(data),
        "loop_ratio": timing.round_significant((slow + data) / (fast + data), 4),
        "processor_multiplies_bfloat16": multiplies_bfloat16(),
        **step.device(),
    }


class PrecisionStep:
    """The trainer's step of one precision; each call runs one and waits.

    Attributes:
      processor_seconds: of each call so far, of all threads. compile_seconds: before the first. loss: of the last call.
    """

    def __init__(self, args: argparse.Namespace, precision: str):
        trainer = make_trainer(args, precision)
        with open_stream(trainer.config, trainer.task, trainer.task.train_data()) as stream:
            self._batch = to_global(next(stream), batch_sharding(trainer.mesh))
        self._state = trainer.initial_state()
        began = time.perf_counter()
        self._step = trainer.make_step().lower(self._state, self._batch).compile()
        self.compile_seconds = time.perf_counter() - began
        self.processor_seconds: list[float] = []
        self.loss = 0.0

    def __call__(self) -> None:
        """One step."""
        began = time.process_time()
        self._state, metrics = jax.block_until_ready(self._step(self._state, self._batch))
        self.processor_seconds.append(time.process_time() - began)
        self.loss = float(metrics["loss"])


def make_trainer(args: argparse.Namespace, precision: str) -> Trainer:
    """Of the pretraining configuration, in one precision."""
    config = read_config(f"configs/pretrain.py:variant={args.variant}")
    config.precision = precision
    config.batch_size = args.batch or config.batch_size
    return Trainer(config.lock(), create_task(config), Path(config.workdir))


def data_seconds(args: argparse.Namespace) -> float:
    """Processor seconds to make a batch, the median of the second half of `--batches`."""
    trainer = make_trainer(args, "float32")
    made = []
    with open_stream(trainer.config, trainer.task, trainer.task.train_data()) as stream:
        for _ in range(args.batches):
            before = stream.processor_seconds
            next(stream)
            made.append(stream.processor_seconds - before)
    return statistics.median(made[args.batches // 2 :])
