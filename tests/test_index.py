"""Retrieval on one's own images: Karpathy's split files, zero-shot and fine-tuned by one command, the index on disk."""

import io
import json
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_images import run_main

from configs.retrieve import get_config
from florence_jax.data.records import record_thumbnail
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.folder import FolderSource
from florence_jax.data.sources.karpathy import open_karpathy
from florence_jax.errors import UserError
from florence_jax.evaluators.retrieval import CaptionRetrieval, choose_retrieval, open_retrieval
from florence_jax.page import GridCell
from florence_jax.params.sharding import make_mesh
from florence_jax.params.weights import load, make_description, save_pretrained
from florence_jax.tasks import create_task
from florence_jax.tasks.encoder import Encoder
from florence_jax.tools import index as tool


def split_file(path, sentences=6):
    """A file like dataset_coco.json: ten training and ten test images, some of the latter with six sentences."""
    colours = ("red_things", "green_things", "blue_things", "grey")
    images = [
        {
            "filename": f"{i}.png",
            "filepath": name,
            "split": ("train", "restval")[i % 2] if name in colours[:2] else "test",
            "sentences": [{"raw": f"{name} number {i} said {n} times. "} for n in range(sentences - i % 2)],
        }
        for name in colours
        for i in range(5)
    ]
    path.write_text(json.dumps({"dataset": "coco", "images": images}))
    return str(path)


# -- Karpathy's splits ------------------------------------------------------------------------------------------------


def test_split_files(pictures, tmp_path):
    file = split_file(tmp_path / "dataset_coco.json")
    source = open_source(f"karpathy:{file}:test@{pictures}")
    assert len(source) == 10 and source[0]["key"] == "blue_things/0.png" and len(source[0]["captions"]) == 6
    assert source[0]["caption"] == "blue_things number 0 said 0 times." and source[0]["image"][:4] == b"\x89PNG"
    assert len(open_karpathy(f"karpathy:{file}:train+restval@{pictures}")) == 10


@pytest.mark.parametrize(
    "spec,message",
    [
        ("karpathy:{}", "write karpathy:FILE.json:SPLIT@IMAGES"),
        ("karpathy:{}:validation", "no split 'validation'; the file has restval, test, train"),
        ("karpathy:gone.json:test", "not a readable Karpathy split file"),
    ],
)
def test_malformed_names(tmp_path, spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec.format(split_file(tmp_path / "dataset_coco.json")))


class Known:
    """An embedder with given embeddings, that counts the texts it is asked for."""

    def __init__(self, images, texts):
        self._images, self._texts, self.asked = images, texts, []

    def images(self, params, source, ops, context, on_corrupt):
        return {"embedding": self._images, "index": np.arange(len(self._images))}

    def texts(self, params, texts, what):
        self.asked += texts
        return self._texts[: len(texts)]


def test_five_captions_an_image_and_equal_captions_of_others_are_wrong(pictures, tmp_path, capsys):
    file = split_file(tmp_path / "d.json")
    source = open_source(f"karpathy:{file}:test@{pictures}")
    eye = np.eye(10, dtype=np.float32)
    known = Known(eye, np.repeat(eye, 5, axis=0))
    evaluator = open_retrieval("coco", f"karpathy:{file}:test@{pictures}", "decode", known)
    assert "coco: the first 5 captions of an image count; 6 of 56 do not" in capsys.readouterr().out
    results = evaluator.run(None)
    assert len(known.asked) == 50 and results["captions"] == 50 and results["images"] == 10
    assert results["i2t_r@1"] == results["t2i_r@1"] == 1.0
    assert evaluator.chance["t2i_r@1"] == pytest.approx(0.1) and evaluator.chance["i2t_r@1"] == pytest.approx(0.1)
    assert "coco: image to text" in evaluator.report()[0]
    # One caption in five is right, the rest are the next image's: any of the five is enough.
    shifted = np.where(
        np.arange(50)[:, None] % 5 == 0, np.repeat(eye, 5, axis=0), np.roll(np.repeat(eye, 5, axis=0), 5, 0)
    )
    partly = CaptionRetrieval("coco", source, "decode", Known(eye, shifted), per_image=5).run(None)
    assert partly["t2i_r@1"] == pytest.approx(0.2) and partly["i2t_r@1"] == 0.0 and partly["i2t_r@5"] == 1.0


