"""What a family of public checkpoints is: how its tensors are called, what their shapes say, which model they fill."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Collection, ItemsView, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.base import Model
from florence_jax.models.florence import build
from florence_jax.models.sizes import VARIANTS, ModelConfig, resolve_config
from florence_jax.params.lazy import LazyArray
from florence_jax.params.rules import path_string
from florence_jax.tools.import_torch.names import Renames

State = Mapping[str, np.ndarray | LazyArray]
# Buffers that follow from the sizes, and classifier heads, which the two towers do not have.
DROPPED = (
    r".*\b(relative_position_index|attn_mask|relative_coords_table|position_ids|mask_token)|(image\.)?head(\.fc)?\.(weight|bias)"
    r"|input_resolution|context_length|vocab_size"
)


class Told(NamedTuple):
    """What is known of weights beside their tensors: from a configuration next to the file, or from the file's name.

    Attributes:
      where: what says so, for messages; '' for nothing.
      fields: of `ModelConfig`, which shapes do not show, or stand before what they show.
      shown: fields that the shapes must show as well.
      evaluation: how pictures are made for these weights, see `evaluation`; {} where it is not said.
      published: whether this is one of the published models, whose heads follow from their widths.
    """

    where: str = ""
    fields: Mapping[str, Any] = {}
    shown: Mapping[str, Any] = {}
    evaluation: Mapping[str, Any] = {}
    published: bool = False


def evaluation(resize: str = "shorter", crop: float = 1.0, interpolation: str = "bicubic") -> dict[str, Any]:
    """How pictures are made for an evaluation, for `model.json`; see `tasks.encoder.evaluation_ops`.

    Args:
      resize: 'shorter' side and a crop of the middle, or 'squash', the whole picture.
      crop: side of the crop over the shorter side.
      interpolation: 'bicubic' or 'bilinear'.
    """
    return {"resize": resize, "crop": crop, "interpolation": interpolation}


class Shapes:
    """Reads sizes off the shapes; by majority, so that one damaged tensor is reported instead of believed.

    Args:
      shapes: by canonical name.
      family: name of the family, for messages.
      in_the_file: how the file calls, or would call, a tensor of a canonical name, for messages.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], family: str, in_the_file: Callable[[str], str] = lambda name: name
    ):
        self._shapes, self._family, self._in_the_file = shapes, family, in_the_file

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def items(self) -> ItemsView[str, tuple[int, ...]]:
        """(canonical name, shape) of all tensors."""
        return self._shapes.items()

    def vote(self, pattern: str, value: Callable[[tuple[int, ...]], Any], rank: int) -> Any:
        """The most frequent `value(shape)` among the tensors of `rank` axes whose name matches.

        Raises:
          UserError: if there is none.
        """
        found = [s for name, s in self._shapes.items() if re.fullmatch(pattern, name) and len(s) == rank and min(s)]
        if not found:
            wanted = self._in_the_file(re.sub(r"\\d\+?", "0", pattern).replace("\\", ""))
            raise UserError(f"not a whole checkpoint of --from={self._family}: it lacks {wanted}")
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
      naming: (names in the file) -> a function of such a name to the canonical one; see `names.gather`.
      rules: ours to canonical ones, by top-level entry, without that entry.
      sizes: fields of `ModelConfig` that the shapes show.
      resolution: (configuration, res, window as asked for, or None) -> the fields that change.
      resize: (parameters, configuration, new configuration) -> the parameters for it.
      anchors: patterns of names of which one, or more, is in every file; what stands before it is a wrapper's.
      told: (path, names in the file) -> what else is known of the weights; raises `UserError`.
      evaluation: (configuration, names in the file) -> how its publishers make pictures, where `told` does not say.
      asked: fields of `ModelConfig` that tensors do not show, so that somebody must say them.
      published: (sizes) -> those of the fields that follow from the sizes in published models.
      entries: top-level entries that the file fills; None = all of the model's.
      dropped: pattern of canonical names that are left out.
      left_out: (pattern, what) of canonical names that are left out too, and are counted under that name.
      absent: (pattern, value, what) of paths of our parameters that a file need not have, and what they are then.
      remarks: (shapes) -> sentences for the user about what the file is not good for.
      task: in `model.json`, by which `florence_jax.predict` chooses what to do.
    """

    name: str
    about: str
    base: str
    naming: Callable[[Collection[str]], Callable[[str], str]]
    rules: Mapping[str, Renames]
    sizes: Callable[[Shapes], dict[str, Any]]
    resolution: Callable[[ModelConfig, int | None, int | None], dict[str, Any]]
    resize: Callable[[dict[str, Any], ModelConfig, ModelConfig], dict[str, Any]]
    anchors: tuple[str, ...]
    told: Callable[[Path, Collection[str]], Told]
    evaluation: Callable[[ModelConfig, Collection[str]], Mapping[str, Any]]
    asked: tuple[str, ...] = ()
    published: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda sizes: {}
    entries: tuple[str, ...] | None = None
    dropped: str = DROPPED
    left_out: tuple[tuple[str, str], ...] = ()
    absent: tuple[tuple[str, float, str], ...] = ()
    remarks: Callable[[Shapes], list[str]] = lambda found: []
    task: str = "import"

    def configure(self, sizes: Mapping[str, Any]) -> Any:
        """These sizes, written as the row of `VARIANTS` that needs the fewest options; raises `UserError`."""
        return nearest_variant(resolve_config(self.base, **sizes))

    def changed(self, config: Any, changes: Mapping[str, Any]) -> Any:
        """`config` with other values of some fields; raises `UserError`."""
        return nearest_variant(resolve_config(config.variant, **{**differences(config, config.variant), **changes}))

    def parts(self, config: Any, entries: Sequence[str], evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The parts of `model.json` that rebuild a model with these top-level entries."""
        variant, options = config.variant, differences(config, config.variant)
        towers = {"variant": variant, "overrides": options, "entries": [*entries], "evaluation": dict(evaluation)}
        return {"towers": towers}

    def tokenizer(self, config: Any) -> str:
        """The file of the tokenizer that the text encoder was trained with; '' where it is not known."""
        return ""

    def classes(self, config: Any) -> Sequence[str]:
        """Names of the classes that a classifier of the file tells apart; () for none."""
        return ()

    def unrolled(self, config: Any) -> Model[ModelConfig]:
        """The model without scans over its blocks."""
        return build(config.variant, **differences(config, config.variant), scan=False)

    def targets(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the unrolled model's parameters by path, of the entries that the file fills."""
        shapes = jax.eval_shape(self.unrolled(config).init, jax.random.key(0))
        kept = {name: tree for name, tree in shapes.items() if self.entries is None or name in self.entries}
        return {path_string(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(kept)[0]}


def differences(config: ModelConfig, variant: str) -> dict[str, Any]:
    """The options that make a configuration of the towers of the row `variant`."""
    row = resolve_config(variant)
    found = {name: value for name, value in config.items() if name != "variant" and value != row[name]}
    # What the row leaves open follows another field, and would not stay as it is beside a new value of that field.
    for name, followed in (("heads", "image_width"), ("window", "res")):
        if followed in found and name not in VARIANTS[variant]:
            found[name] = config[name]
    return found


def nearest_variant(config: ModelConfig) -> ModelConfig:
    """The same sizes, written as the row of `VARIANTS` that needs the fewest options."""
    variant = min(VARIANTS, key=lambda name: len(differences(config, name)))
    return resolve_config(variant, **differences(config, variant))
