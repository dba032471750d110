"""Parameter policy by path: one function that maps regular expressions on parameter paths to values."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from florence_jax.errors import UserError

T = TypeVar("T")
Rules = Sequence[tuple[str, T]]


class Policy(NamedTuple):
    """What a task wants of its parameters: rules by path, each ((pattern, value), ...).

    A run's configuration is asked first (`optim.lr_rules`, `optim.decay_rules`, `mesh.sharding_rules`), then the task's
    policy, then the project's own rules, which have an answer for every path; the first match wins.

    Attributes:
      lr: multiplier of the learning rate; 0 freezes; a tuple has one for each of the blocks stacked along axis 0.
      decay: whether weight decay applies.
      sharding: see `sharding.SHARDING_RULES`.
    """

    lr: Rules[float | tuple[float, ...]] = ()
    decay: Rules[bool] = ()
    sharding: Rules[int | str] = ()


def path_string(path: Sequence[Any]) -> str:
    """The '/'-joined name of a leaf, from the key path that `jax.tree_util` gives it."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def first_match(rules: Rules[Any], what: str) -> Callable[[str], int | None]:
    """A function from a whole path to the number of the first rule whose pattern matches it, None if none does.

    Raises:
      UserError: for rules of another form; `what` they are for is said in the message.
    """
    try:
        compiled = [re.compile(pattern) for pattern, _ in rules]
    except (re.error, TypeError, ValueError) as error:
        raise UserError(f"{what} rules {rules!r}: {error}; write (('PATTERN', VALUE), ...)") from error
    return lambda name: next((i for i, pattern in enumerate(compiled) if pattern.fullmatch(name)), None)


def match_rules(rules: Rules[T], params: Any, *, what: str, defaults: Rules[T] = ()) -> Any:
    """Gives every leaf of `params` the value of the first rule whose pattern matches its whole path.

    Args:
      rules: (regular expression, value) pairs, tried in order against paths like 'image/stage0/plain/attn/qkv/kernel'.
        Somebody wrote them for this model, so that one that decides nothing is a mistake.
      params: a nested dict of arrays or shapes.
      what: what the rules are for ('weight decay'), used in messages.
      defaults: rules tried after these. They fit many models, so that any may decide nothing.

    Returns:
      A tree shaped like `params` with a rule's value at every leaf.

    Raises:
      UserError: if a leaf matches no rule, or one of `rules` decides no leaf; all offenders are listed. Also for rules
        of another form.
    """
    find, given = first_match(rules, what), len(rules)
    find_default = first_match(defaults, what)
    used = [0] * given
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    values: list[T | None] = []
    orphans = []
    for path, _ in leaves:
        name = path_string(path)
        if (hit := find(name)) is not None:
            used[hit] += 1
            values.append(rules[hit][1])
        elif (hit := find_default(name)) is not None:
            values.append(defaults[hit][1])
        else:
            orphans.append(name)
            values.append(None)
    idle = [rules[i][0] for i, count in enumerate(used) if not count]
    if orphans or idle:
        parts = []
        if orphans:
            parts.append("parameters without a rule: " + ", ".join(orphans))
        if idle:
            parts.append("rules that decide no parameter: " + ", ".join(repr(r) for r in idle))
        raise UserError(f"{what} rules do not fit the model; " + "; ".join(parts))
    return jax.tree_util.tree_unflatten(structure, values)


def lr_multipliers(rules: Rules[Any], params: Any, policy: Policy) -> Any:
    """The multiplier of the learning rate of each parameter, a tree like `params`: 1 where no rule says otherwise.

    Args:
      rules: of the configuration, `optim.lr_rules`.
      params: the parameters, or their shapes.
      policy: of the task.

    Raises:
      UserError: as `match_rules`; for a multiplier that is no number of at least 0.
    """
    found = match_rules(rules, params, what="learning rate", defaults=(*policy.lr, (".*", 1.0)))
    for pattern, value in rules:
        values = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(factor, (int, float)) and factor >= 0 for factor in values):
            raise UserError(f"learning rate rules: {value!r} of {pattern!r} must be a number of at least 0")
    return found


def frozen_paths(multiplier: Any) -> frozenset[str]:
    """Paths of the parameters whose multiplier, from `lr_multipliers`, is 0.

    Raises:
      UserError: if some of the blocks of a stacked parameter are to be frozen, and some not.
    """
    frozen, mixed = set(), []
    for path, value in jax.tree_util.tree_leaves_with_path(multiplier, is_leaf=lambda node: isinstance(node, tuple)):
        zeros = [factor == 0 for factor in (value if isinstance(value, tuple) else (value,))]
        if all(zeros):
            frozen.add(path_string(path))
        elif any(zeros):
            mixed.append(path_string(path))
    if mixed:
        raise UserError(
            f"a learning rate of 0 for some of the stacked blocks of {', '.join(mixed)}: they can be frozen together, "
            "or one by one with --config.model.overrides.scan=False"
        )
    return frozenset(frozen)


def frozen_entries(rules: Rules[Any], params: Mapping[str, Any], policy: Policy) -> frozenset[str]:
    """Top-level names all of whose parameters are frozen: such a part runs as in evaluation, without stochastic depth.

    Arguments as for `lr_multipliers`.
    """
    rest, _ = split(params, frozen_paths(lr_multipliers(rules, params, policy)))
    return frozenset(params.keys() - rest.keys())


def split(params: Mapping[str, Any], names: Collection[str], prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """(the rest, the leaves with these paths) of a nested dict, as nested dicts without empty ones."""
    rest: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for key, value in params.items():
        name = prefix + key
        if isinstance(value, Mapping):
            inner = split(value, names, f"{name}/")
            rest |= {key: inner[0]} if inner[0] else {}
            chosen |= {key: inner[1]} if inner[1] else {}
        elif name in names:
            chosen[key] = value
        else:
            rest[key] = value
    return rest, chosen


def overlay(params: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with the leaves of `over` in place of its own, or beside them."""
    out = dict(params)
    for key, value in over.items():
        out[key] = overlay(out[key], value) if isinstance(out.get(key), Mapping) else value
    return out
