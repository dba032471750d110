"""Sixteen scenes learnt by heart: the chain from boxes to targets, losses, boxes and scores can be right."""

import json
import os
import subprocess
import sys

import pytest
from tiny_images import tiny_checkpoint

OPS = "decode|resize_fit({height}, {width})|pad_image({height}, {width})"  # each scene as it is, in every epoch
FLAGS = [
    "--config=configs/detect.py",
    "--config.data.train=scenes:train:16",
    "--config.data.test=scenes:train:16",
    f"--config.data.train_ops={OPS}",
    f"--config.data.eval_ops={OPS}",
    "--config.data.workers=0",
    "--config.detector.sizes=((128, 128),)",
    "--config.detector.tower_lr=1.0",  # its weights are random
    "--config.batch_size=16",
    "--config.total_steps=120",
    "--config.optim.learning_rate=2e-3",
]


@pytest.mark.slow
def test_sixteen_scenes_are_learnt_by_heart(tmp_path):
    towers = tiny_checkpoint(tmp_path / "towers", depths=(2, 2, 2, 2), image_width=32)
    command = [sys.executable, "-m", "florence_jax.main", *FLAGS]
    # One device, and programs as users have them: the tests' own are compiled in less time and run in more.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    subprocess.run([*command, f"--config.init={towers}", f"--workdir={tmp_path / 'run'}"], env=environment, check=True)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["eval/train/AP50"] >= 0.9 and result["eval/train/agnostic_AP50"] >= 0.9, result
