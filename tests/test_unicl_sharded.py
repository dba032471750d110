"""The device-parallel UniCL loss against the global one: value, metrics, gradients, and what each device holds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from florence_jax.losses.unicl import unicl, unicl_sharded
from florence_jax.params.sharding import BATCH_AXES, make_mesh


def problem(size, dim, classes, seed=0):
    rng = np.random.default_rng(seed)
    unit = lambda x: jnp.float32(x / np.linalg.norm(x, axis=1, keepdims=True))  # noqa: E731
    image, text = unit(rng.normal(size=(size, dim))), unit(rng.normal(size=(size, dim)))
    number = rng.integers(0, classes, size)
    return image, text, jnp.asarray(np.stack([number // 4, number % 4], axis=1), jnp.int32)


def sharded(mesh):
    """Jitted value (with metrics) and gradients of the sharded loss; arguments image, text, scale, labels."""

    def loss(image, text, scale, labels):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return unicl_sharded(image, text, labels, scale, BATCH_AXES)

    rows, whole = NamedSharding(mesh, PartitionSpec(BATCH_AXES)), NamedSharding(mesh, PartitionSpec())
    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    return jax.jit(gradient, in_shardings=(rows, rows, whole, rows))


def relative(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@pytest.mark.parametrize("data,fsdp", [(8, 1), (2, 4)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equals_the_global_loss(data, fsdp, scale):
    image, text, labels = problem(64, 16, classes=20)
    want = jax.value_and_grad(lambda i, t, s: unicl(i, t, labels, s), argnums=(0, 1, 2), has_aux=True)
    (value, metrics), grads = want(image, text, jnp.float32(scale))
    (got, got_metrics), got_grads = sharded(make_mesh(data, fsdp))(image, text, jnp.float32(scale), labels)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    assert set(got_metrics) == set(metrics)
    for name in metrics:
        np.testing.assert_allclose(got_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
    for a, b in zip(got_grads, grads, strict=True):
        assert relative(a, b) < 1e-5


def test_ties_are_broken_as_in_the_global_loss():
    """Identical images make every column a tie, across devices too; argmax takes the first row of the batch."""
    image, text, labels = problem(16, 4, classes=3)
    image = jnp.broadcast_to(image[:1], image.shape)
    _, want = unicl(image, text, labels, 5.0)
    (_, got), _ = sharded(make_mesh(8, 1))(image, text, jnp.float32(5.0), labels)
    assert 0 < float(want["t2i_accuracy"]) < 1
    assert got["t2i_accuracy"] == want["t2i_accuracy"] and got["i2t_accuracy"] == want["i2t_accuracy"]


def test_each_device_holds_its_rows_only():
    """No matrix of the compiled program is B x B: the logits exist as rows only."""
    size = 512
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((size, 8), (size, 8), ())]
    compiled = sharded(make_mesh(8, 1)).lower(*shapes, jax.ShapeDtypeStruct((size, 2), jnp.int32)).compile()
    sides = {tuple(map(int, pair)) for pair in re.findall(r"f32\[(\d+),(\d+)\]", compiled.as_text())}
    assert (size // 8, size) in sides and (size, size) not in sides
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * size**2
