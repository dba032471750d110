"""Fine-tuning: what it takes from the size of the set, which parameters it keeps, what it says beside a probe."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import config_dict

from florence_jax.errors import UserError
from florence_jax.evaluators.finetuning import NOT_BEATEN, BesideProbe, BesideStart, Forgetting, Remade, Validation
from florence_jax.tasks.base import EVALUATIONS, make_plan
from florence_jax.tasks.recipe import LARGE, PAPER, fine_tuning_recipe
from florence_jax.train.defaults import common
from florence_jax.train.optim import AVERAGE_SHARE, average_decay
from florence_jax.train.state import counters, eval_part, init_state, keep_best, start_from, take_best


@pytest.mark.parametrize("examples,batch", [(20, 16), (200, 16), (400, 32), (800, 64), (2245, 128), (50_000, 128)])
def test_small_sets_get_a_batch_and_steps_of_their_size(examples, batch):
    recipe = fine_tuning_recipe(examples, 256)
    assert recipe.batch_size == batch and 10 <= recipe.epochs <= 100
    steps = recipe.epochs * examples / batch
    assert 250 < steps or recipe.epochs == 100
    assert steps < 350 or recipe.epochs == 10
    # A batch of the user's own changes the epochs and the rate, a wider tower the rate alone.
    own = fine_tuning_recipe(examples, 256, 4 * batch)
    assert own.learning_rate == 2 * recipe.learning_rate and own.epochs >= recipe.epochs
    assert fine_tuning_recipe(examples, 1024) == recipe._replace(learning_rate=recipe.learning_rate / 4)


def test_sets_of_the_papers_size_get_the_papers_recipe():
    assert fine_tuning_recipe(LARGE, 256) == fine_tuning_recipe(None, 256) == PAPER == (8192, 10, 2e-5, 500)


def open_config(**changes):
    config = common("unused")
    config.eval.every, config.total_steps = -1, 0
    config.batch_size, config.epochs = config_dict.placeholder(int), config_dict.placeholder(int)
    config.optim.learning_rate = config_dict.placeholder(float)
    config.optim.warmup_steps = config_dict.placeholder(int)
    config.update_from_flattened_dict(changes)
    return config


def test_a_plan_takes_what_the_configuration_leaves_open():
    plan = make_plan(open_config(), 800, fine_tuning_recipe(800, 256))
    assert (plan.batch_size, plan.total_steps, plan.warmup_steps) == (64, 24 * 12, 28)
    assert plan.learning_rate == pytest.approx(3e-4) and plan.total_steps / plan.eval_every <= EVALUATIONS
    changes = {"batch_size": 32, "epochs": 3, "optim.learning_rate": 0.0, "optim.warmup_steps": 2}
    plan = make_plan(open_config(**changes), 800, fine_tuning_recipe(800, 256, 32))
    assert plan == (32, 75, 2, 0.0, 25, 7)
    # ImageNet: the paper's 1,560 steps.
    plan = make_plan(open_config(), 1_281_167, fine_tuning_recipe(1_281_167, 2048))
    assert plan == (8192, 1560, 156, 2e-5, 156, 50)


def test_the_horizon_of_the_average_follows_the_length_of_the_run():
    assert average_decay(0.998, 1400) == 0.998 and average_decay(0.0, 10) == 0.0
    for steps in (500, 20):
        left = average_decay(0.998, steps) ** steps
        assert 0.04 < left < 0.07  # of the first weights, where 37 % and more were left
    assert 1 / (1 - average_decay(0.9999, 1560)) == pytest.approx(AVERAGE_SHARE * 1560)
    assert average_decay(0.9, 2) == 0.0
    with pytest.raises(UserError, match=r"optim.ema_decay=1.0 must be at least 0 .* and below 1"):
        average_decay(1.0, 100)


@pytest.mark.parametrize("ema", [False, True])
def test_the_best_parameters_are_kept_and_taken_in_the_end(ema):
    frozen = {"still"}
    state = init_state({"a": jnp.zeros(2), "still": jnp.ones(1)}, optax.sgd(1.0), ema=ema, frozen=frozen, best=True)
    state = start_from(state, {"a": jnp.ones(2), "still": jnp.ones(1)}, frozen)
    np.testing.assert_array_equal(state["best"]["params"]["a"], 1)

    def at(step, value):  # as a step would leave it; the average is what is evaluated where there is one
        new = {"step": jnp.int32(step), "params": {"a": jnp.full(2, value), "still": jnp.ones(1)}}
        return state | new | ({"ema": {"a": jnp.full(2, value + 0.5)}} if ema else {})

    for step, score in ((0, 0.3), (10, 0.8), (20, 0.8), (30, 0.7), (40, np.nan)):
        state = keep_best(at(step, float(step)), score, 100, frozen)
    assert counters(state) == {"step": 40, "skipped_records": 0, "kept_step": 20}
    assert float(state["best"]["score"]) == pytest.approx(0.8)
    taken = take_best(state)
    np.testing.assert_array_equal(taken["params"]["a"], 20.5 if ema else 20)
    np.testing.assert_array_equal(taken["params"]["still"], 1)
    assert not ema or taken["ema"]["a"].tolist() == [20.5, 20.5]
    assert counters(eval_part(taken)) == counters(state)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.sharding, y.sharding), state["best"], taken["best"])


@pytest.mark.parametrize(
    "scores,kept",
    [
        ([0.90, 0.70, 0.80, 0.89], 0),  # none is as good as the start
        ([0.50, 0.80, 0.79, 0.77], 3),  # the error of .8 is .04: the last is as good as any
        ([0.50, 0.80, 0.77, 0.75], 2),  # and does not add up from one to the next
        ([0.50, 0.80, 0.75, 0.90, 0.85], 3),
        ([0.80, 0.81, 0.79, 0.78], 1),  # but the start must be reached
        ([None, 0.80, 0.70, 0.60], 1),  # a start that is not among them
    ],
)
def test_of_what_the_images_cannot_tell_apart_the_last_is_kept(scores, kept):
    state = init_state({"a": jnp.zeros(1)}, optax.sgd(1.0), ema=False, best=True)
    for step, score in enumerate(scores):
        if score is not None:
            state = keep_best(state | {"step": jnp.int32(step)}, score, 100, ())
    assert counters(state)["kept_step"] == kept


class Scored:
    """Stands for a classification of 100 images."""

    name, metric, charts, sources = "test", "top1", (), ()
    chance = {"top1": 0.1, "mean_per_class": 0.1}

    def __init__(self, value):
        self.value = value

    def run(self, params):
        return {"top1": self.value, "mean_per_class": 0.5, "images": 100.0}

    def report(self):
        return ["<p>inner</p>"]

    def files(self):
        return {"predictions.csv": b""}


@pytest.mark.parametrize("value,beaten", [(0.95, True), (0.9, False), (0.7, False)])
def test_the_probe_stands_beside_and_it_is_said_where_it_is_not_beaten(value, beaten, caplog):
    evaluator = BesideProbe(Scored(value), lambda params: {"top1": 0.9, "log10_c": 0.0})
    assert evaluator.run(None) == {"top1": value, "mean_per_class": 0.5, "images": 100.0, "probe_top1": 0.9}
    assert evaluator.chance == {"top1": 0.1, "mean_per_class": 0.1, "probe_top1": 0.1}
    sentence, inner = evaluator.report()
    assert f"fine-tuned top1 {value:.3f}, a linear probe of the first weights 0.900" in sentence
    assert "standard error about 0.030" in sentence and inner == "<p>inner</p>"
    assert (NOT_BEATEN in sentence) is (NOT_BEATEN in caplog.text) is ('class="warning"' in sentence) is not beaten
    assert evaluator.files() == {"predictions.csv": b""}


def test_held_out_images_give_one_number():
    held = Validation(Scored(0.8))
    assert held.run(None) == {"top1": 0.8} and held.chance == {"top1": 0.1} and held.report() == []


# -- beside the first weights -----------------------------------------------------------------------------------------


class Sum:
    """An evaluator whose AP is the sum of the parameters."""

    name, metric, charts, chance, sources = "test", "AP", (), {"AP": 0.1}, ("data",)

    def run(self, params):
        return {"AP": float(sum(params.values())), "images": 3.0}

    def report(self):
        return ["<p>inner</p>"]

    def files(self):
        return {"boxes.json": b"[]"}


def test_what_the_first_weights_scored_stands_beside():
    asked = []

    def initial(params):
        asked.append(params)
        return {"a": 0.25}

    beside = BesideStart(Sum(), initial, "the detector of DIR")
    assert (
        beside.report() == ["<p>inner</p>"]
        and beside.chance == {"AP": 0.1, "start_AP": 0.1}
        and beside.sources == ("data",)
    )
    assert beside.run({"a": 0.5}) == {"AP": 0.5, "images": 3.0, "start_AP": 0.25}
    assert beside.run({"a": 0.75})["start_AP"] == 0.25 and len(asked) == 1  # measured once
    said = "test: AP 0.250 before this training, by the detector of DIR, 0.750 after it."
    assert beside.report() == [f"<p>{said}</p>", "<p>inner</p>"] and beside.files() == {"boxes.json": b"[]"}


def test_a_set_without_anything_to_find_has_no_headline():
    empty = SimpleNamespace(name="empty", metric="AP", charts=(), run=lambda params: {"images": 1.0}, report=list)
    assert BesideStart(empty, dict, "the detector of DIR").run({}) == {"images": 1.0}
    watch = Forgetting(empty, dict, 0.05)
    assert watch.run({}) == {} and "there is nothing to find" in watch.report()[0]


def test_forgetting_of_parameters_that_are_made_of_the_trained_ones():
    """Of a class-agnostic detector: the first class layer on the trained rest."""
    made = Remade(Sum(), lambda params: params | {"layer": 0.5}, "test_zero_shot")
    watch = Forgetting(made, lambda params: params | {"a": 0.4}, 0.05, "config.keep_zero_shot")
    found = watch.run({"a": 0.1, "layer": -3.0})
    assert watch.name == "test_zero_shot" and made.chance == {"AP": 0.1} and made.sources == ("data",)
    assert found == pytest.approx({"before": 0.9, "now": 0.6, "drop": 0.3})
    assert "fell from 0.900 to 0.600" in watch.report()[0] and "(config.keep_zero_shot)" in watch.report()[0]
    assert not watch.files() and not Remade(Sum(), dict, "x").files()
