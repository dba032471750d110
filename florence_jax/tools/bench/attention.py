"""`bench attention`: blocks of an image tower in each form of window attention, forward and backward, timed in turns.

`stages` has one entry for each stage of the tower, for a shifted block where the map has several windows: `seconds` by
form, null where a form does not take the map, and `difference`, the largest of the output and of all gradients from
those that XLA computes in float32, over the largest entry of each array. On one device: choose one of several, on
NVIDIA's by CUDA_VISIBLE_DEVICES=0.

Needs jax and flax only; `cudnn` an NVIDIA GPU and bfloat16.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.coswin import embedded_size
from florence_jax.models.sizes import VARIANTS, ModelConfig, resolve_config
from florence_jax.models.window_attention import ATTENTIONS, use_kernel
from florence_jax.models.windows import SwinBlock, stage_window, window_places
from florence_jax.tools.bench import step, timing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench attention`."""
    parser.add_argument("--variant", default="B", choices=list(VARIANTS), help="row of the variants table")
    parser.add_argument("--res", type=int, default=None, help="side of the image in pixels; default: the variant's")
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="compute dtype")
    parser.add_argument("--forms", default="xla,fused,cudnn", help="separated by commas, of " + ", ".join(ATTENTIONS))
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each; medians are reported")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    forms = args.forms.split(",")
    if min(args.batch, args.rounds) < 1 or not set(forms) <= set(ATTENTIONS):
        raise UserError(f"--batch and --rounds must be positive, and --forms of {', '.join(ATTENTIONS)}")
    config = resolve_config(args.variant, res=args.res)
    if config.image_tower != "coswin":
        raise UserError(f"--variant={args.variant} has no attention in windows")
    options = {name: getattr(args, name) for name in ("variant", "batch", "dtype", "rounds")}
    stages = [measure_stage(args, config, i, forms) for i in range(len(config.depths))]
    return {"stages": stages} | options | {"res": config.res} | step.device()


def measure_stage(args: argparse.Namespace, config: ModelConfig, stage: int, forms: list[str]) -> dict[str, Any]:
    """The entry of a stage."""
    side, channels, heads = config.res, config.image_width * 2**stage, config.heads[stage]
    for i in range(stage + 1):
        side = embedded_size(side, i, config.embedding)
    window, shift = stage_window(side, side, config.window, config.size_mode)
    options = dict(heads=heads, window=(window,) * 2, shift=(shift,) * 2)
    places = window_places((side, side), options["window"], options["shift"])
    rng = np.random.default_rng(0)
    x, grad = (jnp.asarray(rng.standard_normal((args.batch, side, side, channels), np.float32)) for _ in range(2))
    params = jax.jit(SwinBlock(**options).init)(jax.random.key(0), x[:1])["params"]
    table = params["attention"]["relative_position_bias_table"]
    params["attention"]["relative_position_bias_table"] = jnp.asarray(rng.standard_normal(table.shape, np.float32))

    def compiled(form: str, dtype: str) -> Any:
        block = SwinBlock(**options, form=form, dtype=jnp.dtype(dtype))

        def both(params: Any, x: jax.Array, grad: jax.Array) -> Any:
            out, vjp = jax.vjp(lambda params, x: block.apply({"params": params}, x), params, x)
            return out, vjp(grad)

        low = x.astype(dtype), grad.astype(dtype)
        return functools.partial(jax.jit(both).lower(params, *low).compile(), params, *low)

    like = jax.ShapeDtypeStruct(x.shape, jnp.dtype(args.dtype))
    calls = {
        form: compiled(form, args.dtype) for form in forms if form == "xla" or use_kernel(form, like, places, heads)
    }
    exact = compiled("xla", "float32")()
    differences = {form: timing.round_significant(difference(call(), exact), 3) for form, call in calls.items()}
    times = timing.interleaved({form: functools.partial(wait_for, call) for form, call in calls.items()}, args.rounds)
    return {
        "map": [side, side, channels],
        "window": window,
        "seconds": dict.fromkeys(forms) | {form: timing.median(seconds) for form, seconds in times.items()},
        "difference": dict.fromkeys(forms) | differences,
    }


def wait_for(call: Any) -> None:
    """Calls, and returns when all results are there."""
    jax.block_until_ready(call())


def difference(got: Any, exact: Any) -> float:
    """The largest of two trees of arrays, over the largest entry of each exact one."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
    return max(float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()) for a, b in pairs)
