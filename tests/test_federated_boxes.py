"""Sets in which people looked for some classes only, and sets that are joined: unknown is not absent."""

import dataclasses
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from detection_files import (
    HEIGHT,
    OBJECTS_FILES,
    WIDTH,
    coco_box,
    coco_image,
    coco_json,
    dump,
    lvis_image,
    lvis_json,
    make_sets,
    picture,
)
from detection_files import run as build
from planted_boxes import good_folder

from configs.detect import get_config
from florence_jax.data.box_classes import (
    ClassLists,
    Hierarchy,
    class_sets_of,
    is_exhaustive,
    join_classes,
    judged_classes,
)
from florence_jax.data.buckets import make_buckets
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.records import Subset
from florence_jax.data.sources import merged_boxes
from florence_jax.data.sources.agnostic import AgnosticBoxes
from florence_jax.data.sources.boxes import pictures_by_class
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.detection import open_boxes
from florence_jax.data.sources.merged_boxes import MergedBoxSource, picture_uid
from florence_jax.errors import UserError
from florence_jax.evaluators.coco_files import found_boxes, make_truth
from florence_jax.evaluators.coco_scores import best_of_classes, coco_scores
from florence_jax.tasks import create_task
from florence_jax.train.loop import open_stream


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Five sets in their publishers' forms."""
    root = tmp_path_factory.mktemp("sets")
    return make_sets(root) | vg_files(root / "vg")


def vg_files(folder):
    """Visual Genome in small: a picture in each of its folders, one of them COCO's number 1."""
    picture(folder / "VG_100K/1.jpg", 80)
    picture(folder / "VG_100K_2/2.jpg", 81)
    url = "https://cs.stanford.edu/people/rak248/VG_100K/{}.jpg"
    size = {"width": WIDTH, "height": HEIGHT}
    dump(
        folder / "image_data.json",
        [{"image_id": i, "url": url.format(i), **size, "coco_id": coco} for i, coco in ((1, 1), (2, None))],
    )

    def thing(number, names, box):
        return {"object_id": number, "names": names, "synsets": [], **dict(zip("xywh", box, strict=True))}

    first = [
        thing(11, ["Big  Dog"], (1, 2, 30, 20)),
        thing(12, ["cat"], (5, 5, 9, 9)),
        thing(13, ["puppy"], (9, 9, 9, 9)),
    ]
    dump(
        folder / "objects.json",
        [
            {"image_id": 1, "objects": first, "image_url": url.format(1)},
            {"image_id": 2, "objects": [thing(21, ["thingamajig", "people"], (0, 0, 40, 40))]},
            {"image_id": 3, "objects": [thing(31, ["dog"], (0, 0, 40, 40))]},
        ],
    )
    many = [
        thing(11, ["dog"], (1, 2, 30, 20)) | {"attributes": ["Brown", "tall", "brown", "odd"]},
        thing(13, ["x"], (0,) * 4),
    ]
    dump(
        folder / "attributes.json",
        [
            {"image_id": 1, "attributes": many},
            {"image_id": 2, "attributes": [{"object_id": 21, "attributes": ["tall"]}]},
        ],
    )
    (folder / "objects_vocab.txt").write_text("dog,big dog,puppy\nperson,people\n")
    (folder / "attributes_vocab.txt").write_text("tall\nbrown,brownish\n")
    return {"vg": f"vg:{folder}", "vg_folder": folder}


def judged_names(source, record):
    judged = judged_classes(record, class_sets_of(source))
    return {name for name, there in zip(source.class_names, judged, strict=True) if there}


def by_key(source):
    return {record["key"]: record for record in source.metadata()}


# -- the sets ---------------------------------------------------------------------------------------------------------


