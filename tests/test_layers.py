"""Layers with derivatives of their own: those of the definition, under every transformation, and what they keep."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from florence_jax.models.coswin import CoSwin
from florence_jax.models.layers import Dense, QueryKeyValue, add_bias, layer_norm, split_heads
from florence_jax.models.text import TextTransformer
from florence_jax.params.sharding import make_mesh


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def norm_and_bias(x, scale, bias):
    return add_bias(layer_norm(x, scale, bias, 1e-5), 2 * bias)


def plain_norm_and_bias(x, scale, bias):
    """The same numbers by functions whose derivatives are JAX's."""
    row = (1,) * (x.ndim - 1)
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return y * scale.reshape(*row, -1) + bias.reshape(*row, -1) + 2 * bias.reshape(*row, -1)


def twice(function):
    """The parameters are used in each of two steps of a scan, of recomputed bodies, for each of a batch's examples."""

    def loss(x, scale, bias):
        def step(x, _):
            return jax.vmap(lambda one: function(one, scale, bias))(x) + jnp.sin(x), None

        x, _ = jax.lax.scan(jax.checkpoint(step), x, length=2)
        return jnp.square(x).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-13)])
def test_norm_and_bias_have_their_derivatives(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        arguments = 3 + normal(0, 4, 5, 16, dtype=dtype), 1 + normal(1, 16, dtype=dtype), normal(2, 16, dtype=dtype)
        got, want = twice(norm_and_bias)(*arguments), twice(plain_norm_and_bias)(*arguments)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


def test_parameters_gather_their_gradients_in_a_shard_map():
    mesh = make_mesh(4, 1, jax.devices()[:4])
    arguments = normal(0, 8, 3, 16), 1 + normal(1, 16), normal(2, 16)
    specs = PartitionSpec("data"), PartitionSpec(), PartitionSpec()

    def gradients(function):
        return jax.jit(jax.grad(lambda *given: jnp.square(function(*given)).sum(), (0, 1, 2)))(*arguments)

    split = jax.shard_map(norm_and_bias, mesh=mesh, in_specs=specs, out_specs=specs[0])
    for a, b in zip(gradients(split), gradients(norm_and_bias), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_three_products_are_one_layer_and_its_heads():
    """Fresh parameters, outputs and gradients."""
    x, fused, parts = normal(0, 2, 3, 5, 16), Dense(48), QueryKeyValue(heads=4)
    params = jax.jit(parts.init)(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, jax.jit(fused.init)(jax.random.key(0), x))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * normal(leaf.size, *leaf.shape), params)

    def gradients(attend):
        loss = lambda params, x: sum(jnp.sin((i + 1) * part).sum() for i, part in enumerate(attend(params, x)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)

    got, want = gradients(parts.apply), gradients(lambda params, x: split_heads(fused.apply(params, x), 4))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


IMAGE = CoSwin(width=16, depths=(6,), heads=(2,), window=4, dtype=jnp.bfloat16)
TEXT = TextTransformer(vocab_size=9, length=24, width=16, layers=3, heads=2, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("tower", "inputs", "count"),
    [
        (IMAGE, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.bfloat16), 2 * 64 * 16),
        (TEXT, jax.ShapeDtypeStruct((2, 24), jnp.int32), 2 * 24 * 16),
    ],
    ids=["image", "text"],
)
def test_scans_keep_no_float32_array_of_a_map(tower, inputs, count):
    """Of what the derivative of a scanned tower in bfloat16 keeps; `count`: numbers in a map."""
    params = jax.eval_shape(tower.init, jax.random.key(0), inputs)
    kept = jax.eval_shape(lambda params, x: jax.vjp(lambda params: tower.apply(params, x), params)[1], params, inputs)
    arrays = [leaf for leaf in jax.tree.leaves(kept) if leaf.shape[:1] == (3,)]
    sizes = {name: [math.prod(x.shape[1:]) for x in arrays if x.dtype == name] for name in ("float32", "bfloat16")}
    assert sizes["bfloat16"].count(count) >= 4 and max(sizes["float32"]) < count
