"""Class names: the shipped files, joining them to the data's labels, several classes an image, held-out parts."""

import numpy as np
import pytest

from florence_jax.data import classes as data_classes
from florence_jax.data.classes import (
    METRICS,
    ClassIndex,
    all_targets,
    choose_templates,
    dataset_name,
    hold_out,
    load_class_names,
    open_classes,
    open_images,
    shipped_class_names,
)
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.prompts import TEMPLATE_SETS, template_set
from florence_jax.data.records import BadRecord
from florence_jax.data.sources.folder import FolderSource
from florence_jax.data.sources.tfds import TfdsSource
from florence_jax.errors import UserError

COUNTS = {
    "caltech101": 102, "cars196": 196, "cifar10": 10, "cifar100": 100, "coco": 80, "country211": 211, "dtd": 47,
    "eurosat": 10, "fer2013": 7, "fgvc_aircraft": 100, "food101": 101, "gtsrb": 43, "hateful_memes": 2,
    "imagenet2012": 1000, "kitti": 4, "mnist": 10, "objects365": 365, "oxford_flowers102": 102, "oxford_iiit_pet": 37,
    "patch_camelyon": 2, "rendered_sst2": 2, "resisc45": 45, "stl10": 10, "sun397": 397, "ucf101": 101, "voc2007": 20,
}  # fmt: skip
# Specification: CLIP's numbers of templates for the paper's sets and ELEVATER's.
TEMPLATES = {
    "caltech101": 34, "cars196": 8, "cifar10": 18, "country211": 5, "dtd": 8, "eurosat": 3, "fer2013": 6,
    "fgvc_aircraft": 2, "food101": 1, "gtsrb": 3, "hateful_memes": 1, "imagenet2012": 80, "kitti": 1, "mnist": 1,
    "oxford_flowers102": 1, "oxford_iiit_pet": 1, "patch_camelyon": 1, "rendered_sst2": 1, "resisc45": 18, "stl10": 2,
    "sun397": 2, "ucf101": 48, "voc2007": 1,
}  # fmt: skip


def folder(captions, **fields):
    rows = [{"key": f"{i}.png", "caption": c, **{k: v[i] for k, v in fields.items()}} for i, c in enumerate(captions)]
    return FolderSource("pictures", rows)


def test_every_shipped_set_has_its_number_of_classes():
    assert {name: len(load_class_names(name).names) for name in shipped_class_names()} == COUNTS
    assert METRICS.keys() <= COUNTS.keys()
    assert load_class_names("voc/2007").dataset == "voc2007"


def test_names_that_are_known_from_elsewhere():
    cifar, imagenet = load_class_names("cifar10"), load_class_names("imagenet2012")
    assert [names[0] for names in cifar.names][3] == "cat"
    assert dict(zip(imagenet.labels, imagenet.names, strict=True))["n01440764"] == ("tench",)
    assert load_class_names("cifar100").labels[99] == "worm"
    assert load_class_names("fer2013").names[1] == ("disgusted",)
    boxes = [load_class_names(name).labels for name in ("coco", "objects365")]  # by their numbers of categories
    assert (boxes[0][0], boxes[0][79], boxes[1][52], boxes[1][308]) == ("person", "toothbrush", "Bakset", "Formula 1")
    signs = load_class_names("gtsrb").names  # CLIP's
    assert (signs[0], signs[14]) == (("red and white circle 20 kph speed limit",), ("stop",))
    assert signs[6] == ("end / de-restriction of 80 kph speed limit",)
    # The published lists are sorted, except where the numbers mean something else.
    for name in ("food101", "dtd", "cifar100", "caltech101", "country211", "imagenet2012", "voc2007"):
        labels = list(load_class_names(name).labels)
        assert labels == sorted(labels, key=lambda x: x.lower().replace("_", "")), name


def test_templates_of_every_set():
    assert {name: len(template_set(name)) for name in TEMPLATES} == TEMPLATES
    assert all(len(set(found)) == len(found) for found in TEMPLATE_SETS.values())
    voc = template_set("voc/2007")
    assert choose_templates("", "voc2007") == choose_templates("voc2007", "") == voc == ("a photo of a {}.",)
    assert choose_templates("", "no such set") == template_set("default")
    trained = ("my {}.",)  # what the weights were fine-tuned with, unless the set has its own or others are given
    assert choose_templates("", "no such set", trained) == trained
    assert choose_templates("", "voc2007", trained) == choose_templates("voc2007", "", trained) == voc
    assert choose_templates("food101", "mnist") == template_set("food101")


