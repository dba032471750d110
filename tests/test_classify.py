"""Classification: evaluators on known embeddings, layer decay, starting weights, each protocol by one command."""

import json
import math
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_images import NAMES, run_main, twenty_images
from tiny_run import at_step

from configs.classify import get_config
from florence_jax.data.classes import ClassIndex, open_classes
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.tokenizers import load_tokenizer
from florence_jax.errors import UserError
from florence_jax.evaluators.classification import Classification, Score
from florence_jax.evaluators.finetuning import Forgetting, Interpolated
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.zero_shot import ZeroShot
from florence_jax.models import florence
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.layer_decay import layer_decay_rules
from florence_jax.params.rules import match_rules
from florence_jax.params.sharding import make_mesh, replicated
from florence_jax.params.weights import describe, make_description, save_pretrained
from florence_jax.tasks import TASKS
from florence_jax.tasks.encoder import Encoder
from florence_jax.tasks.finetune import FineTune, FineTuneLinear
from florence_jax.train.optim import scale_by_tree

OPS = "decode|resize(8)|center_crop(8)"


# -- the evaluators on known embeddings -------------------------------------------------------------------------------


TOKENIZER = load_tokenizer("sentencepiece", 16)


def predict_image(params, batch):
    colour = batch["image"].astype(jnp.float32).mean((1, 2)) - 90.0
    colour = colour * params["scale"]
    return colour / jnp.linalg.norm(colour, axis=1, keepdims=True)


def predict_text(params, batch):
    ids = batch["text"].astype(jnp.float32) @ params["text"]
    return ids / jnp.linalg.norm(ids, axis=1, keepdims=True)


PARAMS = {
    "scale": jnp.ones(()),
    "logit_scale": jnp.asarray(2.0),
    "text": jnp.asarray(np.random.default_rng(1).normal(size=(16, 3)), jnp.float32),
}


def embedder(batch_size, devices=8):
    mesh = make_mesh(-1, 1, jax.devices()[:devices])
    return Embedder({"image": predict_image, "text": predict_text}, TOKENIZER, mesh, batch_size)


@pytest.fixture(scope="module")
def names_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("names") / "names.txt"
    file.write_text(NAMES)
    return str(file)


def test_numbers_do_not_depend_on_batch_size_or_devices(pictures, names_file):
    source = open_source(pictures)
    classes = open_classes(source, names_file)
    results = [
        ZeroShot("zs", source, classes, OPS, embedder(size, devices), ("{}", "a {}.")).run(PARAMS)
        for size, devices in ((8, 8), (24, 8), (7, 1))
    ]
    assert results[0] == results[1] == results[2] and results[0]["images"] == 20
    assert set(results[0]) == {"top1", "mean_per_class", "images"}  # five classes: everything is among the first five


def colours(right=True):
    """A scorer that knows the colours (by sorted label: blue, green, grey, red), or scores all alike."""
    anchors = np.array([[-1, -1, 2], [-1, 2, -1], [1, 1, 1], [2, -1, -1]], np.float32)
    anchors /= np.linalg.norm(anchors, axis=1, keepdims=True)

    def scorer(params, features):
        del params
        scores = features @ anchors.T
        return lambda a, b: (scores if right else np.zeros_like(scores))[a:b]

    return scorer


def test_a_classifier_that_knows_is_right_and_one_that_does_not_is_near_chance(pictures, caplog):
    source = open_source(pictures)
    classes = open_classes(source)
    knows = Classification("knows", source, classes, OPS, embedder(24), colours())
    assert knows.run(PARAMS) == {"top1": 1.0, "mean_per_class": 1.0, "images": 20.0}
    assert knows.chance["top1"] == 0.25 and "near chance" not in "".join(knows.report())
    assert "knows: confusion" in "".join(knows.report()) and "data:image" in knows.report()[-1]
    assert re.search(r'<div>red things</div><div class="soft">0\.\d\d</div>', knows.report()[-1])
    blind = Classification("blind", source, classes, OPS, embedder(24), colours(right=False))
    assert blind.run(PARAMS)["top1"] == 0.0
    assert "blind: top1 0.000 is near chance (0.250)" in caplog.text and "near chance" in blind.report()[0]
    ranked = Classification("map", source, classes, OPS, embedder(24), colours(), "voc_map").run(PARAMS)
    assert ranked["voc_map"] == 1.0 and list(ranked)[0] == "voc_map"


