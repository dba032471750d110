"""Questions and captions of composed scenes: true, even, the same on any machine."""

import collections
import hashlib
import pickle

import numpy as np
import pytest

from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.records import sample_of, without_payloads
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.scene_content import COLOUR_NAMES, CONTENT_SPLITS, OWN_COLOURS, compose, is_new_pair
from florence_jax.data.sources.scene_questions import SCENE_QUESTIONS
from florence_jax.data.sources.scenes import SCENE_NAMES
from florence_jax.errors import UserError
from florence_jax.pictures import upright_rgb
from florence_jax.tools import build_questions

COUNT = 900
TYPES = tuple(SCENE_QUESTIONS)


@pytest.fixture(scope="module")
def rows():
    return list(open_source(f"scene_questions:train:{COUNT}").metadata())


def answers_by_text(rows):
    found = collections.defaultdict(collections.Counter)
    for row in rows:
        found[row["question"]][row["answers"][0]] += 1
    return found


def accuracy_of_prior(train, test):
    """Of each type of question: how often the commonest answer to its very text is right."""
    best = {text: answers.most_common(1)[0][0] for text, answers in answers_by_text(train).items()}
    right = collections.defaultdict(list)
    for row in test:
        right[row["question_type"]].append(best.get(row["question"]) == row["answers"][0])
    return {kind: np.mean(values) for kind, values in right.items()}


def test_a_question_alone_says_little(rows):
    test = list(open_source("scene_questions:held_out:300").metadata())
    prior = accuracy_of_prior(rows, test)
    most = {"what": 0.12, "how many": 0.28, "which": 0.56, "is there": 0.58, "is it": 0.56, "what colour": 0.34}
    assert prior.keys() == most.keys() and all(prior[kind] < most[kind] for kind in most), prior


def test_a_sample_has_all_types_as_often():
    source = open_source("scene_questions:train:600")
    for count in (3000, 600, 360):  # of 3,600
        types = collections.Counter(row["question_type"] for row in sample_of(source, count))
        assert len(types) == 6 and sum(types.values()) == count
        assert max(types.values()) < 1.4 * min(types.values())


def test_answers_are_even(rows):
    by_type = collections.defaultdict(collections.Counter)
    for row in rows:
        by_type[row["question_type"]][row["answers"][0]] += 1
    for kind in ("is there", "is it"):
        assert abs(by_type[kind]["yes"] / COUNT - 0.5) < 0.05
    for kind, answers in (("what colour", COLOUR_NAMES), ("what", SCENE_NAMES), ("which", SCENE_NAMES)):
        shares = np.array([by_type[kind][answer] for answer in answers]) / COUNT
        assert abs(shares * len(answers) - 1).max() < 0.5 and np.isclose(shares.sum(), 1)
    counts = answers_by_text(rows)["How many things are there?"]
    assert sorted(counts) == [*"23456"] and max(counts.values()) < 0.28 * sum(counts.values())


def test_answers_are_true(rows):
    for row in rows[:900]:
        content = compose("train", row["image_id"])
        names = collections.defaultdict(list)
        for thing in content.things:
            names[SCENE_NAMES[thing.name]].append(thing)
        question, answer = row["question"].rstrip("?"), row["answers"][0]
        kind = row["question_type"]
        words = question.split()
        if kind == "what colour":
            (thing,) = names[question.removeprefix("What colour is the ")]
            assert COLOUR_NAMES[thing.colour] == answer
        elif kind == "how many":
            what = question.removeprefix("How many ").removesuffix(" are there")
            there = (
                len(content.things)
                if what == "things"
                else len(names[what.removesuffix("es" * what.startswith("cactus") or "s")])
            )
            assert str(there) == answer
        elif kind == "is there":
            what = question.split(" ", 3)[3]
            colour, _, rest = what.partition(" ")
            if colour in COLOUR_NAMES:
                assert (COLOUR_NAMES.index(colour) in [thing.colour for thing in names[rest]]) == (answer == "yes")
            else:
                assert bool(names[what]) == (answer == "yes")
        elif "painted" in words:
            assert {COLOUR_NAMES.index(words[-1])} == {thing.colour for thing in names[answer]}
        elif kind == "is it":
            one, side, other = split_relation(question.removeprefix("Is the "))
            assert all(holds(a, side, b) for a in names[one] for b in names[other]) == (answer == "yes")
        elif kind == "which":
            side, _, both = question.removeprefix("Which is ").partition(", the ")
            one, other = both.split(" or the ")
            side = {
                "further left": "left of",
                "further right": "right of",
                "higher up": "above",
                "further down": "below",
            }[side]
            (a,), (b,) = names[answer], names[other if answer == one else one]
            assert holds(a, side, b)
        else:
            side, _, what = question.removeprefix("What is ").partition(" the ")
            assert {name for name in names for a in names[name] if holds(a, side, names[what][0])} == {answer}


def split_relation(text):
    side = next(side for side in ("left of", "right of", "above", "below") if f" {side} the " in text)
    one, other = text.split(f" {side} the ")
    return one, side, other


