"""AdamW with per-path weight decay and learning rate, warm-up + cosine schedule, gradient clipping."""

from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from florence_jax.errors import UserError
from florence_jax.params.rules import match_rules

# Vectors (norm scales, biases), the bias tables, embeddings and the logit scale are not decayed (UniCL's intent).
DECAY_RULES = (
    (r".*/(bias|scale)", False),
    (r".*/(relative_position_bias_table|position_embedding|token_embedding|class_embedding)", False),
    (r"logit_scale", False),
    (r".*", True),
)
MU_DTYPES = ("float32", "bfloat16")


def make_schedule(optim: ConfigDict, total_steps: int) -> optax.Schedule:
    """Linear warm-up over `optim.warmup_steps` to `optim.learning_rate`, then cosine to `optim.final_fraction` of it.

    Raises:
      UserError: if the warm-up does not end before the last step.
    """
    if not 0 <= optim.warmup_steps < total_steps:
        raise UserError(
            f"optim.warmup_steps={optim.warmup_steps} must be at least 0 and below total_steps={total_steps}"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if optim.warmup_steps else optim.learning_rate,
        peak_value=optim.learning_rate,
        warmup_steps=optim.warmup_steps,
        decay_steps=total_steps,
        end_value=optim.learning_rate * optim.final_fraction,
    )


def make_optimizer(
    optim: ConfigDict, total_steps: int, params: Any
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optimizer of a run.

    Args:
      optim: `learning_rate`, `warmup_steps`, `final_fraction`, `b1`, `b2`, `eps`, `mu_dtype` (how the first moment is
        stored, `MU_DTYPES`; computed in float32 either way), `weight_decay`, `clip_norm` (0 = off), `lr_rules`
        ((pattern, multiplier) pairs; a multiplier of 0 freezes; a tuple has one for each of the blocks stacked along
        axis 0), `decay_rules` likewise with booleans.
      total_steps: length of the cosine.
      params: the parameters, or their shapes.

    Returns:
      (optimizer, learning-rate schedule).

    Raises:
      UserError: for an unknown `mu_dtype`, or a warm-up that is too long.
    """
    if optim.mu_dtype not in MU_DTYPES:
        raise UserError(f"optim.mu_dtype={optim.mu_dtype!r}: choose one of {', '.join(MU_DTYPES)}")
    schedule = make_schedule(optim, total_steps)
    given = optim.get("decay_rules")
    decay = match_rules(given or (), params, what="weight decay", defaults=DECAY_RULES)
    multiplier = match_rules(optim.get("lr_rules") or (), params, what="learning rate", defaults=((".*", 1.0),))
    parts = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm else []
    parts += [
        optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps, mu_dtype=optim.mu_dtype),
        optax.add_decayed_weights(optim.weight_decay, mask=decay),
        scale_by_tree(multiplier),
        optax.scale_by_learning_rate(schedule),
    ]
    return optax.chain(*parts), schedule


def scale_by_tree(multiplier: Any) -> optax.GradientTransformation:
    """Multiplies each update by what stands at its place in `multiplier`.

    A Python float (1.0 is a no-op, 0.0 freezes), or a tuple of them, one for each entry along the update's axis 0.
    """

    def scale(u: jax.Array, m: float | tuple[float, ...]) -> jax.Array:
        if isinstance(m, tuple):
            return u * np.asarray(m, u.dtype).reshape(-1, *[1] * (u.ndim - 1))
        return u if m == 1.0 else u * m

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        return jax.tree.map(scale, updates, multiplier), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
