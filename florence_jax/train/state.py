"""The train state: everything a checkpoint holds, as one plain nested dict."""

import math
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
        worst = {name: jnp.full((), -jnp.inf, jnp.float32) for name in ("score", "highest", "start")}
        state["best"] = {"params": copy_trained(params, frozen), "step": jnp.zeros((), jnp.int32), **worst}
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


def keep_best(state: dict[str, Any], score: float, images: int, frozen: Collection[str]) -> dict[str, Any]:
    """The state with the parameters to evaluate as its best, where they are.

    They are where their score, a share of so many images, is at least that of the start (step 0), where that was
    scored, and within one standard error of the highest after it: what the images cannot tell apart goes to the later,
    which saw more and at lower rates. "score" and "step" are those of the best, "highest" of all after the start.
    """
    best, rounded = state["best"], np.float32(score)  # as those of the state are
    first, highest = int(state["step"]) == 0, float(best["highest"])
    error = math.sqrt(max(highest * (1 - highest), 0.0) / images) if highest >= 0 else 0.0
    if not first and not (
        rounded >= np.float32(best["start"]) and rounded >= np.float32(highest - error)
    ):  # nor is nan
        return state
    new = {"score": rounded, "step": state["step"]}
    new |= {"start": rounded} if first else {"highest": max(rounded, np.float32(highest))}
    placed = {name: jax.device_put(jnp.array(value), best[name].sharding) for name, value in new.items()}
    return state | {"best": best | {"params": copy_trained(eval_params(state), frozen), **placed}}


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
