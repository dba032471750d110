"""The kernel of window attention, interpreted, against the definition and against the form that XLA compiles."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType
from test_precision import walk

from florence_jax.losses.grad_cache import encode_cached
from florence_jax.models import window_attention, window_attention_tpu, window_sizes_tpu
from florence_jax.models.coswin import CoSwin
from florence_jax.models.layers import attention, split_heads
from florence_jax.models.window_attention import fused_attention, use_kernel
from florence_jax.models.window_places import MASKED, Places
from florence_jax.models.windows import SwinBlock, window_places
from florence_jax.params.sharding import BATCH_AXES, batch_sharding, make_mesh, replicated


@pytest.fixture(autouse=True)
def interpreted_fast(monkeypatch):
    """What the kernel does side by side is a longer program, which the interpreter takes long to compile."""
    monkeypatch.setattr(window_attention_tpu, "ROWS_TURNED", 1)
    monkeypatch.setattr(window_sizes_tpu, "MOST_SLOTS", 1)


SMALL = dict(width=128, depths=(4,), heads=(4,), window=2, mlp_ratio=0.1)  # of 16 pixels: 2 x 2 windows, shifted by 1


def reference(qkv, bias, places, heads):
    """Tokens are gathered by window, attend to those of their region that are not outside, and are put back."""
    tokens = places.tokens.reshape(-1)
    windows = qkv.reshape(len(qkv), -1, qkv.shape[-1])[:, places.tokens]
    same = places.regions[:, :, None] == places.regions[:, None]
    mask = np.where(same & ~places.outside[:, None], np.float32(0), np.float32(MASKED))
    out = attention(*split_heads(windows, heads), bias[None, None] + mask[None, :, None])
    return out.reshape(len(qkv), len(tokens), -1)[:, np.argsort(tokens)].reshape(*qkv.shape[:-1], -1)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_close(got, want, tolerance=1e-5):
    """To `tolerance` of each array's largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


# -- the kernel -------------------------------------------------------------------------------------------------------
CASES = {
    "one kind": (16, (7, 14), (7, 7), (0, 0), None, 128),
    "four kinds": (16, (14, 14), (7, 7), (3, 3), None, 128),
    "two kinds, two parts of the channels, two blocks": (32, (4, 3), (2, 3), (1, 0), None, 256),
    "144 tokens": (16, (12, 24), (12, 12), (0, 6), None, 128),
    "padding": (16, (4, 6), (2, 3), (1, 1), (3, 5), 128),
    "three axes": (16, (4, 4, 4), (2, 2, 4), (1, 1, 0), None, 128),
}


@pytest.mark.parametrize("case", CASES)
def test_kernel_is_the_definition(monkeypatch, case):
    """Output and the gradients of q, k, v and the bias."""
    batch, sizes, window, shift, valid, channels = CASES[case]
    monkeypatch.setattr(window_sizes_tpu, "core", lambda: (2**26, channels // 128))
    monkeypatch.setattr(window_attention_tpu, "STRIDED", case == "padding")  # the smallest also as on a TPU
    places, heads, tokens = window_places(sizes, window, shift, valid), channels // 32, int(np.prod(window))
    arguments = normal(0, batch, *sizes, 3 * channels), normal(1, heads, tokens, tokens)

    def both(attend):
        def run(grad, *arguments):
            out, vjp = jax.vjp(lambda qkv, bias: attend(qkv, bias, places, heads), *arguments)
            return out, vjp(grad)

        return jax.jit(run)(normal(2, batch, *sizes, channels), *arguments)

    assert use_kernel("fused", jax.ShapeDtypeStruct((batch, *sizes, channels), jnp.float32), places, heads)
    assert_close(both(fused_attention), both(reference))


@pytest.mark.parametrize(
    ("window", "heads", "turned"), [((4, 4), 2, 2), ((3, 3), 4, 3)], ids=["two heads", "odd tokens, and rows left over"]
)
def test_bfloat16(monkeypatch, window, heads, turned):
    """Numbers in pairs, turned as on a TPU, two windows together: as precise as the definition in bfloat16."""
    monkeypatch.setattr(window_sizes_tpu, "MOST_SLOTS", 32)
    monkeypatch.setattr(window_attention_tpu, "ROWS_TURNED", turned)
    monkeypatch.setattr(window_attention_tpu, "STRIDED", True)
    places, tokens = window_places(window, window, (0, 0)), int(np.prod(window))
    arguments = normal(0, 16, *window, 384), normal(1, heads, tokens, tokens), normal(2, 16, *window, 128)
    half = arguments[0].astype(jnp.bfloat16), arguments[1], arguments[2].astype(jnp.bfloat16)

    def both(attend, qkv, bias, grad):
        out, vjp = jax.vjp(lambda qkv, bias: attend(qkv, bias, places, heads), qkv, bias)
        return out, *vjp(grad)

    exact = both(reference, *arguments)
    rounded, got = both(reference, *half), jax.jit(functools.partial(both, fused_attention))(*half)
    for want, known, found in zip(exact, rounded, got, strict=True):
        assert found.dtype == known.dtype
        error = jnp.abs(found.astype(jnp.float32) - want).max()
        assert 0 < error <= 1.5 * jnp.abs(known.astype(jnp.float32) - want).max()


def test_pieces_say_where_tokens_are():
    places = window_places((6, 8), (3, 4), (1, 2))
    starts, offsets, runs = places.pieces()
    tokens = np.full_like(places.tokens, -1)
    for length, first, end in runs:
        for piece in range(first, end):
            for i in range(length):
                tokens[:, offsets[piece] + i] = starts[:, piece] + i
    np.testing.assert_array_equal(tokens, places.tokens)
    assert runs == ((2, 0, 6),)
    assert window_places((6, 8), (3, 8), (1, 0)).pieces()[2] == ((16, 0, 1), (8, 1, 2))


# -- in the model -----------------------------------------------------------------------------------------------------
def values_and_grads(module, params, x, encode=None, **context):
    """Output, and the gradients of its product with fixed numbers."""
    encode = encode or (lambda params, x: module.apply({"params": params}, x))

    def loss(params, x):
        out = encode(params, x)
        out = out["stage0"] if isinstance(out, dict) else out
        return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum(), out

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True), **context)(params, x)


