"""Products with rounded factors: their numbers and gradients, where they are used, and what 'auto' chooses."""

import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from test_precision import walk
from tiny_run import at_step, tiny_config, tiny_pairs

from florence_jax.errors import UserError
from florence_jax.jobs import hardware
from florence_jax.jobs.stop_signals import EXIT_PREEMPTED
from florence_jax.models import layers, products
from florence_jax.models.products import ROUNDED, product, rounded_factors
from florence_jax.tasks import create_task
from florence_jax.train import loop, precision
from florence_jax.train.metrics import read_metrics


def draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def low(x):
    return np.asarray(x.astype(jnp.bfloat16), np.float64)


def test_factors_are_rounded_and_sums_are_not():
    x, kernel, grad = draw(3, 5, 64), draw(64, 32), draw(3, 5, 32) + 1

    def all_products(x, kernel, grad):
        out, back = jax.vjp(product, x, kernel)
        return out, *back(grad)

    with rounded_factors(True):
        out, x_grad, kernel_grad = jax.jit(all_products)(x, kernel, grad)
    assert out.dtype == x_grad.dtype == kernel_grad.dtype == jnp.float32
    # Sums of 64 to 15 products in float32; the rounding itself is a thousand times as much.
    np.testing.assert_allclose(out, low(x) @ low(kernel), atol=1e-5)
    assert np.abs(out - np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)).max() > 1e-3
    np.testing.assert_allclose(x_grad, low(grad) @ low(kernel).T, atol=1e-5)
    np.testing.assert_allclose(kernel_grad, np.einsum("abc,abf->cf", low(x), low(grad)), atol=1e-5)


def test_without_request_nothing_is_rounded():
    x, kernel = draw(5, 64), draw(64, 32)
    np.testing.assert_array_equal(product(x, kernel), x @ kernel)
    np.testing.assert_array_equal(products.forward_product(x, kernel), x @ kernel)
    np.testing.assert_array_equal(products.kernel_gradient(x, x), x.T @ x)
    low_x, low_kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    with rounded_factors(True):  # of what is bfloat16 already, the result is as ever
        assert product(low_x, low_kernel).dtype == products.kernel_gradient(low_x, low_x).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivatives_are_those_of_the_definition(dtype):
    x, kernel, grad = (a.astype(dtype) for a in (draw(3, 5, 2, 64), draw(64, 32), draw(3, 5, 2, 32)))

    def definition(x, kernel):
        return jnp.einsum("abrc,cf->abrf", x, kernel)

    found, expected = (jax.jit(lambda f=f: jax.vjp(f, x, kernel)[1](grad))() for f in (product, definition))
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == reference.dtype == dtype
        np.testing.assert_allclose(*(a.astype(np.float32) for a in (ours, reference)), rtol=1e-2, atol=1e-5)


def test_on_a_cpu_no_factor_of_a_gradient_is_copied():
    x, kernel = draw(4, 6, 64), draw(64, 32)
    gradient = jax.jit(jax.grad(lambda kernel: jnp.square(product(x, kernel)).sum()))
    assert " transpose(" not in gradient.lower(kernel).compile().as_text()


def test_on_a_tpu_gradients_are_as_jax_has_them():
    """The reshape that helps a CPU could cost a TPU copies: its maps are not laid out as they are indexed."""
    x, kernel = draw(4, 6, 64), draw(64, 32)

    def lowered(multiply):
        gradients = jax.jit(jax.grad(lambda *factors: jnp.square(multiply(*factors)).sum(), (0, 1)))
        return sorted(
            line.split("=", 1)[1].split("loc")[0].split(" : ")[-1]
            for line in gradients.trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text().splitlines()
            if "dot_general" in line or "stablehlo.reshape" in line or "stablehlo.transpose" in line
        )

    assert lowered(product) == lowered(jnp.matmul)


@pytest.mark.parametrize("rounded", [False, True])
def test_gradients_of_a_parameter_are_summed_inside_a_shard_map(rounded):
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    x, kernel = draw(8, 3, 16), draw(16, 4)
    split = PartitionSpec("data")

    def loss(kernel, x):
        return jnp.square(product(x, kernel)).sum()

    with rounded_factors(rounded):
        whole = jax.jit(jax.grad(loss))(kernel, x)
        local = jax.shard_map(
            lambda kernel, x: jax.grad(loss)(kernel, x),
            mesh=mesh,
            in_specs=(PartitionSpec(), split),
            out_specs=PartitionSpec(),
        )
        np.testing.assert_allclose(jax.jit(local)(kernel, x), whole, rtol=1e-4, atol=1e-4)


