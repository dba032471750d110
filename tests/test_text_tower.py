"""The text tower against the reference module's numbers, and its options against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import random_params, text_params

from florence_jax.errors import UserError
from florence_jax.models.text import TextTransformer

SIZES = dict(vocab_size=20, length=6, width=8, layers=2, heads=2)
IDS = jnp.array([[18, 5, 7, 19, 0, 0], [18, 3, 19, 19, 19, 19]])


def apply(ids, lengths=None, **options):
    return jax.jit(TextTransformer(**SIZES | options).apply)({"params": text_params()}, jnp.asarray(ids), lengths)


def test_golden():
    """UniCL's tower (eps 1e-12, causal, pooled at the largest id): pooled state before the projection."""
    expected = [
        [-2.38813656, -0.35507082, -0.34748451, 1.76719163, 1.06719306, 1.50981569, 0.07379498, -0.19010799],
        [-1.85424920, 0.50615503, 0.53636233, 2.20303496, 1.05953941, 0.94095802, -0.55075544, -0.84665050],
    ]
    np.testing.assert_allclose(apply(IDS, eps=1e-12)["pooled"], expected, atol=1e-5)


def test_causal_tower_ignores_later_tokens():
    changed = IDS.at[0, 4:].set(jnp.array([3, 9]))
    a, b = apply(IDS)["tokens"], apply(changed)["tokens"]
    np.testing.assert_array_equal(a[0, :4], b[0, :4])
    assert jnp.abs(a[0, 4:] - b[0, 4:]).max() > 1e-2


def test_non_causal_tower_ignores_padding_only():
    a = apply([[18, 5, 7, 19, 0, 0]], causal=False, pooling="mean")
    b = apply([[18, 5, 7, 19]], causal=False, pooling="mean")
    np.testing.assert_allclose(a["tokens"][:, :4], b["tokens"], atol=1e-5)
    np.testing.assert_allclose(a["pooled"], b["tokens"].mean(1), atol=1e-5)
    later = apply([[18, 5, 7, 2]], causal=False)["tokens"]
    assert jnp.abs(later[:, 0] - b["tokens"][:, 0]).max() > 1e-3  # the first token sees the last
    assert bool(jnp.isfinite(apply([[0, 0, 0]], causal=False, pooling="mean")["pooled"]).all())


@pytest.mark.parametrize(
    "options",
    [dict(causal=False, pooling="mean"), dict(causal=False, pooling="eot"), dict(pooling="eos", eot_id=19), dict()],
)
def test_padding_is_known_by_length(options):
    """Id 0 is a word, whatever lies behind the text is not, and more of it changes nothing."""
    texts, lengths = jnp.array([[18, 0, 7, 19, 0], [18, 19, 19, 3, 3]]), jnp.array([4, 2])
    got = apply(texts, lengths, **options)["pooled"]
    again = apply(jnp.concatenate([texts, jnp.array([[5], [19]])], 1), lengths, **options)["pooled"]
    np.testing.assert_allclose(again, got, atol=1e-6)
    alone = apply(texts[:1, :4], lengths[:1], **options)["pooled"]
    np.testing.assert_allclose(got[:1], alone, atol=1e-6)
    if not options.get("causal", True):
        assert jnp.abs(got[0] - apply(texts, **options)["pooled"][0]).max() > 1e-3  # known by its id, 0 is left out


def test_lengths_of_usual_texts_change_nothing():
    for options in (dict(causal=False, pooling="mean"), dict()):
        want, got = apply(IDS[:1], **options), apply(IDS[:1], jnp.array([4]), **options)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    "options,index", [(dict(pooling="eot"), 3), (dict(pooling="first"), 0), (dict(pooling="eos", eot_id=7), 2)]
)
def test_pooling_position(options, index):
    outputs = apply(IDS[:1], **options)
    np.testing.assert_allclose(outputs["pooled"], outputs["tokens"][:, index], atol=1e-6)


def test_scan_equals_unrolled():
    sizes = SIZES | dict(layers=4)
    unrolled = TextTransformer(**sizes, scan=False)
    params = random_params(unrolled, IDS, scale=0.3)
    stacked = dict(params)
    stacked["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[stacked.pop(f"layer{i}") for i in range(4)])
    want = jax.jit(unrolled.apply)({"params": params}, IDS)["pooled"]
    for remat in ("none", "block"):
        got = jax.jit(TextTransformer(**sizes, remat=remat).apply)({"params": stacked}, IDS)["pooled"]
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_bfloat16_stays_close_to_float32():
    low = apply(IDS, dtype=jnp.bfloat16)
    assert low["tokens"].dtype == jnp.bfloat16 and low["pooled"].dtype == jnp.float32
    np.testing.assert_allclose(low["pooled"], apply(IDS)["pooled"], atol=0.1)


def test_activation_option():
    assert jnp.abs(apply(IDS)["pooled"] - apply(IDS, activation="gelu")["pooled"]).max() > 1e-3


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(length=4), "text_length"),
        (dict(pooling="cls"), "text_pooling"),
        (dict(activation="relu"), "text_activation"),
        (dict(heads=3), "text_heads"),
    ],
)
def test_user_errors(options, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(TextTransformer(**SIZES | options).init, jax.random.key(0), IDS)
