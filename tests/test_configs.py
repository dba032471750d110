"""Every configuration file builds; every one runs two steps at its smoke-test size."""

import importlib
from pathlib import Path

import pytest
from tiny_run import tiny_pairs

from configs.pretrain import get_config
from florence_jax.config_files import parse_arg
from florence_jax.errors import UserError
from florence_jax.models.sizes import VARIANTS
from florence_jax.tasks import TASKS, create_task
from florence_jax.tasks.base import Task
from florence_jax.train.loop import run
from florence_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
TRAINING = ("pretrain",)
# These start from other runs or from raw data: test_classify.py, test_index.py, test_detect.py, test_video.py,
# test_vlp.py, test_vqa.py and test_curation_sample.py run each of their protocols, at this size.
ELSEWHERE = ("classify", "retrieve", "detect", "video", "vlp", "vqa", "curate")
SCHEMA = {
    "data": {"train", "test", "train_ops", "eval_ops", "workers", "cache", "on_corrupt"},
    "eval": {"every", "batch_size", "source"},
}


def test_every_config_file_is_known_here():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert files == {*TRAINING, *ELSEWHERE}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_smoke_test_size_builds(name):
    assert importlib.import_module(f"configs.{name}").get_config("runlocal").lock().is_locked


@pytest.mark.parametrize("name", sorted(TASKS))
def test_one_schema(name):
    get = importlib.import_module(f"configs.{name}").get_config
    for protocol in TASKS[name].protocols:
        config = get(f"protocol={protocol}" if protocol else None)
        assert config.task == name and config.get("protocol", "") == protocol
        for part, keys in SCHEMA.items():
            assert set(config[part]) - {"captions"} == keys
        # `issubclass` does not know protocols that have attributes.
        assert config.mode == ("train" if Task in TASKS[name].protocols[protocol].__mro__ else "eval")


@pytest.mark.parametrize("name", TRAINING)
def test_runlocal_runs(name, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config("runlocal")
    config.total_steps, config.optim.warmup_steps, config.log.every = 2, 0, 1
    config.model.overrides.depths = (2, 2)  # of four stages that are compiled alike
    config.data.train = tiny_pairs(tmp_path / "pairs")  # no evaluation: it has tests of its own
    before = config.lock().to_dict()
    assert run(config, create_task(config), tmp_path) == 0
    assert config.to_dict() == before  # a task reads it, and no more
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "-" not in name])
def test_variants_build(variant):
    task = create_task(get_config(f"variant={variant}").lock())
    assert task.model.config.res == VARIANTS[variant]["res"]
    small = create_task(get_config(f"variant={variant},runlocal").lock())
    assert small.model.config.depths == (2, 2, 2, 2) and small.model.config.res == 32


def test_argument_strings():
    assert parse_arg("a=3,c", a=1, b="x", c=False).to_dict() == {"a": 3, "b": "x", "c": True}
    assert parse_arg(None, a=1).a == 1
    for wrong, message in (("d=1", "unknown config argument 'd'"), ("a=x", "takes int"), ("c=maybe", "write c")):
        with pytest.raises(UserError, match=message):
            parse_arg(wrong, a=1, c=False)