@pytest.mark.parametrize("field", ["captions", "caption"])
def test_all_captions_in_either_field_count(field):
    rows = [{"key": "a.png", field: list("tuvwxy")}, {"key": "b.png", field: ["z"]}]
    evaluator = choose_retrieval("own", FolderSource("", rows), "decode", Known(np.eye(2), np.eye(7)[:, :2]))
    assert isinstance(evaluator, CaptionRetrieval) and evaluator.run(None)["captions"] == 7
    assert evaluator._embedder.asked == list("tuvwxyz")


# -- by one command ---------------------------------------------------------------------------------------------------


def retrieve(protocol, workdir, weights, *options):
    fixed = [f"--config.init={weights}", "--config.eval.batch_size=24"]
    return run_main(
        f"--config=configs/retrieve.py:protocol={protocol},runlocal", *fixed, f"--workdir={workdir}", *options
    )


def test_zero_shot_retrieval_on_twenty_images(weights, pictures, tmp_path):
    assert retrieve("zeroshot", tmp_path / "run", weights, f"--config.eval.source={pictures}") == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["eval/held_out/images"] == 20 and found["eval/held_out/i2t_r@10"] == 1.0
    assert "text to image" in (tmp_path / "run" / "report.html").read_text()


def test_retrieval_starts_from_the_moving_average(weights, pictures):
    config = get_config("protocol=finetune")
    config.init, config.eval.source = weights, pictures
    task = create_task(config.lock())
    fresh = jax.jit(task.init)(jax.random.key(1))
    expected = load(weights, fresh)
    jax.tree.map(np.testing.assert_array_equal, task.start(fresh), expected)
    jax.tree.map(np.testing.assert_array_equal, task.load(make_mesh(-1, 1)), expected)
    last = load(weights, fresh, average=False)
    assert np.allclose(jax.tree.leaves(expected)[0], 1.5 * jax.tree.leaves(last)[0])


def test_fine_tuned_retrieval_on_a_split_file(weights, pictures, tmp_path):
    file = split_file(tmp_path / "d.json")
    options = [
        f"--config.data.train=karpathy:{file}:train+restval@{pictures}",
        "--config.epochs=2",
        "--config.total_steps=0",
    ]
    options += [f"--config.eval.source=karpathy:{file}:test@{pictures}"]
    assert retrieve("finetune", tmp_path / "run", weights, *options) == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["step"] == 2 and found["eval/held_out/captions"] == 50  # ten images: a batch of eight, one an epoch
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["captions"] == ""  # as it was given


@pytest.mark.parametrize(
    "options,message", [(["--config.eval.source="], "needs pairs to search"), (["--config.init=x"], "no weights at x")]
)
def test_mistakes_of_retrieval(weights, tmp_path, capsys, options, message):
    assert retrieve("zeroshot", tmp_path / "run", weights, *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


# -- index ------------------------------------------------------------------------------------------------------------


def test_search_equals_sorting_whatever_the_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    rows, queries = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(3, 6)).astype(np.float32)
    rows[20] = rows[3]  # a tie: the earlier row is first
    expected = np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :7]
    for block in (7, 64):
        monkeypatch.setattr(tool, "ROWS", block)
        found, cosines = tool.search(rows, queries, 7)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(cosines, np.take_along_axis(queries @ rows.T, expected, 1), rtol=1e-6)
    assert tool.search(rows[:2], queries, 7)[0].shape == (3, 2)