def test_templates_from_a_file(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {} here.\n\n{}\n")
    assert choose_templates(str(file), "") == ("a {} here.", "{}")
    file.write_text("no slot\n")
    with pytest.raises(UserError, match="exactly once"):
        choose_templates(str(file), "")
    with pytest.raises(UserError, match="no prompt templates for 'nothing'"):
        choose_templates("nothing", "")


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "names no class"),
        ("a\nA_ = x\n", "'a' and 'A_' are the same class"),
        ("a = \n", "line 1"),
        ("# only\n", "names no class"),
    ],
)
def test_broken_name_files(tmp_path, text, message):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        load_class_names(str(tmp_path / "names.txt"))
    with pytest.raises(UserError, match="none of the shipped sets: caltech101"):
        load_class_names(str(tmp_path / "gone.txt"))


def test_an_empty_line_of_a_names_file_is_said(tmp_path, capsys):
    (tmp_path / "names.txt").write_text("cat\n\n# two more\ndog\n\n\n")
    assert load_class_names(str(tmp_path / "names.txt")).labels == ("cat", "dog")
    said = f"class names {tmp_path / 'names.txt'} line 2 is empty: it names no class\n"
    assert capsys.readouterr().out == said


def test_data_set_names():
    assert dataset_name("tfds:voc/2007:test") == dataset_name("tfds:voc:test") == "voc2007"
    assert dataset_name("tfds:mnist:3.0.1:test[:10%]") == "mnist"
    assert dataset_name("tfds:sun397/standard-part1-120k:test") == "sun397" and dataset_name("my/folder") == ""


def test_labels_of_the_data_are_the_default():
    classes = open_classes(folder(["dog", "Cat", "dog"]))
    assert classes.first_names == ["Cat", "dog"]
    assert [int(classes.target({"caption": c})) for c in ("CAT", "dog")] == [0, 1]
    with pytest.raises(BadRecord, match="'cow' is none of the 2 classes"):
        classes.target({"key": "x", "caption": "cow"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(captions=["Sea Lion", "sea_lion"]), "'Sea Lion' and 'sea_lion' are the same class"),
        (dict(captions=["x", "y"], labels=["cat;dog", "dog"]), "'labels' must be a list, not the text 'cat;dog'"),
    ],
)
def test_labels_that_cannot_be_classes(fields, message):
    with pytest.raises(UserError, match=message):
        open_classes(folder(**fields))


def test_a_record_without_labels_has_none_of_the_classes():
    source = folder(["x", "y"], labels=[["cat", "dog"], None])
    classes = open_classes(source)
    assert classes.first_names == ["cat", "dog"] and classes.target(next(iter(source.metadata()))).tolist() == [1, 1]
    with pytest.raises(BadRecord):
        all_targets(source, classes)


