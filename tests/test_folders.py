"""Folders as people have them: what is read as a picture, where its caption comes from, what is said of the rest."""

import io
import json
import pickle
import sys
import types

import numpy as np
import pytest
from PIL import Image
from test_evaluators import OPS, PARAMS, embedder

from florence_jax.curation.dedup.measurements import items_of, measure_item
from florence_jax.curation.ingest.inputs import list_splits, read_split
from florence_jax.data.classes import open_classes, open_images
from florence_jax.data.ops.image import Decode
from florence_jax.data.records import DATA_FILE, BadRecord, Subset, summary_of, write_data
from florence_jax.data.sources import folder as folder_module
from florence_jax.data.sources import picture_files
from florence_jax.data.sources.catalog import open_pictures, open_source
from florence_jax.data.sources.labelled import open_labelled
from florence_jax.data.sources.picture_files import Listing, list_pictures
from florence_jax.errors import UserError
from florence_jax.evaluators.retrieval import CaptionRetrieval, choose_retrieval
from florence_jax.pictures import has_heif, open_picture, register_heif

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def encoded(kind="PNG", colour=(90, 10, 10)):
    file = io.BytesIO()
    Image.fromarray(np.full((12, 16, 3), colour, np.uint8)).save(file, kind)
    return file.getvalue()


