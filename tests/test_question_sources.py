"""Sets of questions in the files that people have, and what may be wrong with them."""

import json
import pickle
import types

import numpy as np
import pytest
from PIL import Image

from florence_jax.data.pipeline import eval_stream
from florence_jax.data.records import BadRecord, described, sample_of, without_payloads
from florence_jax.data.sources import vqa
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.joined_questions import open_questions
from florence_jax.errors import UserError


def pictures(folder, *names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 6), (60 * number, 0, 0)).save(path)
    return folder


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def whole(path, value):
    path.write_text(json.dumps(value))
    return str(path)


# -- one's own --------------------------------------------------------------------------------------------------------


def test_own_questions(tmp_path):
    pictures(tmp_path, "a.png", "in/b.png")
    lines(
        tmp_path / "questions.jsonl",
        {"image": "a.png", "question": " What is it? ", "answer": "dog"},
        {"image": "./in/b.png", "question": "Is it?", "answers": ["yes", True, "no"], "question_id": "7", "type": "t"},
        {"image": "in//b.png", "question": "何匹？", "answers": [{"answer": 3}], "answer_type": "count"},
        {"image": "c.png", "question": "Where?", "answer": "there"},
        {"image": "a.png", "question": " ", "answer": "x"},
        {"image": "a.png", "question": "Why?"},
    )
    source = open_source(str(tmp_path))
    rows = list(source.metadata())
    assert [row["question"] for row in rows] == ["What is it?", "Is it?", "何匹？", "Why?"]
    assert [row.get("answers") for row in rows] == [["dog"], ["yes", "yes", "no"], ["3"], None]
    assert [row["question_id"] for row in rows] == [1, "7", 3, 6] and len({row["key"] for row in rows}) == 4
    assert [row["image_id"] for row in rows] == ["a.png", "in/b.png", "in/b.png", "a.png"]
    assert rows[0]["answer_type"] == "other" and rows[0]["question_type"] == "what is"
    assert rows[1]["answer_type"] == "yes/no" and rows[1]["question_type"] == "t" and rows[2]["answer_type"] == "count"
    says = source.summary["says"]
    assert "4 questions about 2 pictures, 1 of them without an answer, such as 'What is it?'" in says
    assert "picture is not there: 1 (left out), the first: c.png" in says and "empty questions: 1" in says
    copy = pickle.loads(pickle.dumps(source))
    assert without_payloads(copy[1]) == rows[1] == described(source, 1) and isinstance(copy[1]["image"], bytes)
    assert sample_of(source, 9) == rows and len(open_source(str(tmp_path / "questions.jsonl"))) == 4


def test_own_questions_as_a_table(tmp_path):
    pictures(tmp_path, "a.png")
    (tmp_path / "questions.csv").write_text('image,question,answers,id\na.png,What?,"[""dog"", ""cat""]",x\n')
    (row,) = open_source(str(tmp_path)).metadata()
    assert row["answers"] == ["dog", "cat"] and row["question_id"] == "x"


def test_pictures_that_are_there_twice_are_one(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes())
    lines(tmp_path / "questions.jsonl", *({"image": f"{name}.png", "question": "Q?", "answer": "x"} for name in "abc"))
    source = open_source(str(tmp_path))
    assert list(source.image_ids) == ["a.png", "b.png", "a.png"] and source[2]["image"] == source[0]["image"]
    assert (
        "bytes of another one: 1 (taken for one, also where pictures are held out), the first: c.png is a.png"
        in (source.summary["says"])
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Q?"}], "line 1: its 'image' must name a file; it has question"),
        ([{"image": "a.png", "question": 3}], "line 1: its 'question' must be a text"),
        ([{"image": "a.png", "question": "Q?", "answer": {"x": 1}}], "line 1: its answers must be texts"),
        ([{"image": "x.png", "question": "Q?", "answer": "a"}], "no question of .* can be used.*not there: 1"),
        ([{"image": "a.png", "question": ""}], "has no questions; empty questions: 1"),
        ([{"image": "a.png", "question": "Q?", "id": 3}] * 2, "1 ids of questions are there twice, such as '3'"),
    ],
)
def test_own_questions_that_cannot_be_read(tmp_path, rows, message):
    pictures(tmp_path, "a.png")
    lines(tmp_path / "questions.jsonl", *rows)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path))


def test_a_folder_without_questions(tmp_path):
    with pytest.raises(UserError, match="has no questions.jsonl with lines of image, question and answer"):
        vqa.open_own_questions(str(tmp_path))


def test_a_corrupt_picture_is_a_bad_record(tmp_path):
    pictures(tmp_path, "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG but no more")
    lines(
        tmp_path / "questions.jsonl",
        *({"image": f"{name}.png", "question": "Q?", "answer": "a", "id": name} for name in "ab"),
    )
    source = open_source(str(tmp_path))
    with eval_stream(source, "decode|keep(image)", {}, batch_size=2, on_corrupt="skip") as stream:
        assert next(stream)["mask"].tolist() == [True, False]
    (tmp_path / "b.png").unlink()
    with pytest.raises(BadRecord, match="'b'"):
        source[1]


