"""`bench video`: the video tower: steps and inference by frames, recomputation, views, memory of its windows.

What is measured is chosen by --parts:

- frames: for each of --frames a training step (forward, cross entropy of 400 classes, backward, clipping, AdamW) and
  inference of --batch clips: `ms`, `frames_per_s` and `peak_bytes`, the compiler's figure for its working memory
  (parameters and optimizer state not counted). Beside inference, in turns, the image tower on the same frames one by
  one, and `time_over_images`, `flops_over_images`: of the video tower over that.
- policies: `ms` and `peak_bytes` of the training step at the first of --frames for every recomputation policy.
- views: `peak_bytes` of a test with 1, 4 and 12 views of each video, one after the other as in use.
- windows: bytes that attention adds to a stage's pair of blocks, forward and backward, for a clip of --window_frames
  frames of --window_res pixels at size --window_variant, with windows that grow and with equal ones: the compiler's
  figure of the pair less that of the same pair with windows of one token. Nothing is run.

Weights and clips are random. Decoding is timed by `bench video_data`.

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
from florence_jax.models.layers import REMATS
from florence_jax.models.sizes import VARIANTS, ModelConfig, resolve_config
from florence_jax.models.video_coswin import (
    VIDEO,
    VideoCoSwin,
    VideoModel,
    build_video,
    resolve_video,
    stage_windows,
)
from florence_jax.tools.bench import step, timing

VIDEO_PARTS = ("frames", "policies", "views", "windows")
ACTION_COUNT = 400
VIEWS = (1, 4, 12)
EQUAL_FRAMES = 8  # of equal windows, Video Swin's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench video`."""
    parser.add_argument("--parts", default=",".join(VIDEO_PARTS), help="what is measured, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the median is reported")
    parser.add_argument("--variant", default="ti", choices=list(VARIANTS), help="of the tower, a row of its table")
    parser.add_argument("--res", type=int, default=None, help="side of the frames in pixels; default: the variant's")
    parser.add_argument("--frames", default="8,16,32", help="of a clip, by commas")
    parser.add_argument("--batch", type=int, default=4, help="clips of a step")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    parser.add_argument("--remat", default="none", choices=REMATS, help="recomputation of the parts frames and views")
    parser.add_argument("--window_variant", default="H", choices=list(VARIANTS), help="size of the part windows")
    parser.add_argument("--window_frames", type=int, default=32, help="of a clip of the part windows")
    parser.add_argument("--window_res", type=int, default=224, help="side of its frames in pixels")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in VIDEO_PARTS]:
        raise UserError(f"--parts={args.parts}: unknown {', '.join(unknown)}; known are {', '.join(VIDEO_PARTS)}")
    counts = args.frames.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise UserError(f"--frames={args.frames}: write numbers of frames, separated by commas, such as 8,16")
    if min(args.rounds, args.batch, args.window_frames) < 1:
        raise UserError("--rounds, --batch and --window_frames must be positive")
    report: dict[str, Any] = {}
    if "frames" in parts:
        report["frames"] = {count: measure_frames(args, int(count)) for count in counts}
    if "policies" in parts:
        report["policies"] = measure_video_policies(args, int(counts[0]))
    if "views" in parts:
        report["views"] = measure_views(args, int(counts[0]))
    if "windows" in parts:
        report["windows"] = measure_windows(args)
    names = ("variant", "batch", "dtype", "remat", "rounds", "window_variant", "window_frames", "window_res")
    res = make_video_towers(args, 1).config.res
    return report | {name: getattr(args, name) for name in names} | {"res": res} | step.device()


def make_video_towers(args: argparse.Namespace, frames: int, remat: str = "") -> VideoModel:
    """The towers of the options, without stochastic depth."""
    config = resolve_config(args.variant, res=args.res, dtype=args.dtype, remat=remat or args.remat, drop_path=0.0)
    return build_video(config, resolve_video(config, frames=frames))


def make_clips(args: argparse.Namespace, frames: int, res: int) -> jax.Array:
    """float32 (B, T, res, res, 3)."""
    shape = (args.batch, frames, res, res, 3)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def measure_frames(args: argparse.Namespace, frames: int) -> dict[str, Any]:
    """A training step and inference of clips, and the image tower on their frames, in turns."""
    model = make_video_towers(args, frames)
    clips = make_clips(args, frames, model.config.res)
    params = jax.jit(model.init)(jax.random.key(0))
    images = clips.reshape(-1, *clips.shape[2:])
    functions = {
        "train": clips_step(model, params, clips),
        "inference": step.TimedFunction(functools.partial(pooled_clips, model, clips), params),
        "images": step.TimedFunction(functools.partial(pooled_images, model, images), params),
    }
    times = timing.interleaved(functions, args.rounds)
    found: dict[str, Any] = {
        name: {
            "ms": timing.milliseconds(times[name]),
            "frames_per_s": timing.round_significant(len(images) / timing.median(times[name]), 4),
            "peak_bytes": each.peak_bytes,
        }
        for name, each in functions.items()
    }
    flops = model.flops[VIDEO] / (frames * model.flops["image"])
    return found | {
        "time_over_images": timing.round_significant(found["inference"]["ms"] / found["images"]["ms"], 3),
        "flops_over_images": timing.round_significant(flops, 3),
    }


