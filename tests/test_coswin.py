"""CoSwin against the reference modules' numbers, and its options against their definitions."""

import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from golden import block_shapes, convert, coswin_params, cosx, embed_shapes, fill, random_params, sinx

from florence_jax.errors import UserError
from florence_jax.models import coswin
from florence_jax.models.layers import convolve, convolve_reference, gelu, scale_branch, survival
from florence_jax.models.resize import bicubic_matrix, resize_bias_tables
from florence_jax.models.windows import (
    SwinBlock,
    WindowAttention,
    attention_mask,
    partition,
    relative_position_index,
    unpartition,
    zero_outside,
)

QUICK = {"xla_backend_optimization_level": 0}  # halves the compilation
TINY = dict(width=8, depths=(2, 2), heads=(2, 4), window=4)


def assert_sums(y, total, magnitude):
    """Sums to 1e-5 of the sum of magnitudes (a plain relative error of a cancelling sum means nothing)."""
    y = np.asarray(y, np.float64)
    np.testing.assert_allclose([y.sum(), np.abs(y).sum()], [total, magnitude], rtol=0, atol=1e-5 * magnitude)


def apply(module, params, *inputs):
    return jax.jit(module.apply)({"params": params}, *inputs)


def test_relative_position_index():
    expected = [
        [7, 6, 5, 2, 1, 0],
        [8, 7, 6, 3, 2, 1],
        [9, 8, 7, 4, 3, 2],
        [12, 11, 10, 7, 6, 5],
        [13, 12, 11, 8, 7, 6],
        [14, 13, 12, 9, 8, 7],
    ]
    np.testing.assert_array_equal(relative_position_index((2, 3)), expected)


def test_shift_mask():
    open_pairs = [np.ones((4, 4)), *[np.equal.outer(ids, ids) for ids in ([0, 1, 0, 1], [0, 0, 1, 1])], np.eye(4)]
    np.testing.assert_array_equal(attention_mask((4, 4), (2, 2), (1, 1))[0], np.where(open_pairs, 0, -100))


