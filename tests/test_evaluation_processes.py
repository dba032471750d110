"""Every evaluator gives the same numbers in one process and in a job of several, for another batch size."""

import json
from pathlib import Path

import pytest
from tiny_images import run_main
from two_processes import run_job

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
}
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


@pytest.fixture(scope="module")
def places(pictures, tmp_path_factory):
    """The pictures, and a split file that gives each picture two captions."""
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
    return {"pictures": pictures, "split": split}


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
        commands[name] = [*(argument.format(**places) for argument in arguments), f"--config.init={weights}"]
        workdir = tmp_path / f"alone_{name}"
        assert run_main(*commands[name], "--config.eval.batch_size=24", f"--workdir={workdir}") == 0
        alone[name] = json.loads((workdir / "result.json").read_text())
    batch = f"--config.eval.batch_size={32 * count}"
    job = [[*arguments, batch, f"--workdir={tmp_path / name}"] for name, arguments in commands.items()]
    printed = run_job(tmp_path, count, job, timeout=1800)
    for name, expected in alone.items():
        assert json.loads((tmp_path / name / "result.json").read_text()) == pytest.approx(expected, abs=1e-6), name
    # The first process reports, the others are silent.
    assert "217 images" in printed[0] and printed[0].count("results in") == len(commands)
    assert all("img/s" not in text and "results in" not in text for text in printed[1:])
