"""The gradient cache against the whole batch: value, every gradient, memory, and what moves between devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.pretrain import get_config
from florence_jax.errors import UserError
from florence_jax.losses.unicl import unicl_reference
from florence_jax.params.sharding import batch_sharding, make_mesh, param_shardings, state_shardings
from florence_jax.tasks.encoder import normalise
from florence_jax.tasks.pretrain import Pretrain
from florence_jax.train.state import init_state
from florence_jax.train.step import make_train_step

BATCH = 32
QUICK = {"xla_backend_optimization_level": 0}  # halves the compilation; the same program and the same buffers
COLLECTIVE = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\("
SIZES = dict(
    res=32, image_width=16, depths=(2,), heads=(1,), window=4, drop_path=0.3, text_width=16, text_layers=1,
    text_heads=2, text_length=8, projection=16,
)  # fmt: skip


def task(micro_batch=0, towers="both", **sizes):
    config = get_config()
    config.model.overrides.update(SIZES | sizes)
    config.grad_cache.update(micro_batch=micro_batch, towers=towers)
    return Pretrain(config)


def random_batch(size=BATCH):
    """Two texts a picture, as get_config() asks for."""
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (size, 32, 32, 3)), jnp.uint8),
        "text": jnp.asarray(rng.integers(4, 500, (size, 2, 8)), jnp.int32),
        "label": jnp.asarray(rng.integers(0, 5, (size, 2, 2)), jnp.int32),
    }


def gradient(task):
    return jax.jit(jax.value_and_grad(task.loss, has_aux=True), compiler_options=QUICK)


@pytest.fixture(scope="module")
def whole():
    """Parameters, and `key -> (value, gradients)` of the whole batch encoded at once."""
    plain = task()
    params = jax.jit(plain.init)(jax.random.key(0))
    function = gradient(plain)

    def value_and_grad(key):
        (loss, _), grads = function(params, random_batch(), key)
        return loss, grads

    return params, value_and_grad


def assert_same(got, want):
    """Every gradient to 1e-5 of its largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("micro_batch,towers", [(1, "both"), (8, "image")])
def test_equals_the_whole_batch(whole, micro_batch, towers):
    params, value_and_grad = whole
    loss, grads = value_and_grad(jax.random.key(7))
    assert abs(grads["logit_scale"]) > 1e-3
    (value, _), got = gradient(task(micro_batch, towers))(params, random_batch(), jax.random.key(7))
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    assert_same(got, grads)
    np.testing.assert_allclose(got["logit_scale"], grads["logit_scale"], rtol=1e-5)


def test_the_loss_of_several_texts_is_the_mean_of_unicl(whole):
    params, value_and_grad = whole
    pretrain, batch = task(), random_batch()
    inputs = {"image": normalise(batch["image"]), "example": jnp.arange(BATCH)}

    @jax.jit
    def encode(params):
        images = pretrain.model.apply(params, inputs, train=True, rngs={"drop_path": jax.random.key(7)})
        texts = [pretrain.predict["text"](params, {"text": batch["text"][:, k]}) for k in range(2)]
        return images["image/embedding"], texts, images["logit_scale"]

    images, texts, scale = encode(params)
    losses = [unicl_reference(images, texts[k], batch["label"][:, k], scale) for k in range(2)]
    assert abs(sum(losses[0]) - sum(losses[1])) > 1e-3
    np.testing.assert_allclose(value_and_grad(jax.random.key(7))[0], np.mean(losses), rtol=1e-5)


def test_stochastic_depth_matters(whole):
    """Otherwise the equality above would say nothing about it."""
    _, value_and_grad = whole
    assert np.ptp([value_and_grad(jax.random.key(i))[0] for i in (7, 8, 9)]) > 1e-3


def sharded_step(data, fsdp, micro_batch):
    """The compiled training step on a mesh, and its arguments' placement; plain SGD, so the update is the gradient."""
    cached, optimizer = task(micro_batch), optax.sgd(1.0)
    mesh = make_mesh(data, fsdp)
    shapes = jax.eval_shape(lambda key: init_state(cached.init(key), optimizer, ema=False), jax.random.key(0))
    shardings = state_shardings(shapes, param_shardings(shapes["params"], mesh), mesh)
    step = make_train_step(cached, optimizer, lambda step: 1.0, seed=0, ema_decay=0, mesh=mesh, shardings=shardings)
    batch = jax.eval_shape(random_batch) | {"corrupt": jax.ShapeDtypeStruct((BATCH,), jnp.int32)}
    return step.lower(shapes, batch).compile(QUICK), shardings, mesh, optimizer


@pytest.mark.parametrize("data,fsdp", [(8, 1), (2, 4)])
def test_over_devices(whole, data, fsdp):
    params, value_and_grad = whole
    compiled, shardings, mesh, optimizer = sharded_step(data, fsdp, 2)
    loss, grads = value_and_grad(jax.random.fold_in(jax.random.key(0), 0))
    state = jax.device_put(init_state(jax.tree.map(jnp.copy, params), optimizer, ema=False), shardings)
    batch = random_batch() | {"corrupt": jnp.zeros((BATCH,), jnp.int32)}
    state, metrics = compiled(state, jax.device_put(batch, batch_sharding(mesh)))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    update = jax.tree.map(lambda new, old: np.asarray(old) - np.asarray(new), state["params"], params)
    del update["logit_scale"], grads["logit_scale"]  # clamped
    for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(grads), strict=True):
        # The difference of two parameters carries their rounding, 1e-7 of a parameter near 1.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()) + 2e-7)

    collectives = [line for line in compiled.as_text().splitlines() if re.search(COLLECTIVE, line)]
    assert collectives and not any("u8[" in line for line in collectives)  # no image moves
    if fsdp == 1:
        assert not any("/while/body" in line for line in collectives)  # gradients are summed once, after the scan
        assert not any(" all-to-all(" in line or " collective-permute(" in line for line in collectives)


def test_memory_does_not_grow_with_the_batch():
    """But for the embeddings and the logits; without the cache the activations of every example are kept."""
    small, large = 32, 256
    params = jax.eval_shape(task().init, jax.random.key(0))

    def temporaries(micro_batch, size):
        batch = jax.eval_shape(lambda: random_batch(size))
        lowered = gradient(task(micro_batch)).lower(params, batch, jax.eval_shape(lambda: jax.random.key(0)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    growth = temporaries(8, large) - temporaries(8, small)
    embeddings, logits = 2 * 4 * 16 * large, 4 * large**2
    assert growth < 6 * embeddings + 4 * logits
    assert temporaries(0, large) > 10 * growth


@pytest.mark.parametrize(
    "options,message",
    [(dict(micro_batch=5), "micro_batch=5 must divide the 32"), (dict(micro_batch=8, towers="text"), "towers")],
)
def test_user_errors(options, message):
    bad = task(**options)
    params = jax.eval_shape(bad.init, jax.random.key(0))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(bad.loss, params, random_batch(), jax.random.key(0))
