"""Every evaluator gives the same numbers in one process and in a job of several, for another batch size."""

import json

import pytest
from tiny_images import run_main, tiny_checkpoint, twenty_images
from two_processes import run_job

NAMES = "emoji:new_names"
EPISODES = ("ways=3", "shots=(2,)", "queries=2", "episodes=8")
# The probe's numbers are those of a minimum that is found to some digits only: its pictures are easy to tell apart.
PROTOCOLS = {
    "zeroshot": ["--config=configs/classify.py:mode=zeroshot", f"--config.data={NAMES}"],
    "probe": ["--config=configs/classify.py:mode=probe", "--config.data={pictures}"],
    "fewshot": [
        "--config=configs/classify.py:mode=fewshot",
        f"--config.data={NAMES}",
        *(f"--config.fewshot.{option}" for option in EPISODES),
    ],
    "retrieve": ["--config=configs/retrieve.py:mode=zeroshot", "--config.eval.source={pictures}"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The commands, and the results of one process with eight devices."""
    folder = tmp_path_factory.mktemp("data")
    weights, pictures = tiny_checkpoint(folder / "weights"), twenty_images(folder / "pictures")
    commands, alone = {}, {}
    for name, arguments in PROTOCOLS.items():
        given = [argument.format(pictures=pictures) for argument in arguments]
        commands[name] = [*given, f"--config.init={weights}"]
        workdir = folder / f"alone_{name}"
        assert run_main(*commands[name], "--config.eval.batch_size=24", f"--workdir={workdir}") == 0
        alone[name] = json.loads((workdir / "result.json").read_text())
    return commands, alone


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_numbers_of_one(data, count, tmp_path):
    commands, alone = data
    batch = f"--config.eval.batch_size={32 * count}"
    job = [[*arguments, batch, f"--workdir={tmp_path / name}"] for name, arguments in commands.items()]
    printed = run_job(tmp_path, count, job)
    for name, expected in alone.items():
        assert json.loads((tmp_path / name / "result.json").read_text()) == pytest.approx(expected, abs=1e-6), name
    # The first process reports, the others are silent.
    assert "217 images" in printed[0] and printed[0].count("results in") == len(commands)
    assert all("img/s" not in text and "results in" not in text for text in printed[1:])
