"""Questions and captions that are true of composed scenes, see `scene_content`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from florence_jax.data.records import Record
from florence_jax.data.sources.content_source import ContentSource
from florence_jax.data.sources.scene_content import (
    COLOUR_NAMES,
    OWN_COLOURS,
    Content,
    Thing,
    below,
    compose,
    content_rng,
    is_new_pair,
    withheld_colour,
)
from florence_jax.data.sources.scenes import SCENE_NAMES

Asked = tuple[str, str]  # question, answer
DIRECTIONS = ("left of", "right of", "above", "below")
FURTHER = ("further left", "further right", "higher up", "further down")  # the same, of one of two
OPPOSITE = (1, 0, 3, 2)
OVERALL = 0.25  # of the questions how many: of all things together
NUMBERS = ("no", "one", "two", "three", "four")
IRREGULAR = {"cactus": "cactuses"}


def with_article(words: str) -> str:
    """'a key', 'an elephant'."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _named(thing: Thing) -> str:
    """'red key', or 'key' where it is not painted."""
    name = SCENE_NAMES[thing.name]
    return name if thing.colour == OWN_COLOURS else f"{COLOUR_NAMES[thing.colour]} {name}"


def _is(thing: Thing, direction: int, other: Thing) -> bool:
    """Whether a thing is on that side of another."""
    return (
        thing.column < other.column,
        thing.column > other.column,
        thing.row < other.row,
        thing.row > other.row,
    )[direction]


# -- questions --------------------------------------------------------------------------------------------------------


def _either(content: Content, new: bool, rng: np.random.Generator) -> Thing:
    """One of the two that are there once; of a scene with a new pair that pair."""
    return content.first if new or rng.random() < 0.5 else content.second


def _ask_what(content: Content, new: bool, rng: np.random.Generator) -> Asked:
    thing = _either(content, new, rng)
    direction = below(rng, len(DIRECTIONS))
    there = {other.name for other in content.things if _is(other, direction, thing)}
    if not new and len(there) == 1 and rng.random() < 0.5:
        return f"What is {DIRECTIONS[direction]} the {SCENE_NAMES[thing.name]}?", SCENE_NAMES[there.pop()]
    return f"What is painted {COLOUR_NAMES[thing.colour]}?", SCENE_NAMES[thing.name]


def _ask_how_many(content: Content, new: bool, rng: np.random.Generator) -> Asked:
    if rng.random() < OVERALL:
        return "How many things are there?", str(len(content.things))
    return f"How many {plural(SCENE_NAMES[content.third])} are there?", str(len(content.copies))


def _ask_which(content: Content, new: bool, rng: np.random.Generator) -> Asked:
    one, other = (content.first, content.second) if rng.random() < 0.5 else (content.second, content.first)
    direction = below(rng, len(DIRECTIONS))
    answer = one if _is(one, direction, other) else other
    names = f"the {SCENE_NAMES[one.name]} or the {SCENE_NAMES[other.name]}"
    return f"Which is {FURTHER[direction]}, {names}?", SCENE_NAMES[answer.name]


def _ask_is_there(content: Content, new: bool, rng: np.random.Generator) -> Asked:
    yes = rng.random() < 0.5
    if not new and rng.random() < 0.5:
        there = sorted({thing.name for thing in content.things})
        names = there if yes else [name for name in range(len(SCENE_NAMES)) if name not in there]
        return f"Is there {with_article(SCENE_NAMES[names[below(rng, len(names))]])}?", "yes" if yes else "no"
    thing = _either(content, new, rng)
    pair = (thing.name, thing.colour) if yes else _absent_pair(content, thing, new, rng)
    return f"Is there {with_article(_named(Thing(*pair, 0, 0)))}?", "yes" if yes else "no"


def _absent_pair(content: Content, thing: Thing, new: bool, rng: np.random.Generator) -> tuple[int, int]:
    """A thing in a colour that is not there, and has the name or the colour of one that is."""
    there = {(other.name, other.colour) for other in content.things}
    if new:
        pairs = [(name, withheld_colour(name)) for name in range(len(SCENE_NAMES))]
    elif rng.random() < 0.5:
        pairs = [(thing.name, colour) for colour in range(len(COLOUR_NAMES))]
    else:
        pairs = [(name, thing.colour) for name in range(len(SCENE_NAMES))]
    pairs = [pair for pair in pairs if pair not in there and is_new_pair(*pair) == new]
    return pairs[below(rng, len(pairs))]


def _ask_is_it(content: Content, new: bool, rng: np.random.Generator) -> Asked:
    one, other = (content.first, content.second) if rng.random() < 0.5 else (content.second, content.first)
    direction = below(rng, len(DIRECTIONS))
    question = f"Is the {SCENE_NAMES[one.name]} {DIRECTIONS[direction]} the {SCENE_NAMES[other.name]}?"
    return question, "yes" if _is(one, direction, other) else "no"


