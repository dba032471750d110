"""Twenty coloured pictures in sub-folders, and a tiny checkpoint made by one command: a user's first hour."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_run import TINY_FLAGS, tiny_pairs

ROOT = Path(__file__).parents[1]
COLOURS = {"red_things": (220, 40, 30), "green_things": (40, 190, 60), "blue_things": (30, 60, 220), "grey": (128,) * 3}


def twenty_images(folder):
    """Five noisy pictures of each of four colours, `folder`/COLOUR/N.png; returns the folder's name."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.clip(np.array(colour) + rng.normal(0, 25, (40, 36, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return str(folder)


def command(module, *arguments):
    """Runs `python -m florence_jax.MODULE`; fails with its output unless it exits with 0."""
    done = subprocess.run(
        [sys.executable, "-m", f"florence_jax.{module}", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def tiny_checkpoint(folder):
    """A pretraining run of two steps; returns its checkpoints/ folder."""
    pairs = tiny_pairs(folder / "pairs")
    steps = ["--config.total_steps=2", "--config.optim.warmup_steps=1", "--config.optim.ema_decay=0.5"]
    command("main", *TINY_FLAGS, *steps, f"--config.data.train={pairs}", f"--workdir={folder}/run")
    return str(folder / "run" / "checkpoints")
