"""Accuracy of answers as the official code gives it, what questions alone are worth, and the evaluator."""

import base64
import io
import itertools
import json
import math
import random

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from florence_jax.data.answers import AnswerVocabulary, normalise_answer
from florence_jax.data.records import BaseSource
from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import UserError
from florence_jax.evaluators.base import all_files
from florence_jax.evaluators.vqa import VqaEvaluator
from florence_jax.evaluators.vqa_report import GAP, attended_picture
from florence_jax.evaluators.vqa_scores import (
    Prior,
    accuracies,
    confusions,
    judge_answers,
    question_accuracy,
    standard_error,
)
from florence_jax.params.sharding import make_mesh


def official(answer, answers):
    """The formula of the official code, line by line."""
    if len(set(answers)) > 1:
        answers = [normalise_answer(given) for given in answers]
        answer = normalise_answer(answer)
    accuracy = []
    for person in range(len(answers)):
        others = [given for number, given in enumerate(answers) if number != person]
        matching = [given for given in others if given == answer]
        accuracy.append(min(1, len(matching) / 3))
    return sum(accuracy) / len(accuracy)


@pytest.mark.parametrize(
    ("answer", "answers", "accuracy"),
    [
        ("yes", ["yes"] * 10, 1),
        ("Yes", ["yes"] * 10, 0),
        ("2", ["two"] * 10, 0),
        ("2", ["two"] * 9 + ["2"], 1),
        *(("dog", ["dog"] * n + ["cat"] * (10 - n), min(0.3 * n, 1)) for n in range(5)),
        ("Cat", ["the cat"] * 3 + ["cat."] * 2 + ["dog"] * 5, 1),
        ("The  dog!", ["dog"], 1),  # one person: equal when normalised
        ("cat", ["dog"], 0),
        ("dog", ["dog"] * 2, 1 / 3),
        ("dog", ["dog", "cat"], 1 / 6),
    ],
)
def test_accuracy_is_the_official_one(answer, answers, accuracy):
    assert question_accuracy(answer, answers) == pytest.approx(accuracy, abs=1e-12)


def test_accuracy_of_random_annotations_is_that_of_the_formula():
    draw = random.Random(0)
    words = [
        "yes",
        "Yes",
        "no",
        "two",
        "2",
        "the cat",
        "cat.",
        "a cat",
        "isnt it",
        "isn't it",
        "3,000",
        "U.S.A.",
        "usa",
    ]
    for _ in range(1000):
        some = draw.sample(words, draw.randint(1, 4))
        answers, answer = draw.choices(some, k=draw.randint(2, 12)), draw.choice(words)
        assert question_accuracy(answer, answers) == pytest.approx(official(answer, answers), abs=1e-12)


def rows(*questions):
    names = ("question", "answers", "image_id", "answer_type", "question_type")
    return [dict(zip(names, question, strict=True)) for question in questions]


def test_results_by_type_and_their_error():
    asked = rows(
        ("is it?", ["yes"], 1, "yes/no", "is it"),
        ("is it?", ["no"], 1, "yes/no", "is it"),
        ("what?", ["cat"], 2, "other", "what"),
        ("what?", ["zebra"], 2, "other", "what"),
    )
    asked.append({"question": "why?"})  # nobody has answered it
    judged = judge_answers(asked, ["yes", "no", "cat", "cat", "no"], AnswerVocabulary(["yes", "no", "cat"]))
    assert accuracies(judged, ["what"]) == {
        "accuracy": 0.75,
        "answer_type/yes-no": 1,
        "answer_type/other": 0.5,
        "question_type/what": 0.5,
    }
    assert judged.known.tolist() == [True, True, True, False] and len(judged.asked) == 4
    assert standard_error(judged) == pytest.approx(math.sqrt(2 * (0.5**2 + 0.5**2)) / 4)
    assert math.isnan(standard_error(judge_answers(asked[:1], ["yes"]))) and accuracies(judge_answers([], [])) == {}
    assert confusions(judged, 3) == [("zebra", "cat", 1, 1)]


def test_consistency_is_over_the_pairs_of_a_sentence():
    asked = [
        {"answers": [answer], "sentence_id": name}
        for answer, name in zip(["true", "false", "true"], "aab", strict=True)
    ]
    assert accuracies(judge_answers(asked, ["true", "true", "true"])) == {"accuracy": 2 / 3, "consistency": 0.5}


def test_prior_is_the_best_answer_for_each_text():
    prior = Prior(
        rows(
            *itertools.repeat(("Is it?", ["Yes"], 1, "", "is"), 2),
            ("is  it?", ["no"], 1, "", "is"),
            *itertools.repeat(("Is that?", ["no"], 1, "", "is"), 3),
            ("what?", ["an"], 1, "", "what"),  # nothing is left of it
        )
    )
    given = [{"question": "IS IT?"}, {"question": "Is this?", "question_type": "is"}, {"question": "who?"}]
    assert [prior.answer(record) for record in given] == ["yes", "no", "no"]
    assert prior.majority == "no" and Prior([]).answer(given[0]) == ""


# -- the evaluator ----------------------------------------------------------------------------------------------------