@pytest.fixture(scope="module")
def made(weights, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "made"
    assert tool.main(["embed", f"--init={weights}", f"--images={pictures}", f"--out={folder}", "--batch-size=24"]) == 0
    return folder


def test_a_picture_finds_itself_and_a_page_shows_it(made, pictures, tmp_path, capsys):
    page = tmp_path / "found.html"
    picture = f"{pictures}/grey/3.png"
    arguments = ["query", f"--index={made}", f"--image={picture}", "--text=<red> things", "--k=4", f"--html={page}"]
    assert tool.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "<red> things" and lines[5] == "3.png" and lines[6].split() == ["1.000", "grey/3.png"]
    text = page.read_text()
    assert "&lt;red&gt; things" in text and text.count("<img") == 9 and "grey/3.png (1.000)" in text
    assert f'<a href="{Path(picture).as_uri()}"><img' in text and "<div>grey</div>" in text  # its class is the caption


def test_the_page_shows_captions_and_links_to_the_files(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a b.png")
    (tmp_path / "captions.csv").write_text("file,caption\na b.png,a <red> square\na b.png,paint\n")
    index = tool.Index(np.eye(1, dtype=np.float32), ["a b.png"], {"images": str(tmp_path), "rows": [0]})
    page = tool.results_html(index, [GridCell("x", None, True)], np.array([[0]]), np.ones((1, 1)))
    assert "<div>a &lt;red&gt; square\npaint</div>" in page and 'soft">a b.png (1.000)' in page
    assert f'<a href="{tmp_path.as_uri()}/a%20b.png">' in page
    record = next(iter(open_source("emoji:new_names").metadata()))
    index = tool.Index(np.eye(1), [record["key"]], {"images": "emoji:new_names", "rows": [0]})
    page = tool.results_html(index, [GridCell("x", None, True)], np.array([[0]]), np.ones((1, 1)))
    assert f"<div>{record['caption']}</div>" in page and "<a " not in page


def test_the_page_shows_pictures_by_name_whatever_came_and_went(tmp_path):
    for name, colour in (("b", "red"), ("c", "green"), ("d", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    keys = [f"{name}.png" for name in "bcd"]
    index = tool.Index(np.eye(3, dtype=np.float32), keys, {"images": str(tmp_path), "rows": [0, 1, 2]})
    source = FolderSource(str(tmp_path), [{"key": key, "caption": ""} for key in keys])
    red, blue = record_thumbnail(source, 0), record_thumbnail(source, 2)
    Image.new("RGB", (64, 64), "black").save(tmp_path / "a.png")
    (tmp_path / "c.png").unlink()
    query = [GridCell("x", None, True)]
    page = tool.results_html(index, query, np.array([[0, 1, 2]]), np.ones((1, 3)))
    assert [f'src="{red}"' in page, f'src="{blue}"' in page, page.count("<img")] == [True, True, 2]
    first = next(iter(open_source("emoji:new_names").metadata()))["key"]
    for row in (1, 9999):  # another record, none at all
        index = tool.Index(np.eye(2), [first, "gone"], {"images": "emoji:new_names", "rows": [0, row]})
        assert tool.results_html(index, query, np.array([[0, 1]]), np.ones((1, 2))).count("<img") == 1


def test_an_index_remembers_weights_in_a_bucket(pictures, tmp_path):
    description = SimpleNamespace(folder="gs://b/run/checkpoints")
    model = SimpleNamespace(
        encoder=SimpleNamespace(description=description, tokenizer_spec="", can_embed_text=False),
        embed_source=lambda source: {"embedding": np.eye(20, dtype=np.float32), "index": np.arange(20)},
    )
    made = tool.write_index(str(tmp_path / "index"), model, pictures)
    assert made.info["init"] == "gs://b/run/checkpoints" and made.info["unread"] == []


def test_unreadable_pictures_are_told_and_listed(weights, pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data" / "a.png").write_bytes(b"no")
    arguments = [f"--init={weights}", f"--images={tmp_path / 'data'}", f"--out={tmp_path}/index", "--batch-size=24"]
    assert tool.main(["embed", *arguments]) == 0
    told = capsys.readouterr()
    assert "1 not read, listed in index.json" in told.out and "not read: a.png" in told.err
    assert tool.open_index(f"{tmp_path}/index").info["unread"] == ["a.png"]


def test_weights_without_a_text_tower_are_searched_by_picture(weights, pictures, tmp_path, capsys):
    encoder = Encoder(weights)
    tower = {"image": encoder.load_on(make_mesh(-1, 1))["image"]}
    save_pretrained(
        str(tmp_path / "w"),
        tower,
        make_description("import", {"towers": encoder.towers_part() | {"entries": list(tower)}}),
    )
    arguments = [f"--init={tmp_path}/w", f"--images={pictures}", f"--out={tmp_path}/index", "--batch-size=24"]
    assert tool.main(["embed", *arguments]) == 0
    capsys.readouterr()
    query = ["query", f"--index={tmp_path}/index", "--k=1"]
    assert tool.main([*query, f"--image={pictures}/grey/3.png"]) == 0
    assert capsys.readouterr().out.split() == ["3.png", "1.000", "grey/3.png"]
    assert tool.main([*query, "--text=grey"]) == 2
    assert "holds no text tower" in capsys.readouterr().err
    np.save(tmp_path / "index" / "embeddings.npy", np.eye(20, 9, dtype=np.float32))
    assert tool.main([*query, f"--image={pictures}/grey/3.png"]) == 2
    assert "has vectors of 9 numbers, the weights give" in capsys.readouterr().err


def test_an_index_is_whole_or_not_there(made, weights, pictures, tmp_path, capsys):
    assert sorted(path.name for path in made.iterdir()) == ["embeddings.npy", "index.json", "keys.json"]
    index = tool.open_index(str(made))
    assert index.embeddings.shape == (20, 16) and index.keys[0] == "blue_things/0.png"
    np.testing.assert_allclose(np.linalg.norm(index.embeddings, axis=1), 1, atol=1e-5)
    assert not list(made.parent.glob("*.partial"))


def huge_png(path):
    """The first bytes of a picture of 20,000 x 20,000 pixels."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    header = b"IHDR" + struct.pack(">II", 20000, 20000) + file.getvalue()[24:29]
    path.write_bytes(file.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + file.getvalue()[33:])
    return path


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["embed", "--images={pictures}", "--out={made}"], "exists already"),
        (["embed", "--images={empty}", "--out={empty}/new"], "no pictures in"),
        (["query", "--index={made}"], "--text or --image"),
        (["query", "--index={made}", "--text=x", "--k=0"], "--k=0 must be at least 1"),
        (["query", "--index={empty}", "--text=x"], "is not an index"),
        (["query", "--index={made}", "--image=gone.png"], "gone.png"),
        (["query", "--index={made}", "--image={huge}"], "DecompressionBombError"),
    ],
)
def test_mistakes_of_the_index(made, weights, pictures, tmp_path, capsys, arguments, message):
    huge = huge_png(tmp_path / "no_pictures_here.part")
    given = [a.format(made=made, pictures=pictures, empty=tmp_path, huge=huge) for a in arguments]
    given += [f"--init={weights}"] if given[0] == "embed" else []
    assert tool.main(given) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_other_weights_are_noticed(made, tmp_path, capsys):
    info = json.loads((made / "index.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for name in ("embeddings.npy", "keys.json"):
        (other / name).write_bytes((made / name).read_bytes())
    info["mark"] = [-x for x in info["mark"]]
    (other / "index.json").write_text(json.dumps(info))
    assert tool.main(["query", f"--index={other}", "--text=x"]) == 2
    assert "are not those the index was made with" in capsys.readouterr().err
