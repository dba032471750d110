"""The one training loop: evaluate, save, next batch, step, in that order, for every task."""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.pipeline import Process, Stream, TrainData, kept_in_memory, to_global, train_stream
from florence_jax.data.records import summary_of, write_data
from florence_jax.data.text_lengths import text_lengths
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator, all_charts, all_files, chance_levels, evaluate
from florence_jax.files import write_bytes
from florence_jax.jobs.hardware import available_cores, worker_count
from florence_jax.jobs.hosts import EXIT_LOST, meet
from florence_jax.jobs.run_lock import only_run
from florence_jax.jobs.stop_signals import StopSignals
from florence_jax.jobs.trace import StepTrace
from florence_jax.jobs.watchdog import Watchdog
from florence_jax.models.products import ROUNDED
from florence_jax.params.checkpoint import Checkpoints, UnreadableCheckpoint
from florence_jax.params.sharding import batch_sharding, make_mesh, param_shardings, state_shardings, with_places
from florence_jax.params.weights import load_optimizer, write_description
from florence_jax.tasks.base import Suite, Task
from florence_jax.train.metrics import (
    LateMetrics,
    MetricsWriter,
    Progress,
    Speedometer,
    finite,
    is_due,
    read_metrics,
)
from florence_jax.train.optim import average_decay, make_optimizer
from florence_jax.train.precision import AUTO, agreed_precision, best_precision
from florence_jax.train.report import results_table, write_report
from florence_jax.train.state import counters, eval_params, eval_part, init_state, keep_best, start_from, take_best
from florence_jax.train.step import make_train_step
from florence_jax.train.workdir import (
    RESULT_FILE,
    add_evaluated,
    check_no_results,
    check_same_results,
    check_same_run,
    checkpoint_directory,
    has_steps,
    make_workdir,
    saved_config,
    write_config,
    write_json_file,
)

NO_EVALUATION = "no evaluation set for this data: give one with --config.eval.source=PATH"


def run(config: ConfigDict, suite: Suite, workdir: Path) -> int:
    """Trains (or resumes, or only evaluates) one run in `workdir`. What is no `Task` is only evaluated.

    Args:
      config: locked configuration, see `train/defaults.py`.
      suite: what to train or evaluate.
      workdir: receives config.json, metrics.jsonl, checkpoints/, tensorboard/, result.json, report.html and the
        evaluators' files; it is made once the data are known to be there.

    Returns:
      Exit code: 0 when finished, that of `StopSignals` when a signal stopped the run after saving.

    Raises:
      UserError: for anything a user can fix, see the modules called.
    """
    if config.mode not in ("train", "eval"):
        raise UserError(f"config.mode={config.mode!r} is unknown; choose 'train' or 'eval'")
    if config.mode == "eval":
        evaluate_only(config, suite, workdir)
        return 0
    if not isinstance(suite, Task):
        raise UserError(
            "nothing is trained here: config.mode must be 'eval', or choose another protocol= of the config"
        )
    return Trainer(config, suite, workdir).train()


def evaluate_only(config: ConfigDict, suite: Suite, workdir: Path) -> None:
    """Evaluates the newest checkpoint of a task in `workdir`; without any, or for another suite, `config.init`.

    Raises:
      UserError: as `run`; also where the workdir holds a run or results of something else.
    """
    directory, is_main = checkpoint_directory(config, workdir), jax.process_index() == 0
    if is_main:
        check_same_results(suite.identity, config, workdir)
    if isinstance(suite, Task) and (directory.exists() or not config.init):
        trainer = Trainer(config, suite, workdir)
        mesh, evaluators = trainer.mesh, suite.evaluators(trainer.mesh)
        trainer.restore_for_evaluation()
        trained, params = counters(trainer.state), eval_params(trainer.state)
        if is_main:
            print(f"evaluating {directory} at step {trained['step']}", flush=True)
            make_workdir(workdir)
        with only_run(workdir):
            if is_main:
                write_data(found_data(suite, evaluators), workdir)
            finish(config, suite, workdir, evaluators, params, trained)
            if is_main:
                add_evaluated(config, workdir)
    else:
        mesh = mesh_of(config)
        evaluators = suite.evaluators(mesh)
        if is_main:
            make_workdir(workdir)
        with only_run(workdir):
            params = suite.load(mesh)
            if is_main:
                write_config(config, suite.identity, workdir)
                write_data(found_data(suite, evaluators), workdir)
            finish(config, suite, workdir, evaluators, params, {"step": 0})


