"""`bench grad_cache`: what the gradient cache costs in time, saves in memory, and changes in the gradient (nothing).

`overhead` is the time of a training step with the cache over that of one without, the same batch of pairs in both,
timed in turns: medians of the rounds; `overhead_of_best` compares the fastest rounds, which a busy machine disturbs
least. The second forward pass bounds it by 4/3 where a backward pass costs two forward ones. `peak_bytes` is the
compiler's figure for working memory (`memory_analysis().temp_size_in_bytes`) of loss and gradients at four global
batches and one micro-batch; `logits_and_embeddings_bytes` is the part that the method itself lets grow: one B x B
matrix and two B x D. `gradient_error` is the largest difference of a gradient entry over the largest entry of its
tensor, all tensors and the temperature included, with stochastic depth (which a ViT lacks).

Needs jax, flax and optax only.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.errors import UserError
from florence_jax.losses.grad_cache import TOWERS, encode_pairs
from florence_jax.losses.unicl import unicl
from florence_jax.models import florence
from florence_jax.models.base import Model
from florence_jax.models.layers import REMATS
from florence_jax.models.sizes import VARIANTS, ModelConfig
from florence_jax.tools.bench import timing
from florence_jax.tools.bench.step import TimedStep, adamw, device

DROP_PATH = 0.1
GROWTH = (1, 2, 4, 8)  # batches whose memory is reported, over half the timed batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench grad_cache`."""
    parser.add_argument("--variant", default="ti", choices=list(VARIANTS), help="row of the variants table")
    parser.add_argument("--batch", type=int, default=64, help="image-text pairs of the timed step")
    parser.add_argument("--micro_batch", type=int, default=16, help="pairs encoded together by the cached step")
    parser.add_argument("--towers", default="both", choices=TOWERS, help="what the cache covers")
    parser.add_argument("--res", type=int, default=None, help="side of the image in pixels; default: the variant's")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    parser.add_argument("--remat", default="none", choices=REMATS, help="recomputation inside the towers")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    if min(args.batch, args.micro_batch, args.steps) < 1 or args.batch % (2 * args.micro_batch):
        raise UserError("--batch, --micro_batch and --steps must be positive, and 2 * micro_batch must divide batch")
    drop_path = 0.0 if VARIANTS[args.variant].get("image_tower") == "vit" else DROP_PATH
    options = dict(res=args.res, dtype=args.dtype, remat=args.remat, drop_path=drop_path)
    model = florence.build(args.variant, **options)
    losses = {"cached": make_loss(model, args.micro_batch, args.towers), "uncached": make_loss(model, 0, args.towers)}
    params = jax.jit(model.init)(jax.random.key(0))
    batch = random_pairs(model.config, args.batch)
    times = timing.interleaved({name: timed_step(loss, params, batch) for name, loss in losses.items()}, args.steps)
    report = timing.ratio_report(times["uncached"], times["cached"])
    batches = [args.batch // 2 * factor for factor in GROWTH]
    memory = {name: {size: peak_bytes(loss, model, size) for size in batches} for name, loss in losses.items()}
    names = ("variant", "batch", "micro_batch", "towers", "dtype", "remat", "steps")
    return {
        "overhead": report["ratio"],
        "overhead_of_best": report["ratio_of_best"],
        "overhead_range": report["ratio_range"],
        "peak_bytes": memory["cached"],
        "peak_bytes_uncached": memory["uncached"],
        "logits_and_embeddings_bytes": {b: 4 * b * b + 8 * b * model.config.projection for b in batches},
        "gradient_error": gradient_error(losses["cached"], losses["uncached"], params, batch),
        "seconds": timing.median(times["cached"]),
        "seconds_uncached": timing.median(times["uncached"]),
        **{name: getattr(args, name) for name in names},
        "res": model.config.res,
        **device(),
    }


Loss = Callable[[Any, dict[str, jax.Array]], jax.Array]


def make_loss(model: Model, micro_batch: int, towers: str) -> Loss:
    """`loss(params, batch)` of `tasks/pretrain.py` on one device; `micro_batch` 0 = without the cache."""

    def encode(params: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        out = model.apply(params, inputs, train=True, rngs={"drop_path": jax.random.key(1)})
        return {name: value for name, value in out.items() if name.endswith("/embedding")}

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        positions = jnp.arange(batch["label"].shape[0])
        image, text = {"image": batch["image"], "example": positions}, {"text": batch["text"]}
        out = encode_pairs(encode, params, image, text, micro_batch=micro_batch, towers=towers)
        scale = model.apply(params, {})["logit_scale"]
        return unicl(out["image/embedding"], out["text/embedding"], batch["label"], scale)[0]

    return loss


def random_pairs(config: ModelConfig, size: int) -> dict[str, jax.Array]:
    """Random pairs, of which two have the same caption."""
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.standard_normal((size, config.res, config.res, 3), np.float32)),
        "text": jnp.asarray(rng.integers(4, config.vocab_size, (size, config.text_length)), jnp.int32),
        "label": jnp.maximum(jnp.arange(size), 1)[:, None],
    }


def timed_step(loss: Loss, params: Any, batch: dict[str, jax.Array]) -> TimedStep:
    """A whole training step, AdamW included."""
    return TimedStep(lambda params: loss(params, batch), params, adamw())


def peak_bytes(loss: Loss, model: Model, size: int) -> int:
    """Working memory of the compiled loss and gradients for `size` pairs, arguments and results not counted."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.eval_shape(lambda: random_pairs(model.config, size))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def gradient_error(loss: Loss, reference: Loss, params: Any, batch: dict[str, jax.Array]) -> float:
    """Largest |difference| of the gradients, each tensor's relative to its largest entry."""
    got, want = (jax.jit(jax.grad(function))(params, batch) for function in (loss, reference))
    errors = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), got, want)
    return timing.round_significant(max(jax.tree.leaves(errors)), 3)
