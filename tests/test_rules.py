"""Path rules: first match wins, and neither a leaf nor a rule may be left over."""

import jax
import jax.numpy as jnp
import pytest

from florence_jax.errors import UserError
from florence_jax.models import florence
from florence_jax.params.rules import match_rules, path_string
from florence_jax.train.optim import DECAY_RULES

TREE = {"a": {"kernel": 1, "bias": 2}, "b": {"kernel": 3}}


def test_first_match_wins():
    values = match_rules(((r"a/kernel", "x"), (r".*/kernel", "y"), (r".*", "z")), TREE, what="test")
    assert values == {"a": {"kernel": "x", "bias": "z"}, "b": {"kernel": "y"}}


def test_all_offenders_are_listed():
    with pytest.raises(UserError) as error:
        match_rules(((r".*/kernel", 1), (r"c/.*", 2), (r"a/kernel", 3)), TREE, what="test")
    message = str(error.value)
    assert "a/bias" in message and "'c/.*'" in message and "'a/kernel'" in message


@pytest.mark.parametrize("rules", [((r"(", 1),), (r".*", 1), ((r".*",),)])
def test_rules_of_another_form_are_one_message(rules):
    with pytest.raises(UserError, match="test rules .*write "):
        match_rules(rules, TREE, what="test")


def test_default_rules_may_decide_nothing_but_every_leaf_has_one():
    assert match_rules(((r"a/.*", 2),), TREE, what="test", defaults=((r"c", 0), (r".*", 1))) == {
        "a": {"kernel": 2, "bias": 2},
        "b": {"kernel": 1},
    }
    with pytest.raises(UserError, match="parameters without a rule: a/bias"):
        match_rules((), TREE, what="test", defaults=((r"c", 0), (r".*/kernel", 1)))


@pytest.mark.parametrize("variant", ["ti", "T", "H"])
def test_vectors_tables_and_temperature_are_not_decayed(variant):
    params = jax.eval_shape(florence.build(variant).init, jax.random.key(0))
    decay = match_rules(DECAY_RULES, params, what="weight decay")
    for (path, leaf), decayed in zip(
        jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(decay), strict=True
    ):
        name = path_string(path)
        matrix = name.endswith("kernel")
        assert decayed == matrix, name
        assert not (matrix and jnp.ndim(leaf) < 2), name
