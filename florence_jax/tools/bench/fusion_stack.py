"""The layers of a fusion alone, forward and backward, beside Hugging Face's in PyTorch; part of `bench vl`."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.models.cross_attention import CoAttention
from florence_jax.models.dropout import drop_examples
from florence_jax.models.fusion import FusionConfig
from florence_jax.tools.bench import timing

PADDED = 2  # tokens at the end of each text
TORCH_ATTENTIONS = ("eager", "sdpa")
# Parts of a layer: ours, and transformers' of each of the tensors that it is made of.
_ATTENTION = ("self_attention", "attention"), ("cross_attention", "crossattention")


class Streams(NamedTuple):
    """What is fused: texts of `words` tokens with images of `tokens`."""

    batch: int
    words: int
    tokens: int


def measure_stack(sizes: FusionConfig, streams: Streams, rounds: int, dropout: bool) -> dict[str, Any]:
    """Times forward and backward pass, gradients of parameters and of both streams, in turns.

    Without dropout the two must give the same output and gradients, else it raises; with it each draws its own.

    Returns:
      `ms`, `temp_bytes`, the compiler's working memory; `torch_ms` of transformers' layers by how they attend, None
      where it is not installed; `ratio`, `ratio_of_best`, `ratio_range`: the time of the faster of those over ours.
    """
    module = CoAttention(sizes.layers, sizes.width // sizes.head_width, sizes.mlp_ratio)
    arrays = make_streams(sizes, streams)
    lengths = jnp.full(streams.batch, streams.words - PADDED)
    params = jax.jit(module.init)(jax.random.key(0), *arrays[:2])["params"]

    def loss(params: Any, text: jax.Array, image: jax.Array) -> jax.Array:
        drop = drop_examples(jax.random.key(1), jnp.arange(streams.batch), sizes.dropout) if dropout else None
        fused, seen, _ = module.apply({"params": params}, text, image, lengths, drop)
        return (fused * arrays[2]).sum() + (seen * arrays[3]).sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(params, *arrays[:2]).compile()
    contestants: dict[str, Callable[[], Any]] = {"ours": lambda: jax.block_until_ready(step(params, *arrays[:2]))}
    rate = sizes.dropout if dropout else 0.0
    contestants |= {name: run for name in TORCH_ATTENTIONS if (run := make_torch(name, sizes, params, arrays, rate))}
    if not dropout:
        check_stacks(contestants)
    times = timing.interleaved(contestants, rounds)
    ours = times.pop("ours")
    report: dict[str, Any] = {
        "ms": timing.milliseconds(ours),
        "temp_bytes": int(step.memory_analysis().temp_size_in_bytes),
        "torch_ms": {name: timing.milliseconds(taken) for name, taken in times.items()} or None,
        "ratio": None,
    }
    if times:
        report |= timing.ratio_report(ours, min(times.values(), key=timing.median))
    return report


def make_streams(sizes: FusionConfig, streams: Streams) -> tuple[jax.Array, ...]:
    """Random text and image streams, and the gradients of what becomes of them; 0 for padding."""
    rng = np.random.default_rng(0)
    shapes = [(streams.batch, length, sizes.width) for length in (streams.words, streams.tokens)]
    text, image, text_gradient, image_gradient = (rng.standard_normal(shape, np.float32) for shape in shapes * 2)
    text_gradient[:, streams.words - PADDED :] = 0
    return tuple(jnp.asarray(array) for array in (text, image, text_gradient, image_gradient))


def check_stacks(contestants: Mapping[str, Callable[[], Any]]) -> None:
    """Raises `RuntimeError` unless all give the loss and the gradients of both streams that ours gives."""
    value, (_, *expected) = contestants["ours"]()
    for name, run in contestants.items():
        found, (_, *gradients) = run()
        for a, b in zip((found, *gradients), (value, *expected), strict=True):
            if not np.allclose(a, b, atol=1e-3 * np.abs(b).max()):
                raise RuntimeError(f"the layers of the fusion disagree: {name} is not ours")


def make_torch(
    attention: str, sizes: FusionConfig, params: Mapping[str, Any], arrays: tuple[jax.Array, ...], rate: float
) -> Callable[[], Any] | None:
    """Forward and backward pass of BridgeTower's cross layers with our parameters, in the order of ours.

    None, and the reason on stderr, where it cannot run here.
    """
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        print("no comparison: pip install torch transformers", file=sys.stderr)
        return None
    if jax.default_backend() != "cpu":
        print("no comparison: it is for a CPU", file=sys.stderr)
        return None
    import torch
    from transformers.models.bridgetower import modeling_bridgetower as bridgetower

    torch.set_num_threads(timing.cpu_hardware()["cores"])  # XLA's CPU client uses as many
    config = bridgetower.BridgeTowerTextConfig(
        hidden_size=sizes.width, num_attention_heads=sizes.width // sizes.head_width, layer_norm_eps=1e-12,
        intermediate_size=round(sizes.mlp_ratio * sizes.width), hidden_dropout_prob=rate,
        attention_probs_dropout_prob=rate, attn_implementation=attention,
    )  # fmt: skip
    layers = [[bridgetower.BridgeTowerBertCrossLayer(config) for _ in range(2)] for _ in range(sizes.layers)]
    for i, pair in enumerate(layers):
        for stream, layer in zip(("text", "image"), pair, strict=True):
            state = torch_layer(layer_of(params, i)[stream])
            layer.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
            layer.train()
    weights = [weight for pair in layers for layer in pair for weight in layer.parameters()]
    text, image, *gradients = (torch.tensor(np.asarray(array)) for array in arrays)
    mask = torch.zeros(len(text), 1, 1, text.shape[1])
    mask[..., text.shape[1] - PADDED :] = -1e4
    whole = torch.zeros(len(image), 1, 1, image.shape[1])
    leaves = [text.requires_grad_(), image.requires_grad_()]

    def run() -> tuple[float, tuple[Any, ...]]:
        x, y = leaves
        for of_text, of_image in layers:
            x, y = (
                of_text(x, y, attention_mask=mask, encoder_attention_mask=whole)[0],
                of_image(y, x, attention_mask=whole, encoder_attention_mask=mask)[0],
            )
        loss = (x * gradients[0]).sum() + (y * gradients[1]).sum()
        back = torch.autograd.grad(loss, [*weights, *leaves])
        return loss.item(), (back[:-2], *(array.numpy() for array in back[-2:]))

    return run


def layer_of(params: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """The parameters of a layer of the stack."""
    if "layers" in params:
        return jax.tree.map(lambda leaf: leaf[number], params["layers"])
    return params[f"layer{number}"]


def torch_layer(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our parameters of a layer of one stream as transformers' layers have them."""
    found: dict[str, np.ndarray] = {}

    def put(name: str, kernel: Any, bias: Any) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = np.asarray(kernel).T, np.asarray(bias)

    for ours, theirs in _ATTENTION:
        part = params[ours]
        projections = [part["qkv"]] if "qkv" in part else [part["q"], part["kv"]]
        kernel, bias = (
            np.concatenate([np.asarray(each[leaf]) for each in projections], -1) for leaf in ("kernel", "bias")
        )
        for i, name in enumerate(("query", "key", "value")):
            rows = slice(i * len(kernel), (i + 1) * len(kernel))
            put(f"{theirs}.self.{name}", kernel[:, rows], bias[rows])
        put(f"{theirs}.output.dense", part["output"]["kernel"], part["output"]["bias"])
        put(f"{theirs}.output.LayerNorm", part["norm"]["scale"], part["norm"]["bias"])
    put("intermediate.dense", params["fc1"]["kernel"], params["fc1"]["bias"])
    put("output.dense", params["fc2"]["kernel"], params["fc2"]["bias"])
    put("output.LayerNorm", params["norm"]["scale"], params["norm"]["bias"])
    return found
