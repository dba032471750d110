"""Pictures of a few-shot training, by the rule of few-shot detection."""

import numpy as np
import pytest
from PIL import Image

from configs.detect import get_config
from florence_jax.data.few_shots import choose_shots, class_pictures, few_shots
from florence_jax.data.sources.boxes import BoxColumns
from florence_jax.data.sources.detection import open_boxes
from florence_jax.errors import UserError
from florence_jax.tasks.recipe import DETECTION_STEPS, FEW_SHOT_STEPS, detection_recipe, few_shot_recipe


def columns_of(pictures, crowds=()):
    """Boxes of pictures, each given as the classes of its boxes."""
    image = np.repeat(np.arange(len(pictures)), [len(classes) for classes in pictures])
    class_ids = np.concatenate([np.array(classes, np.int32) for classes in pictures])
    boxes = np.tile(np.float32([0, 0, 9, 9]), (len(image), 1))
    crowd = np.isin(np.arange(len(image)), crowds)
    return BoxColumns(len(pictures), image, boxes, class_ids, crowd, np.full(len(image), 81.0))


def in_turn(columns, classes, shots, seed):
    """The rule as people write it: picture by picture."""
    lacking, taken = [shots] * classes, []
    for picture in np.random.default_rng(seed).permutation(len(columns.offsets) - 1).tolist():
        boxes = columns.of(picture)
        shown = set(boxes["class_ids"][~boxes["iscrowd"]].tolist())
        if any(lacking[k] > 0 for k in shown):
            taken.append(picture)
            for k in shown:
                lacking[k] -= 1
    return sorted(taken)


@pytest.mark.parametrize("shots", [1, 3, 5, 10])
def test_they_are_those_of_the_rule(shots):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        # Class 0 is nearly everywhere, class 6 rare, class 7 nowhere.
        chances = np.array([0.9, 0.5, 0.4, 0.2, 0.1, 0.05, 0.02, 0])
        pictures = [np.repeat(np.flatnonzero(rng.random(8) < chances), rng.integers(1, 3)) for _ in range(150)]
        columns = columns_of(pictures, crowds=rng.integers(0, 150, 20))
        rows = choose_shots(columns, 8, shots, seed)
        assert rows.tolist() == in_turn(columns, 8, shots, seed)
        there = class_pictures(columns, 8)
        chosen = np.isin(np.arange(150), rows)
        counts = [sum(chosen[i] and k in columns_classes(columns, i) for i in range(150)) for k in range(8)]
        assert (counts >= np.minimum(there, shots)).all() and counts[7] == there[7] == 0
        assert rows.tolist() != choose_shots(columns, 8, shots, seed + 1).tolist()
        assert shots == 1 or set(rows) != set(choose_shots(columns, 8, 1, seed))


def columns_classes(columns, picture):
    boxes = columns.of(picture)
    return set(boxes["class_ids"][~boxes["iscrowd"]].tolist())


def test_a_source_is_cut_to_them_and_says_so(tmp_path):
    lines = [f"{i}.png,1,1,9,9,{'bee' if i else 'ant'}" for i in range(9)]
    (tmp_path / "boxes.csv").write_text("\n".join(["image,x1,y1,x2,y2,name", *lines]) + "\n")
    for i in range(9):
        Image.fromarray(np.full((12, 12, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    source = open_boxes(str(tmp_path))
    chosen = few_shots(source, 3, seed=1)
    assert len(chosen) == 4 and chosen.class_names == ("ant", "bee") and chosen[0]["key"] == "0.png"
    assert (
        "3 shots of each class, seed 1: 4 of 9 pictures; 1 class has fewer pictures: ant (1)" in chosen.summary["says"]
    )
    assert "shots" not in source.summary["says"]
    with pytest.raises(UserError, match="config.shots=-1 must be at least 1"):
        few_shots(source, -1, seed=1)


def test_a_set_of_crowds_gives_none():
    assert not len(choose_shots(columns_of([[0], [0, 1]], crowds=(0, 1, 2)), 2, 5, 0))


def test_configurations_of_few_shots_and_of_the_papers_pretraining():
    few = get_config("protocol=fewshot,shots=3")
    assert (few.protocol, few.shots, few.mode, few.init) == ("fewshot", 3, "train", "runs/detect")
    flod = get_config("recipe=flod")
    assert (flod.batch_size, flod.epochs, flod.detector.tower_lr, flod.data.train) == (128, 12, 0.0, "")
    assert flod.detector.sizes == get_config("recipe=objects365").detector.sizes
    smoke = get_config("recipe=flod,runlocal")  # two steps have room for one change of the rate
    assert (smoke.optim.step_at, smoke.total_steps) == ((0.5,), 2)


def test_steps_follow_the_number_of_pictures():
    for examples in (1, 3, 8, 15, 30, 79):
        plan = few_shot_recipe(examples, 64)
        steps = plan.epochs * max(examples // plan.batch_size, 1)
        assert FEW_SHOT_STEPS[0] <= steps <= DETECTION_STEPS and plan.batch_size == 8, examples
    assert few_shot_recipe(80, 64) == detection_recipe(80, 64)
    assert few_shot_recipe(None, 64) == detection_recipe(None, 64)
