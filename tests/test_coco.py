"""Scoring as COCO does: the result file by plain pycocotools, crowds, classes, the self-check, the baseline."""

import contextlib
import importlib.util
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from coco_tools import NAMES, OPS, DrawnBoxes, answers_like, detect, told, truth_of
from two_processes import run_job

from florence_jax.data.box_classes import match_classes
from florence_jax.data.buckets import make_buckets
from florence_jax.errors import UserError
from florence_jax.evaluators.coco import CocoEvaluator
from florence_jax.evaluators.coco_baseline import mean_box_scores, mean_boxes
from florence_jax.evaluators.coco_files import FoundBoxes, found_boxes
from florence_jax.evaluators.coco_scores import COCO_METRICS, absent_words, coco_scores, one_of_each
from florence_jax.params.sharding import make_mesh

pycocotools_coco = pytest.importorskip("pycocotools.coco")
pycocotools_eval = pytest.importorskip("pycocotools.cocoeval")


def evaluator_of(source, names=NAMES, **options):
    return CocoEvaluator(source, OPS, (), detect, make_mesh(-1, 1), 8, names, **options)


def plain(folder, rows=None, name="test"):
    """COCOeval.stats of the files of an evaluation, or of some rows of its result file, as anybody computes them."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = pycocotools_coco.COCO(str(folder / f"ground_truth_{name}.json"))
        found = truth.loadRes(str(folder / f"detections_{name}.json") if rows is None else rows)
        result = pycocotools_eval.COCOeval(truth, found, "bbox")
        result.evaluate()
        result.accumulate()
        result.summarize()
    return result


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """An evaluation of a middling detector: the evaluator, its results, the folder of its files."""
    source, folder = DrawnBoxes(), tmp_path_factory.mktemp("scored")
    evaluator = evaluator_of(source, train=[DrawnBoxes(30, name="train")])
    results = evaluator.run(told(source, answers_like(source, 0.08, false=2, wrong=0.2)))
    for name, content in evaluator.files().items():
        (folder / name).write_bytes(content)
    return evaluator, results, folder


def test_plain_pycocotools_gives_the_numbers_to_the_last_bit(scored):
    _, results, folder = scored
    result = plain(folder)
    stats = dict(zip(COCO_METRICS, result.stats.tolist(), strict=True))
    assert 0.1 < results["AP"] < 0.9
    assert {name: value for name, value in stats.items() if value >= 0} == {
        name: results[name] for name in COCO_METRICS if name in results
    }


def test_where_classes_do_not_count_a_thing_is_found_once():
    image = np.array([0, 0, 0, 1], np.int32)
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 5], [0, 0, 10, 10]], np.float64)
    found = FoundBoxes(image, np.array([0, 1, 1, 1], np.int32), boxes, np.array([0.5, 0.9, 0.7, 0.2]))
    kept = one_of_each(found)  # the first is of IoU .9 with the better second, the third of .56
    assert kept.scores.tolist() == [0.9, 0.7, 0.2]
    assert not len(one_of_each(found.subset(np.zeros(4, bool))).scores)


def test_without_regard_to_classes_as_pycocotools(scored):
    _, results, folder = scored
    rows = json.loads((folder / "detections_test.json").read_text())
    columns = ([row[name] for row in rows] for name in ("image_id", "category_id", "bbox", "score"))
    image, labels, boxes, scores = (np.array(column) for column in columns)
    kept = one_of_each(FoundBoxes(image, labels, boxes, scores))
    chosen = {(int(i), float(s)) for i, s in zip(kept.image, kept.scores, strict=True)}
    result = plain(folder, [row for row in rows if (row["image_id"], row["score"]) in chosen])
    result.params.useCats = 0
    with contextlib.redirect_stdout(io.StringIO()):
        result.evaluate()
        result.accumulate()
        result.summarize()
    assert result.stats[1] == results["agnostic_AP50"]


def test_ids_and_names_are_those_of_the_source(scored):
    evaluator, results, folder = scored
    truth = json.loads((folder / "ground_truth_test.json").read_text())
    assert truth["categories"] == [{"id": 7, "name": "RBC"}, {"id": 2, "name": "WBC"}, {"id": 90, "name": "Platelets"}]
    assert [image["id"] for image in truth["images"]] == [100 - i for i in range(9)]
    crowds = [box for box in truth["annotations"] if box["iscrowd"]]
    assert len(crowds) == 3 == results["crowds"] and len(truth["annotations"]) == results["boxes"] + 3
    assert {f"AP/{name}" for name in NAMES} < results.keys()
    assert np.mean([results[f"AP/{name}"] for name in NAMES]) == pytest.approx(results["AP"], abs=1e-12)
    assert evaluator.notes[-1] == "self-check: true boxes of 9 pictures, written as results, score AP 1.000"
    assert results["images"] == 9 and "skipped" not in results
    assert "APl" not in results and absent_words(["APl", "ARl"]) == "no APl and ARl: the test set has no large boxes"


def test_a_perfect_detector_and_a_blind_one():
    source = DrawnBoxes()
    evaluator = evaluator_of(source)
    perfect = evaluator.run(told(source, answers_like(source)))
    assert perfect["AP"] == 1.0 == perfect["AR100"] == perfect["agnostic_AP50"]
    blind = evaluator.run(told(source, [([], [], [])] * 9))
    assert blind["AP"] == 0.0 == blind["AR100"]
    assert json.loads(evaluator.files()["detections_test.json"]) == []


def test_classes_are_matched_by_name_and_the_others_are_told(tmp_path):
    source = DrawnBoxes()
    evaluator = evaluator_of(source, ("platelets", "ghost", "RBC"))
    answers = [(boxes, scores, np.array([2, 1, 0])[labels]) for boxes, scores, labels in answers_like(source)]
    results = evaluator.run(told(source, answers))
    assert results["AP"] == pytest.approx(2 / 3) and results["AP/WBC"] == 0.0
    assert evaluator.notes[0].startswith("1 classes with boxes that the detector does not know have AP 0: WBC")
    assert "1 classes that the test set does not name is left out: ghost" in evaluator.notes[1]
    with pytest.raises(UserError, match="the detector knows no class of the test set by its name: it knows cat, dog"):
        evaluator_of(source, ("cat", "dog"))


def test_unreadable_pictures_are_left_out_with_their_boxes_and_counted(tmp_path):
    source = DrawnBoxes(unreadable=[2, 5])
    evaluator = evaluator_of(source, on_corrupt="skip")
    results = evaluator.run(told(source, answers_like(source)))
    assert (results["images"], results["skipped"], results["AP"]) == (7, 2, 1.0)
    truth = json.loads(evaluator.files()["ground_truth_test.json"])
    assert [image["id"] for image in truth["images"]] == [100, 99, 97, 96, 94, 93, 92]


def test_ids_may_be_texts_and_must_be_unique():
    source = DrawnBoxes(3, changes={i: {"image_id": f"cell {i} ä"} for i in range(3)})
    evaluator = evaluator_of(source)
    assert evaluator.run(told(source, answers_like(source)))["AP"] == 1.0
    ids = {box["image_id"] for box in json.loads(evaluator.files()["detections_test.json"])}
    assert ids == {"cell 0 ä", "cell 1 ä", "cell 2 ä"}
    with pytest.raises(UserError, match="1 ids belong to several pictures, such as 99"):
        evaluator_of(DrawnBoxes(3, changes={2: {"image_id": 99}}))
    with pytest.raises(UserError, match="some ids of pictures are numbers and some are texts"):
        evaluator_of(DrawnBoxes(3, changes={2: {"image_id": "99"}}))


def test_the_self_check_names_boxes_that_are_not_where_the_file_says():
    outside = {
        "boxes": [[-30.0, 5, 40, 50], [5, 5, 30, 30]],
        "class_ids": [0, 1],
        "iscrowd": [0, 0],
        "is_group_of": [0, 0],
    }
    with pytest.raises(UserError, match=r"1 of 22 boxes are not found again: picture 98, RBC at \[-30.0, 5.0, 70.0"):
        evaluator_of(DrawnBoxes(changes={2: outside}))


def test_what_a_picture_is_decides_not_what_was_stated_of_it():
    """Annotated on its side: the record as it is read has boxes and size of the upright picture."""
    upright = DrawnBoxes()[2]
    width, height = upright["width"], upright["height"]
    turned = [[y1, width - x2, y2, width - x1] for x1, y1, x2, y2 in upright["boxes"]]
    source = DrawnBoxes(stated={2: {"boxes": turned, "width": height, "height": width}})
    evaluator = evaluator_of(source)
    results = evaluator.run(told(DrawnBoxes(), answers_like(DrawnBoxes())))
    assert results["AP"] == 1.0 and evaluator.notes[-1].endswith("AP 1.000")
    truth = json.loads(evaluator.files()["ground_truth_test.json"])
    assert (truth["images"][2]["width"], truth["images"][2]["height"]) == (width, height)


def test_without_pycocotools_the_install_line_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "\.\[detect\]"'):
        evaluator_of(DrawnBoxes())


def test_mean_boxes_of_the_training_set(scored):
    evaluator, results, _ = scored
    train = DrawnBoxes(30, name="train")
    boxes, shares = mean_boxes([train], ("WBC", "cat", "RBC"))
    rows = [
        np.array(box) / np.tile([record["width"], record["height"]], 2)
        for record in train.metadata()
        for box, label, crowd in zip(record["boxes"], record["class_ids"], record["iscrowd"], strict=True)
        if label == 1 and not crowd
    ]
    np.testing.assert_allclose(boxes[0], np.mean(rows, 0))
    assert not boxes[1].any() and shares[1] == 0 and shares.sum() == pytest.approx(1)
    assert evaluator.chance.keys() == {"AP", "AP50", "AP75", "agnostic_AP50"}
    assert 0 <= evaluator.chance["AP50"] < results["AP50"]
    # Where every picture has the one box, the baseline is right.
    same = {
        "boxes": [[10, 10, 40, 40]],
        "class_ids": [1],
        "iscrowd": [0],
        "is_group_of": [0],
        "width": 80,
        "height": 60,
    }
    still = DrawnBoxes(4, changes=dict.fromkeys(range(4), same))
    assert mean_box_scores(truth_of(still), [still]) == dict.fromkeys(evaluator.chance, 1.0)


def test_a_published_example():
    """Two people of COCO's picture 139 and three detections, with the numbers of pycocotools' own port in C++."""
    source = DrawnBoxes(
        1,
        changes={
            0: {
                "boxes": [[412.8, 157.61, 412.8 + 53.05, 157.61 + 138.01], [384.43, 172.21, 399.55, 207.95]],
                "class_ids": [0, 0],
                "iscrowd": [0, 0],
                "is_group_of": [0, 0],
                "areas": [2913.11, 435.145],
                "width": 640,
                "height": 426,
            }
        },
    )
    found = [
        [417.3332824707031, 159.27003479003906, 47.66064453125, 143.00193786621094],
        [383.5909118652344, 172.0777587890625, 17.959075927734375, 36.94813537597656],
        [457.8359069824219, 158.88027954101562, 9.89764404296875, 8.771820068359375],
    ]
    scores = [0.9949821829795837, 0.7685421705245972, 0.07092753797769547]
    result = coco_scores(
        truth_of(source), FoundBoxes(np.zeros(3, int), np.zeros(3, int), np.array(found), np.array(scores))
    )
    expected = (0.7504950495049505, 1.0, 1.0, 0.7, 0.8, None, 0.4, 0.75, 0.75, 0.7, 0.8, None)
    assert result.values == pytest.approx(
        {name: value for name, value in zip(COCO_METRICS, expected, strict=True) if value} | {"agnostic_AP50": 1.0},
        abs=1e-12,
    )
    ap = result.class_ap()
    assert ap[0] == pytest.approx(expected[0]) and np.isnan(ap[1:]).all() and result.class_ap(0)[0] == 1.0


def test_boxes_are_clipped_rounded_and_dropped_when_empty():
    truth = truth_of(DrawnBoxes(1, changes={0: {"width": 50, "height": 40}}))
    corners = [[-5, 2, 10.12345, 99], [60, 2, 70, 9], [3, 3, 3.0001, 9], [1, 1, 2, 3]]
    found = found_boxes(np.zeros(4, int), np.arange(4) % 3, np.array(corners), np.float32([0.1, 0.2, 0.3, 0.4]), truth)
    assert found.boxes.tolist() == [[0, 2, 10.123, 38], [1, 1, 1, 2]]
    assert found.scores.tolist() == [0.1, 0.4] and found.labels.tolist() == [0, 0]


def test_names_match_to_the_letter_before_anything_else():
    assert match_classes(["Red cell", "red_cell", "x"], ["red_cell", "Red cell"]).tolist() == [1, 0, -1]
    assert match_classes(["Red-Cell"], ["red cell", "other"]).tolist() == [0]
    assert match_classes(["a", "A"], ["b", "Ä"]).tolist() == [-1, -1]
    assert match_classes(["Cat", "CAT"], ["cat"]).tolist() == [-1, -1]  # which of them is not known


def test_pictures_of_several_shapes_of_batches(scored):
    source, ops = DrawnBoxes(), "decode|resize_fit({height}, {width})|pad_image({height}, {width})"
    buckets = make_buckets([source], [(64, 48), (48, 64)])
    assert len(buckets) == 2
    evaluator = CocoEvaluator(source, ops, buckets, detect, make_mesh(-1, 1), 8, NAMES)
    results = evaluator.run(told(source, answers_like(source, 0.08, false=2, wrong=0.2), ops, buckets))
    assert results == pytest.approx(scored[1], abs=1e-3)


def test_two_processes_give_the_numbers_and_the_file_of_one(tmp_path):
    source = DrawnBoxes(unreadable=[5])
    alone = evaluator_of(source, on_corrupt="skip")
    results = alone.run(told(source, answers_like(source, 0.08, false=2, wrong=0.2)))
    printed = run_job(tmp_path, 2, str(tmp_path), program=str(Path(__file__).with_name("coco_job.py")))
    assert "self-check" in printed[0] and "self-check" not in printed[1]
    for process in ("0", "1"):
        assert json.loads((tmp_path / process / "result.json").read_text()) == results
        for name, content in alone.files().items():
            assert (tmp_path / process / name).read_bytes() == content


def test_batches_of_another_size_on_one_device_give_the_same_numbers(scored):
    source = DrawnBoxes()
    evaluator = CocoEvaluator(source, OPS, (), detect, make_mesh(1, 1, jax.devices()[:1]), 2, NAMES)
    assert evaluator.run(told(source, answers_like(source, 0.08, false=2, wrong=0.2))) == scored[1]


def test_a_test_set_without_any_box_gives_the_file_and_no_number():
    none = {"boxes": [], "class_ids": [], "iscrowd": [], "is_group_of": []}
    source = DrawnBoxes(2, changes=dict.fromkeys(range(2), none))
    evaluator = evaluator_of(source, train=[DrawnBoxes(5)])
    results = evaluator.run(told(source, [([[1, 1, 30, 30]], [0.5], [1])] * 2))
    assert results == {"images": 2, "boxes": 0, "crowds": 0} and evaluator.chance == {}
    assert len(json.loads(evaluator.files()["detections_test.json"])) == 2
    assert "3 classes have no boxes in the test set and count nowhere: RBC, WBC, Platelets" in evaluator.notes
    assert "There are no boxes." in "".join(evaluator.report())
