"""The optimizer: schedule, decay, clipping and per-path learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from florence_jax.errors import UserError
from florence_jax.params.rules import Policy, split
from florence_jax.train.defaults import common
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
    rates = [schedule(step) for step in (0, 4, 9, 10, 100)]
    np.testing.assert_allclose(rates, [2 / 11, 10 / 11, 20 / 11, 2, 0.2], rtol=1e-6)  # no step does nothing
    assert schedule(40) > schedule(60) > schedule(80)


def test_linear_and_steps():
    linear = make_schedule(settings(learning_rate=2.0, warmup_steps=10, final_fraction=0.1, schedule="linear"), 110)
    rates = [linear(step) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(rates, [2 / 11, 12 / 11, 2, 1.1, 0.2], rtol=1e-6)
    steps = settings(learning_rate=2.0, warmup_steps=4, schedule="steps", step_at=(0.5, 0.8), step_factor=0.1)
    rates = [make_schedule(steps, 20)(step) for step in (0, 2, 4, 9, 10, 15, 16, 20)]
    np.testing.assert_allclose(rates, [0.4, 1.2, 2, 2, 0.2, 0.2, 0.02, 0.02], rtol=1e-5)
    steps.warmup_steps = 0
    np.testing.assert_allclose([make_schedule(steps, 20)(step) for step in (0, 9, 10)], [2, 2, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(schedule="square"), "optim.schedule='square' is unknown; choose one of cosine, linear, steps"),
        (dict(schedule="steps", step_at=(0.9, 0.5)), "step_at=.0.9, 0.5.: shares of the 100 steps, ascending"),
        (dict(schedule="steps", step_at=(0.1, 1.0)), "step_at"),
        (dict(schedule="steps", step_at=(0.1,), warmup_steps=10), "after the 10 of the warm-up"),
    ],
)
def test_schedules_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        make_schedule(settings(**changes), 100)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warmup_steps=100"):
        make_schedule(settings(warmup_steps=100), 100)


def test_one_step_equals_adamw_by_hand():
    optim = settings(learning_rate=0.1, weight_decay=0.5, clip_norm=0.0, final_fraction=1.0)
    optimizer = make_optimizer(optim, 10, PARAMS).transform
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
    optimizer, _, frozen = make_optimizer(optim, 10, PARAMS)
    assert frozen == {"a/bias"}
    trained, _ = split(PARAMS, frozen)
    updates, _ = optimizer.update(trained, optimizer.init(trained), trained)
    assert list(updates["a"]) == ["kernel"]
    np.testing.assert_allclose(updates["a"]["kernel"], 0.5 * updates["t"]["token_embedding"][:2], rtol=1e-6)


def test_the_configurations_rules_come_before_the_tasks():
    policy = Policy(lr=(("a/.*", 0.0), ("t/.*", 0.0)), decay=(("b/scale", True),))
    given = settings(lr_rules=(("a/kernel", 0.5),), clip_norm=0.0, weight_decay=1.0, learning_rate=1.0)
    optimizer, _, frozen = make_optimizer(given, 10, PARAMS, policy)
    assert frozen == {"a/bias", "t/token_embedding"}
    trained, _ = split(PARAMS, frozen)
    zeros = jax.tree.map(jnp.zeros_like, trained)
    updates, _ = optimizer.update(zeros, optimizer.init(trained), trained)  # nothing but weight decay
    np.testing.assert_allclose(updates["a"]["kernel"], -0.5)
    np.testing.assert_allclose(updates["b"]["scale"], -1.0)
    np.testing.assert_allclose(updates["logit_scale"], 0.0)
    with pytest.raises(UserError, match="rules that decide no parameter: 'gone'"):
        make_optimizer(settings(lr_rules=(("gone", 0.5),)), 10, PARAMS)
    with pytest.raises(UserError, match="nothing is trained"):
        make_optimizer(settings(lr_rules=((".*", 0.0),)), 10, PARAMS)
    with pytest.raises(UserError, match="'x' of 'a/.*' must be a number of at least 0"):
        make_optimizer(settings(lr_rules=(("a/.*", "x"),)), 10, PARAMS)
    with pytest.raises(UserError, match="some of the stacked blocks of a/kernel"):
        make_optimizer(settings(lr_rules=(("a/kernel", (0.0, 0.5)),)), 10, PARAMS)
