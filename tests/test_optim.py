"""The optimizer: schedule, decay, clipping and per-path learning rates."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import common
from florence_jax.errors import UserError
from florence_jax.train.optim import make_optimizer, make_schedule

PARAMS = {
    "a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "logit_scale": jnp.ones(()),
    "b": {"scale": jnp.ones(2)},
    "t": {"token_embedding": jnp.ones((3, 2))},
}


def settings(**changes):
    optim = common("unused").optim
    optim.update(changes)
    return optim


def test_schedule_warms_up_and_ends_at_the_final_fraction():
    schedule = make_schedule(settings(learning_rate=2.0, warmup_steps=10, final_fraction=0.1), 100)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10), schedule(100)], [0, 1, 2, 0.2], rtol=1e-6)
    assert schedule(40) > schedule(60) > schedule(80)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warmup_steps=100"):
        make_schedule(settings(warmup_steps=100), 100)


def test_one_step_equals_adamw_by_hand():
    optim = settings(learning_rate=0.1, weight_decay=0.5, clip_norm=0.0, final_fraction=1.0)
    optimizer, _ = make_optimizer(optim, 10, PARAMS)
    grads = {
        "a": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, -2.0)},
        "logit_scale": jnp.zeros(()),
        "b": {"scale": jnp.zeros(2)},
        "t": {"token_embedding": jnp.zeros((3, 2))},
    }
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    # Adam's first step has unit length per entry; only the matrix is decayed.
    np.testing.assert_allclose(updates["a"]["kernel"], -0.1 * (1 + 0.5), rtol=1e-5)
    np.testing.assert_allclose(updates["a"]["bias"], 0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["t"]["token_embedding"], 0.0)


def test_learning_rate_rules_freeze_and_scale():
    optim = settings(
        learning_rate=0.1, weight_decay=0.0, final_fraction=1.0, lr_rules=(("a/bias", 0.0), ("a/.*", 0.5), (".*", 1.0))
    )
    optimizer, _ = make_optimizer(optim, 10, PARAMS)
    ones = {
        "a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "logit_scale": jnp.ones(()),
        "b": {"scale": jnp.ones(2)},
        "t": {"token_embedding": jnp.ones((3, 2))},
    }
    updates, _ = optimizer.update(ones, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["a"]["bias"], 0.0)
    np.testing.assert_allclose(updates["a"]["kernel"], 0.5 * updates["t"]["token_embedding"][:2], rtol=1e-6)