def _ask_colour(content: Content, new: bool, rng: np.random.Generator) -> Asked:
    thing = _either(content, new, rng)
    return f"What colour is the {SCENE_NAMES[thing.name]}?", COLOUR_NAMES[thing.colour]


# Type of question -> how it is asked, type of its answer; every scene has one of each.
SCENE_QUESTIONS: dict[str, tuple[Callable[[Content, bool, np.random.Generator], Asked], str]] = {
    "what": (_ask_what, "other"),
    "how many": (_ask_how_many, "number"),
    "which": (_ask_which, "other"),
    "is there": (_ask_is_there, "yes/no"),
    "is it": (_ask_is_it, "yes/no"),
    "what colour": (_ask_colour, "other"),
}


def plural(name: str) -> str:
    """Of a name of a thing."""
    return IRREGULAR.get(name, f"{name}s")


# -- captions ---------------------------------------------------------------------------------------------------------


def captions_of_content(content: Content, rng: np.random.Generator) -> list[str]:
    """Sentences that are true of a scene: what is where, and how much of what is there; in random order."""
    one, other = (content.first, content.second) if rng.random() < 0.5 else (content.second, content.first)
    across, down = (next(d for d in pair if _is(one, d, other)) for pair in ((0, 1), (2, 3)))
    captions = [
        f"{with_article(_named(one))} {DIRECTIONS[across]} {with_article(_named(other))}",
        f"{with_article(_named(other))} {DIRECTIONS[OPPOSITE[down]]} {with_article(_named(one))}",
    ]
    pair = f"{with_article(_named(one))} and {with_article(_named(other))}"
    if content.copies:
        named = _named(content.copies[0])
        number = len(content.copies)
        group = with_article(named) if number == 1 else f"{NUMBERS[number]} {plural(named)}"
        captions.append(f"{group}, {pair}")
    else:
        captions.append(f"only {pair}")
    return [captions[k] for k in rng.permutation(len(captions))]


# -- sources ----------------------------------------------------------------------------------------------------------


class SceneQuestions(ContentSource):
    """'scene_questions:SPLIT[:COUNT[:SIDE[:BACKGROUND]]]': six questions, one of each type, on each of COUNT scenes.

    SPLIT is train, held_out (the drawings of train, arranged anew on other photographs), new_style (a third vendor's
    drawings) or new_pairs (things in the one colour that they never have elsewhere; the questions of the types what,
    is there and what colour are about such a pair). SIDE: pixels. BACKGROUND: photographs or noise; photographs, where
    they are installed.

    A record has "key", "image_id" (the scene), "question_id", "question", "question_type", of `SCENE_QUESTIONS`,
    "answers", the one that is true, "answer_type", "width", "height" and "image", uint8 (SIDE, SIDE, 3). The records of
    a scene follow one another.

    How even the answers are: of which, is there and is it each text has two answers, each as often; of how many five
    numbers; of what colour four (each thing has one only in new_pairs); of what about 19.

    Raises:
      UserError: for another name, or photographs that are not installed.
    """

    kind, each = "scene_questions", len(SCENE_QUESTIONS)

    @property
    def summary(self) -> dict[str, Any]:
        """What the questions are of."""
        return self.found(f"{len(self):,} questions of {self.count:,} scenes")

    def described(self, index: int) -> Record:
        """See `records.described`; nothing is painted."""
        scene, number = divmod(index, self.each)
        question_type = tuple(SCENE_QUESTIONS)[number]
        ask, answer_type = SCENE_QUESTIONS[question_type]
        new, rng = self.split == "new_pairs", content_rng(self.split, index, "question")
        question, answer = ask(compose(self.split, scene), new, rng)
        return self.sizes(scene) | {
            "key": f"{self.split}-{scene:06}-{number}",
            "question_id": index,
            "question": question,
            "question_type": question_type,
            "answers": [answer],
            "answer_type": answer_type,
        }


class SceneCaptions(ContentSource):
    """'scene_captions:SPLIT[:COUNT[:SIDE[:BACKGROUND]]]': the same scenes, with what is true of each as captions.

    "captions" are three, two of them of where the two painted things are, one of all that is there; "caption" is the
    first of them. For the rest see `SceneQuestions`.
    """

    kind, each = "scene_captions", 1

    @property
    def summary(self) -> dict[str, Any]:
        """What the captions are of."""
        return self.found(f"captions of {self.count:,} scenes")

    def described(self, index: int) -> Record:
        """See `records.described`; nothing is painted."""
        captions = captions_of_content(compose(self.split, index), content_rng(self.split, index, "captions"))
        return self.sizes(index) | {
            "key": f"{self.split}-{index:06}",
            "caption": captions[0],
            "captions": captions,
        }
