"""Losses of vision and language against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from florence_jax.losses.language import LossSums, answer_loss, class_loss, masked_word_loss, match_loss
from florence_jax.params.sharding import make_mesh


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def assert_sums(got, loss, right, number):
    np.testing.assert_allclose([float(each) for each in got], [loss, right, number], rtol=1e-6)


def test_masked_words():
    """Cross entropy over the places that have a target, and over no other."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (3, 4, 7)).astype(np.float32)
    targets = np.array([[2, -1, 6, -1], [-1, -1, -1, -1], [0, 1, 2, 3]], np.int32)
    chances, places = log_softmax(logits.astype(np.float64)), np.argwhere(targets >= 0)
    loss = -sum(chances[i, j, targets[i, j]] for i, j in places)
    right = sum(logits[i, j].argmax() == targets[i, j] for i, j in places)
    assert_sums(masked_word_loss(jnp.asarray(logits), jnp.asarray(targets)), loss, right, 6)
    # Of micro-batches they add up; nothing is nothing.
    parts = [masked_word_loss(jnp.asarray(logits[i : i + 1]), jnp.asarray(targets[i : i + 1])) for i in range(3)]
    assert_sums([sum(values) for values in zip(*parts, strict=True)], loss, right, 6)
    none = masked_word_loss(jnp.asarray(logits), jnp.full((3, 4), -1))
    assert float(none.mean) == float(none.accuracy) == 0


def test_classes_and_matches():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(0, 2, (5, 2)).astype(np.float32), np.array([0, 1, 1, 0, 1])
    loss = -log_softmax(logits.astype(np.float64))[np.arange(5), labels].sum()
    right = (logits.argmax(1) == labels).sum()
    assert_sums(match_loss(jnp.asarray(logits), jnp.asarray(labels, bool)), loss, right, 5)
    assert_sums(class_loss(jnp.asarray(logits), jnp.asarray(labels)), loss, right, 5)
    assert float(class_loss(jnp.asarray(logits), jnp.full(5, -1)).number) == 0


def test_answers():
    """METER: binary cross entropy with logits, its mean times the number of answers."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 3, (3, 6)).astype(np.float32)
    labels = np.array([[4, 0, -1], [-1, -1, -1], [2, 5, 1]], np.int32)
    scores = np.array([[0.3, 1, 9], [9, 9, 9], [0.6, 0.9, 0.3]], np.float32)
    dense = np.zeros((3, 6))
    for i, j in np.argwhere(labels >= 0):
        dense[i, labels[i, j]] = scores[i, j]
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    loss = -(dense * np.log(p) + (1 - dense) * np.log(1 - p)).mean() * 6 * 3
    right = dense[np.arange(3), logits.argmax(1)].sum()
    arrays = [jnp.asarray(each) for each in (logits, labels, scores)]
    got, gradient = jax.jit(jax.value_and_grad(lambda x: answer_loss(x, *arrays[1:]).loss))(arrays[0])
    assert_sums(LossSums(got, answer_loss(*arrays).right, answer_loss(*arrays).number), loss, right, 3)
    np.testing.assert_allclose(gradient, p - dense, atol=1e-6)


def test_eight_devices_give_the_sums_of_one():
    rng = np.random.default_rng(3)
    logits, targets = rng.normal(size=(8, 2, 5)), rng.integers(-1, 5, (8, 2))
    labels, scores = rng.integers(-1, 5, (8, 1)), rng.random((8, 1))

    def sums(logits, targets, labels, scores):
        return masked_word_loss(logits, targets), answer_loss(logits[:, 0], labels, scores)

    arrays = [jnp.asarray(each, jnp.float32 if each.dtype.kind == "f" else jnp.int32)
              for each in (logits, targets, labels, scores)]  # fmt: skip
    want = sums(*arrays)
    mesh = make_mesh(8, 1)
    placed = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        got = jax.jit(sums)(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)