def test_several_classes_an_image_are_scored_by_the_ranking(tmp_path):
    twenty_images(tmp_path / "p")
    rows = [
        {"file_name": f"{name}/{i}.png", "text": "-", "labels": labels}
        for name, labels in (("red_things", ["warm"]), ("blue_things", ["cold", "dark"]))
        for i in range(5)
    ]
    (tmp_path / "p" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path / "p"))
    classes = open_classes(source)
    assert classes.first_names == ["cold", "dark", "warm"]

    def scorer(params, features):
        return lambda a, b: np.stack([features[a:b, 2], features[a:b, 2], features[a:b, 0]], 1)

    evaluator = Classification("multi", source, classes, OPS, embedder(8), scorer, "voc_map")
    assert evaluator.run(PARAMS) == {"voc_map": 1.0, "images": 10.0}
    assert evaluator.chance == {"voc_map": 0.5} and "AP" in evaluator.report()[0]
    lines = evaluator.files()["predictions.csv"].decode().splitlines()
    assert lines[1].startswith("red_things/0.png,warm,warm,0.")
    assert lines[-1].startswith("blue_things/4.png,cold|dark,cold,0.")
    with pytest.raises(UserError, match="its metric is voc_map, not top1"):
        Classification("multi", source, classes, OPS, embedder(8), scorer)


def test_metric_must_fit(pictures):
    source, classes = open_source(pictures), ClassIndex([("a",), ("b",), ("c",)], {})
    with pytest.raises(UserError, match="roc_auc is for two classes"):
        Classification("x", source, classes, OPS, embedder(8), colours(), "roc_auc")
    with pytest.raises(UserError, match="metric 'f1' is unknown"):
        Classification("x", source, classes, OPS, embedder(8), colours(), "f1")


def test_broken_weights_are_named(pictures):
    source = open_source(pictures)
    broken = Classification("b", source, open_classes(source), OPS, embedder(24), colours())
    with pytest.raises(UserError, match="pictures: 20 of 20 images have embeddings that are not finite"):
        broken.run(PARAMS | {"scale": jnp.asarray(jnp.nan)})


def test_near_chance():
    assert Score(0.3, 0.25, 0.1).near_chance() and not Score(0.5, 0.25, 0.1).near_chance()
    assert Score(math.nan, 0.25, 0.1).near_chance()


class Weight:
    """An evaluator that returns a parameter."""

    metric, name = "top1", "inner"

    def __init__(self):
        self.chance = {"top1": 0.1}

    def run(self, params):
        return {"top1": float(params["w"])}

    def report(self):
        return []


def test_interpolated_weights_and_forgetting(caplog):
    start, end = {"w": jnp.asarray(0.8)}, {"w": jnp.asarray(0.4)}
    wise = Interpolated(Weight(), lambda params: start, 0.25)
    assert wise.name == "inner" and wise.run(end) == {"top1": pytest.approx(0.7)}
    watch = Forgetting(Weight(), lambda params: start, 0.3)
    assert watch.run(end) == {"before": pytest.approx(0.8), "now": pytest.approx(0.4), "drop": pytest.approx(0.4)}
    assert "fell from 0.800 to 0.400, more than 0.3" in caplog.text and "fine-tuning forgets" in watch.report()[0]
    watch.run({"w": jnp.asarray(0.7)})
    assert watch.report() == ["<p>inner: zero-shot top1 0.800 before this training, 0.700 after it.</p>"]
    assert watch.chance == {"before": 0.1, "now": 0.1}


# -- layer decay ------------------------------------------------------------------------------------------------------


