"""AdamW with weight decay and learning rate by path, frozen parts, warm-up and three schedules, gradient clipping."""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from florence_jax.errors import UserError
from florence_jax.params.rules import Policy, Rules, frozen_paths, lr_multipliers, match_rules, split

# Vectors (norm scales, biases), the bias tables, embeddings and the logit scale are not decayed (UniCL's intent).
DECAY_RULES: Rules[bool] = (
    (r".*/(bias|scale)", False),
    (r".*/(relative_position_bias_table|position_embedding|token_embedding|class_embedding)", False),
    (r"logit_scale|logit_bias", False),
    (r".*", True),
)
MU_DTYPES = ("float32", "bfloat16")
SCHEDULES = ("cosine", "linear", "steps")
AVERAGE_SHARE = 0.36  # of a run: the longest horizon of its moving average
NO_POLICY = Policy()


def make_schedule(optim: ConfigDict, total_steps: int) -> optax.Schedule:
    """Linear warm-up over `optim.warmup_steps` to `optim.learning_rate`, then `optim.schedule`.

    The warm-up's first update has 1 / (warmup_steps + 1) of the rate, not 0, so that no step does nothing.

    'cosine' and 'linear' fall to `optim.final_fraction` of it at the last step; 'steps' stays, and is multiplied by
    `optim.step_factor` at each of `optim.step_at`, shares of all steps.

    Raises:
      UserError: if the warm-up does not end before the last step; for an unknown schedule, and shares that do not
        ascend between the end of the warm-up and 1.
    """
    peak, warmup = optim.learning_rate, optim.warmup_steps
    if not 0 <= warmup < total_steps:
        raise UserError(f"optim.warmup_steps={warmup} must be at least 0 and below total_steps={total_steps}")
    if optim.schedule not in SCHEDULES:
        raise UserError(f"optim.schedule={optim.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    first = peak / (warmup + 1)
    if optim.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=first,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=total_steps,
            end_value=peak * optim.final_fraction,
        )
    if optim.schedule == "linear":
        after = optax.linear_schedule(peak, peak * optim.final_fraction, total_steps - warmup)
    else:
        places = [round(share * total_steps) - warmup for share in optim.step_at]
        if places != sorted(set(places)) or not all(0 < place < total_steps - warmup for place in places):
            raise UserError(
                f"optim.step_at={tuple(optim.step_at)}: shares of the {total_steps} steps, ascending, each after the "
                f"{warmup} of the warm-up and below 1, such as (0.67, 0.92)"
            )
        after = optax.piecewise_constant_schedule(peak, dict.fromkeys(places, optim.step_factor))
    return optax.join_schedules([optax.linear_schedule(first, peak, warmup), after], [warmup]) if warmup else after


def average_decay(decay: float, total_steps: int) -> float:
    """The decay of the moving average, whose horizon, 1 / (1 - decay) steps, is at most `AVERAGE_SHARE` of the run.

    A longer one would leave more of the first weights in the average than they are worth: of a horizon as long as the
    run it is 37 % at the end, of this one 6 %.

    Raises:
      UserError: for a decay that is not below 1.
    """
    if not 0 <= decay < 1:
        raise UserError(f"optim.ema_decay={decay} must be at least 0 (no moving average) and below 1")
    return min(decay, max(1 - 1 / (AVERAGE_SHARE * total_steps), 0.0))


class Optimizer(NamedTuple):
    """What trains the parameters of a run.

    Attributes:
      transform: of the parameters that are trained, without the frozen ones.
      schedule: learning rate by step.
      frozen: paths of the parameters whose learning rate is 0: they have no gradient, no moments, no decay, no moving
        average and no part in the clip norm. For `rules.split`.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    frozen: frozenset[str]


def make_optimizer(optim: ConfigDict, total_steps: int, params: Any, policy: Policy = NO_POLICY) -> Optimizer:
    """Builds the optimizer of a run.

    Args:
      optim: `learning_rate`, `warmup_steps`, `schedule` and what belongs to it (see `make_schedule`), `b1`, `b2`,
        `eps`, `mu_dtype` (how the first moment is stored, `MU_DTYPES`; computed in float32 either way),
        `weight_decay`, `clip_norm` (0 = off), `lr_rules` ((pattern, multiplier) pairs; a multiplier of 0 freezes; a
        tuple has one for each of the blocks stacked along axis 0), `decay_rules` likewise with booleans.
      total_steps: length of the schedule.
      params: the parameters, or their shapes.
      policy: the task's rules, asked after those of `optim`.

    Raises:
      UserError: for an unknown `mu_dtype`, as `make_schedule` and `rules.match_rules`, or if nothing is trained.
    """
    if optim.mu_dtype not in MU_DTYPES:
        raise UserError(f"optim.mu_dtype={optim.mu_dtype!r}: choose one of {', '.join(MU_DTYPES)}")
    schedule = make_schedule(optim, total_steps)
    multiplier = lr_multipliers(optim.lr_rules, params, policy)
    frozen = frozen_paths(multiplier)
    decay = match_rules(optim.decay_rules, params, what="weight decay", defaults=(*policy.decay, *DECAY_RULES))
    decay, multiplier = split(decay, frozen)[0], split(multiplier, frozen)[0]
    if not multiplier:
        raise UserError(
            "the learning rate of all parameters is 0, so that nothing is trained: see config.optim.lr_rules"
        )
    parts = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm else []
    parts += [
        optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps, mu_dtype=optim.mu_dtype),
        optax.add_decayed_weights(optim.weight_decay, mask=decay),
        scale_by_tree(multiplier),
        optax.scale_by_learning_rate(schedule),
    ]
    return Optimizer(optax.chain(*parts), schedule, frozen)


def scale_by_tree(multiplier: Any) -> optax.GradientTransformation:
    """Multiplies each update by what stands at its place in `multiplier`.

    A Python float (1.0 is a no-op), or a tuple of them, one for each entry along the update's axis 0.
    """

    def scale(u: jax.Array, m: float | tuple[float, ...]) -> jax.Array:
        if isinstance(m, tuple):
            return u * np.asarray(m, u.dtype).reshape(-1, *[1] * (u.ndim - 1))
        return u if m == 1.0 else u * m

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        return jax.tree.map(scale, updates, multiplier), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