def holds(one, side, other):
    return {
        "left of": one.column < other.column,
        "right of": one.column > other.column,
        "above": one.row < other.row,
        "below": one.row > other.row,
    }[side]


def test_new_pairs_are_seen_nowhere_else():
    for split in CONTENT_SPLITS:
        scenes = [compose(split, index) for index in range(150)]
        pairs = [
            [is_new_pair(thing.name, thing.colour) for thing in scene.things if thing.colour != OWN_COLOURS]
            for scene in scenes
        ]
        assert all(found[0] and not any(found[1:]) if split == "new_pairs" else not any(found) for found in pairs)
    for split, new in (("train", False), ("new_pairs", True)):
        for row in open_source(f"scene_questions:{split}:100").metadata():
            colour, _, name = row["question"].removeprefix("Is there a ").rstrip("?").partition(" ")
            if row["question_type"] == "is there" and colour in COLOUR_NAMES:
                assert is_new_pair(SCENE_NAMES.index(name), COLOUR_NAMES.index(colour)) == new


def test_captions_are_true():
    for row in open_source("scene_captions:train:150").metadata():
        content = compose("train", row["image_id"])
        assert len(set(row["captions"])) == 3 and row["caption"] == row["captions"][0]
        for caption in row["captions"]:
            words = f" {caption}"
            if any(side in caption for side in ("left of", "right of", "above", "below")):
                side = next(side for side in ("left of", "right of", "above", "below") if side in caption)
                one, other = words.split(f" {side} ")
                named = {f"{COLOUR_NAMES[t.colour]} {SCENE_NAMES[t.name]}": t for t in (content.first, content.second)}
                one, other = (named[text.strip().split(" ", 1)[1]] for text in (one, other))
                assert holds(one, side, other)
            else:
                number = next(
                    (k for k, word in enumerate(("one", "two", "three", "four"), 1) if word in caption.split()), 1
                )
                assert len(content.copies) == (0 if caption.startswith("only") else number)


@pytest.mark.parametrize("split", CONTENT_SPLITS)
def test_metadata_is_that_of_the_records(split):
    source = pickle.loads(pickle.dumps(open_source(f"scene_questions:{split}:2:48:noise")))
    records = [source[i] for i in range(len(source))]
    assert [row["question_type"] for row in source.metadata()] == [*TYPES, *TYPES]
    assert [without_payloads(record) for record in records] == list(source.metadata())
    assert len({record["key"] for record in records}) == 12 and {r["image_id"] for r in records} == {0, 1}
    assert all(record["image"].shape == (48, 48, 3) for record in records)
    assert np.array_equal(records[0]["image"], records[5]["image"])
    assert not np.array_equal(records[0]["image"], records[6]["image"])
    captions = open_source(f"scene_captions:{split}:2:48:noise")
    assert np.array_equal(captions[1]["image"], records[6]["image"])
    assert sample_of(source, 12) == list(source.metadata())
    assert "they are no photographs" in source.summary["says"]


def test_scenes_are_the_same_on_any_machine():
    sums = hashlib.sha256()
    for name in ("scene_questions:train:3:48:noise", "scene_captions:train:3:48:noise"):
        source = open_source(name)
        for record in map(source.__getitem__, range(len(source))):
            sums.update(record["image"].tobytes() + repr(without_payloads(record)).encode())
    assert sums.hexdigest()[:16] == "d326d80ac27678dc"


def test_ops_take_them():
    context = {"answers": type("All", (), {"targets": lambda self, answers, match: (np.zeros(10, int), np.ones(10))})()}
    example = open_source("scene_questions:train:1:48:noise")[0]
    for op in parse_ops("decode|answer_targets|keep(image, answer_labels)", context):
        example = op(example, np.random.default_rng(0))
    assert example["image"].shape == (48, 48, 3)


@pytest.mark.parametrize(
    "name", ["scene_questions", "scene_questions:all", "scene_questions:train:0", "scene_captions:train:1:8"]
)
def test_other_names(name):
    with pytest.raises(UserError, match="write scene_|pixels"):
        open_source(name if ":" in name else f"{name}:")


def test_questions_are_written_as_ones_own(tmp_path, capsys):
    options = [f"--out={tmp_path / 'out'}", "--train=4", "--held_out=1", "--new_style=0", "--new_pairs=0"]
    options += ["--each=2", "--side=32", "--backgrounds=noise"]
    assert build_questions.main(options) == 0 and "4 pictures, 2 questions each" in capsys.readouterr().out
    source, made = open_source(str(tmp_path / "out/train")), open_source("scene_questions:train:4:32:noise")
    numbers = [0, 1, 8, 9, 16, 17, 18, 19]
    names = ("question", "question_id", "question_type", "answers", "answer_type")
    assert [{name: row[name] for name in names} for row in source.metadata()] == [
        {name: made.described(number)[name] for name in names} for number in numbers
    ]
    assert np.array_equal(np.asarray(upright_rgb(source[2]["image"])), made[8]["image"])
    assert build_questions.main(options) == 0 and build_questions.main([*options, "--train=5"]) == 2
    assert build_questions.main([*options, "--each=7"]) == 2
