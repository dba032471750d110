"""Sources: every kind, every mistake."""

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from florence_jax.data.records import BadRecord
from florence_jax.data.sources.array_record import write_array_record, write_side_file
from florence_jax.data.sources.catalog import open_mixture, open_source
from florence_jax.errors import UserError
from florence_jax.tools import write_metadata


def png(value=0, size=(6, 4)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "PNG")
    return file.getvalue()


def records(n, prefix="r"):
    return [
        {"key": f"{prefix}{i}", "image": png(i), "caption": f"caption {i}", "tags": ["x", f"t{i}"]} for i in range(n)
    ]


def write_raw(path, payloads):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for payload in payloads:
        writer.write(payload)
    writer.close()


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


@pytest.mark.parametrize(("split", "count"), [("train", 2806), ("new_style", 1414), ("new_names", 217)])
def test_embedded_emoji(split, count):
    source = open_source(f"emoji:{split}")
    assert len(source) == count and source.name == f"emoji:{split}"
    record = source[count - 1]
    assert isinstance(record["image"], bytes) and {"key", "caption", "keywords", "group"} <= record.keys()
    rows = list(source.metadata())
    assert len(rows) == count == len({row["key"] for row in rows})
    assert "image" not in rows[0] and rows[-1]["key"] == record["key"]


def test_array_record_file_folder_and_pattern(tmp_path):
    assert write_array_record(str(tmp_path / "b.array_record"), records(3, "b")) == 3
    write_array_record(str(tmp_path / "a.array_record-00000-of-00001"), records(2, "a"))
    assert len(open_source(str(tmp_path / "b.array_record"))) == 3
    for spec in (tmp_path, tmp_path / "*.array_record*"):
        source = open_source(str(spec))
        assert [row["key"] for row in source.metadata()] == ["a0", "a1", "b0", "b1", "b2"]
        assert source[4] == records(3, "b")[2]
        assert [r["key"] for r in source.__getitems__([4, 0, 0])] == ["b2", "a0", "a0"]
        assert pickle.loads(pickle.dumps(source))[3]["key"] == "b1"
    (tmp_path / "b.array_record.1f.tmp").write_bytes((tmp_path / "b.array_record").read_bytes())  # of a killed writer
    assert [len(open_source(str(spec))) for spec in (tmp_path, tmp_path / "*.array_record*")] == [5, 5]


def test_unreadable_records_are_bad_records_in_their_place(tmp_path):
    good = msgpack.packb({"image": png(), "caption": "x"})
    write_raw(tmp_path / "x.array_record", [good, b"\xc1nonsense", msgpack.packb([1]), good])
    source = open_source(str(tmp_path / "x.array_record"))
    rows = source.__getitems__([0, 1, 2, 3])
    assert [isinstance(row, BadRecord) for row in rows] == [False, True, True, False]
    assert rows[3]["key"] == f"{source.name}[3]"
    with pytest.raises(BadRecord, match=r"x.array_record\[1\].*not a msgpack map"):
        source[1]
    with pytest.raises(UserError, match=r"has no .*x.array_record.meta.*tools.write_metadata") as error:
        next(source.metadata())
    one_line(error)
    assert write_metadata.main([str(tmp_path)]) == 0
    assert list(source.metadata()) == [{"key": f"{source.name}[{i}]", "caption": "x"} for i in (0, 3)]
    copy = pickle.loads(pickle.dumps(rows[1]))
    assert (copy.key, copy.reason, str(copy)) == (rows[1].key, rows[1].reason, str(rows[1]))


