"""Files: whole or not at all, here and in buckets; tables of text, whole and in parts."""

import csv
import io
import os

import fsspec
import numpy as np
import pytest

from florence_jax.errors import UserError
from florence_jax.files import (
    csv_cells,
    has_many_lines,
    read_json,
    replacing,
    table_rows,
    with_home,
    write_file,
    write_json,
    write_text,
)


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with pytest.raises(RuntimeError, match="half-way"), replacing(path) as temporary:
        with open(temporary, "w") as file:
            file.write("ha")
        assert [p.name for p in path.parent.iterdir()] == [temporary.rpartition("/")[2]]
        raise RuntimeError("half-way")
    assert list(path.parent.iterdir()) == []
    size, digest = write_text(path, "whole \ud800")
    assert path.read_text() == "whole ?" and size == 7 and len(digest) == 64
    with pytest.raises(RuntimeError):
        write_file(path, lambda temporary: (_ for _ in ()).throw(RuntimeError("no")))
    assert path.read_text() == "whole ?" and len(list(path.parent.iterdir())) == 1


def test_the_same_in_a_bucket():
    write_json("memory://ground/x.json", {"b": 1, "a": "é"})
    assert read_json("memory://ground/x.json") == {"a": "é", "b": 1} and read_json("memory://ground/y.json") is None
    fs = fsspec.filesystem("memory")
    with pytest.raises(RuntimeError), replacing("memory://ground/z.json"):
        raise RuntimeError("no")
    assert [path.rpartition("/")[2] for path in fs.ls("/ground", detail=False)] == ["x.json"]
    fs.pipe_file("/ground/t.csv", b"a\n1\n")
    assert [row.fields for row in table_rows("memory://ground/t.csv")] == [{"a": "1"}]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_read_in_parts_are_those_of_the_whole(tmp_path, mark, end):
    """Against the csv module on the whole text; quoted line breaks, empty lines and long characters inside."""
    rng = np.random.default_rng(0)
    cells = [["".join(rng.choice(list('aé犬",\n '), rng.integers(0, 9))) for _ in "ab"] for _ in range(40)]
    text = io.StringIO(newline="")
    for number, row in enumerate([["x", "y"], *cells]):
        csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL).writerow(row)
        text.write(end * (number % 3 == 2))  # an empty line
    (tmp_path / "t.csv").write_text(mark + text.getvalue(), "utf-8", newline="")
    expected = [
        dict(zip("xy", row, strict=True)) for row in csv.reader(io.StringIO(text.getvalue(), newline="")) if row
    ][1:]
    rows = list(table_rows(tmp_path / "t.csv"))
    assert [row.fields for row in rows] == expected and rows[0].at == len(mark.encode()) + len(f'"x","y"{end}')
    for first, last in ((0, 13), (13, 14), (14, 40)):
        stop = rows[last].at if last < 40 else -1
        part = list(table_rows(tmp_path / "t.csv", rows[first].at, stop))
        assert [(row.at, row.fields) for row in part] == [(row.at, row.fields) for row in rows[first:last]]


def test_json_lines_and_short_rows(tmp_path):
    (tmp_path / "t.jsonl").write_bytes('\ufeff{"a": "é"}\n\n{"a": [1]}\n'.encode())
    rows = list(table_rows(tmp_path / "t.jsonl"))
    assert rows == [(1, 3, {"a": "é"}), (3, 16, {"a": [1]})]
    assert list(table_rows(tmp_path / "t.jsonl", 16)) == [(1, 16, {"a": [1]})]
    (tmp_path / "t.csv").write_text("a,b\n1\n2,3,  \n")
    assert [row.fields for row in table_rows(tmp_path / "t.csv")] == [{"a": "1"}, {"a": "2", "b": "3"}]
    assert list(csv_cells(tmp_path / "t.csv"))[1] == (2, 4, ["1"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"a,b\n1,2,3\n", r"line 2 has more cells than the heading \(1,2,3\)"),
        ("t.csv", b'a\n"1\n', "line 2: unexpected end of data; it must be comma-separated"),
        ("t.csv", b"a\n\xe9\n", r"line 2 is not UTF-8 \(\\xe9\); save the file as UTF-8, .* iconv -f LATIN1"),
        ("t.csv", b'f,c\na.png,"x\nb.png,y\nc.png,z"\n', "line 4 has a text in quotes that goes on over .* 'b.png,y'"),
        ("t.csv", b'f,c\na.png,"x" y\n', "line 2: ',' expected after '\"'; it must be comma-separated .* doubled"),
        ("t.tsv", b'f\tc\na.png\t"x\n', "line 2: unexpected end of data; it must be tab-separated"),
        ("t.tsv", b"f\tc\na.png\tx\ty\n", r"line 2 has more cells than the heading"),
        ("t.jsonl", b'{"a": 1}\n{\n', "line 2: .* it must have one JSON object a line"),
        ("t.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("t.jsonl", b'{"a": 1}\n\xe9\n', "line 2 is not UTF-8"),
        ("none.csv", None, "cannot read .*none.csv"),
    ],
)
def test_what_is_no_table_is_one_message(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(table_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "file,caption\na.png,one; two|three\n"),
        ("t.csv", "file\tcaption\na.png\tone; two|three\n"),
        ("t.tsv", "file\tcaption\na.png\tone; two|three\n"),
        ("t.csv", 'file;caption\na.png;"one; two|three"\n'),
        ("t.txt", 'file| caption\na.png|"one; two|three"\n'),
    ],
)
def test_what_is_between_cells_is_seen_from_the_heading(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (row,) = table_rows(tmp_path / name)
    assert row.fields == {"file": "a.png", "caption": "one; two|three"}
    assert [part.fields for part in table_rows(tmp_path / name, row.at)] == [row.fields]


def test_texts_of_several_lines_are_read_and_many_lines_noticed(tmp_path):
    (tmp_path / "t.csv").write_text('file,caption\na.png,"one,\ntwo, three"\nb.png,"1\n2\n3\n4\n5"\n')
    first, second = table_rows(tmp_path / "t.csv")
    assert first.fields["caption"] == "one,\ntwo, three"
    assert has_many_lines(second.fields) and not has_many_lines(first.fields)


def test_home_stands_for_a_tilde_wherever_a_path_begins(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    given = ["--init=~/run", "~/x", "--input=a=~/p|b=~", "karpathy:~/f.json:train@~/images", "a~/b", "--text=~5 km"]
    expected = ["--init=/home/a/run", "/home/a/x", "--input=a=/home/a/p|b=/home/a"]
    expected += ["karpathy:/home/a/f.json:train@/home/a/images", "a~/b", "--text=~5 km"]
    assert with_home(given) == expected
    monkeypatch.setattr("sys.argv", ["program", "--out=~/o"])
    assert with_home(None) == ["--out=/home/a/o"]


def test_json_keeps_names_that_are_not_utf_8(tmp_path):
    value = {"file": os.fsdecode(b"bl\xe5.png"), "text": "blå"}
    write_json(tmp_path / "a.json", value)
    assert read_json(str(tmp_path / "a.json")) == value
    assert "blå" in (tmp_path / "a.json").read_text(encoding="utf-8")
