"""The train state: everything a checkpoint holds, as one plain nested dict."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from florence_jax.params.rules import overlay, path_string, split


def init_state(
    params: Any, optimizer: optax.GradientTransformation, *, ema: bool, frozen: Collection[str] = ()
) -> dict[str, Any]:
    """A fresh state `{"step", "skipped_records", "params", "opt_state"[, "ema"]}`.

    `step` and `skipped_records` (corrupt records passed over so far) are int32 zeros; `ema` starts as a copy of the
    parameters. Optimizer state and average lack the parameters with the paths `frozen`.

    Random keys are not part of it: every step derives its key from (seed, step).
    """
    state = {
        "step": jnp.zeros((), jnp.int32),
        "skipped_records": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": optimizer.init(split(params, frozen)[0]),
    }
    return state | {"ema": start_average(params, frozen)} if ema else state


def start_average(params: Any, frozen: Collection[str] = ()) -> Any:
    """The moving average of step 0: a copy of the parameters that are trained."""
    return jax.tree.map(jnp.copy, split(params, frozen)[0])


def eval_params(state: dict[str, Any]) -> Any:
    """The parameters to evaluate: of each the moving average where the run keeps one, else the parameter itself."""
    return overlay(state.get("params", {}), state.get("ema", {}))


def counters(state: dict[str, Any]) -> dict[str, int]:
    """The "step" of a state, and "skipped_records": how often one that cannot be used was drawn up to it."""
    return {name: int(state[name]) for name in ("step", "skipped_records")}


def eval_part(state: dict[str, Any]) -> dict[str, Any]:
    """The part of a state, or of its shapes, that `eval_params` looks at, the step and what was skipped up to it."""
    averaged = state.get("ema", {})
    names = {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(averaged)}
    parts = {"params": split(state["params"], names)[0], "ema": averaged}
    told = {name: state[name] for name in ("step", "skipped_records")}
    return told | {name: tree for name, tree in parts.items() if tree}
