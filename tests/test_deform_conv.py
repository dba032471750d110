"""The deformable convolution against published numbers, its definition, and torchvision where it is installed."""

import jax.numpy as jnp
import numpy as np
import pytest

from florence_jax.models.deform_conv import deform_conv

# Printed by the reference implementation for x = 0..24 as 5x5, one channel. The first is detectron2's own test.
HALF = """30 41.25 48.75 45 28.75 62.25 81 90 80.25 50.25 99.75 126 135 117.75 72.75
          105 131.25 138.75 120 73.75 71.75 89.25 93.75 80.75 49.5"""
TAPS = """82.65 136.95 177.45 204.9 174.975 165.1125 259.05 316.875 345.375 285 251.3625 385.05 459.375 487.875 396
          265.975 401.275 472.55 496.2 398.35 92.425 131.975 151.3125 158.4875 122.35"""
STRIDED = "99.75 234 243.75 340.875 669.75 598.5 196.25 351.875 298.25"
ONES, COUNT = np.ones(9), np.arange(1.0, 10)
GOLDEN = [  # offset (dy, dx), mask of the taps, weight of the taps, stride, output
    ((0.5, 0.5), ONES, ONES, 1, HALF),
    ((0.5, 0.5), ONES / 2, 2 * ONES, 1, HALF),
    ((0.25, -0.5), COUNT / 10, COUNT, 1, TAPS),
    ((0.25, -0.5), ONES, COUNT, 2, STRIDED),
]


@pytest.mark.parametrize("offset,mask,weight,stride,expected", GOLDEN)
def test_golden(offset, mask, weight, stride, expected):
    side = 4 // stride + 1
    x = jnp.arange(25.0).reshape(1, 5, 5, 1)
    offsets = jnp.tile(jnp.array(offset), 9 * side * side).reshape(1, side, side, 18)
    mask = jnp.tile(jnp.array(mask, jnp.float32), side * side).reshape(1, side, side, 9)
    out = deform_conv(x, offsets, mask, jnp.array(weight, jnp.float32).reshape(3, 3, 1, 1), stride=stride)
    np.testing.assert_allclose(out.reshape(-1), np.array(expected.split(), float), rtol=1e-6)
