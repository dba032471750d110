"""Ops on questions: rows of those about one picture; several pictures of one."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from florence_jax.data.ops.answers import AnswerTargets
from florence_jax.data.ops.captions import Caption, Tokenize
from florence_jax.data.ops.registry import Example, Op, checked_number, key_of, op
from florence_jax.data.records import BadRecord

OF_QUESTIONS = ("text", "text_length")
MADE_OF_QUESTIONS = (*OF_QUESTIONS, "answer_labels", "answer_scores", "asked", "left_out")


@op("each_question")
class EachQuestion(Op):
    """Makes rows of "questions", a list of records: of each what caption(question=1)|tokenize|answer_targets(match) do.

    Adds, for Q places: "text" int32 (Q, L), "text_length" (Q,), "answer_labels" int32 (Q, 10), "answer_scores" float32
    (Q, 10), "asked" bool (Q,), False for places without a question, and "left_out" int32 (), questions that cannot be
    used, such as those of which no answer is in the vocabulary. With targets=False "text" and "text_length" alone, of
    all questions, in their order.

    Args:
      places: Q, at least as many as there are questions.
      match: see op 'answer_targets'.
      targets: whether answers are wanted.

    Raises (on call):
      BadRecord: if no question can be used; without targets, if one cannot.
    """

    reads = frozenset(("questions",))

    def __init__(self, places: int, match: str = "normalised", targets: bool = True, *, context: Mapping[str, Any]):
        self.places, self.targets = int(checked_number("places", places, 1, 1024)), targets
        self.chain: list[Op] = [Caption(question=1), Tokenize(context)]
        self.chain += [AnswerTargets(match, context=context)] if targets else []

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Adds the rows."""
        rows, last = [], BadRecord(key_of(example), "it has no questions")
        for question in example["questions"]:
            try:
                for step in self.chain:
                    question = step(question, rng)
                rows.append(question)
            except BadRecord as bad:
                if not self.targets:
                    raise
                last = bad
        if not rows:
            raise last
        asked, left_out = np.arange(self.places) < len(rows), len(example["questions"]) - len(rows)
        rows += rows[:1] * (self.places - len(rows))
        names = MADE_OF_QUESTIONS[:4] if self.targets else OF_QUESTIONS
        made = {name: np.stack([row[name] for row in rows]) for name in names}
        return example | made | ({"asked": asked, "left_out": np.int32(left_out)} if self.targets else {})


@op("both_pictures")
class BothPictures(Op):
    """Puts the list "images" in the place of "image": the ops after it take each of them; end with stack(image)."""

    reads = frozenset(("images",))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Replaces the picture."""
        return example | {"image": list(example["images"])}
