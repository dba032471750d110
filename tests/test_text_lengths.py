"""What is said of texts that are longer than the model's."""

import numpy as np

from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.pipeline import TrainData
from florence_jax.data.records import PAYLOADS, ArraySource, sample_of
from florence_jax.data.sources.array_record import ArrayRecordSource, write_array_record
from florence_jax.data.sources.folder import FolderSource, open_folder
from florence_jax.data.text_lengths import text_lengths
from florence_jax.data.tokenizers import load_tokenizer

OPS = "decode|texts('caption=1', 'tags=1')|keep(image, text, label)"


def train_data(captions, ops=OPS, length=16):
    rows = [{"key": f"{i}.png", "caption": caption, "tags": ["a", "b"]} for i, caption in enumerate(captions)]
    return TrainData([FolderSource("here", rows)], None, ops, {"tokenizer": load_tokenizer("sentencepiece", length)})


def test_captions_that_differ_after_the_cut_are_told():
    """The labels that training uses are as many as the texts that are left."""
    start = "a photograph of the old harbour on a grey morning in the north, with number "
    data = train_data([f"{start}{i}" for i in range(24)])
    found = text_lengths(data)
    assert (found["looked_at"], found["cut"], found["different"], found["left"]) == (72, 24, 26, 3)
    says = found["says"]
    assert "33.3% of 72 looked at are longer than the 16 tokens" in says and "26 different ones become 3" in says
    (label,) = parse_ops("label", data.context)
    labels = {label({"caption": f"{start}{i}"}, None)["label"].tobytes() for i in range(24)}
    assert len(labels) == 1
    longer = int(says.rpartition("text_length=")[2].split()[0])
    assert (
        longer == found["longest"]
        and text_lengths(train_data([f"{start}{i}" for i in range(24)], length=longer))["says"] == ""
    )


def test_a_length_for_nearly_all_is_named_and_a_sample_is_called_one():
    found = text_lengths(train_data(["a red fox"] * 3000 + ["a red fox " * 9] * 3, "caption|label|tokenize|keep(text)"))
    assert found["looked_at"] == 1024 and "(a sample)" in found["says"]
    assert "text_length=" in text_lengths(train_data(["fox"] * 500 + ["a red fox " * 9], "caption|tokenize"))["says"]
    assert text_lengths(train_data(["fox"], "decode|keep(image)")) == {}


def test_samples_are_spread_and_have_no_pictures(tmp_path):
    records = [{"key": str(i), "image": b"x", "caption": f"c{i}"} for i in range(600)]
    for name, part in (("a", records[:500]), ("b", records[500:])):
        write_array_record(str(tmp_path / f"{name}.array_record"), part)
    paths = [str(tmp_path / f"{name}.array_record") for name in "ab"]
    stored = ArrayRecordSource(paths, "two files")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(30):
        (pictures / f"{i:02}.png").write_bytes(b"x")
        (pictures / f"{i:02}.txt").write_text(f"c{i}")
    in_memory = ArraySource("memory", np.zeros((50, 2, 2), np.uint8), [f"c{i}" for i in range(50)])
    for source, last in ((stored, 599), (open_folder(str(pictures)), 29), (in_memory, 49)):
        found = sample_of(source, 20)
        numbers = [int(row["caption"][1:]) for row in found]
        assert len(found) <= 20 and len(set(numbers)) > 15 and min(numbers) == 0 and max(numbers) > last * 0.9
        assert not any(name in row for row in found for name in PAYLOADS)
        assert len(sample_of(source, 10**6)) == len(source)
    for path in paths:
        (tmp_path / f"{path}.meta").unlink()
    assert [row["key"] for row in sample_of(stored, 3)] == ["0", "299", "599"]
