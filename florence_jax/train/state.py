"""The train state: everything a checkpoint holds, as one plain nested dict."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def init_state(params: Any, optimizer: optax.GradientTransformation, *, ema: bool) -> dict[str, Any]:
    """A fresh state `{"step", "skipped_records", "params", "opt_state"[, "ema"]}`.

    `step` and `skipped_records` (corrupt records passed over so far) are int32 zeros; `ema` starts as a copy of the
    parameters.

    Random keys are not part of it: every step derives its key from (seed, step).
    """
    state = {
        "step": jnp.zeros((), jnp.int32),
        "skipped_records": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": optimizer.init(params),
    }
    if ema:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def eval_params(state: dict[str, Any]) -> Any:
    """The parameters to evaluate: the moving average where the run keeps one, else the parameters themselves."""
    return state["ema"] if "ema" in state else state["params"]