def windows_reference(sizes, window, shift, valid):
    """Window by window, token by token: (flat position, region, whether it lies within `valid`)."""
    found = []
    for corner in np.ndindex(*(n // side for n, side in zip(sizes, window, strict=True))):
        tokens = []
        for offset in np.ndindex(*window):
            rolled = [c * side + o for c, side, o in zip(corner, window, offset, strict=True)]
            position = [(r + s) % n for r, s, n in zip(rolled, shift, sizes, strict=True)]
            region = [
                (r >= n - side) + (r >= n - s) for r, n, side, s in zip(rolled, sizes, window, shift, strict=True)
            ]
            inside = all(p < v for p, v in zip(position, valid, strict=True))
            tokens.append((int(np.ravel_multi_index(position, sizes)), region, inside))
        found.append(tokens)
    return found


@pytest.mark.parametrize(
    ("sizes", "window", "shift", "valid"),
    [
        ((6, 4), (3, 2), (1, 1), (5, 3)),
        ((4, 6, 4), (2, 3, 2), (1, 1, 1), (3, 5, 4)),
        ((2, 4, 4), (2, 2, 2), (0, 1, 1), (2, 3, 4)),
    ],
)
def test_windows_of_two_and_three_axes(sizes, window, shift, valid):
    """Places, masks and bias rows against loops over tokens."""
    tokens = windows_reference(sizes, window, shift, valid)
    grid = np.arange(np.prod(sizes)).reshape(1, *sizes, 1)
    rolled = np.roll(grid, [-n for n in shift], range(1, len(sizes) + 1))
    got = partition(rolled, window)
    np.testing.assert_array_equal(got[0, :, :, 0], [[position for position, *_ in one] for one in tokens])
    np.testing.assert_array_equal(unpartition(got, sizes, window), rolled)
    blocked = [[[a[1] != b[1] or not b[2] for b in one] for a in one] for one in tokens]
    masks = attention_mask(sizes, window, shift, jnp.array([sizes, valid]))
    np.testing.assert_array_equal(masks[1], np.where(blocked, -100, 0))
    np.testing.assert_array_equal(masks[0], attention_mask(sizes, window, shift)[0])
    places, box = np.array(list(np.ndindex(*window))), 2 * np.array(window) - 1
    index = [[np.ravel_multi_index(q - k + np.array(window) - 1, box) for k in places] for q in places]
    np.testing.assert_array_equal(relative_position_index(window), index)


def test_block_over_three_axes():
    """Windows of one frame: each frame as in two axes. Of two: a frame beyond `valid` changes nothing."""
    x = jnp.asarray(cosx(2, 3, 4, 6, 8))
    plain = SwinBlock(heads=2, window=(2, 2), shift=(1, 1), mask_padding=True)
    params = random_params(plain, x[:, 0], scale=0.3)
    want = apply(plain, params, x.reshape(6, 4, 6, 8)).reshape(x.shape)
    got = apply(SwinBlock(heads=2, window=(1, 2, 2), shift=(0, 1, 1), mask_padding=True), params, x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    video = SwinBlock(heads=2, window=(2, 2, 2), shift=(1, 1, 1), mask_padding=True)
    params = random_params(video, x, scale=0.3)
    got = apply(video, params, x.at[:, 2].set(99.0), None, jnp.array([[2, 4, 6]] * 2))[:, :2]
    np.testing.assert_allclose(got, apply(video, params, x[:, :2]), atol=1e-5)


def test_window_attention_golden():
    shapes = {name[5:]: s for name, s in block_shapes(8, 2, 2).items() if name.startswith("attn.")}
    shapes["relative_position_bias_table"] = (15, 2)
    y = apply(WindowAttention(heads=2, window=(2, 3)), convert(fill(shapes, 0.5)), cosx(2, 6, 8)[:, None])
    first = [0.29024737, 0.32429879, 0.36367760, 0.67636105, 0.21383551, 0.74469240, -0.15260326, 0.55950421]
    np.testing.assert_allclose(y[0, 0, 0], first, atol=1e-5)
    assert_sums(y, 39.32546944, 55.61472391)


def test_block_golden():
    params = convert(fill(block_shapes(8, 2, 2), 0.3), ((r"^attn\.", "attention."),))
    y = apply(SwinBlock(heads=2, window=(2, 2), shift=(1, 1)), params, cosx(1, 4, 4, 8))
    first = [0.05370901, -0.21070657, 0.51468390, 1.51771960, 2.50698446, 2.82391190, 2.19822526, 1.00562574]
    np.testing.assert_allclose(y[0, 0, 0], first, atol=1e-5)
    assert_sums(y, 69.07122041, 173.42517637)


@pytest.mark.parametrize(
    "sizes,shape,first,total,magnitude",
    [
        ((7, 4, 2), (1, 4, 5, 6), [-0.49720963, -1.35809946, -1.49227030], 19.57064428, 122.19658645),
        ((3, 2, 1), (1, 8, 10, 6), [-0.76275860, -0.51695015, -0.25661345], 79.00876532, 479.13788415),
    ],
)  # fmt: skip
def test_conv_embed_golden(sizes, shape, first, total, magnitude):
    params = convert(fill(embed_shapes("", sizes[0], 3, 6), 0.2), ((r"^proj\.", ""),))
    y = apply(coswin.ConvEmbed(6, *sizes), params, cosx(1, 3, 16, 20).transpose(0, 2, 3, 1))
    assert y.shape == shape
    np.testing.assert_allclose(y[0, 0, : len(first), 0], first, atol=1e-5)
    assert_sums(y, total, magnitude)


@pytest.mark.parametrize(
    "size,window,mode,pooled,total,magnitude",
    [
        ((56, 56), 7, "classification", [-0.38254890, 1.61548539, 1.28910528, -0.92760633], 24.20782475, 691.21326611),
        ((56, 56), 7, "detection", [-0.38274083, 1.61553419, 1.28937585, -0.92731520], 24.22016410, 691.21769090),
        ((56, 84), 4, "detection", [-0.58045493, 1.53757806, 1.69654282, -0.47219882], 52.53774648, 1087.30177483),
    ],
)
def test_coswin_golden(size, window, mode, pooled, total, magnitude):
    model = coswin.CoSwin(**TINY | dict(window=window), size_mode=mode, out_stages=(1,))
    image = sinx(0.013, 1, 3, *size).transpose(0, 2, 3, 1)
    if mode == "detection":
        params = coswin_params(window, output_norm="norm1")
        outputs = apply(model, params | {"norm": params["norm1"]}, image)
        y = outputs["norm1"]
        np.testing.assert_allclose(outputs["pooled"], y.mean((1, 2)), atol=1e-6)
        np.testing.assert_allclose(outputs["tokens"], y.reshape(1, -1, 16), atol=1e-6)
        np.testing.assert_allclose(y.mean((1, 2))[0, :4], pooled, atol=1e-5)
        assert_sums(y, total, magnitude)
    else:
        outputs = apply(model, coswin_params(window, output_norm="norm"), image)
        np.testing.assert_allclose(outputs["pooled"][0, :4], pooled, atol=1e-5)
        np.testing.assert_allclose(outputs["pooled"].sum() * 49, total, atol=1e-5 * magnitude)


def test_bicubic_ramp():
    ramp = bicubic_matrix(13, 23) @ np.arange(13)
    expected = [-0.09986, 0.27139, 0.87507, 1.48368, 2.06246, 2.58281, 3.22076, 3.69302, 4.34577, 4.82765, 5.45081, 6.0]
    np.testing.assert_allclose(ramp[:12], expected, atol=1e-5)
    np.testing.assert_allclose(ramp + ramp[::-1], 12, atol=1e-12)


def test_resize_bias_tables():
    small = coswin.CoSwin(**TINY | dict(window=7))
    params = random_params(small, jnp.zeros((1, 56, 56, 3)))
    ramp = np.broadcast_to(np.repeat(np.arange(13.0), 13)[:, None], (169, 2))  # varies with dy only
    params["stage0_pair0"]["plain"]["attention"]["relative_position_bias_table"] = ramp
    resized = resize_bias_tables({"image": params}, (12, 6))["image"]
    table = resized["stage0_pair0"]["plain"]["attention"]["relative_position_bias_table"].reshape(23, 23, 2)
    np.testing.assert_allclose(table, np.broadcast_to(table[:, :1, :1], table.shape), atol=1e-6)
    np.testing.assert_allclose(table[1, 0], 0.27139, atol=1e-5)
    large = coswin.CoSwin(**TINY | dict(window=12))
    shapes = jax.eval_shape(large.init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))["params"]
    resized = resize_bias_tables(params, 12)
    assert jax.tree.map(jnp.shape, resized) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    assert resized["stage0_embed"]["kernel"] is params["stage0_embed"]["kernel"]


@pytest.mark.parametrize("remat", ["none", "block"])
def test_scan_equals_unrolled(remat):
    sizes = dict(width=8, depths=(4,), heads=(2,), window=2)
    image = jnp.asarray(sinx(0.013, 2, 16, 16, 3))
    unrolled, scanned = coswin.CoSwin(**sizes, scan=False), coswin.CoSwin(**sizes, remat=remat)
    params = random_params(unrolled, image)
    stacked = dict(params)
    pairs = [stacked.pop(f"stage0_pair{j}") for j in range(2)]
    stacked["stage0_pairs"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
    loss = lambda model: lambda p: jnp.sin(3 * model.apply({"params": p}, image)["pooled"]).sum()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss(unrolled)))(params)
    value_scan, grads_scan = jax.jit(jax.value_and_grad(loss(scanned)))(stacked)
    np.testing.assert_allclose(value_scan, value, rtol=1e-5)
    for j in range(2):
        got = jax.tree.map(lambda leaf, j=j: leaf[j], grads_scan["stage0_pairs"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, grads[f"stage0_pair{j}"])


def test_mask_padding_equals_attention_over_real_tokens():
    """A 4 x 3 map in a 4 x 4 window: with the flag, the same as a 4 x 3 window with the matching part of the table."""
    x = jnp.asarray(cosx(2, 4, 3, 8))
    params = random_params(SwinBlock(heads=2, window=(4, 4), shift=(0, 0)), x, scale=0.3)
    params["mlp"]["fc2"] = jax.tree.map(jnp.zeros_like, params["mlp"]["fc2"])  # the attention branch alone
    table = params["attention"]["relative_position_bias_table"].reshape(7, 7, 2)[:, 1:6].reshape(35, 2)
    cropped = params["attention"] | {"relative_position_bias_table": table}
    tokens = apply(coswin.LayerNorm(), params["norm1"], x).reshape(2, 1, 12, 8)
    want = x + apply(WindowAttention(heads=2, window=(4, 3)), cropped, tokens).reshape(x.shape)
    error = {
        flag: jnp.abs(apply(SwinBlock(2, (4, 4), (0, 0), mask_padding=flag), params, x) - want).max()
        for flag in (True, False)
    }
    assert error[True] < 1e-5 < 1e-2 < error[False]


def padded_model(embedding="conv", mask_padding=True):
    """A tower, a picture of 30 x 37 pixels, and it inside one of 48 x 64, surrounded by zeros and by nines."""
    model = coswin.CoSwin(
        **TINY, size_mode="detection", mask_padding=mask_padding, embedding=embedding, out_stages=(1,)
    )
    image = np.float32(2 * np.sin(0.7 * np.arange(30 * 37 * 3)).reshape(1, 30, 37, 3))
    pads = ((0, 0), (0, 18), (0, 27), (0, 0))
    zeros, nines = (np.pad(image, pads, constant_values=value) for value in (0, 9))
    params = random_params(model, image, scale=0.3)
    run = jax.jit(lambda image, valid: model.apply({"params": params}, image, valid=valid), compiler_options=QUICK)
    return run, image, zeros, nines


@pytest.mark.parametrize("embedding", ["conv", "patch"])
def test_a_padded_picture_is_as_one_alone(embedding):
    """With `mask_padding`: every output of the picture's own part."""
    run, image, _, nines = padded_model(embedding)
    alone, padded = run(image, None), run(nines, jnp.array([[30, 37]]))
    for name in ("stage0", "stage1", "norm1"):
        height, width = alone[name].shape[1:3]
        assert padded[name].shape[1] > height and padded[name].shape[2] > width
        np.testing.assert_array_equal(padded[f"valid{name[-1]}"], [[height, width]])
        np.testing.assert_allclose(padded[name][:, :height, :width], alone[name], atol=1e-5)
    np.testing.assert_allclose(padded["pooled"], alone["pooled"], atol=1e-5)


def test_padding_without_the_mask():
    """The published detectors: padding is zeros that take part in attention; only the mean leaves them out."""
    run, _, zeros, nines = padded_model(mask_padding=False)
    got, want = run(nines, jnp.array([[30, 37]])), run(zeros, jnp.array([[48, 64]]))
    np.testing.assert_allclose(got["tokens"], want["tokens"], atol=1e-5)
    height, width = got["valid1"][0]
    own = want["tokens"].reshape(want["stage1"].shape)[0, :height, :width]
    np.testing.assert_allclose(got["pooled"][0], own.mean((0, 1)), atol=1e-5)
    assert jnp.abs(got["pooled"] - want["pooled"]).max() > 1e-3


def test_zero_outside():
    got = zero_outside(jnp.ones((2, 2, 3, 1)), jnp.array([[1, 2], [2, 0]]))[..., 0]
    np.testing.assert_array_equal(got, [[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]])


def test_stochastic_depth():
    x = jnp.ones((4096, 3))
    y = scale_branch(x, survival(jax.random.key(0), np.float32([0, 0.25]), jnp.arange(4096))[1, 0])
    np.testing.assert_allclose(jnp.unique(y), [0, 4 / 3], rtol=1e-6)
    np.testing.assert_array_equal(y, jnp.broadcast_to(y[:, :1], y.shape))  # whole examples
    np.testing.assert_allclose(y.mean(), 1, atol=0.03)  # 3.3 standard errors

    image = jnp.broadcast_to(sinx(0.013, 1, 16, 16, 3), (16, 16, 16, 3))
    model = coswin.CoSwin(**TINY | dict(depths=(4,), heads=(2,)), drop_path=0.5)
    params = random_params(model, image, scale=0.3)
    forward = jax.jit(model.apply, static_argnums=2)
    run = lambda key, train=True: forward({"params": params}, image, train, rngs={"drop_path": jax.random.key(key)})  # noqa: E731
    np.testing.assert_array_equal(run(1)["pooled"], run(1)["pooled"])
    assert jnp.abs(run(1)["pooled"] - run(2)["pooled"]).max() > 1e-2
    assert jnp.ptp(run(1)["pooled"], axis=0).max() > 1e-2  # examples draw separately
    assert jnp.ptp(run(1, train=False)["pooled"], axis=0).max() < 1e-4


def test_stochastic_depth_rates_grow_linearly():
    """The first block of the network never drops; later ones do, at rates up to `drop_path`."""
    image = jnp.broadcast_to(sinx(0.013, 1, 16, 16, 3), (512, 16, 16, 3))
    model = coswin.CoSwin(width=8, depths=(2,), heads=(2,), window=4, drop_path=0.5)
    params = random_params(model, image, scale=0.3)
    only = lambda block: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, p: p * (block in jax.tree_util.keystr(path) or "pair" not in jax.tree_util.keystr(path)), params
    )
    run = jax.jit(lambda p: model.apply({"params": p}, image, True, rngs={"drop_path": jax.random.key(3)})["stage0"])
    plain, shifted = run(only("plain")), run(only("shifted"))
    assert jnp.ptp(plain, axis=0).max() < 1e-5
    kinds = np.unique(np.round(np.asarray(shifted[:, 0, 0, 0]), 4))
    assert 3 <= len(kinds) <= 4  # both, either or no branch dropped: the branches draw separately


def test_bfloat16_keeps_norm_and_softmax_in_float32():
    model = coswin.CoSwin(**TINY, dtype=jnp.bfloat16)
    image = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), image)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    jaxpr = jax.make_jaxpr(model.apply)(params, image)
    dtypes: dict[str, set] = {}

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            dtypes.setdefault(eqn.primitive.name, set()).update(str(v.aval.dtype) for v in eqn.invars)
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                visit(sub)

    visit(jaxpr.jaxpr)
    assert dtypes["exp"] == {"float32"} and dtypes["rsqrt"] == {"float32"}
    assert dtypes["dot_general"] == {"bfloat16"} and dtypes["conv_general_dilated"] == {"bfloat16"}


