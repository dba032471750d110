"""Dynamic Head blocks against the numbers of the released code, and their parts against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import convert, cosx, fill, sinx

from florence_jax.models.dyhead import COARSE_MODES, DyHeadBlock, DyReLU

SIZES = ((8, 12), (4, 6), (2, 3))
RENAMES = (
    (r"^AttnConv\.1\.", "scale_attention."),
    (r"^DyConv\.0\.", "coarser."),
    (r"^DyConv\.1\.", "same."),
    (r"^DyConv\.2\.", "finer."),
    (r"\.bn\.", ".norm."),
    (r"\.conv\.", "."),
    (r"^relu\.fc\.0\.", "dyrelu.fc1."),
    (r"^relu\.fc\.2\.", "dyrelu.fc2."),
)
# First two numbers and sum of each level, (1, C, H, W).
BLOCK = {
    "flat": (
        (0.00337335, -0.01391560, 271.32180983),
        (0.63582884, 0.64494829, 43.31842962),
        (-0.01595274, 0.01677742, 15.49793249),
    ),
    "topleft": (
        (-0.00807831, -0.02512784, 264.07252358),
        (0.48868501, 0.46147681, 39.87200958),
        (-0.01595274, 0.01677742, 15.49793249),
    ),
    "upfirst": (
        (-0.00385734, -0.01677257, 269.22281107),
        (0.62917811, 0.74227037, 50.35852855),
        (-0.01595274, 0.01677742, 15.49793249),
    ),
}


@pytest.fixture(scope="module")
def block():
    """Parameters and the three maps of the golden block."""
    shapes = {
        "AttnConv.1.bias": (1,), "AttnConv.1.weight": (1, 16, 1, 1), "offset.bias": (27,),
        "offset.weight": (27, 16, 3, 3), "relu.fc.0.bias": (4,), "relu.fc.0.weight": (4, 16), "relu.fc.2.bias": (64,),
        "relu.fc.2.weight": (64, 4),
    }  # fmt: skip
    for i in range(3):
        shapes |= {f"DyConv.{i}.{name}": (16,) for name in ("bn.bias", "bn.weight", "conv.bias")}
        shapes[f"DyConv.{i}.conv.weight"] = (16, 16, 3, 3)
    params = convert(fill(shapes, 0.3), RENAMES)
    params["scale_attention"]["kernel"] = params["scale_attention"]["kernel"].reshape(16, 1)
    maps = cosx(1, 16, 8, 12), sinx(0.05, 1, 16, 4, 6), np.cos(0.21 * np.arange(96) + 1).reshape(1, 16, 2, 3)
    return params, tuple(np.float32(x).transpose(0, 2, 3, 1) for x in maps)


def run(coarse, params, maps, valids):
    valids = tuple(jnp.array([valid]) for valid in valids)
    return jax.jit(DyHeadBlock(coarse).apply)({"params": params}, maps, valids)[0]


@pytest.mark.parametrize("coarse", COARSE_MODES)
def test_block_golden(block, coarse):
    params, maps = block
    for got, want in zip(run(coarse, params, maps, SIZES), BLOCK[coarse], strict=True):
        got = np.asarray(got, np.float64).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(got.ravel()[:2], want[:2], atol=2e-5)
        np.testing.assert_allclose(got.sum(), want[2], atol=1e-5 * np.abs(got).sum())


def test_dyrelu_golden():
    """Coefficients that are constants: the hidden layer's weights are 0."""
    params = {
        "fc1": {"kernel": jnp.zeros((4, 1)), "bias": jnp.zeros(1)},
        "fc2": {"kernel": jnp.zeros((1, 16)), "bias": jnp.linspace(-4, 4, 16)},
    }
    x = jnp.array([-1, 2, 0.5, -3])
    got = DyReLU().apply({"params": params}, x.reshape(1, 1, 1, 4), x[None])
    np.testing.assert_allclose(got[0, 0, 0], [0.311111, 1.022222, 0.722222, -0.644445], atol=1e-6)
    plain = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(
        DyReLU().apply({"params": plain}, x.reshape(1, 1, 1, 4), x[None])[0, 0, 0], jax.nn.relu(x)
    )
