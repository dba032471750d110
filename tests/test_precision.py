"""What runs in which precision: a walk over the traced bfloat16 training loss, and the optimizer's first moment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.pretrain import get_config
from florence_jax.errors import UserError
from florence_jax.losses.unicl import unicl
from florence_jax.models import layers
from florence_jax.params.sharding import make_mesh
from florence_jax.tasks import pretrain
from florence_jax.train.defaults import common
from florence_jax.train.optim import make_optimizer

SIZES = dict(
    res=32, image_width=16, depths=(2, 4), heads=(1, 2), window=4, drop_path=0.2, text_width=16, text_layers=3,
    text_heads=2, text_length=8, projection=16,
)  # fmt: skip
# What normalisation, softmax and the loss are made of.
SENSITIVE = {"reduce_sum", "reduce_max", "reduce_prod", "cumsum", "psum", "psum_invariant"}
SENSITIVE |= {"exp", "exp2", "log", "log1p", "sqrt", "rsqrt"}
LOW = {"bfloat16", "float16"}


def sub_jaxprs(value):
    """Every jaxpr inside a parameter of an equation: scan, remat, jit, custom derivatives, shard_map, cond."""
    if isinstance(value, jax.extend.core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, jax.extend.core.Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from sub_jaxprs(item)


def walk(jaxpr, scope=""):
    """(scope, primitive, input dtypes) of every equation, inner ones too; a scope ends with the enclosing ones."""
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        yield here, eqn.primitive.name, {str(v.aval.dtype) for v in eqn.invars if hasattr(v.aval, "dtype")}
        for value in eqn.params.values():
            for sub in sub_jaxprs(value):
                yield from walk(sub, here)


def trace(remat="none", micro_batch=0, mesh=None):
    """Equations of the value and gradient of the task's loss with bfloat16 compute."""
    config = get_config()
    config.precision = "bfloat16"
    config.model.overrides.update(SIZES | {"remat": remat})
    config.grad_cache.micro_batch = micro_batch
    task = pretrain.Pretrain(config)
    shapes = {
        "image": jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((16, 2, 8), jnp.int32),
        "label": jax.ShapeDtypeStruct((16, 2, 2), jnp.int32),
    }
    key = jax.random.key(0)
    step = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    with jax.sharding.use_abstract_mesh((mesh or make_mesh(1, 1, jax.devices()[:1])).abstract_mesh):
        return list(walk(jax.make_jaxpr(step)(jax.eval_shape(task.init, key), shapes, key).jaxpr))


def offenders(equations):
    """Sensitive equations with a low-precision input, but the exponential in the derivative of GELU's erf."""
    return {
        (name, scope)
        for scope, name, dtypes in equations
        if name in SENSITIVE and dtypes & LOW and not (name == "exp" and "mlp" in scope)
    }


@pytest.mark.parametrize("remat,micro_batch,devices", [("none", 0, 1), ("dots", 2, 8), ("attention", 0, 8)])
def test_norms_softmax_and_loss_run_in_float32(remat, micro_batch, devices):
    equations = trace(remat, micro_batch, make_mesh(devices, 1, jax.devices()[:devices]))
    assert not offenders(equations)
    found = {name for _, name, _ in equations}
    assert {"scan", "exp", "log", "rsqrt", "reduce_max", "reduce_sum"} <= found
    assert ("shard_map" in found) == (devices > 1) and ("remat2" in found or "checkpoint" in found) == (remat != "none")
    products = [dtypes for scope, name, dtypes in equations if name == "dot_general" and "qkv" in scope]
    assert len(products) >= 3 * 4 and all(dtypes == {"bfloat16"} for dtypes in products)


def low_norm(x, scale, bias, eps):
    x = x.astype(jnp.bfloat16)
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + eps)
    return x * scale.reshape(*(1,) * (x.ndim - 1), -1) + bias.reshape(*(1,) * (x.ndim - 1), -1)


def low_attention(q, k, v, bias=None):
    logits = jnp.einsum("...qhd,...khd->...hqk", q, k) + bias.astype(q.dtype)
    out = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(logits), v)
    return out.reshape(*out.shape[:-2], -1)


def low_loss(image, text, labels, scale):
    logits = (scale * image @ text.T).astype(jnp.bfloat16)
    loss = jax.nn.logsumexp(logits, axis=1).mean() - jnp.diagonal(logits).mean()
    return loss.astype(jnp.float32), unicl(image, text, labels, scale)[1]


@pytest.mark.parametrize(
    "module,name,bad,primitive",
    [
        (layers, "layer_norm", low_norm, "rsqrt"),
        (layers, "attention", low_attention, "exp"),
        (layers, "add_bias", lambda x, b: x + b.astype(x.dtype).reshape(*(1,) * (x.ndim - 1), -1), "reduce_sum"),
        (pretrain, "unicl", low_loss, "exp"),
    ],
    ids=["norm", "softmax", "bias", "loss"],
)
def test_the_walk_finds_low_precision(monkeypatch, module, name, bad, primitive):
    monkeypatch.setattr(module, name, bad)
    assert primitive in {name for name, _ in offenders(trace())}


def test_bias_gradients_are_summed_in_float32():
    """65,536 ones: a bfloat16 sum would stand still at 256."""
    x = jnp.zeros((65536, 2), jnp.bfloat16)
    grad = jax.jit(jax.grad(lambda bias: layers.add_bias(x, bias).astype(jnp.float32).sum()))(jnp.zeros(2))
    np.testing.assert_array_equal(grad, 65536)


def test_first_moment_in_bfloat16():
    params = {"kernel": jnp.linspace(-1, 1, 64).reshape(8, 8)}
    grads = {"kernel": jnp.cos(jnp.arange(64.0)).reshape(8, 8)}
    updates = {}
    for dtype in ("float32", "bfloat16"):
        optim = common("unused").optim
        optim.update(mu_dtype=dtype, decay_rules=((".*", True),))
        optimizer = make_optimizer(optim, 10, params).transform
        state = optimizer.init(params)
        for _ in range(3):
            updates[dtype], state = optimizer.update(grads, state, params)
        moments = next(part for part in state if hasattr(part, "mu"))
        assert moments.mu["kernel"].dtype == dtype and moments.nu["kernel"].dtype == jnp.float32
        assert updates[dtype]["kernel"].dtype == jnp.float32
    difference = jnp.abs(updates["bfloat16"]["kernel"] - updates["float32"]["kernel"]).max()
    # Two roundings to bfloat16, of 2^-8 each.
    assert 0 < difference < 2**-7 * jnp.abs(updates["float32"]["kernel"]).max()


def test_unknown_first_moment_is_refused():
    optim = common("unused").optim
    optim.mu_dtype = "int8"
    with pytest.raises(UserError, match="mu_dtype='int8'"):
        make_optimizer(optim, 10, {"kernel": jnp.zeros((2, 2))})