def test_convolution_with_rounded_factors():
    x, kernel, grad = draw(2, 8, 8, 3), draw(7, 7, 3, 4), draw(2, 2, 2, 4)

    def convolved(*given):
        out, back = jax.vjp(lambda x, kernel: layers.convolve(x, kernel, 4, 2), *given[:2])
        return out, *back(given[2])

    whole = jax.jit(convolved)(*(a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, kernel, grad)))
    with rounded_factors(True):
        rounded = jax.jit(convolved)(x, kernel, grad)
    for ours, reference in zip(rounded, whole, strict=True):
        np.testing.assert_allclose(ours, reference, atol=1e-4)


def products_of(config):
    """Dtypes of the factors of every product in the training step, by the place in the model."""
    trainer = loop.Trainer(config, create_task(config), Path("unused"))
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in trainer.task.batches[0].items()}
    equations = walk(jax.make_jaxpr(trainer.make_step())(trainer.target, batch).jaxpr)
    return [(scope, dtypes) for scope, name, dtypes in equations if name == "dot_general"]


def test_the_training_step_rounds_the_factors_of_its_layers(tmp_path):
    pairs = tiny_pairs(tmp_path / "pairs")
    found = products_of(tiny_config(pairs, precision=ROUNDED))
    of_layers = [dtypes for scope, dtypes in found if "fc1" in scope or "qkv" in scope or "embed" in scope]
    assert len(of_layers) >= 3 * 4 and all(dtypes == {"bfloat16"} for dtypes in of_layers)
    rest = [dtypes for _, dtypes in found if dtypes != {"bfloat16"}]
    assert rest and all(dtypes == {"float32"} for dtypes in rest)  # attention, projections, the loss; nothing mixed
    plain = products_of(tiny_config(pairs, precision="float32"))
    # (More of them: a kernel's gradient is there in the forms of two platforms.)
    assert len(plain) > len(found) and all(dtypes == {"float32"} for _, dtypes in plain)


def test_dtype_of_a_precision():
    assert [products.compute_dtype(name) for name in ("auto", ROUNDED, "float32", "bfloat16")] == ["float32"] * 3 + [
        "bfloat16"
    ]


def test_auto_is_what_the_processor_does_faster(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
    assert not hardware.multiplies_bfloat16()
    for flags, faster in (("fpu avx512f avx512_bf16", True), ("fpu amx_bf16", True), ("fpu avx512f", False)):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n\nprocessor : 1\n")
        assert hardware.multiplies_bfloat16() is faster
        assert precision.best_precision("cpu") == "float32"  # JAX's own setting, that of tests, comes first
        with jax.default_matmul_precision(None):
            assert precision.best_precision("cpu") == (ROUNDED if faster else "float32")
            assert precision.best_precision("tpu") == "float32"


def test_a_resume_keeps_the_precision_and_the_numbers(monkeypatch, tmp_path, capsys):
    """Begun where products are faster, resumed elsewhere: bit for bit what an undisturbed run gives."""
    config = tiny_config(tiny_pairs(tmp_path / "pairs"), precision="auto")
    monkeypatch.setattr(loop, "best_precision", lambda platform: ROUNDED)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert loop.run(config, create_task(config), whole) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert loop.run(config, create_task(config), broken) == EXIT_PREEMPTED
    monkeypatch.setattr(loop, "best_precision", lambda platform: "float32")
    assert loop.run(config, create_task(config), broken) == 0
    assert capsys.readouterr().out.count(f" in {ROUNDED}, ") == 3
    assert json.loads((broken / "config.json").read_text())["precision"] == ROUNDED and config.precision == "auto"
    losses = [[line.get("train/loss") for line in read_metrics(run / "metrics.jsonl")] for run in (whole, broken)]
    assert len(losses[0]) > 4 and losses[0] == losses[1]
    with pytest.raises(UserError, match="choose one of float32"):
        create_task(tiny_config(config.data.train, precision="half"))