def test_lvis(world):
    source = open_boxes(f"lvis:{world['lvis']}")
    assert len(source) == 2 and source.category_ids == (1, 2, 3, 4, 5) and not is_exhaustive(source)
    first, second = source[0], source[1]
    assert first["key"] == "train2017/000000000001.jpg" and not first["exhaustive"]
    assert first["negative_ids"].tolist() == [2, 3] and first["not_exhaustive_ids"].tolist() == [1]
    assert judged_names(source, first) == {"sofa", "bat_(animal)"}  # a dog has boxes, and not all dogs have one
    assert judged_names(source, second) == {"dog", "sofa", "bat_(animal)"}
    assert "4 times a class is said not to be in a picture, 1 times not to have all" in source.summary["says"]
    assert by_key(open_boxes(f"coco:{world['lvis']}"))["train2017/000000000001.jpg"]["negative_ids"].tolist() == [2, 3]
    again = pickle.loads(pickle.dumps(open_source(f"lvis:{world['lvis']}")))
    assert again[0]["negative_ids"].tolist() == [2, 3] and again.shapes().tolist() == [[HEIGHT, WIDTH]] * 2
    with pytest.raises(UserError, match="its images have no 'neg_category_ids': is it a file of LVIS"):
        open_boxes(f"lvis:{world['coco']}")


def test_lists_that_contradict_boxes_and_files_of_both_parts(tmp_path):
    """LVIS train has pictures of val2017; what a list says against boxes is counted."""
    for number, part in ((1, "train2017"), (2, "val2017")):
        picture(tmp_path / f"{part}/{number:012d}.jpg", number)
    images = [lvis_image(1, [2, 3, 4, 99], [4]), lvis_image(2, [1], split="val2017")]
    images[1] |= {"coco_url": "", "file_name": "COCO_val2014_000000000002.jpg"}  # as version 0.5 has it
    content = lvis_json(images, [coco_box(1, 1, 2, [5, 5, 20, 20])])
    source = open_boxes(f"lvis:{dump(tmp_path / 'l.json', content)}:{tmp_path}")
    assert list(by_key(source)) == ["train2017/000000000001.jpg", "val2017/000000000002.jpg"]
    assert source[0]["negative_ids"].tolist() == [2] and source[0]["not_exhaustive_ids"].tolist() == [3]
    counts = source.problems.counts
    assert counts["denied"] == 2 and counts["unlisted_label"] == 1
    assert [(flaw.where[-6:], flaw.detail) for flaw in source.problems if flaw.kind == "denied"] == [
        ("01.jpg", "dog"),
        ("01.jpg", "bat_(animal)"),
    ]
    assert "classes said not to be in a picture that has boxes of them: 2 (the boxes count)" in source.summary["says"]


def test_objects365(world):
    source = open_boxes(f"objects365:{world['objects365']}")
    assert list(by_key(source)) == [
        name.removeprefix("images/v1/").removeprefix("images/v2/") for _, name in OBJECTS_FILES
    ]
    assert source.problems.counts["repeated_box"] == 1 and source.summary["boxes"] == 3 and is_exhaustive(source)
    assert "boxes with the very place and class of another one: 1" in source.summary["says"]
    kept = open_boxes(f"coco:{world['objects365']}")
    assert kept.problems.counts["same_box"] == 1 and kept.summary["boxes"] == 4


def test_openimages(world):
    boxes, images = world["openimages"].split(":")
    source = open_boxes(f"openimages:{boxes}:{images}")
    record = by_key(source)["000026e7ee790996.jpg"]
    np.testing.assert_allclose(record["boxes"], [[20, 20, 120, 80], [100, 0, 180, 100]], atol=1e-4)
    assert [source.class_names[k] for k in record["class_ids"]] == ["Dog", "Man"] and source.category_ids[
        0
    ] == "/m/01g317"
    assert record["is_group_of"].tolist() == [False, True] and not record["iscrowd"].any()
    assert [source.class_names[k] for k in record["negative_ids"]] == ["Mouse"]
    assert judged_names(source, record) == {"Dog", "Man", "Mouse"}  # persons that are no man have no box, nor animals
    assert {source.class_names[k] for k in record["not_exhaustive_ids"]} == {"Person", "Animal"}
    assert source.summary["groups"] == 1 and source.problems.counts["unknown_category"] == 1
    assert source.problems.counts["unlisted_label"] == 1 and not source.problems.counts["no_size"]
    folder = world["root"] / "oi"
    assert {record["image_id"] for record in open_boxes(f"openimages:{folder}:train").metadata()} == {
        "000026e7ee790996",
        "000062a39995e348",
    }
    with pytest.raises(UserError, match=r"needs one file \*test-annotations-bbox.csv, there are oidv6-train-annot"):
        open_boxes(f"openimages:{folder}:test")


