"""`bench vl`: vision and language: the fusion's layers beside PyTorch's, and steps of its trainings.

What is measured is chosen by --parts:

- stack: the layers of the fusion alone, forward and backward, without and with dropout (`plain`, `dropout`), beside
  BridgeTower's of transformers (METER's layers) where that is installed (`pip install torch transformers`), in turns:
  the keys of `florence_jax.tools.bench.fusion_stack.measure_stack`.
- pretrain: a training step of ITM and MLM (forward, losses, backward, clipping, AdamW), each text with and without
  masks, by where the image of a text that does not match is from: `batch`, or `dataset`, whose images are encoded
  beside those of the batch (half as many).
- questions: a step of answering `--batch` questions, `1` and `4` to an image, each image encoded once, and with the
  towers `frozen`; `shared_share` is the time of four to an image over that of one.
- policies: the pretraining step for every recomputation policy.
- words: forward and backward of the head of masked words alone, at the places that may be masked (`places`) and at
  all tokens (`all`).

Of each step `ms` and `peak_bytes`, the compiler's figure for its working memory (parameters and optimizer state not
counted). Weights, pictures and texts are random.

Needs jax, flax and optax only.
"""

import argparse
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from florence_jax.errors import UserError
from florence_jax.losses.language import answer_loss, masked_word_loss, match_loss
from florence_jax.models.base import Model
from florence_jax.models.fusion import FUSIONS, build_fusion, image_token_count, place_count, resolve_fusion
from florence_jax.models.layers import REMATS
from florence_jax.models.sizes import VARIANTS, ModelConfig, resolve_config
from florence_jax.tools.bench import fusion_stack, step, timing

VL_PARTS = ("stack", "pretrain", "questions", "policies", "words")
ENCODERS = ("image", "text")  # entries of the parameters that freezing leaves alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench vl`."""
    parser.add_argument("--parts", default=",".join(VL_PARTS), help="what is measured, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the median is reported")
    parser.add_argument("--variant", default="ti", choices=list(VARIANTS), help="towers, a row of their table")
    parser.add_argument("--fusion", default="ti", choices=list(FUSIONS), help="fusion, a row of its table")
    parser.add_argument("--res", type=int, default=None, help="side of the pictures in pixels; default: the variant's")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step, questions of a step; a multiple of 4")
    parser.add_argument("--words", type=int, default=None, help="tokens of a text; default: the variant's")
    parser.add_argument("--answers", type=int, default=3129, help="answers to choose from")
    parser.add_argument("--remat", default="none", choices=REMATS, help="recomputation of the other parts")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in VL_PARTS]:
        raise UserError(f"--parts={args.parts}: unknown {', '.join(unknown)}; known are {', '.join(VL_PARTS)}")
    if args.rounds < 1 or args.answers < 1 or args.batch < 4 or args.batch % 4:
        raise UserError("--rounds and --answers must be positive, --batch a multiple of 4")
    functions = (measure_layers, measure_pretraining, measure_questions, measure_policies, measure_words)
    measures = dict(zip(VL_PARTS, functions, strict=True))
    report: dict[str, Any] = {part: measures[part](args) for part in VL_PARTS if part in parts}
    config = towers_config(args)
    names = ("variant", "fusion", "batch", "answers", "remat", "dtype", "rounds")
    shapes = {"res": config.res, "image_tokens": image_token_count(config), "text_tokens": config.text_length}
    return report | {name: getattr(args, name) for name in names} | shapes | step.device()


def towers_config(args: argparse.Namespace, remat: str = "") -> ModelConfig:
    """The towers of the options."""
    options = dict(res=args.res, text_length=args.words, dtype=args.dtype, drop_path=0.0)
    return resolve_config(args.variant, **options, remat=remat or args.remat)


def measure_layers(args: argparse.Namespace) -> dict[str, Any]:
    """The stack, without and with dropout."""
    config, sizes = towers_config(args), resolve_fusion(args.fusion)
    streams = fusion_stack.Streams(args.batch, config.text_length, image_token_count(config))
    measure = functools.partial(fusion_stack.measure_stack, sizes, streams, args.rounds)
    return {"plain": measure(False), "dropout": measure(True)}


