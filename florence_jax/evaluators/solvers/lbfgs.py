"""L-BFGS for many convex problems at once whose data enter through a linear prediction.

The problems (lanes) share their data and are solved side by side. A point is an array (P, L, K), lane in the middle,
so that the predictions of all lanes, (N, L, K), are one matrix product with the data, which is then read once. Because
predictions are linear, those along a search direction are known from one product: an iteration costs one product
forward and one backward, however many steps the line search tries.

Nocedal and Wright, Numerical Optimization (2006), algorithm 7.4, with an initial inverse Hessian given by the problem.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

HISTORY = 10
TRIALS = 20  # of one line search; the second is usually the last
SLOPE_SHARE = 0.1  # a step is taken when the slope has fallen to this share
TOLERANCE = 3e-7  # of the estimated gap; the true one can be several times larger
STALLED = 5  # iterations without a measurable decrease that end a lane
DIRECTION_SHARE = 1e-12  # slopes and curvatures below this share of the lengths involved are rounding


class Step(NamedTuple):
    """The objective along a direction, all (L,)."""

    value: jax.Array
    slope: jax.Array
    curvature: jax.Array


class Problem(Protocol):
    """A convex objective of linear predictions; x and d are points, `t` is (L,), values are (L,)."""

    def predict(self, x: jax.Array) -> jax.Array:
        """Linear in x: (N, L, K)."""

    def along(self, x: jax.Array, d: jax.Array, at_x: jax.Array, at_d: jax.Array, t: jax.Array) -> Step:
        """The objective and its derivatives at x + t d, from the predictions at x and at d."""

    def gradient(self, x: jax.Array, at_x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Value (L,), gradient (P, L, K), and the positive diagonal (P, L, K) of an inverse Hessian, up to a factor."""


class Solution(NamedTuple):
    """Where the lanes ended.

    Attributes:
      x: (P, L, K).
      value: (L,). gap: (L,), estimated distance of the value from the minimum (half the squared Newton decrement).
      iterations: int (L,). converged: bool (L,), False for a lane ended by the iteration limit or by rounding.
    """

    x: jax.Array
    value: jax.Array
    gap: jax.Array
    iterations: jax.Array
    converged: jax.Array


class _State(NamedTuple):
    x: jax.Array
    at_x: jax.Array
    value: jax.Array
    gradient: jax.Array
    inverse: jax.Array
    direction: jax.Array
    slope: jax.Array
    steps: jax.Array  # (HISTORY, P, L, K), a ring
    changes: jax.Array  # of the gradient over each step
    inverse_products: jax.Array  # (HISTORY, L): 1 / <step, change>, 0 for a pair that is not to be used
    stalled: jax.Array
    iterations: jax.Array
    converged: jax.Array
    count: jax.Array


def minimise(
    problem: Problem, x: jax.Array, reference: jax.Array, tolerance: float = TOLERANCE, max_iterations: int = 1000
) -> Solution:
    """Minimises every lane, starting from `x`.

    A lane is done when half its squared gradient norm, in the metric of the quasi-Newton inverse Hessian (the estimated
    gap to the minimum), is at most `tolerance` times the value and `tolerance` times the decrease since `reference`.

    Args:
      problem: what to minimise.
      x: (P, L, K), where to start.
      reference: (L,), values at a trivial point.
      tolerance: relative. max_iterations: of every lane.
    """
    shape = (HISTORY, *x.shape)
    at_x = problem.predict(x)
    value, gradient, inverse = problem.gradient(x, at_x)
    lanes = jnp.zeros(x.shape[1], jnp.int32)
    state = _State(
        x=x,
        at_x=at_x,
        value=value,
        gradient=gradient,
        inverse=inverse,
        direction=x,
        slope=value,
        steps=jnp.zeros(shape, x.dtype),
        changes=jnp.zeros(shape, x.dtype),
        inverse_products=jnp.zeros((HISTORY, x.shape[1]), x.dtype),
        stalled=lanes,
        iterations=lanes,
        converged=lanes > 0,
        count=jnp.int32(0),
    )
    state = _aim(state, reference, tolerance)

    def unfinished(state: _State) -> jax.Array:
        return jnp.any(_active(state)) & (state.count < max_iterations)

    state = jax.lax.while_loop(unfinished, lambda s: _aim(_advance(problem, s), reference, tolerance), state)
    return Solution(state.x, state.value, -state.slope / 2, state.iterations, state.converged)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).sum((0, 2))


def _active(state: _State) -> jax.Array:
    return ~state.converged & (state.stalled < STALLED)


def _times(scale: jax.Array, point: jax.Array) -> jax.Array:
    return scale[None, :, None] * point