def test_initialisation():
    model = coswin.CoSwin(width=64, depths=(2,), heads=(2,), window=7)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 56, 56, 3)))["params"]
    conv, block = params["stage0_embed"], params["stage0_pair0"]["plain"]
    bound = (3 * 49) ** -0.5
    for leaf in (conv["kernel"], conv["bias"]):
        assert 0.9 * bound < jnp.abs(leaf).max() <= bound
    np.testing.assert_allclose(block["mlp"]["fc1"]["kernel"].std(), 0.02, rtol=0.03)
    assert jnp.abs(block["mlp"]["fc1"]["kernel"]).max() > 0.06  # not truncated at two sigma
    np.testing.assert_allclose(block["attention"]["relative_position_bias_table"].std(), 0.02, rtol=0.1)
    assert not block["attention"]["qkv"]["bias"].any()


def test_gelu_is_exact():
    expected = [-0.00404969, -0.15865525, 0.34573123, 1.9544997]  # the tanh form is off by 2e-4 here
    np.testing.assert_allclose(gelu(jnp.float32([-3, -1, 0.5, 2])), expected, atol=1e-6)


@pytest.mark.parametrize(
    "options,size,message",
    [
        (dict(depths=(2, 3)), 32, "even"),
        (dict(size_mode="video"), 32, "size_mode"),
        (dict(heads=(2,)), 32, "per stage"),
        (dict(window=3), 32, "does not divide"),
    ],
)
def test_user_errors(options, size, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(coswin.CoSwin(**TINY | options).init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


@pytest.mark.parametrize(
    ("side", "channels", "features", "kernel", "stride", "padding"),
    [(32, 3, 8, 7, 4, 2), (9, 8, 16, 3, 2, 1), (8, 8, 16, 3, 2, 1), (1, 8, 16, 3, 2, 1), (8, 3, 8, 4, 4, 0)],
)
def test_gradients_of_the_convolution_are_jax_own(side, channels, features, kernel, stride, padding):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, side, side + stride, channels))
    weights = jax.random.normal(keys[1], (kernel, kernel, channels, features))

    got, pull = jax.vjp(lambda x, weights: convolve(x, weights, stride, padding), x, weights)
    want, pull_plain = jax.vjp(lambda x, weights: convolve_reference(x, weights, stride, padding), x, weights)
    grad = jax.random.normal(keys[2], want.shape)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))
    for a, b in zip(pull(grad), pull_plain(grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("size,shape", [((30, 34), (4, 5)), ((32, 36), (4, 5))])
def test_patch_embedding_pads_in_detection_mode(size, shape):
    """Maps are ceil halves; a zero border changes nothing but the size."""
    model = coswin.CoSwin(8, (2, 2), (2, 4), 4, embedding="patch", size_mode="detection", out_stages=(1,))
    image = jnp.zeros((1, *size, 3))
    out = jax.eval_shape(lambda: model.apply(model.init(jax.random.key(0), image), image))
    assert out["stage1"].shape == (1, *shape, 16)
