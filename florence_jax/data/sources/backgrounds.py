"""What scenes are composed on: photographs that lie in the wheels of scikit-image and scikit-learn, or smooth noise."""

import functools
import importlib.util
from pathlib import Path

import numpy as np

from florence_jax.data.sources.cutouts import ONE, halves, sample
from florence_jax.errors import UserError
from florence_jax.pictures import upright_rgb

BACKGROUNDS = ("photographs", "noise")
SCENES_INSTALL = "pip install '.[scenes]'"
# Files inside the wheels, nothing that would be fetched; a photograph is of one side only.
PHOTOGRAPH_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
SCENE_PHOTOGRAPHS = {
    "train": (
        "skimage/brick.png",
        "skimage/chelsea.png",
        "skimage/coffee.png",
        "skimage/coins.png",
        "skimage/grass.png",
        "skimage/hubble_deep_field.jpg",
        "skimage/ihc.png",
        "skimage/motorcycle_left.png",
        "skimage/moon.png",
        "sklearn/flower.jpg",
    ),
    "held_out": (
        "skimage/astronaut.png",
        "skimage/camera.png",
        "skimage/gravel.png",
        "skimage/retina.jpg",
        "skimage/rocket.jpg",
        "sklearn/china.jpg",
    ),
}
LONGEST = 1024  # pixels: a larger photograph is halved
GRAINS = (3, 6, 12)  # cells of noise along a side, coarse to fine


def photograph_path(name: str) -> Path | None:
    """The file of a photograph; None where it is not installed. The packages are not imported."""
    package, file = name.split("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / PHOTOGRAPH_FOLDERS[package] / file
    return path if path.is_file() else None


@functools.cache
def missing_photographs() -> tuple[str, ...]:
    """Those of `SCENE_PHOTOGRAPHS` that are not here."""
    return tuple(name for names in SCENE_PHOTOGRAPHS.values() for name in names if photograph_path(name) is None)


def choose_backgrounds(wanted: str = "") -> str:
    """`wanted`, one of `BACKGROUNDS`; for '' photographs where all of them are installed, else noise.

    Raises:
      UserError: for another word, or photographs that are not installed.
    """
    missing = missing_photographs()
    if not wanted:
        return "noise" if missing else "photographs"
    if wanted not in BACKGROUNDS:
        raise UserError(f"backgrounds of scenes are {' or '.join(BACKGROUNDS)}, not {wanted!r}")
    if wanted == "photographs" and missing:
        raise UserError(
            f"{len(missing)} photographs for scenes are missing ({', '.join(missing[:3])}, ...): {SCENES_INSTALL}"
        )
    return wanted


@functools.cache
def _photograph(name: str) -> tuple[np.ndarray, ...]:
    path = photograph_path(name)
    if path is None:
        raise UserError(f"{name} is gone; {SCENES_INSTALL}")
    steps = halves(np.asarray(upright_rgb(path.read_bytes())), shortest=32)
    return tuple(step for step in steps if max(step.shape[:2]) <= LONGEST)


def photograph_crop(side: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random part of a random photograph, perhaps mirrored: uint8 (height, width, 3).

    Args:
      side: a key of `SCENE_PHOTOGRAPHS`. size: (height, width).
    """
    names = SCENE_PHOTOGRAPHS[side]
    steps = _photograph(names[int(rng.random() * len(names))])
    height, width = size
    # As many pixels of the photograph as fit, down to a third of that; at least half a pixel for one of the scene.
    most = min(ONE * steps[0].shape[0] // height, ONE * steps[0].shape[1] // width)
    ratio = max(int(most * (1 + 2 * rng.random()) / 3), ONE // 2)
    level = 0
    while level + 1 < len(steps) and ratio >= 2 * ONE:
        level, ratio = level + 1, ratio // 2
    picture = steps[level]
    left, top = (
        int(rng.random() * max(0, (edge - 1) * ONE - (span - 1) * ratio))
        for edge, span in ((picture.shape[1], width), (picture.shape[0], height))
    )
    mirrored = rng.random() < 0.5
    x = left + ratio * np.arange(width, dtype=np.int64)[None]
    y = top + ratio * np.arange(height, dtype=np.int64)[:, None]
    return sample(picture, x[:, ::-1] if mirrored else x, y)


def smooth_noise(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Coloured clouds: noise of the three sizes of `GRAINS`, uint8 (height, width, 3)."""
    height, width = size
    total = np.zeros((height, width, 3), np.int32)
    for share, cells in zip((4, 2, 1), GRAINS, strict=True):
        grid = (256 * rng.random((cells + 1, cells + 1, 3))).astype(np.uint8)
        x = (cells * ONE * np.arange(width, dtype=np.int64) // width)[None]
        y = (cells * ONE * np.arange(height, dtype=np.int64) // height)[:, None]
        total += share * sample(grid, x, y).astype(np.int32)
    return (total // 7).astype(np.uint8)
