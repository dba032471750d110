"""Parts of the detection set: boxes, the label space, teachers, annotation files and their mistakes."""

import itertools
import json
import types

import numpy as np
import pytest
from detection_files import (
    BBOX_HEADER,
    HEIGHT,
    WIDTH,
    coco_box,
    coco_image,
    coco_json,
    dump,
    fails,
    imagenet_info,
    iou,
    lvis_image,
    lvis_json,
    make_sets,
    openimages_files,
    picture,
    read,
    run,
)

from florence_jax.curation.detection import boxes as boxes_module
from florence_jax.curation.detection.boxes import double_boxes, group_rows, overlapping_pairs
from florence_jax.curation.detection.labels import RULES, LabelSpace, class_text, read_rules
from florence_jax.curation.detection.pseudo import read_imagenet, read_synset_words
from florence_jax.data import annotations, json_stream
from florence_jax.data.annotations import Annotations, Category, SourceSpec, parse_spec, read_annotations
from florence_jax.data.box_frames import REASONS, clean_boxes
from florence_jax.data.json_stream import json_items
from florence_jax.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


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
    assert REASONS[code[0]] == reason and out.dtype == np.float32
    if reason == "ok":
        np.testing.assert_array_equal(out[0], np.float32(clipped or box))
        assert moved[0] == (box[0] == -10)


def test_overlapping_pairs_equal_the_definition(monkeypatch):
    monkeypatch.setattr(boxes_module, "TILE_ROWS", 7)
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


def test_classes_of_a_teacher_follow_the_set_it_was_trained_on():
    coco = table("coco", Category("74", "mouse"), Category("72", "tv"))
    teacher = [Category("0", "mouse", named_by="coco"), Category("1", "tv", named_by="coco")]
    space = LabelSpace([coco, table("imagenet", *teacher, Category("n02330245", "mouse"))])
    assert space.texts == ["computer mouse", "mouse (animal)", "television"]
    assert space.ids("imagenet", teacher).tolist() == [0, 2]


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


def test_live_teacher_on_pictures_of_another_size(tmp_path):
    """Results count the annotated pixels, records those of the picture."""
    info = imagenet_info(tmp_path / "info.json", ["n01440764_1.JPEG"])
    picture(tmp_path / "in/n01440764_1.JPEG", 1, (2 * WIDTH, 2 * HEIGHT))
    run(f"--imagenet={info}:{tmp_path}/in", f"--teacher={__name__}:live_teacher", f"--out={tmp_path}/o")
    (result,) = json.loads((tmp_path / "o/teacher_info.json").read_text())
    (record,) = read(tmp_path / "o").values()
    assert iou(record["boxes"][0], (10, 10, 41, 31)) > 0.7
    x, y, width, height = result["bbox"]
    np.testing.assert_allclose(record["boxes"][0], [2 * x, 2 * y, 2 * (x + width), 2 * (y + height)])


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
    monkeypatch.setattr(json_stream, "READ_BYTES", chunk)
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("class-descriptions-boxable.csv", b"/m/0bt4r4,Caf\xe9\n", "line 1 is not UTF-8"),
        ("oidv6-train-annotations-bbox.csv", BBOX_HEADER.encode() + b"\xe9", "line 1 is not UTF-8"),
        (
            "oidv6-train-annotations-bbox.csv",
            BBOX_HEADER.encode() + b"\n0a,xclick\n",
            "line 2: not a complete row",
        ),
        ("bbox_labels_600_hierarchy.json", b'{"Subcategory": [', "is no class hierarchy"),
        ("bbox_labels_600_hierarchy.json", b'{"Subcategory": [{}]}', "KeyError: 'LabelName'"),
        ("bbox_labels_600_hierarchy.json", b"[]", "is no class hierarchy"),
        ("bbox_labels_600_hierarchy.json", b'{"LabelName": "caf\xe9"}', "is no class hierarchy"),
    ],
)
def test_openimages_damaged_files(tmp_path, name, content, message):
    path = openimages_files(tmp_path, [("000026e7ee790996", "/m/0bt4r4", 0, 1, 0, 1, 0)], [])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_annotations(SourceSpec("openimages", path, str(tmp_path)))
    assert str(tmp_path / name) in str(caught.value)


def test_words_that_are_not_utf8(tmp_path):
    (tmp_path / "words.txt").write_bytes(b"n01440764 tench\nn01443537 caf\xe9\n")
    with pytest.raises(UserError, match=r"words\.txt is not UTF-8"):
        read_synset_words(str(tmp_path / "words.txt"))


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


@pytest.mark.parametrize("renamed", [True, False])
def test_two_sets_given_as_one(tmp_path, capsys, renamed):
    """Own sets number their classes and pictures alike, and mean others."""
    specs = []
    for number, name in ((1, "a"), (2, "b")):
        picture(tmp_path / name / f"{name}.jpg", number)
        image = coco_image(1) | {"file_name": f"{name}.jpg", "coco_url": ""}
        content = coco_json([image], [coco_box(1, 1, 18, [5, 5, 30, 30])])
        if renamed:
            content["categories"] = [each | {"name": f"{name} {each['name']}"} for each in content["categories"]]
        specs.append(f"{dump(tmp_path / f'{name}.json', content)}:{tmp_path / name}")
    message = fails(capsys, *(f"--coco={spec}" for spec in specs), f"--out={tmp_path / 'o'}")
    why = "only one of them has a class" if renamed else "is a.jpg in the one and b.jpg in the other"
    assert "a.json and " in message and "are not of one set" in message and why in message
    run(f"--coco={specs[0]}", f"--objects365={specs[1]}", f"--out={tmp_path / 'o'}")


def test_spec_of_a_bucket(monkeypatch):
    folder = types.SimpleNamespace(is_dir=lambda: True)
    monkeypatch.setattr(annotations, "need_file", lambda spec, path: path)
    monkeypatch.setattr(annotations, "epath", types.SimpleNamespace(Path=lambda path: folder))
    spec = parse_spec("lvis", "gs://b/x.json:gs://b/images:validation")
    assert spec == SourceSpec("lvis", "gs://b/x.json", "gs://b/images", "validation")
