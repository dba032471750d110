"""What an evaluator is, and what it shows on the page of a run."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from florence_jax.data.records import Source, record_thumbnail


class Payload(NamedTuple):
    """What is evaluated: pictures, or something else that a record holds.

    Attributes:
      field: of a record, and of a batch.
      plural: what people call many.
      thumbnail: (source, row) -> data URI of a small picture of it; '' if it cannot be read.
      wide: that picture is several in a row.
    """

    field: str
    plural: str
    thumbnail: Callable[[Source, int], str]
    wide: bool = False


OF_IMAGES = Payload("image", "images", record_thumbnail)


class Chart(NamedTuple):
    """A chart over the steps of a run.

    Attributes:
      title: of the chart.
      series: legend -> metric; '' as the legend of a single line.
    """

    title: str
    series: Mapping[str, str]


class Evaluator(Protocol):
    """Turns parameters into numbers. Sums and counts are aggregated under a mask, so that the numbers do not depend on
    the batch size or on the number of hosts.

    Attributes:
      name: prefix of its results, such as 'new_style'.
      charts: what the page of the run shows of them over the steps; metrics by the names that `run` gives.
    """

    name: str
    charts: Sequence[Chart] = ()

    @property
    def chance(self) -> Mapping[str, float]:
        """What guessing scores, by the names that `run` gives; a name without a chance level is left out."""
        return {}

    @property
    def sources(self) -> Sequence[Source]:
        """The data that it opened or was given."""
        return ()

    @abc.abstractmethod
    def run(self, params: Any) -> dict[str, float]:
        """Evaluates `params`; every process of a job calls it and gets the same numbers."""

    def report(self) -> list[str]:
        """HTML fragments about the last `run`; asked of process 0 alone."""
        return []

    def files(self) -> Mapping[str, bytes]:
        """Files about the last `run`, such as all predictions, by name in the workdir; asked of process 0 alone."""
        return {}


class SourceEvaluator(Evaluator):
    """An evaluator of one source; a subclass's `run` says what guessing scores, and what the page shows.

    Args:
      name: prefix of the results.
      source: what is evaluated on.
    """

    def __init__(self, name: str, source: Source):
        self.name, self._source = name, source
        self._chance: dict[str, float] = {}
        self._report: list[str] = []

    @property
    def sources(self) -> Sequence[Source]:
        """See `Evaluator`."""
        return (self._source,)

    @property
    def chance(self) -> Mapping[str, float]:
        """Of the last `run`: it depends on what could be read."""
        return self._chance

    def report(self) -> list[str]:
        """See `Evaluator`."""
        return self._report


def evaluate(evaluators: Sequence[Evaluator], params: Any) -> dict[str, float]:
    """Runs all evaluators; the results are named 'eval/<evaluator>/<metric>'."""
    return {f"eval/{e.name}/{metric}": value for e in evaluators for metric, value in e.run(params).items()}


def chance_levels(evaluators: Sequence[Evaluator]) -> dict[str, float]:
    """The chance levels of all evaluators, named as `evaluate` names the results."""
    return {f"eval/{e.name}/{metric}": value for e in evaluators for metric, value in e.chance.items()}


def all_charts(evaluators: Sequence[Evaluator]) -> list[Chart]:
    """The charts of all evaluators, with metrics named as `evaluate` names them."""
    return [
        Chart(chart.title, {legend: f"eval/{e.name}/{metric}" for legend, metric in chart.series.items()})
        for e in evaluators
        for chart in e.charts
    ]


def own_files(name: str, usual: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files of an evaluator with its name before theirs, unless that is the usual one: of two beside each other."""
    return {file if name == usual else f"{name}_{file}": content for file, content in files.items()}


def all_files(evaluators: Sequence[Evaluator]) -> dict[str, bytes]:
    """The files of all evaluators.

    Raises:
      ValueError: for two of one name that differ.
    """
    found: dict[str, bytes] = {}
    for evaluator in evaluators:
        for name, content in evaluator.files().items():
            if found.get(name, content) != content:
                raise ValueError(
                    f"evaluator {evaluator.name!r} writes {name!r}, which another one has written otherwise"
                )
            found[name] = content
    return found
