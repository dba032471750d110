"""Matrix products with parameters, on request with factors rounded to bfloat16 and sums in float32.

That is what a TPU's matrix unit does to float32 arrays by default. Processors with AVX512_BF16 or AMX do it in half of
the time that float32 takes, but XLA's CPU compiler only for arrays that are bfloat16: float32 arrays it multiplies in
float32, whatever `jax.default_matmul_precision` says. So the factors are cast here. All else stays float32: sums,
activations, norms, softmax, and the small products of attention, which such a processor does not do faster.
"""

import jax
import jax.numpy as jnp

ROUNDED = "bfloat16_products"  # a precision: float32, but the factors of these products
# `with rounded_factors(True):` around what traces a program; JAX traces anew where it differs.
rounded_factors = jax.make_user_context(default_value=False)


def compute_dtype(precision: str) -> str:
    """The dtype of a model's activations for a `config.precision`; what is 'auto' is decided for training only."""
    return "float32" if precision in ("auto", ROUNDED) else precision


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(..., C) times a parameter (C, features): (..., features), in the dtype of both."""
    kernel = varying_as(kernel, x)
    return _rounded_product(x, kernel) if _rounds(x) else _product(x, kernel)


def varying_as(parameter: jax.Array, x: jax.Array) -> jax.Array:
    """A parameter for a function of it and `x` with derivatives of its own.

    Inside a shard_map where only `x` differs from device to device the sum of the parameter's gradients over the
    devices is the derivative of this cast, as JAX's own functions do it unasked.
    """
    varying, ours = (jax.typeof(a).manual_axis_type.varying for a in (x, parameter))
    return jax.lax.pcast(parameter, tuple(varying - ours), to="varying") if varying - ours else parameter


def forward_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`product` for a function that has derivatives of its own: JAX's are not those of `product`."""
    if not _rounds(x):
        return jnp.matmul(x, kernel)
    return _low_product(_low(x), _low(kernel))


def kernel_gradient(x: jax.Array, grad: jax.Array) -> jax.Array:
    """(..., C) and (..., features), of one dtype: (C, features), the sum of outer products, in that dtype."""
    if _rounds(x):
        return _low_kernel_gradient(_low(x), _low(grad))
    return jax.lax.platform_dependent(x, grad, cpu=_kernel_gradient_of_rows, default=_kernel_gradient)


def _kernel_gradient(x: jax.Array, grad: jax.Array) -> jax.Array:
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(grad, x, ((rows, rows), ((), ()))).T


def _kernel_gradient_of_rows(x: jax.Array, grad: jax.Array) -> jax.Array:
    # Of several axes to sum over XLA's CPU compiler makes one by copying a factor turned round, and multiplies that
    # slowly. (On a TPU it is this reshape that may copy: maps do not lie there as they are indexed.)
    return _kernel_gradient(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]))


def _rounds(x: jax.Array) -> bool:
    return rounded_factors.value and x.dtype == jnp.float32


def _low(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16)


def _low_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("...c,cf->...f", x, kernel, preferred_element_type=jnp.float32)


def _low_kernel_gradient(x: jax.Array, grad: jax.Array) -> jax.Array:
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    # Left to itself, XLA's CPU compiler sums over the rows of both factors, and that only in float32.
    columns = jax.lax.optimization_barrier(x.T)
    return jnp.einsum("cr,rf->cf", columns, grad, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, kernel), (x, kernel)


def _backward(factors: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = factors
    x_grad = jax.lax.dot_general(grad, kernel, (((grad.ndim - 1,), (1,)), ((), ())))
    return x_grad, kernel_gradient(x, grad)


_product.defvjp(_forward, _backward)


@jax.custom_vjp
def _rounded_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`product` of rounded factors; in its derivatives the gradient, a factor there, is rounded as well.

    (JAX's own derivative would multiply a float32 gradient by a bfloat16 factor, and round its result.)
    """
    return _low_product(_low(x), _low(kernel))


def _rounded_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x, kernel = _low(x), _low(kernel)
    return _low_product(x, kernel), (x, kernel)


def _rounded_backward(factors: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = factors
    grad = _low(grad)
    x_grad = jnp.einsum("...f,cf->...c", grad, kernel, preferred_element_type=jnp.float32)
    return x_grad, _low_kernel_gradient(x, grad)


_rounded_product.defvjp(_rounded_forward, _rounded_backward)
