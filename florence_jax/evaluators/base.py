"""What an evaluator is, and the embedding of images and texts that most of them need."""

from collections.abc import Sequence
from typing import Any, Protocol


class Evaluator(Protocol):
    """Turns parameters into numbers. Sums and counts are aggregated under a mask, so that the numbers do not depend on
    the batch size or on the number of hosts.

    Attributes:
      name: prefix of its results, such as 'new_style'.
      chance: what guessing scores, by the names that `run` gives; a name without a chance level is left out.
    """

    name: str
    chance: dict[str, float]

    def run(self, params: Any) -> dict[str, float]:
        """Evaluates `params`; every process of a job calls it and gets the same numbers."""

    def report(self) -> list[str]:
        """HTML fragments about the last `run`."""


def evaluate(evaluators: Sequence[Evaluator], params: Any) -> dict[str, float]:
    """Runs all evaluators; the results are named 'eval/<evaluator>/<metric>'."""
    return {f"eval/{e.name}/{metric}": value for e in evaluators for metric, value in e.run(params).items()}


def chance_levels(evaluators: Sequence[Evaluator]) -> dict[str, float]:
    """The chance levels of all evaluators, named as `evaluate` names the results."""
    return {f"eval/{e.name}/{metric}": value for e in evaluators for metric, value in e.chance.items()}
