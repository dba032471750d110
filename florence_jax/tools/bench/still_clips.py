"""`bench still_clips`: how far an inflated video tower is from its image tower, for clips of identical frames.

Each tower of `STILL_TOWERS`, of random weights, small, with two stages, is inflated. For windows along time that grow
and for equal ones, sizes of the frames that need padding and that need none, and each number of frames, the largest
difference of a pooled feature (they are of the size of 1, after a LayerNorm) from that of the image tower, in each of
--dtypes: `{tower: {windows: {size: {frames: [difference of each dtype]}}}}`. It is what rounding makes. In `published`
padding takes part in attention, as in Video Swin's code: there the two differ, where tokens are padded.
"""

import argparse
import dataclasses
from typing import Any

import jax
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.sizes import resolve_config
from florence_jax.models.video_coswin import VIDEO, VideoModel, build_video, resolve_video
from florence_jax.params.rules import path_string
from florence_jax.tools.bench.timing import round_significant

STILL_DTYPES = ("float32", "float64")
# (embedding, frames that an embedding between stages looks at, padding is kept out)
STILL_TOWERS = {
    "coswin": ("conv", 1, True),
    "coswin, merging 3 frames": ("conv", 3, True),
    "swin": ("patch", 1, True),
    "swin, published": ("patch", 1, False),
}
STILL_WINDOWS = {"growing": (2, 4), "equal": (8, 8)}  # tokens of time in the two stages
# Name -> (height, width) of the frames and side of the windows: the second needs padding in both stages.
STILL_SIZES = {"32x32": ((32, 32), 4), "40x28": ((40, 28), 3)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench still_clips`."""
    parser.add_argument("--frames", default="1,2,5,8,18,36", help="of a clip, by commas")
    parser.add_argument("--towers", default=";".join(STILL_TOWERS), help="which, separated by ';'")
    parser.add_argument("--dtypes", default=",".join(STILL_DTYPES), help="of all numbers, by commas")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring."""
    counts, dtypes, towers = args.frames.split(","), args.dtypes.split(","), args.towers.split(";")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise UserError(f"--frames={args.frames}: write numbers of frames, separated by commas, such as 8,16")
    for option, given, known in (("dtypes", dtypes, STILL_DTYPES), ("towers", towers, tuple(STILL_TOWERS))):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"--{option}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    found: dict[str, Any] = {
        name: {windows: {size: {} for size in STILL_SIZES} for windows in STILL_WINDOWS} for name in towers
    }
    for dtype in dtypes:
        with jax.enable_x64(dtype == "float64"):
            for name in towers:
                for windows, tokens in STILL_WINDOWS.items():
                    for size in STILL_SIZES:
                        rows = found[name][windows][size]
                        for count, value in _differences(name, tokens, size, counts, dtype).items():
                            rows.setdefault(count, []).append(round_significant(value, 2))
    return {"results": found, "dtypes": dtypes}


def _differences(tower: str, tokens: tuple[int, int], size: str, counts: list[str], dtype: str) -> dict[str, float]:
    """Number of frames -> the largest difference."""
    (embedding, merge, masked), (sides, window) = STILL_TOWERS[tower], STILL_SIZES[size]
    model = small_video_model(sides, window, embedding, merge, tokens, dtype=dtype, mask_padding=masked)
    params = inflated_params(model)
    image = np.random.default_rng(1).normal(size=(1, *sides, 3)).astype(dtype)
    apply = jax.jit(model.apply)
    wanted = np.asarray(apply(params, {"image": image})["image/pooled"])

    def difference(frames: int) -> float:
        clip = np.repeat(image[:, None], frames, 1)
        return float(np.abs(np.asarray(apply(params, {VIDEO: clip})["video/pooled"]) - wanted).max())

    return {count: difference(int(count)) for count in counts}


def small_video_model(
    size: tuple[int, int],
    window: int,
    embedding: str,
    merge: int,
    window_frames: tuple[int, ...],
    scan: bool = False,
    dtype: str = "float32",
    mask_padding: bool = True,
) -> VideoModel:
    """Towers of two stages of 8 and 16 channels, the image tower's windows such as suit frames of this size."""
    padded = {} if size == (32, 32) else {"size_mode": "detection", "mask_padding": mask_padding}
    tower = resolve_config(
        "ti", res=32, image_width=8, depths=(4, 2) if scan else (2, 2), heads=(1, 2), window=window, projection=4,
        embedding=embedding, scan=scan, out_stages=(), **padded,
    )  # fmt: skip
    tower = dataclasses.replace(tower, dtype=dtype)
    video = resolve_video(tower, merge=merge, window_frames=window_frames, frames=4, mask_padding=mask_padding)
    return build_video(tower, video)


def inflated_params(model: VideoModel) -> dict[str, Any]:
    """Random parameters of the image tower and its projection, and the video tower's, inflated from them.

    They are numbers that float32 still holds when they are divided by 2 or 3.
    """
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        value = rng.integers(-400, 400, leaf.shape).astype(np.float32) * np.float32(3 / 2**12)
        return value + (path[-1].key == "scale")

    params = jax.tree_util.tree_map_with_path(draw, {name: shapes[name] for name in ("image", "image_projection")})
    image = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params["image"])}

    def inflate(path: Any, leaf: Any) -> Any:
        name = path_string(path)
        return model.inflate(f"{VIDEO}/{name}", image[name], leaf)

    return params | {VIDEO: jax.tree_util.tree_map_with_path(inflate, shapes[VIDEO])}