def measure_video_policies(args: argparse.Namespace, frames: int) -> dict[str, Any]:
    """The training step of every policy, in turns."""
    models = {remat: make_video_towers(args, frames, remat) for remat in REMATS}
    params = jax.jit(models["none"].init)(jax.random.key(0))
    clips = make_clips(args, frames, models["none"].config.res)
    steps = {remat: clips_step(model, params, clips) for remat, model in models.items()}
    times = timing.interleaved(steps, args.rounds)
    return {
        remat: {"ms": timing.milliseconds(times[remat]), "peak_bytes": each.peak_bytes} for remat, each in steps.items()
    }


def measure_views(args: argparse.Namespace, frames: int) -> dict[str, int]:
    """Working memory of a test by its number of views; the clips, its input, are not counted."""
    model = make_video_towers(args, frames)
    params = jax.eval_shape(model.init, jax.random.key(0))
    shape = (args.batch, frames, model.config.res, model.config.res, 3)

    def test(params: Any, views: jax.Array) -> jax.Array:
        return jax.lax.map(lambda clips: model.apply(params, {VIDEO: clips / 255})["video/pooled"], views).mean(0)

    def bytes_of(count: int) -> int:
        views = jax.ShapeDtypeStruct((count, *shape), jnp.uint8)
        return int(jax.jit(test).lower(params, views).compile().memory_analysis().temp_size_in_bytes)

    return {str(count): bytes_of(count) for count in VIEWS}


def measure_windows(args: argparse.Namespace) -> dict[str, list[int]]:
    """Bytes of attention of each stage, of windows that grow and of equal ones."""
    config = resolve_config(args.window_variant, res=args.window_res, dtype=args.dtype)
    equal = resolve_video(config, window_frames=(EQUAL_FRAMES,) * len(config.depths))
    kinds = {"growing": resolve_video(config), "equal": equal}
    least = [stage_bytes(config, args.window_frames, i, (1, 1, 1)) for i in range(len(config.depths))]
    return {
        name: [
            stage_bytes(config, args.window_frames, i, window) - least[i]
            for i, window in enumerate(stage_windows(config, sizes))
        ]
        for name, sizes in kinds.items()
    }


def stage_bytes(config: ModelConfig, frames: int, stage: int, window: tuple[int, int, int]) -> int:
    """Working memory of a pair of blocks on the map of a stage, forward and backward, for one clip."""
    tubes, side = -(-frames // resolve_video(config).tube), config.res // (4 * 2**stage)
    pair = VideoCoSwin(
        width=config.image_width * 2**stage, depths=(2,), heads=(config.heads[stage],), windows=(window,),
        embedding="patch", tube=1, mlp_ratio=config.mlp_ratio, dtype=jnp.dtype(config.dtype),
    )  # fmt: skip
    clip = jax.ShapeDtypeStruct((1, tubes, 4 * side, 4 * side, 3), jnp.float32)

    def loss(params: Any, clip: jax.Array) -> jax.Array:
        return jnp.square(pair.apply(params, clip)["pooled"]).sum()

    params = jax.eval_shape(pair.init, jax.random.key(0), clip)
    compiled = jax.jit(jax.grad(loss)).lower(params, clip).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def clips_step(model: VideoModel, params: Any, clips: jax.Array) -> step.TimedStep:
    """A step of the tower and a classifier of 400 classes."""
    labels = jnp.arange(len(clips)) % ACTION_COUNT
    weight = 0.01 * jax.random.normal(
        jax.random.key(1), (model.config.image_width * 2 ** (len(model.config.depths) - 1), ACTION_COUNT)
    )
    trained = {VIDEO: params[VIDEO], "head": weight}
    others = {name: value for name, value in params.items() if name != VIDEO}

    def loss(trained: Any) -> jax.Array:
        pooled = model.apply(others | {VIDEO: trained[VIDEO]}, {VIDEO: clips}, True)["video/pooled"]
        return optax.softmax_cross_entropy_with_integer_labels(pooled @ trained["head"], labels).mean()

    return step.TimedStep(loss, trained, optax.chain(optax.clip_by_global_norm(1.0), step.adamw()))


def pooled_clips(model: VideoModel, clips: jax.Array, params: Any) -> jax.Array:
    """Features of clips."""
    return model.apply(params, {VIDEO: clips})["video/pooled"]


def pooled_images(model: VideoModel, images: jax.Array, params: Any) -> jax.Array:
    """Features of their frames."""
    return model.apply(params, {"image": images})["image/pooled"]