# -- sets of others ---------------------------------------------------------------------------------------------------


def vqa_files(folder, **changes):
    pictures(folder, "val2014/COCO_val2014_000000000042.jpg", "val2014/COCO_val2014_000000000043.jpg")
    questions = [
        {"image_id": 42, "question": "Is it?", "question_id": 420},
        {"image_id": 43, "question": "What?", "question_id": 430},
        {"image_id": 99, "question": "Where?", "question_id": 990},
        {"image_id": 43, "question": "Who?", "question_id": 431},
    ]
    annotations = [
        {
            "question_id": number,
            "image_id": number // 10,
            "question_type": "is it",
            "answer_type": "yes/no",
            "multiple_choice_answer": "yes",
            "answers": [{"answer": "yes", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)],
        }
        for number in (430, 420, 990, 7)
    ]
    given = {"questions": questions, "annotations": annotations} | changes
    return (
        whole(folder / "q.json", {"data_subtype": "val2014", "questions": given["questions"], "info": {}}),
        whole(folder / "a.json", {"info": {}, "annotations": given["annotations"]}),
        str(folder / "val2014"),
    )


def test_vqa(tmp_path):
    questions, annotations, images = vqa_files(tmp_path)
    source = open_source(f"vqa:{questions}:{annotations}:{images}")
    rows = list(source.metadata())
    assert [row["question_id"] for row in rows] == [420, 430] and rows[1]["image_id"] == 43
    assert rows[0]["answers"] == ["yes"] * 10 and rows[0]["answer"] == "yes" and rows[0]["answer_type"] == "yes/no"
    assert source[0]["image"] != source[1]["image"]
    for words in (
        "questions whose picture is not there: 1 (left out), the first: 99",
        "questions without an annotation: 1 (left out), the first: 431",
        "annotations of questions that are not listed: 1 (not used), the first: 7",
    ):
        assert words in source.summary["says"]
    test = open_source(f"vqa:{questions}:{images}")
    assert len(test) == 3 and "answers" not in test[0] and "without answers" in test.summary["says"]


