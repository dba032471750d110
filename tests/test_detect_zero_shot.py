"""configs/detect.py: proposals of a class-agnostic detector, and their classes by name."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coco_tools import NAMES, OPS, DrawnBoxes, answers_like, detect, told
from tiny_images import run_main, tiny_checkpoint

from configs.detect import get_config
from florence_jax.data.sources.agnostic import OBJECT, AgnosticBoxes
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.detection import open_boxes
from florence_jax.data.tokenizers import load_tokenizer
from florence_jax.errors import UserError
from florence_jax.evaluators.zero_shot_detection import CHANCES, ZeroShotDetection, class_inputs, name_problems
from florence_jax.inference import Florence
from florence_jax.inference.detector import check_names
from florence_jax.models.florence import embed_maps
from florence_jax.params.rules import frozen_paths, lr_multipliers, path_string
from florence_jax.params.sharding import make_mesh, params_like, place
from florence_jax.params.weights import make_description, save_pretrained
from florence_jax.predict import main as predict
from florence_jax.tasks import create_task
from florence_jax.tasks.detect import WHOLE_PICTURE, Detect
from florence_jax.tasks.detector import Detector
from florence_jax.tasks.encoder import Encoder
from florence_jax.tasks.finetune_detection import KeptZeroShot
from florence_jax.tasks.zero_shot_detector import ZeroShotDetector, ZeroShotOptions, check_options

MAP_NORMS = ("norm1", "norm2", "norm3")
ONE_SIZE = ["--config.detector.sizes=((128, 128),)", "--config.detector.scales=(1.0,)"]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Checkpoints of a tiny pretraining with four stages."""
    return tiny_checkpoint(tmp_path_factory.mktemp("towers"), depths=(2, 2, 2, 2))


@pytest.fixture(scope="module")
def proposals(towers, tmp_path_factory):
    """Workdir of a class-agnostic detector, not scored."""
    workdir = tmp_path_factory.mktemp("proposals") / "run"
    flags = ["--config=configs/detect.py:recipe=proposals,runlocal", "--config.data.train=scenes:train:16", *ONE_SIZE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detect, "evaluators", lambda self, mesh: [])
        assert run_main(*flags, f"--config.init={towers}", f"--workdir={workdir}") == 0
    return workdir


@pytest.fixture(scope="module")
def folder(towers, tmp_path_factory):
    """Of a class-agnostic detector on both towers, which nobody trained."""
    detector, rng = Detector(Encoder(towers), "tiny", (OBJECT,), {"width": 16, "blocks": 1}), np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path_string(path).endswith("scale"), 0.05, leaf.shape), leaf.dtype)

    fresh = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(detector.init, jax.random.key(0)))
    own = detector.describe() | {"sizes": [[128, 128]], "eval_ops": WHOLE_PICTURE.format(height=128, width=128)}
    parts = {"towers": detector.encoder.towers_part(), "detector": own}
    path = str(tmp_path_factory.mktemp("folder") / "weights")
    save_pretrained(path, detector.load(fresh), make_description("detect", parts, tokenizer="sentencepiece"))
    return path


def test_the_recipe_trains_one_class_on_frozen_towers(towers):
    """What is frozen stays bit for bit: test_detect.py, and a whole run of the recipe below."""
    config = get_config("recipe=proposals,runlocal")
    config.update_from_flattened_dict({"init": towers, "data.train": "scenes:train:16"})
    task = create_task(config)
    assert task.detector.classes == (OBJECT,)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    names = {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}
    trained = {name for name in names if name.startswith(("detector/", *(f"image/{norm}/" for norm in MAP_NORMS)))}
    assert frozen_paths(lr_multipliers(config.optim.lr_rules, shapes, task.policy)) == names - trained != names


@pytest.mark.slow
def test_a_run_of_the_recipe_leaves_the_towers_as_they_were(proposals, towers):
    detector = Detector(Encoder(str(proposals)))
    assert detector.classes == (OBJECT,)
    end = jax.device_get(detector.load_on(make_mesh(-1, 1)))
    first = Detector(Encoder(towers), "tiny", (OBJECT,), {"width": 16, "blocks": 1})
    fresh = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(first.init, jax.random.key(0)))
    start = jax.device_get(first.load(fresh))
    for name in ("image", "text", "image_projection", "text_projection", "logit_scale"):
        if name == "image":
            new = {norm: (end[name].pop(norm), start[name].pop(norm)) for norm in MAP_NORMS}
        jax.tree.map(np.testing.assert_array_equal, end[name], start[name])
    assert len(new) == 3 and any(np.any(leaf) for leaf in jax.tree.leaves(end["detector"]))


