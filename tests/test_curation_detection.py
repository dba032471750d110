"""The detection set as a whole: one record for one picture, the same bytes each time, and no leaks."""

import csv
import io
import json
import re

import numpy as np
import pytest
from detection_files import (
    EXIF_ORIENTATION,
    HEIGHT,
    WIDTH,
    coco_box,
    coco_image,
    coco_json,
    command,
    dump,
    fails,
    lvis_image,
    lvis_json,
    make_sets,
    objects365_json,
    picture,
    read,
    run,
)
from PIL import Image, ImageOps

from florence_jax.curation.detection import __main__ as detection
from florence_jax.curation.detection.sheet import SET_COLOURS, _drawn
from florence_jax.curation.detection.write import shard_digest
from florence_jax.data.annotations import SourceSpec, file_paths
from florence_jax.data.box_frames import turn_boxes
from florence_jax.data.sources.catalog import open_source
from florence_jax.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"))


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
    assert set(records["coco:000000000001"]["scores"]) == {None}  # people made its boxes
    classes = json.loads((built / "classes.json").read_text())["classes"]
    assert [classes[i]["text"] for i in record["positive_ids"]] == ["tench"]
    # The third has no box above the threshold: nothing is known about it.
    assert "imagenet:n01440764_2" not in records


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
    assert page.count("data:image/webp;base64,") == 8
    assert "http" not in page and 'src="data:' in page and not re.search(r"<(script|link)", page)
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
    canvas = np.asarray(_drawn(np.zeros((100, 200, 3), np.uint8), record, side=400))
    red = tuple(int(SET_COLOURS["coco"][i : i + 2], 16) for i in (1, 3, 5))
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
    shard = next(p for p in sorted(tmp_path.rglob("*.array_record*")) if p.suffix != ".meta")
    others = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.array_record*") if shard.name not in p.name}
    shard.rename(shard.with_name(f".{shard.name}.0123.tmp"))  # as a kill leaves it
    (tmp_path / "report.json").unlink()
    run(*command(world, tmp_path, "--shards=3"))
    assert contents(tmp_path) == first
    assert {p: p.stat().st_mtime_ns for p in others} == others  # finished files were not written again


def test_folder_of_another_build_is_refused(world, built, capsys):
    before = contents(built)
    assert "holds records of another build" in fails(capsys, *command(world, built, "--shards=2"))
    assert contents(built) == before


def test_records_are_in_the_order_of_their_digests(built):
    digests = []
    for path in sorted((built / "train").iterdir()):
        if path.suffix == ".meta":
            continue
        source = open_source(str(path))
        shard = [shard_digest(source[i]["key"]) for i in range(len(source))]
        assert shard == sorted(shard) and len({digest % 3 for digest in shard}) == 1
        digests += shard
    assert len(set(digests)) == 8


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


def test_picture_that_only_one_set_has(tmp_path):
    """COCO's copies of 1 and 2 are gone; LVIS brings 1. Pictures that cannot be read are not one picture."""
    picture(tmp_path / "coco" / f"{3:012d}.jpg", 3)
    picture(tmp_path / "lvis/train2017" / f"{1:012d}.jpg", 1)
    boxes = [coco_box(i, i, 18, [10.0 * i, 8.0, 20.0, 4.0]) for i in (1, 2, 3)]
    coco = dump(tmp_path / "c.json", coco_json([coco_image(i) for i in (1, 2, 3)], boxes))
    lvis = dump(tmp_path / "l.json", lvis_json([lvis_image(1)], [coco_box(1, 1, 1, [50.0, 8.0, 20.0, 4.0])]))
    run(f"--coco={coco}:{tmp_path}/coco", f"--lvis={lvis}:{tmp_path}/lvis", f"--out={tmp_path}/o")
    records = read(tmp_path / "o")
    assert {key: len(record["boxes"]) for key, record in records.items()} == {
        "coco:000000000001": 2,
        "coco:000000000003": 1,
    }
    first, _ = json.loads((tmp_path / "o/report.json").read_text())["sources"]
    assert (first["missing"], first["images_used"], first["joined_to_another_row"]) == (1, 2, 1)


def test_crowd_is_no_double_of_an_object(tmp_path):
    picture(tmp_path / "i" / f"{1:012d}.jpg", 1)
    boxes = [coco_box(i, 1, 18, [10.0, 8.0, 20.0, 4.0], iscrowd=i % 2) for i in range(4)]
    path = dump(tmp_path / "c.json", coco_json([coco_image(1)], boxes))
    run(f"--coco={path}:{tmp_path}/i", f"--out={tmp_path}/o")
    assert read(tmp_path / "o")["coco:000000000001"]["iscrowd"] == [False, True]


def test_changed_picture_stops_the_build(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "i" / f"{1:012d}.jpg", 1)
    path = dump(tmp_path / "a.json", coco_json([coco_image(1)], []))
    prepare = detection.prepare_folder
    monkeypatch.setattr(
        detection, "prepare_folder", lambda *a: (prepare(*a), picture(tmp_path / "i" / f"{1:012d}.jpg", 2))
    )
    message = fails(capsys, f"--coco={path}:{tmp_path / 'i'}", f"--out={tmp_path}")
    assert "000000000001.jpg changed during the build" in message
