"""`bench detect`: the detector's parts and steps: time, working memory, and what the head and the suppression take.

What is measured is chosen by --parts:

- conv: the deformable convolution, forward and backward, in each of its forms, beside torchvision's where that is
  installed (`pip install torch torchvision`), in turns: for each size of --maps the keys of
  `florence_jax.tools.bench.deform_conv.measure_forms`.
- step: a training step (forward, targets, losses, backward, clipping, AdamW) for each of --sides: `ms`, `images_per_s`,
  `peak_bytes`, the compiler's figure for its working memory (parameters and optimizer state not counted),
  `bytes_per_pixel` of it, `canvas`, the side of the batch's pictures, rounded up as the detector wants it, and
  `head_share`: 1 less the time of such a step of the image tower alone.
- inference: the same for pictures to boxes (at most 100), and `suppression_share`: of choosing, cutting and suppressing
  boxes. The classes' bias is 0 there, so that every class of every position is a candidate: the most that there can be.
- remat: `ms` and `peak_bytes` of the training step at --remat_side for every recomputation policy; the unit of the head
  is a block.

Weights and pictures are random; each picture has eight boxes. Reading is timed by `bench data`.

Needs jax, flax and optax only.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from florence_jax.errors import UserError
from florence_jax.losses.detection import detection_loss
from florence_jax.models.anchors import level_shapes
from florence_jax.models.base import Model
from florence_jax.models.detections import candidates, suppress
from florence_jax.models.detector import DETECTORS, STAGES, build_detector, resolve_detector
from florence_jax.models.layers import REMATS
from florence_jax.models.sizes import VARIANTS, resolve_config
from florence_jax.tools.bench import deform_conv, step, timing

DETECT_PARTS = ("conv", "step", "inference", "remat")
BOXES = 8  # of a picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench detect`."""
    parser.add_argument("--parts", default=",".join(DETECT_PARTS), help="what is measured, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the median is reported")
    parser.add_argument(
        "--maps", default="2x32x48x64,2x256x12x16,2x256x8x8", help="conv: BATCHxCHANNELSxHEIGHTxWIDTH, by commas"
    )
    parser.add_argument("--variant", default="ti", choices=list(VARIANTS), help="image tower, a row of its table")
    parser.add_argument("--detector", default="tiny", choices=list(DETECTORS), help="head, a row of its table")
    parser.add_argument("--classes", type=int, default=20, help="classes of boxes")
    parser.add_argument("--batch", type=int, default=2, help="pictures of a step")
    parser.add_argument("--sides", default="320,640,960,1280", help="sides of the pictures in pixels, by commas")
    parser.add_argument("--remat", default="none", choices=REMATS, help="recomputation of the parts step and inference")
    parser.add_argument("--remat_side", type=int, default=640, help="side of the pictures of the part remat")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    parts = args.parts.split(",")
    unknown = [part for part in parts if part not in DETECT_PARTS]
    if unknown:
        raise UserError(f"--parts={args.parts}: unknown {', '.join(unknown)}; known are {', '.join(DETECT_PARTS)}")
    if min(args.rounds, args.batch, args.classes, args.remat_side) < 1:
        raise UserError("--rounds, --batch, --classes and --remat_side must be positive")
    maps, sides = parse_maps(args.maps), parse_sides(args.sides)
    report: dict[str, Any] = {}
    if "conv" in parts:
        report["conv"] = {name: deform_conv.measure_forms(size, args.rounds) for name, size in maps.items()}
    if "step" in parts:
        report["step"] = {str(side): measure_step(args, side) for side in sides}
    if "inference" in parts:
        report["inference"] = {str(side): measure_inference(args, side) for side in sides}
    if "remat" in parts:
        report["remat"] = measure_remats(args)
    names = ("variant", "detector", "classes", "batch", "dtype", "rounds")
    return report | {name: getattr(args, name) for name in names} | step.device()


def parse_maps(text: str) -> dict[str, deform_conv.MapSize]:
    """'2x32x48x64,..' -> {"2x32x48x64": MapSize(2, 32, 48, 64), ..}."""
    found = {}
    for name in text.split(","):
        numbers = [int(number) if number.isdecimal() else 0 for number in name.split("x")]
        if len(numbers) != 4 or min(numbers) < 1:
            raise UserError(f"--maps={text}: {name!r} is not BATCHxCHANNELSxHEIGHTxWIDTH, such as 2x32x48x64")
        found[name] = deform_conv.MapSize(*numbers)
    return found


def parse_sides(text: str) -> list[int]:
    """'320,640' -> [320, 640]."""
    sides = text.split(",")
    if not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"--sides={text}: write pixels, separated by commas, such as 320,640")
    return [int(side) for side in sides]


def measure_step(args: argparse.Namespace, side: int) -> dict[str, Any]:
    """A training step and one of the tower alone, in turns."""
    model, batch = make_model(args, args.remat), make_batch(args, side)
    params = jax.jit(model.init)(jax.random.key(0))
    whole = training_step(model, params, batch)
    tower = step.TimedStep(functools.partial(tower_loss, model, params, batch), params["image"], optimizer())
    times = timing.interleaved({"whole": whole, "tower": tower}, args.rounds)
    return describe_size(args, batch, times["whole"], whole.peak_bytes) | {"head_share": rest(times, "tower")}


