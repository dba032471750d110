"""Inputs of curation: every kind, the names people use, damage, mistakes."""

import csv
import dataclasses
import io
import json
import tarfile

import apache_beam as beam
import fsspec
import pyarrow as pa
import pytest
from apache_beam.testing.util import assert_that, equal_to
from curation_tools import pairs, picture, write_parquet

from florence_jax.curation.filters.opt_out import OptOutRules, decide_headers
from florence_jax.curation.ingest import readers
from florence_jax.curation.ingest.inputs import DamagedInput, ReadPairs, list_inputs, list_splits, read_split
from florence_jax.curation.ingest.readers import make_pair
from florence_jax.data.sources.array_record import write_array_record
from florence_jax.errors import UserError
from florence_jax.files import read_bytes


def read(spec, rows=5, max_bytes=1 << 20):
    return [pair for split in list_splits(str(spec), rows) for pair in read_split(split, max_bytes)]


def write_tar(path, samples, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in samples:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_parquet_bytes_paths_and_struct(tmp_path):
    rows = pairs(12)
    write_parquet(tmp_path / "bytes" / "0.parquet", rows, group=4)
    found = read(tmp_path / "bytes", rows=4)
    assert [p["key"] for p in found] == [row["key"] for row in rows]
    assert all(
        p["image"] == row["image"] and p["caption"] == row["caption"] for p, row in zip(found, rows, strict=True)
    )
    assert {p["source"] for p in found} == {"bytes"} and found[0]["locator"] is None and found[3]["url"]
    assert len(list_splits(str(tmp_path / "bytes"), 4)) == 3 and len(list_splits(str(tmp_path / "bytes"), 5)) == 2

    (tmp_path / "paths").mkdir()
    (tmp_path / "paths" / "x.png").write_bytes(picture(1))
    named = [{"image_path": "x.png", "TEXT": "red"}, {"image_path": "gone.png", "TEXT": None}]
    write_parquet(tmp_path / "paths" / "p.parquet", named)
    good, gone = read(f"n={tmp_path / 'paths'}")
    assert (good["key"], good["caption"], good["image"], good["source"]) == ("x.png", "red", picture(1), "n")
    assert (gone["problem"], gone["caption"], gone["image"]) == ("missing", "", b"")
    assert read_bytes(*good["locator"]) == picture(1)

    struct = [{"image": {"bytes": picture(2), "path": "a.png"}, "text": "blue", "similarity": 0.25, "tags": ["t"]}]
    write_parquet(tmp_path / "struct.parquet", struct)
    (pair,) = read(tmp_path / "struct.parquet")
    assert (pair["image"], pair["key"]) == (picture(2), "struct[0]")  # that path is often one name for all rows
    assert pair["extra"] == {"similarity": 0.25, "tags": ["t"]}


def test_img2dataset_tar_with_its_parquet_beside_it(tmp_path):
    meta = json.dumps({"key": "other", "url": "https://b.example/1", "license": "MIT", "caption": "from json"}).encode()
    samples = [("000000001.jpg", picture(1)), ("000000001.txt", b"a cup"), ("000000001.json", meta)]
    samples += [("000000002.json", meta), ("d/3.PNG", picture(3)), ("d/3.txt", "caf\xe9".encode("latin1"))]
    write_tar(tmp_path / "00000.tar", samples)
    write_parquet(tmp_path / "00000.parquet", [{"key": "000000001", "caption": "a cup", "status": "success"}])
    first, second, third = sorted(read(f"web={tmp_path}"), key=lambda pair: pair["key"])
    assert (first["key"], first["caption"], first["licence"]) == ("00000/000000001", "a cup", "MIT")
    assert first["url"] == "https://b.example/1" and read_bytes(*first["locator"]) == picture(1)
    assert (second["caption"], second["problem"]) == ("from json", "missing")
    assert (third["key"], third["image"], third["caption"]) == ("00000/d/3", picture(3), "caf\ufffd")
    write_tar(tmp_path / "z.tar.gz", samples[:2], "w:gz")
    (packed,) = read(tmp_path / "z.tar.gz")
    assert packed["image"] == picture(1) and packed["locator"] is None


def test_folders_with_tables_sidecars_and_subfolders(tmp_path):
    table = tmp_path / "table"
    table.mkdir()
    (table / "a.png").write_bytes(picture(1))
    with open(table / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([["File", "caption", "headers"], ["a.png", "one, two", '["X-Robots-Tag: noai"]']])
    (pair,) = read(table)
    assert (pair["caption"], pair["headers"], pair["image"]) == ("one, two", ["X-Robots-Tag: noai"], picture(1))
    (table / "captions.csv").write_text("file,caption\na.png,a cat, asleep\n")
    with pytest.raises(UserError, match=r"more cells than the heading \(a.png,a cat, asleep\)"):
        read(table)
    (table / "captions.csv").unlink()
    (table / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "x"}\n\n{"file_name": "b.png", "text": "y"}\n'
    )
    assert [(p["key"], p["problem"]) for p in read(table, rows=1)] == [("a.png", ""), ("b.png", "missing")]
    (table / "metadata.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"metadata.jsonl: line .* not a JSON object"):
        read(table)

    files = tmp_path / "files" / "00000"
    files.mkdir(parents=True)
    (files / "1.jpg").write_bytes(picture(2, kind="JPEG"))
    (files / "1.txt").write_text("side")
    (files / "1.json").write_text('{"url": "https://c.example", "x_robots_tag": "noindex"}')
    (pair,) = read(tmp_path / "files")
    assert (pair["key"], pair["caption"], pair["headers"]) == ("00000/1.jpg", "side", ["X-Robots-Tag: noindex"])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"headers": ["Server: x", "X-Robots-Tag: noai"]}, "x_robots"),
        ({"headers": {"X-Robots-Tag": "noai"}}, "x_robots"),
        ({"headers": {"X-Robots-Tag": ["nofollow", "noai"]}}, "x_robots"),
        ({"headers": '{"X-Robots-Tag": ["noai"]}'}, "x_robots"),
        ({"headers": {"x_robots_tag": "noai", "tdm_reservation": None}}, "x_robots"),  # a struct of a column
        ({"headers": {"X-Robots-Tag": None, "tdm-reservation": 1}}, "tdm_reservation"),
        ({"headers": [("Server", "x"), ("X-Robots-Tag", "noai")]}, "x_robots"),  # a map, as pyarrow gives it
        ({"headers": [(b"X-Robots-Tag", b"noai")]}, "x_robots"),
        ({"headers": '[["X-Robots-Tag", "noai"]]'}, "x_robots"),
        ({"headers": [{"X-Robots-Tag": "noai"}]}, "x_robots"),
        ({"headers": b"X-Robots-Tag: noai"}, "x_robots"),
        ({"headers": [b"X-Robots-Tag: noai"]}, "x_robots"),
        ({"headers": "tdm-reservation: 1"}, "tdm_reservation"),
        ({"headers": "Content-Usage: train-ai=n"}, "content_usage"),
        ({"headers": "HTTP/1.1 200 OK\r\nX-Robots-Tag: noai\r\nContent-Type: image/png\r\n\r\n"}, "x_robots"),
        ({"headers": "Content-Type: image/png\nAccept-Ranges: none\nX-Other: none"}, None),
        ({"headers": ["X-Other: none"]}, None),
        ({"headers": ["noai"]}, "x_robots"),
        ({"headers": "googlebot: noai"}, "x_robots"),
        ({"x_robots_tag": "googlebot: noai"}, "x_robots"),
        ({"x_robots_tag": ["googlebot: noai", "nofollow"]}, "x_robots"),
        ({"x_robots_tag": '"noai"'}, "x_robots"),
        ({"x_robots_tag": b"max-snippet: 5, noai"}, "x_robots"),
        ({"x_robots_tag": "X-Robots-Tag: noai"}, "x_robots"),
        ({"x_robots_tag": "max-snippet: 5\nnofollow"}, None),
        ({"headers": [], "x_robots_tag": "noai"}, "x_robots"),
        ({"headers": ["Server: x"], "response_headers": {"tdm-reservation": "1"}}, "tdm_reservation"),
        ({"headers": None}, None),
        ({"headers": 7}, None),
    ],
)
def test_opt_outs_in_every_form_of_headers(fields, reason):
    decision = decide_headers(make_pair(fields, "s", "k", "", 9)["headers"], OptOutRules())
    assert (decision and decision[0]) == reason


