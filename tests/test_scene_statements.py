"""Statements about scenes: true or false of two, entailed, contradicted or left open by one."""

import collections
import pickle

import numpy as np

from florence_jax.data.records import without_payloads
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.scene_content import CARD, compose
from florence_jax.data.sources.scene_statements import _judgement, _pair_of
from florence_jax.data.sources.scenes import SCENE_NAMES


def name_in(text):
    return SCENE_NAMES.index(text.removeprefix("There is ").split(" in ")[0].partition(" ")[2].rstrip("."))


def test_statements_about_two_scenes_are_true_or_false():
    source = open_source("scene_pairs:train:60")
    rows = list(source.metadata())
    assert source.class_names == ("false", "true") and len(rows) == 120
    for row in rows:
        pair = _pair_of("train", *divmod(row["question_id"], 2))
        scenes = [compose("train", scene) for scene in pair.scenes]
        if row["question_type"] == "more":
            true = len(scenes[0].things) > len(scenes[1].things)
        else:
            name = name_in(row["question"])
            count = sum(any(thing.name == name for thing in scene.things) for scene in scenes)
            true = count == (2 if row["question_type"] == "both" else 1)
        assert row["answers"] == [str(true).lower()] and row["class_id"] == true
    by_sentence = collections.defaultdict(list)
    for row in rows:
        by_sentence[row["sentence_id"], row["question"]].append(row["class_id"])
    assert all(found == [0, 1] for found in by_sentence.values()) and len(by_sentence) == 60
    assert set(collections.Counter(row["question_type"] for row in rows)) == {"both", "one", "more"}


def test_statements_that_a_scene_entails_contradicts_or_leaves_open():
    source = open_source("scene_entailment:train:300")
    cards = collections.Counter()
    for row in source.metadata():
        content = compose("train", row["image_id"])
        number, name, card = _judgement("train", row["image_id"], content)
        there = any(thing.name == name for thing in content.things)
        label = "entailment" if there else "neutral" if card else "contradiction"
        assert row["answers"] == [label] == [source.class_names[number]] and name == name_in(row["question"])
        assert card is None or card not in {(thing.row, thing.column) for thing in content.things}
        cards[label, card is not None] += 1
        assert " " in row["premise"]
    assert min(cards.values()) > 25 and len(cards) == 4
    assert cards["neutral", True] > 70 and cards["contradiction", False] > 70


def test_pictures_of_statements():
    pairs = pickle.loads(pickle.dumps(open_source("scene_pairs:held_out:2:48:noise")))
    records = [pairs[i] for i in range(4)]
    assert [without_payloads(record) for record in records] == list(pairs.metadata())
    assert all(len(record["images"]) == 2 and record["images"][1].shape == (48, 48, 3) for record in records)
    assert np.array_equal(pairs.image_ids, [0, 1, 2, 3]) and "about two pairs" in pairs.summary["says"]
    source, plain = open_source("scene_entailment:train:12:48:noise"), open_source("scene_captions:train:12:48:noise")
    for index in range(12):
        card = _judgement("train", index, compose("train", index))[2]
        changed = (source[index]["image"] != plain[index]["image"]).any(-1)
        if card is None:
            assert not changed.any()
        else:
            row, column = (16 * at for at in card)
            assert changed[row : row + 16, column : column + 16].mean() > 0.9
    assert CARD[3] == 255 and "statements about 12 scenes" in source.summary["says"]
