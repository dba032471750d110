"""`bench step`: seconds of a training step, and of the same work in PyTorch where that is installed.

Two things are timed, in turns within one run. First the project's training step: both towers, the UniCL loss, backward
pass, gradient clipping, AdamW (`seconds`; with --image_only it is the second thing's). Then, for the comparison, the
image tower alone under a mean-square loss on its pooled features, forward, backward and AdamW update
(`image_tower_seconds`, `torch_seconds`): the same images, as many threads, no clipping and no stochastic depth in both.
`ratio` is PyTorch's time over ours. The data is random; reading is timed by `bench data`.

What --dtype=float32 compares is float32 on both sides; the two others are compared with PyTorch's autocast to bfloat16:
bfloat16_products keeps float32 activations, as `config.precision=auto` does on a processor that multiplies bfloat16.
`compared` says which it was.

The --rival is by default, on a CPU, 'eager': the same tower, with the same weights, in plain eager PyTorch; on a GPU,
'timm': timm's Swin of the same size under torch.compile. Variants with another tower than CoSwin (Swin-*, ViT-*) are
timed alone.

`mfu` is the model's FLOPs (three times the forward pass) of `seconds` over the device's bf16 peak: known for the
devices in train/hardware.py, else given by --peak_tflops. `peak_memory_bytes` is what the device's allocator has seen
at most after a whole step (null on a CPU, which keeps no count), `compiled_bytes` what the compiler reckons for it.

Needs jax, flax and optax only; for the comparison, `pip install torch`, on a GPU also `torchvision timm`.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from florence_jax.errors import UserError
from florence_jax.jobs.hardware import PEAK_FLOPS
from florence_jax.losses.unicl import unicl
from florence_jax.models import florence
from florence_jax.models.base import Model
from florence_jax.models.layers import REMATS
from florence_jax.models.products import ROUNDED, compute_dtype, rounded_factors
from florence_jax.models.sizes import VARIANTS, ModelConfig
from florence_jax.models.window_attention import ATTENTIONS
from florence_jax.tools.aot_compile import report
from florence_jax.tools.bench import timing, timm_swin, torch_swin
from florence_jax.tools.bench.torch_step import TorchStep

LEARNING_RATE, WEIGHT_DECAY, BETAS = 5e-4, 0.1, (0.9, 0.98)
COMPARED = "image tower forward + backward + AdamW, mean-square loss on pooled features, same images"
COMPARISONS = {  # of --dtype, what is compared
    "float32": "float32 on both sides",
    ROUNDED: "products of bfloat16 factors with float32 results, against autocast to bfloat16",
    "bfloat16": "bfloat16 activations, against autocast to bfloat16",
}
RIVALS = ("auto", "eager", "timm", "none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench step`."""
    parser.add_argument("--variant", default="T", choices=list(VARIANTS), help="row of the variants table")
    parser.add_argument("--batch", type=int, default=16, help="image-text pairs a step")
    parser.add_argument("--res", type=int, default=224, help="side of the image in pixels")
    parser.add_argument("--dtype", default="float32", choices=list(COMPARISONS), help="of activations or factors")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each contestant; the median is reported")
    parser.add_argument("--image_only", action="store_true", help="only the image tower's step")
    parser.add_argument("--unroll", action="store_true", help="unroll the depth instead of scanning over it")
    parser.add_argument("--remat", default="none", choices=REMATS, help="recomputation in the backward pass")
    parser.add_argument("--attention", default="xla", choices=ATTENTIONS, help="form of window attention")
    parser.add_argument("--rival", default="auto", choices=RIVALS, help="what to compare with; auto: by the device")
    parser.add_argument("--peak_tflops", type=float, default=None, help="of the device in bf16, for the MFU")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    if min(args.batch, args.steps, args.res) < 1:
        raise UserError("--batch, --res and --steps must be positive")
    # So that PyTorch finds memory beside JAX on a GPU; read when JAX first looks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    model = florence.build(
        args.variant,
        res=args.res,
        dtype=compute_dtype(args.dtype),
        remat=args.remat,
        attention=args.attention,
        scan=not args.unroll,
        drop_path=0.0,
    )
    params = jax.jit(model.init)(jax.random.key(0))
    contestants: dict[str, Callable[[], float]] = {}
    report: dict[str, Any] = {}
    if not args.image_only:
        with rounded_factors(args.dtype == ROUNDED):
            full = pretrain_step(model, params, args.batch)
        contestants["seconds"], report["compile_seconds"] = full, timing.round_significant(full.compile_seconds, 3)
        full()
        report |= full.memory_report()
    images, target = image_batch(model.config, args.batch)
    with rounded_factors(args.dtype == ROUNDED):
        image = image_step(model, params, images, target)
    contestants["image_tower_seconds"] = image
    first_loss = image()
    if args.image_only:
        report |= image.memory_report()
    rival, details = make_rival(args.rival, model.config, params, images, target, args.dtype != "float32")
    report |= details
    if rival is not None:
        contestants["torch_seconds"] = rival
        if details["rival"] == "eager":
            report["loss_relative_difference"] = check_losses(first_loss, rival(), args.dtype)
    times = timing.interleaved(contestants, args.steps)
    report |= {name: timing.median(values) for name, values in times.items()}
    report |= {"torch_seconds": report.get("torch_seconds"), "ratio": None}
    report["compared"] = f"{COMPARED}; {COMPARISONS[args.dtype]}"
    if rival is not None:
        report |= timing.ratio_report(times["image_tower_seconds"], times["torch_seconds"])
    report.setdefault("seconds", report["image_tower_seconds"])
    return describe_run(args) | speed(model.flops, report, args) | report | device()


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were measured."""
    names = ("variant", "batch", "res", "dtype", "remat", "attention", "unroll", "steps")
    return {name: getattr(args, name) for name in names} | {"towers": "image" if args.image_only else "image+text"}


def speed(flops: Mapping[str, float], report: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """`images_per_s`, `gflops_per_s` and `mfu` of `seconds` (three times the forward pass, without recomputation)."""
    per_image = 3 * (flops["image"] if args.image_only else sum(flops.values()))
    rate = args.batch / report["seconds"]
    peak = args.peak_tflops * 1e12 if args.peak_tflops else PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return {
        "images_per_s": timing.round_significant(rate),
        "gflops_per_s": timing.round_significant(rate * per_image / 1e9, 4),
        "mfu": timing.round_significant(rate * per_image / peak, 3) if peak else None,
    }


def device() -> dict[str, Any]:
    """What it ran on: JAX's device, the processor, versions."""
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__} | timing.cpu_hardware()