def perturbed(module, x):
    """Fresh parameters with noise, so that biases and tables matter."""
    params = jax.jit(module.init)(jax.random.key(0), x[:1])["params"]
    return jax.tree.map(lambda leaf: leaf + 0.1 * normal(leaf.size, *leaf.shape), params)


@pytest.mark.parametrize(("sizes", "window", "shift"), [((5, 6), (3, 3), (1, 1)), ((3, 4, 6), (2, 2, 3), (1, 1, 1))])
def test_block(sizes, window, shift):
    """Maps that the windows do not divide, in two and three axes, against rolled and partitioned ones."""
    x, found = normal(0, 16, *sizes, 128), {}
    for form in ("xla", "fused"):
        block = SwinBlock(heads=4, window=window, shift=shift, mlp_ratio=0.1, mask_padding=True, form=form)
        found[form] = values_and_grads(block, perturbed(block, x), x)
    assert_close(found["fused"], found["xla"])


@pytest.mark.parametrize(("remat", "forward"), [("dots", 2), ("block", 4)])
def test_recomputation(remat, forward):
    """Attention has a name: with 'dots' its result is kept. Calls in the blocks of a scanned pair."""
    tower = CoSwin(**SMALL, remat=remat, attention="fused")
    x = jax.ShapeDtypeStruct((16, 16, 16, 3), jnp.float32)
    params = jax.eval_shape(tower.init, jax.random.key(0), x)
    gradient = jax.make_jaxpr(jax.grad(lambda params, x: tower.apply(params, x)["pooled"].sum()))(params, x)
    assert [name for _, name, _ in walk(gradient.jaxpr)].count("pallas_call") == 2 + forward


@pytest.mark.parametrize("micro_batch", [0, 16])
def test_several_devices(micro_batch):
    """Eight, parameters replicated over `data`, scanned pairs, recomputed; whole and through the gradient cache."""
    mesh, x = make_mesh(2, 4), normal(0, 256 if micro_batch else 128, 16, 16, 3)
    towers = {form: CoSwin(**SMALL, remat="dots", attention=form) for form in ("xla", "fused")}
    params = perturbed(towers["xla"], x)

    def encode(params, x):
        out = towers["fused"].apply({"params": params}, x)
        return {"stage0": out["stage0"]}

    def cached(params, x):
        return encode_cached(encode, params, x, micro_batch=micro_batch, axes=BATCH_AXES, replicated=("data",))

    whole, split = replicated(mesh), batch_sharding(mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        got = values_and_grads(
            towers["fused"], jax.device_put(params, whole), jax.device_put(x, split),
            cached if micro_batch else encode, in_shardings=(whole, split),
        )  # fmt: skip
    assert_close(got, values_and_grads(towers["xla"], params, x))


def test_copies_and_computation_do_not_race(monkeypatch):
    """Simulated as on a chip: a copy happens when it is waited for, and memory is not a number at first."""
    given = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True, uninitialized_memory="nan")
    run, places = window_attention_tpu.run, window_places((2, 4), (2, 2), (0, 1))

    def simulated(*arguments, interpret):
        assert interpret
        return run(*arguments, interpret=given)

    monkeypatch.setattr(window_attention_tpu, "run", simulated)
    arguments = normal(0, 16, 2, 4, 384), normal(1, 4, 4, 4)

    def loss(attend):
        return jax.jit(jax.grad(lambda *a: jnp.square(attend(*a, places, 4)).sum(), (0, 1)))(*arguments)

    found = loss(fused_attention)
    assert not interpret_pallas_call.races.races_found
    assert_close(found, loss(reference))


