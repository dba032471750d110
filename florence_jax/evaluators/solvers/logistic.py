"""Multinomial logistic regression with an L2 penalty, as scikit-learn's LogisticRegression defines it, for many C.

    minimise over w, b:   C * sum of cross-entropies + |w|^2 / 2      (b is not penalised)

With several classes an example there is a regression of two classes for each class instead (one against the rest).

The features are centred and turned into the eigenbasis of their covariance once; neither changes the penalty. There
the Hessian is nearly diagonal, covariance x class variance + 1 / (C N), which is the initial Hessian of L-BFGS.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from florence_jax.errors import UserError
from florence_jax.evaluators.solvers.lbfgs import TOLERANCE, Solution, Step, minimise
from florence_jax.params.sharding import batch_sharding, place, replicated

SOLVER_DTYPES = ("auto", "float32", "bfloat16")
VARIANCE_SHARE = 1e-3
LOGITS_BYTES = 2**31  # on a device, for one array of predictions; bounds how many C are solved at once


def objective(features: np.ndarray, labels: np.ndarray, weights: np.ndarray, bias: np.ndarray, c: float) -> float:
    """scikit-learn's objective in float64: C * sum of cross-entropies + |w|^2 / 2, w being w1 - w0 for two classes."""
    weights, bias = weights.astype(np.float64), bias.astype(np.float64)
    logits = features.astype(np.float64) @ weights + bias
    loss = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]
    penalty = ((weights[:, 1] - weights[:, 0]) ** 2).sum() if weights.shape[1] == 2 else (weights**2).sum()
    return c * float(loss.sum()) + 0.5 * float(penalty)


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

    def take(self, rows: np.ndarray) -> "Fits":
        """The fits of some rows."""
        return Fits(*(field[rows] for field in self))

    @staticmethod
    def join(parts: Sequence["Fits"]) -> "Fits":
        """All fits of several."""
        return Fits(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))

    def scores(self, row: int, features: np.ndarray) -> np.ndarray:
        """Predictions of one fit before the softmax: float32 (N, D) -> float32 (N, K)."""
        return np.asarray(_scores(features, self.weights[row], self.bias[row]))


