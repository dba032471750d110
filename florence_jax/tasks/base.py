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

# Of a model: may change in a resumed run.
FREE_OPTIONS = ("dtype", "remat", "scan", "attention", "drop_path", "logit_scale_init")
WARMUP_SHARE = 0.1  # of a run that is counted in epochs: the most that its warm-up may take
EVALUATIONS = 10  # of such a run on its way, where one each epoch is asked for: the most


class RunDefaults(NamedTuple):
    """What a run that is counted in epochs takes where its configuration has None; see `make_plan`."""

    batch_size: int
    epochs: int
    learning_rate: float
    warmup_steps: int


class Plan(NamedTuple):
    """How long a run is, in steps, and how fast it learns. Epochs are resolved.

    Attributes:
      batch_size: global examples a step.
      total_steps, warmup_steps, learning_rate: of the learning-rate schedule; the last is its peak.
      eval_every, log_every: steps between evaluations and between logged lines; 0: never.
    """

    batch_size: int
    total_steps: int
    warmup_steps: int
    learning_rate: float
    eval_every: int
    log_every: int


class EpochSelection(NamedTuple):
    """How the parameters that a run ends with are chosen among those of its evaluations.

    They are the last whose result is within one standard error of the best, and no worse than the start's.

    Attributes:
      metric: the result that they are chosen by, a share of `images`: 'eval/validation/top1'.
      images: how many it is measured on.
      start: whether the first parameters are among them.
    """

    metric: str
    images: int
    start: bool


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
      selection: by which result the parameters of the run are chosen, if by any; else they are the last.
    """

    plan: Plan
    flops_per_example: float
    charts: Sequence[Chart] = ()
    selection: EpochSelection | None = None

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


def make_plan(config: ConfigDict, examples: int | None = None, recipe: RunDefaults | None = None) -> Plan:
    """The plan of a configuration.

    One with `config.epochs`, over `examples`: a batch is made no larger than the data (in whole multiples of the
    devices), `total_steps` is filled in where it is 0, `eval.every` where it is -1 (each epoch, but at most
    `EVALUATIONS` times); warm-up and log interval are cut to a tenth of the steps.

    Args:
      config: of the run.
      examples: of the training data; None where nobody counted them: then `total_steps` must be given.
      recipe: for the keys of `RunDefaults` that are None, of the configuration or of its `optim`.

    Raises:
      UserError: for a length that is not known.
    """
    batch, epochs, rate, warmup = (
        getattr(recipe, name) if place[name] is None else place[name]
        for name, place in (
            ("batch_size", config),
            ("epochs", config if "epochs" in config else {"epochs": 0}),
            ("learning_rate", config.optim),
            ("warmup_steps", config.optim),
        )
    )
    if "epochs" not in config:
        if config.eval.every < 0:
            raise UserError(
                f"config.eval.every={config.eval.every} must be a number of steps, or 0 for only at the end"
            )
        return Plan(batch, config.total_steps, warmup, rate, config.eval.every, config.log.every)
    epoch, devices = 0, jax.device_count()
    if config.batch_size is None:
        batch = -(-batch // devices) * devices
    if examples is not None:
        batch = min(batch, max(examples // devices, 1) * devices) if batch > examples else batch
        epoch = max(examples // batch, 1)
    elif not config.total_steps:
        raise UserError("without training data the length of the run is not known: give --config.total_steps=N")
    total = config.total_steps or epochs * epoch
    each = max(epoch, -(-total // EVALUATIONS))
    return Plan(
        batch,
        total,
        min(warmup, int(total * WARMUP_SHARE)),
        rate,
        each if config.eval.every < 0 else config.eval.every,
        max(min(config.log.every, total // 10), 1),
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
