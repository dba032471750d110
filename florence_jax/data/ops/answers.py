"""The op that makes targets of the answers to a question."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from florence_jax.data.answers import MATCHES
from florence_jax.data.ops.registry import Example, Op, key_of, op
from florence_jax.data.records import BadRecord
from florence_jax.errors import UserError


@op("answer_targets")
class AnswerTargets(Op):
    """Adds "answer_labels", int32 (10,), and "answer_scores", float32 (10,): see `answers.AnswerVocabulary.targets`.

    Reads "answers" and context["answers"], the vocabulary. A question of which no answer is in the vocabulary is a bad
    record; with needed=False all its labels are -1.
    """

    reads = frozenset(("answers",))

    def __init__(self, match: str = "normalised", needed: bool = True, *, context: Mapping[str, Any]):
        if context.get("answers") is None:
            raise UserError("needs 'answers' in the context")
        if match not in MATCHES:
            raise UserError(f"match is one of {', '.join(MATCHES)}, not {match!r}")
        self.vocabulary, self.match, self.needed = context["answers"], match, bool(needed)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Adds the targets."""
        labels, scores = self.vocabulary.targets(example.get("answers") or (), self.match)
        if self.needed and labels[0] < 0:
            raise BadRecord(key_of(example), "none of its answers is in the vocabulary")
        return example | {"answer_labels": labels, "answer_scores": scores}