def measure_pretraining(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of pretraining by where negatives are from, in turns."""
    model = build_fusion(towers_config(args), args.fusion, heads=("mlm", "itm"))
    params = jax.jit(model.init)(jax.random.key(0))
    steps = {name: pretraining_step(model, params, args.batch, name) for name in ("batch", "dataset")}
    return timed(steps, args.rounds)


def measure_policies(args: argparse.Namespace) -> dict[str, Any]:
    """The step of pretraining for every policy, in turns."""
    models = {name: build_fusion(towers_config(args, name), args.fusion, heads=("mlm", "itm")) for name in REMATS}
    params = jax.jit(models["none"].init)(jax.random.key(0))
    steps = {name: pretraining_step(model, params, args.batch, "batch") for name, model in models.items()}
    return timed(steps, args.rounds)


def measure_questions(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of answering, in turns."""
    model = build_fusion(towers_config(args), args.fusion, heads=("vqa",), answers=args.answers)
    params = jax.jit(model.init)(jax.random.key(0))
    make = functools.partial(questions_step, model, params, args.batch)
    steps = {"1": make(1), "4": make(4), "frozen": make(1, ENCODERS)}
    found = timed(steps, args.rounds)
    share = timing.round_significant(found["4"]["ms"] / found["1"]["ms"], 3)
    return found | {"shared_share": share}


def measure_words(args: argparse.Namespace) -> dict[str, Any]:
    """The head of masked words at some places and at all tokens, in turns; its step alone, after the fusion."""
    config, width = towers_config(args), resolve_fusion(args.fusion).width
    model = build_fusion(config, args.fusion, heads=("mlm",), layers=1, dropout=0.0)
    params = jax.jit(model.init)(jax.random.key(0))
    frozen = {name: value for name, value in params.items() if name != "fusion"}
    rng, steps = np.random.default_rng(0), {}
    inputs = texts(config, args.batch, rng)
    inputs["image_tokens"] = jnp.zeros((args.batch, 1, model.inputs["image_tokens"].shape[-1]))
    for name, count in (("places", place_count(config.text_length)), ("all", config.text_length)):
        places = jnp.broadcast_to(jnp.arange(count)[None], (args.batch, count))
        targets = jnp.asarray(rng.integers(0, config.vocab_size, (args.batch, count)), jnp.int32)

        def loss(fusion: Any, places: jax.Array = places, targets: jax.Array = targets) -> jax.Array:
            out = model.apply(frozen | {"fusion": fusion}, inputs | {"places": places})
            return masked_word_loss(out["mlm_logits"], targets).mean

        steps[name] = step.TimedStep(loss, params["fusion"], step.adamw())
    return timed(steps, args.rounds) | {"vocabulary": config.vocab_size, "width": width}


def timed(steps: Mapping[str, step.TimedStep], rounds: int) -> dict[str, Any]:
    """`ms` and `peak_bytes` of each, run in turns."""
    times = timing.interleaved(steps, rounds)
    return {
        name: {"ms": timing.milliseconds(times[name]), "peak_bytes": each.peak_bytes} for name, each in steps.items()
    }


def texts(config: ModelConfig, count: int, rng: np.random.Generator) -> dict[str, jax.Array]:
    """Random texts and their lengths."""
    return {
        "text": jnp.asarray(rng.integers(4, config.vocab_size, (count, config.text_length)), jnp.int32),
        "text_length": jnp.full(count, config.text_length - 1, jnp.int32),
    }


def pretraining_step(model: Model[ModelConfig], params: Any, batch: int, negatives: str) -> step.TimedStep:
    """ITM and MLM of `batch` pairs: masked and unmasked texts beside each other, each image encoded once."""
    config, rng = model.config, np.random.default_rng(0)
    pairs, half = np.arange(batch), batch // 2
    others = np.arange(half) + (batch if negatives == "dataset" else half)
    inputs = texts(config, 2 * batch, rng)
    images = batch + (half if negatives == "dataset" else 0)
    inputs["image"] = jnp.asarray(rng.standard_normal((images, config.res, config.res, 3), np.float32))
    matched = np.concatenate([others, pairs[half:]])  # the first half does not match
    inputs["image_index"] = jnp.asarray(np.stack([pairs, matched], 1).reshape(-1), jnp.int32)
    count = place_count(config.text_length)
    inputs["places"] = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], (batch, count))
    targets = jnp.asarray(rng.integers(0, config.vocab_size, (batch, count)), jnp.int32)
    match = jnp.asarray(pairs >= half)

    def loss(params: Any) -> jax.Array:
        out = model.apply(params, inputs, True, {"dropout": jax.random.key(1)})
        words = masked_word_loss(out["mlm_logits"], targets)
        return words.mean + match_loss(out["itm_logits"][1::2], match).mean

    return step.TimedStep(loss, params, optax.chain(optax.clip_by_global_norm(1.0), step.adamw()))


def questions_step(
    model: Model[ModelConfig], params: Any, batch: int, questions: int, frozen: tuple[str, ...] = ()
) -> step.TimedStep:
    """Answers of `batch` questions, so many to an image; entries that are `frozen` are not differentiated."""
    config, rng = model.config, np.random.default_rng(0)
    inputs = texts(config, batch, rng)
    images = batch // questions
    inputs["image"] = jnp.asarray(rng.standard_normal((images, config.res, config.res, 3), np.float32))
    labels = jnp.asarray(rng.integers(0, 2, (batch, 1)), jnp.int32)
    scores = jnp.ones((batch, 1))
    still = {name: value for name, value in params.items() if name in frozen}
    trained = {name: value for name, value in params.items() if name not in frozen}

    def loss(trained: Any) -> jax.Array:
        out = model.apply(still | trained, inputs, True, {"dropout": jax.random.key(1)})
        return answer_loss(out["answer_logits"], labels, scores).mean

    return step.TimedStep(loss, trained, optax.chain(optax.clip_by_global_norm(1.0), step.adamw()))
