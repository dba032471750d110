"""Names and layouts of parameters: a checkpoint's to a canonical form, and that form to ours.

Canonical names are those of the original releases under the name of our entry: `image.` + Swin's (layers.0.blocks.0...)
or CLIP's visual tower (conv1, resblocks.0...), `text.` + CLIP's transformer (token_embedding, resblocks.0...), and
`image_projection`, `text_projection`, `logit_scale`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

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


def canonical_names(names: Iterable[str], rules: Renames) -> dict[str, list[str]]:
    """{canonical name: names in the file} (more than one is a clash, for the caller to report).

    Names that no rule knows keep their own.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(rename(re.sub(r"^(module\.)+", "", name), rules), []).append(name)
    return found


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
    """A PyTorch tensor in the layout of our parameter `path`: (out, in) -> (in, out), OIHW -> HWIO."""
    if not path.endswith("/kernel") or path.endswith(PROJECTION):
        return value
    return np.ascontiguousarray(value.transpose(*range(2, value.ndim), 1, 0))
