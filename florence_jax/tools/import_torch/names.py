"""Names and layouts of parameters: a checkpoint's to a canonical form, and that form to ours.

Canonical names are those of the original releases under the name of our entry: `image.` + Swin's (layers.0.blocks.0...)
or CLIP's visual tower (conv1, resblocks.0...), `text.` + CLIP's transformer (token_embedding, resblocks.0...), and
`image_projection`, `text_projection`, `logit_scale`; `detector.` + our own names (block0.offset...).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from florence_jax.params.lazy import LazyArray

# (pattern, replacement) pairs; the first pattern that matches at the start of a name renames it.
Renames = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

# Of CLIP's projections, which multiply from the right.
PROJECTION = "_projection/kernel"


def rename(name: str, rules: Renames) -> str:
    """`name` after the first rule that matches at its start; as it is, if none does."""
    for pattern, replacement in rules:
        if re.match(pattern, name):
            return re.sub(rf"\A(?:{pattern})", replacement, name, count=1)
    return name


def rename_all(name: str, rules: Renames) -> str:
    """`name` after every rule, one after the other, wherever each matches."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


class Tensor(NamedTuple):
    """A tensor under its canonical name.

    Attributes:
      names: in the file, of which it is made; more than one of the same part is a clash, for the caller to report.
      array: the values, in PyTorch's layout.
      clash: whether two names of the file are of one part.
    """

    names: tuple[str, ...]
    array: LazyArray
    clash: bool


def gather(state: Mapping[str, Any], naming: Callable[[str], str]) -> dict[str, Tensor]:
    """Tensors by canonical name.

    A name may end in '#' and one of `LAYOUTS`, for a tensor that is stored in another way, or in '#0', '#1', ...: parts
    of a tensor along its first axis, such as separate queries, keys and values. Names that `naming` does not know keep
    their own.
    """
    parts: dict[str, dict[str, list[str]]] = {}
    for name in state:
        canonical, _, part = naming(name).partition("#")
        parts.setdefault(canonical, {}).setdefault(part, []).append(name)
    found = {}
    for canonical, by_part in parts.items():
        names = tuple(name for part in sorted(by_part) for name in by_part[part])
        clash = any(len(same) > 1 for same in by_part.values()) or ("" in by_part and len(by_part) > 1)
        found[canonical] = Tensor(names, _joined([state[name] for name in names], next(iter(by_part))), clash)
    return found


def _from_unfold(value: np.ndarray) -> np.ndarray:
    """The 4C inputs of a patch merging, in PyTorch's order of `unfold` (channel, row, column), in Swin's."""
    return np.ascontiguousarray(value.reshape(*value.shape[:-1], -1, 2, 2).T).reshape(-1, *value.shape[:-1][::-1]).T


# How a tensor may be stored otherwise than canonically, and the way back.
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "T": np.transpose,
    "unfold": _from_unfold,
    "bgr": lambda value: value[:, ::-1],  # a convolution of pictures whose channels are blue, green, red
}


def _joined(arrays: Sequence[Any], part: str) -> LazyArray:
    first = np.shape(arrays[0])
    if part.isdigit() and all(np.shape(array)[1:] == first[1:] for array in arrays):
        shape = (sum(math.prod(np.shape(array)[:1]) for array in arrays), *first[1:])
        return LazyArray(shape, lambda: np.concatenate([np.atleast_1d(np.asarray(array)) for array in arrays]))
    if part in LAYOUTS:
        shape = first[::-1] if part == "T" else first
        return LazyArray(shape, lambda: LAYOUTS[part](np.asarray(arrays[0])))
    return LazyArray(first, lambda: np.asarray(arrays[0]))


def source_name(path: str, rules: Mapping[str, Renames]) -> str:
    """Canonical name of one of our unrolled parameters.

    Args:
      path: such as 'image/stage1_pair0/shifted/attention/qkv/kernel' or 'text/layer3/norm1/scale'.
      rules: of what follows the top-level entry, by that entry.
    """
    entry, slash, rest = path.partition("/")
    if not slash or path.endswith(PROJECTION):
        return entry
    rest = rename(rest, rules[entry]).replace("/", ".")
    return f"{entry}.{re.sub(r'(kernel|scale)$', 'weight', rest)}"


def torch_shape(path: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape in PyTorch's layout of our parameter `path` of shape `shape`."""
    if not path.endswith("/kernel") or path.endswith(PROJECTION):
        return tuple(shape)
    return (shape[-1], shape[-2], *shape[:-2])


def to_our_layout(path: str, value: np.ndarray) -> np.ndarray:
    """A view of a PyTorch tensor in the layout of our parameter `path`: (out, in) -> (in, out), OIHW -> HWIO."""
    if not path.endswith("/kernel") or path.endswith(PROJECTION):
        return value
    return value.transpose(*range(2, value.ndim), 1, 0)
