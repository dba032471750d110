"""What a model is to the rest of the project: pure functions over a plain nested dict of parameters.

No Flax type leaves this folder.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.resize import resize_or_grow

Params = dict[str, Any]
ConfigT = TypeVar("ConfigT")


@functools.lru_cache(maxsize=128)
def _initialiser(module: nn.Module, inputs: tuple[tuple[str, tuple[int, ...], Any], ...]) -> Callable[..., Params]:
    def draw(key: jax.Array) -> Params:
        return module.init({"params": key}, {name: jnp.zeros(shape, dtype) for name, shape, dtype in inputs})["params"]

    return jax.jit(draw, inline=True)


def draw_params(module: nn.Module, inputs: Mapping[str, jax.ShapeDtypeStruct], key: jax.Array) -> Params:
    """Fresh parameters of a module for these inputs, float32.

    Flax runs the module to draw them. The start of a run asks several times, for shapes alone too: of equal modules,
    such as two made of the same sizes, JAX traces one.
    """
    return _initialiser(module, tuple((name, spec.shape, spec.dtype) for name, spec in inputs.items()))(key)


class Model(Generic[ConfigT]):
    """A module with its sizes and its inputs.

    Args:
      module: called with (batch, train); returns every useful intermediate by name.
      config: the sizes, a frozen dataclass.
      inputs: shape and dtype of each input with a batch of one; `apply` takes any batch, and the other axes as the
        module does.
      optional: inputs that a batch may lack.
      flops: floating point operations of one example's forward pass, by part.
    """

    def __init__(
        self,
        module: nn.Module,
        config: ConfigT,
        inputs: Mapping[str, jax.ShapeDtypeStruct],
        optional: tuple[str, ...] = (),
        flops: Mapping[str, float] | None = None,
    ):
        self.config, self.inputs, self.optional = config, dict(inputs), tuple(optional)
        self.flops: dict[str, float] = dict(flops or {})
        self._module: Any = module

    def init(self, key: jax.Array) -> Params:
        """Draws all parameters, float32; works under `jax.jit` and `jax.eval_shape`."""
        return draw_params(self._module, self.inputs, key)

    def apply(
        self,
        params: Mapping[str, Any],
        batch: Mapping[str, jax.Array],
        train: bool = False,
        rngs: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        """Runs the model.

        Args:
          params: as returned by `init`, or the entries of it that these inputs need.
          batch: an array for each of `inputs`, but for those in `optional`.
          train: whether to draw what training draws, such as stochastic depth.
          rngs: keys for that, by name.

        Returns:
          What the module returns.

        Raises:
          UserError: an input that is missing, unknown, or of another rank or kind of number; what the module refuses.
        """
        if missing := sorted(self.inputs.keys() - batch.keys() - set(self.optional)):
            raise UserError(f"the batch lacks {', '.join(missing)}: this model needs it")
        if unknown := sorted(batch.keys() - self.inputs.keys()):
            raise UserError(f"unknown input {', '.join(unknown)}: this model takes {', '.join(self.inputs)}")
        for name, value in batch.items():
            spec = self.inputs[name]
            kinds = [jnp.issubdtype(dtype, jnp.floating) for dtype in (value.dtype, spec.dtype)]
            if len(value.shape) != len(spec.shape) or kinds[0] != kinds[1]:
                raise UserError(
                    f"{name} is {value.dtype}{list(value.shape)}: this model takes {spec.dtype}{list(spec.shape)}, "
                    "any number of examples"
                )
        return self._module.apply({"params": params}, dict(batch), train, rngs=dict(rngs or {}))

    def adapt(self, path: str, saved: np.ndarray, like: Any) -> np.ndarray | None:
        """A saved parameter in the shape of another model's.

        Args:
          path: of the parameter, such as 'image/stage0_pair0/plain/attention/relative_position_bias_table'.
          saved: the values, of the shape they were saved with.
          like: the parameter to be filled: `jax.ShapeDtypeStruct`, or an array with fresh values, which a table with
            more rows needs.

        Returns:
          float32 of the shape of `like`; None if there is no sensible way.
        """
        return resize_or_grow(path, saved, like)
