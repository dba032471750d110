"""The one training loop: evaluate, save, next batch, step, in that order, for every task."""

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from florence_jax.data.pipeline import to_global
from florence_jax.errors import UserError
from florence_jax.evaluators.base import chance_levels, evaluate
from florence_jax.jobs.hosts import EXIT_LOST, meet
from florence_jax.jobs.trace import StepTrace
from florence_jax.jobs.watchdog import Watchdog
from florence_jax.params.checkpoint import Checkpoints, UnreadableCheckpoint
from florence_jax.params.sharding import batch_sharding, make_mesh, param_shardings, state_shardings
from florence_jax.params.weights import load_optimizer, write_description
from florence_jax.tasks.base import Task
from florence_jax.train.metrics import MetricsWriter, Progress, Speedometer, finite, read_metrics
from florence_jax.train.optim import make_optimizer
from florence_jax.train.report import results_table, write_report
from florence_jax.train.state import eval_params, init_state
from florence_jax.train.step import make_train_step

NO_EVALUATION = "no evaluation set for this data: give one with --config.eval.source=PATH"
# What one run is of; everything else may change when it is resumed.
IDENTITY = ("task", "protocol", "loss", "init", "data", "data.train", "test", "classes", "label_field")
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run the same command again to go on.


def checkpoint_directory(config: ConfigDict, workdir: Path) -> epath.Path:
    """Where the checkpoints of a run are: `config.checkpoint.directory`, or checkpoints/ in the workdir."""
    return epath.Path(config.checkpoint.directory or workdir / "checkpoints")


def run(config: ConfigDict, task: Task, workdir: Path) -> int:
    """Trains (or resumes, or only evaluates) one run in `workdir`.

    Args:
      config: locked configuration, see `configs/common.py`.
      task: what to train.
      workdir: receives config.json, metrics.jsonl, checkpoints/, tensorboard/, result.json and report.html.

    Returns:
      Exit code: 0 when finished, `EXIT_PREEMPTED` when SIGTERM stopped the run after saving.

    Raises:
      UserError: for anything a user can fix, see the modules called.
    """
    trainer = Trainer(config, task, workdir)
    if config.mode == "eval":
        if trainer.restore_for_evaluation() and trainer.is_main:
            write_config(config, workdir)
        trainer.finish()
        return 0
    if config.mode != "train":
        raise UserError(f"config.mode={config.mode!r} is unknown; choose 'train' or 'eval'")
    return trainer.train()


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes config.json, what the folder's checkpoints and results are of: only once it is known that they will be."""
    partial = workdir / "config.json.partial"
    partial.write_text(json.dumps(config.to_dict(), indent=1, default=str) + "\n")
    partial.replace(workdir / "config.json")


def check_same_run(config: ConfigDict, workdir: Path) -> None:
    """Compares what a run is of (`IDENTITY`) with the config.json of the workdir, whose checkpoints it would resume.

    Raises:
      UserError: for a difference: the old checkpoints would pass for ones of the new data; for an unreadable file.
    """
    try:
        before = json.loads((workdir / "config.json").read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {workdir / 'config.json'}, which says what the run there is of: {error}; choose another "
            "--workdir, or remove that file to resume with this configuration"
        ) from error
    for name in IDENTITY:
        old, new = _text_at(before, name), _text_at(config.to_dict(), name)
        if old is not None and old != new:
            raise UserError(
                f"{workdir} holds a run with config.{name}={old!r}, which would be resumed with {new!r}: choose "
                f"another --workdir (to start from its weights, --config.init={checkpoint_directory(config, workdir)})"
            )


def _text_at(config: Mapping[str, Any], name: str) -> str | None:
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None


