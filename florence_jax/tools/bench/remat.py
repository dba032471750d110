"""`bench remat`: memory and time of the pretraining step for every recomputation policy, timed in turns.

`{policy: {"peak_bytes": .., "seconds": ..}}`: `peak_bytes` is the compiler's figure for the step's working memory
(`memory_analysis().temp_size_in_bytes`), parameters and optimizer state not counted; `seconds` the median step. The
policies are those of `florence_jax.models.layers.REMATS`; all compute the same gradients.

Needs jax, flax and optax only.
"""

import argparse
from typing import Any

import jax

from florence_jax.errors import UserError
from florence_jax.models import florence
from florence_jax.models.layers import REMATS
from florence_jax.models.sizes import VARIANTS
from florence_jax.tools.bench import step, timing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench remat`."""
    parser.add_argument("--variant", default="T", choices=list(VARIANTS), help="row of the variants table")
    parser.add_argument("--batch", type=int, default=8, help="image-text pairs a step")
    parser.add_argument("--res", type=int, default=None, help="side of the image in pixels; default: the variant's")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each policy; the median is reported")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    if min(args.batch, args.steps) < 1:
        raise UserError("--batch and --steps must be positive")
    params, steps = None, {}
    for remat in REMATS:
        model = florence.build(args.variant, res=args.res, dtype=args.dtype, remat=remat)
        params = jax.jit(model.init)(jax.random.key(0)) if params is None else params
        steps[remat] = step.pretrain_step(model, params, args.batch)
    times = timing.interleaved(steps, args.steps)
    policies = {
        remat: {"peak_bytes": step.peak_bytes, "seconds": timing.median(times[remat])} for remat, step in steps.items()
    }
    options = {name: getattr(args, name) for name in ("variant", "batch", "dtype", "steps")}
    return policies | options | {"res": model.config.res} | step.device()