def test_names_join_by_text_whatever_the_order_and_extra_names_stay(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("# mine\nzebra\nHot_dog = hot dog | frankfurter\napple pie\n")
    classes = open_classes(folder(["apple-pie", "hot dog"]), str(file))
    assert classes.names == (("zebra",), ("hot dog", "frankfurter"), ("apple pie",)) and not classes.note
    assert [int(classes.target({"caption": c})) for c in ("hot dog", "Apple pie")] == [1, 2]


def test_names_join_in_order_only_where_none_fits(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("cat\ndog\n")
    classes = open_classes(folder(["n02", "n01"]), str(file))
    assert int(classes.target({"caption": "n02"})) == 1 and "n01 = cat, n02 = dog" in classes.note
    with pytest.raises(UserError, match="1 of the 2 classes of pictures are not in the class names .*'cow'"):
        open_classes(folder(["cat", "cow"]), str(file))
    with pytest.raises(UserError, match="3 of the 3 classes"):
        open_classes(folder(["a", "b", "c"]), str(file))


def tfds(name, rows, names=()):
    return TfdsSource(rows, names, name)


def test_tfds_labels_are_numbers_and_known_sets_get_their_names():
    rows = [{"image": b"", "label": 7}]
    own = [f"{i}" for i in range(10)]
    assert open_classes(tfds("tfds:cifar10:test", rows, own)).first_names[7] == "horse"
    other = open_classes(tfds("tfds:unknown:test", rows, ["a_b"] * 10))
    assert other.first_names[7] == "a b" and int(other.target({"class_id": 7})) == 7
    with pytest.raises(UserError, match="has 10 classes, the class names 47"):
        open_classes(tfds("tfds:unknown:test", rows, own), "dtd")
    with pytest.raises(BadRecord):
        other.target({"key": "k", "class_id": 10})


# The paper's twelve sets, and those of ELEVATER (Li et al. 2022), by TFDS's names.
PAPER = ("food101", "cifar10", "cifar100", "sun397", "cars196", "fgvc_aircraft", "voc2007", "dtd", "oxford_iiit_pet")
PAPER += ("caltech101", "oxford_flowers102", "imagenet2012")
ELEVATER = ("caltech101", "cifar10", "cifar100", "country211", "dtd", "eurosat", "fer2013", "fgvc_aircraft", "food101")
ELEVATER += ("gtsrb", "hateful_memes", "kitti", "mnist", "oxford_flowers102", "oxford_iiit_pet", "patch_camelyon")
ELEVATER += ("rendered_sst2", "resisc45", "cars196", "voc2007")


def test_every_set_of_the_paper_and_of_elevater_has_names_and_templates_of_its_own():
    own = set(TEMPLATE_SETS)
    assert len(set(PAPER)) == 12 and len(set(ELEVATER)) == 20
    assert {*PAPER, *ELEVATER} <= set(shipped_class_names()) & own


def test_kitti_is_labelled_by_the_nearest_vehicle(monkeypatch):
    def scene(*objects):
        types, depths = zip(*objects, strict=True) if objects else ((), ())
        places = np.array([(0.0, 1.5, z) for z in depths]).reshape(-1, 3)
        return {"image": b"", "objects": {"type": np.array(types), "location": places}}

    # Types 0 to 2 are vehicles; a pedestrian (3) nearby is none.
    scenes = [scene((0, 30.0), (1, 5.0)), scene((2, 8.5), (3, 1.0)), scene((0, 20.1)), scene((3, 2.0)), scene()]
    monkeypatch.setattr(data_classes, "open_source", lambda spec: TfdsSource(scenes, (), spec))
    source = open_images("tfds:kitti:test")
    classes = open_classes(source)
    assert [int(classes.target(source[i])) for i in range(5)] == [0, 1, 2, 3, 3]
    assert all_targets(source, classes).tolist() == [0, 1, 2, 3, 3] and source.__getitems__([2])[0]["class_id"] == 2
    assert classes.first_names[3] == "a photo i took with no car."
    scenes.append({"image": b""})
    with pytest.raises(UserError, match="no objects with type and location"):
        source[5]


def test_several_classes_an_image_and_unsure_ones():
    rows = [{"image": b"", "labels": np.array([14, 7]), "labels_no_difficult": np.array([7])}]
    classes = open_classes(tfds("tfds:voc/2007:test", rows))
    target = classes.target(rows[0])
    assert classes.multi and target.dtype == np.int8 and target.shape == (20,)
    assert target[7] == 1 and target[14] == -1 and (np.delete(target, [7, 14]) == 0).all()
    named = open_classes(folder(["", ""], labels=[["cat", "dog"], ["dog"]]))
    assert named.target({"labels": ["dog"]}).tolist() == [0, 1]


def test_source_without_labels():
    with pytest.raises(UserError, match="no record has a class in its field 'caption'"):
        open_classes(folder(["", ""]))
    with pytest.raises(UserError, match="field 'kind'"):
        open_classes(folder(["a", "b"]), field="kind")


def test_prompts_of_training_use_every_template_and_synonym():
    classes = ClassIndex([("cat", "kitty"), ("dog",)], {"cat": 0, "dog": 1})
    ops = parse_ops("class_label|class_prompt", {"classes": classes, "templates": ("a {}.", "the {}.")})
    rng = np.random.default_rng(0)
    drawn = set()
    for _ in range(40):
        example = {"caption": "cat"}
        for op in ops:
            example = op(example, rng)
        drawn.add(example["caption"])
        assert example["label"] == 0
    assert drawn == {"a cat.", "the cat.", "a kitty.", "the kitty."}
    with pytest.raises(UserError, match="'classes' in the context"):
        parse_ops("class_label", {})


def test_hold_out_takes_a_share_of_each_class():
    source = folder(["a"] * 10 + ["b"] * 5 + ["c"])
    classes = open_classes(source)
    train, held = hold_out(source, classes, 0.2, seed=0)
    rows = [[row["caption"] for row in part.metadata()] for part in (train, held)]
    assert rows == [["a"] * 8 + ["b"] * 4 + ["c"], ["a"] * 2 + ["b"]]
    again = hold_out(source, classes, 0.2, seed=0)[1]
    assert [r["key"] for r in again.metadata()] == [r["key"] for r in held.metadata()]
    assert [r["key"] for r in hold_out(source, classes, 0.2, seed=1)[1].metadata()] != [
        r["key"] for r in held.metadata()
    ]
    with pytest.raises(UserError, match="no class has two images"):
        hold_out(folder(["a", "b"]), open_classes(folder(["a", "b"])), 0.2, seed=0)
    with pytest.raises(UserError, match="holdout=1"):
        hold_out(source, classes, 1, seed=0)
