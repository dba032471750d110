"""Window attention for GPUs: the Triton kernel interpreted, cuDNN's windows by XLA, and what is lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType
from test_window_attention import assert_close, normal, perturbed, reference, values_and_grads

from florence_jax.errors import UserError
from florence_jax.models import window_attention, window_attention_gpu
from florence_jax.models.coswin import CoSwin
from florence_jax.models.window_attention import fused_attention, use_kernel
from florence_jax.models.windows import SwinBlock, window_places
from florence_jax.params.sharding import BATCH_AXES, batch_sharding, make_mesh, replicated


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """What is traced believes so."""
    monkeypatch.setattr(window_attention, "platform", lambda: "gpu")


@pytest.fixture
def interpreted(monkeypatch):
    """Without a GPU: the kernel by Pallas's interpreter, and what cuDNN computes by XLA."""
    library = functools.partial(window_attention_gpu.library_attention, implementation="xla")
    monkeypatch.setattr(window_attention_gpu, "library_attention", library)
    monkeypatch.setattr(window_attention_gpu, "check_cudnn", lambda *_: None)
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def program(attend, places, heads):
    """Of the gradient of the output, qkv and the bias: the output, and the gradients of qkv and the bias."""

    def both(grad, qkv, bias):
        out, vjp = jax.vjp(lambda qkv, bias: attend(qkv, bias, places, heads), qkv, bias)
        return out, vjp(grad)

    return jax.jit(both)


CASES = {
    "49 tokens, four kinds": (3, (14, 14), (7, 7), (3, 3), None),
    "144 tokens": (1, (12, 24), (12, 12), (0, 6), None),
    "padding": (2, (4, 6), (2, 3), (1, 1), (3, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_both_are_the_definition(monkeypatch, interpreted, case):
    """Output and the gradients of q, k, v and the bias; programs that take five of twelve windows, the last one two."""
    monkeypatch.setattr(window_attention_gpu, "PROGRAMS", 6)
    batch, sizes, window, shift, valid = CASES[case]
    places, tokens = window_places(sizes, window, shift, valid), int(np.prod(window))
    arguments = normal(2, batch, *sizes, 64), normal(0, batch, *sizes, 192), normal(1, 2, tokens, tokens)
    want = program(reference, places, 2)(*arguments)
    for form in ("fused", "cudnn"):
        got = program(functools.partial(fused_attention, form=form), places, 2)(*arguments)
        assert_close(got, want)


@pytest.mark.parametrize("form", ["fused", "cudnn"])
def test_block_on_several_devices(interpreted, form):
    """A shifted block on maps that its windows do not divide, the batch split over eight devices."""
    mesh, x = make_mesh(2, 4), normal(0, 8, 5, 6, 32)
    whole, split = replicated(mesh), batch_sharding(mesh)
    options = dict(heads=2, window=(3, 3), shift=(1, 1), mlp_ratio=0.1, mask_padding=True)
    params = perturbed(SwinBlock(**options), x)
    want = values_and_grads(SwinBlock(**options), params, x)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        got = values_and_grads(
            SwinBlock(**options, form=form), jax.device_put(params, whole), jax.device_put(x, split),
            in_shardings=(whole, split),
        )  # fmt: skip
    assert_close(got, want)


def lowered(form, dtype, sizes, window, width):
    """Text of the program for CUDA, forward and backward."""
    places, tokens = window_places(sizes, window, tuple(side // 2 for side in window)), int(np.prod(window))
    shapes = [(4, *sizes, 2 * width), (4, *sizes, 6 * width), (2, tokens, tokens)]
    arguments = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, (dtype, dtype, jnp.float32), strict=True)]
    traced = program(functools.partial(fused_attention, form=form), places, 2).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("dtype", "sizes", "window", "width"),
    [
        (jnp.bfloat16, (14, 14), (7, 7), 32),
        (jnp.float32, (14, 14), (7, 7), 16),
        (jnp.float16, (24, 24), (12, 12), 64),
    ],
)
def test_kernel_is_lowered_for_cuda(dtype, sizes, window, width):
    text = lowered("fused", dtype, sizes, window, width)
    assert text.count("__gpu$xla.gpu.triton") == 2
    assert "stablehlo.dot_general" not in text  # there is no other attention beside it


def test_cudnn_is_lowered_for_cuda_or_missing():
    """JAX asks for the library itself, not for a GPU, when it traces."""
    try:
        text = lowered("cudnn", jnp.bfloat16, (14, 14), (7, 7), 32)
    except UserError as error:
        assert "cuDNN" in str(error) and "auto, xla or fused" in str(error)
    else:
        assert text.count("__cudnn$fmhaScaleBiasSoftmax") == 8  # four kinds of windows, forward and backward


@pytest.mark.parametrize(
    ("platform", "dtype", "why"), [("cpu", "bfloat16", "this is a cpu"), ("gpu", "float32", "not in float32")]
)
def test_cudnn_says_what_it_needs(monkeypatch, platform, dtype, why):
    monkeypatch.setattr(window_attention, "platform", lambda: platform)
    tower = CoSwin(width=32, depths=(2,), heads=(1,), window=2, attention="cudnn", dtype=jnp.dtype(dtype))
    with pytest.raises(UserError, match=why):
        jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_when_they_are_used():
    """As XLA has it, by default; the kernel where heads and dtype fit."""
    places, places_of_289 = window_places((14, 14), (7, 7), (3, 3)), window_places((17, 17), (17, 17), (0, 0))
    maps = functools.partial(jax.ShapeDtypeStruct, (3, 14, 14, 96))
    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 3), BATCH_AXES, (AxisType.Auto,) * 2)):
        assert not use_kernel("auto", maps(jnp.bfloat16), places, 3)
        assert use_kernel("fused", maps(jnp.bfloat16), places, 3)
        assert not use_kernel("fused", jax.ShapeDtypeStruct((4, 14, 14, 96), jnp.bfloat16), places, 3)  # on 3 devices
        assert not use_kernel("fused", maps(jnp.bfloat16), places, 4)  # 24 channels
        assert not use_kernel("fused", maps(jnp.float64), places, 3)
        assert not use_kernel("cudnn", maps(jnp.bfloat16), places_of_289, 3)
    assert not use_kernel("fused", maps(jnp.bfloat16), places, 3)  # several devices and no mesh