def test_a_map_of_parquet_gives_headers(tmp_path):
    headers = pa.array([[("X-Robots-Tag", "noai")]], pa.map_(pa.string(), pa.string()))
    pa.parquet.write_table(pa.table({"image": [picture(1)], "headers": headers}), tmp_path / "p.parquet")
    (pair,) = read(tmp_path / "p.parquet")
    assert pair["headers"] == ["X-Robots-Tag: noai"]


def test_array_record_and_fsspec(tmp_path):
    rows = pairs(7)
    write_array_record(str(tmp_path / "p.array_record"), rows)
    found = read(tmp_path / "p.array_record", rows=3)
    assert [(p["key"], p["image"]) for p in found] == [(row["key"], row["image"]) for row in rows]
    local = write_parquet(tmp_path / "q.parquet", rows)
    with fsspec.open("memory://box/q.parquet", "wb") as file, open(local, "rb") as source:
        file.write(source.read())
    assert [p["caption"] for p in read("m=memory://box/*.parquet")] == [row["caption"] for row in rows]
    write_tar(tmp_path / "t.tar", [("1.png", picture(1)), ("1.txt", b"x"), ("2.png", picture(2))])
    with fsspec.open("memory://tars/t.tar", "wb") as file:
        file.write((tmp_path / "t.tar").read_bytes())
    found = read("m=memory://tars/*.tar")
    assert [(p["key"], p["caption"], p["image"]) for p in found] == [("t/1", "x", picture(1)), ("t/2", "", picture(2))]
    assert [read_bytes(*p["locator"]) for p in found] == [picture(1), picture(2)]


