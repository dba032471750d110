"""Parameter policy by path: one function that maps regular expressions on parameter paths to values."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from florence_jax.errors import UserError

T = TypeVar("T")


class Policy(NamedTuple):
    """What happens to the parameters of a task, by path; each a sequence of (pattern, value), see `match_rules`.

    Attributes:
      lr: multipliers of the learning rate. decay: whether weights decay. (): the project's own rules.
    """

    lr: Sequence[tuple[str, Any]] = ()
    decay: Sequence[tuple[str, Any]] = ()


def path_string(path: Sequence[Any]) -> str:
    """The '/'-joined name of a leaf, from the key path that `jax.tree_util` gives it."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def match_rules(rules: Sequence[tuple[str, T]], params: Any, *, what: str, spare: bool = False) -> Any:
    """Gives every leaf of `params` the value of the first rule whose pattern matches its whole path.

    Args:
      rules: (regular expression, value) pairs, tried in order against paths like 'image/stage0/plain/attn/qkv/kernel'.
      params: a nested dict of arrays or shapes.
      what: what the rules are for ('weight decay'), used in messages.
      spare: whether a rule may decide nothing. For this project's own rules, which fit every model, also one without a
        text tower; never for rules that somebody wrote for one model.

    Returns:
      A tree shaped like `params` with a rule's value at every leaf.

    Raises:
      UserError: if a leaf matches no rule, or a rule decides no leaf and `spare` is off; all offenders are listed. Also
        for rules of another form.
    """
    try:
        compiled = [(re.compile(pattern), value) for pattern, value in rules]
    except (re.error, TypeError, ValueError) as error:
        raise UserError(f"{what} rules {rules!r}: {error}; write (('PATTERN', VALUE), ...)") from error
    used = [0] * len(compiled)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    values, orphans = [], []
    for path, _ in leaves:
        name = path_string(path)
        hit = next((i for i, (pattern, _) in enumerate(compiled) if pattern.fullmatch(name)), None)
        if hit is None:
            orphans.append(name)
            values.append(None)
        else:
            used[hit] += 1
            values.append(compiled[hit][1])
    idle = [] if spare else [rules[i][0] for i, count in enumerate(used) if not count]
    if orphans or idle:
        parts = []
        if orphans:
            parts.append("parameters without a rule: " + ", ".join(orphans))
        if idle:
            parts.append("rules that decide no parameter: " + ", ".join(repr(r) for r in idle))
        raise UserError(f"{what} rules do not fit the model; " + "; ".join(parts))
    return jax.tree_util.tree_unflatten(structure, values)