def mesh_of(config: ConfigDict, devices: list[Any] | None = None) -> Mesh:
    """The mesh of `config.mesh` over `devices` (default: all)."""
    sizes = config.mesh
    return make_mesh(sizes.data, sizes.fsdp, devices, fsdp_across_slices=sizes.fsdp_across_slices)


def found_data(suite: Suite, evaluators: Sequence[Evaluator]) -> list[Mapping[str, Any]]:
    """What the sources of a run say that they found; of one that several evaluators share, once."""
    sources = [*suite.sources, *(source for evaluator in evaluators for source in evaluator.sources)]
    return [summary_of(source) for source in {id(source): source for source in sources}.values()]


def open_stream(config: ConfigDict, task: Task, data: TrainData, start_step: int = 0) -> Stream:
    """This process's batches of a task from `start_step` on, the same for any resume, host or worker count."""
    return train_stream(
        data,
        batch_size=task.plan.batch_size,
        seed=config.seed,
        start_step=start_step,
        process=Process(jax.process_index(), jax.process_count()),
        workers=worker_count(config.data.workers),
        on_corrupt=config.data.on_corrupt,
        cache=config.data.cache,
    )


def finish(
    config: ConfigDict,
    suite: Suite,
    workdir: Path,
    evaluators: Sequence[Evaluator],
    params: Any,
    trained: Mapping[str, int],
) -> None:
    """Evaluates the final parameters; writes result.json, report.html, the evaluators' files, the terminal's table.

    `trained`: the "step", and where there was training "skipped_records" and perhaps "kept_step", see `counters`.
    """
    step, skipped = trained["step"], trained.get("skipped_records", 0)
    results = evaluate(evaluators, params)
    if jax.process_index():
        return
    chance = chance_levels(evaluators)
    print(results_table(results, chance) if results else NO_EVALUATION, flush=True)
    if skipped:
        print(f"records that cannot be used, skipped in training: {skipped:,}", flush=True)
    for name, content in all_files(evaluators).items():
        write_bytes(str(workdir / name), content)
    write_json_file(workdir / RESULT_FILE, {**finite(results), **trained})
    write_report(
        workdir / "report.html",
        title=f"florence_jax {suite.name}: {workdir}" + (f" at step {step}" if step else ""),
        facts={
            **{name: str(value) for name, value in suite.identity.items() if not name.startswith("model.")},
            "model": variants(suite),
            "eval.source": config.eval.source,
            "records skipped in training": f"{skipped:,}" if skipped else "",
            "parameters of step": str(trained.get("kept_step", "")),
        },
        config=config.to_dict(),
        history=read_metrics(workdir / "metrics.jsonl"),
        charts=[*(training_charts(suite) if isinstance(suite, Task) else ()), *all_charts(evaluators)],
        results=results,
        chance=chance,
        fragments=[fragment for evaluator in evaluators for fragment in evaluator.report()],
    )
    print(f"results in {workdir}/result.json, pictures and curves in {workdir}/report.html", flush=True)


def training_charts(task: Task) -> list[Chart]:
    """The charts of a task's own metrics, named as metrics.jsonl names them."""
    return [
        Chart(title, {legend: f"train/{metric}" for legend, metric in series.items()}) for title, series in task.charts
    ]


def variants(suite: Suite) -> str:
    """The sizes of the parts of a model, for people: 'ti'."""
    parts: Mapping[str, Mapping[str, Any]] = suite.description["parts"]
    return ", ".join(part["variant"] for part in parts.values() if "variant" in part)


