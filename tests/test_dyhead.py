"""Dynamic Head blocks against the numbers of the released code, and their parts against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import convert, cosx, fill, sinx

from florence_jax.models.dyhead import COARSE_MODES, DyHeadBlock, DyReLU, cut_flat, group_norm, resize_corners

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


@pytest.mark.parametrize("coarse", COARSE_MODES)
def test_block_golden(block, coarse):
    """Each map in the corner of a larger one, which changes nothing."""
    params, maps = block
    canvases = tuple(np.pad(x, ((0, 0), (0, 4 >> i), (0, 8 >> i), (0, 0))) for i, x in enumerate(maps))
    valids = tuple(jnp.array([size]) for size in SIZES)
    levels = jax.jit(DyHeadBlock(coarse).apply)({"params": params}, canvases, valids)[0]
    for got, (height, width), want in zip(levels, SIZES, BLOCK[coarse], strict=True):
        got = np.asarray(got, np.float64)
        assert got.shape[1] > height and not got[:, height:].any() and not got[:, :, width:].any()
        got = got[:, :height, :width].transpose(0, 3, 1, 2)
        np.testing.assert_allclose(got.ravel()[:2], want[:2], atol=2e-5)
        np.testing.assert_allclose(got.sum(), want[2], atol=1e-5 * np.abs(got).sum())


def test_dyrelu_golden():
    """Coefficients that are constants: the hidden layer's weights are 0."""
    params = {
        "fc1": {"kernel": jnp.zeros((4, 1)), "bias": jnp.zeros(1)},
        "fc2": {"kernel": jnp.zeros((1, 16)), "bias": jnp.linspace(-4, 4, 16)},
    }
    x = jnp.array([-1, 2, 0.5, -3])
    apply = jax.jit(DyReLU().apply)
    got = apply({"params": params}, x.reshape(1, 1, 1, 4), x[None])
    np.testing.assert_allclose(got[0, 0, 0], [0.311111, 1.022222, 0.722222, -0.644445], atol=1e-6)
    plain = jax.tree.map(jnp.zeros_like, params)
    got = apply({"params": plain}, x.reshape(1, 1, 1, 4), x[None])
    np.testing.assert_allclose(got[0, 0, 0], jax.nn.relu(x), atol=1e-6)


def test_resizing_maps_corners_onto_each_other():
    """Of each image's own part: as if it were alone."""
    x = np.float32(cosx(2, 4, 6, 3))
    valid, valid_out = jnp.array([[4, 6], [2, 1]]), jnp.array([[8, 11], [3, 2]])
    got = jax.jit(resize_corners, static_argnums=1)(x, (8, 12), valid, valid_out)
    for image, (rows, columns), (rows_out, columns_out), own in zip(x, valid, valid_out, got, strict=True):
        for axis, n, n_out in ((0, rows, rows_out), (1, columns, columns_out)):
            image = np.moveaxis(image, axis, -1)[..., :n]
            places = np.linspace(0, n - 1, n_out)
            image = np.apply_along_axis(
                lambda line, n=n, places=places: np.interp(places, np.arange(n), line), -1, image
            )
            image = np.moveaxis(image, -1, axis)
        np.testing.assert_allclose(own[:rows_out, :columns_out], image, atol=1e-5)


def test_offsets_cut_flat():
    """Of each image's own part, channels first, the first numbers."""
    field = sinx(0.3, 2, 6, 7, 5)
    sizes, coarse = ((6, 7), (5, 3)), ((3, 4), (3, 2))
    got = jax.jit(cut_flat, static_argnums=1)(field, (3, 4), jnp.array(sizes), jnp.array(coarse))
    for image, (height, width), (rows, columns), own in zip(field, sizes, coarse, got, strict=True):
        flat = image[:height, :width].transpose(2, 0, 1).ravel()[: 5 * rows * columns]
        np.testing.assert_array_equal(own[:rows, :columns], flat.reshape(5, rows, columns).transpose(1, 2, 0))


def test_group_norm():
    """Statistics of each image's own part; an image without any is finite."""
    x = 3 + sinx(0.7, 2, 4, 5, 32)
    got = jax.jit(group_norm)(x, jnp.ones(32), jnp.zeros(32), jnp.array([[3, 2], [0, 0]]))
    own = x[0, :3, :2].reshape(6, 16, 2)
    want = (own - own.mean((0, 2), keepdims=True)) / np.sqrt(own.var((0, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(got[0, :3, :2].reshape(6, 16, 2), want, atol=1e-5)
    assert jnp.isfinite(got).all()
