"""What a task is: a model, a loss and the data they need, joined for the one training loop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh


class Task(Protocol):
    """The contract between `train` (which knows no task by name) and a task (which knows no optimizer).

    Attributes:
      predict: named pure functions `fn(params, batch) -> array` that evaluators call.
      description: content of the `model.json` of a run, see `params.weights.make_description`.
      flops_per_example: analytic forward + backward FLOPs of one training example (3 x forward), for MFU.
    """

    predict: dict[str, Callable[[Any, dict[str, jax.Array]], jax.Array]]
    description: Mapping[str, Any]
    flops_per_example: float

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters, a plain nested dict of float32 arrays."""

    def start(self, params: Any) -> Any:
        """The parameters to start from when `config.init` is given, placed as the fresh ones, `params`, are."""

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar float32 loss of a global batch, and float32 scalar metrics."""

    def project(self, params: Any) -> Any:
        """Maps parameters back to their allowed set after an update (identity for most)."""

    def open_data(self) -> None:
        """Opens the training data and checks how it is to be used, before anything is compiled or written."""

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the global training batch, without opening any data."""

    def train_stream(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Local batches from `start_step` on, the same for any resume, host or worker count."""

    def evaluators(self, mesh: Mesh) -> Sequence[Any]:
        """The evaluators of this run; each owns its data."""
