"""The detection set: every set's real file format, small; one label space; one record for one picture."""

import csv
import io
import itertools
import json
import re
import types

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from florence_jax.curation import detection, detection_formats, detection_merge, json_stream
from florence_jax.curation.detection_formats import Annotations, Category, SourceSpec, parse_spec, read_annotations
from florence_jax.curation.detection_images import file_paths, turn_boxes
from florence_jax.curation.detection_labels import RULES, LabelSpace, class_text, read_rules
from florence_jax.curation.detection_merge import clean_boxes, double_boxes, group_rows, overlapping_pairs
from florence_jax.curation.detection_pseudo import read_imagenet, read_synset_words
from florence_jax.curation.detection_sheet import COLOURS, draw_boxes
from florence_jax.curation.detection_write import detection_arrays
from florence_jax.curation.json_stream import json_items
from florence_jax.data.sources import open_source
from florence_jax.errors import UserError

WIDTH, HEIGHT = 96, 64
EXIF_ORIENTATION = 274


def picture(path, seed, size=(WIDTH, HEIGHT), orientation=None):
    """A JPEG of its own for each seed."""
    image = Image.new("RGB", size, (seed * 37 % 256, seed * 91 % 256, 90))
    ImageDraw.Draw(image).rectangle((10, 10, 40, 30), fill=(250, seed % 250, 10))
    exif = Image.Exif()
    if orientation:
        exif[EXIF_ORIENTATION] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", exif=exif)
    return path.read_bytes()


def dump(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return str(path)


# -- small files in each set's real format ----------------------------------------------------------------------------


def coco_image(number, split="train2017"):
    name = f"{number:012d}.jpg"
    return {
        "license": 3,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/{split}/{name}",
        "height": HEIGHT,
        "width": WIDTH,
        "date_captured": "2013-11-14 11:18:45",
        "flickr_url": "http://farm9.staticflickr.com/8186/x_z.jpg",
        "id": number,
    }


def coco_box(number, image, category, bbox, iscrowd=0):
    x, y, w, h = bbox
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {
        "segmentation": {"counts": [272, 2, 4], "size": [HEIGHT, WIDTH]} if iscrowd else polygon,
        "area": w * h,
        "iscrowd": iscrowd,
        "image_id": image,
        "bbox": bbox,
        "category_id": category,
        "id": number,
    }


def coco_json(images, annotations):
    return {
        "info": {"description": "COCO 2017 Dataset", "version": "1.0", "year": 2017},
        "licenses": [{"url": "http://creativecommons.org/licenses/by-nc-sa/2.0/", "id": 1, "name": "x"}],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"supercategory": "person", "id": 1, "name": "person"},
            {"supercategory": "animal", "id": 18, "name": "dog"},
            {"supercategory": "furniture", "id": 63, "name": "couch"},
            {"supercategory": "electronic", "id": 74, "name": "mouse"},
        ],
    }


def lvis_image(number, negative=(), not_exhaustive=(), split="train2017"):
    return {
        "date_captured": "2013-11-18 04:53:57",
        "neg_category_ids": list(negative),
        "license": 4,
        "height": HEIGHT,
        "width": WIDTH,
        "flickr_url": "http://farm3.staticflickr.com/x_z.jpg",
        "coco_url": f"http://images.cocodataset.org/{split}/{number:012d}.jpg",
        "not_exhaustive_category_ids": list(not_exhaustive),
        "id": number,
    }


def lvis_json(images, annotations):
    def category(number, name, synonyms, synset):
        return {
            "image_count": 10,
            "synonyms": synonyms,
            "def": "a thing",
            "id": number,
            "synset": synset,
            "name": name,
            "frequency": "c",
            "instance_count": 20,
        }

    rows = [{k: v for k, v in row.items() if k != "iscrowd"} for row in annotations]
    return {
        "info": {"description": "LVIS 2020 train set.", "version": "v1.0"},
        "annotations": rows,  # LVIS has them before the images
        "images": images,
        "licenses": [],
        "categories": [
            category(1, "person", ["person", "baby", "man", "woman"], "person.n.01"),
            category(2, "dog", ["dog"], "dog.n.01"),
            category(3, "sofa", ["sofa", "couch", "lounge"], "sofa.n.01"),
            category(4, "bat_(animal)", ["bat_(animal)"], "bat.n.01"),
            category(5, "settee", ["settee", "love_seat"], "settee.n.01"),
        ],
    }


def objects365_json(images, annotations):
    return {
        "images": [
            {"height": HEIGHT, "id": i, "license": 5, "width": WIDTH, "file_name": name, "url": ""}
            for i, name in images
        ],
        "annotations": [
            {
                "id": n,
                "iscrowd": 0,
                "isfake": 0,
                "area": box[2] * box[3],
                "isreflected": 0,
                "bbox": box,
                "image_id": image,
                "category_id": category,
            }
            for n, (image, category, box) in enumerate(annotations)
        ],
        "categories": [
            {"name": "Person", "id": 1},
            {"name": "Mouse", "id": 86},
            {"name": "Dog", "id": 93},
            {"name": "Love Seat", "id": 300},
        ],
        "licenses": [{"name": "x", "id": 5, "url": ""}],
    }


BBOX_HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)