def test_of_all_classes_one():
    source = open_boxes("scenes:train:6")
    agnostic = AgnosticBoxes(source)
    for one, other in zip(agnostic.metadata(), source.metadata(), strict=True):
        assert not one["class_ids"].any() and one["class_ids"].shape == np.shape(other["class_ids"])
        np.testing.assert_array_equal(one["boxes"], other["boxes"])
    assert any(np.any(record["class_ids"]) for record in source.metadata())
    assert len(agnostic) == 6 and agnostic.class_names == (OBJECT,) and agnostic.summary["says"].endswith("'object'")
    assert agnostic[0]["image"].shape == source[0]["image"].shape and len(agnostic.sample(2)) == 2


def test_classes_are_named_and_scored_beside_chance(folder, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("smileys & emotion = face | smiley\n\nobjects\nfood & drink\nsomething else\n")
    flags = ["--config=configs/detect.py:protocol=zeroshot,runlocal", "--config.data.test=scenes:new_names:8"]
    flags += [
        f"--config.zero_shot.names={names}",
        "--config.zero_shot.templates=name",
        "--config.zero_shot.proposals=20",
    ]
    assert run_main(*flags, f"--config.init={folder}", f"--workdir={tmp_path / 'run'}") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    found = {name.removeprefix("eval/new_names/"): value for name, value in result.items()}
    assert found["images"] == 8 and 0 <= found["AP50"] <= 1 and found["chance_AP50_deviation"] >= 0
    assert 0 < found["proposals_AR100"] < 1 and 0 < found["true_boxes_AP50"] <= 0.5  # 3 of 7 are named
    boxes = json.loads((tmp_path / "run" / "detections_new_names.json").read_text())
    assert boxes and len({box["category_id"] for box in boxes}) <= 3
    said = capsys.readouterr()
    assert "4 classes with boxes that the detector does not know" in said.out
    assert "what bounds zero-shot detection" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_zero_shot_before_and_after_few_shots(proposals, tmp_path):
    """The trained detector, its class layer replaced by the first, is a zero-shot detector still."""
    flags = ["--config=configs/detect.py:protocol=fewshot,shots=1,runlocal", "--config.data.train=scenes:new_style:24"]
    flags += ["--config.data.test=scenes:held_out:8", "--config.keep_zero_shot=(0.0,)", *ONE_SIZE]
    flags += ["--config.detector.tower_lr=0", "--config.detections.threshold=0.0", "--config.forgetting.region=roi"]
    assert run_main(*flags, f"--config.init={proposals}", f"--workdir={tmp_path / 'run'}") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    found = {name: result[f"eval/held_out_zero_shot/{name}"] for name in ("before", "now", "drop")}
    assert found["before"] > 0 and found["drop"] == pytest.approx(found["before"] - found["now"])
    # Mixed with nothing of the trained weights it is the first one.
    assert result["eval/held_out_zero_shot_wise0/AP"] == pytest.approx(found["before"])
    assert "eval/held_out_wise0/AP" in result and "eval/held_out/start_AP" not in result
    flags = ["--config=configs/detect.py:protocol=zeroshot,runlocal", "--config.data.test=scenes:held_out:8", *ONE_SIZE]
    flags += ["--config.zero_shot.region=roi", f"--config.init={proposals}", f"--workdir={tmp_path / 'alone'}"]
    assert run_main(*flags) == 0
    alone = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert alone["eval/held_out/AP"] == pytest.approx(found["before"])


def test_the_folder_finds_what_is_named(folder, tmp_path, monkeypatch, capsys):
    """With a stand-in for the network, which finds a box of each of the first two classes."""

    def found(self, params, batch):
        count = len(batch["valid"])
        assert params["known"].shape == (2,) and params["classes"].shape[0] == 2
        box = jnp.array([[10.0, 10.0, 50.0, 40.0], [0.0, 0.0, 20.0, 20.0]])
        scores, labels = jnp.array([0.9, 0.5]), jnp.array([1, 0], jnp.int32)
        return {
            name: jnp.stack([each] * count)
            for name, each in zip(("boxes", "scores", "labels"), (box, scores, labels), strict=True)
        }

    monkeypatch.setattr(ZeroShotDetector, "detect", found)
    pictures = [open_source("scenes:new_names:3")[i]["image"] for i in range(3)]
    model = Florence(folder)
    answers = model.detect(pictures, names=["cat", ("lorry", "truck")])
    assert [one["names"] for one in answers] == [["lorry", "cat"]] * 3
    assert [one["names"] for one in model.detect(pictures, 0.6, names=["bus", "dog"])] == [["dog"]] * 3
    for wrong, message in (([], "at least one"), (["cat"] * 2, "'cat' is there twice"), ("cat", r"such as \['cat'\]")):
        with pytest.raises(UserError, match=message):
            model.detect(pictures, names=wrong)
    model.detect(pictures, names=["cat", "Cat"])
    assert "the same to the model, which finds both or none: 'cat' and 'Cat'" in capsys.readouterr().out
    out = tmp_path / "out"
    assert (
        predict([f"--init={folder}", "--input=scenes:new_names:3", f"--out={out}", "--names=cat, traffic light"]) == 0
    )
    coco = json.loads((out / "detections.json").read_text())
    assert [(one["id"], one["name"]) for one in coco["categories"]] == [(1, "cat"), (2, "traffic light")]
    assert [box["category_id"] for box in coco["annotations"]] == [2, 1] * 3


def test_a_training_on_classes_is_watched_by_what_it_costs(folder, caplog):
    """The trained detector, its class layer replaced by the first, is a zero-shot detector still."""
    config = get_config("protocol=fewshot,shots=1,runlocal")
    config.update_from_flattened_dict(
        {
            "init": folder,
            "data.train": "scenes:train:8",
            "data.test": "scenes:held_out:2",
            "keep_zero_shot": (0.5,),
            "forgetting.source": "scenes:new_names:2",
            "detector.sizes": ((128, 128),),
        }
    )
    task, mesh = create_task(config), make_mesh(-1, 1)
    names = [evaluator.name for evaluator in task.evaluators(mesh)]
    watched = [f"{name}_zero_shot{mixed}" for name in ("held_out", "forgetting") for mixed in ("", "_wise0.5")]
    assert names == ["held_out", "held_out_wise0.5", *watched]
    config.forgetting.zero_shot = False
    assert [evaluator.name for evaluator in task.watched(mesh)] == ["held_out_wise0.5"]
    assert "scenes:new_names:2 is not watched" in caplog.text
    kept = KeptZeroShot(task.config, task.test_sources)
    assert kept.zero_shot.options == ZeroShotOptions() and kept.sizes == [(128, 128)]
    like = params_like(task._shapes, mesh)
    trained = jax.tree.map(lambda leaf: place(np.full(leaf.shape, 0.5, np.float32), leaf.sharding), like)
    made = kept.maker(mesh)(trained)
    layer = made["model"]["detector"].pop("class_logits")
    assert all(leaf.shape[-1] == 1 and (np.asarray(leaf) != 0.5).all() for leaf in layer.values())
    assert all((np.asarray(leaf) == 0.5).all() for leaf in jax.tree.leaves(made["model"]["detector"]))
    np.testing.assert_array_equal(made["towers"]["text_projection"]["kernel"], 0.5)


def test_weights_that_cannot_name_classes():
    def encoder(classes, has_text=True):
        described = SimpleNamespace(
            folder="runs/x", parts={"detector": {"classes": classes}}, source={"init": "runs/p"}
        )
        return SimpleNamespace(description=described, has_text=has_text)

    with pytest.raises(UserError, match=r"own 2 classes \(cat, dog\).*recipe=proposals --config.init=runs/p"):
        ZeroShotDetector(encoder(["cat", "dog"]), ZeroShotOptions())
    described = SimpleNamespace(folder="runs/p", parts={}, source={})
    with pytest.raises(UserError, match="runs/p holds no detector.*recipe=proposals --config.init=runs/p"):
        ZeroShotDetector(SimpleNamespace(description=described), ZeroShotOptions())
    with pytest.raises(UserError, match="no text tower"):
        ZeroShotDetector(encoder([OBJECT], has_text=False), ZeroShotOptions())
    for wrong in ({"region": "boxes"}, {"g": 1.5}, {"proposals": 0}, {"margin": -0.1}, {"temperature": 0.0}):
        with pytest.raises(UserError, match=f"zero_shot.{next(iter(wrong))}"):
            check_options(ZeroShotOptions(**wrong))
    given = get_config("protocol=zeroshot").zero_shot.to_dict()
    assert ZeroShotOptions(**{name: given[name] for name in ZeroShotOptions._fields}) == ZeroShotOptions()


def test_the_towers_that_classify_are_the_detectors():
    """Where a classified picture has smaller maps than the windows of a detector, tables of positions are resized."""
    encoder = Encoder("", variant="ti", overrides={"image_width": 8, "text_width": 16})
    zero_shot = object.__new__(ZeroShotDetector)
    zero_shot.encoder, zero_shot.detector = encoder, Detector(encoder, "tiny", (OBJECT,), {"width": 16, "blocks": 1})
    mesh = make_mesh(-1, 1)
    like = params_like(jax.eval_shape(zero_shot.detector.init, jax.random.key(0)), mesh)
    model = jax.tree.map(lambda leaf: place(np.full(leaf.shape, 0.5, np.float32), leaf.sharding), like)
    params = zero_shot.with_towers(model, mesh)
    wanted = jax.eval_shape(encoder.init, jax.random.key(0))
    assert params["model"] is model and jax.tree.map(jnp.shape, params["towers"]) == jax.tree.map(jnp.shape, wanted)
    pairs = [(own, model["image"].get(name)) for name, own in params["towers"]["image"].items()]
    same = [own is first for pair in pairs for own, first in zip(*map(jax.tree.leaves, pair), strict=True)]
    assert 0 < same.count(False) < 8 and "detector" not in params["towers"]
    for leaf in jax.tree.leaves(params["towers"]):
        np.testing.assert_allclose(leaf, 0.5, rtol=1e-5)


def test_regions_of_the_map_that_the_detector_has_seen():
    """Of a map that is one thing on the left and another on the right; seen at half the size of the picture."""
    zero_shot = object.__new__(ZeroShotDetector)
    zero_shot.options = ZeroShotOptions(region="roi", margin=0.0)
    zero_shot.detector = SimpleNamespace(options=SimpleNamespace(scales=(0.5,)))
    encoder = Encoder("", variant="ti", overrides={"image_width": 8, "text_width": 16, "text_layers": 1})
    zero_shot.encoder, channels = encoder, encoder.model.config.image_width * 8
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    left, right = rng.normal(size=(2, channels)).astype(np.float32)
    maps = np.where((np.arange(6) < 3)[None, None, :, None], left, right) * np.ones((1, 4, 1, 1), np.float32)
    outputs = {"image/stage3": maps, "image/valid3": np.array([[4, 6]], np.int32)}
    boxes = np.array([[[0, 0, 130, 200], [10, 60, 120, 90], [260, 30, 380, 250], [60, 10, 320, 250]]], np.float32)
    found = np.asarray(jax.jit(lambda params: zero_shot._embed(params, {}, boxes, outputs))(params))[0]
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)  # 64 pixels of the picture are a cell
    own = jax.jit(lambda x: embed_maps(encoder.model.config, params, x))
    np.testing.assert_allclose(found[[0, 2]], own(np.stack([left, right])[:, None, None]), atol=1e-5)
    assert found[0] @ found[2] < 0.9 and found[0] @ found[3] > found[0] @ found[2]