@jax.jit
def _scores(features: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.matmul(features, weights, precision="highest") + bias[None]


def sklearn_weights(fit: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weights (D, K) and bias (K,) of a fitted scikit-learn LogisticRegression; it has one vector for two classes."""
    if len(fit.coef_) == 1:
        return np.concatenate([-fit.coef_, fit.coef_]).T / 2, np.concatenate([-fit.intercept_, fit.intercept_]) / 2
    return fit.coef_.T, fit.intercept_


class _Data(NamedTuple):
    features: jax.Array  # (N, D), padded, centred, in the eigenbasis
    transposed: jax.Array | None  # (D, N), on CPUs: XLA has no fast product with a transposed left side there
    labels: jax.Array  # int32 (N,), or (N, K) with several classes an example
    mask: jax.Array  # float32 (N,), 1 / number of examples, 0 for padding
    eigenvalues: jax.Array  # (D,) of the covariance

    def forward(self, x: jax.Array) -> jax.Array:
        """Logits (N, L, K) of a point (D + 1, L, K), whose last row is the bias."""
        weights = x[:-1].reshape(x.shape[0] - 1, -1)
        return _product(self.features, weights, 1).reshape(-1, *x.shape[1:]) + x[None, -1]

    def backward(self, residual: jax.Array) -> jax.Array:
        """(N, L, K) -> features^T residual, (D, L, K)."""
        columns = residual.reshape(len(residual), -1)
        if self.transposed is None:
            return _product(self.features, columns, 0).reshape(-1, *residual.shape[1:])
        return _product(self.transposed, columns, 1).reshape(-1, *residual.shape[1:])


class _Loss(Protocol):
    """A mean loss of the predictions (N, L, K) for the labels of `_Data`."""

    def value(self, logits: jax.Array) -> jax.Array:
        """(L,)."""

    def along(self, logits: jax.Array, at_d: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Slope and curvature (L,) where the predictions change by `at_d`."""

    def residual(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The gradient (N, L, K), and the mean variance of each class's answers (L, K), its curvature."""


class _CrossEntropy(NamedTuple):
    """One class an example."""

    data: _Data

    def value(self, logits: jax.Array) -> jax.Array:
        """See `_Loss`; accurate also where it is nearly zero."""
        against = logits - self._chosen(logits)[..., None]  # 0 for the class itself
        top = against.max(-1)
        rest = jnp.where(self._target(logits), 0, jnp.exp(against - top[..., None])).sum(-1)
        return (self.data.mask[:, None] * (top + jnp.log1p(jnp.expm1(-top) + rest))).sum(0)

    def along(self, logits: jax.Array, at_d: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `_Loss`."""
        p = jax.nn.softmax(logits)
        against = at_d - self._chosen(at_d)[..., None]
        mean, mask = (p * against).sum(-1), self.data.mask[:, None]
        return (mask * mean).sum(0), (mask * ((p * against**2).sum(-1) - mean**2)).sum(0)

    def residual(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `_Loss`."""
        p = jax.nn.softmax(logits)
        mask, target = self.data.mask[:, None, None], self._target(logits)
        others = jnp.where(target, 0, p)
        # Where the model is nearly certain, 1 - p of the class is lost to rounding; the sum of the others is not.
        residual = mask * jnp.where(target, -others.sum(-1, keepdims=True), others)
        return residual, jnp.abs(residual * (1 - jnp.abs(residual) / mask.max())).sum(0)

    def _target(self, logits: jax.Array) -> jax.Array:
        return (jnp.arange(logits.shape[-1])[None] == self.data.labels[:, None])[:, None]

    def _chosen(self, logits: jax.Array) -> jax.Array:
        return jnp.where(self._target(logits), logits, 0).sum(-1)


class _OneAgainstRest(NamedTuple):
    """Several classes an example: the sum over classes of mean binary cross-entropies."""

    data: _Data

    def value(self, logits: jax.Array) -> jax.Array:
        """See `_Loss`."""
        return (self._share() * jax.nn.softplus(-self._sign() * logits)).sum((0, 2))

    def along(self, logits: jax.Array, at_d: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `_Loss`."""
        p = jax.nn.sigmoid(logits)
        return (self._gradient(logits) * at_d).sum((0, 2)), (self._share() * p * (1 - p) * at_d**2).sum((0, 2))

    def residual(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `_Loss`."""
        p = jax.nn.sigmoid(logits)
        return self._gradient(logits), (self._share() * p * (1 - p)).sum(0)

    def _share(self) -> jax.Array:
        """(N, 1, K): of each answer in the mean; 0 for padding and for labels below 0, which are not judged."""
        return jnp.where(self.data.labels >= 0, self.data.mask[:, None], 0)[:, None]

    def _sign(self) -> jax.Array:
        return jnp.where(self.data.labels > 0, 1.0, -1.0)[:, None]

    def _gradient(self, logits: jax.Array) -> jax.Array:
        # p - 1 and p, without the rounding of p near 1.
        return -self._share() * self._sign() * jax.nn.sigmoid(-self._sign() * logits)


class _Penalised(NamedTuple):
    """The `lbfgs.Problem`: a loss + penalty (L,) / 2 |w|^2. The last row of a point is the bias."""

    data: _Data
    loss: _Loss
    penalty: jax.Array

    def predict(self, x: jax.Array) -> jax.Array:
        """Logits (N, L, K)."""
        return self.data.forward(x)

    def along(self, x: jax.Array, d: jax.Array, at_x: jax.Array, at_d: jax.Array, t: jax.Array) -> Step:
        """Value, slope and curvature at x + t d."""
        logits = at_x + t[None, :, None] * at_d
        slope, curvature = self.loss.along(logits, at_d)
        xd, dd, xx = (_inner(a, b) for a, b in ((x, d), (d, d), (x, x)))
        return Step(
            self.loss.value(logits) + self.penalty / 2 * (xx + t * (2 * xd + t * dd)),
            slope + self.penalty * (xd + t * dd),
            curvature + self.penalty * dd,
        )

    def gradient(self, x: jax.Array, at_x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Value, gradient, and the inverse of covariance x variance of each class's answers + penalty."""
        residual, variance = self.loss.residual(at_x)
        weights = self.data.backward(residual) + self.penalty[None, :, None] * x[:-1]
        value = self.loss.value(at_x) + self.penalty / 2 * _inner(x, x)
        inverse = _inverse_hessian(self.data, self.penalty, variance)
        return value, jnp.concatenate([weights, residual.sum(0)[None]]), inverse


def _inverse_hessian(data: _Data, penalty: jax.Array, variance: jax.Array) -> jax.Array:
    """Diagonal (D + 1, L, K) of the inverse of covariance x mean variance of each class's answers (L, K) + penalty."""
    # Nowhere is a class so certain that its curvature is nil: far from the minimum it only looks so.
    variance = jnp.maximum(
        variance, VARIANCE_SHARE * jnp.maximum(variance.max(-1, keepdims=True), 1 / variance.shape[-1])
    )
    hessian = data.eigenvalues[:, None, None] * variance[None] + penalty[None, :, None]
    return 1 / jnp.maximum(jnp.concatenate([hessian, variance[None]]), jnp.finfo(variance.dtype).tiny)


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of what is penalised (L,), all but the bias."""
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
    """Mean (D,) and covariance (D, D)."""
    mean = jnp.matmul(mask, features, precision="highest")
    centred = (features - mean[None]) * jnp.sqrt(mask)[:, None]
    return mean, jnp.matmul(centred.T, centred, precision="highest")


@functools.partial(jax.jit, static_argnames="dtype")
def _turn(features: jax.Array, mean: jax.Array, basis: jax.Array, dtype: str) -> jax.Array:
    return jnp.matmul(features - mean[None], basis, precision="highest").astype(dtype)


@functools.cache
def _solver(mesh: Mesh) -> Callable[..., Solution]:
    def solve(data: _Data, penalty: jax.Array, start: jax.Array, tolerance: float, max_iterations: int) -> Solution:
        # The loss of weights that are all zero.
        classes, several = start.shape[2], data.labels.ndim == 2
        trivial = jnp.full(penalty.shape, classes * np.log(2) if several else np.log(classes), jnp.float32)
        problem = _Penalised(data, _OneAgainstRest(data) if several else _CrossEntropy(data), penalty)
        return minimise(problem, start, trivial, tolerance, max_iterations)

    return jax.jit(solve, out_shardings=replicated(mesh))


class LogisticRegression:
    """Regressions on one set of features, which are kept on the devices, split over them.

    Args:
      features: float32 (N, D).
      labels: int (N,), from 0 to `classes` - 1; or (N, K), several classes an example: 1, 0, or -1 for not judged.
      classes: K >= 2.
      mesh: of the devices.
      dtype: of the features on the devices; 'auto' is float32 on CPUs and bfloat16 elsewhere. Weights, predictions and
        sums are float32 always.
      lanes: how many C are solved at once; default: 1 on CPUs, where there is nothing to gain, else as fits in memory.

    Raises:
      UserError: for labels out of range, features that are not finite, or unequal numbers of them.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        classes: int,
        mesh: Mesh,
        dtype: str = "auto",
        lanes: int | None = None,
    ):
        _check(features, labels, classes, dtype)
        self.classes, self.count, self._mesh = classes, len(labels), mesh
        cpu = mesh.devices.flat[0].platform == "cpu"
        bytes_a_lane = 4 * self.count * classes / mesh.size
        self.lanes = lanes or (1 if cpu else int(max(1, LOGITS_BYTES // bytes_a_lane)))
        dtype = ("float32" if cpu else "bfloat16") if dtype == "auto" else dtype
        sharding, extra = batch_sharding(mesh), -self.count % mesh.size
        mask = np.pad(np.full(self.count, 1 / self.count, np.float32), (0, extra))
        raw = place(np.pad(features.astype(np.float32), ((0, extra), (0, 0))), sharding)
        mask = place(mask, sharding)
        mean, covariance = (np.asarray(jax.device_get(moment), np.float64) for moment in _moments(raw, mask))
        values, self._basis = np.linalg.eigh(covariance)
        self._mean = mean
        turned = _turn(raw, mean.astype(np.float32), self._basis.astype(np.float32), dtype)
        self._data = _Data(
            features=turned,
            transposed=jnp.array(turned.T) if cpu else None,
            labels=place(np.pad(labels.astype(np.int32), [(0, extra)] + [(0, 0)] * (labels.ndim - 1)), sharding),
            mask=mask,
            eigenvalues=jnp.asarray(values.clip(min=0), jnp.float32),
        )

    def fit(
        self, cs: Sequence[float], start: Fits | None = None, tolerance: float = TOLERANCE, max_iterations: int = 1000
    ) -> Fits:
        """Fits every C, from small to large, each starting from the nearest C that is solved.

        Args:
          cs: positive.
          start: earlier fits to start from, on these or on other features.
          tolerance: relative error of the objective, see `lbfgs.minimise`. max_iterations: for each C.

        Returns:
          In the order of `cs`.

        Raises:
          UserError: if there is no C, or one that is not positive.
        """
        values = np.asarray(cs, np.float64).ravel()
        if not values.size or not (values > 0).all() or not np.isfinite(values).all():
            raise UserError(f"C must be positive numbers, not {list(cs)}")
        order, known = np.argsort(values, kind="stable"), start
        size = min(self.lanes, len(values))
        parts = [start] if start else []
        for at in range(0, len(order), size):
            chosen = order[at : at + size]
            group = np.pad(values[chosen], (0, size - len(chosen)), mode="edge")
            parts.append(self._fit_group(group, known, tolerance, max_iterations).take(np.arange(len(chosen))))
            known = Fits.join(parts)
        solved = Fits.join(parts[1:] if start else parts)
        return solved.take(np.argsort(order, kind="stable"))

    def _fit_group(self, cs: np.ndarray, known: Fits | None, tolerance: float, max_iterations: int) -> Fits:
        # With two classes scikit-learn has one vector w where there are two here, w / 2 and -w / 2 at the minimum.
        factor = 2 if self.classes == 2 and self._data.labels.ndim == 1 else 1
        dimensions = len(self._mean)
        if known is None:
            start = np.zeros((dimensions + 1, len(cs), self.classes), np.float32)
        else:
            nearest = np.abs(np.log(known.cs)[None] - np.log(cs)[:, None]).argmin(1)
            start = self._to_basis(known.weights[nearest], known.bias[nearest])
        penalty = (factor / (cs * self.count)).astype(np.float32)
        solution = _solver(self._mesh)(self._data, penalty, start, tolerance, max_iterations)
        solution = jax.device_get(solution)
        weights, bias = self._from_basis(solution.x)
        objective = solution.value.astype(np.float64) * cs * self.count
        return Fits(cs, weights, bias, objective, solution.iterations, solution.converged)

    def _to_basis(self, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
        turned = np.einsum("de,ldk->elk", self._basis, weights)
        offset = bias + np.einsum("d,ldk->lk", self._mean, weights)
        return np.concatenate([turned, offset[None]]).astype(np.float32)

    def _from_basis(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = np.einsum("de,elk->ldk", self._basis, x[:-1].astype(np.float64))
        bias = x[-1] - np.einsum("d,ldk->lk", self._mean, weights)
        return weights.astype(np.float32), bias.astype(np.float32)


def _check(features: np.ndarray, labels: np.ndarray, classes: int, dtype: str) -> None:
    if dtype not in SOLVER_DTYPES:
        raise UserError(f"probe dtype {dtype!r} is unknown; choose {', '.join(SOLVER_DTYPES)}")
    if features.ndim != 2 or len(features) != len(labels) or not len(labels):
        raise UserError(f"a probe needs (N, D) features and N labels, not {features.shape} and {labels.shape}")
    if labels.ndim == 2:
        if labels.shape[1] != classes or labels.min() < -1 or labels.max() > 1:
            raise UserError(f"a probe of several classes an image needs (N, {classes}) labels of 1, 0 and -1")
    elif classes < 2 or labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"a probe needs labels from 0 to {classes - 1} of at least 2 classes, not {labels.min()} to {labels.max()}"
        )
    if not np.isfinite(features).all():
        raise UserError(f"{int((~np.isfinite(features)).any(1).sum())} of {len(features)} features are not finite")