WORDS = AnswerVocabulary(["yes", "no", "red", "2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures whose red says which of four answers a model gives."""
    path = tmp_path_factory.mktemp("questions")
    lines = []
    for number in range(11):
        Image.new("RGB", (8, 8), (60 * (number % 4), 0, 0)).save(path / f"{number}.png")
        true = [["yes"], ["no"], ["red", "red", "blue"], ["zebra"]][number % 4]
        lines.append({"image": f"{number}.png", "question": f"Question {number % 3}?", "answers": true, "id": number})
    (path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


def answer_by_red(params, batch):
    red = batch["image"][:, 0, 0, 0].astype(jnp.float32) / 60
    near = -jnp.abs(red[:, None] - jnp.arange(4, dtype=jnp.float32)[None])
    return {"answer_logits": params * near, "attention": jnp.tile(jnp.arange(4, dtype=jnp.float32), (len(red), 1))}


def evaluator(source, train=(), answer=answer_by_red):
    return VqaEvaluator(source, "decode", {}, ("image",), answer, make_mesh(-1, 1), 4, WORDS, train=train)


def test_evaluator(folder):
    source = open_source(str(folder))
    judge = evaluator(source, [source])
    found = judge.run(jnp.float32(3))
    assert found["questions"] == 11 and found["answerable"] == pytest.approx(9 / 11)
    right = 3 + 3 + 3 * question_accuracy("red", ["red", "red", "blue"])
    assert found["accuracy"] == pytest.approx(right / 11) and found["accuracy_answerable"] == pytest.approx(right / 9)
    assert found["answer_type/yes-no"] == 1 and found["accuracy_stderr"] > 0
    assert judge.chance.keys() <= found.keys() and 0 < judge.chance["accuracy"] < found["accuracy"]
    files = judge.files()
    assert files.keys() == {"answers_test.json", "answers.txt"} and files["answers.txt"] == b"yes\nno\nred\n2\n"
    assert json.loads(files["answers_test.json"])[:2] == [
        {"question_id": 0, "answer": "yes"},
        {"question_id": 1, "answer": "no"},
    ]
    page = "".join(judge.report())
    assert "right answers" in page and "wrong answers" in page and "prior" in page and "where the last cross" in page
    assert "zebra" in page and "true: red (2), blue (1)" in page and page.count("<figure") == 11


def test_two_evaluators_write_one_vocabulary(folder):
    both = [evaluator(open_source(str(folder)), answer=answer_by_red) for _ in range(2)]
    both[1].name = "other"
    for each in both:
        each.run(jnp.float32(3))
    assert all_files(both).keys() == {"answers_test.json", "answers_other.json", "answers.txt"}
    both[1].vocabulary = AnswerVocabulary(["no", "yes", "red", "2"])
    with pytest.raises(ValueError, match="'answers.txt', which another one has written otherwise"):
        all_files(both)


def test_a_test_set_without_answers(folder, tmp_path):
    lines = [{"image": str(folder / f"{n}.png"), "question": "Is it?", "question_id": 70 + n} for n in range(3)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    judge = evaluator(open_source(str(tmp_path)))
    assert judge.run(jnp.float32(3)) == {"questions": 3, "unlabelled": 3}
    assert judge.charts == () and judge.chance == {}
    assert json.loads(judge.files()["answers_test.json"]) == [
        {"question_id": 70, "answer": "yes"},
        {"question_id": 71, "answer": "no"},
        {"question_id": 72, "answer": "red"},
    ]
    assert "true:" not in "".join(judge.report())


def test_answers_that_are_no_numbers_and_records_that_are_no_questions(folder):
    source = open_source(str(folder))
    with pytest.raises(UserError, match="11 of 11 questions are not finite"):
        evaluator(source).run(jnp.float32(np.nan))
    with pytest.raises(UserError, match="its records are no questions"):
        evaluator(open_source("scene_captions:train:2"))


def test_people_agree_on_an_answer_that_no_model_gives(folder, tmp_path):
    lines = [{"image": str(folder / f"{n}.png"), "question": "Is it?", "answers": ["Yes", "Yes"]} for n in range(2)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    judge = evaluator(open_source(str(tmp_path)))
    assert judge.run(jnp.float32(3))["accuracy"] == 0
    assert "agree in 2 questions on an answer that is not in its normal form, such as 'Yes'" in judge.notes()[0]


class Pictures(BaseSource):
    """Two pictures with three questions each."""

    name = "pictures"

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return 2

    def __getitem__(self, index):
        answer = ["yes", "no"][index]
        questions = [
            {"question": "Is it?", "question_id": 3 * index + k, "answers": [answer], "sentence_id": str(k)}
            for k in range(3)
        ]
        return {"key": str(index), "questions": questions, "image": (self.folder / f"{index}.png").read_bytes()}


def test_questions_of_a_picture_share_it(folder):
    def answer_all(params, batch):
        return {name: jnp.stack([value] * 4, 1) for name, value in answer_by_red(params, batch).items()}

    judge = evaluator(Pictures(folder), [Pictures(folder)], answer_all)  # room for four questions
    found = judge.run(jnp.float32(3))
    assert (
        found["questions"] == 6 and found["accuracy"] == found["consistency"] == 1 and judge.chance["accuracy"] == 0.5
    )
    given = [(row["question_id"], row["answer"]) for row in json.loads(judge.files()["answers_test.json"])]
    assert given == [(n, "yes" if n < 3 else "no") for n in range(6)]
    assert "".join(judge.report()).count("<figure") == 6


def test_attention_lies_beside_the_picture():
    seen, looked = np.zeros((8, 8, 3), np.uint8), [np.arange(9.0), np.arange(10.0), np.arange(7.0)]  # 7 are no grid
    for shape, width in (((80, 60, 3), 30), ((2, 300, 3), 80), ((300, 2, 3), 1)):
        uri = attended_picture(np.zeros(shape, np.uint8), seen, looked, 40)
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        assert picture.size == (width + 2 * (GAP + 40), 40)
