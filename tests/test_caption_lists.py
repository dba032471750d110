"""Sets of captions in the forms that people have them in, read through the one door of all data."""

import json
import pickle
import zlib

import numpy as np
import pytest
from PIL import Image
from stream_tools import take

from florence_jax.data.pipeline import TrainData, train_stream
from florence_jax.data.records import BadRecord
from florence_jax.data.sources.catalog import open_mixture, open_source
from florence_jax.errors import UserError


def draw(path, shade=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path, "PNG")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("a.png", "b.png", "c.png")):
        draw(tmp_path / "images" / name, 10 * i)
    return tmp_path


def captions_of(spec):
    source = open_source(spec)
    return {row["key"]: row.get("captions", row["caption"]) for row in source.metadata()}, source


COCO = {
    "images": [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}, {"id": 11, "file_name": "c.png"}],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "a dog"},
        {"image_id": 7, "id": 2, "caption": "a cat\n"},
        {"image_id": 9, "id": 3, "caption": "the dog"},
        {"image_id": 9, "id": 4, "caption": "  "},
        {"image_id": 8, "id": 5, "caption": "nobody"},
    ],
}


@pytest.mark.parametrize("order", [("images", "annotations"), ("annotations", "images")])
def test_coco_captions(folder, order):
    path = write(folder / "captions.json", {name: COCO[name] for name in order})
    found, source = captions_of(f"captions:{path}:{folder}/images")
    assert found == {"a.png": ["a cat"], "b.png": ["a dog", "the dog"]} and len(source) == 2
    record = source[1] if source[1]["key"] == "b.png" else source[0]
    assert record["image_id"] == 9 and record["caption"] == "a dog" and record["image"][:4] == b"\x89PNG"
    says = source.summary["says"]
    assert "2 pictures, 3 captions, such as" in says
    assert "empty or no text: 1 (left out), the first: annotations[3]" in says
    assert "pictures that are not listed: 1 (left out), the first: annotations[4], image 8" in says
    assert {row["key"] for row in source.sample(8)} == set(found)
    assert pickle.loads(pickle.dumps(source))[0] == source[0]


def test_lists_of_pairs_as_for_meter(folder):
    """Names begin with folders of another machine; pictures lie in sub-folders and have no suffix."""
    draw(folder / "root" / "images_train" / "0000" / "0000001")
    draw(folder / "root" / "images_train" / "0001" / "0001000")
    pairs = [["images_train/0000/0000001", "one"], ["x/y/0001000", "two"], ["x/0002000", "gone"], ["x/0001000", "II"]]
    path = write(folder / "train_annot.json", [*pairs, ["x"], ["x/0001000", None]])
    found, source = captions_of(f"captions:{path}:{folder}/root")
    assert found == {"images_train/0000/0000001": ["one"], "images_train/0001/0001000": ["two", "II"]}
    says = source.summary["says"]
    assert "not in the folder: 1 (left out, with their captions), the first: x/0002000" in says
    assert "name no picture: 1 (left out), the first: item 4" in says and "the first: item 5" in says


def test_lists_of_objects(folder):
    rows = [{"image": "a.png", "caption": ["x", "y"]}, {"image": "b.png", "caption": "z", "image_id": "b"}]
    found, _ = captions_of(f"captions:{write(folder / 'coco.json', rows)}:{folder}/images")
    assert found == {"a.png": ["x", "y"], "b.png": ["z"]}


CAT, DOG = "http://x.org/p/a%2Epng?size=3", "https://y.org/photo"


@pytest.mark.parametrize(
    "text",
    [
        f'" a cat . "\t{CAT}\na dog, he said\t{DOG}\n',  # Conceptual Captions
        f'{CAT}\t" a cat . "\n{DOG}\ta dog, he said\n',  # of 12 million
        f'caption\turl\n" a cat . "\t{CAT}\na dog, he said\t{DOG}\r\n',
    ],
)
def test_tables_of_addresses(folder, text):
    number = str(zlib.crc32(DOG.encode()))
    draw(folder / "images" / "training" / number)
    found, source = captions_of(f"captions:{write(folder / 'cc.tsv', text)}:{folder}/images")
    assert found == {"a.png": '" a cat . "', f"training/{number}": "a dog, he said"}
    assert "captions" not in source[0]


def test_flickr(folder):
    path = write(folder / "results.token", "a.png#0\tA man in a hat .\na.png#1\tA hat .\nb.png#0\tA dog .\n")
    assert captions_of(f"captions:{path}:{folder}/images")[0] == {
        "a.png": ["A man in a hat .", "A hat ."],
        "b.png": ["A dog ."],
    }


def test_sbu(folder):
    path = write(
        folder / "sbu.json", {"image_urls": ["http://f.com/b.png", DOG], "captions": ["b", "d"], "user_ids": [1]}
    )
    found, source = captions_of(f"captions:{path}:{folder}/images")
    assert found == {"b.png": "b"} and f"the first: {DOG}" in source.summary["says"]


def test_tables_whose_pictures_are_elsewhere(folder):
    path = write(folder / "t" / "list.csv", "file,caption\nb.png,bee\n")
    assert captions_of(f"captions:{path}:{folder}/images")[0] == {"b.png": "bee"}


