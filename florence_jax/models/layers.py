"""Parts shared by the image and text towers: normalisation, MLP, attention core, stochastic depth.

Numerical policy of every tower: parameters are float32; matrix products run in the compute dtype; LayerNorm
statistics and softmax run in float32 whatever the compute dtype.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from florence_jax.errors import UserError
from florence_jax.models.dropout import Dropout
from florence_jax.models.products import forward_product, kernel_gradient, product, varying_as

Dtype = jnp.dtype | str

# What the backward pass recomputes; see `remat_module` and `attention_core`.
REMATS = ("none", "attention", "block", "dots")

# A plain normal: `jax.nn.initializers.truncated_normal(.02)` cuts at two sigma and has standard deviation .0176.
NORMAL = nn.initializers.normal(0.02)


def at_least_float32(dtype: Dtype) -> jnp.dtype:
    """What statistics, softmax and logits are computed in where the compute dtype is this one; float64 stays."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_jvp
def erf(x: jax.Array) -> jax.Array:
    """The error function, any shape; with its textbook derivative, because that of JAX 0.12.0 fails in a shard_map."""
    return jax.lax.erf(x)


erf.defjvps(lambda tangent, value, x: 2 / math.pi**0.5 * (tangent * jnp.exp(-jnp.square(x))))


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x * Phi(x) with the Gaussian distribution function (Hendrycks & Gimpel 2016); any shape."""
    return 0.5 * x * (1 + erf(x * (0.5**0.5)))


def quick_gelu(x: jax.Array) -> jax.Array:
    """The sigmoid approximation of GELU used by CLIP's text tower, x * sigmoid(1.702 x); any shape."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU (Hendrycks & Gimpel 2016), of few public weights; any shape."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": gelu_tanh,
}


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """LayerNorm of (..., C) over its last axis, in float32 (Ba et al. 2016); `scale` and `bias` are (C,).

    The variance is the mean of squared deviations (two passes), not E[x^2] - E[x]^2, which cancels in float32. For its
    derivatives it keeps x as it was given and two numbers for each row, nothing of the size of x in float32.
    """
    return _layer_norm(x, varying_as(scale, x), varying_as(bias, x), eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    ones = (1,) * (x.ndim - 1)
    y = x.astype(at_least_float32(x.dtype))
    mean = y.mean(-1)
    y = y - mean[..., None]
    factor = jax.lax.rsqrt(jnp.square(y).mean(-1) + eps)
    y = y * factor[..., None]
    return y * scale.reshape(*ones, -1) + bias.reshape(*ones, -1), (x, mean, factor, scale, bias)


def _layer_norm_backward(
    eps: float, residuals: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x, scale and bias.

    With y the normalised row and g = grad * scale, that of x is factor * (g - mean(g) - y * mean(g * y)).
    """
    del eps
    x, mean, factor, scale, bias = residuals
    rows = tuple(range(x.ndim - 1))
    y = (x.astype(grad.dtype) - mean[..., None]) * factor[..., None]
    g = grad * scale.reshape(*(1,) * (x.ndim - 1), -1)
    x_grad = g - g.mean(-1, keepdims=True) - y * (g * y).mean(-1, keepdims=True)
    x_grad = (x_grad * factor[..., None]).astype(x.dtype)
    return x_grad, (grad * y).sum(rows).astype(scale.dtype), grad.sum(rows).astype(bias.dtype)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def constrain(x: jax.Array) -> jax.Array:
    """Keeps the batch, the first axis of `x`, split over all devices of the mesh in context and the other axes whole.

    Said after every product with a parameter that is split over the devices: left to itself, the partitioner splits the
    channels of the activations as the parameter's are, so that every device holds more of the batch and the devices
    exchange activations in every layer (tensor parallelism) instead of parameters. Without a mesh, or for a batch that
    the devices do not divide (the single example of `init`), no change.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Inside a shard_map its own axes are already split.
    axes = tuple(axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)
    if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


class LayerNorm(nn.Module):
    """`layer_norm` with learned scale and bias; the result has `dtype`. Swin's eps is 1e-5 (Flax's default 1e-6)."""

    eps: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., C) -> the same shape in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return constrain(layer_norm(x, scale, bias, self.eps).astype(self.dtype))


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """(..., C) plus a float32 (C,), in the dtype of `x`."""
    # Broadcast first and cast then: the transpose, the sum that is the bias' gradient, so runs in float32. In bfloat16
    # a sum stands still once it is 256 times its terms.
    bias = jnp.broadcast_to(bias.reshape(*(1,) * (x.ndim - 1), -1), x.shape)
    return x + bias.astype(x.dtype)


class Dense(nn.Module):
    """Linear layer with bias, (..., C) -> (..., features), computed in `dtype`; saved by remat='dots'.

    Over several devices its output is split by batch, see `constrain`.
    """

    features: int
    kernel_init: Callable[..., jax.Array] = NORMAL
    dtype: Dtype = jnp.float32
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., C) -> (..., features)."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        x = add_bias(product(x.astype(self.dtype), kernel.astype(self.dtype)), bias)
        return checkpoint_name(constrain(x), "dense")


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """2-D convolution of (B, H, W, C) by (k, k, C, features) with symmetric zero padding: (B, h, w, features).

    XLA's CPU compiler has no fast form of a convolution that is dilated (gradients), larger than its map, or inside a
    loop, but fast matrix products: there it is written as one.
    """
    by_patches = functools.partial(convolve_patches, stride=stride, padding=padding)
    reference = functools.partial(convolve_reference, stride=stride, padding=padding)
    return jax.lax.platform_dependent(x, kernel, cpu=by_patches, default=reference)