def _is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is to be done after `step`."""
    return every > 0 and step % every == 0


def _check_intervals(config: ConfigDict) -> None:
    for name, key in (("checkpoint", "every"), ("checkpoint", "keep_every"), ("log", "every")):
        if config[name][key] < 0:
            raise UserError(f"config.{name}.{key}={config[name][key]} must be a number of steps, or 0 for none")
    if config.checkpoint.keep < 1:
        raise UserError(
            f"config.checkpoint.keep={config.checkpoint.keep} must be at least 1: the newest is resumed from"
        )


class Trainer:
    """State and files of one run; `run` is the entry point.

    `target` has the shapes, dtypes and shardings of the train state. `devices`: default all; making a Trainer touches
    neither them nor the workdir.
    """

    def __init__(self, config: ConfigDict, task: Task, workdir: Path, devices: list[Any] | None = None):
        self.config, self.task, self.workdir = config, task, workdir
        self.directory = checkpoint_directory(config, workdir)
        sizes = config.mesh
        self.mesh = make_mesh(sizes.data, sizes.fsdp, devices, fsdp_across_slices=sizes.fsdp_across_slices)
        if config.batch_size % self.mesh.size:
            raise UserError(f"config.batch_size={config.batch_size} does not divide by the {self.mesh.size} devices")
        _check_intervals(config)
        self.is_main = jax.process_index() == 0
        abstract = jax.eval_shape(task.init, jax.random.key(config.seed))
        self.optimizer, self.schedule = make_optimizer(config.optim, config.total_steps, abstract)
        self._params_sharding = param_shardings(abstract, self.mesh)
        shapes = jax.eval_shape(self._fresh_state, jax.random.key(config.seed))
        self.shardings = state_shardings(shapes, self._params_sharding, self.mesh)
        self.target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self.shardings
        )
        self.state: dict[str, Any] = {}
        self._evaluators: Any = None
        self._stop = threading.Event()
        self._trace = StepTrace(workdir / "profile", config.profile.steps)
        self._batch_sharding = batch_sharding(self.mesh)

    def _fresh_state(self, key: jax.Array) -> dict[str, Any]:
        return init_state(self.task.init(key), self.optimizer, ema=self.config.optim.ema_decay > 0)

    # -- starting ---------------------------------------------------------------------------------------------------

    def restore_for_evaluation(self) -> bool:
        """Loads only the parameters to evaluate: of the newest checkpoint, or of `config.init` where there is none.

        Returns:
          Whether they are of `config.init`.
        """
        part = "ema" if self.config.optim.ema_decay > 0 else "params"
        if self.config.init and not self.directory.exists():
            fresh = jax.jit(self.task.init, out_shardings=self._params_sharding)(jax.random.key(self.config.seed))
            self.state = {"step": jnp.zeros((), jnp.int32), "params": self.task.start(fresh)}
            return True
        checkpoints = Checkpoints(str(self.directory), read_only=True)
        self.state = checkpoints.restore({"step": self.target["step"], part: self.target[part]})
        checkpoints.close()
        return False

    def _start(self, checkpoints: Checkpoints) -> int:
        """Restores the newest checkpoint, or makes a fresh state; returns the step to continue from."""
        while (step := checkpoints.latest_step()) is not None:
            if self.is_main:
                check_same_run(self.config, self.workdir)
            try:
                self.state = checkpoints.restore(self.target, step)
            except UnreadableCheckpoint as error:
                aside = checkpoints.set_aside(step)
                print(f"warning: {error}; renamed to {aside}, the one before it is used", file=sys.stderr, flush=True)
                if jax.process_count() > 1:  # which of the others could read it is not known: all start again
                    sys.exit(EXIT_LOST)
                continue
            self._say(f"resuming {self.workdir} at step {step} of {self.config.total_steps}")
            return step
        self.state = self._initial_state()
        if self.is_main:
            write_description(str(self.directory), self.task.description)
        return 0

    def _initial_state(self) -> dict[str, Any]:
        """The state of step 0, with the parameters of `config.init` where that is given."""
        make = jax.jit(self._fresh_state, out_shardings=self.shardings)
        state = make(jax.random.key(self.config.seed))
        if self.config.init:
            state["params"] = self.task.start(state["params"])
            if self.config.init_optimizer:
                state["opt_state"] = load_optimizer(self.config.init, state["opt_state"])
            if "ema" in state:
                state["ema"] = jax.tree.map(jnp.copy, state["params"])
        return state

    # -- training ---------------------------------------------------------------------------------------------------

    def train(self) -> int:
        """Runs to `total_steps`; see `run`."""
        config = self.config
        checkpoints = Checkpoints(
            str(self.directory), keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every
        )
        start = self._start(checkpoints)
        if start >= config.total_steps:
            checkpoints.close()
            self._say(
                f"{self.workdir} is finished: step {start} of {config.total_steps}, results in "
                f"{self.workdir}/result.json. Choose another --workdir, or a larger --config.total_steps"
            )
            if not self._has_result():  # ended while it was evaluated
                self.finish()
            return 0
        self._evaluators = self.task.evaluators(self.mesh)  # now, so that their mistakes cost no training
        if self.is_main:
            write_config(config, self.workdir)
        self._describe()
        writer = MetricsWriter(self.workdir, resume_step=start, write=self.is_main)
        alone = jax.process_count() == 1  # else SIGTERM is JAX's, see `_stops`
        handler = signal.signal(signal.SIGTERM, self._on_sigterm) if alone else None
        try:
            finished = self._steps(start, writer, checkpoints)
            checkpoints.close()
        finally:
            if alone:
                signal.signal(signal.SIGTERM, handler)
            writer.close()
        if not finished:
            self._say(f"stopped by SIGTERM at step {int(self.state['step'])}, saved; run the same command to go on")
            return EXIT_PREEMPTED
        self.finish()
        return 0

    def _has_result(self) -> bool:
        """Whether process 0, which writes it, has a result.json: the same answer on every process."""
        found = np.int32((self.workdir / "result.json").exists())
        return bool(multihost_utils.broadcast_one_to_all(found))

    def make_step(self) -> Callable[..., Any]:
        """The jitted train step; see `step.make_train_step`."""
        return make_train_step(
            self.task,
            self.optimizer,
            self.schedule,
            seed=self.config.seed,
            ema_decay=self.config.optim.ema_decay,
            mesh=self.mesh,
            shardings=self.shardings,
        )

    def _steps(self, start: int, writer: MetricsWriter, checkpoints: Checkpoints) -> bool:
        """The loop proper; True when it reached the end, False when it was asked to stop."""
        config, total = self.config, self.config.total_steps
        train_step = self.make_step()
        stream = self.task.train_stream(start)
        speed = Speedometer(config.batch_size, self.task.flops_per_example)
        progress = Progress(total, start, show=self.is_main)
        late = LateMetrics(config.log.every, writer, speed, progress)
        watchdog = Watchdog(config.watchdog.seconds)
        with contextlib.ExitStack() as stack:
            for user in (stream, progress, watchdog, self._trace):
                stack.callback(user.close)
            for step in range(start, total + 1):
                stop = self._stops(step)
                evaluates = _is_due(step, config.eval.every) and start < step < total
                saves = step > start and (stop or step == total or _is_due(step, config.checkpoint.every))
                if evaluates or saves or stop:
                    late.drain()
                    watchdog.rest()
                began = time.perf_counter()  # after draining, which may start a new reading of the speed
                if evaluates:
                    writer.write(step, self._evaluate())
                if saves:
                    checkpoints.save(step, self.state)
                speed.pause(time.perf_counter() - began)
                if stop or step == total:
                    break
                if step > start:  # the first step compiles
                    watchdog.step(step + 1)
                self._trace.before(step + 1)
                began = time.perf_counter()
                batch = to_global(next(stream), self._batch_sharding)
                speed.step(time.perf_counter() - began)
                if step == start:
                    train_step = train_step.lower(self.state, batch).compile()
                    meet("compiled")
                self.state, metrics = train_step(self.state, batch)
                late.push(step + 1, metrics)
                self._trace.after(step + 1, wait=late.drain)
                progress.step()
        return step == total

    def _stops(self, step: int) -> bool:
        """Whether to save and stop before the step after `step`: the same answer on every process.

        With several processes, JAX takes SIGTERM on any of them and agrees on a step that none has passed.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._stop.is_set()

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self._stop.set()

    # -- evaluating -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, float]:
        if self._evaluators is None:
            self._evaluators = self.task.evaluators(self.mesh)
        return evaluate(self._evaluators, eval_params(self.state))

    def finish(self) -> None:
        """Evaluates the final parameters and writes result.json, report.html and the table on the terminal."""
        results = self._evaluate()
        if not self.is_main:
            return
        step, chance = int(self.state["step"]), chance_levels(self._evaluators)
        print(results_table(results, chance) if results else NO_EVALUATION, flush=True)
        partial = self.workdir / "result.json.partial"
        partial.write_text(json.dumps(finite(results) | {"step": step}, indent=1) + "\n")
        partial.replace(self.workdir / "result.json")
        write_report(
            self.workdir / "report.html",
            title=f"florence_jax {self.config.task}: {self.workdir}" + (f" at step {step}" if step else ""),
            config=self.config.to_dict(),
            history=read_metrics(self.workdir / "metrics.jsonl"),
            results=results,
            chance=chance,
            fragments=[fragment for evaluator in self._evaluators for fragment in evaluator.report()],
        )
        print(f"results in {self.workdir}/result.json, pictures and curves in {self.workdir}/report.html", flush=True)

    def _describe(self) -> None:
        count = sum(x.size for x in jax.tree.leaves(self.target["params"]))
        self._say(
            f"{self.config.task} {self.config.model.variant}: {count / 1e6:.2f} M parameters, "
            f"{self.task.flops_per_example / 1e9:.2f} GFLOP a training example, {self.config.total_steps} steps of "
            f"{self.config.batch_size} on {self.mesh.size} {jax.devices()[0].platform} device(s), "
            f"workdir {self.workdir}"
        )

    def _say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)


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
        if _is_due(step, self._every):
            values = {f"train/{name}": float(value) for name, value in metrics.items()} | self._speed.read()
            self._writer.write(step, values)
            self._progress.log(step, values)