def openimages_files(folder, boxes, labels, split="train", header=BBOX_HEADER):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{i},xclick,{label},1,{x1},{x2},{y1},{y2},0,0,{group},0,0" for i, label, x1, x2, y1, y2, group in boxes]
    path = folder / f"oidv6-{split}-annotations-bbox.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    labels = [f"{i},verification,{label},{confidence}" for i, label, confidence in labels]
    (folder / f"{split}-annotations-human-imagelabels-boxable.csv").write_text(
        "\n".join(["ImageID,Source,LabelName,Confidence", *labels]) + "\n"
    )
    (folder / "class-descriptions-boxable.csv").write_text(
        '/m/01g317,Person\n/m/04yx4,Man\n/m/04rmv,Mouse\n/m/01c648,"Bat (Animal)"\n/m/0bt4r4,Dog\n/m/0jbk,Animal\n'
    )
    tree = {
        "LabelName": "/m/0bl9f",
        "Subcategory": [
            {"LabelName": "/m/01g317", "Subcategory": [{"LabelName": "/m/04yx4"}], "Part": [{"LabelName": "/m/0dzct"}]},
            {"LabelName": "/m/0jbk", "Subcategory": [{"LabelName": "/m/0bt4r4"}]},
        ],
    }
    (folder / "bbox_labels_600_hierarchy.json").write_text(json.dumps(tree))
    return str(path)


IMAGENET = ("n01440764/n01440764_10026.JPEG", "n02330245/n02330245_7.JPEG", "n01440764/n01440764_2.JPEG")


