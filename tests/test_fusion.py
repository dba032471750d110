"""The fusion: METER's equations, who sees whom, dropout by example, one image for many texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from florence_jax.losses.language import answer_loss, masked_word_loss, match_loss
from florence_jax.models.fusion import FUSIONS, HEADS, build_fusion
from florence_jax.models.sizes import resolve_config

TOWERS = resolve_config(
    "ti", res=32, image_width=8, depths=(2, 2), heads=(1, 1), window=4, text_width=16, text_layers=1, text_heads=2,
    text_length=8, vocab_size=33, projection=8,
)  # fmt: skip
SIZES = dict(layers=2, width=16, head_width=8, token_types=3, heads=HEADS, answers=5)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model():
    return build_fusion(TOWERS, "ti", **SIZES)


@pytest.fixture(scope="module")
def params(model):
    shapes = jax.eval_shape(model.init, KEY)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), shapes)


def batch_of(texts, images=None, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.standard_normal((images or texts, 32, 32, 3)), jnp.float32),
        "text": jnp.asarray(rng.integers(1, 32, (texts, 8)), jnp.int32),
        "text_length": jnp.asarray(rng.integers(3, 7, texts), jnp.int32),
        "places": jnp.asarray(rng.integers(0, 3, (texts, 2)), jnp.int32),
        "example": jnp.arange(texts, dtype=jnp.int32),
    }


def test_outputs(model, params):
    batch = batch_of(2) | {"image2_index": jnp.array([1, 0], jnp.int32)}
    out = jax.eval_shape(model.apply, params, batch)
    shapes = {name: out[name].shape for name in out if "/" not in name and name != "logit_scale"}
    assert shapes == {
        "image_tokens": (2, 16, 16), "text_tokens": (2, 8, 16), "fused_text": (2, 8, 16), "fused_image": (2, 16, 16),
        "pooled": (2, 32), "attention": (2, 16), "itm_logits": (2, 2), "mlm_logits": (2, 2, 33),
        "answer_logits": (2, 5), "nlvr2_logits": (2, 2), "snli_ve_logits": (2, 3), "rank_logits": (2, 1),
    }  # fmt: skip
    assert FUSIONS["ti"].width // FUSIONS["ti"].head_width == 2


def test_losses_train(model, params):
    """A few steps on one batch bring all three losses down."""
    batch = batch_of(4)
    match, targets = jnp.array([1, 0, 1, 0]), batch["text"][:, :2]
    labels = jnp.array([[0, 3], [1, -1], [2, -1], [4, -1]])

    @jax.jit
    def step(params):
        def loss(params):
            out = model.apply(params, batch, train=True, rngs={"dropout": KEY, "drop_path": KEY})
            sums = (
                masked_word_loss(out["mlm_logits"], targets),
                match_loss(out["itm_logits"], match),
                answer_loss(out["answer_logits"], labels, jnp.full((4, 2), 0.6)),
            )
            return sum(part.mean for part in sums)

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)

    values = []
    for _ in range(4):
        value, params = step(params)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0] and np.isfinite(values).all()