# -- Visual Genome ----------------------------------------------------------------------------------------------------


@pytest.fixture
def genome(tmp_path):
    draw(tmp_path / "VG_100K" / "1.jpg")
    draw(tmp_path / "VG_100K_2" / "2.jpg")
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[10:28, 20:38] = 200
    Image.fromarray(pixels).save(tmp_path / "VG_100K" / "1.jpg", "PNG")

    def region(number, image, phrase, x, y, w, h):
        return {"region_id": number, "image_id": image, "phrase": phrase, "x": x, "y": y, "width": w, "height": h}

    items = [
        {"id": 1, "regions": [region(5, 1, "bright", 20, 10, 18, 18), region(6, 1, "dark ", -1, 0, 19, 30)]},
        {"id": 2, "regions": [region(7, 2, "small", 0, 0, 9, 30), region(8, 2, "out", 39, 0, 30, 30), {"x": 1}]},
        {"id": 2, "regions": [region(9, 2, "fine", 0, 0, 20, 20)]},
        {"id": 3, "regions": []},
    ]
    return f"captions:{write(tmp_path / 'region_descriptions.json', items)}:{tmp_path}"


def test_regions_as_captions_of_their_picture(genome):
    found, source = captions_of(genome)
    assert found == {"VG_100K/1.jpg": ["bright", "dark"], "VG_100K_2/2.jpg": ["small", "out", "fine"]}
    assert [row["image_id"] for row in source.metadata()] == [1, 2]
    assert "the first: item 1: KeyError" in source.summary["says"]


def test_regions_cut_out(genome):
    found, source = captions_of(f"{genome}:crop")
    assert found == {
        "VG_100K/1.jpg#5": "bright",
        "VG_100K/1.jpg#6": "dark",
        "VG_100K_2/2.jpg#8": "out",
        "VG_100K_2/2.jpg#9": "fine",
    }
    bright, dark = np.asarray(source[0]["image"]), np.asarray(source[1]["image"])
    assert bright.shape == (18, 18, 3) and bright.min() == 200
    assert dark.shape == (30, 18, 3) and dark.max() == 0
    assert [row["image_id"] for row in source.metadata()] == [1, 1, 2, 2]
    with pytest.raises(BadRecord, match="#8.*is not in the picture of 40 x 30"):
        source[2]
    says = source.summary["says"]
    assert "2 pictures, 4 regions" in says and "smaller than 16 x 16 pixels: 1 (left out), the first: 2.jpg#7" in says


def test_regions_through_the_stream(genome):
    """Another part of the same picture never is the picture that does not belong to a text."""
    ops = "decode|resize_exact(8, 8)|caption|label|other(image)|keep(image, other_image, match)"
    sources, weights = open_mixture(f"{genome}:crop*2")
    batches = take(train_stream(TrainData(sources, weights, ops, {}), batch_size=2, seed=0), 2)
    assert all(batch["match"].sum() == 1 for batch in batches)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("captions:{f}/x.json", "write captions:FILE:IMAGES"),
        ("captions:{f}/x.json:{f}/images:cut", "write captions:FILE:IMAGES"),
        ("captions:{f}/gone.json:{f}/images", "there is no file"),
        ("captions:{f}/x.json:{f}/gone", "there is no folder"),
        ("captions:{f}/x.json:{f}/images:crop", ":crop is for files with regions"),
        ("captions:{f}/other.json:{f}/images", "none of the 1 pictures of .* is in .*, such as 'q.png'"),
        ("captions:{f}/numbers.json:{f}/images", "its items are no captions.*not 3"),
        ("captions:{f}/empty.json:{f}/images", "is an empty list"),
        ("captions:{f}/blank.json:{f}/images", "has no caption to use; captions that are empty or no text: 1"),
        ("captions:{f}/boxes.json:{f}/images", r"annotations\[0\] has no 'caption'"),
        ("captions:{f}/images.json:{f}/images", "has 3 images; captions need 'images' and 'annotations'"),
        ("captions:{f}/words.tsv:{f}/images", "a caption and a file or an address"),
        ("captions:{f}/latin.tsv:{f}/images", "is not UTF-8"),
        ("captions:{f}/cut.json:{f}/images", "is not complete JSON"),
    ],
)
def test_mistakes(folder, spec, message):
    files = {
        "x": [["a.png", "x"]],
        "other": [["q.png", "x"]],
        "numbers": [3],
        "empty": [],
        "blank": [["a.png", ""]],
        "boxes": {"images": COCO["images"], "annotations": [{"image_id": 7, "bbox": [0, 0, 1, 1]}]},
        "images": {"images": COCO["images"]},
        "cut": '[["a.png", "x"], ["b.p',
    }
    for name, content in files.items():
        write(folder / f"{name}.json", content)
    write(folder / "words.tsv", "one word\tand another\nmore words\tof these\n")
    (folder / "latin.tsv").write_bytes("caf\u00e9\ta.png\n".encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        open_source(spec.format(f=folder))
    assert "\n" not in str(error.value)