def imagenet_info(path, files=IMAGENET):
    images = [{"id": 900 + i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(files)]
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    return dump(path, {"info": {}, "images": images, "categories": categories})


RESULTS = [
    {"image_id": 900, "category_id": 18, "bbox": [1.0, 2.0, 30.0, 40.0], "score": 0.61},
    {"image_id": 900, "category_id": 1, "bbox": [40.0, 2.0, 20.0, 20.0], "score": 0.93},
    {"image_id": 900, "category_id": 1, "bbox": [0.0, 0.0, 9.0, 9.0], "score": 0.49},
    {"image_id": 901, "category_id": 18, "bbox": [5.0, 5.0, 50.0, 50.0], "score": 0.5},
    {"image_id": 902, "category_id": 18, "bbox": [5.0, 5.0, 50.0, 50.0], "score": 0.2},
    {"image_id": 12345, "category_id": 18, "bbox": [5.0, 5.0, 50.0, 50.0], "score": 0.9},
]
WORDS = "n01440764\ttench, Tinca tinca\nn02330245\tmouse\n"
OBJECTS_FILES = (
    (420917, "images/v1/patch8/objects365_v1_00420917.jpg"),
    (5, "images/v2/patch16/objects365_v2_00000005.jpg"),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All five sets. Objects365's second picture is COCO's picture 2, byte for byte."""
    root = tmp_path_factory.mktemp("sets")
    for number in (1, 2, 3):
        picture(root / f"coco/train2017/{number:012d}.jpg", number)
    picture(root / "coco/val2017/000000000139.jpg", 139)
    picture(root / "o365/train/patch8/objects365_v1_00420917.jpg", 50)
    (root / "o365/train/patch16").mkdir()
    (root / "o365/train/patch16/objects365_v2_00000005.jpg").write_bytes(
        (root / "coco/train2017/000000000002.jpg").read_bytes()
    )
    for i, name in enumerate(("000026e7ee790996", "000062a39995e348")):
        picture(root / f"oi/train/{name}.jpg", 60 + i, (200, 100))
    for i, name in enumerate(IMAGENET):
        picture(root / f"in22k/{name}", 70 + i)
    coco = coco_json(
        [coco_image(1), coco_image(2), coco_image(3)],
        [
            coco_box(11, 1, 18, [10.5, 10.0, 30.0, 20.0]),
            coco_box(12, 1, 1, [50.0, 5.0, 20.0, 50.0]),
            coco_box(13, 1, 1, [0.0, 0.0, 90.0, 60.0], iscrowd=1),
            coco_box(14, 2, 63, [80.0, 40.0, 40.0, 10.0]),  # reaches over the right edge
            coco_box(15, 2, 74, [5.0, 5.0, 0.0, 12.0]),  # no area
            coco_box(16, 2, 74, [200.0, 5.0, 10.0, 12.0]),  # outside
            coco_box(17, 2, 74, [10.0, 5.0, 0.4, 12.0]),  # thinner than a pixel
            coco_box(18, 404, 74, [1.0, 5.0, 5.0, 12.0]),  # no such image
        ],
    )
    lvis = lvis_json(
        [lvis_image(1, negative=[3, 4], not_exhaustive=[2]), lvis_image(2, negative=[2, 3])],
        [
            coco_box(1, 1, 2, [11.0, 10.5, 29.0, 19.5]),  # COCO's dog again
            coco_box(2, 1, 2, [70.0, 30.0, 20.0, 20.0]),  # another dog
            coco_box(3, 2, 4, [5.0, 5.0, 20.0, 20.0]),
        ],
    )
    objects = objects365_json(
        OBJECTS_FILES,
        [
            (420917, 93, [10, 10, 30.5, 20]),
            (420917, 93, [10, 10, 30.5, 20]),  # twice, as in the official file
            (420917, 1, [10, 10, 30.5, 20]),
            (5, 86, [20, 20, 10, 10]),
        ],
    )
    boxes = openimages_files(
        root / "oi",
        [
            ("000026e7ee790996", "/m/0bt4r4", 0.1, 0.6, 0.2, 0.8, 0),
            ("000026e7ee790996", "/m/04yx4", 0.5, 0.9, 0.0, 1.0, 1),
            ("000062a39995e348", "/m/04rmv", 0.25, 0.5, 0.25, 0.75, -1),
            ("000062a39995e348", "/m/unknown", 0.25, 0.5, 0.25, 0.75, 0),
        ],
        [
            ("000026e7ee790996", "/m/0bt4r4", 1),
            ("000026e7ee790996", "/m/04rmv", 0),
            ("000062a39995e348", "/m/0jbk", 1.0),
            ("ffffffffffffffff", "/m/0jbk", 1),
        ],
    )
    (root / "words.txt").write_text(WORDS)
    return {
        "root": root,
        "coco": f"{dump(root / 'instances_train2017.json', coco)}:{root}/coco/train2017",
        "lvis": f"{dump(root / 'lvis_v1_train.json', lvis)}:{root}/coco",
        "objects365": f"{dump(root / 'zhiyuan_objv2_train.json', objects)}:{root}/o365/train",
        "openimages": f"{boxes}:{root}/oi/train",
        "imagenet": f"{imagenet_info(root / 'image_info.json')}:{root}/in22k",
        "teacher": dump(root / "results.json", RESULTS),
        "words": str(root / "words.txt"),
    }


KINDS = ("coco", "lvis", "objects365", "openimages", "imagenet")


def command(world, out, *extra, kinds=KINDS):
    args = [f"--{kind}={world[kind]}" for kind in kinds]
    if "imagenet" in kinds:
        args += [f"--teacher={world['teacher']}", f"--imagenet_words={world['words']}", "--teacher_name=dyhead-1"]
    return [*args, f"--out={out}", *extra]


def run(*args):
    assert detection.main(list(map(str, args))) == 0


def fails(capsys, *args):
    assert detection.main(list(map(str, args))) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and len(message) < 900
    return message


def read(out, split="train"):
    source = open_source(str(out / split))
    return {record["key"]: record for record in (source[i] for i in range(len(source)))}


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("flod")
    run(*command(world, out, "--shards=3"))
    return out


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


# -- the whole --------------------------------------------------------------------------------------------------------


def test_one_picture_of_coco_and_lvis_is_one_record(built, world):
    records = read(built)
    assert sorted(records) == [
        "coco:000000000001",
        "coco:000000000002",
        "coco:000000000003",
        "imagenet:n01440764_10026",
        "imagenet:n02330245_7",
        "objects365:objects365_v1_00420917",
        "openimages:000026e7ee790996",
        "openimages:000062a39995e348",
    ]
    record = records["coco:000000000001"]
    assert record["image"] == (world["root"] / "coco/train2017/000000000001.jpg").read_bytes()
    assert (record["width"], record["height"], record["sources"]) == (WIDTH, HEIGHT, ["coco", "lvis"])
    assert record["class_names"] == ["dog", "person", "person", "dog"]  # LVIS's first dog is COCO's
    assert record["box_sources"] == [0, 0, 0, 1] and record["iscrowd"] == [False, False, True, False]
    assert record["boxes"] == [[10.5, 10, 40.5, 30], [50, 5, 70, 55], [0, 0, 90, 60], [70, 30, 90, 50]]
    assert record["scores"] == [None] * 4 and record["teacher"] is None
    names = json.loads((built / "classes.json").read_text())["classes"]
    named = {k: [names[i]["text"] for i in record[f"{k}_ids"]] for k in ("negative", "not_exhaustive", "positive")}
    assert named == {"negative": ["bat (animal)", "couch"], "not_exhaustive": ["dog"], "positive": []}
    assert records["coco:000000000003"]["boxes"] == []  # a picture without boxes is kept


def test_same_bytes_in_two_sets_are_one_record(built):
    record = read(built)["coco:000000000002"]
    assert record["sources"] == ["coco", "lvis", "objects365"]
    assert record["image_ids"] == ["coco:000000000002", "objects365:objects365_v2_00000005"]
    assert list(zip(record["class_names"], record["box_sources"], strict=True)) == [
        ("couch", 0),
        ("bat (animal)", 1),
        ("computer mouse", 2),
    ]
    assert record["boxes"][0] == [80, 40, 96, 50]  # clipped
    names = json.loads((built / "classes.json").read_text())["classes"]
    # LVIS says 'no sofa', COCO drew a couch: the box counts.
    assert [names[i]["text"] for i in record["negative_ids"]] == ["dog"]


def test_openimages_record(built):
    records = read(built)
    record = records["openimages:000026e7ee790996"]
    np.testing.assert_allclose(record["boxes"], [[20, 20, 120, 80], [100, 0, 180, 100]], rtol=1e-6)
    assert record["class_names"] == ["dog", "man"] and record["is_group_of"] == [False, True]
    classes = json.loads((built / "classes.json").read_text())["classes"]
    assert [classes[i]["text"] for i in record["positive_ids"]] == ["dog"]
    assert [classes[i]["text"] for i in record["negative_ids"]] == ["mouse (animal)"]
    other = records["openimages:000062a39995e348"]
    assert [classes[i]["text"] for i in other["positive_ids"]] == ["animal"] and other["is_group_of"] == [False]
    parents = {row["text"]: row["parents"] for row in classes}
    assert parents["man"] == ["person"] and parents["dog"] == ["animal"] and parents["mouse (animal)"] == []


def test_pseudo_boxes_carry_teacher_score_and_threshold(built):
    records = read(built)
    record = records["imagenet:n01440764_10026"]
    assert (record["teacher"], record["threshold"]) == ("dyhead-1", 0.5)
    assert record["class_names"] == ["person", "dog"]
    np.testing.assert_allclose(record["scores"], [0.93, 0.61], rtol=1e-6)
    assert record["boxes"] == [[40, 2, 60, 22], [1, 2, 31, 42]]
    classes = json.loads((built / "classes.json").read_text())["classes"]
    assert [classes[i]["text"] for i in record["positive_ids"]] == ["tench"]
    # The third has no box above the threshold: nothing is known about it.
    assert "imagenet:n01440764_2" not in records


def test_arrays(built):
    arrays = detection_arrays(read(built)["coco:000000000003"])
    assert arrays["boxes"].shape == (0, 4) and arrays["boxes"].dtype == np.float32
    arrays = detection_arrays(read(built)["imagenet:n01440764_10026"])
    assert arrays["boxes"].shape == (2, 4) and arrays["class_ids"].dtype == np.int32
    assert np.isnan(detection_arrays(read(built)["coco:000000000001"])["scores"]).all()
    np.testing.assert_allclose(arrays["scores"], [0.93, 0.61], rtol=1e-6)


def test_counts_add_up(built):
    report = json.loads((built / "report.json").read_text())
    dropped = ("in_unused_images", "not_finite", "zero_area", "outside", "thin", "contradicted", "double", "boxes_used")
    lost = ("leaked", "missing", "corrupt", "size_mismatch", "without_pseudo_boxes", "images_used")
    for source in report["sources"]:
        assert source["boxes"] == sum(source[name] for name in dropped), source
        assert source["images"] == sum(source[name] for name in lost), source
    by_kind = {source["source"].split()[0]: source for source in report["sources"]}
    coco = by_kind["coco"]
    assert [coco[k] for k in ("boxes", "zero_area", "outside", "thin", "clipped", "boxes_used")] == [7, 1, 1, 1, 1, 4]
    assert coco["not_read"] == {"unknown_image": 1}
    assert by_kind["openimages"]["not_read"] == {"label_of_other_image": 1, "unknown_category": 1}
    assert by_kind["imagenet"]["not_read"] == {"below_threshold": 2, "unknown_image": 1}
    assert by_kind["imagenet"]["without_pseudo_boxes"] == 1
    assert report["double_boxes"] == {"coco + lvis": 1, "objects365 + objects365": 1}
    assert report["contradicted"] == {"negative_labels": 1, "pseudo_boxes": 0}
    assert report["totals"]["train"]["images"] == 8 and report["totals"]["train"]["boxes"] == 15
    assert report["totals"]["train"]["pseudo_boxes"] == 3 and report["totals"]["train"]["crowd_boxes"] == 1
    assert sum(file["records"] for file in report["files"].values()) == 8


def test_merge_table_is_complete_and_says_why(built):
    rows = rows_of(built / "label_merges.csv")
    assert len(rows) == 4 + 5 + 4 + 6 + 4
    how = {(row["source"], row["category"]): (row["text"], row["how"]) for row in rows}
    assert how["lvis", "sofa"] == ("couch", "rule")
    assert how["objects365", "Love Seat"] == ("settee", "synonym 'love seat'")
    assert how["coco", "mouse"][0] == how["objects365", "Mouse"][0] == "computer mouse"
    assert how["openimages", "Mouse"][0] == how["imagenet", "mouse"][0] == "mouse (animal)"
    assert how["openimages", "Bat (Animal)"][0] == how["lvis", "bat_(animal)"][0] == "bat (animal)"
    # LVIS's person has the synonym 'man', but OpenImages has persons and men.
    assert how["openimages", "Man"][0] == "man" and how["openimages", "Person"][0] == how["coco", "person"][0]
    apart = rows_of(built / "kept_apart.csv")
    assert apart == [{"text": "man", "other": "person", "why": "both are classes of openimages"}]
    exhaustive = json.loads((built / "classes.json").read_text())["exhaustive"]
    assert sorted(exhaustive) == ["coco", "objects365"] and len(exhaustive["coco"]) == 4


def test_sheet_is_self_contained(built):
    page = (built / "sheet.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 8
    assert "http" not in page and "src='data:" in page and not re.search(r"<(script|link)", page)
    assert "negative: bat (animal), couch" in page and "teacher dyhead-1, score at least 0.5" in page


def test_boxes_are_drawn_where_they_are():
    record = {
        "boxes": [[10.0, 30.0, 50.0, 60.0]],
        "class_names": ["dog"],
        "sources": ["coco"],
        "box_sources": [0],
        "iscrowd": [False],
        "is_group_of": [False],
        "scores": [None],
    }
    canvas = np.asarray(draw_boxes(np.zeros((100, 200, 3), np.uint8), record, side=400))
    red = tuple(int(COLOURS["coco"][i : i + 2], 16) for i in (1, 3, 5))
    rows, columns = np.nonzero((canvas == red).all(-1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (60, 119, 20, 99)
    assert not canvas[100, 60].any()  # the inside stays


# -- the same bytes ---------------------------------------------------------------------------------------------------


def contents(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_same_output_for_another_order_and_a_restart(world, built, tmp_path):
    run(*reversed(command(world, tmp_path, "--shards=3", "--workers=1")))
    first = contents(built)
    assert contents(tmp_path) == first and len(first) > 8
    shard = next(p for p in sorted(tmp_path.rglob("*.array_record*")))
    others = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.array_record*") if p != shard}
    shard.unlink()
    (tmp_path / "report.json").unlink()
    run(*command(world, tmp_path, "--shards=3"))
    assert contents(tmp_path) == first
    assert {p: p.stat().st_mtime_ns for p in others} == others  # finished files were not written again


def test_folder_of_another_build_is_refused(world, built, capsys):
    before = contents(built)
    assert "holds records of another build" in fails(capsys, *command(world, built, "--shards=2"))
    assert contents(built) == before


# -- leaks ------------------------------------------------------------------------------------------------------------


def coco_val(world, images, name="instances_val2017.json"):
    path = dump(world["root"] / name, coco_json(images, [coco_box(1, images[0]["id"], 18, [1.0, 1.0, 20.0, 20.0])]))
    return path, world["root"] / "coco/val2017"


def test_leak_by_id(world, tmp_path, capsys):
    path, _ = coco_val(world, [coco_image(1)], "by_id.json")
    leak = f"--coco={path}:{world['root']}/coco/train2017:validation"
    message = fails(capsys, *command(world, tmp_path / "a", leak))
    assert "2 training images are evaluation images too" in message
    assert (
        "coco:000000000001 of coco train instances_train2017.json (same id: coco:000000000001 of coco validation"
        in message
    )
    assert not (tmp_path / "a").exists()
    run(*command(world, tmp_path / "b", leak, "--leaks=drop"))
    assert "coco:000000000001" not in read(tmp_path / "b")
    held_out = read(tmp_path / "b", "validation")["coco:000000000001"]
    assert held_out["sources"] == ["coco"] and held_out["boxes"] == [[1, 1, 21, 21]] and held_out["negative_ids"] == []
    assert [row["source"].split()[0] for row in rows_of(tmp_path / "b/leaks.csv")] == ["coco", "lvis"]
    report = json.loads((tmp_path / "b/report.json").read_text())
    assert report["leaks_dropped"] == 2 and report["totals"]["validation"]["images"] == 1
    assert report["class_overlap"][0]["not_in_training"] == []
    assert report["class_overlap"][0]["in_training"] == report["class_overlap"][0]["classes"] == 4


def test_leak_by_hash(world, tmp_path, capsys):
    """Another set's validation picture has the bytes of a training picture."""
    picture(tmp_path / "val/patch0/objects365_v1_7.jpg", 3)
    val = dump(
        tmp_path / "val.json", objects365_json([(7, "images/v1/patch0/objects365_v1_7.jpg")], [(7, 1, [1, 1, 9, 9])])
    )
    message = fails(capsys, *command(world, tmp_path / "o", f"--objects365={val}:{tmp_path}/val:validation"))
    assert "1 training images" in message
    assert (
        "coco:000000000003 of coco train instances_train2017.json (same file: objects365:objects365_v1_7 of" in message
    )


def test_leak_of_published_evaluation_images(world, tmp_path, capsys):
    path, images = coco_val(world, [coco_image(139, "val2017")])
    message = fails(capsys, *command(world, tmp_path / "o", f"--coco={path}:{images}"))
    assert "coco:000000000139 of coco train instances_val2017.json (published for evaluation: val2017)" in message
    run(f"--coco={path}:{images}:validation", f"--out={tmp_path / 'v'}")
    assert list(read(tmp_path / "v", "validation")) == ["coco:000000000139"] and not (tmp_path / "v/train").exists()


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(5, 9))
def test_boxes_turn_with_the_picture(orientation):
    image = Image.new("L", (12, 7))
    image.paste(255, (2, 1, 7, 4))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    x1, y1, x2, y2 = turn_boxes(np.array([[2.0, 1, 7, 4]]), np.array([[12.0, 7]]), orientation)[0].astype(int)
    expected = np.zeros_like(shown)
    expected[y1:y2, x1:x2] = 255
    np.testing.assert_array_equal(shown, expected)


def test_turned_resized_misfit_missing_and_corrupt_pictures(tmp_path):
    folder = tmp_path / "images"
    picture(folder / f"{1:012d}.jpg", 1, (WIDTH, HEIGHT), orientation=6)  # annotated as stored
    picture(folder / f"{2:012d}.jpg", 2, (HEIGHT, WIDTH), orientation=6)  # annotated as shown
    picture(folder / f"{3:012d}.jpg", 3, (WIDTH // 2, HEIGHT // 2))  # a smaller copy
    picture(folder / f"{4:012d}.jpg", 4, (WIDTH, WIDTH))  # another picture
    (folder / f"{5:012d}.jpg").write_bytes(b"\xff\xd8\xff not an image")
    truncated = picture(folder / f"{7:012d}.jpg", 7, (200, 200))[:-100]
    (folder / f"{7:012d}.jpg").write_bytes(truncated)
    images = [coco_image(i) for i in range(1, 8)]
    images[6] |= {"width": 200, "height": 200}
    path = dump(
        tmp_path / "a.json", coco_json(images, [coco_box(i, i, 1, [10.0, 8.0, 20.0, 4.0]) for i in range(1, 8)])
    )
    run(f"--coco={path}:{folder}", f"--out={tmp_path / 'o'}", "--verify")
    records = read(tmp_path / "o")
    boxes = {int(key[5:]): (r["width"], r["height"], r["boxes"]) for key, r in records.items()}
    assert boxes == {
        1: (HEIGHT, WIDTH, [[HEIGHT - 12, 10, HEIGHT - 8, 30]]),
        2: (WIDTH, HEIGHT, [[10, 8, 30, 12]]),
        3: (WIDTH // 2, HEIGHT // 2, [[5, 4, 15, 6]]),
    }
    (source,) = json.loads((tmp_path / "o/report.json").read_text())["sources"]
    wanted = {"turned": 1, "rescaled": 1, "size_mismatch": 1, "missing": 1, "corrupt": 2, "in_unused_images": 4}
    assert {name: source[name] for name in wanted} == wanted
    run(f"--coco={path}:{folder}", f"--out={tmp_path / 'fast'}")
    assert "coco:000000000007" in read(tmp_path / "fast")  # only decoding finds a truncated file


def test_names_with_folders_that_the_copy_lacks(tmp_path):
    spec = SourceSpec("objects365", "x.json", str(tmp_path))
    names = ["images/v1/patch8/a.jpg", "images/v1/patch9/b.jpg"]
    picture(tmp_path / "patch9/b.jpg", 1)
    assert file_paths(spec, names) == [f"{tmp_path}/patch8/a.jpg", f"{tmp_path}/patch9/b.jpg"]
    picture(tmp_path / "images/v1/patch8/a.jpg", 1)
    assert file_paths(spec, names) == [f"{tmp_path}/{name}" for name in names]
    with pytest.raises(UserError, match=r"no image in .*give the folder of the images of https://www.objects365"):
        file_paths(spec, ["c.jpg"])


def test_changed_picture_stops_the_build(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "i" / f"{1:012d}.jpg", 1)
    path = dump(tmp_path / "a.json", coco_json([coco_image(1)], []))
    prepare = detection.prepare_folder
    monkeypatch.setattr(
        detection, "prepare_folder", lambda *a: (prepare(*a), picture(tmp_path / "i" / f"{1:012d}.jpg", 2))
    )
    message = fails(capsys, f"--coco={path}:{tmp_path / 'i'}", f"--out={tmp_path}")
    assert "000000000001.jpg changed during the build" in message


# -- boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "reason", "clipped"),
    [
        ((1, 2, 30, 40), "ok", None),
        ((-0.3, 0, 96.2, 64), "ok", (0, 0, 96, 64)),
        ((-10, 50, 20, 80), "ok", (0, 50, 20, 64)),
        ((5, 5, 5, 9), "zero_area", None),
        ((9, 5, 7, 9), "zero_area", None),
        ((96, 0, 120, 9), "outside", None),
        ((-9, 1, 0, 9), "outside", None),
        ((5, 5, 5.5, 20), "thin", None),
        ((95.5, 5, 130, 20), "thin", None),
        ((np.nan, 5, 6, 20), "not_finite", None),
        ((1, 5, np.inf, 20), "not_finite", None),
    ],
)
def test_clean_boxes(box, reason, clipped):
    out, code, moved = clean_boxes(np.array([box], float), np.array([[96, 64]]))
    assert detection_merge.REASONS[code[0]] == reason and out.dtype == np.float32
    if reason == "ok":
        np.testing.assert_array_equal(out[0], np.float32(clipped or box))
        assert moved[0] == (box[0] == -10)


def iou(a, b):
    w, h = (min(a[2 + k], b[2 + k]) - max(a[k], b[k]) for k in (0, 1))
    if w <= 0 or h <= 0:
        return 0.0
    area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return w * h / (sum(area) - w * h)


def test_overlapping_pairs_equal_the_definition(monkeypatch):
    monkeypatch.setattr(detection_merge, "TILE", 7)
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 20, (40, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 20, (40, 2))], 1)
    i, j, values = overlapping_pairs(boxes, 0.4)
    expected = {(a, b): v for a, b in itertools.combinations(range(40), 2) if (v := iou(boxes[a], boxes[b])) >= 0.4}
    assert expected.keys() == set(zip(i.tolist(), j.tolist(), strict=True)) and len(expected) > 20
    np.testing.assert_allclose(values, [expected[pair] for pair in zip(i.tolist(), j.tolist(), strict=True)])


def shifted(*shifts):
    """Boxes 100 pixels wide; the IoU of two is (100 - d) / (100 + d)."""
    return np.array([[s, 0, s + 100, 50] for s in shifts], float)


@pytest.mark.parametrize(
    ("shifts", "sources", "pseudo", "repeats"),
    [
        ((0, 0, 10), (0, 0, 0), (), (-1, 0, -1)),  # exact copies in one set go, neighbours stay
        ((0, 10), (0, 1), (), (-1, 0)),  # IoU .82 of two sets: one object
        ((0, 25), (0, 1), (), (-1, -1)),  # IoU .6: two objects
        ((0, 10, 6), (0, 1, 1), (), (-1, -1, 0)),  # the nearest of the other set's two, and only that
        ((0, 12, 10), (0, 0, 1), (), (-1, -1, 1)),  # the other set's box is the second's
        ((0, 10, 6), (0, 1, 2), (), (-1, 0, 0)),  # one of each other set
        ((0, 10, 6), (0, 1, 1), (1, 2), (-1, 0, 0)),  # a teacher's boxes have no such limit
    ],
)
def test_double_boxes(shifts, sources, pseudo, repeats):
    marks = np.isin(np.arange(len(shifts)), pseudo)
    assert double_boxes(shifted(*shifts), np.array(sources), marks).tolist() == list(repeats)


def test_group_rows_equals_union_find():
    rng = np.random.default_rng(1)
    codes = [rng.integers(-1, 60, 100), rng.integers(-1, 60, 100)]
    parent = list(range(100))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for code in codes:
        for a, b in itertools.combinations(range(100), 2):
            if code[a] == code[b] >= 0:
                parent[max(root(a), root(b))] = min(root(a), root(b))
    assert group_rows(*codes).tolist() == [root(i) for i in range(100)]
    chain = np.arange(2000) // 2
    assert not group_rows(chain, (np.arange(2000) + 1) // 2).any()


# -- labels -----------------------------------------------------------------------------------------------------------


def table(kind, *categories):
    empty = np.zeros(0, np.int32), np.zeros(0, np.int32)
    columns = dict.fromkeys(("ids", "files", "sizes", "official", "box_image", "box_category", "boxes", "crowd"), ())
    spec = SourceSpec(kind, f"{kind}.json", "images")
    labels = dict.fromkeys(("negative", "not_exhaustive", "positive"), empty)
    return Annotations(spec=spec, categories=list(categories), group_of=(), scores=(), **columns, **labels)


def test_label_space_does_not_depend_on_order():
    tables = [
        table("coco", Category("1", "couch"), Category("2", "cup")),
        table("lvis", Category("1", "sofa", ("sofa", "couch")), Category("2", "mug", ("mug", "cup"))),
        table("openimages", Category("/m/1", "Couch"), Category("/m/2", "Mug"), Category("/m/3", "Coffee cup")),
    ]
    spaces = [LabelSpace(order, ()) for order in itertools.permutations(tables)]
    assert all(s.texts == spaces[0].texts and s.merge_table() == spaces[0].merge_table() for s in spaces)
    assert spaces[0].texts == ["coffee cup", "couch", "cup"]  # LVIS and OpenImages: mug = COCO's cup
    assert spaces[0].ids("openimages", tables[2].categories).tolist() == [1, 2, 0]


def test_ambiguous_synonym_merges_nothing():
    tables = [
        table("coco", Category("1", "bat")),
        table("lvis", Category("1", "club", ("bat",)), Category("2", "flying fox", ("bat",))),
    ]
    space = LabelSpace(tables, ())
    assert space.texts == ["bat", "club", "flying fox"]
    assert {why for *_, why in space.kept_apart} == {"a synonym of several classes"}


def test_rules(tmp_path):
    path = tmp_path / "rules.csv"
    path.write_text("source,category,text\ncoco,tv,Monitor_or TV\nlvis,7,monitor or tv\ncoco,radio,x\n")
    tables = [table("coco", Category("5", "tv")), table("lvis", Category("7", "television_set", ("tv",)))]
    space = LabelSpace(tables, [*RULES, *read_rules(str(path))])
    assert space.texts == ["monitor or tv"]
    assert ("coco", "radio", "x") in space.unused_rules
    for text, message in (("source,category\n", "no column text"), ("source,category,text\nvoc,a,b\n", "line 2")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_rules(str(path))


def test_built_in_rules_are_canonical():
    assert all(text == class_text(text) for _, _, text in RULES)
    assert len({rule[:2] for rule in RULES}) == len(RULES)


# -- teachers ---------------------------------------------------------------------------------------------------------


def live_teacher(images):
    """Finds the rectangle that `picture` draws, in pixels of the picture that it is given."""
    found = []
    for image in images:
        assert image.dtype == np.uint8 and image.ndim == 3
        rows, columns = np.nonzero(image[..., 0].astype(int) > 235)
        box = [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        found.append({"boxes": np.array(box, np.float32), "scores": np.array([0.75]), "category_ids": np.array([18])})
    return found


def test_live_teacher(world, tmp_path):
    run(f"--imagenet={world['imagenet']}", f"--teacher={__name__}:live_teacher", f"--out={tmp_path}")
    records = read(tmp_path)
    assert len(records) == 3
    for record in records.values():
        assert record["class_names"] == ["dog"] and record["scores"] == [0.75]
        assert iou(record["boxes"][0], (10, 10, 41, 31)) > 0.7
        assert record["teacher"] == f"{__name__}:live_teacher"
    results = json.loads((tmp_path / "teacher_image_info.json").read_text())
    assert sorted(row["image_id"] for row in results) == [900, 901, 902]


def test_class_of_the_image_for_the_best_box(world):
    spec = parse_spec("imagenet", world["imagenet"])
    words = read_synset_words(world["words"])
    table = read_imagenet(spec, world["teacher"], "t", 0.5, words, "image")
    assert [table.categories[c].name for c in table.box_category] == ["tench", "mouse"]
    np.testing.assert_allclose(table.scores, [0.93, 0.5], rtol=1e-6)
    assert table.skipped["not_the_best_box"] == 1 and table.categories[-1].id == "n02330245"


def test_pseudo_box_of_a_class_that_people_denied(world, tmp_path):
    """The teacher sees a dog in a picture that LVIS says has none."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "n01440764_10026.JPEG").write_bytes((world["root"] / "coco/train2017/000000000002.jpg").read_bytes())
    info = imagenet_info(tmp_path / "info.json", ["n01440764_10026.JPEG"])
    out = tmp_path / "o"
    run(f"--lvis={world['lvis']}", f"--imagenet={info}:{folder}", f"--teacher={world['teacher']}", f"--out={out}")
    record = read(out)["coco:000000000002"]
    assert record["sources"] == ["lvis", "imagenet"] and record["class_names"] == ["bat (animal)", "person"]
    assert json.loads((out / "report.json").read_text())["contradicted"]["pseudo_boxes"] == 1


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_streamed_json_equals_json(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    data = {
        "info": {"n": [1]},
        "a": [12345, -6.5e3, 'ä"]', None, {"x": [[1, 2], {}]}, [], 7],
        "n": 1234,
        "b": [],
        "c": [True],
    }
    for indent in (None, 2):
        (tmp_path / "x.json").write_bytes(
            b"\xef\xbb\xbf" + json.dumps(data, indent=indent, ensure_ascii=False).encode()
        )
        assert list(json_items(str(tmp_path / "x.json"))) == [(k, v) for k in "abc" for v in data[k]]
    assert list(json_items(dump(tmp_path / "y.json", [1, {"a": 2}]))) == [("", 1), ("", {"a": 2})]


@pytest.mark.parametrize("text", ['{"a": [1, 2', '{"a": [{"b": 1}', "", "3", '{"a" [1]}', '{"a": [1 2]}', b"\xff\xfe"])
def test_damaged_json(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"x\.json is not complete JSON"):
        list(json_items(str(tmp_path / "x.json")))


def test_lvis_half_has_names_of_2014(tmp_path):
    image = lvis_image(391895)
    del image["coco_url"]
    image["file_name"] = "COCO_val2014_000000391895.jpg"
    path = dump(tmp_path / "lvis_v0.5_train.json", lvis_json([image], []))
    table = read_annotations(SourceSpec("lvis", path, str(tmp_path)))
    assert table.files == ["000000391895.jpg"] and table.ids == ["coco:000000391895"]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("coco", lambda d: d["images"][0].pop("width"), r"images\[0\] has no 'width'; is it a file of coco"),
        ("coco", lambda d: d["annotations"][1].update(bbox=[1, 2, 3]), r"annotations\[1\] is not valid"),
        ("coco", lambda d: d.update(categories=[]), "has no categories; get it from https://cocodataset.org"),
        ("lvis", lambda d: d["images"][1].pop("neg_category_ids"), r"images\[1\] has no 'neg_category_ids'"),
        ("objects365", lambda d: d["images"][0].pop("file_name"), r"images\[0\] has no 'file_name'"),
    ],
)
def test_wrong_fields(world, tmp_path, kind, change, message):
    data = json.loads(open(world[kind].split(":")[0]).read())
    change(data)
    with pytest.raises(UserError, match=message):
        read_annotations(SourceSpec(kind, dump(tmp_path / "x.json", data), str(tmp_path)))


def test_openimages_mistakes(tmp_path):
    row = ("000026e7ee790996", "/m/0bt4r4", "0.1x", 0.6, 0.2, 0.8, 0)
    path = openimages_files(tmp_path, [row], [])
    spec = SourceSpec("openimages", path, str(tmp_path))
    with pytest.raises(UserError, match=r"bbox.csv line 2: could not convert string to float: '0.1x'"):
        read_annotations(spec)
    openimages_files(tmp_path, [row], [], header=BBOX_HEADER.replace("XMin", "Left"))
    with pytest.raises(UserError, match=r"no column XMin, only: ImageID"):
        read_annotations(spec)
    (tmp_path / "train-annotations-human-imagelabels-boxable.csv").unlink()
    with pytest.raises(
        UserError, match=r"needs the file .*train-annotations-human-imagelabels-boxable.csv.*get it from"
    ):
        read_annotations(spec)


def test_openimages_validation_file_is_evaluation(world, tmp_path, capsys):
    path = openimages_files(tmp_path / "oi", [("000026e7ee790996", "/m/0bt4r4", 0, 1, 0, 1, 0)], [], "validation")
    message = fails(capsys, f"--openimages={path}:{world['root']}/oi/train", f"--out={tmp_path / 'o'}")
    assert "openimages:000026e7ee790996" in message and "published for evaluation: validation" in message


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no source: give at least one of --coco"),
        (["--coco=x.json"], "write ANNOTATIONS:IMAGES"),
        (["--coco=x.json:y:test"], "write ANNOTATIONS:IMAGES"),
        (["--coco=nowhere.json:."], "coco needs the file nowhere.json; get it from https://cocodataset.org"),
        (["--coco={coco_json}:nowhere"], "nowhere is not a folder of images"),
        (["--coco={coco_json}:."], "no image in ."),
        (["--imagenet={imagenet}"], "needs --teacher=RESULTS.json"),
        (["--imagenet={imagenet}", "--teacher=gone.json"], "--teacher=gone.json does not exist"),
        (["--imagenet={imagenet}", "--teacher=no_module:f"], "No module named 'no_module'"),
        (["--imagenet={imagenet}", "--teacher={coco_json}"], "item 0 is no COCO result"),
        (["--imagenet={imagenet}", "--teacher={teacher}", "--threshold=7"], "threshold must be from 0 to 1"),
        (["--imagenet={imagenet}", "--teacher={teacher}", "--pseudo_labels=image"], "give --imagenet_words"),
        (["--coco={coco}", "--across_iou=0"], "the IoU across sources must be above 0"),
        (["--coco={coco}", "--workers=0"], "--workers must be at least 1"),
        (["--coco={coco}", "--label_rules=gone.csv"], "gone.csv does not exist"),
    ],
)
def test_mistakes(world, tmp_path, capsys, args, message):
    places = world | {"coco_json": world["coco"].split(":")[0]}
    assert message in fails(capsys, *(arg.format(**places) for arg in args), f"--out={tmp_path / 'o'}")
    assert not list(tmp_path.rglob("*.array_record*"))


def test_spec_of_a_bucket(monkeypatch):
    folder = types.SimpleNamespace(is_dir=lambda: True)
    monkeypatch.setattr(detection_formats, "need_file", lambda spec, path: path)
    monkeypatch.setattr(detection_formats, "epath", types.SimpleNamespace(Path=lambda path: folder))
    spec = parse_spec("lvis", "gs://b/x.json:gs://b/images:validation")
    assert spec == SourceSpec("lvis", "gs://b/x.json", "gs://b/images", "validation")