def test_vqa_with_ids_that_are_texts(tmp_path):
    questions, annotations, images = vqa_files(
        tmp_path, questions=[{"image_id": "000000000042", "question": "Is it?", "question_id": "420"}]
    )
    (row,) = open_source(f"vqa:{questions}:{annotations}:{images}").metadata()
    assert row["question_id"] == "420" and len(row["answers"]) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": [{"question": "Is it?"}]}, r"questions\[0\] has no 'question_id'"),
        ({"questions": []}, "has no list 'questions': it is no file of VQA's questions"),
        ({"annotations": [{"question_id": 5, "answers": []}]}, "none of the 4 questions .* files of one split"),
        ({"annotations": [{"question_id": 5}]}, r"annotations\[0\] has no 'answers'"),
        ({"questions": [{"image_id": 42, "question": "Q?", "question_id": 420}] * 2}, "are there twice"),
    ],
)
def test_vqa_that_cannot_be_read(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        open_source("vqa:{}:{}:{}".format(*vqa_files(tmp_path, **changes)))


def test_vqa_by_another_name(tmp_path):
    questions, annotations, images = vqa_files(tmp_path)
    for spec, message in (
        ("vqa:", "write vqa:"),
        (f"vqa:{questions}", "write vqa:"),
        (f"vqa:{questions}x:{images}", "there is no file"),
        (f"vqa:{questions}:{annotations}:{images}x", "there is no folder"),
        (f"vqa:{questions}:{annotations}", "there is no folder .* of pictures"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(spec)


def test_easy_vqa(tmp_path, monkeypatch):
    pictures(tmp_path, "data/train/images/0.png", "data/train/images/1.png")
    whole(tmp_path / "data/train/questions.json", [["is it?", "yes", 1], ["what color?", "red", 0], ["?", "no", 8]])
    source = open_source(f"easy_vqa:{tmp_path}/data:train")
    assert [row["answers"] for row in source.metadata()] == [["yes"], ["red"]]
    assert Image.open(tmp_path / "data/train/images/1.png").getpixel((0, 0)) == (60, 0, 0)
    assert source[0]["image"] == (tmp_path / "data/train/images/1.png").read_bytes()
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert len(open_source("easy_vqa:train")) == 2
    with pytest.raises(UserError, match="has no test/questions.json; splits there: train"):
        open_source("easy_vqa:test")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install easy-vqa"):
        open_source("easy_vqa:train")


def test_gqa_and_json_like_it(tmp_path):
    pictures(tmp_path, "n161.jpg", "2354.jpg")
    item = {"question": "Is it?", "answer": "yes", "imageId": "n161", "types": {"structural": "verify"}}
    path = whole(tmp_path / "g.json", {"05": item, "06": item | {"imageId": "2354", "question": "What?"}})
    rows = list(open_source(f"gqa:{path}:{tmp_path}").metadata())
    assert [(row["question_id"], row["question_type"]) for row in rows] == [("05", "verify"), ("06", "verify")]
    path = whole(tmp_path / "h.json", [{"q": "Is it?", "meta": {"said": ["a", "b"]}, "file": "x/2354.jpg"}])
    (row,) = open_source(f"gqa:{path}:{tmp_path}:question=q,image=file,answer=meta.said").metadata()
    assert row["answers"] == ["a", "b"] and row["question_id"] == 0
    with pytest.raises(UserError, match="has no 'imageId', only q, meta, file; say where it is, such as image=NAME"):
        open_source(f"gqa:{path}:{tmp_path}:question=q")
    with pytest.raises(UserError, match="'picture=file' names no field"):
        open_source(f"gqa:{path}:{tmp_path}:picture=file")


def test_nlvr2(tmp_path):
    pictures(tmp_path, *(f"60/dev-1-0-img{k}.png" for k in (0, 1)))
    line = {"sentence": "Both are red.", "label": "True", "identifier": "dev-1-0-0"}
    path = lines(
        tmp_path / "dev.json",
        line,
        line | {"identifier": "dev-1-0-1", "label": "False"},
        line | {"identifier": "dev-2-0-0"},
    )
    source = open_source(f"nlvr2:{path}:{tmp_path}")
    assert source.class_names == ("false", "true") and [row["class_id"] for row in source.metadata()] == [1, 0]
    assert {row["sentence_id"] for row in source.metadata()} == {"dev-1-0", "dev-1-1"}
    with eval_stream(
        source, "decode(images)|resize_exact(4, field=images)|stack(images)|keep(images)", {}, batch_size=2
    ) as stream:
        assert next(stream)["images"].shape == (2, 2, 4, 4, 3)
    assert len(source[0]["images"]) == 2 and "image" not in source[0] and source[0]["answers"] == ["true"]
    assert "picture is not there: 1 (left out), the first: dev-2-0" in source.summary["says"]
    with pytest.raises(UserError, match="a line of NLVR2 has"):
        open_source(f"nlvr2:{lines(tmp_path / 'bad.json', line | {'label': 'maybe'})}:{tmp_path}")


def test_snli_ve(tmp_path):
    pictures(tmp_path, "24.jpg")
    line = {"Flickr30K_ID": "24", "sentence1": "A.", "sentence2": "B.", "gold_label": "entailment", "pairID": "24#0"}
    path = lines(tmp_path / "t.jsonl", line, line | {"gold_label": "-", "pairID": "24#1"})
    source = open_source(f"snli_ve:{path}:{tmp_path}")
    (row,) = source.metadata()
    assert (
        row["class_id"] == 2 and row["question"] == "B." and row["premise"] == "A." and source.class_names[0][0] == "c"
    )
    assert "pairs that people did not agree on: 1" in source.summary["says"]


def test_several_sets_are_one(tmp_path):
    spec = "scene_questions:train:2:32:noise|scene_questions:held_out:1:32:noise"
    source = pickle.loads(pickle.dumps(open_questions(spec)))
    train, held_out = map(open_source, spec.split("|"))
    assert len(source) == 18 and source.image_ids == ["0:0"] * 6 + ["0:1"] * 6 + ["1:0"] * 6
    rows = list(source.metadata())
    assert [row["image_id"] for row in rows] == source.image_ids and len({row["key"] for row in rows}) == 18
    found = source.__getitems__([13, 1, 12])
    assert (
        [without_payloads(record) for record in found]
        == [rows[13], rows[1], rows[12]]
        == [source.described(index) for index in (13, 1, 12)]
    )
    assert np.array_equal(found[0]["image"], held_out[1]["image"])
    assert np.array_equal(source[1]["image"], train[1]["image"]) and sample_of(source, 99) == rows
    assert "scene_questions:held_out:1" in source.summary["says"]
    assert open_questions("scene_questions:train:2").name == "scene_questions:train:2"
    pictures(tmp_path, "a.png")
    for name in ("q.json", "r.json"):
        whole(tmp_path / name, {name: {"question": "Q?", "answer": "a", "imageId": "a"}})
    one = open_questions(f"gqa:{tmp_path}/q.json:{tmp_path}|gqa:{tmp_path}/r.json:{tmp_path}")
    assert one.image_ids == ["0:a", "0:a"]  # of one folder: one picture
    for bad, message in (
        ("scene_questions:train:2*2|scene_questions:held_out", "without a weight"),
        ("scene_questions:train:2|emoji:train", "emoji:train: its records are no questions"),
        ("scene_pairs:train:2|scene_entailment:train:2", "the sets have different classes"),
    ):
        with pytest.raises(UserError, match=message):
            open_questions(bad)
