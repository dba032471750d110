"""Multinomial logistic regression with an L2 penalty, as scikit-learn's LogisticRegression defines it, for many C.

    minimise over w, b:   C * sum of cross-entropies + |w|^2 / 2      (b is not penalised)

The features are centred and turned into the eigenbasis of their covariance once; neither changes the penalty. There
the Hessian is nearly diagonal, covariance x class variance + 1 / (C N), which is the initial Hessian of L-BFGS.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from florence_jax.errors import UserError
from florence_jax.evaluators.lbfgs import Solution, Step, minimise
from florence_jax.train.sharding import batch_sharding, replicated

DTYPES = ("auto", "float32", "bfloat16")
LOGITS_BYTES = 2**31  # on a device, for one array of predictions; bounds how many C are solved at once


class Fits(NamedTuple):
    """Logistic regressions, one for each of L values of C, in the coordinates of the given features.

    Attributes:
      cs: float64 (L,). weights: float32 (L, D, K). bias: float32 (L, K).
      objective: float64 (L,), as scikit-learn defines it. iterations: int (L,). converged: bool (L,).
    """

    cs: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    objective: np.ndarray
    iterations: np.ndarray
    converged: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Predictions before the softmax: float32 (N, D) -> float32 (L, N, K)."""
        return np.asarray(_scores(features, self.weights, self.bias))


@jax.jit
def _scores(features: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
    return jax.lax.map(lambda one: jnp.matmul(features, one[0], precision="highest") + one[1][None], (weights, bias))


class _Data(NamedTuple):
    features: jax.Array  # (N, D), padded, centred, in the eigenbasis
    labels: jax.Array  # int32 (N,)
    mask: jax.Array  # float32 (N,), 1 / number of examples, 0 for padding
    eigenvalues: jax.Array  # (D,) of the covariance


class _Logistic(NamedTuple):
    """The `lbfgs.Problem`: mean cross-entropy + penalty (L,) / 2 |w|^2. The last row of a point is the bias."""

    data: _Data
    penalty: jax.Array

    def predict(self, x: jax.Array) -> jax.Array:
        """Logits (N, L, K)."""
        features, weights = self.data.features, x[:-1].reshape(x.shape[0] - 1, -1)
        return _product(features, weights, 1).reshape(-1, *x.shape[1:]) + x[None, -1]

    def along(self, x: jax.Array, d: jax.Array, at_x: jax.Array, at_d: jax.Array, t: jax.Array) -> Step:
        """Value, slope and curvature at x + t d."""
        logits = at_x + t[None, :, None] * at_d
        p = jax.nn.softmax(logits)
        chosen, mean = self._chosen(at_d), (p * at_d).sum(-1)
        xd, dd, xx = (_penalised(a, b) for a, b in ((x, d), (d, d), (x, x)))
        mask = self.data.mask[:, None]
        return Step(
            self._loss(logits) + self.penalty / 2 * (xx + t * (2 * xd + t * dd)),
            (mask * (mean - chosen)).sum(0) + self.penalty * (xd + t * dd),
            (mask * ((p * at_d**2).sum(-1) - mean**2)).sum(0) + self.penalty * dd,
        )

    def gradient(self, x: jax.Array, at_x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Value, gradient, and the inverse of covariance x variance of each class's probability + penalty."""
        p = jax.nn.softmax(at_x)
        mask = self.data.mask[:, None, None]
        target = jnp.arange(at_x.shape[-1])[None] == self.data.labels[:, None]
        residual = mask * (p - target[:, None])
        weights = _product(self.data.features, residual.reshape(len(p), -1), 0).reshape(-1, *x.shape[1:])
        weights = weights + self.penalty[None, :, None] * x[:-1]
        variance = (mask * p * (1 - p)).sum(0)
        variance = jnp.maximum(variance, 1e-3 * variance.max(-1, keepdims=True))  # of a class that is nowhere
        hessian = self.data.eigenvalues[:, None, None] * variance[None] + self.penalty[None, :, None]
        inverse = 1 / jnp.maximum(jnp.concatenate([hessian, variance[None]]), jnp.finfo(p.dtype).tiny)
        value = self._loss(at_x) + self.penalty / 2 * _penalised(x, x)
        return value, jnp.concatenate([weights, residual.sum(0)[None]]), inverse

    def _chosen(self, logits: jax.Array) -> jax.Array:
        target = jnp.arange(logits.shape[-1])[None] == self.data.labels[:, None]
        return jnp.where(target[:, None], logits, 0).sum(-1)

    def _loss(self, logits: jax.Array) -> jax.Array:
        return (self.data.mask[:, None] * (jax.nn.logsumexp(logits, axis=-1) - self._chosen(logits))).sum(0)


def _penalised(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a[:-1] * b[:-1]).sum((0, 2))


def _product(features: jax.Array, other: jax.Array, axis: int) -> jax.Array:
    """`features` contracted over `axis` with float32 (n, m), in float32.

    bfloat16 features are multiplied with a bfloat16 part and its remainder (16 bits of the float32's 24 in all), which
    keeps weights and gradients accurate at the speed of bfloat16.
    """
    numbers = (((axis,), (0,)), ((), ()))
    if features.dtype == jnp.float32:
        return jax.lax.dot_general(features, other, numbers, precision="highest")
    high = other.astype(features.dtype)
    low = (other - high.astype(jnp.float32)).astype(features.dtype)
    both = jnp.concatenate([high, low], axis=1)
    out = jax.lax.dot_general(features, both, numbers, preferred_element_type=jnp.float32)
    return out[:, : other.shape[1]] + out[:, other.shape[1] :]


@jax.jit
def _moments(features: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = mask @ features
    centred = (features - mean[None]) * jnp.sqrt(mask)[:, None]
    return mean, jnp.matmul(centred.T, centred, precision="highest")


@functools.partial(jax.jit, static_argnames="dtype")
def _turn(features: jax.Array, mean: jax.Array, basis: jax.Array, dtype: str) -> jax.Array:
    return jnp.matmul(features - mean[None], basis, precision="highest").astype(dtype)


@functools.partial(jax.jit, static_argnames="max_iterations")
def _solve(
    data: _Data, penalty: jax.Array, start: jax.Array, tolerance: jax.Array, max_iterations: int
) -> Solution:
    trivial = jnp.full(penalty.shape, np.log(start.shape[2]), jnp.float32)
    return minimise(_Logistic(data, penalty), start, trivial, tolerance, max_iterations)
