"""Every evaluator gives the same numbers in one process and in a job of several, for another batch size."""

import json
from pathlib import Path

import jax
import pytest
from tiny_images import run_main
from two_processes import run_job

from configs.video import get_config
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.weights import write_description
from florence_jax.tasks import create_task
from florence_jax.train.workdir import write_config

NAMES = "emoji:new_names"
EPISODES = ("ways=3", "shots=(2,)", "queries=2", "episodes=8")
# The probe's numbers are those of a minimum that is found to some digits only: its pictures are easy to tell apart.
PROTOCOLS = {
    "zeroshot": ["--config=configs/classify.py:protocol=zeroshot", f"--config.data.test={NAMES}"],
    "probe": ["--config=configs/classify.py:protocol=probe", "--config.data.train={pictures}"],
    "fewshot": [
        "--config=configs/classify.py:protocol=fewshot",
        f"--config.data.test={NAMES}",
        *(f"--config.fewshot.{option}" for option in EPISODES),
    ],
    "retrieve": ["--config=configs/retrieve.py:protocol=zeroshot", "--config.eval.source={pictures}"],
    "video": [
        "--config=configs/video.py:protocol=eval",
        "--config.init={video}",
        "--config.data.test=motions:new_names:10:mpeg4:noise",
        "--config.video.clips=2",
        "--config.video.crops=3",
    ],
}
BATCH_SIZES = {"video": 1}  # of each process; others have 32
# What fine-tuning evaluates, at its start: a head, weights half-way to the start (the start itself), the watched set.
SLOW_PROTOCOLS = {
    "linear": [
        "--config=configs/classify.py:protocol=finetune_linear",
        "--config.mode=eval",
        "--config.head_init=text",
        "--config.wise_ft=(0.5,)",
        "--config.forgetting.source=emoji:new_names",
        "--config.data.train={pictures}",
    ],
    "backbone": [
        "--config=configs/classify.py:protocol=fewshot",
        "--config.data.test={pictures}",
        "--config.fewshot.train=backbone",
        *(f"--config.fewshot.{option}" for option in EPISODES),
    ],
    "captions": [
        "--config=configs/retrieve.py:protocol=zeroshot",
        "--config.eval.source=karpathy:{split}:test@{pictures}",
    ],
}


def video_checkpoint(weights, folder):
    """A folder with a video tower and a classifier of motions, fresh ones."""
    changes = {"init": weights, "data.train": "motions:train:10::noise", "video.overrides.frames": 4}
    config = get_config("runlocal")
    config.update_from_flattened_dict(changes)
    task = create_task(config)
    write_config(config, task.identity, folder)
    write_description(str(folder / "checkpoints"), task.description)
    checkpoints = Checkpoints(str(folder / "checkpoints"))
    checkpoints.save(1, {"params": jax.jit(task.init)(jax.random.key(0))})
    checkpoints.close()
    return str(folder)


@pytest.fixture(scope="module")
def places(pictures, weights, tmp_path_factory):
    """Pictures, a folder with a classifier of motions, and a split file that gives each picture two captions."""
    video = video_checkpoint(weights, tmp_path_factory.mktemp("video"))
    split = tmp_path_factory.mktemp("split") / "dataset_coco.json"
    images = [
        {
            "filename": f.name,
            "filepath": f.parent.name,
            "split": "test",
            "sentences": [{"raw": f"{f} {i}"} for i in "ab"],
        }
        for f in sorted(Path(pictures).glob("*/*.png"))
    ]
    split.write_text(json.dumps({"images": images}))
    return {"pictures": pictures, "split": split, "video": video}


@pytest.mark.parametrize(
    "count,protocols",
    [
        pytest.param(2, PROTOCOLS, id="2"),
        pytest.param(4, PROTOCOLS, id="4", marks=pytest.mark.slow),
        pytest.param(4, SLOW_PROTOCOLS, id="4-more", marks=pytest.mark.slow),
    ],
)
def test_several_processes_give_the_numbers_of_one(weights, places, count, protocols, tmp_path):
    commands, alone = {}, {}
    for name, arguments in protocols.items():
        config, *options = (argument.format(**places) for argument in arguments)
        commands[name] = [config, f"--config.init={weights}", *options]  # an option of its own comes later, and counts
        workdir = tmp_path / f"alone_{name}"
        assert run_main(*commands[name], "--config.eval.batch_size=24", f"--workdir={workdir}") == 0
        alone[name] = json.loads((workdir / "result.json").read_text())
    sizes = {name: f"--config.eval.batch_size={BATCH_SIZES.get(name, 32) * count}" for name in commands}
    job = [[*arguments, sizes[name], f"--workdir={tmp_path / name}"] for name, arguments in commands.items()]
    printed = run_job(tmp_path, count, job, timeout=1800)
    for name, expected in alone.items():
        assert json.loads((tmp_path / name / "result.json").read_text()) == pytest.approx(expected, abs=1e-6), name
    assert (
        "video" not in alone or {"eval/test/top1_1x1", "eval/test/top5_2x1", "eval/test/top5"} <= alone["video"].keys()
    )
    # The first process reports, the others are silent.
    assert "217 images" in printed[0] and printed[0].count("results in") == len(commands)
    assert all("img/s" not in text and "results in" not in text for text in printed[1:])