# -- lowered for a TPU ------------------------------------------------------------------------------------------------
def lowered_for_tpu(attend, batch, dtype):
    """Program for v5p of the gradient of attention in one map of 128 channels, by the kernel."""
    device = jax.sharding.AbstractDevice("TPU v5p", 2, "tpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    qkv = jax.ShapeDtypeStruct((*batch, 3, 3, 384), dtype)
    with jax.sharding.use_abstract_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda qkv, bias: attend(qkv, bias).astype(jnp.float32).sum(), (0, 1)))
        traced = gradient.trace(qkv, jax.ShapeDtypeStruct((4, 9, 9), jnp.float32))
        return traced.lower(lowering_platforms=("tpu",)).as_text()


def attend_3x3(qkv, bias):
    return fused_attention(qkv, bias, window_places((3, 3), (3, 3), (0, 0)), 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("asked", [None, "high", "highest", "BF16_BF16_F32"])
def test_whatever_precision_is_asked_of_products(asked, dtype):
    with jax.default_matmul_precision(asked):
        assert "tpu_custom_call" in lowered_for_tpu(attend_3x3, (16,), dtype)


def test_maps_that_are_vmapped():
    """One after the other, which a chip's compiler takes; the same numbers."""
    several = jax.vmap(attend_3x3, (0, None))
    assert "tpu_custom_call" in lowered_for_tpu(several, (2, 16), "bfloat16")
    qkv, bias = normal(0, 2, 16, 3, 3, 384), normal(1, 4, 9, 9)
    places = window_places((3, 3), (3, 3), (0, 0))
    assert_close(jax.jit(several)(qkv, bias), jnp.stack([reference(x, bias, places, 4) for x in qkv]))


@pytest.mark.parametrize(("channels", "cores", "parts"), [(384, 2, 3), (512, 2, 2), (512, 1, 1), (640, 2, 5)])
def test_parts_of_the_channels_keep_all_cores_busy(monkeypatch, channels, cores, parts):
    monkeypatch.setattr(window_sizes_tpu, "core", lambda: (2**26, cores))
    found = window_attention.kernel_sizes(
        jax.ShapeDtypeStruct((16, 14, 14, channels), jnp.bfloat16),
        window_places((14, 14), (7, 7), (3, 3)),
        channels // 32,
    )
    assert found.chunks == parts


# -- when it is used --------------------------------------------------------------------------------------------------
MAP = jax.ShapeDtypeStruct((32, 14, 14, 256), jnp.bfloat16)


def test_auto_is_for_tpus(monkeypatch):
    places = window_places((14, 14), (7, 7), (3, 3))
    assert not use_kernel("auto", MAP, places, 8)
    device = jax.sharding.AbstractDevice("TPU v5p", 2, "tpu") if hasattr(jax.sharding, "AbstractDevice") else None
    mesh = AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert use_kernel("auto", MAP, places, 8) and not use_kernel("xla", MAP, places, 8)
        assert window_sizes_tpu.core() == (64 * 2**20, 2)
    monkeypatch.setattr(window_attention, "platform", lambda: "tpu")
    assert not use_kernel("auto", MAP, places, 8)  # eight devices and no mesh


@pytest.mark.parametrize(
    ("shape", "dtype", "heads", "places", "why"),
    [
        ((32, 14, 14, 96), jnp.bfloat16, 3, (7, 7), "96 channels in 3 heads"),
        ((24, 14, 14, 256), jnp.bfloat16, 8, (7, 7), "not a multiple of 16"),
        ((32, 14, 14, 256), jnp.float16, 8, (7, 7), "float16"),
        ((32, 14, 14, 256), jnp.bfloat16, 32, (7, 7), "heads have 8 channels"),
        ((32, 17, 17, 256), jnp.bfloat16, 8, (17, 17), "289 tokens"),
        ((32, 14, 14, 256), jnp.bfloat16, 8, None, "each example has its own padding"),
    ],
)
def test_what_does_not_fit_is_said_once(caplog, shape, dtype, heads, places, why):
    window_attention.say.cache_clear()
    if places is not None:
        places = window_places(shape[1:3], places, (0, 0))
    absl_logging.set_verbosity(absl_logging.INFO)
    with caplog.at_level(logging.INFO, "absl"):
        for _ in range(2):
            assert not use_kernel("fused", jax.ShapeDtypeStruct(shape, dtype), places, heads)
        assert not use_kernel("fused", jax.ShapeDtypeStruct((1, *shape[1:]), dtype), places, heads)
    assert len(caplog.messages) == 1 and why in caplog.messages[0]


def test_kinds():
    """One kind of a plain map, four of a shifted one, however large."""
    assert len(window_places((56, 56), (7, 7), (0, 0)).kinds()[1]) == 1
    kind, regions, outside = window_places((56, 56), (7, 7), (3, 3)).kinds()
    assert len(regions) == len(outside) == 4 and np.bincount(kind).tolist() == [49, 7, 7, 1]
    assert isinstance(window_places((4, 4), (2, 2), (1, 1)), Places)
