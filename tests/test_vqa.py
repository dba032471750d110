"""configs/vqa.py: trained on questions of one's own, evaluated, asked; several questions of a picture at once."""

import csv
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_images import run_main

from configs.vqa import get_config
from florence_jax.data.answers import AnswerVocabulary
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.pipeline import TrainData
from florence_jax.data.records import BadRecord
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.question_groups import QuestionGroups
from florence_jax.data.text_lengths import text_lengths
from florence_jax.data.tokenizers import load_tokenizer
from florence_jax.errors import UserError
from florence_jax.inference import Florence
from florence_jax.params.sharding import make_mesh
from florence_jax.params.weights import describe
from florence_jax.predict import main as predict
from florence_jax.tasks import create_suite, create_task
from florence_jax.tasks.encoder import Encoder
from florence_jax.tasks.fusion import FusedTowers
from florence_jax.train.loop import open_stream

COLOURS = {"red": (220, 40, 30), "green": (40, 190, 60), "blue": (30, 60, 220)}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A folder of twelve pictures, two questions about each."""
    folder = tmp_path_factory.mktemp("own")
    lines = []
    for number in range(12):
        name = list(COLOURS)[number % 3]
        picture = Image.new("RGB", (40, 36), COLOURS[name])
        picture.putpixel((0, 0), (number, 0, 0))  # equal pictures would be one
        picture.save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "question": "What colour is it?", "answer": name})
        lines.append({"image": f"{number}.png", "question": "Is it red?", "answer": "yes" if name == "red" else "no"})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def flags_of(questions, weights):
    sizes = {"res": 32, "window": 4}
    fusion = {"layers": 1, "width": 16, "head_width": 8}
    flags = ["--config=configs/vqa.py:runlocal", f"--config.data.train={questions}", f"--config.init={weights}"]
    flags += [f"--config.model.overrides.{name}={value}" for name, value in sizes.items()]
    return flags + [f"--config.fusion.overrides.{name}={value}" for name, value in fusion.items()]


def task_of(questions, weights, **changes):
    config = get_config("runlocal")
    sizes = {"model.overrides.res": 32, "model.overrides.window": 4}
    sizes |= {f"fusion.overrides.{name}": value for name, value in {"layers": 1, "width": 16, "head_width": 8}.items()}
    config.update_from_flattened_dict({"data.train": str(questions), "init": weights} | sizes | changes)
    return create_task(config)


@pytest.fixture(scope="module")
def trained(questions, weights, tmp_path_factory):
    """Workdir of a run."""
    workdir = tmp_path_factory.mktemp("vqa") / "run"
    assert run_main(*flags_of(questions, weights), f"--workdir={workdir}") == 0
    return workdir


def test_it_trains_and_tells_what_it_answers(trained):
    result = json.loads((trained / "result.json").read_text())
    assert 0 <= result["eval/test/accuracy"] <= 1 and result["eval/test/questions"] == 4  # of two of twelve pictures
    assert 0 <= result["eval/test/towers_accuracy"] <= 1 and 0 <= result["eval/test/majority_accuracy"] <= 1
    assert len(json.loads((trained / "answers_test.json").read_text())) == 4
    part = describe(str(trained)).parts["fusion"]
    assert set(part["answers"]) == {"red", "green", "blue", "yes", "no"} and part["heads"] == ["vqa"]
    assert part["eval_ops"] == "decode|resize_exact(32)"


def test_it_is_evaluated_and_asked(trained, questions, tmp_path, capsys):
    flags = ["--config=configs/vqa.py:protocol=eval,runlocal", f"--config.init={trained}"]
    assert run_main(*flags, f"--config.data.test={questions}", f"--workdir={tmp_path / 'eval'}") == 0
    answers = json.loads((tmp_path / "eval" / "answers_test.json").read_text())
    out = tmp_path / "out"
    table = str(questions / "questions.jsonl")
    assert predict([f"--init={trained}", f"--input={table}", f"--out={out}", "--batch-size=8"]) == 0
    assert json.loads((out / "answers.json").read_text()) == answers
    assert "questions answered" in capsys.readouterr().out
    flags = [f"--init={trained}", f"--input={questions}", f"--out={out}", "--question=Is it red?", "--top=2"]
    assert predict([*flags, "--batch-size=8"]) == 0
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert len(rows) == 24 and {row["question"] for row in rows} == {"Is it red?"}
    assert "it says what was looked at, not why" in (out / "report.html").read_text()
    found = Florence(trained, batch_size=8).answer(
        [str(questions / "0.png")], ["Is it red?", "What colour is it?"], top=2
    )
    assert found[0][0][0] == rows[0]["answer"] and found[0][0][1] == pytest.approx(
        float(rows[0]["probability"]), abs=1e-5
    )
    with pytest.raises(UserError, match="not for itm"):
        Florence(trained).match([str(questions / "0.png")], ["red"])


def test_a_small_network_learns_beside_the_model(questions, weights, monkeypatch):
    task = task_of(questions, weights, **{"small_network.seconds": 120.0, "towers_only.pictures": 0})
    answered, small = task.evaluators(make_mesh(-1, 1))
    ticks = itertools.count()
    monkeypatch.setattr("florence_jax.evaluators.vqa_small.time.monotonic", lambda: float(next(ticks)))  # of a step
    found = small.run(None)
    assert small.name == answered.name and found["small_network_accuracy"] == 1
    with pytest.raises(UserError, match=r"seconds=-1.*above 0"):
        task_of(questions, weights, **{"small_network.seconds": -1.0}).evaluators(make_mesh(-1, 1))


def test_questions_of_a_picture_share_it(questions, weights):
    """Same loss and gradients as with a row for each question."""
    found = []
    for places in (2, 1):
        task = task_of(questions, weights, questions_per_image=places, holdout=0.4, **{"fusion.overrides.dropout": 0.0})
        with open_stream(task.config, task, task.train_data()) as stream:
            batch = {name: value for name, value in next(stream).items() if name not in ("corrupt", "padded")}
        announced = {name: (spec.shape, spec.dtype) for name, spec in task.batches[0].items() if name != "corrupt"}
        assert {name: (value.shape, value.dtype) for name, value in batch.items()} == announced
        if places == 2:
            together = batch
        else:  # the rows of the other batch, each on its own
            batch = {name: together[name] for name in ("image", "left_out")}
            batch = {name: np.repeat(value, 2, axis=0) for name, value in batch.items()}
            flat = ("text", "text_length", "answer_labels", "answer_scores", "asked")
            batch |= {name: together[name].reshape(-1, 1, *together[name].shape[2:]) for name in flat}
        params = jax.jit(task.init)(jax.random.key(0))
        (loss, _), grad = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, batch, jax.random.key(1))
        found.append((loss, jax.tree.map(jnp.linalg.norm, grad)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)


def test_groups_and_what_cannot_be_answered(questions):
    source = open_source(str(questions))
    groups = QuestionGroups(source, 2)
    assert len(groups) == 12 and groups.rows(3) == [6, 7]
    assert [record["question"] for record in groups[3]["questions"]] == ["What colour is it?", "Is it red?"]
    assert len(QuestionGroups(source, 1)) == 24
    context = {"tokenizer": load_tokenizer("sentencepiece", 16), "answers": AnswerVocabulary(["red", "yes"])}
    (ask,) = parse_ops("each_question(3)", context)
    made = ask(groups[0], np.random.default_rng(0))
    assert made["asked"].tolist() == [True, True, False] and made["left_out"] == 0
    short = context | {"tokenizer": load_tokenizer("sentencepiece", 5)}
    told = text_lengths(TrainData([groups], None, "each_question(2)", short))
    assert told["looked_at"] == 12 and told["cut"] == 12  # the first question of each
    with pytest.raises(BadRecord, match="none of its answers"):
        ask({"key": "a", "questions": groups[1]["questions"][:1]}, np.random.default_rng(0))


def test_weights_without_answers_are_said(questions, weights):
    config = get_config("protocol=eval,runlocal")
    config.update_from_flattened_dict({"data.test": str(questions), "init": weights})
    with pytest.raises(UserError, match="answers no questions"):
        create_suite(config)
    with pytest.raises(UserError, match=r"holds no fusion of image and text: train one with .*configs/vlp.py"):
        FusedTowers(Encoder(weights))  # what Florence.answer, match and fill, and predict open
    config.answers.file = "other.txt"
    with pytest.raises(UserError, match="has answers of its own"):
        create_suite(config)


@pytest.mark.parametrize("protocol", ["nlvr2", "snli_ve"])
def test_classes_of_sentences(protocol, weights, tmp_path):
    """The shapes that are announced come, and go through the loss; a second picture has a token type of its own."""
    names = ("dev-0-0-img0", "dev-0-0-img1") if protocol == "nlvr2" else ("7",)
    for name, colour in zip(names, COLOURS.values(), strict=False):
        Image.new("RGB", (40, 36), colour).save(tmp_path / f"{name}.{'png' if protocol == 'nlvr2' else 'jpg'}")
    lines = {
        "nlvr2": [{"identifier": f"dev-0-0-{n}", "sentence": "Both are red.", "label": "True"} for n in range(2)],
        "snli_ve": [
            {"Flickr30K_ID": "7", "sentence2": "It is red.", "gold_label": label, "pairID": f"7{label}"}
            for label in ("entailment", "neutral")
        ],
    }[protocol]
    file = tmp_path / "lines.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = get_config(f"protocol={protocol},runlocal")
    sizes = {"model.overrides.res": 32, "model.overrides.window": 4, "batch_size": 8}
    data = {"data.train": f"{protocol}:{file}:{tmp_path}", "data.test": f"{protocol}:{file}:{tmp_path}"}
    config.update_from_flattened_dict({"init": weights} | sizes | data)
    task = create_task(config)
    with open_stream(config, task, task.train_data()) as stream:
        batch = next(stream)
    announced = {name: (spec.shape, spec.dtype) for name, spec in task.batches[0].items()}
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == announced
    params = jax.eval_shape(task.init, jax.random.key(0))
    assert params["fusion"]["token_types"].shape[0] == 1 + len(names)
    batch.pop("corrupt")
    loss, metrics = jax.eval_shape(task.loss, params, batch, jax.random.key(1))
    assert loss.shape == metrics["accuracy"].shape == ()
    assert len(task.evaluators(make_mesh(-1, 1))) == 1
