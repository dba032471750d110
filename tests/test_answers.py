"""Answers: their normal form as the official code makes it, the vocabulary, soft targets."""

import numpy as np
import pytest

from florence_jax.data.answers import (
    CONTRACTIONS,
    AnswerVocabulary,
    answer_type,
    majority_answer,
    normalise_answer,
    question_type,
)
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.records import BadRecord
from florence_jax.errors import UserError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("3,000", "3000"),
        ("U.S.A.", "usa"),
        ("None", "0"),
        ("no-mask", "no mask"),
        ("isnt it", "isn't it"),
        ("10 , 5", "10 5"),
        ("A red, shiny car!", "red shiny car"),
        ("#1", "#1"),
        ("3.5", "3.5"),
        ("v. 2", "v 2"),
        (" the\tTwo\nbirds ", "2 birds"),
        ("an", ""),
        ("lets", "lets"),
        ("somebody'd", "somebodyd"),
        ("hed've", "he'd've"),
        ("he'dve", "he'd've"),
        ("hedve", "hedve"),
        ("." * 40, "." * 8),  # a flag in the place of a count: 32 are removed
        ("東京", "東京"),
    ],
)
def test_normal_form_is_the_official_one(answer, normal):
    assert normalise_answer(answer) == normal


def test_contractions_are_the_official_ones():
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["y'alld've"] == "y'all'd've" and CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert {"id've", "im", "ive", "lets", "shes"}.isdisjoint(CONTRACTIONS)


def test_vocabulary_is_the_majority_answers_in_their_order():
    rows = [{"answers": ["Yes"] * 3 + ["no"] * 2}, {"answers": ["the dog"]}, {"answers": ["yes"]}, {"answers": ["an"]}]
    vocabulary = AnswerVocabulary.build([*rows, *rows[:3], {"answers": ["cat"]}, {"question": "?"}], min_count=2)
    assert vocabulary.answers == ("yes", "dog")
    assert "1 majority answers have nothing left" in vocabulary.notes[1] and "6 of" not in vocabulary.notes[0]
    assert majority_answer({"answers": ["b", "a", "a", "b"]}) == "b" and majority_answer({}) == ""
    assert majority_answer({"answer": "c", "answers": ["b", "b"]}) == "c"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "none of the questions has an answer"),
        ([{"answers": ["yes"]}, {"answers": ["Yes"]}], "one answer 'yes' 2: there is nothing to learn"),
        ([{"answers": ["yes"]}, {"answers": ["no"]}], "0 of 2 answers .* lower answers.min_count"),
    ],
)
def test_a_vocabulary_needs_two_answers(rows, message):
    with pytest.raises(UserError, match=message):
        AnswerVocabulary.build(rows, min_count=2)


def test_vocabulary_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "answers.txt"
    path.write_bytes(AnswerVocabulary(["yes", "ice cream", "日本"]).file())
    assert path.read_text() == "yes\nice cream\n日本\n"
    assert AnswerVocabulary.load(path).answers == ("yes", "ice cream", "日本")
    for text in (
        '["yes", "no"]',
        '{"no": 1, "yes": 0}',
        '{"label2ans": ["yes", "no"], "x": 1}',
        '{"answer": "yes", "label": 0}\n{"answer": "no", "label": 1}\n',
    ):
        path.write_text(text)
        assert AnswerVocabulary.load(path).answers == ("yes", "no")
    for text, message in (
        ('{"no": 2, "yes": 0}', "not 0, 1, 2"),
        ("yes\nyes\n", "'yes' is in the vocabulary twice"),
        ("yes\n", "nothing to choose between"),
        ('{"a": "x"}', "no list of answers"),
        ("[1, 2]", "not all texts"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            AnswerVocabulary.load(path)
    with pytest.raises(UserError, match="there is no list of answers"):
        AnswerVocabulary.load(tmp_path / "none.txt")


def test_soft_targets():
    vocabulary = AnswerVocabulary([*"bcdefghijklmn"])
    labels, scores = vocabulary.targets([*"ccccbbbdd", "the e"])
    assert labels.tolist() == [1, 0, 2, 3, -1, -1, -1, -1, -1, -1] and labels.dtype == np.int32
    np.testing.assert_allclose(scores, [1, 0.9, 0.6, 0.3, 0, 0, 0, 0, 0, 0])
    assert vocabulary.targets(["B", "the d"], "raw")[0].tolist() == [-1] * 10
    assert vocabulary.targets(["b"])[1][0] == 1 and scores.dtype == np.float32
    many = vocabulary.targets([*"bccdefghijklmn"])[0].tolist()  # fourteen people, thirteen answers
    assert many[0] == 1 and len(set(many)) == 10 and -1 not in many


def test_answer_targets():
    context = {"answers": AnswerVocabulary(["yes", "no"])}
    (op,) = parse_ops("answer_targets", context)
    found = op({"key": "1", "answers": ["Yes"]}, RNG)
    assert found["answer_labels"].tolist()[:2] == [0, -1] and found["answer_scores"][0] == 1
    with pytest.raises(BadRecord, match="none of its answers is in the vocabulary"):
        op({"key": "1", "answers": ["cat"]}, RNG)
    (op,) = parse_ops("answer_targets(needed=False)", context)
    assert op({"key": "1"}, RNG)["answer_labels"].tolist() == [-1] * 10
    (op,) = parse_ops("answer_targets(raw, needed=False)", context)
    assert op({"key": "1", "answers": ["Yes"]}, RNG)["answer_labels"].tolist() == [-1] * 10
    for ops, known in (("answer_targets", {}), ("answer_targets(fuzzy)", context)):
        with pytest.raises(UserError):
            parse_ops(ops, known)


def test_types_of_questions_and_answers():
    assert [answer_type(a) for a in (["Yes"], ["two"], ["dog", "2", "2"], ["a dog"])] == [
        "yes/no",
        "number",
        "number",
        "other",
    ]
    assert question_type("What is this?") == "what is" and question_type("Why?") == "why"