def convolve_reference(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """`convolve` as XLA has it."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((padding, padding),) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_patches(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """`convolve` as the matrix of patches, (B h w, k k C), times the kernel."""
    patches = _patches(_pad(x, padding, padding), len(kernel), stride)
    return forward_product(patches, kernel.reshape(-1, kernel.shape[-1]))


def _pad(x: jax.Array, low: int, *high: int) -> jax.Array:
    """(B, H, W, C) with `low` zeros at the top and left, and `high` at the bottom and right."""
    return jnp.pad(x, ((0, 0), (low, high[0]), (low, high[-1]), (0, 0)))


def _patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """(B, H, W, C) to all its size x size pieces, `stride` apart: (B, h, w, size * size * C)."""
    bottom, right = (side - size + 1 for side in x.shape[1:3])
    pieces = [x[:, i : i + bottom : stride, j : j + right : stride] for i in range(size) for j in range(size)]
    return jnp.concatenate(pieces, axis=-1)


def _convolve_forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve_patches(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(
    stride: int, padding: int, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of input and kernel, both as products of patches.

    A pixel at place a of its stride x stride cell has the gradient sum_u grad[cell - u] kernel[u stride + a]: all the
    places of a cell are one product of a patch of `grad`. (The sum of the patches' own gradients, JAX's form, would be
    recomputed by XLA in every fusion that reads it.)
    """
    x, kernel = residuals
    size, channels, features = len(kernel), x.shape[-1], kernel.shape[-1]
    patches = _patches(_pad(x, padding, padding), size, stride)
    kernel_grad = kernel_gradient(patches, grad).reshape(kernel.shape)
    taps = -(-size // stride)
    cells = [-(-(side + 2 * padding) // stride) for side in x.shape[1:3]]
    kernel = jnp.pad(kernel, (*((0, taps * stride - size),) * 2, (0, 0), (0, 0)))
    kernel = kernel.reshape(taps, stride, taps, stride, channels, features)[::-1, :, ::-1]
    kernel = kernel.transpose(0, 2, 5, 1, 3, 4).reshape(taps**2 * features, -1)
    grad = _pad(grad, taps - 1, *(n - side for n, side in zip(cells, grad.shape[1:3], strict=True)))
    x_grad = forward_product(_patches(grad, taps, 1), kernel).reshape(-1, *cells, stride, stride, channels)
    x_grad = x_grad.swapaxes(2, 3).reshape(-1, cells[0] * stride, cells[1] * stride, channels)
    return x_grad[:, padding : padding + x.shape[1], padding : padding + x.shape[2]], kernel_grad


convolve_patches.defvjp(_convolve_forward, _convolve_backward)


class Mlp(nn.Module):
    """Two-layer perceptron C -> hidden -> C with biases; x is (..., C)."""

    hidden: int
    activation: str = "gelu"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., C) -> the same shape."""
        dense = functools.partial(Dense, dtype=self.dtype)
        hidden = ACTIVATIONS[self.activation](dense(self.hidden, name="fc1")(x))
        return dense(x.shape[-1], name="fc2")(hidden)


def _whole(parameter: jax.Array) -> jax.Array:
    """Has every device of the mesh in context hold all of a parameter."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Auto not in mesh.axis_types:
        return parameter
    return jax.lax.with_sharding_constraint(parameter, PartitionSpec())


class QueryKeyValue(nn.Module):
    """q, k, v of attention, what `split_heads` makes of a Dense layer of 3C features, as three products.

    Parameters are that layer's, with the same names. That no array of 3C has to be cut and turned, and that the
    products' results can lie as attention wants them, head by head, is what it is for.
    """

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(..., tokens, C) -> q, k, v, each (..., tokens, heads, C / heads); `q` is scaled."""
        channels = x.shape[-1]
        kernel = self.param("kernel", NORMAL, (channels, 3 * channels)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (3 * channels,))
        kernel, bias = _whole(kernel), _whole(bias)
        x, parts = x.astype(self.dtype), []
        for i in range(3):
            part = slice(i * channels, (i + 1) * channels)
            y = constrain(add_bias(product(x, kernel[:, part]), bias[part]))
            parts.append(checkpoint_name(y, "dense").reshape(*x.shape[:-1], self.heads, -1))
        q, k, v = parts
        return q * q.shape[-1] ** -0.5, k, v


def split_heads(qkv: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(..., tokens, 3C) -> q, k, v, each (..., tokens, heads, C / heads).

    The last axis nests as [3][head][head_dim]: all queries, then all keys, then all values, as in Swin and in
    PyTorch's MultiheadAttention. `q` is scaled by head_dim^-1/2 (after its bias was added).
    """
    qkv = qkv.reshape(*qkv.shape[:-1], 3, heads, -1)
    q, k, v = (qkv[..., i, :, :] for i in range(3))
    return q * q.shape[-1] ** -0.5, k, v


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, drop: Dropout | None = None
) -> jax.Array:
    """Softmax attention; logits and softmax in float32 (Vaswani et al. 2017, equation 1).

    Args:
      q, k, v: (..., tokens, heads, head_dim), `q` already scaled.
      bias: float32, broadcast (same rank) against the logits (..., heads, queries, keys), or None.
      drop: dropout of the weights, or None.

    Returns:
      (..., tokens, heads * head_dim), in the dtype of `v`.
    """
    logits = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=at_least_float32(q.dtype))
    if bias is not None:
        logits = logits + bias
    weights = _softmax(logits, v.dtype)
    if drop is not None:
        weights = drop(weights)
    out = jnp.einsum("...hqk,...khd->...qhd", weights, v)
    return checkpoint_name(out.reshape(*out.shape[:-2], -1), "attention")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _softmax(logits: jax.Array, dtype: Dtype) -> jax.Array:
    """Softmax of float32 logits over the last axis, rounded to `dtype`: what the next product and derivatives keep."""
    return jax.nn.softmax(logits, axis=-1).astype(dtype)


def _softmax_forward(logits: jax.Array, dtype: Dtype) -> tuple[jax.Array, jax.Array]:
    weights = _softmax(logits, dtype)
    return weights, weights


def _softmax_backward(dtype: Dtype, weights: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    weights, grad = (x.astype(at_least_float32(dtype)) for x in (weights, grad))
    return (weights * (grad - (weights * grad).sum(-1, keepdims=True)),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def survival(key: jax.Array, rates: np.ndarray, examples: jax.Array) -> jax.Array:
    """Draws stochastic depth (Huang et al. 2016) for the two residual branches of every block.

    Each example draws from `fold_in(key, its id)`, so that a batch gives the same network to the same example whole,
    in micro-batches, or spread over devices.

    Args:
      key: PRNG key of the step.
      rates: float32 (blocks,), the probability of dropping a branch, in [0, 1).
      examples: int32 (B,), distinct ids, such as positions in the global batch.

    Returns:
      float32 (blocks, 2, B), factors for `scale_branch`: 0 for a dropped branch, 1 / (1 - rate) for a kept one.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, examples)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (len(rates), 2)), out_axes=-1)(keys)
    keep = 1 - rates[:, None, None]
    return jnp.where(draws < keep, 1 / keep, 0)


def scale_branch(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies each example of a residual branch (B, ...) by its float32 factor (B,), in the dtype of the branch."""
    return x * factor.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def unit_norm(x: jax.Array) -> jax.Array:
    """x / ||x||_2 over the last axis in float32; the floor 1e-24 under the root only guards an all-zero vector."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def remat_module(module: type[nn.Module], remat: str, *, scanned: bool) -> type[nn.Module]:
    """The class of a block (or pair of blocks), rematerialised in the backward pass as `remat` says.

    'block' keeps the block's input only. 'dots' keeps the outputs of its linear layers and of attention and recomputes
    what is cheap: LayerNorm, GELU, the softmax. 'none' and 'attention' leave the block alone (see `attention_core`).

    Raises:
      UserError: `remat` is not in `REMATS`.
    """
    if remat not in REMATS:
        raise UserError(f"remat={remat!r}: choose one of {', '.join(REMATS)}")
    policies = {
        "block": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.save_only_these_names("dense", "attention"),
    }
    if remat not in policies:
        return module
    # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward pass.
    return nn.remat(module, policy=policies[remat], prevent_cse=not scanned)


_recomputed_attention = jax.checkpoint(attention, policy=jax.checkpoint_policies.nothing_saveable)


def attention_core(remat: str) -> Callable[..., jax.Array]:
    """`attention`; for remat='attention' the form that keeps q, k and v and recomputes the logits and the softmax."""
    return _recomputed_attention if remat == "attention" else attention