class TimedStep:
    """A training step compiled ahead of time; each call runs one, waits for it and returns its loss.

    `compile_seconds` is what compiling took; by the compiler's figures, `peak_bytes` is its working memory and
    `compiled_bytes` that and its arguments.
    """

    def __init__(self, loss: Callable[[Any], jax.Array], params: Any, optimizer: optax.GradientTransformation):
        def step(params: Any, opt_state: Any) -> tuple[Any, Any, jax.Array]:
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        # Copies, because the step gives its inputs' memory to its outputs.
        self._state = jax.tree.map(jnp.copy, (params, optimizer.init(params)))
        began = time.perf_counter()
        self._step = jax.jit(step, donate_argnums=(0, 1)).lower(*self._state).compile()
        self.compile_seconds = time.perf_counter() - began
        memory = self._step.memory_analysis()
        self.peak_bytes = int(memory.temp_size_in_bytes)
        self.compiled_bytes = int(report.hbm_of_compiled(memory)["peak"])

    def __call__(self) -> float:
        """One step."""
        *self._state, loss = jax.block_until_ready(self._step(*self._state))
        return float(loss)

    def memory_report(self) -> dict[str, int | None]:
        """`peak_memory_bytes` of the device so far; `compiled_bytes`."""
        stats = jax.devices()[0].memory_stats() or {}
        return {"peak_memory_bytes": stats.get("peak_bytes_in_use"), "compiled_bytes": self.compiled_bytes}


class TimedFunction:
    """A function compiled for an argument: each call runs it and waits; `peak_bytes` is its working memory."""

    def __init__(self, function: Callable[[Any], Any], argument: Any):
        self._function = jax.jit(function).lower(argument).compile()
        self._argument = argument
        self.peak_bytes = int(self._function.memory_analysis().temp_size_in_bytes)

    def __call__(self) -> None:
        """Runs it once."""
        jax.block_until_ready(self._function(self._argument))


def adamw() -> optax.GradientTransformation:
    """AdamW that decays matrices and convolution kernels only, as the project's decay rules do."""
    return optax.adamw(LEARNING_RATE, *BETAS, eps=1e-8, weight_decay=WEIGHT_DECAY, mask=decay_mask)


