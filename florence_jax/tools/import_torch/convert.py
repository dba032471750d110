"""A PyTorch state dict of any family to our parameters."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.sizes import ModelConfig
from florence_jax.tools.import_torch.family import Family, Shapes, State
from florence_jax.tools.import_torch.names import canonical_names, source_name, to_our_layout, torch_shape


def convert(
    state: State,
    family: Family,
    *,
    options: Mapping[str, Any] | None = None,
    res: int | None = None,
    window: int | None = None,
) -> tuple[ModelConfig, dict[str, Any], list[str]]:
    """Our parameters from a PyTorch state dict.

    Args:
      state: tensors by name, in PyTorch's layouts.
      family: whose they are.
      options: fields of the configuration that override what the shapes say, such as `text_heads`.
      res, window: adapt to this image size (pixels) and attention window (tokens); default as in the file.

    Returns:
      The configuration, the parameters (float32 numpy arrays; with 'swin' only {"image"}) in the layout that its model
      has, and the names of the tensors that were dropped.

    Raises:
      UserError: one message that lists every missing, unknown, ambiguous and mis-shaped tensor.
    """
    state = family.prepare(state)
    names = canonical_names(state, family.renames)
    shapes = {name: np.shape(state[found[0]]) for name, found in names.items()}
    dropped = [name for name in names if re.fullmatch(family.dropped, name)]
    config = family.configure({**family.sizes(Shapes(shapes, family.name)), **(options or {})})
    targets = family.targets(config)
    sources = {source_name(path, family.rules): path for path in targets}
    if len(sources) != len(targets):
        raise AssertionError("two parameters have one source name")  # a mistake in the name tables, not the user's
    wanted = {name: torch_shape(path, targets[path]) for name, path in sources.items()}
    _check(names, shapes, wanted, dropped, family.name)
    params: dict[str, Any] = {}
    for name, path in sources.items():
        *parents, leaf = path.split("/")
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = to_our_layout(path, np.asarray(state[names[name][0]], np.float32))
    if changes := family.resolution(config, res, window):
        target = family.changed(config, changes)
        config, params = target, family.resize(params, config, target)
    return config, _stack(params), sorted(original for name in dropped for original in names[name])


def _check(
    names: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    dropped: Sequence[str],
    family: str,
) -> None:
    """Raises one `UserError` with all differences between a file and the model that its shapes describe."""
    lines = [f"{name}: missing, should be {wanted[name]}" for name in sorted(wanted.keys() - names.keys())]
    unknown = names.keys() - wanted.keys() - set(dropped)
    lines += [f"{name}: unknown, {shapes[name]}" for name in sorted(unknown)]
    lines += [f"{name}: {' and '.join(found)} both name it" for name, found in names.items() if len(found) > 1]
    lines += [
        f"{name}: {shapes[name]}, should be {wanted[name]}"
        for name in sorted(wanted.keys() & names.keys())
        if shapes[name] != wanted[name]
    ]
    if lines:
        raise UserError(
            f"the file does not fit --from={family}; {len(lines)} mismatches: {'; '.join(lines)}. Check --from and "
            "that the file is complete; sizes that shapes do not show can be given with --set NAME=VALUE"
        )


def _stack(params: Mapping[str, Any]) -> dict[str, Any]:
    """Unrolled blocks to the layout of the scan: `stage{i}_pair{j}` to `stage{i}_pairs`, `layer{j}` to `layers`."""
    out = dict(params)
    for entry, tree in params.items():
        if not isinstance(tree, dict):
            continue
        blocks = dict(tree)
        groups: dict[str, list[str]] = {}
        for name in blocks:
            if (stem := name.rstrip("0123456789")).endswith(("_pair", "layer")):
                groups.setdefault(stem, []).append(name)
        for stem, members in groups.items():
            if len(members) > (2 if stem == "layer" else 1):
                members.sort(key=lambda name: (len(name), name))  # by number: the stem is the same
                stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[blocks.pop(name) for name in members])
                blocks[f"{stem}s"] = stacked
        out[entry] = blocks
    return out