def test_large_images_are_not_read(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.png").write_bytes(picture(1))
    (tmp_path / "f" / "captions.csv").write_text("file,caption\na.png,x\n")
    write_tar(tmp_path / "t.tar", [("1.png", picture(1)), ("1.txt", b"x")])
    write_parquet(tmp_path / "p.parquet", pairs(1))
    for spec in ("f", "t.tar", "p.parquet"):
        (pair,) = read(tmp_path / spec, max_bytes=100)
        assert (pair["problem"], pair["image"]) == ("too_many_bytes", b"")


def test_large_images_are_not_read_and_leave_the_next_sample_alone(tmp_path):
    large = picture(1, (200, 200))
    samples = [("a.jpg", large), ("b.jpg", picture(2)), ("b.txt", b"x"), ("c.md", b"?"), ("d.txt", b"y")]
    samples += [("d.jpg", picture(3)), ("e.jpg", large)]
    write_tar(tmp_path / "t.tar", samples)
    found = [(p["key"], p["problem"]) for p in read(tmp_path / "t.tar", max_bytes=len(large) - 1)]
    assert sorted(found) == [("t/a", "too_many_bytes"), ("t/b", ""), ("t/d", ""), ("t/e", "too_many_bytes")]


@pytest.mark.parametrize("size", [12345, "12345"])
def test_a_size_in_bytes_is_not_the_picture(tmp_path, size):
    (tmp_path / "x.png").write_bytes(picture(1))
    write_parquet(tmp_path / "p.parquet", [{"bytes": size, "image_path": "x.png"}])
    (pair,) = read(tmp_path / "p.parquet")
    assert (pair["key"], pair["image"], pair["extra"]) == ("x.png", picture(1), {"bytes": size})
    write_parquet(tmp_path / "q.parquet", [{"bytes": picture(2)}])
    assert read(tmp_path / "q.parquet")[0]["image"] == picture(2)


@pytest.mark.parametrize(
    ("name", "head", "row"),
    [
        ("captions.csv", "\ufefffile,caption\n", '{}.png,"caf\u00e9\n{}"\r\n\n'),
        ("metadata.jsonl", "\ufeff\n", '{{"file": "{}.png", "caption": "caf\u00e9\\n{}"}}\n \n'),
    ],
)
def test_a_table_is_read_once_for_all_its_splits(tmp_path, monkeypatch, name, head, row):
    text = head + "".join(row.format(i, i) for i in range(20))
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    splits = list_splits(f"x={tmp_path}", 3)
    sizes = []

    def read_some(*args):
        sizes.append(len(data := read_bytes(*args)))
        return data

    monkeypatch.setattr("florence_jax.files.read_bytes", read_some)
    found = [(p["key"], p["caption"]) for split in splits for p in read_split(split, 99)]
    assert found == [(f"{i}.png", f"caf\u00e9\n{i}") for i in range(20)]
    assert len(splits) == 7 and sum(sizes) <= (tmp_path / name).stat().st_size


def test_damage_comes_after_the_good_pairs(tmp_path):
    write_tar(tmp_path / "t.tar", [(f"{i}.png", picture(i)) for i in range(4)])
    data = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(data[: len(data) // 2])
    found = []
    with pytest.raises(DamagedInput, match=r"t\.tar"):
        for pair in read_split(list_splits(str(tmp_path / "t.tar"), 9)[0], 1 << 20):
            found.append(pair["key"])
    assert found and found == [f"t/{i}" for i in range(len(found))]


def test_a_tar_cut_or_damaged_at_a_header_is_noticed(tmp_path):
    write_tar(tmp_path / "t.tar", [(f"{i}.png", picture(i)) for i in range(3)])
    data = (tmp_path / "t.tar").read_bytes()
    header = data.index(b"2.png\0")
    for broken in (data[:header], data[:header] + b"#" * 512 + data[header + 512 :]):
        (tmp_path / "t.tar").write_bytes(broken)
        (split,) = list_splits(f"t={tmp_path}/t.tar", 100)
        keys = []
        with pytest.raises(DamagedInput, match="no mark of the end after 1"):
            for pair in read_split(split, 1 << 26):
                keys.append(pair["key"])
        assert keys == ["t/0", "t/1"]


def test_a_url_that_nothing_here_can_open_is_one_message():
    with pytest.raises(UserError, match="cannot open nosuch://box/x"):
        list_splits("a=nosuch://box/x", 10)


def test_mistakes(tmp_path):
    (tmp_path / "empty").mkdir()
    for spec, message in (
        (f"x={tmp_path}/none", "does not exist"),
        (str(tmp_path / "empty"), "nothing to read"),
        ("", "no input"),
    ):
        with pytest.raises(UserError, match=message):
            list_splits(spec, 9)
    path = write_parquet(tmp_path / "p.parquet", pairs(1))
    with pytest.raises(UserError, match="two sources named 'a'"):
        list_splits(f"a={path}|a={path}", 9)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"cannot read .*bad\.parquet"):
        list_splits(str(tmp_path / "bad.parquet"), 9)


def test_stamps_follow_the_content_and_splits_cover_every_row_once(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", pairs(40), group=7)
    before = list_splits(path, 10)
    assert [p["key"] for s in before for p in read_split(s, 1 << 20)] == [row["key"] for row in pairs(40)]
    assert list_splits(path, 10) == before and len({s.identity() for s in before}) == len(before) > 1
    write_parquet(tmp_path / "p.parquet", pairs(41), group=7)
    assert not {s.identity() for s in list_splits(path, 10)} & {s.identity() for s in before}


def test_a_sub_folder_for_each_class_is_the_caption_where_no_texts_are(tmp_path):
    for place in ("red_cups/a/0.png", "red_cups/1.png", "cats/2.png"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(picture(0))
    assert {pair["key"]: pair["caption"] for pair in read(tmp_path)} == {
        "a/0.png": "red cups",
        "red_cups/1.png": "red cups",
        "cats/2.png": "cats",
    }
    says = list_inputs(str(tmp_path), 9)[0].summary["says"]
    assert "3 read as pictures, captions from the names of 2 sub-folders; " in says
    for text in ("red_cups/1.txt", "cats/2.txt"):
        (tmp_path / text).write_text("a cup")
    assert sorted(pair["caption"] for pair in read(tmp_path)) == ["", "a cup", "a cup"]


def test_files_and_folders_of_one_name_have_keys_of_their_own(tmp_path):
    for place in ("col/p1", "col/p2"):
        (tmp_path / place).mkdir(parents=True)
        write_parquet(tmp_path / place / "part-0.parquet", [{"caption": place}, {"caption": "x"}])
        write_tar(tmp_path / place / "0.tar", [("a.txt", b"x")])
    write_tar(tmp_path / "col" / "p2" / "0.tgz", [("a.txt", b"x")], "w:gz")
    write_parquet(tmp_path / "col" / "p2" / "other.parquet", [{"caption": "x"}])
    keys = [pair["key"] for pair in read(f"x={tmp_path}/col/*/*")]
    assert len(set(keys)) == len(keys) == 8
    assert {"p1/part-0.parquet[0]", "p2/0.tgz/a", "other[0]"} <= set(keys)
    assert [pair["key"] for pair in read(f"x={tmp_path}/col/p1/*.parquet")] == ["part-0[0]", "part-0[1]"]

    for folder in (tmp_path / "f", tmp_path / "f" / "f", tmp_path / "f" / "g"):
        folder.mkdir()
        (folder / "x.png").write_bytes(picture(1))
    assert [pair["key"] for pair in read(tmp_path / "f")] == ["f/x.png", "f/f/x.png", "g/x.png"]


def test_beam_transform(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", pairs(5))
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        found = pipeline | beam.Create(list_splits(path, 2)) | ReadPairs() | beam.Map(lambda pair: pair["key"])
        assert_that(found, equal_to([row["key"] for row in pairs(5)]))


def test_binary_column_under_another_name(tmp_path):
    table = pa.table({"jpg": [picture(1)], "alt": ["x"], "sample_id": [12]})
    pa.parquet.write_table(table, tmp_path / "p.parquet")
    (pair,) = read(tmp_path / "p.parquet")
    assert (pair["key"], pair["caption"], pair["image"]) == ("12", "x", picture(1))


def test_lists_of_captions_and_tab_separated_tables(tmp_path):
    texts = [["a cup", "", "a cup of tea"], ["a glass", "a glass"]]
    write_parquet(tmp_path / "p.parquet", [{"image": picture(i), "captions": texts[i]} for i in range(2)])
    assert [(p["caption"], p["captions"]) for p in read(tmp_path / "p.parquet")] == [
        ("a cup", ["a cup", "a cup of tea"]),
        ("a glass", ["a glass"]),
    ]
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "0.png").write_bytes(picture(0))
    (tmp_path / "f" / "captions.csv").write_text("File\tCaption\n0.png\ta cup, \"blue\"\n0.png\t['x', 'y']\n")
    (pair,) = read(tmp_path / "f")
    assert pair["captions"] == ['a cup, "blue"', "x", "y"] and pair["problem"] == ""
    named = tmp_path / "f" / "results.txt"
    named.write_text("image_name| comment_number| comment\n0.png| 0| a cup\n0.png| 1| tea\n")
    (pair,) = read(named)
    assert [text.strip() for text in pair["captions"]] == ["a cup", "tea"] and pair["image"] == picture(0)


def test_what_was_found_is_said_before_the_work(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "0.png").write_bytes(picture(0))
    (tmp_path / "f" / "x.pdf").write_bytes(b"%PDF")
    (tmp_path / "f" / "captions.csv").write_text('file,caption\n0.png,a cup\n0.png,"a\nb\nc\nd\ne"\n')
    (found,) = list_inputs(f"{tmp_path}/f", 9)
    assert found.summary["says"] == (
        f"{tmp_path}/f: captions.csv with 2 rows, of which 1 have texts of many lines, the first ends in line 7: is a "
        "quote missing?; 3 files, 1 read as pictures; of the first 1 pairs, the only ones looked at, 1 have a picture, "
        "with 2 distinct captions, such as 'a cup'; fields: caption, file; passed over: 1 .pdf"
    )
    assert found.summary["passed_over"] == {".pdf": 1} and found.summary["example"] == "a cup"
    write_parquet(tmp_path / "p" / "0.parquet", pairs(2))
    (tmp_path / "p" / "notes.md").write_text("x")
    (found,) = list_inputs(f"{tmp_path}/p", 9)
    assert (
        "2 files, 1 parquet read; of the first 2 pairs, the only ones looked at, 2 have a picture"
        in (found.summary["says"])
    )
    assert found.summary["says"].endswith("passed over: 1 .md")


def test_paths_as_people_write_them(tmp_path, monkeypatch):
    for i in range(3):
        write_tar(tmp_path / "lr=0.1" / f"{i:03d}.tar", [("a.png", picture(i)), ("a.txt", b"x")])
    assert len(read(f"{tmp_path}/lr=0.1")) == 3 == len(read(f"t={tmp_path}/lr=0.1/{{000..002}}.tar"))
    monkeypatch.chdir(tmp_path)
    one, two, three = (list_splits(spec, 9) for spec in ("lr=0.1", "lr=0.1/", f"t={tmp_path}/lr=0.1"))
    assert one == two == [dataclasses.replace(split, source="lr=0.1") for split in three]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_members_of_a_sample_that_are_not_adjacent_and_what_systems_add(tmp_path, mode):
    """tar cf x.tar *.jpg *.txt *.json; and what a Mac puts between."""
    names = [f"d/{i}" for i in range(5)]
    samples = [(f"{name}.jpg", picture(i)) for i, name in enumerate(names)]
    samples += [(f"{name}.json", b'{"license": "mit"}') for name in names]
    samples += [(f"{name}.txt", f"text {name}".encode()) for name in names]
    mac = [(f"d/._{name.rpartition('/')[2]}", b"\0\5\x16\7") for name, _ in samples]
    between = [member for both in zip(mac, samples, strict=True) for member in both]
    path = tmp_path / ("t.tar" if mode == "w" else "t.tar.gz")
    write_tar(path, [("PaxHeader/0.txt", b"30 mtime=1"), ("__MACOSX/d/._0.jpg", b"x"), *between], mode)
    found = read(path)
    assert [(p["key"], p["image"], p["caption"], p["licence"]) for p in found] == [
        (f"t/{name}", picture(i), f"text {name}", "mit") for i, name in enumerate(names)
    ]


def test_a_part_of_a_sample_that_comes_too_late_is_one_message(tmp_path, monkeypatch):
    write_tar(tmp_path / "t.tar", [("a.png", picture(1)), ("a.txt", b"x"), ("b.png", picture(2)), ("a.json", b"{}")])
    with pytest.raises(UserError, match=r"t.tar: the members of a sample are not adjacent: a part of 'a'.*--sort=name"):
        read(tmp_path / "t.tar")
    monkeypatch.setattr(readers, "SAMPLES_WAITING", 3)
    write_tar(tmp_path / "u.tar", [(f"{i}.png", picture(i)) for i in range(5)] + [("0.txt", b"x")])
    with pytest.raises(UserError, match="a part of '0' .* more than 3 samples"):
        read(tmp_path / "u.tar")
    write_tar(tmp_path / "v.tar", [("a.png", picture(1)), ("a.txt", b"x")] * 2)  # appended to: the key occurs twice
    assert [p["caption"] for p in read(tmp_path / "v.tar")] == ["x"]
