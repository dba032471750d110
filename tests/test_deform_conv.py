"""The deformable convolution against published numbers, its definition, and torchvision where it is installed."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from florence_jax.errors import UserError
from florence_jax.models.deform_conv import MATRIX_POSITIONS, deform_conv

FAST = ("packed", "matrix")
convolve = jax.jit(deform_conv, static_argnames=("stride", "form"))
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


@pytest.mark.parametrize("form", ["naive", *FAST])
@pytest.mark.parametrize("offset,mask,weight,stride,expected", GOLDEN)
def test_golden(offset, mask, weight, stride, expected, form):
    side = 4 // stride + 1
    x = jnp.arange(25.0).reshape(1, 5, 5, 1)
    offsets = jnp.tile(jnp.array(offset), 9 * side * side).reshape(1, side, side, 18)
    mask = jnp.tile(jnp.array(mask, jnp.float32), side * side).reshape(1, side, side, 9)
    weight = jnp.array(weight, jnp.float32).reshape(3, 3, 1, 1)
    out = convolve(x, offsets, mask, weight, stride=stride, form=form)
    np.testing.assert_allclose(out.reshape(-1), np.array(expected.split(), float), rtol=1e-6)


def arguments(stride=1, batch=8, height=5, width=7, channels=3, features=4):
    """Float64 x, offsets, mask, weight, bias: offsets of fractions, of whole numbers (borders, rows and columns just
    outside), and far outside, in one field."""
    rng = np.random.default_rng(stride)
    size = batch, (height - 1) // stride + 1, (width - 1) // stride + 1
    offsets = rng.normal(0, 2, (*size, 18))
    kind = rng.integers(0, 8, offsets.shape)
    offsets = np.where(kind < 3, np.round(offsets), offsets)
    offsets = np.where(kind == 3, rng.choice([-1e30, -300.5, 41.0, 1e9], offsets.shape), offsets)
    return (
        rng.normal(size=(batch, height, width, channels)),
        offsets,
        rng.uniform(size=(*size, 9)),
        rng.normal(size=(3, 3, channels, features)),
        rng.normal(size=features),
    )


@functools.partial(jax.jit, static_argnames=("stride", "form"))
def value_and_gradients(args, stride, form):
    """The output, and the gradients of all arguments of a sum of it with varied factors."""
    out, transpose = jax.vjp(functools.partial(deform_conv, stride=stride, form=form), *args)
    return out, transpose(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


@pytest.mark.parametrize("dtype,tolerance,stride", [("float64", 1e-10, 1), ("float64", 1e-10, 2), ("float32", 1e-5, 1)])
def test_forms_equal_the_definition_in_value_and_all_gradients(dtype, tolerance, stride):
    with jax.enable_x64(dtype == "float64"):
        args = [jnp.asarray(a, dtype) for a in arguments(stride)]
        results = {form: value_and_gradients(args, stride, form) for form in ("naive", *FAST)}
        for form in FAST:
            for ours, expected in zip(*map(jax.tree.leaves, (results[form], results["naive"])), strict=True):
                assert ours.dtype == dtype
                limit = tolerance * np.abs(expected).max()
                np.testing.assert_allclose(ours, expected, rtol=0, atol=limit, err_msg=form)


def test_the_gradient_of_offsets_is_that_of_the_definition():
    """Against differences, at offsets that are no whole numbers, where it is unique."""
    with jax.enable_x64(True):
        x, _, mask, weight, bias = (jnp.asarray(a) for a in arguments())
        rng = np.random.default_rng(0)
        offsets = rng.integers(-4, 5, (*mask.shape[:3], 18)) + rng.uniform(0.1, 0.9, (*mask.shape[:3], 18))
        gradients = value_and_gradients((x, jnp.asarray(offsets), mask, weight, bias), 1, "packed")[1]
        run = jax.jit(lambda offsets: deform_conv(x, offsets, mask, weight, bias))
        direction = rng.normal(size=offsets.shape)
        out, step = run(offsets), 1e-6
        change = (run(offsets + step * direction) - run(offsets - step * direction)) / (2 * step)
        factors = np.cos(np.arange(out.size)).reshape(out.shape)
        assert (gradients[1] * direction).sum() == pytest.approx(float((change * factors).sum()), rel=1e-7)


def test_positions_and_map_may_differ_in_size():
    """The fine level's offsets on the coarse map, as far as both go."""
    x, _, _, weight, bias = (jnp.asarray(a, jnp.float32) for a in arguments())
    _, offsets, mask, _, _ = (jnp.asarray(a, jnp.float32) for a in arguments(height=3, width=9))
    expected = convolve(x, offsets, mask, weight, bias, form="naive")
    assert expected.shape == (8, 3, 9, 4)
    for form in FAST:
        np.testing.assert_allclose(convolve(x, offsets, mask, weight, bias, form=form), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["naive", *FAST])