def test_damaged_block_spoils_only_its_record(tmp_path):
    path = tmp_path / "x.array_record"
    items = [{"key": str(i), "image": np.random.default_rng(i).bytes(70_000), "caption": "c"} for i in range(4)]
    write_array_record(str(path), items)
    data = bytearray(path.read_bytes())
    place = data.find(items[2]["image"][1000:1020])
    assert place > 0
    data[place : place + 8] = bytes(8)
    path.write_bytes(data)
    rows = open_source(str(path)).__getitems__(range(4))
    assert [isinstance(row, BadRecord) for row in rows] == [False, False, True, False]
    assert "[2]" in str(rows[2])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": b"x"}, "str 'key'"),
        ({"key": "a"}, "'image' of bytes"),
        ({"key": "a", "image": "path"}, "'image' of bytes"),
        ({"key": "a", "images": [b"x", "path"]}, "'images', a list of bytes"),
        ({"key": "a", "image": b"x", "video": 3}, "'video', bytes or a path"),
        (None, "no records"),
    ],
)
def test_write_rejects(tmp_path, record, message):
    path = tmp_path / "out.array_record"
    with pytest.raises(UserError, match=message) as error:
        write_array_record(str(path), [records(1)[0], record] if record else [])
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_side_file_holds_all_but_the_payloads(tmp_path):
    path = str(tmp_path / "x.array_record")
    rows = [
        {"key": "a", "image": png(), "boxes": [[0.0, 1.0, 2.5, 3.0]], "width": 6},
        {"key": "b", "images": [png(), png(1)], "caption": "two"},
        {"key": "c", "video": "clip.mp4", "clip": [0.0, 2.0]},
        {"key": "d", "video": b"frames"},
    ]
    assert write_array_record(path, rows) == 4
    assert {p.name for p in tmp_path.iterdir()} == {"x.array_record", "x.array_record.meta"}
    source = open_source(str(tmp_path))
    payloads = ("image", "images", "video")
    assert list(source.metadata()) == [{k: v for k, v in row.items() if k not in payloads} for row in rows]
    assert [source[i] for i in range(4)] == rows
    # Not even where the data file's pictures are damaged, and byte for byte as one that is added later.
    side = (tmp_path / "x.array_record.meta").read_bytes()
    (tmp_path / "x.array_record.meta").unlink()
    assert write_side_file(path) == 4 and (tmp_path / "x.array_record.meta").read_bytes() == side


def test_metadata_reads_no_picture(tmp_path):
    path = tmp_path / "x.array_record"
    write_array_record(str(path), [{"key": str(i), "image": np.random.default_rng(i).bytes(70_000)} for i in range(99)])
    source, before = open_source(str(path)), bytes_read()
    assert len(list(source.metadata())) == 99
    assert bytes_read() - before < path.stat().st_size / 4
    write_array_record(str(tmp_path / "y.array_record"), records(3))
    (tmp_path / "y.array_record.meta").replace(tmp_path / "x.array_record.meta")
    with pytest.raises(UserError, match=r"x.array_record.meta has 3 records, .*x.array_record 99"):
        list(source.metadata())
    (tmp_path / "x.array_record.meta").write_bytes(b"nonsense" * 99)
    with pytest.raises(UserError, match=r"cannot read .*x.array_record.meta"):
        list(source.metadata())


def bytes_read():
    return int(open("/proc/self/io").read().split()[1])


def test_write_makes_the_folder_or_says_why_not(tmp_path):
    record = {"key": "a", "image": b"x"}
    assert write_array_record(str(tmp_path / "new" / "a.array_record"), [record]) == 1
    with pytest.raises(UserError, match="cannot write"):
        write_array_record(str(tmp_path / "new" / "a.array_record" / "b.array_record"), [record])
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"a.array_record", "a.array_record.meta"}


# -- folders ----------------------------------------------------------------------------------------------------------


def image_folder(tmp_path, *names):
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(i))
    return tmp_path


@pytest.mark.parametrize("header", ["file,caption", "filename,text", "image,title", "File_Name, Caption"])
def test_csv_folder(tmp_path, header):
    image_folder(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "captions.csv").write_text(
        f'\ufeff{header},place\na.png,"a cat, sitting",Rome\nsub/b.png,a dog,\n', "utf-8"
    )
    source = open_source(str(tmp_path))
    assert source[0] == {"key": "a.png", "image": png(0), "caption": "a cat, sitting", "place": "Rome"}
    assert source[1]["caption"] == "a dog" and source[1]["image"] == png(1)
    assert [row["key"] for row in source.metadata()] == ["a.png", "sub/b.png"]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_jsonl_folder(tmp_path):
    image_folder(tmp_path, "a.png")
    lines = [{"file_name": "a.png", "text": "a cat", "tags": ["x", "y"]}, {"file_name": "gone.png", "text": "b"}]
    lines.append({"file_name": "nul\0.png", "text": "c", "label": 3})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    source = open_source(str(tmp_path))
    assert source[0] == {"key": "a.png", "image": png(0), "caption": "a cat", "tags": ["x", "y"]}
    with pytest.raises(BadRecord, match=r"gone.png.*cannot read the file"):
        source[1]
    with pytest.raises(BadRecord, match="cannot read the file: embedded null"):
        source[2]
    assert [row.get("label") for row in source.metadata()] == [None, None, "3"]  # a class, not the id of a caption


