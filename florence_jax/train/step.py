"""One optimizer step as a single jitted function."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from florence_jax.models.products import rounded_factors
from florence_jax.params.rules import overlay, split
from florence_jax.params.sharding import batch_sharding, replicated
from florence_jax.tasks.base import Task


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    ema_decay: float,
    mesh: Mesh,
    shardings: Any,
    frozen: Collection[str] = (),
    rounded: bool = False,
) -> jax.stages.Wrapped:
    """Builds `step(state, batch) -> (state, metrics)`; the old state's buffers are donated.

    The step's random key is `fold_in(key(seed), step)`, so a resumed run draws what an undisturbed one would. After
    the update the task may project the parameters (the logit-scale clamp) and the moving average, if any, follows.
    Metrics are float32 scalars: the task's own, `loss`, `grad_norm` (of what is trained, before clipping),
    `learning_rate`, `skipped_records` (corrupt records passed over since the start) and, where a batch says it,
    `padded_share` of its pictures' pixels.

    Args:
      task: gives the loss and the projection.
      optimizer, schedule: from `optim.make_optimizer`. seed: of the run.
      ema_decay: of the moving average, see `optim.average_decay`.
      mesh: device mesh; batches arrive sharded over it. shardings: the state's, from `sharding.state_shardings`.
      frozen: paths of the parameters that are not differentiated and stay bit for bit as they are.
      rounded: multiply as `models.products` does on request.
    """

    def loss_of(trained: Any, still: Any, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        return task.loss(overlay(still, trained), batch, key)

    def step(state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        batch = dict(batch)
        trained, still = split(state["params"], frozen)
        skipped = state["skipped_records"] + batch.pop("corrupt").sum()
        padded = batch.pop("padded", None)
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        # Both are seen by the model, the mesh also by `sharding.ambient_batch_axes`.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), rounded_factors(rounded):
            (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(trained, still, batch, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], trained)
        projected = task.project(overlay(still, optax.apply_updates(trained, updates)))
        params = overlay(still, trained := split(projected, frozen)[0])
        changed = {"step": state["step"] + 1, "skipped_records": skipped, "params": params, "opt_state": opt_state}
        new = state | changed  # the best so far stays
        if "ema" in state:
            new["ema"] = optax.incremental_update(trained, state["ema"], 1.0 - ema_decay)
        metrics = metrics | {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "skipped_records": skipped.astype(jnp.float32),
            "learning_rate": jnp.asarray(schedule(state["step"]), jnp.float32),
        }
        return new, metrics if padded is None else metrics | {"padded_share": padded.mean()}

    inputs, outputs = (shardings, batch_sharding(mesh)), (shardings, replicated(mesh))
    return jax.jit(step, in_shardings=inputs, out_shardings=outputs, donate_argnums=0)