def test_an_infinite_offset_is_far_outside_and_nan_stays_where_it_is(form):
    x, offsets, mask, weight, bias = (jnp.asarray(a, jnp.float32) for a in arguments())
    far = offsets.at[0, 0, 0, :2].set(jnp.array([1e4, -1e4])).at[1, 2, 3, 4].set(-1e4)
    infinite = offsets.at[0, 0, 0, :2].set(jnp.array([jnp.inf, -jnp.inf])).at[1, 2, 3, 4].set(-jnp.inf)
    expected, expected_gradients = value_and_gradients((x, far, mask, weight, bias), 1, form)
    out, gradients = value_and_gradients((x, infinite, mask, weight, bias), 1, form)
    jax.tree.map(np.testing.assert_array_equal, (out, gradients), (expected, expected_gradients))
    out, gradients = value_and_gradients((x, far.at[1, 0, 1, 9].set(jnp.nan), mask, weight, bias), 1, form)
    assert np.isnan(out[1, 0, 1]).all() and np.isnan(out).sum() == out.shape[-1]
    np.testing.assert_array_equal(np.delete(out.reshape(-1, 4), 36, 0), np.delete(expected.reshape(-1, 4), 36, 0))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[1][1, 0, 1].any()


@pytest.mark.parametrize("form", FAST)
def test_coordinates_are_float32_in_every_dtype(form):
    """Column 600 and a quarter: bfloat16 has 8 bits."""
    x = jnp.broadcast_to(jnp.arange(640.0).reshape(1, 1, 640, 1) % 8, (1, 3, 640, 1)).astype(jnp.bfloat16)
    offsets = jnp.tile(jnp.array([0, 0.25]), 9 * 3 * 640).reshape(1, 3, 640, 18)
    mask = jnp.zeros((1, 3, 640, 9)).at[..., 4].set(1)
    out = deform_conv(x, offsets, mask, jnp.ones((3, 3, 1, 1)), form=form)
    assert out.dtype == jnp.bfloat16 and out[0, 1, 602, 0] == 2.25


def test_auto_takes_the_matrix_form_for_small_maps():
    def gathers(height, width):
        args = [jnp.asarray(a, jnp.float32) for a in arguments(height=height, width=width, channels=16)]
        return "gather" in str(jax.make_jaxpr(deform_conv)(*args))

    assert MATRIX_POSITIONS == 0.5 and not gathers(4, 2) and gathers(3, 3)
    with pytest.raises(UserError, match="'fast': known are auto, naive, packed, matrix"):
        deform_conv(*(jnp.asarray(a, jnp.float32) for a in arguments()), form="fast")


def test_the_backward_pass_keeps_the_arguments_only():
    args = [jnp.asarray(a, jnp.float32) for a in arguments()]
    bytes_of = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    for form in FAST:
        run = functools.partial(deform_conv, form=form)
        kept = jax.eval_shape(lambda *a, run=run: jax.vjp(run, *a)[1], *args)
        assert bytes_of(kept) <= bytes_of(args), form


def test_working_memory_is_less_than_half_of_the_definitions():
    args = [jnp.asarray(a, jnp.float32) for a in arguments()]
    used = {
        form: value_and_gradients.lower(args, 1, form).compile().memory_analysis().temp_size_in_bytes
        for form in ("naive", *FAST)
    }
    assert max(used[form] for form in FAST) <= used["naive"] / 2, used


@pytest.mark.parametrize("form", FAST)
def test_images_split_over_devices_stay_where_they_are(form):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    args = [jnp.asarray(a, jnp.float32) for a in arguments(batch=8)]
    split = [jax.device_put(a, NamedSharding(mesh, PartitionSpec("data"))) for a in args[:3]]
    whole = [jax.device_put(a, NamedSharding(mesh, PartitionSpec())) for a in args[3:]]
    with jax.set_mesh(mesh):
        compiled = value_and_gradients.lower([*split, *whole], 1, form).compile()
    kinds = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    moved = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text())
    assert {kind for _, kind in moved} == {"all-reduce"}, moved  # the gradients of kernel and bias
    largest = max(
        np.prod([int(n) for n in shape.split(",") if n] or [1])
        for shapes, _ in moved
        for shape in re.findall(r"f32\[([\d,]*)\]", shapes)
    )
    assert largest <= args[3].size, moved
    out, gradients = compiled([*split, *whole])
    assert out.sharding.spec == PartitionSpec("data")
    expected = value_and_gradients(args, 1, "naive")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), (out, gradients), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_equals_torchvision(stride):
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision.ops")
    channels_first = lambda a: torch.tensor(np.moveaxis(a, -1, 1), requires_grad=True)  # noqa: E731
    args = arguments(stride)
    args[1][np.abs(args[1]) > 1e6] = -12.25  # torchvision makes any number an int32
    x, offsets, mask = map(channels_first, args[:3])
    weight = torch.tensor(args[3].transpose(3, 2, 0, 1), requires_grad=True)
    bias = torch.tensor(args[4], requires_grad=True)
    theirs = ops.deform_conv2d(x, offsets, weight, bias, stride, padding=1, mask=mask)
    out = theirs.detach().permute(0, 2, 3, 1).numpy()
    theirs.backward(torch.cos(torch.arange(out.size, dtype=torch.float64)).reshape(out.shape).permute(0, 3, 1, 2))
    back = [a.grad.permute(0, 2, 3, 1).numpy() for a in (x, offsets, mask)]
    expected = out, (*back, weight.grad.permute(2, 3, 1, 0).numpy(), bias.grad.numpy())
    with jax.enable_x64(True):
        for form in FAST:
            ours = value_and_gradients([jnp.asarray(a) for a in args], stride, form)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), ours, expected)
