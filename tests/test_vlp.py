"""configs/vlp.py: trained, stopped and resumed, in micro-batches, on several devices, with frozen towers."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_images import run_main
from two_processes import run_job

from configs.vlp import get_config
from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import UserError
from florence_jax.evaluators.metrics import positive_places
from florence_jax.evaluators.rerank import reranked_places
from florence_jax.inference import Florence
from florence_jax.models.fusion import begin_in_joint_space
from florence_jax.params.sharding import batch_sharding, make_mesh
from florence_jax.params.weights import describe
from florence_jax.tasks import create_task
from florence_jax.tasks.encoder import Encoder
from florence_jax.tasks.fusion import FusedTowers
from florence_jax.train.loop import open_stream
from florence_jax.train.metrics import read_metrics

STEPS, SAVED = 4, 2
CHANGES = {
    "data.train": "scene_captions:train:24:32:noise",
    "data.test": "scene_captions:held_out:8:32:noise",
    "total_steps": STEPS,
    "checkpoint.every": SAVED,
}
FLAGS = ["--config=configs/vlp.py:runlocal", *(f"--config.{name}={value}" for name, value in CHANGES.items())]


@pytest.fixture(scope="module")
def trained(weights, tmp_path_factory):
    """Workdir of a run whose image tower is frozen."""
    workdir = tmp_path_factory.mktemp("vlp") / "run"
    flags = [*FLAGS, "--config.fusion.freeze=image", f"--config.init={weights}"]
    assert run_main(*flags, f"--workdir={workdir}") == 0
    return workdir


def tiny_task(weights, **changes):
    config = get_config("runlocal")
    config.update_from_flattened_dict(CHANGES | {"init": weights} | changes)
    return create_task(config)


def params_of(folder):
    return jax.device_get(FusedTowers(Encoder(str(folder))).load_on(make_mesh(-1, 1)))


def first_batch(task):
    with open_stream(task.config, task, task.train_data()) as stream:
        return next(stream)


def test_it_trains_and_is_measured(trained):
    lines = [line for line in read_metrics(trained / "metrics.jsonl") if "train/loss" in line]
    assert len(lines) == STEPS
    weight = get_config("runlocal").mlm.weight
    for line in lines:
        assert line["train/loss"] == pytest.approx(line["train/itm_loss"] + weight * line["train/mlm_loss"], rel=1e-5)
    result = json.loads((trained / "result.json").read_text())
    assert 0 <= result["eval/held_out/itm_accuracy"] <= 1 and result["eval/held_out/images"] == 8
    assert result["eval/held_out/words"] > 0 and "eval/held_out/mlm_accuracy_other_image" in result
    assert "the worst matches" in (trained / "report.html").read_text()


def test_what_is_frozen_is_bit_equal_and_the_rest_is_trained(trained, weights):
    start = jax.device_get(Encoder(weights).load_on(make_mesh(-1, 1)))
    end = params_of(trained)
    for name in ("image", "image_projection", "text_projection", "logit_scale"):
        assert jax.tree.all(jax.tree.map(np.array_equal, start[name], end[name]))
    changed = jax.tree.map(lambda a, b: a.shape != b.shape or not np.array_equal(a, b), start["text"], end["text"])
    assert jax.tree.all(changed)
    part = describe(str(trained)).parts["fusion"]
    assert part["heads"] == ["itm", "mlm"] and part["entries"] == ["fusion"]


def test_a_stopped_run_ends_as_an_undisturbed_one(trained, weights, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    (again / "result.json").unlink()
    flags = [*FLAGS, "--config.fusion.freeze=image", f"--config.init={weights}"]
    assert run_main(*flags, f"--workdir={again}") == 0
    assert jax.tree.all(jax.tree.map(np.array_equal, params_of(trained), params_of(again)))


@pytest.mark.slow
def test_two_processes_do_the_same(trained, weights, tmp_path):
    flags = [*FLAGS, "--config.fusion.freeze=image", f"--config.init={weights}", f"--workdir={tmp_path / 'run'}"]
    run_job(tmp_path, 2, [flags], devices=4)
    for name in ("itm_loss", "mlm_loss", "itm_accuracy"):
        alone, both = (
            [line[f"train/{name}"] for line in read_metrics(run / "metrics.jsonl") if f"train/{name}" in line]
            for run in (trained, tmp_path / "run")
        )
        np.testing.assert_allclose(both, alone, rtol=1e-5)
    results = [json.loads((run / "result.json").read_text()) for run in (trained, tmp_path / "run")]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_it_puts_what_was_found_in_order_and_answers(trained, tmp_path):
    source = "scene_captions:held_out:8:32:noise"
    flags = ["--config=configs/vqa.py:protocol=rerank,runlocal", f"--config.init={trained}", "--config.rerank.k=4"]
    assert run_main(*flags, f"--config.eval.source={source}", f"--workdir={tmp_path}") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["eval/rerank/captions"] == 24 and result["eval/rerank/images"] == 8
    gain = 8 * (result["eval/rerank/i2t_r@1"] - result["eval/rerank/towers_i2t_r@1"])
    gain += 24 * (result["eval/rerank/t2i_r@1"] - result["eval/rerank/towers_t2i_r@1"])
    assert result["eval/rerank/gain"] == pytest.approx(gain / 32, abs=1e-6)
    model, picture = Florence(trained, batch_size=8), [open_source(source)[0]["image"]]
    match = model.match(picture, ["a red key", "a blue pizza above a red carrot"])
    assert match.shape == (2,) and ((match > 0) & (match < 1)).all()
    (words,) = model.fill(picture, ["a <mask> key"], top=3)
    assert len(words) == 3 and words[0][1] >= words[1][1]
    for call, message in (
        (lambda: model.answer(picture, ["what?"]), "not for vqa"),
        (lambda: model.fill(picture, ["a <mask> <mask>"]), "2 masks"),
        (lambda: model.match(2 * picture, 3 * ["a"]), "2 images and 3 texts"),
        (lambda: model.match(picture, [""]), "no tokens"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_a_fresh_fusion_begins_in_the_joint_space(weights):
    fused = tiny_task(weights).fusion
    assert fused.begins_joint and not tiny_task(weights, **{"fusion.begin": "random"}).fusion.begins_joint
    fresh = jax.jit(fused.init)(jax.random.key(0))
    begun = jax.jit(begin_in_joint_space)(fresh)
    for name in ("image", "text"):
        kernel, projection = begun["fusion"][f"{name}_input"]["kernel"], fresh[f"{name}_projection"]["kernel"]
        ratio = kernel[:, : projection.shape[1]] / projection
        np.testing.assert_allclose(ratio, jnp.full_like(ratio, ratio[0, 0]), rtol=1e-4)
        cross = begun["fusion"]["co_attention"]["layer0"][name]["cross_attention"]
        np.testing.assert_array_equal(cross["kv"]["kernel"][:, :16], cross["q"]["kernel"])
    assert jax.tree.map(jnp.shape, begun) == jax.tree.map(jnp.shape, fresh)


def test_places_after_another_order():
    before = positive_places(np.array([[0.9, 0.8, 0.7, 0.1]] * 3), np.eye(4, dtype=bool)[[1, 0, 3]])
    assert before.tolist() == [1, 0, 3]
    scores, right = np.array([[1.0, 2.0], [1.0, 1.0], [5.0, 6.0]]), np.eye(4, dtype=bool)[[1, 0, 3], :2]
    assert reranked_places(before, scores, right).tolist() == [0, 1, 3]  # ties count against the query


@pytest.mark.parametrize("negatives", ["dataset", pytest.param("hard", marks=pytest.mark.slow)])
def test_same_loss_in_micro_batches_and_on_several_devices(weights, negatives):
    losses = []
    for micro, devices in ((0, 1), (2, 2)):
        changes = {"itm.negatives": negatives, "micro_batch.images": micro, "micro_batch.texts": micro}
        task = tiny_task(weights, **changes)
        batch = first_batch(task)
        announced = {name: (spec.shape, spec.dtype) for name, spec in task.batches[0].items()}
        assert {name: (value.shape, value.dtype) for name, value in batch.items()} == announced
        mesh = make_mesh(devices, 1, jax.devices()[:devices])
        params = jax.jit(task.init)(jax.random.key(0))
        batch = jax.device_put(
            {name: value for name, value in batch.items() if name != "corrupt"}, batch_sharding(mesh)
        )
        with jax.set_mesh(mesh):
            grad = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
            (_, metrics), gradient = grad(params, batch, jax.random.key(1))
        norms = jax.tree.map(jnp.linalg.norm, gradient["fusion"])
        losses.append(jax.device_get((metrics, norms)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *losses)


def test_half_of_the_batch_matches_and_wrong_options_are_said(weights, tmp_path):
    task = tiny_task(weights, **{"itm.negatives": "dataset"})
    batch = first_batch(task)
    assert batch["match"].sum() == 4 and not batch["redrawn"][batch["match"] == 1].any()
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    for changes, message in (
        ({"text.tokenizer": str(tmp_path / "merges.txt")}, "has another vocabulary than sentencepiece"),
        ({"itm.negatives": "none"}, "choose one of"),
        ({"itm.weight": 0.0, "mlm.weight": 0.0}, "nothing is learned"),
        ({"batch_size": 1}, "at least two"),
        ({"fusion.freeze": "all"}, "image, text, both"),
    ):
        with pytest.raises(UserError, match=message):
            _ = tiny_task(weights, **changes).policy
