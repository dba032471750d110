"""People's own boxes: COCO, VOC, CSV, folders as tools export them, records of the detection builder."""

import json
import pickle

import numpy as np
import pytest
from detection_files import make_sets
from detection_files import run as build
from planted_boxes import PLANTED, coco, good_folder, picture, planted_folder, write

from florence_jax.data import box_cleaning
from florence_jax.data.buckets import make_buckets
from florence_jax.data.pipeline import eval_stream
from florence_jax.data.records import BadRecord, sample_of
from florence_jax.data.sources.array_record import write_array_record
from florence_jax.data.sources.boxes import pictures_by_class
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.detection import box_parts, open_boxes
from florence_jax.errors import UserError

VOC = """<annotation><folder>x</folder><filename>{name}</filename><source><database>{database}</database></source>
<size><width>60</width><height>40</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""


def voc(path, name, boxes, database="Unknown"):
    objects = "".join(OBJECT.format(name=label, difficult=hard, box=box) for label, hard, box in boxes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(VOC.format(name=name, database=database, objects=objects))


def rows(source):
    """key -> (boxes, class names) of all records."""
    return {
        record["key"]: (record["boxes"].tolist(), [source.class_names[k] for k in record["class_ids"]])
        for record in source.metadata()
    }


# -- COCO -------------------------------------------------------------------------------------------------------------


def test_coco(tmp_path):
    good_folder(tmp_path, 5)
    source = open_boxes(str(tmp_path))
    assert source.class_names == ("ant", "bee", "cat") and source.category_ids == (1, 4, 7)  # as the file has them
    assert len(source) == 5 and not source.problems.counts
    record = source[1]
    assert record["key"] == "1.png" and record["image_id"] == 1 and record["image"][:4] == b"\x89PNG"
    assert (record["width"], record["height"]) == (60, 40)
    np.testing.assert_array_equal(record["boxes"], np.float32([[5, 5, 25, 25], [30, 10, 55, 35]]))
    assert record["boxes"].dtype == np.float32 and record["class_ids"].tolist() == [0, 1]
    assert not record["iscrowd"].any() and not record["is_group_of"].any()
    np.testing.assert_array_equal(record["areas"], np.float32([400, 625]))
    assert [row["key"] for row in source.metadata()] == [f"{i}.png" for i in range(5)]
    assert len(sample_of(source, 3)) == 3 and "image" not in next(source.metadata())
    says = source.summary["says"]
    assert says.endswith("annotations.json: 5 pictures, 10 boxes of 3 classes (ant, bee, cat; their ids: 1, 4, 7)")
    named = open_source(f"coco:{tmp_path}/annotations.json:{tmp_path}")
    assert rows(named) == rows(source) == rows(open_boxes(f"{tmp_path}/annotations.json"))
    again = pickle.loads(pickle.dumps(source))
    assert rows(again) == rows(source) and again[0]["image"] == source[0]["image"]


def test_every_planted_mistake_is_named_and_the_rest_is_used(tmp_path):
    source = open_boxes(str(planted_folder(tmp_path)))
    found = {}
    for flaw in source.problems:
        found.setdefault(flaw.kind, []).append((flaw.where, flaw.detail))
    assert len(PLANTED) > 15 and found.keys() == PLANTED.keys() - {"same_picture"}  # the contents are for `BoxCheck`
    for kind in found:
        where, detail = PLANTED[kind]
        assert any(where == w and detail in d for w, d in found[kind]), (kind, found[kind])
    assert [name for name, _ in found["unused_file"]] == ["spare.png"]
    shown = rows(source)
    assert shown.keys() == {
        *(f"{i}.png" for i in range(7)),
        *("copy.png", "phone.jpg", "small.png", "nosize.png", "deep.png", "text.png"),
    }
    assert shown["3.png"] == ([[5, 5, 25, 25], [30, 10, 55, 35]], ["ant", "bee"])
    assert shown["phone.jpg"][0] == [[25, 10, 35, 40]] and shown["small.png"][0] == [[5, 5, 15, 15]]
    assert source[list(shown).index("phone.jpg")]["width"] == 40
    assert source.class_names == ("ant", "bee", "cat", "Ant") and source.category_ids == (1, 4, 7, 11)
    assert "left out: pictures that are not there: 1, pictures that cannot be read: 1" in source.summary["says"]
    assert {row["image_id"] for row in source.metadata()} >= {0, "x9"}
    assert all(isinstance(source[i]["image"], bytes) for i in range(len(source)))


def test_ids_may_be_texts_sparse_or_begin_at_zero(tmp_path):
    picture(tmp_path / "a.png", 0)
    content = coco([("007", "a.png", 60, 40)], [("007", "c", 1, 2, 3, 4), ("007", "0", 1, 2, 3, 4)])
    content["categories"] = [{"id": "0", "name": "zero"}, {"id": "c", "name": "see"}, {"id": 2000000000, "name": "far"}]
    write(tmp_path / "annotations.json", content)
    source = open_boxes(str(tmp_path))
    assert source.category_ids == ("0", "c", 2000000000) and source[0]["image_id"] == "007"
    assert source[0]["class_ids"].tolist() == [1, 0]
    for category in content["annotations"]:
        category["category_id"], category["image_id"] = 0, 7
    content["images"][0]["id"] = "7"  # 7 and "7" are one
    write(tmp_path / "annotations.json", content)
    assert open_boxes(str(tmp_path))[0]["class_ids"].tolist() == [0, 0]


def test_roboflow_exports_as_they_come(tmp_path):
    for part, count in (("train", 4), ("valid", 2), ("test", 3)):
        good_folder(tmp_path / part, count)
        content = json.loads((tmp_path / part / "annotations.json").read_text())
        for category in content["categories"]:
            category["supercategory"] = "insects"
        content["categories"].insert(0, {"id": 0, "name": "insects", "supercategory": "none"})
        (tmp_path / part / "annotations.json").unlink()
        write(tmp_path / part / "_annotations.coco.json", content)
    source = open_boxes(str(tmp_path), "train")
    assert len(source) == 4 and source.class_names == ("ant", "bee", "cat") and source.category_ids == (1, 4, 7)
    assert "stands above the others (Roboflow's class 0): 1" in source.summary["says"]
    assert source.problems.counts == {"root_class": 1} and source[0]["key"] == "0.png"
    assert box_parts(str(tmp_path)) == {"train", "test"} and box_parts(str(tmp_path / "valid")) == frozenset()
    assert len(open_boxes(str(tmp_path), "test")) == 3 and len(open_boxes(str(tmp_path / "valid"))) == 2
    with pytest.raises(UserError, match="boxes in several files, test/_ann.*train/_ann.*: name one, such as coco:"):
        open_boxes(str(tmp_path))
    (tmp_path / "test" / "_annotations.coco.json").unlink()
    assert len(open_boxes(str(tmp_path), "test")) == 2


def test_the_layout_of_coco(tmp_path):
    content = {}
    for part, first in (("train2017", 0), ("val2017", 10)):
        for i in (first, first + 1):
            picture(tmp_path / part / f"{i:012}.jpg", i)
        images = [(i, f"{i:012}.jpg", 60, 40) for i in (first, first + 1)]
        content[part] = coco(images, [(first, 1, 1, 2, 30, 20)])
        write(tmp_path / f"annotations/instances_{part}.json", content[part])
    source = open_boxes(str(tmp_path), "test")
    assert list(rows(source)) == ["val2017/000000000010.jpg", "val2017/000000000011.jpg"]
    assert source.summary["without_boxes"] == 1
    spec = f"coco:{tmp_path}/annotations/instances_train2017.json:{tmp_path}/train2017"
    assert list(rows(open_boxes(spec))) == ["000000000000.jpg", "000000000001.jpg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(annotations=[]), "no boxes: 2 pictures, classes: ant, bee, cat; its annotations are empty"),
        (lambda c: c.pop("annotations"), "no boxes: 2 pictures"),
        (lambda c: c.pop("images"), "has no 'images', it has annotations, categories: a file of COCO's kind has"),
        (lambda c: c.update(categories=[]), "has no 'categories'"),
        (lambda c: [b.update(bbox=[1, 2, 0, 4]) for b in c["annotations"]], "left out: boxes of zero or negative"),
        (lambda c: [b.update(bbox=[30, 20, 55, 35]) for b in c["annotations"]], "look like x1 y1 x2 y2.*Write bbox"),
        (lambda c: [b.update(bbox=[0.1, 0.2, 0.5, 0.3]) for b in c["annotations"]], "shares of the picture.*Multiply"),
        (lambda c: [i.update(file_name="no.png") for i in c["images"]], "none of its 2 pictures is in .*'no.png'"),
    ],
)
def test_what_cannot_be_trained_on_is_one_message(tmp_path, change, message):
    good_folder(tmp_path, 2)
    content = json.loads((tmp_path / "annotations.json").read_text())
    change(content)
    write(tmp_path / "annotations.json", content)
    with pytest.raises(UserError, match=message):
        open_boxes(str(tmp_path))


def test_boxes_in_another_form_are_read_for_a_check(tmp_path):
    good_folder(tmp_path, 2)
    expected = rows(open_boxes(str(tmp_path)))
    content = json.loads((tmp_path / "annotations.json").read_text())
    for kind, form in (
        ("corners", lambda x, y, w, h: [x, y, x + w, y + h]),
        ("relative", lambda x, y, w, h: [x / 60, y / 40, w / 60, h / 40]),
    ):
        changed = json.loads(json.dumps(content))
        for box in changed["annotations"]:
            box["bbox"] = form(*box["bbox"])
        if kind == "corners":  # one more that exceeds
            changed["annotations"].append({"id": 9, "image_id": 0, "category_id": 1, "bbox": [30, 10, 55, 35]})
        write(tmp_path / "annotations.json", changed)
        source = open_boxes(str(tmp_path), check=True)
        assert source.problems.counts[kind] == 1
        assert {key: np.round(boxes[:2], 4).tolist() for key, (boxes, _) in rows(source).items()} == {
            key: boxes for key, (boxes, _) in expected.items()
        }
    write(tmp_path / "annotations.json", content | {"annotations": []})
    assert open_boxes(str(tmp_path), check=True).problems.counts["nothing"] == 1


def test_json_cut_in_the_middle_has_its_place(tmp_path):
    good_folder(tmp_path, 2)
    text = (tmp_path / "annotations.json").read_text()
    (tmp_path / "annotations.json").write_text(text[: text.index('"id": 3')])
    with pytest.raises(UserError, match=r"not complete JSON \(.* at character \d+, after annotations\[1\]\); save it"):
        open_boxes(str(tmp_path))


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_large_sets_are_sampled(tmp_path, monkeypatch):
    """Of many pictures a few headers are read; where one of them is of another size, all."""
    good_folder(tmp_path, 6)
    picture(tmp_path / "3.png", 3, (30, 20))
    monkeypatch.setattr(box_cleaning, "MOST_HEADERS", 2)
    monkeypatch.setattr(box_cleaning, "HEADER_SAMPLE", 2)  # the first and the last
    source = open_boxes(str(tmp_path))
    assert not source.problems.counts and source.sizes[3].tolist() == [60, 40]
    record = source[3]  # found when it is read
    assert record["width"] == 30 and record["boxes"][0].tolist() == [2.5, 2.5, 12.5, 12.5]
    assert record["areas"].tolist() == [100, 156.25]
    picture(tmp_path / "4.png", 3, (50, 50))
    with pytest.raises(BadRecord, match=r"'4.png': its annotations say 60 x 40 pixels, it has 50 x 50"):
        source[4]
    (tmp_path / "5.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(BadRecord, match=r"'5.png': corrupt image"):
        source[5]
    picture(tmp_path / "5.png", 3, (30, 20))
    assert open_boxes(str(tmp_path)).problems.counts == {"rescaled": 2, "size_mismatch": 1}


def test_sizes_make_buckets_and_batches(tmp_path):
    source = open_boxes(str(planted_folder(tmp_path)))
    buckets = make_buckets([source], ((32, 48), (48, 32)))
    assert [len(bucket.rows) for bucket in buckets] == [12, 1]
    ops = "decode|resize_fit({height}, {width})|pad_image({height}, {width})|pad_boxes(4)"
    ops += "|keep(image, valid, boxes, class_ids, objects, ignore, boxes_cut)"
    seen = 0
    with eval_stream(source, ops, {}, batch_size=4, buckets=buckets, host=("key",)) as stream:
        for batch in stream:
            assert batch["boxes"].shape == (4, 4, 4) and batch["class_ids"].dtype == np.int32
            assert batch["boxes_cut"].dtype == np.int32
            seen += int(batch["objects"].sum())
    assert seen == 19  # one picture has five: three stay, two are in the one place that is ignored


def test_width_and_height_the_wrong_way_round(tmp_path):
    good_folder(tmp_path, 2)
    content = json.loads((tmp_path / "annotations.json").read_text())
    for image in content["images"]:
        image["width"], image["height"] = 40, 60
    content["annotations"][3]["bbox"] = [5, 5, 20, 50]  # does fit the stated size, and not the picture
    write(tmp_path / "annotations.json", content)
    source = open_boxes(str(tmp_path))
    assert source.problems.counts["swapped"] == source.problems.counts["size_mismatch"] == 1
    assert rows(source) == {"0.png": ([[5, 5, 25, 25], [30, 10, 55, 35]], ["ant", "cat"])}
    assert "stated the wrong way round: 1 (their boxes fit, and stay); without boxes: bee" in source.summary["says"]


def test_names_of_files_as_other_machines_write_them(tmp_path):
    for i, name in enumerate(("a/x.png", "b/x.png", "b/Y.PNG")):
        picture(tmp_path / name, i)
    names = ("C:\\data\\b\\x.png", "./a/../a/x.png", "/home/me/b/y.png", "x.png")
    images = [(i, name, 60, 40) for i, name in enumerate(names)]
    write(tmp_path / "annotations.json", coco(images, [(i, 1, 5, 5, 9, 9) for i in range(4)]))
    source = open_boxes(str(tmp_path))
    assert list(rows(source)) == ["b/x.png", "a/x.png", "b/Y.PNG"]
    assert [(flaw.where, flaw.detail) for flaw in source.problems if flaw.kind == "missing_file"] == [
        ("x.png", "it may be a/x.png or b/x.png")
    ]


# -- Pascal VOC -------------------------------------------------------------------------------------------------------


def test_voc(tmp_path):
    for i in range(4):
        picture(tmp_path / f"JPEGImages/{i}.png", i)
    boxes = [("rbc", 0, (1, 2, 30, 40)), ("wbc", 1, (5, 5, 20, 20))]
    voc(tmp_path / "Annotations/0.xml", "0.jpg", boxes)  # the suffix is another
    voc(tmp_path / "Annotations/1.xml", "1.png", boxes[:1], "The VOC2007 Database")
    voc(tmp_path / "Annotations/2.xml", "2.png", [("rbc", 0, ("x", 2, 3, 4)), ("", 0, (1, 2, 3, 4))])
    (tmp_path / "Annotations/3.xml").write_text("<annotation><size>")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("0\n2\n\n9\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("1  1\n3 -1\n")
    source = open_boxes(f"voc:{tmp_path}")
    assert source.class_names == ("rbc", "wbc") and source.category_ids == (1, 2)
    assert rows(source) == {
        "JPEGImages/0.png": ([[1, 2, 30, 40], [5, 5, 20, 20]], ["rbc", "wbc"]),
        "JPEGImages/1.png": ([[0, 1, 30, 40]], ["rbc"]),  # the challenge's own files count from 1
        "JPEGImages/2.png": ([], []),
    }
    assert source[0]["image_id"] == "0" and source[0]["iscrowd"].tolist() == [False, True]
    found = {flaw.kind: flaw for flaw in source.problems}
    assert found.keys() == {"bad_annotation", "bad_box", "unknown_category", "unused_file"}
    assert found["bad_annotation"].where == "Annotations/3.xml" and "line 1" in found["bad_annotation"].detail
    assert found["bad_box"].detail == "Annotations/2.xml: object 0"
    train = open_boxes(f"voc:{tmp_path}:train")
    assert list(rows(train)) == ["JPEGImages/0.png", "JPEGImages/2.png"]
    assert train.problems.counts["no_annotation"] == 1 and "2 .xml of ImageSets/Main/train.txt" in train.summary["says"]
    assert rows(open_boxes(str(tmp_path), "train")) == rows(train)
    assert box_parts(str(tmp_path)) == {"train", "test"} and box_parts(f"voc:{tmp_path}") == frozenset() == box_parts(
        ""
    )
    assert list(rows(open_boxes(str(tmp_path), "test"))) == ["JPEGImages/1.png"]
    with pytest.raises(UserError, match=r"no .*ImageSets/Main/test.txt; splits there: train, val"):
        open_boxes(f"voc:{tmp_path}:test")


def test_xml_beside_the_pictures(tmp_path):
    for part, count in (("train", 2), ("valid", 1)):
        for i in range(count):
            picture(tmp_path / part / f"{part}{i}.jpg", i)
            voc(tmp_path / part / f"{part}{i}.xml", f"{part}{i}.jpg", [("a", 0, (1, 2, 30, 40))])
    assert len(open_boxes(str(tmp_path))) == 3
    source = open_boxes(str(tmp_path), "train")
    assert list(rows(source)) == ["train/train0.jpg", "train/train1.jpg"] and not source.problems.counts["unused_file"]


# -- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "image,x1,y1,x2,y2,name\na.png,1,2,30,40,ant\nsub/b.png,5,6,7,9,bee\na.png,3,3,9,9,bee\nc.png,,,,,\n",
        "image_path,xmin,ymin,xmax,ymax,label\na.png,1,2,30,40,ant\n/x/sub/b.png,5,6,7,9,bee\na.png,3,3,9,9,bee\nc.png\n",
        "filename;width;height;class;xmin;ymin;xmax;ymax\na.png;60;40;ant;1;2;30;40\nb.png;60;40;bee;5;6;7;9\n"
        "a.png;60;40;bee;3;3;9;9\nc.png;60;40;;;;;\n",
        "a.png,1,2,30,40,ant\nsub/b.png,5,6,7,9,bee\na.png,3,3,9,9,bee\nc.png,,,,,\n",
        'image_id,width,height,bbox,label\na,60,40,"[1, 2, 29, 38]",ant\nB,60,40,"[5, 6, 2, 3]",bee\n'
        'a,60,40,"[3.0, 3.0, 6.0, 6.0]",bee\nc,60,40,,\n',
        "label_name,bbox_x,bbox_y,bbox_width,bbox_height,image_name\nant,1,2,29,38,a.png\nbee,5,6,2,3,sub\\b.png\n"
        "bee,3,3,6,6,a.png\n,,,,,c.png\n",
    ],
)
def test_tables_of_boxes(tmp_path, text):
    for i, name in enumerate(("a.png", "sub/b.png", "c.png")):
        picture(tmp_path / name, i)
    (tmp_path / "boxes.csv").write_text(text)
    source = open_boxes(str(tmp_path))
    assert rows(source) == {
        "a.png": ([[1, 2, 30, 40], [3, 3, 9, 9]], ["ant", "bee"]),
        "sub/b.png": ([[5, 6, 7, 9]], ["bee"]),
        "c.png": ([], []),
    }
    assert source.sizes.tolist() == [[60, 40]] * 3 and source.summary["without_boxes"] == 1
    assert rows(open_source(f"boxes:{tmp_path}/boxes.csv:{tmp_path}")) == rows(source)


def test_mistakes_in_tables(tmp_path):
    picture(tmp_path / "a.png", 0)
    table = tmp_path / "boxes.csv"
    table.write_text("image,x1,y1,x2,y2,name\na.png,1,2,30,x,ant\na.png,1,2,9,9,\n,1,2,9,9,ant\na.png,1,2,9,9,ant\n")
    source = open_boxes(str(tmp_path))
    assert {flaw.kind: flaw.detail for flaw in source.problems if flaw.detail} == {
        "bad_box": "line 2: 1 2 30 x",
        "unknown_category": "line 3 names no class",
        "bad_image": "line 4 names no picture",
    }
    assert source.problems.counts["one_class"] == 1
    table.write_text("image,left,up,name\na.png,1,2,ant\n")
    with pytest.raises(UserError, match=r"no columns image,x1,y1,x2,y2,name .*, only: image, left, up, name; rename"):
        open_boxes(str(tmp_path))
    table.write_text("image,x1,y1,x2,y2,name\n")
    with pytest.raises(UserError, match=r"boxes.csv has no rows"):
        open_boxes(str(tmp_path))
    table.write_text("image,x1,y1,x2,y2,name\n" + "a.png,20,20,15,15,ant\n" * 3 + "a.png,1,2,9,9,ant\n")
    with pytest.raises(UserError, match=r"look like x y width height.*Write the right and bottom edges"):
        open_boxes(str(tmp_path))
    assert open_boxes(str(tmp_path), check=True)[0]["boxes"][0].tolist() == [20, 20, 35, 35]


# -- folders and records ----------------------------------------------------------------------------------------------


def test_a_folder_without_boxes_and_one_with_several_kinds(tmp_path):
    picture(tmp_path / "a.png", 0)
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.2 0.2")
    with pytest.raises(UserError, match=r"no boxes found: needs annotations.json .*YOLO's .txt are not read.*1 .txt"):
        open_boxes(str(tmp_path))
    with pytest.raises(UserError, match=r"'nowhere' does not exist; use coco:, voc:, boxes:"):
        open_boxes("nowhere")
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2,name\na.png,1,2,30,40,ant\n")
    voc(tmp_path / "a.xml", "a.png", [("bee", 0, (1, 2, 3, 4))])
    source = open_boxes(str(tmp_path))
    assert source.class_names == ("ant",) and source.summary["says"].endswith("; 1 .xml there are not read")
    for spec, message in (
        ("coco:a.json", "no file a.json"),
        ("voc:x", "no folder x"),
        ("coco:", "write coco:FILE.json"),
    ):
        with pytest.raises(UserError, match=message):
            open_boxes(spec)


def test_files_of_other_names_are_known_by_what_is_in_them(tmp_path):
    """Label Studio writes result.json beside images/, CVAT annotations/instances_default.json; tables have any name."""
    picture(tmp_path / "images/a-1.png", 0)
    write(tmp_path / "result.json", coco([(0, "images/a-1.png", 60, 40)], [(0, 1, 5, 5, 9, 9)]))
    write(tmp_path / "notes.json", {"a": 1})
    assert list(rows(open_boxes(str(tmp_path)))) == ["images/a-1.png"]
    (tmp_path / "result.json").rename(tmp_path / "x.txt")
    (tmp_path / "trees.csv").write_text("image_path,xmin,ymin,xmax,ymax,label\na-1.png,1,2,9,9,Tree\n")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    source = open_boxes(str(tmp_path), "train")
    assert source.summary["says"].endswith(": trees.csv: 1 picture, 1 box of 1 class (Tree)")
    voc(tmp_path / "images/a-1.xml", "a-1.png", [("bee", 0, (1, 2, 3, 4))])
    assert open_boxes(str(tmp_path)).summary["says"].endswith("1 class (bee); 1 .csv there are not read")


def test_records_of_the_detection_builder(tmp_path):
    world = make_sets(tmp_path)
    build(f"--coco={world['coco']}", f"--openimages={world['openimages']}", f"--out={tmp_path}/flod")
    source = open_boxes(f"{tmp_path}/flod/train")
    assert len(source) == 5 and {"dog", "person"} <= set(source.class_names)
    assert source.category_ids == tuple(range(len(source.class_names)))
    by_key = {record["key"]: record for record in source.metadata()}
    record = by_key["coco:000000000001"]
    assert [source.class_names[k] for k in record["class_ids"]] == record["class_names"]
    assert record["boxes"].dtype == np.float32 and record["image_id"] == "coco:000000000001"
    assert record["iscrowd"].dtype == bool and record["iscrowd"].sum() == 1 and "scores" not in record
    assert by_key["openimages:000026e7ee790996"]["is_group_of"].any()
    assert source.__getitems__([0])[0]["image"] and len(source.sample(2)) == 2
    counts, empty = pictures_by_class(source), "; without boxes: animal, bat (animal), computer mouse"
    counted = [sum(k in record["class_ids"] for record in by_key.values()) for k in range(len(source.class_names))]
    assert counts.tolist() == counted and source.summary["says"].endswith(empty)
    assert source.problems.first("no_boxes").where == "animal"
    content = json.loads((tmp_path / "flod/classes.json").read_text())
    write(tmp_path / "flod/classes.json", content | {"records": {"train": 4}})  # of another set
    source = open_boxes(f"{tmp_path}/flod/train")
    assert "does not say in how many of these records a class has boxes" in source.summary["says"]
    assert pictures_by_class(source).tolist() == counted and not source.problems.counts
    write(tmp_path / "flod/classes.json", {"classes": content["classes"][:2]})
    with pytest.raises(UserError, match=r"class \d of 2; are the records and their classes.json of one build"):
        list(open_boxes(f"{tmp_path}/flod/train").metadata())
    (tmp_path / "flod/classes.json").unlink()
    with pytest.raises(UserError, match="the names of its classes, is not there"):
        open_boxes(f"{tmp_path}/flod/train")
    write_array_record(str(tmp_path / "x.array_record"), [{"key": "k", "image": b"x", "caption": "c"}])
    with pytest.raises(UserError, match="its records have no boxes; fields: caption, key"):
        open_boxes(str(tmp_path / "x.array_record"))
