"""The train state: everything a checkpoint holds, as one plain nested dict."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from florence_jax.params.rules import overlay, path_string, split


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    ema: bool,
    frozen: Collection[str] = (),
    best: bool = False,
) -> dict[str, Any]:
    """A fresh state `{"step", "skipped_records", "params", "opt_state"[, "ema"][, "best"]}`.

    `step` and `skipped_records` (corrupt records passed over so far) are int32 zeros; `ema` starts as a copy of the
    parameters, `best`, see `keep_best`, too. Optimizer state and both copies lack the parameters with the paths
    `frozen`.

    Random keys are not part of it: every step derives its key from (seed, step).
    """
    state = {
        "step": jnp.zeros((), jnp.int32),
        "skipped_records": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": optimizer.init(split(params, frozen)[0]),
    }
    if ema:
        state["ema"] = copy_trained(params, frozen)
    if best:
        worst = {"score": jnp.full((), -jnp.inf, jnp.float32), "step": jnp.zeros((), jnp.int32)}
        state["best"] = {"params": copy_trained(params, frozen), **worst}
    return state


def copy_trained(params: Any, frozen: Collection[str] = ()) -> Any:
    """A copy of the parameters that are trained."""
    return jax.tree.map(jnp.copy, split(params, frozen)[0])


def start_from(state: dict[str, Any], params: Any, frozen: Collection[str]) -> dict[str, Any]:
    """A fresh state with other first parameters; the average and the best are copies of them."""
    state = state | {"params": params}
    if "ema" in state:
        state["ema"] = copy_trained(params, frozen)
    if "best" in state:
        state["best"] = state["best"] | {"params": copy_trained(params, frozen)}
    return state


def keep_best(state: dict[str, Any], score: float, frozen: Collection[str]) -> dict[str, Any]:
    """The state with the parameters to evaluate as its best, where their score is: of equals the last is kept."""
    best = state["best"]
    if not np.float32(score) >= np.float32(best["score"]):  # nan is not, and equals are rounded alike
        return state
    new = {"score": jnp.asarray(score, jnp.float32), "step": jnp.copy(state["step"])}
    placed = {name: jax.device_put(value, best[name].sharding) for name, value in new.items()}
    return state | {"best": {"params": copy_trained(eval_params(state), frozen), **placed}}


def take_best(state: dict[str, Any]) -> dict[str, Any]:
    """The state with its best parameters as the parameters, and as the average where there is one."""
    best = state["best"]["params"]
    state = state | {"params": overlay(state["params"], copy_trained(best))}
    return state | {"ema": copy_trained(best)} if "ema" in state else state


def eval_params(state: dict[str, Any]) -> Any:
    """The parameters to evaluate: of each the moving average where the run keeps one, else the parameter itself."""
    return overlay(state.get("params", {}), state.get("ema", {}))


def counters(state: dict[str, Any]) -> dict[str, int]:
    """The "step" of a state, "skipped_records": how often one that cannot be used was drawn up to it, and "kept_step":
    that of its best parameters, where it keeps them."""
    kept = {"kept_step": int(state["best"]["step"])} if "best" in state else {}
    return {name: int(state[name]) for name in ("step", "skipped_records")} | kept


def eval_part(state: dict[str, Any]) -> dict[str, Any]:
    """The part of a state, or of its shapes, that `eval_params` and `counters` look at."""
    averaged = state.get("ema", {})
    names = {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(averaged)}
    best = {"step": state["best"]["step"]} if "best" in state else {}
    parts = {"params": split(state["params"], names)[0], "ema": averaged, "best": best}
    told = {name: state[name] for name in ("step", "skipped_records")}
    return told | {name: tree for name, tree in parts.items() if tree}
