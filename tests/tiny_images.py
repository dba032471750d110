"""Twenty coloured pictures in sub-folders, a tiny checkpoint as a run leaves it, and the command in this process."""

import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image
from tiny_run import tiny_config, tiny_pairs

from florence_jax import main as entry
from florence_jax.command_line import parse_flags
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.weights import write_description
from florence_jax.tasks import create_task
from florence_jax.train.workdir import write_config

COLOURS = {"red_things": (220, 40, 30), "green_things": (40, 190, 60), "blue_things": (30, 60, 220), "grey": (128,) * 3}
NAMES = "grey\nred_things = red\ngreen_things = green | lime\nblue_things = blue\nyellow\n"


def twenty_images(folder):
    """Five noisy pictures of each of four colours, `folder`/COLOUR/N.png; returns the folder's name."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.clip(np.array(colour) + rng.normal(0, 25, (40, 36, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return str(folder)


def run_main(*arguments):
    """`python -m florence_jax.main ARGUMENTS` in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.setattr(entry, "keep_freed_memory", lambda: False)  # of this process, which other tests use
        patch.setattr(sys, "argv", ["main", *arguments])  # ml_collections looks for its flags there
        flags.FLAGS.unparse_flags()
        with pytest.raises(SystemExit) as stop:
            entry.main(parse_flags(["main", *arguments]))
        flags.FLAGS.mark_as_parsed()
    return stop.value.code


def tiny_checkpoint(folder, **overrides):
    """What a run leaves: config.json, and checkpoints/ with parameters and their average (half as large again).

    `overrides` are of the tiny model's sizes.
    """
    changes = {f"model.overrides.{name}": value for name, value in overrides.items()}
    config = tiny_config(tiny_pairs(folder / "pairs"), **changes)
    task = create_task(config)
    params = jax.jit(task.init)(jax.random.key(0))
    (folder / "run").mkdir()
    write_config(config, task.identity, folder / "run")
    write_description(str(folder / "run" / "checkpoints"), task.description)
    checkpoints = Checkpoints(str(folder / "run" / "checkpoints"))
    checkpoints.save(2, {"params": params, "ema": jax.tree.map(lambda x: 1.5 * x, params)})
    checkpoints.close()
    return str(folder / "run" / "checkpoints")