def test_visual_genome(world):
    source = open_boxes(world["vg"])
    assert source.class_names == ("dog", "person") and source.attribute_names == ("tall", "brown")
    first = by_key(source)["VG_100K/1.jpg"]
    assert first["class_ids"].tolist() == [0, 0] and first["boxes"][0].tolist() == [1, 2, 31, 22]
    assert first["attribute_ids"].shape == (2, 16) and first["attribute_ids"][0, :3].tolist() == [0, 1, -1]
    assert (first["attribute_ids"][1] == -1).all() and not first["exhaustive"]
    assert by_key(source)["VG_100K_2/2.jpg"]["class_ids"].tolist() == [1]  # of the first name that is known
    counts = source.problems.counts
    assert counts["unknown_alias"] == 1 and counts["unknown_attribute"] == 1 and counts["unknown_image"] == 1
    assert "3 attributes of 2 (tall, brown)" in source.summary["says"]
    assert "names of objects that are no class of the vocabulary: 1" in source.summary["says"]


def test_visual_genome_without_a_vocabulary_with_a_split_and_with_a_bad_one(tmp_path):
    folder = vg_files(tmp_path)["vg_folder"]
    (folder / "objects_vocab.txt").write_text("dog,puppy\nperson,dog\n\n")
    assert open_boxes(f"vg:{folder}").problems.counts["alias_twice"] == 1
    (folder / "objects_vocab.txt").write_text("dog\n\nperson\n")
    with pytest.raises(UserError, match="objects_vocab.txt line 2 names no class"):
        open_boxes(f"vg:{folder}")
    (folder / "objects_vocab.txt").unlink()
    (folder / "attributes.json").unlink()
    (folder / "train.txt").write_text("VG_100K/1.jpg xml/1.xml\n")
    source = open_boxes(f"vg:{folder}:train")
    assert source.class_names == ("big dog", "cat", "puppy") and list(by_key(source)) == ["VG_100K/1.jpg"]
    assert "attribute_ids" not in source[0]
    (folder / "objects.json").unlink()
    with pytest.raises(UserError, match=r"needs one objects.json, there is none; get it from https://"):
        open_boxes(f"vg:{folder}")


def test_records_of_the_detection_builder_say_what_was_looked_for(world, tmp_path, monkeypatch):
    kinds = ("coco", "lvis", "openimages")
    build(*(f"--{kind}={world[kind]}" for kind in kinds), f"--out={tmp_path}/flod")
    source = open_boxes(f"{tmp_path}/flod/train")
    records = by_key(source)
    coco = {"person", "dog", "couch", "computer mouse"}
    both = records["coco:000000000001"]  # COCO has all dogs, though LVIS says that it has not
    assert both["exhaustive"] and judged_names(source, both) == coco | {"bat (animal)"}
    assert judged_names(source, records["coco:000000000003"]) == coco
    third = records["openimages:000026e7ee790996"]
    assert not third["exhaustive"] and judged_names(source, third) == {"dog", "man", "mouse (animal)"}
    assert not is_exhaustive(source) and "4 in all of coco" in source.summary["says"]
    # Of some records it is known which pictures they are, not where they lie: no other picture is tied to a row.
    monkeypatch.setattr(merged_boxes, "RECORDS_COMPARED", 2)
    joined = MergedBoxSource("joined", [source, *[open_boxes(f"coco:{world['coco']}")] * 2])
    first, second = np.arange(len(source)), len(source) + np.arange(3)
    assert joined.same.tolist() == [*first, *second, *second]
    assert "2 pictures were compared with the others" in joined.summary["says"]
    content = json.loads((tmp_path / "flod/classes.json").read_text())
    (tmp_path / "flod/classes.json").write_text(json.dumps({"classes": content["classes"]}))
    assert is_exhaustive(open_boxes(f"{tmp_path}/flod/train"))  # nobody says that a class was not looked for


def test_a_part_of_a_set_is_described_without_its_files(tmp_path):
    good_folder(tmp_path, 4)
    source = open_boxes(str(tmp_path))
    part = Subset(AgnosticBoxes(MergedBoxSource("both", [source, source])), np.array([1, 6]), "part")
    for file in tmp_path.glob("*.png"):
        file.unlink()
    assert [record["key"] for record in part.sample(2)] == ["1:1.png", "2:2.png"]


# -- joined -----------------------------------------------------------------------------------------------------------


