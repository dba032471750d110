"""`bench vocabulary`: the working memory of a detector of many classes: all at once, and as it is done.

For pictures of --side pixels and a detector of --classes, the compiler's figure (`memory_analysis`) for what a program
needs beside its arguments and results; nothing is run, and no weights are made:

- loss: forward and backward pass. `whole`: of the logits of all classes; `drawn`: of --sampled of them, the batch's own
  and others by their frequency, see `losses.class_sampling`.
- inference: pictures to boxes. `whole`: of the logits of all classes; `in_parts`: of 512 classes after the others, see
  `models.detections.candidates`.

`logits_bytes` are those of one array of all logits, `canvas` the side of the pictures, rounded up as the detector wants
it. Needs jax and flax only.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from florence_jax.errors import UserError
from florence_jax.losses.class_sampling import sample_classes
from florence_jax.losses.detection import detection_loss
from florence_jax.models.base import Model
from florence_jax.models.detections import candidates, suppress
from florence_jax.models.detector import DETECTORS
from florence_jax.models.layers import REMATS
from florence_jax.models.sizes import VARIANTS
from florence_jax.tools.bench import detect, step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench vocabulary`."""
    parser.add_argument("--parts", default="loss,inference", help="what is compiled, separated by commas")
    parser.add_argument("--classes", type=int, default=25190, help="classes of the detector; default: FLOD-9M's")
    parser.add_argument("--sampled", type=int, default=512, help="classes of a step")
    parser.add_argument("--side", type=int, default=800, help="of the pictures, in pixels")
    parser.add_argument("--batch", type=int, default=1, help="pictures")
    parser.add_argument("--variant", default="ti", choices=list(VARIANTS), help="image tower, a row of its table")
    parser.add_argument("--detector", default="tiny", choices=list(DETECTORS), help="head, a row of its table")
    parser.add_argument("--remat", default="none", choices=REMATS, help="recomputation")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles; see the module's docstring for the keys."""
    forms = {
        "loss": {
            "whole": functools.partial(gradients_by_classes, sampled=0),
            "drawn": functools.partial(gradients_by_classes, sampled=args.sampled),
        },
        "inference": {
            "whole": functools.partial(boxes_by_classes, in_parts=False),
            "in_parts": functools.partial(boxes_by_classes, in_parts=True),
        },
    }
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in forms]:
        raise UserError(f"--parts={args.parts}: unknown {', '.join(unknown)}; known are {', '.join(forms)}")
    if min(args.classes, args.side, args.batch) < 1 or not 1 <= args.sampled <= args.classes:
        raise UserError("--classes, --side and --batch must be positive, --sampled at most --classes")
    model, batch = detect.make_model(args, args.remat), detect.make_batch(args, args.side)
    report: dict[str, Any] = {
        part: {name: working_memory(functools.partial(form, model), model, batch) for name, form in forms[part].items()}
        for part in parts
    }
    report |= {"logits_bytes": 4 * args.batch * args.classes * sum(detect.level_sizes(batch))}
    report |= {"canvas": batch["image"].shape[1]}
    names = ("variant", "detector", "classes", "sampled", "batch", "remat", "dtype")
    return report | {name: getattr(args, name) for name in names} | step.device()


def working_memory(function: Callable[[Any, Any], Any], model: Model, batch: dict[str, jax.Array]) -> int:
    """Working memory of a function of parameters and a batch."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    return int(jax.jit(function).lower(params, batch).compile().memory_analysis().temp_size_in_bytes)


def gradients_by_classes(model: Model, params: Any, batch: dict[str, jax.Array], sampled: int) -> Any:
    """Of the detector's loss; `sampled` classes are drawn, 0: none."""
    classes = params["detector"]["class_logits"]["bias"].size
    inputs = {name: batch[name] for name in ("image", "image_valid")}
    if sampled:
        drawn = sample_classes(jax.random.key(0), batch["class_ids"], jnp.ones(classes), sampled)
        batch, inputs = batch | {"drawn": drawn}, inputs | {"drawn": drawn}

    def loss(params: Any) -> jax.Array:
        outputs = model.apply(params, inputs, train=True)
        return detection_loss(outputs, batch, detect.level_sizes(batch))[0]

    return jax.grad(loss)(params)


def boxes_by_classes(model: Model, params: Any, batch: dict[str, jax.Array], in_parts: bool) -> dict[str, jax.Array]:
    """Pictures to boxes."""
    outputs = model.apply(params, {name: batch[name] for name in ("image", "image_valid")})
    layer = params["detector"]["class_logits"] if in_parts else None
    return suppress(candidates(outputs, batch["image_valid"], detect.level_sizes(batch), layer=layer))
