"""A PyTorch state dict of any family to our parameters."""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from florence_jax.errors import UserError
from florence_jax.params.lazy import LazyArray
from florence_jax.tools.import_torch.family import Family, Shapes, State, Told
from florence_jax.tools.import_torch.names import Tensor, gather, source_name, to_our_layout, torch_shape
from florence_jax.tools.import_torch.unwrap import unwrap

_LISTED = 6  # mismatches that a message names
BOTH_ACTIVATIONS = "activation"  # an option for image_activation and text_activation


class Converted(NamedTuple):
    """What a file holds, as this project has it.

    Attributes:
      config: of the model: `ModelConfig`, or what a family of its own kind has.
      params: a nested dict of float32 arrays that are read from the file when they are used, in the layout that the
        model has (with 'swin' only {"image"}).
      dropped: names of the tensors that were left out.
      evaluation: how pictures are made for these weights.
      notes: sentences for the user: where the tensors were found, what was known beside them, what was left out.
    """

    config: Any
    params: dict[str, Any]
    dropped: list[str]
    evaluation: dict[str, Any]
    notes: list[str]


def convert(
    state: State,
    family: Family,
    *,
    file: Path | None = None,
    options: Mapping[str, Any] | None = None,
    res: int | None = None,
    window: int | None = None,
) -> Converted:
    """Our parameters from a PyTorch state dict.

    Args:
      state: tensors by name, in PyTorch's layouts.
      family: whose they are.
      file: that they come from: its name, and configurations beside it, say what tensors do not.
      options: fields of the configuration that stand before what shapes and configurations say, such as `text_heads`;
        'activation' is that of both towers.
      res, window: adapt to this image size (pixels) and attention window (tokens); default as in the file.

    Raises:
      UserError: one line: another network's file, what nobody says, or the missing, unknown, ambiguous and mis-shaped
        tensors by the file's own names.
    """
    found = unwrap(state, family)
    notes = [f"tensors found under the prefix {found.prefix!r}"] if found.prefix else []
    told = family.told(file, list(found.state)) if file is not None else Told()
    if told.where:
        notes.append(f"what tensors do not show is of {told.where}")
    tensors = gather(found.state, family.naming(list(found.state)))
    shapes = {name: _shape(name, tensor) for name, tensor in tensors.items()}
    known = [(name, tensor.names[0]) for name, tensor in tensors.items()]
    in_the_file = functools.partial(_in_the_file, known=known)
    seen = Shapes(shapes, family.name, in_the_file)
    config = family.configure(_sizes(seen, family, told, dict(options or {})))
    targets = family.targets(config)
    sources = {source_name(path, family.rules): path for path in targets}
    if len(sources) != len(targets):
        raise AssertionError("two parameters have one source name")  # a mistake in the name tables, not the user's
    dropped, counted = _left_out(tensors, family)
    missing = {path: shape for path, shape in targets.items() if source_name(path, family.rules) not in tensors}
    constant, said = _absent(missing, family)
    wanted = {name: torch_shape(path, targets[path]) for name, path in sources.items() if path not in constant}
    _check(tensors, shapes, wanted, dropped, family.name, in_the_file)
    arrays = {sources[name]: (tensors[name], targets[sources[name]]) for name in wanted} | constant
    params = _stacked({path: arrays[path] for path in targets})
    notes += [*counted, *said, *family.remarks(seen)]
    if changes := family.resolution(config, res, window):
        target = family.changed(config, changes)
        config, params = target, family.resize(params, config, target)
    left_out = [original for name in dropped for original in tensors[name].names]
    pictures = dict(told.evaluation or family.evaluation(config, list(found.state)))
    return Converted(config, params, sorted(left_out + found.outside), pictures, notes)


def _shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """As the model has it: a convolution of 1x1 is a matrix; OpenCLIP's scale and bias of the logits may be (1,)."""
    shape = tensor.array.shape
    if name in ("logit_scale", "logit_bias") and tensor.array.size == 1:
        return ()
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _left_out(tensors: Collection[str], family: Family) -> tuple[list[str], list[str]]:
    """Canonical names that are left out, and a sentence about each of `Family.left_out`."""
    groups = {what: [name for name in tensors if re.fullmatch(pattern, name)] for pattern, what in family.left_out}
    rest = [name for name in tensors if re.fullmatch(family.dropped, name)]
    counted = [f"left out: {what}, {len(names)} tensors" for what, names in groups.items() if names]
    return list(dict.fromkeys([*rest, *(name for names in groups.values() for name in names)])), counted


def _absent(missing: Mapping[str, tuple[int, ...]], family: Family) -> tuple[dict[str, Any], list[str]]:
    """Of our parameters that no tensor is for: those of `Family.absent`, as constants, and a sentence about each."""
    constant: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    said: dict[str, None] = {}
    for path, shape in missing.items():
        for pattern, value, what in family.absent:
            if re.fullmatch(pattern, path):
                constant[path] = Tensor((), LazyArray(shape, functools.partial(np.full, shape, value)), False), shape
                said[f"not in the file: {what}"] = None
    return constant, list(said)


