"""What a checkpoint folder says of itself."""

import json

import pytest

from florence_jax.errors import UserError
from florence_jax.params.weights import MODEL_FILE, describe, make_description, write_description

TOWERS = {"variant": "ti", "overrides": {"depths": (2, 2), "res": None}, "entries": ("image", "text")}


def test_a_description_is_read_as_it_was_written_and_brings_its_tokenizer(tmp_path):
    vocabulary, folder = tmp_path / "mine" / "vocab.json", tmp_path / "run" / "checkpoints"
    vocabulary.parent.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (vocabulary.parent / name).write_text(name)
    parts = {"towers": TOWERS, "head": {"features": "pooled", "entries": ["head"]}}
    given = make_description("classify", parts, tokenizer=str(vocabulary), classes=["cat", "dog"], source={"init": "x"})
    write_description(str(folder), given)
    for init in (folder, folder.parent):
        found = describe(str(init))
        assert found.task == "classify" and found.classes == ("cat", "dog") and found.source == {"init": "x"}
        assert found.entries == ("image", "text", "head") and found.parts["head"]["features"] == "pooled"
        assert found.parts["towers"]["overrides"] == {"depths": [2, 2]}  # None: not given
        assert found.tokenizer == str(folder / "vocab.json")
    assert (folder / "merges.txt").read_text() == "merges.txt"
    assert json.loads((folder / MODEL_FILE).read_text())["tokenizer"]["given"] == str(vocabulary)


@pytest.mark.parametrize("tokenizer", ["", "sentencepiece", "gone.model"])
def test_a_tokenizer_without_a_file_is_named(tokenizer, tmp_path):
    write_description(str(tmp_path), make_description("pretrain", {"towers": TOWERS}, tokenizer=tokenizer))
    assert describe(str(tmp_path)).tokenizer == tokenizer and [path.name for path in tmp_path.iterdir()] == [MODEL_FILE]


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "there is no .*model.json, which every run and import writes"),
        ("{", "model.json cannot be used"),
        ('{"format": 2}', "its format is 2, this version reads 1"),
        ('{"format": 1, "task": "pretrain"}', "model.json cannot be used .KeyError"),
    ],
)
def test_a_folder_that_does_not_say_what_it_holds(content, message, tmp_path):
    if content is not None:
        (tmp_path / MODEL_FILE).write_text(content)
    with pytest.raises(UserError, match=f"cannot tell which model .*{message}"):
        describe(str(tmp_path))
