"""Where a run's numbers go: metrics.jsonl, TensorBoard event files, one log line, a progress bar."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from florence_jax.errors import UserError
from florence_jax.files import write_text
from florence_jax.jobs.hardware import PEAK_FLOPS, available_cores


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics.jsonl; a last line cut off by a crash is left out. Missing file: empty list."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """None in place of numbers that are not finite, such as the ROC AUC of a set with one class: JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class MetricsWriter:
    """Writes `{"step": n, "<split>/<name>": value, ...}` lines and the same scalars as TensorBoard events.

    What is not finite is null in the lines, and no event.

    On construction, lines of steps after `resume_step` are removed: the run is about to write them again. Only the
    process with `write=True` touches files.
    """

    def __init__(self, workdir: Path, *, resume_step: int, write: bool):
        self._file: TextIO | None = None
        self._events: SummaryWriter | None = None
        if not write:
            return
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line; flushed at once so that a killed run loses nothing."""
        if self._file is None or self._events is None:
            return
        self._file.write(json.dumps({"step": step} | finite(values)) + "\n")
        self._file.flush()
        for name, value in values.items():
            if math.isfinite(value):
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes both files."""
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()


class Speedometer:
    """Turns step counts and waits into `perf/...` numbers between two readings.

    Args:
      batch_size: global examples a step.
      flops_per_example: forward + backward, for MFU; reported only where the device's peak is known.
    """

    def __init__(self, batch_size: int, flops_per_example: float):
        self._batch = batch_size
        self._flops = flops_per_example
        self._chips = jax.device_count()
        self._peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        self._cores = available_cores()
        self._begin()

    def _begin(self) -> None:
        self._steps, self._wait, self._making, self._start = 0, 0.0, 0.0, time.perf_counter()

    def step(self, data_wait: float, data_making: float) -> None:
        """Counts one step that waited `data_wait` seconds for its batch, made in `data_making` processor seconds."""
        self._steps += 1
        self._wait += data_wait
        self._making += data_making

    def pause(self, seconds: float) -> None:
        """Takes time spent on evaluation or saving out of the current reading."""
        self._start += seconds

    def read(self) -> dict[str, float]:
        """Means since the last reading: seconds a step, share of it spent waiting for data, share of this process's
        cores that making data takes (from the step, where that runs on them), images/s, MFU; and the most memory that a
        device of this process has used so far, where the backend tells (the CPU does not)."""
        seconds = max(time.perf_counter() - self._start, 1e-9) / max(self._steps, 1)
        rate = self._batch / seconds
        values = {
            "perf/step_seconds": seconds,
            "perf/data_wait_share": self._wait / max(self._steps, 1) / seconds,
            "perf/data_cpu_share": self._making / max(self._steps, 1) / seconds / self._cores,
            "perf/images_per_second": rate,
            "perf/images_per_second_per_chip": rate / self._chips,
        }
        if self._peak:
            values["perf/mfu"] = rate * self._flops / (self._chips * self._peak)
        if (used := peak_memory(jax.local_devices())) is not None:
            values["perf/device_memory_gib"] = used / 2**30
        self._begin()
        return values


def peak_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes of the fullest of `devices` at its fullest so far; None where the backend does not count."""
    stats = [device.memory_stats() for device in devices]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if stat and "peak_bytes_in_use" in stat]
    return max(peaks, default=None)


class Progress:
    """A progress bar when a terminal is attached, else one log line per reading."""

    def __init__(self, total: int, start: int, *, show: bool):
        self._show = show
        self._total = total
        self._bar = tqdm(total=total, initial=start, unit="step", disable=not (show and sys.stderr.isatty()))

    def step(self) -> None:
        """One more step is done."""
        self._bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Shows the loss and the speed."""
        if not self._show:
            return
        seconds = values["perf/step_seconds"]
        text = (
            f"step {step}/{self._total}  loss {values['train/loss']:.3f}  "
            f"{values['perf/images_per_second']:.0f} img/s  {1000 * seconds:.0f} ms/step  "
            f"data wait {100 * values['perf/data_wait_share']:.0f}%, CPU {100 * values['perf/data_cpu_share']:.0f}%"
        )
        if "perf/mfu" in values:
            text += f"  MFU {100 * values['perf/mfu']:.1f}%"
        if self._bar.disable:
            print(f"{text}  ETA {_clock((self._total - step) * seconds)}", flush=True)
        else:
            self._bar.set_postfix_str(text.split("  ", 1)[1])

    def close(self) -> None:
        """Leaves the terminal clean."""
        self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is to be done after `step`."""
    return every > 0 and step % every == 0


class LateMetrics:
    """Reads each step's metrics one step late, so that the device never waits for the host.

    Every step's loss is checked; a non-finite one raises `UserError` naming the step. The values of step n are logged
    when n is a multiple of `every`.
    """

    def __init__(self, every: int, writer: MetricsWriter, speed: Speedometer, progress: Progress):
        self._every, self._writer, self._speed, self._progress = every, writer, speed, progress
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Hands over the metrics of `step` (still being computed) and reads those of the step before."""
        self.drain()
        self._pending = (step, metrics)

    def drain(self) -> None:
        """Reads what is pending; called before anything is saved, so that no checkpoint is ahead of its metrics."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of step {step} is {loss}; nothing after step {step - 1} was saved. Lower "
                "config.optim.learning_rate, set config.optim.clip_norm, or look for bad records in the data"
            )
        if is_due(step, self._every):
            values = {f"train/{name}": float(value) for name, value in metrics.items()} | self._speed.read()
            self._writer.write(step, values)
            self._progress.log(step, values)