def _sizes(shapes: Shapes, family: Family, told: Told, options: dict[str, Any]) -> dict[str, Any]:
    """Fields of the configuration, from all who know them; raises `UserError` where they contradict or keep silent."""
    if both := options.pop(BOTH_ACTIVATIONS, None):
        options = {"image_activation": both, "text_activation": both} | options
    sizes = family.sizes(shapes)
    if wrong := [f"{name} {value}, not {sizes[name]}" for name, value in told.shown.items() if sizes[name] != value]:
        raise UserError(f"{told.where} says {', '.join(wrong)} as the file has it: it belongs to other weights")
    usual = family.published(sizes)
    found = sizes | (usual if told.published else {}) | dict(told.fields) | options
    if missing := [name for name in family.asked if name not in found]:
        raise UserError(_question(missing, usual))
    return found


def _question(missing: Sequence[str], usual: Mapping[str, Any]) -> str:
    ways = []
    if any(name.endswith("_activation") for name in missing):
        ways.append(
            f"--set {BOTH_ACTIVATIONS}=quick_gelu (OpenAI's, MetaCLIP's, DFN's) or --set {BOTH_ACTIVATIONS}=gelu "
            "(LAION's, DataComp's)"
        )
    for name in ("heads", "text_heads"):
        if name in missing:
            example = str(usual.get(name, "N")).replace(" ", "")
            ways.append(f"--set '{name}={example}'" + (" (as published models of this width)" if usual else ""))
    return (
        f"tensors do not show {', '.join(missing)}, and neither a configuration beside the file nor its name says it: "
        f"put open_clip_config.json or config.json beside it, or add {', '.join(ways)}"
    )


def _check(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    dropped: Sequence[str],
    family: str,
    in_the_file: Callable[[str], str],
) -> None:
    """Raises one `UserError` with the differences between a file and the model that its shapes describe."""
    missing = sorted(wanted.keys() - tensors.keys())
    lines = [f"{in_the_file(name)}: missing, should be {wanted[name]}" for name in missing]
    unknown = tensors.keys() - wanted.keys() - set(dropped)
    lines += [f"{' and '.join(tensors[name].names)}: unknown, {shapes[name]}" for name in sorted(unknown)]
    lines += [f"{' and '.join(tensor.names)}: both name one tensor" for tensor in tensors.values() if tensor.clash]
    lines += [
        f"{tensors[name].names[0]}: {shapes[name]}, should be {wanted[name]}"
        for name in sorted(wanted.keys() & tensors.keys())
        if shapes[name] != wanted[name] and not tensors[name].clash
    ]
    if lines:
        more = f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
        raise UserError(
            f"the file does not fit --from={family}; {len(lines)} mismatches: {'; '.join(lines[:_LISTED])}{more}"
        )


def _in_the_file(name: str, known: Collection[tuple[str, str]]) -> str:
    """How a file would call what it lacks: as its tensor of the most alike canonical name, with another end."""

    def alike(other: str) -> int:
        ours, theirs = name.split("."), other.split(".")
        return next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )

    canonical, original = max(known, key=lambda pair: alike(pair[0]))
    rest, common = canonical.split("."), alike(canonical)
    tail = ".".join(["", *rest[common:]])
    if not common or not original.endswith(tail):
        return name
    return ".".join([original.removesuffix(tail), *name.split(".")[common:]])


def _stacked(arrays: Mapping[str, tuple[Tensor, tuple[int, ...]]]) -> dict[str, Any]:
    """Parameters in the layout of the scan: `stage{i}_pair{j}` as `stage{i}_pairs`, `layer{j}` as `layers`, ...

    Args:
      arrays: tensor and our shape of each unrolled parameter, by path.
    """
    blocks: dict[str, set[str]] = {}
    for path in arrays:
        *above, _ = path.split("/")
        for part in above:
            stem = part.rstrip("0123456789")
            if stem.endswith(("_pair", "layer", "block")):
                blocks.setdefault(f"{path.split('/')[0]}/{stem}", set()).add(part)
    depth = {stem: len(parts) for stem, parts in blocks.items()}
    groups: dict[str, list[str]] = {}
    for path in arrays:
        groups.setdefault(_scanned(path, depth), []).append(path)
    params: dict[str, Any] = {}
    for target, paths in groups.items():
        paths.sort(key=lambda path: (len(path), path))  # by number: the rest is the same
        shape = arrays[paths[0]][1]
        readers = [functools.partial(_read, path, arrays[path][0], shape) for path in paths]
        scanned = target != paths[0]
        *parents, leaf = target.split("/")
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = (
            LazyArray((len(paths), *shape), functools.partial(_stack, readers, shape))
            if scanned
            else (LazyArray(shape, readers[0]))
        )
    return params


def _scanned(path: str, depth: Mapping[str, int]) -> str:
    """Path of a parameter in a model that scans over its blocks, where there are enough of them."""
    entry, *parts = path.split("/")
    for i, part in enumerate(parts[:-1]):
        stem = part.rstrip("0123456789")
        if depth.get(f"{entry}/{stem}", 0) > (2 if stem == "layer" else 1):
            parts[i] = f"{stem}s"
    return "/".join([entry, *parts])


def _read(path: str, tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    return to_our_layout(path, np.asarray(tensor.array)).reshape(shape).astype(np.float32)


def _stack(readers: Sequence[Callable[[], np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty((len(readers), *shape), np.float32)
    for row, read in zip(out, readers, strict=True):
        row[...] = read()
    return out
