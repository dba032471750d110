"""Recomputation in the backward pass: the same numbers under every policy, and less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from florence_jax.losses.unicl import unicl
from florence_jax.models import florence
from florence_jax.models.layers import REMATS

# A scanned stage and an unrolled text tower; many heads, so that attention's weights outweigh its inputs.
SIZES = dict(
    res=32, image_width=16, depths=(4,), heads=(8,), window=4, drop_path=0.2, text_width=16, text_layers=1,
    text_heads=2, text_length=8, vocab_size=32, projection=16,
)  # fmt: skip
QUICK = {"xla_backend_optimization_level": 0}  # halves the compilation; the same program and the same buffers
BATCH = 16


def compile_gradient(remat):
    model = florence.build("ti", **SIZES, remat=remat)

    def loss(params, image, text):
        inputs = {"image": image, "text": text}
        out = model.apply(params, inputs, train=True, rngs={"drop_path": jax.random.key(1)})
        return unicl(out["image/embedding"], out["text/embedding"], jnp.arange(BATCH)[:, None], out["logit_scale"])[0]

    arguments = jax.eval_shape(model.init, jax.random.key(0)), *jax.eval_shape(inputs)
    return jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile(QUICK), model


def inputs():
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((BATCH, 32, 32, 3)), jnp.float32)
    return image, jnp.asarray(rng.integers(1, 32, (BATCH, 8)), jnp.int32)


@pytest.fixture(scope="module")
def plain():
    compiled, model = compile_gradient("none")
    params = jax.jit(model.init, compiler_options=QUICK)(jax.random.key(0))
    return compiled, params, compiled(params, *inputs())


@pytest.mark.parametrize("remat", [name for name in REMATS if name != "none"])
def test_same_numbers_and_less_memory(plain, remat):
    compiled, params, (loss, grads) = plain
    rematerialised, _ = compile_gradient(remat)
    got_loss, got = rematerialised(params, *inputs())
    np.testing.assert_allclose(got_loss, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))
    memory = [c.memory_analysis().temp_size_in_bytes for c in (rematerialised, compiled)]
    assert memory[0] < 0.9 * memory[1]
