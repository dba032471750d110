"""What a detector finds in the pictures of a list, as results that the detection builder takes for a teacher's."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from detection_files import dump, picture, read, run

from florence_jax.data.box_frames import PictureFrames, boxes_as_stated, boxes_in_picture
from florence_jax.data.sources.catalog import open_pictures, open_source
from florence_jax.errors import UserError
from florence_jax.inference.base import Found
from florence_jax.inference.detector import DetectorAnswerer, PictureBoxes, upright_frame
from florence_jax.pictures import Frame

FOUND = np.float32(
    [[4, 6, 30, 40], [10, 2, 60, 20]]
)  # in every picture as shown, which all have 64 x 48 pixels or more
SCORES, LABELS = np.float32([0.9, 0.4]), np.int32([1, 0])


def finder(names=("cat", "dog"), ids=(7, 3)):
    """A detector that finds the same in every picture."""

    def boxes(source, threshold, top):
        for index in range(len(source)):
            frame = upright_frame(source, index)
            yield PictureBoxes(index, source[index]["key"], frame, FOUND, SCORES, LABELS, 0.9)

    return SimpleNamespace(names=names, boxes=boxes, category_ids=ids, attributes=None)


def results_of(spec, **kind):
    answerer = DetectorAnswerer(finder(**kind))
    return answerer.files(list(answerer.answers(open_source(spec))))


@pytest.fixture
def listed(tmp_path):
    """Pictures as they are, turned, stated as stored and as shown, and stated at half of their size; and their list."""
    images = []
    for number, (orientation, stated) in enumerate([(None, (96, 64)), (6, (96, 64)), (8, (64, 96)), (None, (48, 32))]):
        name = f"n02084071/n02084071_{number}.JPEG"
        picture(tmp_path / "in" / name, number, orientation=orientation)
        images.append({"id": 40 + number, "file_name": name, "width": stated[0], "height": stated[1]})
    return {"images": images, "categories": []}


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
def test_boxes_go_to_stated_pixels_and_back(orientation):
    raw = (96, 64)
    size = raw if orientation < 5 else raw[::-1]
    frame = Frame(raw, size, orientation)
    arrays = (np.ones(1, bool), np.array([raw]), np.array([size]), np.array([orientation], np.int8))
    for stated in (raw, size, (size[0] // 2, size[1] // 2), (2 * size[0], 2 * size[1])):
        there = boxes_as_stated(FOUND.astype(np.float64), stated, frame)
        rows = np.zeros(len(FOUND), np.int64)
        back, how = boxes_in_picture(there, rows, np.array([stated]), PictureFrames(*arrays))
        np.testing.assert_allclose(back, FOUND, atol=1e-6)
        assert how["turned"][0] == (stated == raw != size) and not how["size_mismatch"][0]
    np.testing.assert_array_equal(boxes_as_stated(FOUND, (0, 0), frame), FOUND)


def test_self_training_closes(listed, tmp_path):
    """The builder reads the results with its own list, and gives each box where the detector found it."""
    info = dump(tmp_path / "info.json", listed)
    files = results_of(f"images:{info}:{tmp_path}/in")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    results = json.loads(files["results.json"])
    assert len(results) == 8 and {one["category_id"] for one in results} == {7, 3}
    assert [one["bbox"] for one in results if one["image_id"] == 40] == [[4, 6, 26, 34], [10, 2, 50, 18]]
    assert [one["bbox"] for one in results if one["image_id"] == 43] == [[2, 3, 13, 17], [5, 1, 25, 9]]
    again = json.loads(files["image_info.json"])
    assert again["images"] == listed["images"]
    assert again["categories"] == [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    run(
        f"--imagenet={tmp_path}/image_info.json:{tmp_path}/in",
        f"--teacher={tmp_path}/results.json",
        "--teacher_name=runs/flod at step 12",
        f"--out={tmp_path}/out",
    )
    records = read(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(records) == 4 and report["totals"]["train"]["pseudo_boxes"] == 4  # the others are below .5
    for record in records.values():
        np.testing.assert_allclose(record["boxes"], FOUND[:1], atol=0.03)
        assert record["class_names"] == ["dog"] and record["scores"] == [pytest.approx(0.9)]
        assert (record["teacher"], record["threshold"]) == ("runs/flod at step 12", 0.5)


def test_a_list_with_classes_gets_their_ids(listed, tmp_path, capsys):
    listed["categories"] = [{"id": 18, "name": "Dog"}, {"id": 90, "name": "toothbrush"}]
    spec = f"images:{dump(tmp_path / 'info.json', listed)}:{tmp_path}/in"
    files = results_of(spec)
    assert {one["category_id"] for one in json.loads(files["results.json"])} == {18}
    assert json.loads(files["image_info.json"])["categories"] == listed["categories"]
    assert "results.json is without 1 classes that the list does not name: cat" in capsys.readouterr().out
    with pytest.raises(UserError, match="names none of the detector's classes, such as bat, but Dog, toothbrush"):
        blind = SimpleNamespace(names=("bat", "owl"), attributes=None)  # told before any picture is looked at
        next(DetectorAnswerer(blind).answers(open_source(spec)))


def test_a_list_is_a_source_of_pictures(listed, tmp_path):
    info = dump(tmp_path / "info.json", listed)
    source = open_pictures(f"images:{info}:{tmp_path}/in")
    assert len(source) == 4 and source[1]["image"][:2] == b"\xff\xd8" and source[1]["image_id"] == 41
    assert [row["width"] for row in source.metadata()] == [96, 96, 64, 48] and "image" not in source.sample(1)[0]
    assert "4 pictures listed, 0 classes" in source.summary["says"]
    for spec, message in (
        (f"images:{info}", "write images:FILE.json:IMAGES"),
        (f"images:gone.json:{tmp_path}", "there is no file gone.json"),
        (f"images:{info}:{tmp_path}/out", "the first pictures of the list are not in .*such as 'n02084071/"),
        (f"images:{dump(tmp_path / 'no.json', {'info': [1]})}:{tmp_path}", "has no 'images', it has info"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(spec)


@pytest.mark.parametrize("threshold, said", [(0.4, False), (0.95, True)])
def test_a_threshold_that_tells_nothing_is_told(threshold, said):
    answerer = DetectorAnswerer(finder(), threshold)
    boxes = () if said else FOUND
    answers = [Found(0, "a", boxes, "", SimpleNamespace(best=best)) for best in (0.2, 0.9)]
    remarks = answerer.remarks(answers)
    assert len(remarks) == said and all("the best has 0.900: --threshold=0.45" in remark for remark in remarks)