def test_jsonl_with_lists_of_captions_alone(tmp_path):
    image_folder(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file": "a.png", "captions": ["x", "y"]}\n')
    assert list(open_source(str(tmp_path)).metadata()) == [{"key": "a.png", "caption": "x", "captions": ["x", "y"]}]


def test_class_folders(tmp_path):
    image_folder(tmp_path, "red_fox/1.PNG", "red_fox/notes.txt", "cat/2.png")
    source = open_source(str(tmp_path))
    assert [(r["key"], r["caption"]) for r in source.metadata()] == [("cat/2.png", "cat"), ("red_fox/1.PNG", "red fox")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "captions.csv",
            "file,words\na.png,x\n",
            "no column 'caption' or 'captions' or 'text' or 'title' or 'label', only: file, words",
        ),
        ("captions.csv", "id,caption\na.png,x\n", "no column 'file'"),
        ("captions.csv", "file,caption\n", "no rows"),
        ("captions.csv", "file,caption\n,x\n", "line 2: column 'file' must name a file"),
        ("captions.csv", 'file,caption\na.png,"x\n', "comma-separated UTF-8"),
        ("captions.csv", b"file,caption\na.png,\xff\xfe\n", "line 2 is not UTF-8"),
        (
            "captions.csv",
            "file,caption\na.png,x,\nb.png,a cat, asleep\n",
            "line 3 has more cells than the heading",
        ),
        ("metadata.jsonl", "{bad\n", "one JSON object a line"),
        ("metadata.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("metadata.jsonl", "", "no rows"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n', "no column 'caption'"),
        ("metadata.jsonl", '{"file_name": 3, "text": "x"}\n', "must name a file"),
    ],
)
def test_bad_tables(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        open_source(str(tmp_path))
    assert name in one_line(error)


def test_bad_paths(tmp_path):
    (tmp_path / "x.bin").write_text("x")
    write_raw(tmp_path / "empty.array_record", [])
    (tmp_path / "broken.array_record").write_bytes(b"nonsense" * 100)
    (tmp_path / "flat").mkdir()
    image_folder(tmp_path / "flat", "a.png")
    cases = {
        "missing/folder": "does not exist",
        "missing/*.array_record": "does not exist",
        "x.bin": "unknown kind of file",
        "empty.array_record": "has no records",
        "broken.array_record": "cannot read ArrayRecord",
        "flat": "captions.csv",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            open_source(str(tmp_path / name))
        assert name in one_line(error)
    for spec, message in {
        "emoji:test": "emoji:new_style",
        "emojy:train": "unknown kind",
        "tfds:x": "NAME:SPLIT",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            open_source(spec)
        assert spec in one_line(error)


# -- mixtures ---------------------------------------------------------------------------------------------------------


def test_mixture(tmp_path):
    write_array_record(str(tmp_path / "a.array_record"), records(2))
    sources, weights = open_mixture(f"emoji:new_names*2.5|{tmp_path}/*.array_record | {tmp_path}/*.array_record*3")
    assert [len(source) for source in sources] == [217, 2, 2] and weights == [2.5, 1.0, 3.0]


@pytest.mark.parametrize(
    "spec", ["", "emoji:train|", "emoji:train*0", "emoji:train*-1", "emoji:train*1e999", "emoji:train*1.2.3"]
)
def test_bad_mixture(spec):
    with pytest.raises(UserError):
        open_mixture(spec)


# -- TFDS -------------------------------------------------------------------------------------------------------------


def fake_tfds(monkeypatch, rows, names=None, fail=None):
    calls = []

    class Builder:
        def __init__(self, name):
            features = {key: object() for key in rows[0]}
            if names:
                features["label"] = types.SimpleNamespace(names=names)
            self.info = types.SimpleNamespace(features=features)
            calls.append(name)

        def as_data_source(self, split, decoders):
            if fail:
                raise fail
            calls.extend([split, sorted(decoders)])
            return rows

    module = types.ModuleType("tensorflow_datasets")
    module.builder = Builder
    module.decode = types.SimpleNamespace(SkipDecoding=object)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)
    return calls


@pytest.mark.parametrize(
    ("spec", "name", "split"),
    [
        ("tfds:pets:train", "pets", "train"),
        ("tfds:coco/2017:1.1.0:validation", "coco/2017:1.1.0", "validation"),
        ("tfds:pets:train[:10%]", "pets", "train[:10%]"),
        ("tfds:pets:train[5:10]+test", "pets", "train[5:10]+test"),
    ],
)
def test_tfds_classes(monkeypatch, spec, name, split):
    rows = [{"image": png(i), "label": np.int64(i)} for i in range(2)]
    calls = fake_tfds(monkeypatch, rows, names=["red_fox", "cat"])
    source = open_source(spec)
    assert calls == [name, split, ["image"]]
    assert source[0] == {"key": f"{spec}[0]", "image": png(0), "class_id": 0, "caption": "red fox"}
    assert [r["caption"] for r in source.__getitems__([1, 0])] == ["cat", "red fox"]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_tfds_reads_a_prepared_set_without_tensorflow(tmp_path):
    code = """
import io, sys
import tensorflow_datasets as tfds

class Colours(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["red_fox", "cat"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(2):
            yield i, {"image": io.BytesIO(bytes.fromhex(sys.argv[1])), "label": i}

Colours(file_format="array_record").download_and_prepare()
from florence_jax.data.sources.catalog import open_source
source = open_source("tfds:colours:train")
print([(row.pop("image").hex() == sys.argv[1], row) for row in sorted(source.__getitems__([0, 1]), key=str)])
assert "tensorflow" not in sys.modules
"""
    program = tmp_path / "prepare.py"
    program.write_text(code)
    done = subprocess.run(
        [sys.executable, str(program), png().hex()],
        env=os.environ | {"TFDS_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [row for same, row in ast.literal_eval(done.stdout.splitlines()[-1]) if same]
    assert {row["caption"]: row["class_id"] for row in rows} == {"red fox": 0, "cat": 1}
    assert {row["key"] for row in rows} == {"tfds:colours:train[0]", "tfds:colours:train[1]"}


def test_tfds_texts(monkeypatch):
    captions = {"id": np.array([1, 2]), "text": np.array([b"one", "zwei ü".encode()], object)}
    fake_tfds(
        monkeypatch, [{"image": png(), "captions": captions, "title": b"big"}, {"image": png(), "captions": captions}]
    )
    source = open_source("tfds:coco:train")
    assert source[0]["caption"] == "big" and source[0]["captions"] == ["one", "zwei ü"]
    assert isinstance(source[0]["image"], bytes)


def test_tfds_labels_that_are_no_class(monkeypatch):
    rows = [{"image": png(), "label": np.int64(-1)}, {"image": png(), "label": b"cat"}]
    fake_tfds(monkeypatch, rows, names=["red_fox", "dog"])
    source = open_source("tfds:pets:train")
    assert source[0] == {"key": "tfds:pets:train[0]", "image": png(), "class_id": -1}
    assert source[1]["label"] == "cat" and "caption" not in source[1]


def test_tfds_damaged_record_is_a_bad_record_in_its_place(monkeypatch):
    class Rows(list):
        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("checksum\nof a chunk")
            return super().__getitem__(index)

        def __getitems__(self, indices):
            return [self[i] for i in indices]

    fake_tfds(monkeypatch, Rows({"image": png(i)} for i in range(3)))
    rows = open_source("tfds:pets:train").__getitems__([2, 1, 0])
    assert [isinstance(row, BadRecord) for row in rows] == [False, True, False] and "checksum" in str(rows[1])


def test_tfds_mistakes(monkeypatch):
    fake_tfds(monkeypatch, [{"image": png()}], fail=RuntimeError("not prepared\nsecond line"))
    with pytest.raises(UserError, match="tfds build pets --file_format=array_record") as error:
        open_source("tfds:pets:train")
    assert "not prepared" in one_line(error)
    fake_tfds(monkeypatch, [{"audio": b""}])
    with pytest.raises(UserError, match="no feature 'image', only: audio"):
        open_source("tfds:speech:train")
    with pytest.raises(UserError, match="NAME:SPLIT"):
        open_source("tfds:pets")