def test_layer_decay_falls_towards_the_input():
    model = florence.build("ti", depths=(2, 4, 2, 2), text_layers=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shapes["head"] = {"weight": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    factors = match_rules(layer_decay_rules(shapes, 0.5), shapes, what="learning rate")
    image = factors["image"]
    # Ten blocks: the stem is eleven layers below the head, the first block ten, the last one.
    assert image["stage0_embed"]["kernel"] == 0.5**11
    assert image["stage0_pair0"]["plain"]["mlp"]["fc1"]["kernel"] == 0.5**10
    assert image["stage0_pair0"]["shifted"]["mlp"]["fc1"]["kernel"] == 0.5**9
    assert image["stage1_embed"]["bias"] == 0.5**8
    assert image["stage1_pairs"]["plain"]["attention"]["qkv"]["kernel"] == (0.5**8, 0.5**6)
    assert image["stage1_pairs"]["shifted"]["norm1"]["scale"] == (0.5**7, 0.5**5)
    assert image["stage3_pair0"]["shifted"]["norm1"]["scale"] == 0.5
    assert factors["text"]["layers"]["proj"]["kernel"] == (0.5**3, 0.5**2, 0.5)
    assert factors["text"]["token_embedding"] == 0.5**4
    assert image["norm"]["scale"] == factors["logit_scale"] == factors["head"]["weight"] == 1.0
    vit = jax.eval_shape(florence.build("ViT-B-32").init, jax.random.key(0))
    factors = match_rules(layer_decay_rules(vit, 0.5), vit, what="learning rate")["image"]
    assert factors["class_embedding"] == 0.5**13 and factors["norm_pre"]["bias"] == 0.5**13
    assert jax.tree.leaves(factors["layers"], is_leaf=lambda x: isinstance(x, tuple))[0][-1] == 0.5
    with pytest.raises(UserError, match="layer_decay=0"):
        layer_decay_rules(shapes, 0)


def test_stacked_layers_get_their_own_factor():
    update = scale_by_tree({"a": (1.0, 0.5), "b": 0.0})
    scaled, _ = update.update({"a": jnp.ones((2, 3)), "b": jnp.ones(2)}, update.init({}))
    np.testing.assert_array_equal(scaled["a"], [[1, 1, 1], [0.5, 0.5, 0.5]])
    np.testing.assert_array_equal(scaled["b"], 0)


# -- by one command ---------------------------------------------------------------------------------------------------


def classify(protocol, workdir, weights, pictures, *options):
    data = "test" if protocol in ("zeroshot", "fewshot") else "train"
    fixed = ["--config.eval.batch_size=24", f"--config.init={weights}", f"--config.data.{data}={pictures}"]
    return run_main(
        f"--config=configs/classify.py:protocol={protocol},runlocal", *fixed, f"--workdir={workdir}", *options
    )


def result(workdir):
    return json.loads((workdir / "result.json").read_text())


@pytest.fixture(scope="module")
def zero_shot(weights, pictures, names_file, tmp_path_factory):
    """The workdir of a zero-shot evaluation of all twenty images."""
    workdir = tmp_path_factory.mktemp("zero_shot") / "run"
    options = [f"--config.classes={names_file}", f"--config.eval.source={pictures}"]
    assert classify("zeroshot", workdir, weights, pictures, *options) == 0
    return workdir


def test_zero_shot_on_twenty_images(zero_shot):
    found = result(zero_shot)
    assert found["eval/zero_shot/images"] == 20 and 0 <= found["eval/zero_shot/top1"] <= 1
    assert found["eval/held_out/images"] == 20 and "step" in found
    lines = (zero_shot / "predictions.csv").read_text().splitlines()
    assert lines[0] == "file,label,prediction,score" and len(lines) == 21
    assert lines[1].startswith("blue_things/0.png,blue,") and lines[-1].startswith("red_things/4.png,red,")
    page = (zero_shot / "report.html").read_text()
    assert "zero_shot: confusion" in page and "lime" not in page and page.count("data:image") > 3
    assert "model: ti" in page
    config = json.loads((zero_shot / "config.json").read_text())
    assert config["model"]["variant"] == "" and config["data"]["train"] == ""  # as it was given
    assert not (zero_shot / "checkpoints").exists()


def test_fine_tuning_with_the_unicl_loss(weights, pictures, tmp_path, capsys):
    options = ["--config.epochs=3", "--config.total_steps=0", "--config.optim.learning_rate=0.01"]
    options += ["--config.optim.layer_decay=0.8", "--config.optim.ema_decay=0.5", "--config.wise_ft=(0.5,)"]
    options += ["--config.forgetting.source=emoji:new_names", "--config.templates=stl10"]
    assert classify("finetune_unicl", tmp_path / "run", weights, pictures, *options) == 0
    found = result(tmp_path / "run")
    # A fifth of each class is held out, and of the rest again; a batch is no larger than what is left, twelve images,
    # of which eight devices take eight: one step an epoch.
    assert found["step"] == 3 and found["eval/test/images"] == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    probes = [line for line in lines if "eval/forgetting/now" in line]
    assert [line["step"] for line in probes] == [0, 1, 2, 3]  # each epoch, and the start
    held = {line["step"]: line["eval/validation/top1"] for line in probes}
    assert found["eval/validation/top1"] == held[found["kept_step"]] >= held[0]  # result.json is of what is kept
    assert found["eval/test/probe_top1"] >= 0.75
    assert "a linear probe of the first weights" in (tmp_path / "run" / "report.html").read_text()
    assert all(line["perf/data_wait_share"] <= 1 for line in lines if "train/loss" in line)  # evaluation is not a step
    assert found["eval/forgetting/drop"] == pytest.approx(
        found["eval/forgetting/before"] - found["eval/forgetting/now"]
    )
    assert "eval/test_wise0.5/top1" in found
    assert describe(str(tmp_path / "run")).templates == ("a photo of a {}.", "a photo of the {}.")
    assert {file.name for file in (tmp_path / "run").glob("*.csv")} == {"predictions.csv", "wise0.5_predictions.csv"}
    assert classify("finetune_unicl", tmp_path / "run", weights, pictures, *options) == 0
    assert "is finished: step 3 of 3" in capsys.readouterr().out


def test_a_killed_run_that_keeps_its_best_parameters_ends_as_an_undisturbed_one(weights, tmp_path, monkeypatch):
    class Killed(BaseException):
        """Nothing answers it, as nothing answers kill -9."""

    def kill():
        raise Killed

    pictures = twenty_images(tmp_path / "pictures")
    options = ["--config.total_steps=6", "--config.eval.every=2", "--config.checkpoint.every=3"]
    options += ["--config.keep=best", "--config.optim.learning_rate=1.0"]
    assert classify("finetune_linear", tmp_path / "whole", weights, pictures, *options) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 6, kill)
        classify("finetune_linear", tmp_path / "killed", weights, pictures, *options)
    assert not (tmp_path / "killed" / "result.json").exists()
    assert classify("finetune_linear", tmp_path / "killed", weights, pictures, *options) == 0
    whole, killed = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert killed == whole and whole["kept_step"] < 3  # before the checkpoint from which it went on
    params = [Encoder(str(tmp_path / name)).load_on(make_mesh(-1, 1), head=True) for name in ("whole", "killed")]
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_linear_head_learns_the_colours_and_spares_the_text_tower(weights, pictures, tmp_path):
    options = ["--config.epochs=8", "--config.total_steps=0", "--config.optim.learning_rate=0.02"]
    options += ["--config.eval.every=0"]
    assert classify("finetune_linear", tmp_path / "run", weights, pictures, *options) == 0
    assert result(tmp_path / "run")["eval/test/top1"] >= 0.75
    before, after = Encoder(weights), Encoder(str(tmp_path / "run"))
    mesh = make_mesh(-1, 1)
    old, new = before.load_on(mesh), after.load_on(mesh)
    assert "head" in after.description.entries and "head" not in new
    assert after.description.classes == ("blue things", "green things", "grey", "red things")
    checkpoints = Checkpoints(after.description.folder, read_only=True)
    moments = {name.split("/")[2] for name in checkpoints.shapes("opt_state") if "/mu/" in name or "/nu/" in name}
    checkpoints.close()
    assert moments == {"image", "head"}
    for name in ("text", "text_projection", "image_projection", "logit_scale"):
        jax.tree.map(np.testing.assert_array_equal, old[name], new[name])
    assert not np.array_equal(old["image"]["norm"]["scale"], new["image"]["norm"]["scale"])


def test_a_head_starts_with_the_answers_of_zero_shot_or_of_a_probe(zero_shot, weights, pictures, names_file):
    config = get_config("protocol=finetune_linear")
    config.init, config.classes = weights, names_file
    config.data.train = config.data.test = pictures
    config.head_init, config.eval.batch_size = "text", 24
    task, mesh = FineTuneLinear(config), make_mesh(-1, 1)
    fresh = jax.device_put(task.init(jax.random.key(0)), replicated(mesh))
    test, _ = task.evaluators(mesh)
    loaded = task.load(mesh)  # of mode=eval, where nothing was trained
    found = test.run(loaded)
    assert found["top1"] == result(zero_shot)["eval/zero_shot/top1"]
    jax.tree.map(np.testing.assert_array_equal, loaded, task.start(fresh))
    config.head_init = "probe"
    task = FineTuneLinear(config)
    (test, held), loaded = task.evaluators(mesh), task.load(mesh)
    # It has not seen what the parameters are chosen by; the probe that stands beside has.
    first = task.probe_fit(mesh, loaded)
    np.testing.assert_array_equal(loaded["head"]["weight"], first.chosen.weights[0])
    assert held.run(loaded)["top1"] == pytest.approx(first.tried[first.chosen.cs[0]])
    assert found["probe_top1"] == test.run(loaded)["probe_top1"] >= 0.75


def test_linear_probe_on_twenty_images(weights, pictures, tmp_path):
    assert classify("probe", tmp_path / "run", weights, pictures) == 0
    found = result(tmp_path / "run")
    assert found["eval/probe/images"] == 4 and found["eval/probe/top1"] >= 0.75
    assert len((tmp_path / "run" / "predictions.csv").read_text().splitlines()) == 5
    assert "linear probe" in (tmp_path / "run" / "report.html").read_text()


def test_few_shot_episodes_on_twenty_images(weights, pictures, tmp_path):
    options = ["ways=3", "shots=(2,)", "queries=2", "episodes=8"]
    assert classify("fewshot", tmp_path / "run", weights, pictures, *(f"--config.fewshot.{o}" for o in options)) == 0
    found = result(tmp_path / "run")
    assert len((tmp_path / "run" / "predictions.csv").read_text().splitlines()) == 1 + 8 * 3 * 2
    assert found["eval/fewshot/2shot_accuracy"] > 1 / 3 and found["eval/fewshot/2shot_ci95"] >= 0


@pytest.fixture(scope="module")
def image_only(weights, tmp_path_factory):
    """A folder with an image tower alone, as an imported Swin classifier is."""
    encoder = Encoder(weights)
    folder = tmp_path_factory.mktemp("image_only") / "weights"
    tower = {"image": encoder.load_on(make_mesh(-1, 1))["image"]}
    save_pretrained(
        str(folder), tower, make_description("import", {"towers": encoder.towers_part() | {"entries": list(tower)}})
    )
    return str(folder)


@pytest.mark.parametrize("protocol", ["probe", "finetune_linear"])
def test_weights_without_a_text_tower(image_only, pictures, tmp_path, protocol):
    options = ["epochs=1", "total_steps=0", "optim.layer_decay=0.8"]
    assert classify(protocol, tmp_path / "run", image_only, pictures, *(f"--config.{o}" for o in options)) == 0
    headline = {"probe": "probe/top1", "finetune_linear": "test/top1"}[protocol]
    assert 0 <= result(tmp_path / "run")[f"eval/{headline}"] <= 1


@pytest.mark.parametrize("protocol", ["zeroshot", "finetune_unicl"])
def test_protocols_that_need_a_text_tower_say_so(image_only, pictures, tmp_path, capsys, protocol):
    assert classify(protocol, tmp_path / "run", image_only, pictures) == 2
    assert "holds no text tower" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", TASKS["classify"].protocols)
def test_every_protocol_has_a_smoke_test_configuration(protocol):
    config = get_config(f"protocol={protocol},runlocal,res=64")
    assert config.protocol == protocol and config.total_steps <= 2 and config.model.overrides.res == 64
    assert config.mode == ("train" if issubclass(TASKS["classify"].protocols[protocol], FineTune) else "eval")


def test_weights_of_an_import_and_another_resolution(weights, tmp_path):
    encoder = Encoder(weights)
    mesh = make_mesh(-1, 1)
    params = encoder.load_on(mesh)
    # The moving average is taken, which the fixture made half as large again.
    np.testing.assert_array_equal(params["image"]["norm"]["scale"], 1.5)
    folder = str(tmp_path / "imported")
    save_pretrained(
        folder, params, make_description("import", {"towers": encoder.towers_part() | {"entries": list(params)}})
    )
    imported = Encoder(folder, {"res": 64})
    assert imported.model.config.image_width == 8
    assert imported.model.config.window == 2 * encoder.model.config.window
    resized = imported.load_on(mesh)
    tables = [
        x["image"]["stage0_pair0"]["plain"]["attention"]["relative_position_bias_table"] for x in (params, resized)
    ]
    assert tables[1].shape[0] > tables[0].shape[0] and np.isfinite(tables[1]).all()
    with pytest.raises(UserError, match="does not say which tokenizer"):
        _ = imported.tokenizer
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot tell which model"):
        describe(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "protocol,options,message",
    [
        ("zeroshot", ["--config.init=nowhere"], "no weights at nowhere: give the workdir of a run"),
        ("zeroshot", ["--config.data.test=nowhere"], "'nowhere' does not exist"),
        ("zeroshot", ["--config.classes=nowhere"], "class names 'nowhere'"),
        ("zeroshot", ["--config.classes=cifar10"], "4 of the 4 classes"),
        ("zeroshot", ["--config.templates=nowhere"], "no prompt templates for 'nowhere'"),
        ("zeroshot", ["--config.metric=f1"], "metric 'f1' is unknown"),
        ("zeroshot", ["--config.model.overrides.res=37"], "res=37"),
        ("zeroshot", ["--config.mode=train"], "nothing is trained here"),
        ("fewshot", ["--config.data.train=emoji:train"], "'fewshot' trains nothing: give the images as"),
        ("probe", ["--config.data.train="], "a probe needs images to learn from: give --config.data.train=DATA"),
        ("finetune_linear", ["--config.init="], "no weights: give them with --config.init=DIR; or the size"),
        ("finetune_linear", ["--config.model.variant=B"], "are of variant ti, not B"),
        ("paint", [], "unknown protocol 'paint'"),
        (
            "finetune_linear",
            ["--config.wise_ft=(0.5,)", "--config.head_init=zeros"],
            "with a linear head needs --config.head_init=probe or text",
        ),
        ("finetune_linear", ["--config.keep=first"], "config.keep='first' is unknown; choose 'best' or 'last'"),
        ("finetune_linear", ["--config.head_init=ones"], "config.head_init='ones' is unknown"),
        ("finetune_unicl", ["--config.wise_ft=(1.5,)"], "shares of the fine-tuned weights"),
        ("finetune_unicl", ["--config.optim.layer_decay=2.0"], "optim.layer_decay=2.0"),
        ("finetune_unicl", ["--config.data.train_ops=decode|spin"], "unknown op 'spin'"),
    ],
)
def test_mistakes_are_one_line(weights, pictures, tmp_path, capsys, protocol, options, message):
    assert classify(protocol, tmp_path / "run", weights, pictures, *options) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("protocol", ["probe", "finetune_linear"])
def test_one_class_is_told_before_any_work(protocol, weights, pictures, tmp_path, capsys):
    shutil.copytree(next(path for path in Path(pictures).iterdir() if path.is_dir()), tmp_path / "one" / "red")
    assert classify(protocol, tmp_path / "run", weights, tmp_path / "one") == 2
    assert "has one class only, 'red': a classifier needs at least two" in capsys.readouterr().err
