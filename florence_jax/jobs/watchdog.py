"""Reports a step that takes far too long, with what every thread is doing."""

import faulthandler
import sys
import threading
import time

import jax


class Watchdog:
    """Watches, from a thread of its own, the time since `step` was last called; once for each stalled step it writes a
    line and the stack of every thread on stderr. The run goes on.

    Args:
      seconds: allowed for one step; 0 watches nothing.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._watched: tuple[int, float] | None = None  # the step and when it began
        self._closed = threading.Event()
        if seconds > 0:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def step(self, step: int) -> None:
        """`step` begins."""
        self._watched = (step, time.monotonic())

    def rest(self) -> None:
        """Nothing is watched until the next `step`: evaluation, saving and compilation may take their time."""
        self._watched = None

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def _watch(self) -> None:
        reported = None
        while not self._closed.wait(min(self._seconds / 4, 5.0)):
            watched = self._watched
            if watched is None or watched == reported or time.monotonic() < watched[1] + self._seconds:
                continue
            reported = watched
            print(
                f"watchdog: step {watched[0]} on process {jax.process_index()} has taken more than {self._seconds:g} s "
                "(config.watchdog.seconds); the stacks of all threads:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(file=2, all_threads=True)
