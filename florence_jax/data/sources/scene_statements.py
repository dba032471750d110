"""Statements that are true or false of two scenes, and such that a scene entails, contradicts, or leaves open."""

import functools
from typing import Any, NamedTuple

import numpy as np

from florence_jax.data.question_files import NLVR2_CLASSES, SNLI_VE_CLASSES
from florence_jax.data.records import Record
from florence_jax.data.sources.content_source import ContentSource
from florence_jax.data.sources.scene_content import Content, below, compose, content_rng
from florence_jax.data.sources.scene_questions import captions_of_content, with_article
from florence_jax.data.sources.scenes import SCENE_NAMES

STATEMENTS = ("both", "one", "more")  # kinds, each as often
DRAWN_FROM = 1 << 20  # scenes of a split that pairs are drawn from
SEEN_WITH_CARD = 0.5  # of the scenes that entail their statement have a card all the same


class _Pair(NamedTuple):
    kind: str
    text: str
    scenes: tuple[int, int]


class ScenePairs(ContentSource):
    """'scene_pairs:SPLIT[:COUNT[:SIDE[:BACKGROUND]]]': COUNT statements, each true of two scenes and false of others.

    As NLVR2 is: a record has "images", two pictures, left and right, "question", the statement, "answers", the one of
    true and false that it is, "class_id", 1 for true, "sentence_id", the same for the two records of a statement, and
    "question_type": both ('There is a key in both pictures.'), one ('... in exactly one picture.') or more ('There are
    more things in the left picture than in the right one.'). Each text is as often true as false. For SPLIT and the
    rest see `SceneQuestions`.

    Attributes:
      class_names: false, true.
    """

    kind, each = "scene_pairs", 2
    class_names = NLVR2_CLASSES

    @property
    def summary(self) -> dict[str, Any]:
        """What the statements are of."""
        return self.found(f"{self.count:,} statements about two pairs of scenes each")

    @property
    def image_ids(self) -> np.ndarray:
        """int (N,): each record has a pair of its own."""
        return np.arange(len(self))

    def described(self, index: int) -> Record:
        """See `records.described`; nothing is painted."""
        statement, number = divmod(index, 2)
        label = NLVR2_CLASSES[number]
        kind, text, _ = _pair_of(self.split, statement, number)
        return self.sizes(index) | {
            "key": f"{self.split}-{statement:06}-{number}",
            "question_id": index,
            "question": text,
            "question_type": kind,
            "answers": [label],
            "answer_type": "other",
            "class_id": number,
            "sentence_id": str(statement),
        }

    def pictures(self, index: int) -> Record:
        """The two pictures."""
        _, _, scenes = _pair_of(self.split, *divmod(index, 2))
        return {"images": [self.painter.picture(scene, compose(self.split, scene)) for scene in scenes]}


@functools.lru_cache(64)
def _pair_of(split: str, statement: int, true: int) -> _Pair:
    """A statement, and two scenes of which it is true, or false."""
    rng = content_rng(split, statement, "statement")
    kind = STATEMENTS[below(rng, len(STATEMENTS))]
    name = below(rng, len(SCENE_NAMES))
    rng = content_rng(split, 2 * statement + true, "pair")
    if kind == "more":
        text = "There are more things in the left picture than in the right one."
        while True:
            pair = below(rng, DRAWN_FROM), below(rng, DRAWN_FROM)
            left, right = (len(compose(split, scene).things) for scene in pair)
            if left != right and (left > right) == bool(true):
                return _Pair(kind, text, pair)
    where = "both pictures" if kind == "both" else "exactly one picture"
    there = [rng.random() < 0.5] * 2  # in both, or in none: of kind 'one' it is false
    if (kind == "one") == bool(true):
        there = [there[0], not there[0]]
    elif kind == "both":
        there = [True, True]
    pair = _scene_with(split, name, there[0], rng), _scene_with(split, name, there[1], rng)
    return _Pair(kind, f"There is {with_article(SCENE_NAMES[name])} in {where}.", pair)


def _scene_with(split: str, name: int, there: bool, rng: np.random.Generator) -> int:
    """A scene in which a thing is, or is not."""
    while True:
        scene = below(rng, DRAWN_FROM)
        if any(thing.name == name for thing in compose(split, scene).things) == there:
            return scene


class SceneEntailment(ContentSource):
    """'scene_entailment:SPLIT[:COUNT[:SIDE[:BACKGROUND]]]': a statement about each of COUNT scenes.

    As SNLI-VE is: "question" is the statement, 'There is a key.', "premise" a caption of the scene, "class_id" and
    "answers" say whether the scene entails it (the thing is there), contradicts it (it is not), or neither: it is not
    seen, but a grey card covers a part of the scene. Half of the scenes that entail their statement have a card too.
    Each text has the three answers as often. For SPLIT and the rest see `SceneQuestions`.

    Attributes:
      class_names: contradiction, neutral, entailment.
    """

    kind = "scene_entailment"
    class_names = SNLI_VE_CLASSES

    @property
    def summary(self) -> dict[str, Any]:
        """What the statements are of."""
        return self.found(f"statements about {self.count:,} scenes")

    def described(self, index: int) -> Record:
        """See `records.described`; nothing is painted."""
        content = compose(self.split, index)
        number, name, _ = _judgement(self.split, index, content)
        return self.sizes(index) | {
            "key": f"{self.split}-{index:06}",
            "question_id": index,
            "question": f"There is {with_article(SCENE_NAMES[name])}.",
            "question_type": self.kind,
            "premise": captions_of_content(content, content_rng(self.split, index, "captions"))[0],
            "answers": [SNLI_VE_CLASSES[number]],
            "answer_type": "other",
            "class_id": number,
        }

    def pictures(self, index: int) -> Record:
        """The picture, with a card or without."""
        content = compose(self.split, index)
        return {"image": self.painter.picture(index, content, _judgement(self.split, index, content)[2])}


def _judgement(split: str, index: int, content: Content) -> tuple[int, int, tuple[int, int] | None]:
    """The class, the thing that is spoken of, and the cell that a card covers, or None."""
    rng = content_rng(split, index, "judgement")
    number = below(rng, len(SNLI_VE_CLASSES))
    there = sorted({thing.name for thing in content.things})
    entails = SNLI_VE_CLASSES[number] == "entailment"
    names = there if entails else [name for name in range(len(SCENE_NAMES)) if name not in there]
    name = names[below(rng, len(names))]
    covered = rng.random() < SEEN_WITH_CARD if entails else SNLI_VE_CLASSES[number] == "neutral"
    free = content.free
    return number, name, free[below(rng, len(free))] if covered else None