def test_joined_sets(world):
    spec = f"coco:{world['coco']}|lvis:{world['lvis']} | {world['vg']}"
    source = open_boxes(spec)
    assert source.class_names == ("person", "dog", "couch", "mouse", "sofa", "bat_(animal)", "settee")
    assert len(source) == 7 and source.class_sets.shape == (3, 7)
    assert source.class_sets.sum(1).tolist() == [4, 0, 0] and source.class_sets[0, :4].all()
    records = list(source.metadata())
    assert [record["set_index"].tolist() for record in records] == [0, 0, 0, 1, 1, 2, 2]
    assert judged_names(source, records[0]) == {"person", "dog", "couch", "mouse"}
    counted = sum(np.isin(np.arange(7), record["class_ids"]).astype(int) for record in records)
    np.testing.assert_array_equal(pictures_by_class(source), counted)
    lvis = records[3]
    assert lvis["key"] == "2:train2017/000000000001.jpg" and lvis["image_id"] == "2:1"
    assert judged_names(source, lvis) == {"sofa", "bat_(animal)"} and lvis["class_ids"].tolist() == [1, 1]
    assert judged_names(source, records[5]) == {"dog"} and records[5]["attribute_ids"].shape == (2, 16)
    mixed = source.__getitems__([6, 0, 3])
    assert [record["key"][:2] for record in mixed] == ["3:", "1:", "2:"] and mixed[1]["image"] == source[0]["image"]
    assert source.same.tolist() == [0, 1, 2, 0, 1, 0, 6]  # Visual Genome's first is COCO's, by its coco_id
    said = source.summary["says"].splitlines()
    assert len(said) == 4 and said[0].startswith("coco:") and said[1].startswith("lvis:")
    assert "joined: 7 pictures, 7 classes: 4 of coco:" in said[3] and "(2 of them known)" in said[3]
    assert "3 pictures are in another of the sets too, such as 'coco:000000000001'" in said[3]
    assert sum(len(bucket.rows) for bucket in make_buckets([source], ((64, 96), (96, 64)))) == 7
    assert len(source.sample(3)) == 3
    with pytest.raises(UserError, match="joined picture by picture, without a weight"):
        open_boxes(f"coco:{world['coco']}*2|{world['vg']}")


def test_of_one_class_records_say_where_objects_may_lack_a_box(world):
    lists = {"exhaustive": False, "negative_ids": np.array([1]), "not_exhaustive_ids": np.array([], int)}
    records = [{"exhaustive": True}, lists | {"class_ids": [0]}, lists | {"class_ids": []}]
    sets = np.array([[True, True], [False, False]])
    source = SimpleNamespace(name="made", class_names=("a", "b"), class_sets=sets, metadata=lambda: iter(records))
    records = [{"boxes": [], "set_index": k, **record} for k, record in zip((0, 1, 1), records, strict=True)]
    agnostic = AgnosticBoxes(source)
    assert [bool(record["partly_boxed"]) for record in agnostic.metadata()] == [False, False, True]
    merged = AgnosticBoxes(open_boxes(f"coco:{world['coco']}|{world['vg']}"))
    assert [bool(record["partly_boxed"]) for record in merged.metadata()] == [False] * 3 + [True] * 2  # coco knows all
    assert merged[0].keys() == merged.sample(1)[0].keys() | {"image"} and "judged" not in merged[0]
    whole = AgnosticBoxes(open_boxes(f"coco:{world['coco']}"))
    assert not whole.partly_boxed and "partly_boxed" not in whole[0]


def test_names_of_pictures():
    assert picture_uid("train2017/000000000139.jpg", 1, 2) == "coco:000000000139"
    assert picture_uid("COCO_val2014_000000000139.jpg", 1, 2) == "coco:000000000139"
    assert picture_uid("patch8/objects365_v1_00420917.jpg", 1, 2) == "objects365:objects365_v1_00420917"
    assert picture_uid("a/000026e7ee790996.jpg", 1, 2) == "openimages:000026e7ee790996"
    assert picture_uid("a/7.png", 60, 40) == "7.png of 60 x 40"


def test_classes_are_joined_by_name():
    names, places = join_classes([["Dog", "traffic light"], ["dog", "cat", "Traffic_Light"], ["cat", "Cat"]])
    assert names == ["Dog", "traffic light", "cat", "Cat"]
    assert [place.tolist() for place in places] == [[0, 1], [0, 2, 1], [2, 3]]


