"""`bench vl`: what it prints, that PyTorch's layers are given our parameters, its mistakes."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empty_programs import jit_to_zeros
from golden import bert_params

import florence_jax.tools.bench.__main__ as bench
from florence_jax.models.cross_attention import CrossLayer
from florence_jax.models.fusion import FUSIONS, FusionConfig
from florence_jax.models.sizes import VARIANTS
from florence_jax.tools.bench import fusion_stack, step
from florence_jax.tools.import_torch.roberta import BERT_LAYER

OPTIONS = ["--variant=tiny", "--fusion=small", "--batch=4", "--rounds=1", "--answers=7"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    sizes = dict(VARIANTS["ti"], image_width=8, depths=(2, 2), text_width=16, text_heads=2, text_layers=1)
    monkeypatch.setitem(VARIANTS, "tiny", dict(sizes, window=4, window_divisor=8, vocab_size=64, text_length=8))
    monkeypatch.setitem(FUSIONS, "small", FusionConfig(layers=1, width=16, head_width=8))


def run(capsys, arguments):
    code = bench.main(["vl", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_the_stack_is_timed(capsys):
    """Beside PyTorch where it is installed, with the same outputs and gradients; else alone."""
    code, report = run(capsys, ["--parts=stack", *OPTIONS])
    assert code == 0 and set(report["stack"]) == {"plain", "dropout"}
    for row in report["stack"].values():
        assert row["ms"] > 0 and row["temp_bytes"] > 0 and (row["ratio"] is None) == (row["torch_ms"] is None)
    assert (report["image_tokens"], report["text_tokens"], report["res"]) == (16, 8, 32)


def test_layers_in_pytorchs_names_are_read_back():
    """By the names of the import, to the same parameters."""
    streams = jnp.zeros((1, 2, 16)), None, None, jnp.zeros((1, 3, 16))
    shapes = jax.eval_shape(CrossLayer(2).init, jax.random.key(0), *streams)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    state = {f".{name}": value for name, value in fusion_stack.torch_layer(params).items()}
    jax.tree.map(np.testing.assert_array_equal, bert_params(state, BERT_LAYER)[""], dict(params))


def test_steps_are_timed(capsys, monkeypatch):
    """They are traced, not compiled."""
    traced = []

    class Traced:
        peak_bytes = 2**20

        def __init__(self, loss, params, optimizer):
            traced.append((jax.eval_shape(loss, params).shape, set(params)))

        def __call__(self):
            time.sleep(0.001)

    monkeypatch.setattr(step, "TimedStep", Traced)
    monkeypatch.setattr(jax, "jit", jit_to_zeros)
    code, report = run(capsys, ["--parts=pretrain,questions,words", *OPTIONS])
    assert code == 0 and "stack" not in report and "policies" not in report
    assert all(shape == () for shape, _ in traced) and len(traced) == 7
    assert not {"image", "text"} & traced[4][1] and "image" in traced[3][1]  # frozen
    assert set(report["pretrain"]) == {"batch", "dataset"}
    assert report["questions"]["4"]["peak_bytes"] == 2**20 and report["questions"]["shared_share"] > 0
    assert report["words"]["vocabulary"] == 64


@pytest.mark.parametrize("arguments", [["--parts=stack,all"], ["--batch=6"], ["--rounds=0"]])
def test_mistakes_are_one_message(capsys, arguments):
    assert bench.main(["vl", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