def measure_inference(args: argparse.Namespace, side: int) -> dict[str, Any]:
    """Pictures to boxes, the tower alone, and outputs to boxes, in turns."""
    model, batch = make_model(args, args.remat), make_batch(args, side)
    params = with_candidates(jax.jit(model.init)(jax.random.key(0)))
    outputs = jax.jit(functools.partial(head_outputs, model, batch))(params)
    functions = {
        "whole": step.TimedFunction(functools.partial(find_boxes, model, batch), params),
        "tower": step.TimedFunction(functools.partial(tower_maps, model, batch), params),
        "boxes": step.TimedFunction(functools.partial(boxes_of, batch), outputs),
    }
    times = timing.interleaved(functions, args.rounds)
    return describe_size(args, batch, times["whole"], functions["whole"].peak_bytes) | {
        "head_share": rest(times, "tower", "boxes"),
        "suppression_share": timing.round_significant(timing.median(times["boxes"]) / timing.median(times["whole"]), 3),
    }


def measure_remats(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The training step of every policy, in turns."""
    batch, params, steps = make_batch(args, args.remat_side), None, {}
    for remat in REMATS:
        model = make_model(args, remat)
        params = jax.jit(model.init)(jax.random.key(0)) if params is None else params
        steps[remat] = training_step(model, params, batch)
    times = timing.interleaved(steps, args.rounds)
    return {remat: {"ms": timing.milliseconds(times[remat]), "peak_bytes": steps[remat].peak_bytes} for remat in REMATS}


def make_model(args: argparse.Namespace, remat: str) -> Model:
    """The detector of the options."""
    config = resolve_config(args.variant, dtype=args.dtype, remat=remat, drop_path=0.0)
    return build_detector(config, args.detector, args.classes)


def make_batch(args: argparse.Namespace, side: int) -> dict[str, jax.Array]:
    """Random pictures of `side` pixels on a canvas of the detector's multiple, and their boxes."""
    rng = np.random.default_rng(0)
    multiple = resolve_detector(args.detector).multiple
    canvas = -(-side // multiple) * multiple
    image = np.zeros((args.batch, canvas, canvas, 3), np.float32)
    image[:, :side, :side] = rng.standard_normal((args.batch, side, side, 3))
    corners = np.sort(rng.uniform(0, side, (args.batch, BOXES, 2, 2)), axis=2)
    batch = {
        "image": image,
        "image_valid": np.full((args.batch, 2), side, np.int32),
        "boxes": corners.reshape(args.batch, BOXES, 4).astype(np.float32),
        "class_ids": rng.integers(0, args.classes, (args.batch, BOXES)).astype(np.int32),
        "objects": np.ones((args.batch, BOXES), bool),
        "ignore": np.zeros((args.batch, BOXES), bool),
    }
    return jax.tree.map(jnp.asarray, batch)


def training_step(model: Model, params: Any, batch: dict[str, jax.Array]) -> step.TimedStep:
    """A compiled step of the whole detector."""
    return step.TimedStep(functools.partial(whole_loss, model, batch), params, optimizer())


def optimizer() -> optax.GradientTransformation:
    """Clipping and AdamW."""
    return optax.chain(optax.clip_by_global_norm(1.0), step.adamw())


def whole_loss(model: Model, batch: dict[str, jax.Array], params: Any) -> jax.Array:
    """The detector's loss."""
    return detection_loss(head_outputs(model, batch, params, train=True), batch, level_sizes(batch))[0]


def tower_loss(model: Model, params: Any, batch: dict[str, jax.Array], image: Any) -> jax.Array:
    """Some loss of the maps that the detector reads; `image` are the tower's parameters."""
    maps = tower_maps(model, batch, params | {"image": image}, train=True)
    return sum((jnp.square(each).mean() for each in maps), start=jnp.float32(0))


def head_outputs(model: Model, batch: dict[str, jax.Array], params: Any, train: bool = False) -> dict[str, jax.Array]:
    """The outputs of the detector."""
    outputs = model.apply(params, {name: batch[name] for name in ("image", "image_valid")}, train=train)
    return {name: value for name, value in outputs.items() if name.startswith("detector/")}


def tower_maps(model: Model, batch: dict[str, jax.Array], params: Any, train: bool = False) -> list[jax.Array]:
    """The maps of the tower that the detector reads."""
    outputs = model.apply(params, {name: batch[name] for name in ("image", "image_valid")}, train=train)
    return [outputs[f"image/norm{stage}"] for stage in STAGES]


def find_boxes(model: Model, batch: dict[str, jax.Array], params: Any) -> dict[str, jax.Array]:
    """Pictures to boxes."""
    return boxes_of(batch, head_outputs(model, batch, params))


def boxes_of(batch: dict[str, jax.Array], outputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Outputs to boxes."""
    return suppress(candidates(outputs, batch["image_valid"], level_sizes(batch)))


def with_candidates(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with a bias of 0 of the classes: every class of every position is then likely enough."""
    detector = dict(params["detector"])
    detector["class_logits"] = detector["class_logits"] | {"bias": jnp.zeros_like(detector["class_logits"]["bias"])}
    return params | {"detector": detector}


def level_sizes(batch: dict[str, jax.Array]) -> tuple[int, ...]:
    """Anchors of each level."""
    return tuple(rows * columns for rows, columns in level_shapes(*batch["image"].shape[1:3]))


def describe_size(
    args: argparse.Namespace, batch: dict[str, jax.Array], seconds: list[float], peak: int
) -> dict[str, Any]:
    """What is said of a step at a size of pictures."""
    return {
        "canvas": batch["image"].shape[1],
        "ms": timing.milliseconds(seconds),
        "images_per_s": timing.round_significant(args.batch / timing.median(seconds), 4),
        "peak_bytes": peak,
        "bytes_per_pixel": timing.round_significant(peak / batch["image"][..., 0].size, 4),
    }


def rest(times: dict[str, list[float]], *parts: str) -> float:
    """The share of the whole that the parts do not explain."""
    explained = sum(timing.median(times[part]) for part in parts)
    return timing.round_significant(1 - explained / timing.median(times["whole"]), 3)