def test_lists_and_hierarchy():
    lists = ClassLists(3, np.array([2, 0, 2, 2]), np.array([5, 1, 3, 5]))
    assert [lists.of(i).tolist() for i in range(3)] == [[1], [], [3, 5]]
    assert lists.padded(slice(1, 3), 1).tolist() == [[-1], [3]]
    tree = Hierarchy([[], [0], [1], [0, 2, 3]])  # 3 below itself, too: a damaged file does not hang
    owners, above = tree.above(np.array([7, 8]), np.array([3, 1]))
    assert owners.tolist() == [7, 7, 7, 8] and above.tolist() == [0, 1, 2, 0]
    assert tree.below(np.array([4]), np.array([1]))[1].tolist() == [2, 3] and not Hierarchy([[], []])


# -- training and scoring ---------------------------------------------------------------------------------------------


def test_batches_say_what_was_looked_for(world):
    source = open_boxes(f"coco:{world['coco']}|lvis:{world['lvis']}")
    (op,) = parse_ops("pad_boxes(3, judged=True)", {"class_sets": source.class_sets})
    made = op(source[3], np.random.default_rng(0))
    assert made["judged"].dtype == bool and np.flatnonzero(made["judged"]).tolist() == [4, 5]
    with pytest.raises(UserError, match="judged needs 'class_sets' in the context"):
        parse_ops("pad_boxes(3, judged=True)", {})


def test_attributes_go_with_their_boxes():
    boxes = [[0, 0, 9, 9], [1, 1, 30, 30], [2, 2, 4, 4], [80, 80, 90, 90]]
    example = {"image": np.zeros((100, 100, 3), np.uint8), "boxes": boxes, "class_ids": np.arange(4)}
    example["attribute_ids"] = np.arange(8, dtype=np.int32).reshape(4, 2)
    for op in parse_ops("center_crop(50)|pad_boxes(2)", {}):
        example = op(example, np.random.default_rng(0))
    assert example["boxes_cut"] == 0 or example["attribute_ids"].shape == (2, 2)
    kept = example["class_ids"][example["objects"]]
    assert example["attribute_ids"][example["objects"]].tolist() == [[2 * k, 2 * k + 1] for k in kept.tolist()]
    assert (example["attribute_ids"][~example["objects"]] == -1).all()


def test_what_is_found_of_unknown_classes_counts_neither_way(world):
    source = open_boxes(f"lvis:{world['lvis']}")
    truth = make_truth(list(source.metadata()), source)
    assert truth.judged.tolist() == [[False, True, True, True, False], [False, True, True, True, False]]
    assert truth.crowd.tolist() == [False, False, True, False]  # other dogs of the first picture
    assert truth.boxes[2].tolist() == [0, 0, WIDTH, HEIGHT] and truth.subset(np.array([1])).judged.shape == (1, 5)
    found = found_boxes(np.zeros(5, np.int32), np.arange(5), np.tile([[1, 1, 9, 9]], (5, 1)), np.ones(5), truth)
    assert found.labels.tolist() == [1, 2, 3]


def test_lvis_numbers(world):
    """What is found beside some dogs' boxes is no mistake, nor is a sofa; a bat that people looked for is one."""
    source = open_boxes(f"lvis:{world['lvis']}")
    truth = make_truth(list(source.metadata()), source)
    boxes = [*source[0]["boxes"].tolist(), [0, 40, 20, 60], *source[1]["boxes"].tolist(), [60, 30, 90, 60]]
    labels, scores = np.array([1, 1, 1, 3, 4]), np.linspace(0.9, 0.5, 5)
    image = np.array([0, 0, 0, 1, 1])
    values = coco_scores(truth, found_boxes(image, labels, np.array(boxes), scores, truth)).values
    assert values["AP"] == values["AP300"] == values["fixed_AP"] == pytest.approx(1)
    wrong = found_boxes(image, np.array([1, 1, 1, 3, 3]), np.array(boxes), scores[::-1], truth)
    assert coco_scores(truth, wrong).values["AP300"] == pytest.approx(0.75, abs=0.01)
    assert best_of_classes(wrong, 1).labels.tolist() == [1, 3] and best_of_classes(wrong, 1).scores.max() == 0.9