class Texts:
    """Stands for the text tower: each text has an axis of its own."""

    def texts(self, params, texts, what):
        return np.eye(8, dtype=np.float32)[: len(texts)]


def test_names_of_classes():
    tokenizer = load_tokenizer("sentencepiece", 16)
    assert not name_problems([("cat", "kitten"), ("dog",)], tokenizer)
    assert "'cat' and 'Cat'" in name_problems([("cat",), ("dog",), ("Cat",)], tokenizer)[0]
    inputs = class_inputs(Texts(), None, [("cat",), ("dog", "puppy"), ("bird",)], ("{}",))
    assert inputs["classes"].shape == (4, 8) and inputs["known"].tolist() == [True, True, True, False]
    assert check_names(["cat", ("dog", "puppy")]) == (("cat",), ("dog", "puppy"))


def test_what_bounds_the_numbers():
    """Proposals that are the true boxes, of which the classifier knows all; by chance all have the first class."""
    source = DrawnBoxes()
    right, wrong = answers_like(source), answers_like(source)
    chance = [(boxes, scores, np.zeros_like(labels)) for boxes, scores, labels in right]
    answers = {"": told(source, wrong), "true_": told(source, right), "proposal_": told(source, chance)}
    answers |= dict.fromkeys(CHANCES, told(source, chance))

    def judge(params, batch):
        found = {
            f"{word}{name}": value
            for word, part in params["told"].items()
            for name, value in detect(part, batch).items()
        }
        marks = {"true_class_ids": batch["class_ids"], "true_objects": batch["objects"]}
        return found | marks | {"true_best": batch["class_ids"] * 0}

    names = [(name,) for name in NAMES]
    tokenizer = load_tokenizer("sentencepiece", 16)
    evaluator = ZeroShotDetection(
        source, OPS, (), judge, make_mesh(-1, 1), 8, NAMES, names, ("{}",), Texts(), tokenizer
    )
    found = evaluator.run({"towers": None, "told": answers})
    assert found["AP50"] == pytest.approx(1) and found["true_boxes_AP50"] == pytest.approx(1)
    assert found["proposals_AR100"] == pytest.approx(1) and 0 < found["chance_AP50"] < 0.5
    labels = np.concatenate([record["class_ids"] for record in source.metadata()])
    whole = ~np.concatenate([record["iscrowd"] for record in source.metadata()]).astype(bool)
    assert found["true_boxes_top1"] == pytest.approx((labels[whole] == 0).mean())
    assert evaluator.chance["AP50"] == found["chance_AP50"]
