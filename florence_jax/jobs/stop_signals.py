"""Signals that ask a run to stop: what was done so far is saved first."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from florence_jax.errors import EXIT_INTERRUPTED

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run the same command again to go on.
MEANINGS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C", signal.SIGHUP: "SIGHUP: its terminal was closed"}


class StopSignals:
    """Inside a `with` statement SIGTERM, Ctrl-C and SIGHUP only say that the run should stop, see `wanted`.

    One that the process was started to ignore (by nohup, or in the background of a script) stays ignored. A second
    Ctrl-C raises KeyboardInterrupt, for somebody who does not want to wait.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> "StopSignals":
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in MEANINGS:
            if jax.process_count() > 1 and number == signal.SIGTERM:
                continue  # it is JAX's, see `wanted`
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: of a handler that is not Python's
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wanted(self, step: int) -> bool:
        """Whether to save and stop before the step after `step`: the same answer on every process.

        With several processes, JAX takes SIGTERM on any of them and agrees on a step that none has passed.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received is not None

    @property
    def meaning(self) -> str:
        """What stopped the run, for people."""
        return MEANINGS[self._received or signal.SIGTERM]

    @property
    def exit_code(self) -> int:
        """Of the process."""
        return EXIT_INTERRUPTED if self._received == signal.SIGINT else EXIT_PREEMPTED

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or signal.Signals(number)
        if number == signal.SIGHUP:
            self._leave_terminals()
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def _leave_terminals(self) -> None:
        """What is printed from now on goes nowhere: writing to a terminal that is gone is an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def stopped_at_once() -> int:
    """Says that Ctrl-C ended the program outside of training, or a second one in it; returns the exit code."""
    print("\nstopped by Ctrl-C; run the same command to go on from what was saved", file=sys.stderr, flush=True)
    return EXIT_INTERRUPTED
