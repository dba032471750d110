"""The three stages: each starts from the last one's parameters, and from its optimizer only when told."""

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import TINY_MODEL, tiny_pairs

from configs.pretrain import STAGES, get_config
from florence_jax.errors import UserError
from florence_jax.models.resize import resize_bias_tables
from florence_jax.models.sizes import VARIANTS
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.rules import path_string
from florence_jax.params.weights import load, load_optimizer
from florence_jax.tasks import create_task
from florence_jax.train.loop import Trainer, run
from florence_jax.train.state import eval_params


def stage_config(stage, data, **changes):
    """The smoke-test size of a stage, smaller still, on the pairs of the folder `data`."""
    config = get_config(f"stage={stage},runlocal")
    config.model.overrides.update(TINY_MODEL)
    config.total_steps, config.batch_size, config.optim.warmup_steps, config.data.train = 2, 16, 0, data
    config.update_from_flattened_dict(changes)
    return config.lock()


def initial_state(config):
    return Trainer(config, create_task(config), Path("unused")).initial_state()


def leaves(tree):
    return {path_string(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def is_table(name):
    return name.endswith("relative_position_bias_table")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def first(data, tmp_path_factory):
    """The workdir of a finished first stage, and its last state."""
    workdir, config = tmp_path_factory.mktemp("run") / "stage1", stage_config(1, data)
    workdir.mkdir()
    assert run(config, create_task(config), workdir) == 0
    trainer = Trainer(config, create_task(config), workdir)
    checkpoints = Checkpoints(str(workdir / "checkpoints"), read_only=True)
    state = checkpoints.restore(trainer.target)
    checkpoints.close()
    return str(workdir), state


def test_a_stage_starts_with_the_last_parameters_and_a_new_optimizer(first, data):
    workdir, last = first
    state = initial_state(stage_config(2, data, init=workdir))
    jax.tree.map(np.testing.assert_array_equal, state["params"], last["params"])
    moments = [leaf for name, leaf in leaves(state["opt_state"]).items() if "/mu/" in name or "/nu/" in name]
    assert moments and not any(moment.any() for moment in moments)
    assert int(state["step"]) == 0


def test_the_third_stage_resizes_bias_tables_and_nothing_else(first, data):
    workdir, last = first
    config = stage_config(3, data, init=workdir)
    assert create_task(config).model.config.window == 6
    got, want = leaves(initial_state(config)["params"]), leaves(resize_bias_tables(last["params"], 6))
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)
    tables = [name for name in got if is_table(name)]
    assert tables and all(got[name].shape[-2] == 11**2 for name in tables)
    assert all(got[name].shape == leaf.shape for name, leaf in leaves(last["params"]).items() if not is_table(name))


def test_the_optimizer_goes_on_when_told(first, data):
    workdir, last = first
    state = initial_state(stage_config(3, data, init=workdir, init_optimizer=True))
    before, after = leaves(last["opt_state"]), leaves(state["opt_state"])
    counts = {name: int(leaf) for name, leaf in after.items() if name.endswith("count")}
    assert sorted(counts.values()) == [0, 2]  # the schedule starts anew, Adam's correction of its bias does not
    for name, leaf in before.items():
        if is_table(name):
            assert not after[name].any() and leaf.any()
        elif name not in counts:
            np.testing.assert_array_equal(after[name], leaf, err_msg=name)
            assert leaf.any() or "text" in name, name


def test_a_stage_trains_from_the_last_one_with_the_image_tower_frozen(first, data, tmp_path):
    """The moments of the rest go on; what is evaluated is the average of the text tower, and the image tower."""
    options = {"init_optimizer": True, "mesh.fsdp": 2, "optim.ema_decay": 0.5}
    rules = (("image/.*", 0.0), ("image_projection/.*", 0.0))
    config = stage_config(3, data, init=first[0], **options, **{"optim.lr_rules": rules, "grad_cache.micro_batch": 2})
    start = leaves(initial_state(config)["params"])
    assert run(config, create_task(config), tmp_path) == 0
    folder = str(tmp_path / "checkpoints")
    checkpoints = Checkpoints(folder, read_only=True)
    stored = {root: checkpoints.shapes(root) for root in ("params", "ema", "opt_state")}
    checkpoints.close()
    assert stored["params"].keys() == start.keys()
    assert stored["ema"].keys() == {name for name in start if not name.startswith("image")}
    assert not any("image" in name for name in stored["opt_state"])
    trainer = Trainer(config, create_task(config), tmp_path)
    trainer.restore_for_evaluation()
    evaluated, loaded = leaves(eval_params(trainer.state)), leaves(load(folder, trainer.target["params"]))
    for name, leaf in start.items():
        np.testing.assert_array_equal(evaluated[name], loaded[name])
        assert np.array_equal(evaluated[name], leaf) == name.startswith("image"), name


def test_the_optimizer_of_nothing_is_one_message(tmp_path):
    with pytest.raises(UserError, match="no weights at .*missing"):
        load_optimizer(str(tmp_path / "missing"), {})


def test_the_schedule_of_the_paper():
    sizes = {stage: get_config(f"variant=H,stage={stage}") for stage in STAGES}
    assert [config.total_steps for config in sizes.values()] == [1_000_000, 180_000, 80_000]
    assert [config.text.templates for config in sizes.values()] == [True, False, False]
    tasks = {stage: create_task(config.lock()) for stage, config in sizes.items()}
    models = {stage: task.model.config for stage, task in tasks.items()}
    assert [(model.res, model.window) for model in models.values()] == [(224, 7), (224, 7), (384, 12)]
    assert get_config("variant=T").data.eval_ops == "decode|resize({res})|center_crop({res})"
    other = get_config("variant=T")
    other.model.overrides.res = 256
    other.model.overrides.window = 8
    assert "rrc(256," in create_task(other.lock()).train_ops
    assert "rrc(384," in tasks[3].train_ops and "center_crop(384)" in tasks[3].eval_ops
    rates = [config.optim.learning_rate for config in sizes.values()]
    assert rates == pytest.approx([rates[0], 0.2 * rates[0], 0.1 * rates[0]])


def test_the_schedule_at_the_size_of_a_laptop():
    first, second, third = (get_config(f"stage={stage}") for stage in STAGES)
    assert (second.total_steps, third.total_steps) == (first.total_steps * 18 // 100, first.total_steps * 8 // 100)
    for config in (first, second, third):
        assert 0 < config.optim.warmup_steps < config.total_steps
    model = create_task(third.lock()).model.config
    assert (VARIANTS["ti"]["res"], model.res, model.window) == (32, 48, 6)
    assert get_config("stage=3,res=64").model.overrides.res == 64  # a resolution that is given is kept