def decay_mask(params: Any) -> Any:
    """True at the leaves named 'kernel'."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def pretrain_step(model: Model, params: Any, batch: int) -> TimedStep:
    """The step of `tasks/pretrain.py` on a fixed random batch in which two captions are equal."""
    config, rng = model.config, np.random.default_rng(0)
    inputs = {
        "image": jnp.asarray(rng.standard_normal((batch, config.res, config.res, 3), np.float32)),
        "text": jnp.asarray(rng.integers(4, config.vocab_size, (batch, config.text_length)), jnp.int32),
    }
    labels = jnp.maximum(jnp.arange(batch), 1)[:, None]

    def loss(params: Any) -> jax.Array:
        out = model.apply(params, inputs, train=True)
        return unicl(out["image/embedding"], out["text/embedding"], labels, out["logit_scale"])[0]

    return TimedStep(loss, params, optax.chain(optax.clip_by_global_norm(1.0), adamw()))


def image_batch(config: ModelConfig, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images float32 (B, res, res, 3) and regression targets (B, channels of the last stage)."""
    rng = np.random.default_rng(1)
    channels = config.image_width * 2 ** (len(config.depths) - 1)
    images = rng.standard_normal((batch, config.res, config.res, 3), np.float32)
    return images, rng.standard_normal((batch, channels), np.float32)


def image_step(model: Model, params: Any, images: np.ndarray, target: np.ndarray) -> TimedStep:
    """The image tower's step of the comparison."""
    rest = {name: value for name, value in params.items() if name != "image"}

    def loss(image: jax.Array, target: jax.Array, params: Any) -> jax.Array:
        out = model.apply({**rest, "image": params}, {"image": image}, train=True)
        return jnp.square(out["image/pooled"] - target).mean()

    return TimedStep(functools.partial(loss, jnp.asarray(images), jnp.asarray(target)), params["image"], adamw())


def make_rival(
    name: str, config: ModelConfig, params: Any, images: np.ndarray, target: np.ndarray, autocast: bool = False
) -> tuple[Callable[[], float] | None, dict[str, Any]]:
    """The same step in PyTorch, and {"rival", "rival_description", "torch"} (its version).

    None, and the reason on stderr, where it cannot run here.

    Args:
      name: of `RIVALS`.
      config, params, images, target: of our step.
      autocast: to bfloat16.

    Raises:
      UserError: for a rival that is asked for by name and has no such tower.
    """
    platform = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    nothing = {"rival": None, "rival_description": None, "torch": None}
    if name != "none" and (config.image_tower, config.embedding) != ("coswin", "conv"):
        reason = f"the rivals have no image tower like that of variant {config.variant}"
        if name != "auto":
            raise UserError(f"--rival={name}: {reason}; take --rival=none or a variant of CoSwin")
        print(f"no comparison: {reason}", file=sys.stderr)
        return None, nothing
    if name == "auto":
        name = "timm" if platform == "cuda" else "eager"
    missing = {"eager": "torch", "timm": "torch torchvision timm"}.get(name)
    if missing is None:
        return None, nothing
    if not (torch_swin if name == "eager" else timm_swin).available():
        print(f"no comparison: pip install {missing}", file=sys.stderr)
        return None, nothing
    import torch

    if platform is None or (platform == "cuda" and not torch.cuda.is_available()):
        print(f"no comparison: this PyTorch has no device like JAX's {jax.default_backend()}", file=sys.stderr)
        return None, nothing
    torch.set_num_threads(timing.cpu_hardware()["cores"])  # XLA's CPU client uses as many
    if name == "eager":
        tower, description = torch_swin.TorchCoSwin(params["image"], config, platform), "eager, same weights"
    else:
        tower = timm_swin.TimmTower(config.variant, config.res, config.window, platform)
        description = tower.description
    settings = dict(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)
    step = TorchStep(tower, images, target, bfloat16=autocast, **settings)
    return step, {"rival": name, "rival_description": description, "torch": torch.__version__}


def check_losses(ours: float, other: float, dtype: str) -> float:
    """Relative difference of the first losses; raises `RuntimeError` if the two do not compute the same thing."""
    difference = abs(ours - other) / abs(other)
    if not difference < (1e-3 if dtype == "float32" else 5e-2):
        raise RuntimeError(f"the image towers disagree: loss {ours} here, {other} in PyTorch, from the same weights")
    return timing.round_significant(difference, 2)
