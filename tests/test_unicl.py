"""The UniCL loss against its golden values, its definition and its closed-form properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from florence_jax.losses.unicl import unicl, unicl_reference

U = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 1, 1]], np.float32)
V = np.array([[1, 0, 1], [0, 1, 1], [1, 2, 0], [0, 0, 1]], np.float32)
U /= np.linalg.norm(U, axis=1, keepdims=True)
V /= np.linalg.norm(V, axis=1, keepdims=True)
GOLDEN = [  # labels, scale, L_i2t, L_t2i, L: printed by the reference implementation to six decimals
    ((0, 1, 2, 3), 1.0, 1.140313, 1.131878, 1.136095),
    ((0, 1, 2, 3), 1 / 0.07, 1.743825, 1.171462, 1.457644),
    ((0, 0, 1, 2), 1.0, 1.317089, 1.308655, 1.312872),
    ((0, 0, 1, 2), 1 / 0.07, 4.269207, 3.696843, 3.983025),
    ((0, 1, 0, 0), 1 / 0.07, 4.893974, 4.321610, 4.607792),
    ((0, 0, 0, 0), 1.0, 1.436307, 1.427873, 1.432090),
]


def random_batch(size, dim, classes, seed=0):
    rng = np.random.default_rng(seed)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    image, text = unit(rng.normal(size=(size, dim))), unit(rng.normal(size=(size, dim)))
    return jnp.float32(image), jnp.float32(text), jnp.asarray(rng.integers(0, classes, (size, 1)))


@pytest.mark.parametrize("labels,scale,i2t,t2i,total", GOLDEN)
def test_golden(labels, scale, i2t, t2i, total):
    labels = jnp.array(labels)[:, None]
    loss, metrics = unicl(jnp.array(U), jnp.array(V), labels, scale)
    np.testing.assert_allclose([metrics["i2t"], metrics["t2i"], loss], [i2t, t2i, total], rtol=1e-5)
    np.testing.assert_allclose(unicl_reference(jnp.array(U), jnp.array(V), labels, scale), (i2t, t2i), rtol=1e-5)


def test_value_and_gradients_equal_reference():
    image, text, labels = random_batch(32, 16, classes=9)

    def reference(image, text, scale):
        return sum(unicl_reference(image, text, labels, scale)) / 2

    fast = jax.value_and_grad(lambda i, t, s: unicl(i, t, labels, s)[0], argnums=(0, 1, 2))(image, text, 14.0)
    slow = jax.value_and_grad(reference, argnums=(0, 1, 2))(image, text, 14.0)
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_distinct_labels_are_clip():
    image, text, _ = random_batch(16, 8, classes=2)
    logits = 20.0 * image @ text.T
    rows, columns = jax.nn.log_softmax(logits, 1), jax.nn.log_softmax(logits, 0)
    clip = -(jnp.trace(rows) + jnp.trace(columns)) / 32
    np.testing.assert_allclose(unicl(image, text, jnp.arange(16)[:, None], 20.0)[0], clip, rtol=1e-5)


def test_constant_logits_give_log_batch_and_floor_is_a_lower_bound():
    image, text, labels = random_batch(24, 8, classes=5)
    same = jnp.tile(image[:1], (24, 1))
    np.testing.assert_allclose(unicl(same, same, labels, 3.0)[0], np.log(24), rtol=1e-6)
    onehot = jnp.eye(5)[labels[:, 0]]  # features that separate the labels perfectly
    loss, metrics = unicl(onehot, onehot, labels, 100.0)
    np.testing.assert_allclose(loss, metrics["floor"], rtol=1e-5)
    assert unicl(image, text, labels, 10.0)[0] > metrics["floor"]


def test_logit_gradient_is_softmax_minus_targets():
    _, _, labels = random_batch(6, 8, classes=3)
    logits = jax.random.normal(jax.random.key(0), (6, 6))
    # With image = identity and text = logits^T the logits are the argument itself.
    grad = jax.grad(lambda x: unicl(jnp.eye(6), x.T, labels, 1.0)[1]["i2t"])(logits)
    positives = (labels == labels.T).astype(jnp.float32)
    expected = (jax.nn.softmax(logits, 1) - positives / positives.sum(1, keepdims=True)) / 6
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_permutation_invariance():
    image, text, labels = random_batch(20, 8, classes=4)
    order = np.random.default_rng(1).permutation(20)
    np.testing.assert_allclose(
        unicl(image, text, labels, 9.0)[0], unicl(image[order], text[order], labels[order], 9.0)[0], rtol=1e-6
    )


def test_labels_of_two_words_are_equal_if_both_are():
    image, text, labels = random_batch(24, 8, classes=9)
    words = jnp.concatenate([labels // 3, labels % 3], axis=1)
    assert len(np.unique(words[:, 0])) == len(np.unique(words[:, 1])) == 3 and len(np.unique(labels)) > 6
    want, got = unicl(image, text, labels, 5.0), unicl(image, text, words, 5.0)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), got, want))
    np.testing.assert_allclose(sum(unicl_reference(image, text, words, 5.0)) / 2, want[0], rtol=1e-6)


@pytest.mark.parametrize("labels", [(3, 1), (4,)])
def test_shapes_that_disagree_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels \(B, W\)"):
        unicl(jnp.ones((4, 2)), jnp.ones((4, 2)), jnp.ones(labels, jnp.int32), 1.0)
