"""An xprof trace of a few steps: `tensorboard --logdir DIR` with the plugin tensorboard-plugin-profile shows it."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from florence_jax.errors import UserError


class StepTrace:
    """Records steps `first` to `last`, both included, as numbered in metrics.jsonl; every process writes its own file.

    Args:
      folder: receives plugins/profile/TIME/HOST.xplane.pb.
      steps: (first, last), or () for no trace.

    Raises:
      UserError: for anything else.
    """

    def __init__(self, folder: Path, steps: Sequence[int]):
        if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise UserError(f"config.profile.steps={tuple(steps)}: give the first and the last step, such as (10,13)")
        self._folder, self._steps, self._running = folder, tuple(steps), False

    def before(self, step: int) -> None:
        """Called before `step` is dispatched."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, wait: Callable[[], None]) -> None:
        """Called after `step` was dispatched; `wait` returns when the device has finished it."""
        if self._running and step == self._steps[1]:
            wait()
            self.close()

    def close(self) -> None:
        """Writes the trace if one is running, for example where the run ends inside it."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
