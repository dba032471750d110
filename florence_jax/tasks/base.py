"""What can be evaluated (`Suite`), what can be trained (`Task`): a model, a loss and data, joined for the one loop."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.pipeline import TrainData
from florence_jax.data.records import Source
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.models.base import Model, Params
from florence_jax.params.rules import Policy, frozen_entries

FREE_OPTIONS = ("dtype", "remat", "scan", "drop_path", "logit_scale_init")  # of a model: may change in a resumed run
WARMUP_SHARE = 0.1  # of a run that is counted in epochs: the most that its warm-up may take


class Plan(NamedTuple):
    """How long a run is, in steps. Epochs are resolved.

    Attributes:
      batch_size: global examples a step.
      total_steps, warmup_steps: of the learning-rate schedule.
      eval_every, log_every: steps between evaluations and between logged lines; 0: never.
    """

    batch_size: int
    total_steps: int
    warmup_steps: int
    eval_every: int
    log_every: int


@runtime_checkable
class Suite(Protocol):
    """What can be evaluated.

    Attributes:
      name: of the task, as `config.task` has it.
    """

    name: str

    @property
    @abc.abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """What one run is of, by names of configuration keys ('data.train'), as they are resolved; JSON-able.

        A workdir that holds a run of another identity is refused. Everything else may change when a run is resumed.
        """

    @property
    @abc.abstractmethod
    def description(self) -> Mapping[str, Any]:
        """Content of the `model.json` beside the checkpoints, see `params.weights.make_description`."""

    @property
    def sources(self) -> Sequence[Source]:
        """The data that it opened; that of its evaluators apart."""
        return ()

    @abc.abstractmethod
    def load(self, mesh: Mesh) -> Params:
        """The parameters of `config.init`, on the devices of `mesh`: what is evaluated where nothing was trained."""

    @abc.abstractmethod
    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """The evaluators of this run; each owns its data.

        Raises:
          UserError: for data that is not there or does not fit.
        """


@runtime_checkable
class Task(Suite, Protocol):
    """What can be trained: the contract with `train`, which knows no task by name.

    Attributes:
      plan: length of the run.
      flops_per_example: analytic forward + backward FLOPs of one training example (3 x forward), for MFU.
      charts: of the metrics that `loss` gives, for the page of the run.
    """

    plan: Plan
    flops_per_example: float
    charts: Sequence[Chart] = ()

    @property
    def policy(self) -> Policy:
        """Learning rate, weight decay and sharding by the path of a parameter, after the configuration's own rules."""
        return Policy()

    @property
    @abc.abstractmethod
    def batches(self) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
        """Shapes and dtypes of the global batch, without opening any data: one mapping for each bucket."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, a plain nested dict of float32 arrays."""

    @abc.abstractmethod
    def start(self, params: Params) -> Params:
        """The parameters to start from when `config.init` is given, placed as the fresh ones, `params`, are."""

    @abc.abstractmethod
    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar float32 loss of a global batch, and float32 scalar metrics."""

    def project(self, params: Params) -> Params:
        """Maps parameters back to their allowed set after an update."""
        return params

    @abc.abstractmethod
    def train_data(self) -> TrainData:
        """Opens the training data: a specification, of which the loop makes the stream.

        Raises:
          UserError: for a source that is not there.
        """


def frozen_parts(task: Task, config: ConfigDict) -> frozenset[str]:
    """Top-level entries of the parameters that this run does not train at all: they run as in evaluation."""
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    return frozen_entries(config.optim.lr_rules, shapes, task.policy)


def make_plan(config: ConfigDict, examples: int | None = None) -> Plan:
    """The plan of a configuration.

    One with `config.epochs`, over `examples`: a batch is made no larger than the data (in whole multiples of the
    devices), `total_steps` is filled in where it is 0, `eval.every` where it is -1 (each epoch); warm-up and log
    interval are cut to a tenth of the steps.

    Args:
      config: of the run.
      examples: of the training data; None where nobody counted them: then `total_steps` must be given.

    Raises:
      UserError: for a length that is not known.
    """
    plan = Plan(config.batch_size, config.total_steps, config.optim.warmup_steps, config.eval.every, config.log.every)
    if "epochs" not in config:
        if plan.eval_every < 0:
            raise UserError(f"config.eval.every={plan.eval_every} must be a number of steps, or 0 for only at the end")
        return plan
    batch, epoch = plan.batch_size, 0
    if examples is not None:
        devices = jax.device_count()
        batch = min(batch, max(examples // devices, 1) * devices) if batch > examples else batch
        epoch = max(examples // batch, 1)
    elif not plan.total_steps:
        raise UserError("without training data the length of the run is not known: give --config.total_steps=N")
    total = plan.total_steps or config.epochs * epoch
    return Plan(
        batch,
        total,
        min(plan.warmup_steps, int(total * WARMUP_SHARE)),
        epoch if plan.eval_every < 0 else plan.eval_every,
        max(min(plan.log_every, total // 10), 1),
    )


def make_identity(config: ConfigDict, *names: str) -> dict[str, Any]:
    """The values of the named keys ('data.train'), for `Suite.identity`."""
    flat = config.to_dict()
    found: dict[str, Any] = {}
    for name in ("task", *names):
        value: Any = flat
        for part in name.split("."):
            value = value[part]
        found[name] = value
    return found


def model_identity(model: Model) -> dict[str, Any]:
    """The sizes and options of a model, for `Suite.identity`: many of them do not show in the shapes of its parameters.

    Not among them: how it is computed, and what only training uses.
    """
    found = {f"model.overrides.{name}": value for name, value in model.config.items() if name not in FREE_OPTIONS}
    return {"model.variant": found.pop("model.overrides.variant"), **found}