def _aim(state: _State, reference: jax.Array, tolerance: float) -> _State:
    """The next direction of each lane, and whether the lane is done."""
    factors = jnp.zeros_like(state.inverse_products)

    def newest_first(back: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, factors = carry
        i = (state.count - 1 - back) % HISTORY
        factor = state.inverse_products[i] * _dot(state.steps[i], q)
        return q - _times(factor, state.changes[i]), factors.at[i].set(factor)

    def oldest_first(ahead: jax.Array, q: jax.Array) -> jax.Array:
        i = (state.count + ahead) % HISTORY
        correction = factors[i] - state.inverse_products[i] * _dot(state.changes[i], q)
        return q + _times(correction, state.steps[i])

    q, factors = jax.lax.fori_loop(0, HISTORY, newest_first, (state.gradient, factors))
    q = jax.lax.fori_loop(0, HISTORY, oldest_first, q * state.inverse)
    # Rounding can turn a direction uphill: then the plain preconditioned gradient is taken.
    length = jnp.sqrt(_dot(q, q) * _dot(state.gradient, state.gradient))
    downhill = _dot(q, state.gradient) > DIRECTION_SHARE * length
    direction = -jnp.where(downhill[None, :, None], q, state.gradient * state.inverse)
    slope = _dot(direction, state.gradient)
    gap = -slope / 2
    small = (gap <= tolerance * jnp.abs(state.value)) & (gap <= tolerance * jnp.abs(reference - state.value))
    return state._replace(
        direction=direction, slope=slope, converged=state.converged | small | (gap == 0) | ~jnp.isfinite(gap)
    )


def _advance(problem: Problem, state: _State) -> _State:
    """One step of every active lane."""
    active = _active(state)
    at_d = problem.predict(state.direction)
    t = jnp.where(active, _line_search(problem, state, at_d, active), 0.0)
    step = _times(t, state.direction)
    x, at_x = state.x + step, state.at_x + _times(t, at_d)
    value, gradient, inverse = problem.gradient(x, at_x)
    change = gradient - state.gradient
    product = _dot(step, change)
    usable = product > DIRECTION_SHARE * jnp.sqrt(_dot(step, step) * _dot(change, change))
    product = jnp.where(usable, product, 1.0)
    # The problem's inverse Hessian is right up to a factor, which the last step has measured.
    scale = jnp.where(usable, product / _dot(change, inverse * change), 1.0)
    i = state.count % HISTORY
    flat = value >= state.value
    return state._replace(
        x=x,
        at_x=at_x,
        value=value,
        gradient=gradient,
        inverse=_times(scale, inverse),
        steps=state.steps.at[i].set(step),
        changes=state.changes.at[i].set(change),
        inverse_products=state.inverse_products.at[i].set(jnp.where(usable, 1 / product, 0.0)),
        stalled=jnp.where(active, jnp.where(flat, state.stalled + 1, 0), state.stalled),
        iterations=state.iterations + active,
        count=state.count + 1,
    )


def _line_search(problem: Problem, state: _State, at_d: jax.Array, active: jax.Array) -> jax.Array:
    """A step (L,) where the slope is nearly zero: Newton's method in a bracket, bisection where it leaves the bracket.

    The slope of a convex function only rises, so its sign alone keeps the bracket right: at the lower end it is
    negative, hence a step there decreases the objective whatever rounding does to its values.
    """
    wanted = SLOPE_SHARE * jnp.abs(state.slope)

    def searching(carry: tuple[jax.Array, ...]) -> jax.Array:
        done, trial = carry[3], carry[4]
        return jnp.any(~done) & (trial < TRIALS)

    def attempt(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        t, low, high, done, trial = carry
        at_t = problem.along(state.x, state.direction, state.at_x, at_d, t)
        finite = jnp.isfinite(at_t.slope) & jnp.isfinite(at_t.value)
        decreased = (at_t.slope <= 0) | (at_t.value <= state.value)
        found = done | (finite & decreased & (jnp.abs(at_t.slope) <= wanted))
        below = finite & (at_t.slope < 0)
        low = jnp.where(below & ~found, t, low)
        high = jnp.where(~below & ~found, t, high)
        newton = t - at_t.slope / jnp.maximum(at_t.curvature, jnp.finfo(t.dtype).tiny)
        middle = jnp.where(jnp.isfinite(high), (low + high) / 2, 4 * t)
        inside = finite & (newton > low) & (newton < jnp.minimum(high, 10 * jnp.maximum(low, t)))
        return jnp.where(found, t, jnp.where(inside, newton, middle)), low, high, found, trial + 1

    start = jnp.ones_like(state.slope)
    carry = (start, 0 * start, jnp.inf * start, ~active, jnp.int32(0))
    t, low, _, done, _ = jax.lax.while_loop(searching, attempt, carry)
    return jnp.where(done, t, low)
