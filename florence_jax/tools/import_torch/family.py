"""What a family of public checkpoints is: how its tensors are called, what their shapes say, which model they fill."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.florence import build
from florence_jax.models.sizes import VARIANTS, ModelConfig, resolve_config
from florence_jax.params.rules import path_string
from florence_jax.tools.import_torch.names import Renames

State = Mapping[str, np.ndarray]
# Buffers that follow from the sizes, and classifier heads, which the two towers do not have.
DROPPED = (
    r".*\b(relative_position_index|attn_mask|relative_coords_table|position_ids)|(image\.)?head(\.fc)?\.(weight|bias)"
    r"|input_resolution|context_length|vocab_size"
)


class Shapes:
    """Reads sizes off the shapes; by majority, so that one damaged tensor is reported instead of believed.

    Args:
      shapes: by canonical name.
      family: name of the family, for messages.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], family: str):
        self._shapes, self._family = shapes, family

    def vote(self, pattern: str, value: Callable[[tuple[int, ...]], Any], rank: int) -> Any:
        """The most frequent `value(shape)` among the tensors of `rank` axes whose name matches.

        Raises:
          UserError: if there is none.
        """
        found = [s for name, s in self._shapes.items() if re.fullmatch(pattern, name) and len(s) == rank and min(s)]
        if not found:
            first = ", ".join(list(self._shapes)[:3]) or "nothing"
            raise UserError(
                f"not a checkpoint of --from={self._family}: no tensor is named like {pattern} (it holds {first}, ...)"
            )
        return Counter(value(shape) for shape in found).most_common(1)[0][0]

    def count(self, pattern: str) -> int:
        """1 + the largest integer that group 1 of `pattern` matches; 0 if nothing matches."""
        return 1 + max((int(m[1]) for name in self._shapes if (m := re.fullmatch(pattern, name))), default=-1)


@dataclasses.dataclass(frozen=True)
class Family:
    """Checkpoints of Florence's two towers, or of one of them. Those of another model are a subclass.

    Attributes:
      name: as given with --from.
      about: one sentence for --help.
      base: the row of `VARIANTS` whose fields stand where the file says nothing.
      renames: the file's names to canonical ones.
      rules: ours to canonical ones, by top-level entry, without that entry.
      sizes: fields of `ModelConfig` that the shapes show.
      resolution: (configuration, res, window as asked for, or None) -> the fields that change.
      resize: (parameters, configuration, new configuration) -> the parameters for it.
      prepare: makes one naming of several, where that takes more than `renames`.
      options: fields of `ModelConfig` that a file beside the checkpoint says.
      entries: top-level entries that the file fills; None = all of the model's.
      dropped: pattern of canonical names that are left out.
      part: of `model.json` that describes these parameters.
    """

    name: str
    about: str
    base: str
    renames: Renames
    rules: Mapping[str, Renames]
    sizes: Callable[[Shapes], dict[str, Any]]
    resolution: Callable[[ModelConfig, int | None, int | None], dict[str, Any]]
    resize: Callable[[dict[str, Any], ModelConfig, ModelConfig], dict[str, Any]]
    prepare: Callable[[State], State] = lambda state: state
    options: Callable[[Path], dict[str, Any]] = lambda file: {}
    entries: tuple[str, ...] | None = None
    dropped: str = DROPPED
    part: str = "towers"

    def configure(self, sizes: Mapping[str, Any]) -> ModelConfig:
        """These sizes, written as the row of `VARIANTS` that needs the fewest options; raises `UserError`."""
        return _nearest(resolve_config(self.base, **sizes))

    def changed(self, config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
        """`config` with other values of some fields; raises `UserError`."""
        return _nearest(resolve_config(config.variant, **{**_differences(config, config.variant), **changes}))

    def describe(self, config: ModelConfig) -> tuple[str, dict[str, Any]]:
        """The row of `VARIANTS` and the options that rebuild the model."""
        return config.variant, _differences(config, config.variant)

    def targets(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of the unrolled model's parameters by path, of the entries that the file fills."""
        variant, options = self.describe(config)
        shapes = jax.eval_shape(build(variant, **options, scan=False).init, jax.random.key(0))
        kept = {name: tree for name, tree in shapes.items() if self.entries is None or name in self.entries}
        return {path_string(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(kept)[0]}


def _differences(config: ModelConfig, variant: str) -> dict[str, Any]:
    """The options that make `config` of the row `variant`."""
    row = resolve_config(variant)
    found = {name: value for name, value in config.items() if name != "variant" and value != row[name]}
    # What the row leaves open follows another field, and would not stay as it is beside a new value of that field.
    for name, followed in (("heads", "image_width"), ("window", "res")):
        if followed in found and name not in VARIANTS[variant]:
            found[name] = config[name]
    return found


def _nearest(config: ModelConfig) -> ModelConfig:
    """The same sizes, written as the row of `VARIANTS` that needs the fewest options."""
    variant = min(VARIANTS, key=lambda name: len(_differences(config, name)))
    return resolve_config(variant, **_differences(config, variant))