def resolved_optim(config: ConfigDict, task: Task) -> ConfigDict:
    """`config.optim` with the task's learning rate and warm-up steps."""
    optim = ConfigDict(config.optim.to_dict())
    optim.learning_rate, optim.warmup_steps = task.plan.learning_rate, task.plan.warmup_steps
    return optim


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
        self.task, self.workdir = task, workdir
        self.directory = checkpoint_directory(config, workdir)
        self.identity = {**task.identity, "seed": config.seed}  # an evaluation may have another seed
        self.mesh = mesh_of(config, devices)
        self.config = config = config.copy_and_resolve_references()
        self._auto = config.precision == AUTO
        if self._auto:
            config.precision = best_precision(self.mesh.devices.flat[0].platform)
        if task.plan.batch_size % self.mesh.size:
            raise UserError(f"config.batch_size={task.plan.batch_size} does not divide by the {self.mesh.size} devices")
        _check_intervals(config)
        self.is_main = jax.process_index() == 0
        abstract = jax.eval_shape(task.init, jax.random.key(config.seed))
        optim, policy = resolved_optim(config, task), task.policy
        self.optimizer = make_optimizer(optim, task.plan.total_steps, abstract, policy)
        self.ema_decay = average_decay(optim.ema_decay, task.plan.total_steps)
        self._params_sharding = param_shardings(abstract, self.mesh, config.mesh.sharding_rules, policy.sharding)
        shapes = jax.eval_shape(self._fresh_state, jax.random.key(config.seed))
        self.shardings = state_shardings(shapes, self._params_sharding, self.mesh)
        self.target = with_places(shapes, self.shardings)
        self.state: dict[str, Any] = {}
        self._trace = StepTrace(workdir / "profile", config.profile.steps)
        self._batch_sharding = batch_sharding(self.mesh)

    def _fresh_state(self, key: jax.Array) -> dict[str, Any]:
        optimizer, ema = self.optimizer, self.config.optim.ema_decay > 0
        best = self.task.selection is not None
        return init_state(self.task.init(key), optimizer.transform, ema=ema, frozen=optimizer.frozen, best=best)

    # -- starting ---------------------------------------------------------------------------------------------------

    def restore_for_evaluation(self) -> None:
        """Loads only the parameters to evaluate, of the newest checkpoint."""
        checkpoints = Checkpoints(str(self.directory), read_only=True)
        self.state = checkpoints.restore(eval_part(self.target), partial=True)
        checkpoints.close()

    def _start(self, checkpoints: Checkpoints) -> int:
        """Restores the newest checkpoint, or makes a fresh state; returns the step to continue from."""
        while (step := checkpoints.latest_step()) is not None:
            try:
                self.state = checkpoints.restore(self.target, step)
            except UnreadableCheckpoint as error:
                aside = checkpoints.set_aside(step)
                print(f"warning: {error}; renamed to {aside}, the one before it is used", file=sys.stderr, flush=True)
                if jax.process_count() > 1:  # which of the others could read it is not known: all start again
                    sys.exit(EXIT_LOST)
                continue
            self._say(f"resuming {self.workdir} at step {step} of {self.task.plan.total_steps}")
            return step
        if self.is_main:
            check_no_results(self.config, self.workdir)
        self.state = self.initial_state()
        if self.is_main:
            write_description(str(self.directory), self.task.description)
        return 0

    def initial_state(self) -> dict[str, Any]:
        """The state of step 0, with the parameters of `config.init` where that is given."""
        make = jax.jit(self._fresh_state, out_shardings=self.shardings)
        state = make(jax.random.key(self.config.seed))
        if self.config.init:
            state = start_from(state, self.task.start(state["params"]), self.optimizer.frozen)
            if self.config.init_optimizer:
                state["opt_state"] = load_optimizer(self.config.init, state["opt_state"])
        return state

    # -- training ---------------------------------------------------------------------------------------------------

    def train(self) -> int:
        """Runs to the plan's last step; see `run`."""
        data, evaluators = self.task.train_data(), self.task.evaluators(self.mesh)
        if self.is_main:
            make_workdir(self.workdir)
        with only_run(self.workdir):
            return self._train(data, evaluators)

    def _train(self, data: TrainData, evaluators: Sequence[Evaluator]) -> int:
        config, total, saved = self.config, self.task.plan.total_steps, dict[str, Any]()
        if self.is_main and has_steps(self.directory):
            check_same_run(self.identity, config, self.workdir)  # before `Checkpoints`, which clears files away
            saved = saved_config(self.workdir)
        if self._auto:
            config.precision = agreed_precision(config.precision, saved)
        checkpoints = Checkpoints(
            str(self.directory), keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every
        )
        start = self._start(checkpoints)
        if start >= total:
            checkpoints.close()
            self._say(
                f"{self.workdir} is finished: step {start} of {total}, results in {self.workdir}/result.json. Choose "
                "another --workdir, or a larger --config.total_steps"
            )
            if not self._has_result():  # ended while it was evaluated
                self._finish(evaluators)
            return 0
        if self.is_main:
            write_config(config, self.identity, self.workdir)
            write_data([*found_data(self.task, evaluators), text_lengths(data)], self.workdir)
        self._describe(data)
        writer = MetricsWriter(self.workdir, resume_step=start, write=self.is_main)
        with StopSignals() as signals, contextlib.closing(writer), checkpoints:
            finished = self._steps(start, data, evaluators, writer, checkpoints, signals)
        if not finished:
            step = int(self.state["step"])
            self._say(f"stopped by {signals.meaning} at step {step}, saved; run the same command to go on")
            return signals.exit_code
        self._finish(evaluators)
        return 0

    def _finish(self, evaluators: Sequence[Evaluator]) -> None:
        finish(self.config, self.task, self.workdir, evaluators, eval_params(self.state), counters(self.state))

    def _has_result(self) -> bool:
        """Whether process 0, which writes it, has a result.json: the same answer on every process."""
        found = np.int32((self.workdir / RESULT_FILE).exists())
        return bool(multihost_utils.broadcast_one_to_all(found))

    def make_step(self) -> jax.stages.Wrapped:
        """The jitted train step; see `step.make_train_step`."""
        return make_train_step(
            self.task,
            self.optimizer.transform,
            self.optimizer.schedule,
            seed=self.config.seed,
            ema_decay=self.ema_decay,
            mesh=self.mesh,
            shardings=self.shardings,
            frozen=self.optimizer.frozen,
            rounded=self.config.precision == ROUNDED,
        )

    def _steps(
        self,
        start: int,
        data: TrainData,
        evaluators: Sequence[Evaluator],
        writer: MetricsWriter,
        checkpoints: Checkpoints,
        signals: StopSignals,
    ) -> bool:
        """The loop proper; True when it reached the end, False when it was asked to stop."""
        config, plan, selection = self.config, self.task.plan, self.task.selection
        train_step = CompiledStep(self.make_step())
        stream = open_stream(config, self.task, data, start)
        speed = Speedometer(plan.batch_size, self.task.flops_per_example)
        progress = Progress(plan.total_steps, start, show=self.is_main)
        late = LateMetrics(plan.log_every, writer, speed, progress)
        watchdog = Watchdog(config.watchdog.seconds)
        with contextlib.ExitStack() as stack:
            for user in (stream, progress, watchdog, self._trace):
                stack.callback(user.close)
            for step in range(start, plan.total_steps + 1):
                stop, last = signals.wanted(step), step == plan.total_steps
                evaluates = is_due(step, plan.eval_every) and start < step and not last
                if selection is not None:
                    evaluates = evaluates or last or (step == 0 and selection.start)
                saves = step > start and (stop or last or is_due(step, config.checkpoint.every))
                if evaluates or saves or stop:
                    late.drain()
                    watchdog.rest()
                began = time.perf_counter()  # after draining, which may start a new reading of the speed
                if evaluates:
                    self._evaluate(step, evaluators, writer, last)
                if saves:
                    checkpoints.save(step, self.state)
                speed.pause(time.perf_counter() - began)
                if stop or last:
                    break
                if step > start:  # before the first, workers start and caches fill
                    watchdog.step(step + 1)
                self._trace.before(step + 1)
                began, made = time.perf_counter(), stream.processor_seconds
                batch = to_global(next(stream), self._batch_sharding)
                speed.step(time.perf_counter() - began, stream.processor_seconds - made)
                if not train_step.knows(batch):
                    late.drain()
                    watchdog.rest()
                    speed.pause(train_step.compile(self.state, batch))
                self.state, metrics = train_step(self.state, batch)
                late.push(step + 1, metrics)
                self._trace.after(step + 1, wait=late.drain)
                progress.step()
        return last

    def _evaluate(self, step: int, evaluators: Sequence[Evaluator], writer: MetricsWriter, last: bool) -> None:
        """Of the parameters of a step; where the task selects, the best are kept, and are the run's in the end."""
        results, selection = evaluate(evaluators, eval_params(self.state)), self.task.selection
        writer.write(step, results)
        if selection is None:
            return
        score = results[selection.metric]
        self.state = keep_best(self.state, score, selection.images, self.optimizer.frozen)
        if last:
            best = self.state["best"]
            self.state = take_best(self.state)
            start = f", of the start {float(best['start']):.3f}" if selection.start else ""
            self._say(
                f"kept the parameters of step {int(best['step'])} of {step}: {selection.metric} "
                f"{float(best['score']):.3f}, of the last {score:.3f}{start}"
            )

    def _describe(self, data: TrainData) -> None:
        count, plan = sum(x.size for x in jax.tree.leaves(self.target["params"])), self.task.plan
        workers, cores = worker_count(self.config.data.workers), available_cores()
        average = f" (averaged over about {1 / (1 - self.ema_decay):.0f})" if self.config.optim.ema_decay else ""
        kept = f"; kept in memory is {kept_in_memory(data)}" if self.config.data.cache else ""
        self._say(
            f"{self.task.name} {variants(self.task)}: {count / 1e6:.2f} M parameters, "
            f"{self.task.flops_per_example / 1e9:.2f} GFLOP a training example, {plan.total_steps} steps{average} of "
            f"{plan.batch_size} at a learning rate of {plan.learning_rate:.2g} on {self.mesh.size} "
            f"{jax.devices()[0].platform} device(s) in {self.config.precision}, batches made by "
            f"{f'{workers} processes' if workers else 'threads'} ({cores} cores){kept}, workdir {self.workdir}"
        )

    def _say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)


class CompiledStep:
    """A train step for batches of several shapes, each compiled when it first comes.

    Every process of a job has the same shapes in the same order.

    Args:
      step: jitted, see `step.make_train_step`.
    """

    def __init__(self, step: jax.stages.Wrapped):
        self._step = step
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def knows(self, batch: Mapping[str, jax.Array]) -> bool:
        """Whether the step is compiled for a batch of this shape."""
        return _shapes(batch) in self._compiled

    def compile(self, state: Any, batch: Mapping[str, jax.Array]) -> float:
        """Compiles for batches of this shape, on all processes together; returns the seconds that it took."""
        began = time.perf_counter()
        self._compiled[_shapes(batch)] = self._step.lower(state, batch).compile()
        meet(f"compiled {len(self._compiled)}")
        return time.perf_counter() - began

    def __call__(self, state: Any, batch: Mapping[str, jax.Array]) -> Any:
        """One step, of a shape that is compiled."""
        return self._compiled[_shapes(batch)](state, batch)


def _shapes(batch: Mapping[str, jax.Array]) -> tuple[Any, ...]:
    return tuple((name, array.shape, array.dtype) for name, array in batch.items())