def test_lvis_numbers_by_frequency(tmp_path):
    """Rare: not found. Common: all found. Frequent: one class of two found, the other half. One says nothing."""
    size = {"width": WIDTH, "height": HEIGHT}
    for number in (1, 2):
        picture(tmp_path / f"{number}.jpg", number)
    letters = {"rat": "r", "cat": "c", "car": "f", "man": "f", "odd": None}
    categories = [
        {"id": 10 - k, "name": name} | ({"frequency": letter} if letter else {})
        for k, (name, letter) in enumerate(letters.items())
    ]
    images = [{"id": n, "file_name": f"{n}.jpg", "neg_category_ids": [], **size} for n in (1, 2)]
    placed = [(10, 1), (9, 1), (8, 1), (7, 1), (7, 2), (6, 2)]  # category, picture
    annotations = [
        {"id": k + 1, "image_id": n, "category_id": category, "bbox": [8 * k, 8, 8, 8]}
        for k, (category, n) in enumerate(placed)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    whole = open_boxes(f"coco:{dump(tmp_path / 'a.json', content)}")
    assert whole.frequencies == ("r", "c", "f", "f", "")
    source = Subset(whole, np.arange(2), "part")
    truth = make_truth(list(source.metadata()), source)
    seen = np.array([1, 2, 3])  # of the annotations
    found = found_boxes(truth.image[seen], truth.labels[seen], whole.columns.boxes[seen], np.ones(3), truth)
    values = coco_scores(truth, found).values
    half = 51 / 101  # all found up to a recall of .5
    expected = {"APr": 0, "APc": 1, "APf": (1 + half) / 2, "AP300": (0 + 1 + 1 + half + 0) / 5}
    expected |= {f"fixed_{name}": expected[name] for name in ("APr", "APc", "APf")} | {"fixed_AP": expected["AP300"]}
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    without = coco_scores(dataclasses.replace(truth, frequencies=()), found).values
    assert "APr" not in without and without["AP300"] == values["AP300"]


def test_the_task_trains_on_joined_sets(tmp_path):
    """Batches have what is announced; of a picture that two sets have both records are held out, or none."""
    for number in range(1, 9):
        picture(tmp_path / f"p/{number:012d}.jpg", number)
    numbers = range(1, 9)
    coco = coco_json([coco_image(n) for n in numbers], [coco_box(n, n, 18, [5, 5, 30, 30]) for n in numbers])
    lvis = lvis_json([lvis_image(n, [1], []) for n in numbers], [coco_box(n, n, 4, [5, 5, 30, 30]) for n in numbers])
    config = get_config("runlocal")
    config.data.train = "|".join(
        f"{kind}:{dump(tmp_path / f'{kind}.json', content)}:{tmp_path}/p"
        for kind, content in (("coco", coco), ("lvis", lvis))
    )
    config.init, config.model.variant, config.holdout = "", "ti", 0.25
    config.detector.sizes, config.detector.scales = ((128, 128),), (1.0,)
    task = create_task(config)
    assert len(task.detector.classes) == 7 and task.judges and len(task.train_source) == 12
    held = [record["key"] for record in task.test_sources["test"].metadata()]
    assert len(held) == 4 and len({key[2:] for key in held}) == 2
    (shapes,) = task.batches
    with open_stream(config, task, task.train_data()) as stream:
        batch = next(stream)
    announced = {name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == announced
    assert batch["judged"].shape == (8, 7) and set(batch["judged"].sum(1).tolist()) == {2, 4}
    config.detector.agnostic = True
    agnostic = create_task(config)
    with open_stream(config, agnostic, agnostic.train_data()) as stream:
        batch = next(stream)
    (shapes,) = agnostic.batches
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {k: (x.shape, x.dtype) for k, x in shapes.items()}
    assert batch["partly_boxed"].all() and "judged" not in batch  # no set of them looked for all seven classes
    agnostic.config.detector.unknown = "background"
    assert "partly_boxed" not in agnostic.batches[0]
    task.config.detector.unknown = "background"
    assert "judged" not in task.batches[0] and not task.train_data().context
    task.config.detector.unknown = "x"
    with pytest.raises(UserError, match="config.detector.unknown='x': choose one of ignore, background"):
        task.train_data()