def fill(folder, files):
    """Writes files: {name: bytes or text}; returns the folder's name."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def captions(spec):
    return {row["key"]: row["caption"] for row in open_source(spec).metadata()}


def curated(spec):
    return [pair for split in list_splits(spec, 100) for pair in read_split(split, 1 << 20)]


# -- which files are pictures -----------------------------------------------------------------------------------------

ODD = {
    "cat/a.jpg": encoded("JPEG"),
    "cat/more/b.jfif": encoded("JPEG"),
    "cat/more/still/c.jpe": encoded("JPEG"),
    "dog/d.ppm": encoded("PPM"),
    "dog/e.avif": encoded("AVIF"),
    "dog/without": encoded("PNG"),
    "dog/f.orig": encoded("WEBP"),
    "dog/IMG.JPG": encoded("JPEG"),
}
LEFT_BY_SYSTEMS = {
    "cat/.ipynb_checkpoints/a-checkpoint.jpg": encoded("JPEG"),
    ".thumbnails/a.jpg": encoded("JPEG"),
    "__MACOSX/cat/._a.jpg": b"\0\5\x16\7",
    "@eaDir/a.jpg": encoded("JPEG"),
    "cat/._a.jpg": b"\0\5\x16\7",
    ".DS_Store": b"x",
    "cat/manual.pdf": b"%PDF-1.4",
    "cat/README": "words that are no picture",
    "dog/Thumbs.db": b"\xd0\xcf",
    "dog/x.h264": bytes(100),
}


def test_what_pillow_opens_is_found_at_any_depth_and_the_rest_is_counted(tmp_path):
    folder = fill(tmp_path, ODD | LEFT_BY_SYSTEMS | {"dog/phone.heic": HEIC if not has_heif() else b"x"})
    listing = list_pictures(folder)
    found = {name for name in listing.pictures if name != "dog/phone.heic"}
    assert found == ODD.keys()
    assert listing.files == 15  # of the folders that are searched
    counts = {"hidden": 2, ".pdf": 1, "without a suffix": 1, ".db": 1, ".h264": 1}
    assert {k: v for k, v in listing.not_pictures().items() if k != ".heic"} == counts
    left = [".thumbnails (hidden)", "@eaDir (of the system)", "__MACOSX (of the system)"]
    assert listing.left == [*left, "cat/.ipynb_checkpoints (hidden)"]
    says = listing.sentence()
    assert "15 files" in says and "2 hidden" in says and "1 .pdf" in says and "not searched: .thumbnails" in says
    if not has_heif():
        assert "1 .heic" in says and "pip install pillow-heif" in says


def test_every_command_lists_the_same_pictures(tmp_path):
    folder = fill(tmp_path, ODD | LEFT_BY_SYSTEMS)
    for source in (open_pictures(folder), open_source(folder), open_labelled(folder).source):
        assert {row["key"] for row in source.metadata()} == ODD.keys()
        assert all(Decode()(source[i], None)["image"].shape == (12, 16, 3) for i in range(len(source)))
    assert {row["caption"] for row in open_source(folder).metadata()} == {"cat", "dog"}
    assert open_labelled(folder).names == ("cat", "dog") and np.bincount(open_labelled(folder).labels).tolist() == [
        3,
        5,
    ]
    assert {key.removeprefix(f"{folder}/") for key, _, _ in items_of(tmp_path)} == ODD.keys()
    pairs = curated(folder)
    assert {pair["key"].rpartition("/")[2] for pair in pairs} == {name.rpartition("/")[2] for name in ODD}
    assert all(pair["image"] and not pair["problem"] for pair in pairs) and len({p["key"] for p in pairs}) == len(ODD)
    assert {measure_item(item)["status"] for item in items_of(tmp_path)} == {"ok"}


def test_links_to_folders_are_followed_once(tmp_path):
    fill(tmp_path / "store", {"1.png": encoded(), "2.png": encoded()})
    root = tmp_path / "set"
    fill(root, {"dog/3.png": encoded()})
    (root / "cat").symlink_to(tmp_path / "store")
    (root / "dog" / "up").symlink_to(root)
    (root / "dog" / "4.png").symlink_to(tmp_path / "store" / "1.png")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    listing = list_pictures(root)
    assert listing.pictures == ["cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"]
    assert listing.passed_over == {"not a file": 1} and listing.left == ["dog/up (a link to a folder that is searched)"]
    assert len(open_pictures(str(root))) == len(open_source(str(root))) == len(curated(str(root))) == 4


def test_known_suffixes_are_believed_without_a_look(tmp_path, monkeypatch):
    fill(tmp_path, {"a.jpg": encoded("JPEG"), "b.txt": "x", "c.zip": b"PK", "d": encoded()})
    looked = []
    first = picture_files._first_bytes
    monkeypatch.setattr(picture_files, "_first_bytes", lambda fs, path: looked.append(path) or first(fs, path))
    assert list_pictures(tmp_path).pictures == ["a.jpg", "d"]
    assert looked == [f"{tmp_path}/d"]


def test_a_folder_in_a_bucket(tmp_path):
    fs, root = picture_files.filesystem("memory://folders")
    for name, content in {"a/1.jpg": b"x", "a/2": encoded(), ".h/3.jpg": b"x", "a/deep/4.jfif": b"x"}.items():
        fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe_file(f"{root}/{name}", content)
    listing = list_pictures("memory://folders")
    assert listing.pictures == ["a/1.jpg", "a/2", "a/deep/4.jfif"] and listing.left == [".h (hidden)"]
    assert [pair["key"] for pair in curated("x=memory://folders")] == ["a/1.jpg", "a/2", "deep/4.jfif"]


def test_a_folder_that_cannot_be_listed_is_one_message(tmp_path):
    with pytest.raises(UserError, match="cannot list the folder"):
        list_pictures(tmp_path / "none")


def test_heic_is_read_with_its_package_and_else_named(tmp_path, monkeypatch):
    has_heif.cache_clear(), register_heif.cache_clear(), picture_files.known_suffixes.cache_clear()
    find, calls = picture_files.has_heif.__wrapped__, []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = fill(tmp_path, {"a/1.heic": HEIC, "a/2": HEIC, "a/3.png": encoded()})
    assert not find() and list_pictures(folder).pictures == ["a/3.png"]
    assert (
        "1 .heic, 1 without a suffix (for HEIC pictures: pip install pillow-heif)" in list_pictures(folder).sentence()
    )
    with pytest.raises(UserError, match="pip install pillow-heif"):
        open_picture(HEIC)
    with pytest.raises(BadRecord, match="pip install pillow-heif"):
        Decode()({"key": "1.jpg", "image": HEIC}, None)  # a phone's picture under another name

    module = types.SimpleNamespace(register_heif_opener=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: module)
    has_heif.cache_clear(), picture_files.known_suffixes.cache_clear()
    assert list_pictures(folder).pictures[0] == "a/1.heic"
    register_heif()
    assert calls == [1]
    has_heif.cache_clear(), register_heif.cache_clear(), picture_files.known_suffixes.cache_clear()


# -- captions or classes ----------------------------------------------------------------------------------------------


def test_img2dataset_files(tmp_path):
    files = {}
    for i, caption in enumerate(["a red cup", "two dogs", "the sea"]):
        stem = f"0000{i % 2}/00000000{i}"
        meta = {"caption": caption, "url": f"https://x.example/{i}", "key": str(i), "width": 9, "tags": ["t"]}
        files |= {f"{stem}.jpg": encoded("JPEG"), f"{stem}.txt": caption, f"{stem}.json": json.dumps(meta)}
    folder = fill(
        tmp_path, files | {"00000.parquet": b"PAR1", "00000_stats.json": "{}", "00001/9.jpg": encoded("JPEG")}
    )
    keys = ["00000/000000000.jpg", "00000/000000002.jpg", "00001/000000001.jpg"]
    assert captions(folder) == dict(zip(keys, ["a red cup", "the sea", "two dogs"], strict=True))
    source = open_source(folder)
    assert source[1]["image"] == encoded("JPEG") and source[1]["url"] == "https://x.example/2"
    assert source[1]["tags"] == ["t"] and source[1]["folder"] == "00000" and "width" not in source[1]
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
    summary = source.summary
    assert (summary["pictures"], summary["distinct"], summary["example"]) == (3, 3, "a red cup")
    assert summary["passed_over"] == {".parquet": 1, ".json": 1, "no caption": 1}
    says = summary["says"]
    assert "3 distinct captions from the .txt and .json beside each, such as 'a red cup'" in says
    assert "1 pictures have no caption" in says and "1 .parquet" in says
    pairs = curated(f"x={folder}")
    assert {pair["caption"] for pair in pairs} == {"a red cup", "two dogs", "the sea", ""}
    # As classes: the captions, or the sub-folders where that is said.
    assert open_classes(open_images(folder)).first_names == ["a red cup", "the sea", "two dogs"]
    assert open_classes(open_images(folder), field="folder").first_names == ["00000", "00001"]


def test_training_scripts_folders(tmp_path):
    files = {f"10_things/{i}.png": encoded() for i in range(3)} | {f"10_things/{i}.txt": f"thing {i}" for i in range(3)}
    assert list(captions(fill(tmp_path, files)).values()) == ["thing 0", "thing 1", "thing 2"]


def test_json_alone_holds_a_caption_or_is_no_caption(tmp_path):
    good = {
        "a/1.png": encoded(),
        "a/1.json": '{"text": "a cat"}',
        "b/2.png": encoded(),
        "b/2.json": '{"captions": ["x", "y"]}',
    }
    source = open_source(fill(tmp_path / "good", good | {"b/3.png": encoded(), "b/3.json": "no json"}))
    assert [source[0]["caption"], source[1]["caption"], source[1]["captions"]] == ["a cat", "x", ["x", "y"]]
    with pytest.raises(BadRecord, match="has no caption"):
        source[2]
    boxes = {f"{name}.png": encoded() for name in ("cat/1", "dog/2")} | {
        f"{name}.json": '{"shapes": [], "imagePath": "1.png"}' for name in ("cat/1", "dog/2")
    }
    folder = fill(tmp_path / "boxes", boxes)
    assert set(captions(folder).values()) == {"cat", "dog"}
    assert "passed over: 2 .json" in open_source(folder).summary["says"]


def test_one_stray_text_does_not_hide_the_classes(tmp_path):
    files = {f"{name}/{i}.png": encoded() for name in ("cat", "dog") for i in range(4)}
    source = open_source(fill(tmp_path, files | {"cat/0.txt": "the first"}))
    assert len(source) == 8 and {row["caption"] for row in source.metadata()} == {"cat", "dog"}
    assert "2 classes from the names of the sub-folders: cat, dog; passed over: 1 .txt" in source.summary["says"]


def test_texts_in_a_flat_folder_and_texts_of_odd_encodings(tmp_path):
    files = {
        "a.png": encoded(),
        "a.txt": b"\xef\xbb\xbfcaf\xc3\xa9\n",
        "b.png": encoded(),
        "b.txt": b"caf\xe9",
        "c.png": encoded(),
    }
    folder = fill(tmp_path, files)
    assert captions(folder) == {"a.png": "café"}
    assert (
        "of 2 looked at 1 cannot be used and are left out, the first: record 'b.png': b.txt is not UTF-8"
        in (open_source(folder).summary["says"])
    )
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a.txt is not UTF-8: .*iconv -f LATIN1 -t UTF-8"):
        open_source(folder)


def test_empty_texts_are_an_error_that_names_them(tmp_path):
    with pytest.raises(UserError, match="the .txt files beside the pictures are empty"):
        open_source(fill(tmp_path, {"a.png": encoded(), "a.txt": ""}))


def test_a_start_reads_a_bounded_number_of_texts(tmp_path, monkeypatch):
    files = {f"{i:04d}.jpg": b"x" for i in range(300)} | {f"{i:04d}.txt": f"text {i}" for i in range(300)}
    folder, read = fill(tmp_path, files), []
    from florence_jax.data.sources import folder as module

    whole = module.picture_bytes
    monkeypatch.setattr(module, "picture_bytes", lambda path, key="": read.append(path) or whole(path, key))
    source = open_source(folder)
    assert len(source) == 300 and len(read) == module.LOOKED_AT
    assert source.summary["distinct"] is None and "64 distinct captions of the 64 looked at" in source.summary["says"]


def test_classes_at_any_depth_and_below_one_folder(tmp_path):
    files = {"data/red_fox/x/1.png": encoded(), "data/cat/2.png": encoded(), "data/cat/y/z/3.png": encoded()}
    folder = fill(tmp_path, files | {"data/horse/notes.md": "x"})
    assert captions(folder) == {"data/cat/2.png": "cat", "data/cat/y/z/3.png": "cat", "data/red_fox/x/1.png": "red fox"}
    assert "no pictures in data/horse" in open_source(folder).summary["says"]
    assert open_labelled(folder).names == ("cat", "red_fox")
    fill(tmp_path, {"loose.png": encoded()})
    source = open_source(folder)
    assert {row["caption"] for row in source.metadata()} == {"data"}
    assert "1 pictures beside the sub-folders have no class" in source.summary["says"]
    assert captions(fill(tmp_path / "one", {"cat/a.png": encoded()})) == {"cat/a.png": "cat"}


def test_a_flat_folder_without_captions_says_what_it_has(tmp_path):
    with pytest.raises(
        UserError, match=r"a \.txt or \.json beside each.*2 files, 1 read as pictures; passed over: 1 \.pdf"
    ):
        open_source(fill(tmp_path, {"a.jpg": b"x", "b.pdf": b"x"}))
    with pytest.raises(UserError, match=r"no pictures in .*1 files, 0 read as pictures; passed over: 1 \.md"):
        open_pictures(fill(tmp_path / "none", {"b.md": b"x"}))


# -- several rows a picture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["captions.csv", "metadata.jsonl"])
def test_rows_of_one_picture_are_one_record(tmp_path, name):
    rows = [(f"{i}.png", f"picture {i}, text {k}", str(k), "Rome") for k in range(5) for i in range(3)]
    rows[1] = ("./1.png", "", "0", "Rome")  # the same picture; a row without a caption
    if name.endswith("csv"):
        text = "file,caption,number,place\n" + "".join(f'{a},"{b}",{c},{d}\n' for a, b, c, d in rows)
    else:
        keys = ("file_name", "text", "number", "place")
        text = "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
    folder = fill(tmp_path, {f"{i}.png": encoded() for i in range(4)} | {name: text})
    source = open_source(folder)
    assert len(source) == 3
    assert source[2]["captions"] == [f"picture 2, text {k}" for k in range(5)]
    assert source[2]["caption"] == "picture 2, text 0" and source[2]["place"] == "Rome"
    assert source[2]["number"] == ["0", "1", "2", "3", "4"]
    assert source[1]["captions"] == [f"picture 1, text {k}" for k in range(1, 5)]
    assert source.summary["distinct"] == 14 and source.summary["passed_over"] == {"not in the table": 1}
    says = source.summary["says"]
    assert "15 rows of 3 pictures, 14 distinct captions" in says and "1 pictures are not in the table" in says
    evaluator = choose_retrieval("own", source, OPS, embedder(8))
    assert isinstance(evaluator, CaptionRetrieval) and evaluator.run(PARAMS)["captions"] == 14
    with pytest.raises(UserError, match="several captions each.*label_field"):
        open_classes(source)
    assert open_classes(source, field="place").first_names == ["Rome"]


def test_curation_reads_rows_of_one_picture_as_one_pair(tmp_path):
    rows = "".join(f"{i}.png,text {i} {k}\n" for i in range(4) for k in range(5))
    folder = fill(tmp_path, {f"{i}.png": encoded() for i in range(4)} | {"captions.csv": f"file,text\n{rows}"})
    splits = list_splits(folder, 7)  # 7 rows at least, whole pictures
    found = [pair for split in splits for pair in read_split(split, 1 << 20)]
    assert len(splits) == 2 and [pair["key"] for pair in found] == ["0.png", "1.png", "2.png", "3.png"]
    assert found[2]["caption"] == "text 2 0" and found[2]["captions"] == [f"text 2 {k}" for k in range(5)]


def test_one_row_a_picture_stays_one_caption_and_missing_files_are_said(tmp_path):
    folder = fill(tmp_path, {"a.png": encoded(), "captions.csv": "file,caption\na.png,x\ngone.png,y\n"})
    source = open_source(folder)
    assert list(source.metadata()) == [{"key": "a.png", "caption": "x"}, {"key": "gone.png", "caption": "y"}]
    assert source.summary["passed_over"] == {"not in the folder": 1}
    assert "1 pictures of the table are not there" in source.summary["says"]


# -- the sentence and data.json ---------------------------------------------------------------------------------------


def test_the_sentences_are_printed_once_and_written_beside_the_configuration(tmp_path, capsys):
    folder = fill(tmp_path / "set", {"cat/1.png": encoded(), "dog/2.png": encoded(), "dog/x.pdf": b"%PDF"})
    source = open_source(folder)
    half = Subset(source, np.array([0]), "half")
    assert summary_of(half) == source.summary
    write_data(map(summary_of, [source, half, open_source("emoji:new_names")]), tmp_path)
    assert capsys.readouterr().out == (
        f"{folder}: 3 files, 2 read as pictures; 2 classes from the names of the sub-folders: cat, dog; passed over: "
        "1 .pdf\n"
    )
    (written,) = json.loads((tmp_path / DATA_FILE).read_text())
    assert (written["files"], written["pictures"], written["texts"]) == (3, 2, "names of sub-folders")
    assert written["passed_over"] == {".pdf": 1} and written["distinct"] == 2 and written["example"] == "cat"


def test_a_table_in_a_bucket_is_not_said_to_have_no_files():
    summary = folder_module._summary(Listing("gs://bucket/x"), 2, "captions.csv", 2, "a", "captions.csv: 2 rows", ())
    assert summary["files"] is None and summary["says"] == "gs://bucket/x: not listed; captions.csv: 2 rows"
