"""Tables of captions as people have them: what training and retrieval read of them, and what is refused by name."""

import io
import json
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from florence_jax.curation.ingest.inputs import list_inputs, read_split
from florence_jax.data.classes import open_classes
from florence_jax.data.records import summary_of
from florence_jax.data.sources.array_record import write_array_record
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.fields import caption_texts
from florence_jax.errors import UserError
from florence_jax.files import expand_braces
from florence_jax.params.weights import checkpoint_folder


def encoded():
    file = io.BytesIO()
    Image.fromarray(np.full((12, 16, 3), 90, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded())
    return tmp_path


ROWS = [{"Image_Path": f"{i}.png", "Text": f"picture {i}"} for i in range(3)]


def write(path, rows):
    """A table of rows by the suffix of its name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if path.suffix == ".tsv" else "|" if path.suffix == ".txt" else ","
        path.write_text("\n".join(mark.join(map(str, row)) for row in [list(rows[0]), *(row.values() for row in rows)]))
    return str(path)


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.txt", "x.jsonl", "x.parquet"])
def test_a_table_can_be_named_itself(pictures, name):
    source = open_source(write(pictures / name, ROWS))
    assert [(row["key"], row["caption"]) for row in source.metadata()] == [(f"{i}.png", f"picture {i}") for i in "012"]
    assert source[1]["image"] == encoded()
    assert f"{name}: 3 rows of 3 pictures, 3 distinct captions, such as 'picture 0'" in source.summary["says"]


@pytest.mark.parametrize("name", ["captions.tsv", "captions.parquet", "metadata.parquet"])
def test_tables_of_other_kinds_beside_pictures(pictures, name):
    write(pictures / name, ROWS)
    assert [row["caption"] for row in open_source(str(pictures)).metadata()] == ["picture 0", "picture 1", "picture 2"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_a_column_of_lists_is_several_captions(pictures, name):
    rows = [{"path": f"{i}.png", "caption": ["a", f"b {i}"], "size": i} for i in range(3)]
    source = open_source(write(pictures / name, rows))
    assert source[1]["captions"] == ["a", "b 1"] and source[1]["caption"] == "a" and source[1]["size"] == 1
    assert source.summary["distinct"] == 4


def test_lists_in_a_csv_and_objects(pictures):
    (pictures / "captions.csv").write_text("file,caption\n0.png,\"['it is', 'two']\"\n1.png,one\n")
    assert [row["captions"] for row in open_source(str(pictures)).metadata()] == [["it is", "two"], ["one"]]


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("a", ["a"]),
        (" ", []),
        (["a", None, "", "b"], ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ("['it', \"b\"]", ["it", "b"]),
        ("[1, 2]", ["[1, 2]"]),
        ("[a cat]", ["[a cat]"]),
        ([{"raw": "x", "sentid": 3}, {"raw": "y"}], ["x", "y"]),
        ({"raw": ["x", "y"]}, ["x", "y"]),
        (np.array(["a", "b"], object), ["a", "b"]),
        (7, ["7"]),
        (float("nan"), []),
        (None, []),
        (b"\xc3\xa9", ["é"]),
    ],
)
def test_captions_in_a_field(value, texts):
    assert caption_texts(value) == texts


def test_absolute_paths(pictures):
    source = open_source(write(pictures / "x.csv", [{"path": f"{pictures}/{i}.png", "text": "a"} for i in range(2)]))
    assert source[1]["image"] == encoded() and source.summary["passed_over"] == {"not in the table": 1}


def test_what_a_stray_quote_swallowed_is_suspicious(pictures):
    (pictures / "captions.csv").write_text('file,caption\n0.png,"a\nb\nc\nd\ne"\n1.png,one\n')
    says = open_source(str(pictures)).summary["says"]
    assert "1 rows have texts of many lines, the first ends in line 6: is a quote missing there?" in says
    (pictures / "captions.csv").write_text('file,caption\n0.png,"a\n1.png,b\n2.png,c"\n')
    with pytest.raises(UserError, match=r"line 4 has a text in quotes that goes on over .*'1.png,b'"):
        open_source(str(pictures))


def test_nothing_there_is_an_error(pictures):
    with pytest.raises(UserError, match="none of its 1 pictures is there, such as 'gone.png'"):
        open_source(write(pictures / "x.jsonl", [{"file": "gone.png", "caption": "x"}]))
    with pytest.raises(UserError, match="every caption of its 1 rows is empty"):
        open_source(write(pictures / "y.jsonl", [{"file": "0.png", "caption": ""}]))


@pytest.mark.parametrize("spec", ["{000..001}.tar", "*.tar", "000.tar", "x.parquet", "."])
def test_what_training_cannot_read_is_one_message_with_the_command(tmp_path, spec):
    for name in ("000.tar", "001.tar"):
        tarfile.open(tmp_path / name, "w").close()
    pq.write_table(pa.table({"image": [b"x"], "caption": ["y"]}), tmp_path / "x.parquet")
    spec = str(tmp_path / spec)
    with pytest.raises(UserError, match=r"ArrayRecord|parquet files") as told:
        open_source(spec)
    assert f"curation.main --config=configs/curate.py '--input={spec}'" in str(told.value) or "{" not in spec
    assert f"--input={spec}" in str(told.value) and "--config.data.train=runs/curated/output" in str(told.value)


@pytest.mark.parametrize("spec", ["", "/*.parquet", "/{0..1}.parquet"])
def test_several_parquet_files_of_paths_are_one_table(pictures, spec):
    folder = pictures / "tables"
    folder.mkdir()
    rows = [{"path": f"../{i}.png", "caption": f"picture {i}"} for i in range(3)]
    write(folder / "0.parquet", rows[:2])
    write(folder / "1.parquet", rows[2:])
    source = open_source(f"{folder}{spec}")
    assert [row["caption"] for row in source.metadata()] == ["picture 0", "picture 1", "picture 2"]
    assert source[2]["image"] == encoded()
    assert "2 parquet files: 3 rows of 3 pictures" in source.summary["says"] and "passed" not in source.summary["says"]


def test_a_column_of_classes_is_the_caption_where_there_is_no_other(pictures):
    rows = [{"file": f"{i}.png", "label": ["cat", "dog"][i % 2]} for i in range(3)]
    source = open_source(write(pictures / "x.csv", rows))
    assert "they are the classes in the column 'label'" in source.summary["says"]
    assert open_classes(source).first_names == ["cat", "dog"]
    (split,) = list_inputs(str(pictures / "x.csv"), 9)[0].splits
    assert [pair["caption"] for pair in read_split(split, 1 << 20)] == ["cat", "dog", "cat"]
    both = [{"caption": "", **row} for row in rows[:1]] + [{"caption": "a dog", **row} for row in rows[1:]]
    assert [row["caption"] for row in open_source(write(pictures / "y.csv", both)).metadata()] == ["", "a dog", "a dog"]


@pytest.mark.parametrize("mark", [";", "|", ", "])
def test_a_column_of_several_classes(pictures, mark):
    rows = [{"file": "0.png", "labels": f"cat{mark}dog"}, {"file": "1.png", "labels": "dog"}]
    path = write(pictures / "x.jsonl", rows)
    classes = open_classes(source := open_source(path))
    assert classes.multi and classes.first_names == ["cat", "dog"]
    assert [classes.target(row).tolist() for row in source.metadata()] == [[1, 1], [0, 1]]


def test_a_table_of_another_name_is_told_of(pictures):
    write(pictures / "results.csv", ROWS)
    with pytest.raises(UserError, match="A table of another name is named itself: .*/results.csv"):
        open_source(str(pictures))


def test_blanks_behind_bars_are_no_part_of_a_caption(pictures):
    (pictures / "results.csv").write_text("image_name| comment_number| comment\n0.png| 0| A cat .\n0.png| 1| A pet .\n")
    (record,) = open_source(str(pictures / "results.csv")).metadata()
    assert record["captions"] == ["A cat .", "A pet ."] and record["comment_number"] == ["0", "1"]


def test_a_parquet_of_links_says_so(tmp_path):
    with pytest.raises(UserError, match="has no column of paths .* only: url, caption; .*img2dataset"):
        open_source(write(tmp_path / "x.parquet", [{"url": "https://x.example/1.png", "caption": "x"}]))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://x.example/a.tar", "download it first"),
        ("nosuch://box/x", "Protocol not known"),
    ],
)
def test_urls_that_training_cannot_open(url, message):
    with pytest.raises(UserError, match=f"cannot open {url}.*{message}"):
        open_source(url)


def test_braces():
    assert expand_braces("a/{008..010}.tar") == ["a/008.tar", "a/009.tar", "a/010.tar"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("plain") == ["plain"] and expand_braces("{x}") == ["{x}"]


@pytest.mark.parametrize("opens", [open_source, checkpoint_folder, lambda url: list_inputs(f"x={url}", 9)])
def test_a_store_without_its_package_or_network_is_one_message(opens, monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UserError, match="^cannot open s3://box/x: Install s3fs to access S3; pip install s3fs$"):
        opens("s3://box/x")

    class Unreachable:
        def exists(self, path):
            raise RuntimeError("no route")

    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (Unreachable(), url))
    with pytest.raises(UserError, match="^cannot reach s3://box/x: no route$"):
        opens("s3://box/x")


def test_records_say_what_they_are(tmp_path):
    records = [{"key": str(i), "image": encoded(), "caption": "a", "captions": ["a", f"b {i}"]} for i in range(20)]
    write_array_record(str(tmp_path / "x.array_record"), records)
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path))))
    assert summary_of(source)["says"] == (
        f"{tmp_path}: 1 files, 20 records; of 8 looked at 9 distinct captions, such as 'a'; fields: caption, captions, "
        "key"
    )
    assert summary_of(open_source("emoji:new_names")) == {}
