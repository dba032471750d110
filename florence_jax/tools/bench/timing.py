"""Measuring on a machine that others may be using: interleaved repetitions, and a description of the hardware."""

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SPEED_VARIABLES = ("XLA_FLAGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Calls every function once a round, in turn, so that a slow spell of the machine falls on all of them.

    Args:
      functions: name -> a call that returns only when its work is done.
      rounds: timed rounds. warmup: untimed ones before them (compilation, first touch of memory).

    Returns:
      name -> seconds of each timed round.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for step in range(warmup + rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if step >= warmup:
                times[name].append(time.perf_counter() - began)
    return times


def median(values: list[float]) -> float:
    """The median, to five significant digits (seconds in a report)."""
    return round_significant(statistics.median(values))


def milliseconds(seconds: list[float]) -> float:
    """The median of seconds, in milliseconds, to four significant digits."""
    return round_significant(1e3 * statistics.median(seconds), 4)


def round_significant(value: float, digits: int = 5) -> float:
    """`value` rounded to significant digits, for reports."""
    return float(f"{value:.{digits}g}")


def ratio_report(ours: list[float], other: list[float]) -> dict[str, Any]:
    """How many times longer `other` takes.

    Returns:
      `ratio` of the medians; `ratio_of_best`, of the fastest rounds, which a busy machine disturbs least;
      `ratio_range`, [lowest, highest] of single rounds.
    """
    rounds = [b / a for a, b in zip(ours, other, strict=True)]
    return {
        "ratio": round_significant(statistics.median(other) / statistics.median(ours), 4),
        "ratio_of_best": round_significant(min(other) / min(ours), 4),
        "ratio_range": [round_significant(min(rounds), 4), round_significant(max(rounds), 4)],
    }


def cpu_hardware() -> dict[str, Any]:
    """`cpu` (its name), `cores` (this process may run on), `load` (runnable processes, last minute), `environment`.

    A `load` well above the benchmark's own threads means that something else was running: read ratios, not seconds.
    `environment` holds the variables that are set among those known to change speed.
    """
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "environment": {name: os.environ[name] for name in SPEED_VARIABLES if name in os.environ},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def time_in_turns(functions: Sequence[Callable[[bytes], Any]], items: Sequence[bytes], count: int) -> list[list[float]]:
    """Processor seconds of each function on each of `count` items, one item after the other, in this thread."""
    seconds: list[list[float]] = [[] for _ in functions]
    for item in itertools.islice(itertools.cycle(items), count):
        for function, taken in zip(functions, seconds, strict=True):
            began = time.process_time()
            function(item)
            taken.append(time.process_time() - began)
    return seconds


def time_loop(function: Callable[[bytes], Any], items: Sequence[bytes], count: int) -> tuple[float, float]:
    """(seconds, processor seconds) per item of a bare loop in this thread."""
    wall, cpu = time.perf_counter(), time.process_time()
    for item in itertools.islice(itertools.cycle(items), count):
        function(item)
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count
