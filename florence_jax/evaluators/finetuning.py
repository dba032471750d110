"""What fine-tuning is watched by: held-out images, a linear probe, weights interpolated with the first, forgetting."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from absl import logging

from florence_jax.data.records import Source
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.classification import Classification

NOT_BEATEN = "Fine-tuning does not beat the probe"


class WithHeadline(Evaluator, Protocol):
    """An evaluator with a headline.

    Attributes:
      metric: that of its results that counts.
    """

    metric: str


class _Around(Evaluator):
    """An evaluator that runs another one, whose data and chance levels are its own."""

    _evaluator: Evaluator

    @property
    def sources(self) -> Sequence[Source]:
        """Of the evaluator."""
        return self._evaluator.sources

    @property
    def chance(self) -> Mapping[str, float]:
        """Of the evaluator."""
        return self._evaluator.chance


class Validation(_Around):
    """The headline number alone of a classification, by which the parameters of a run are chosen."""

    def __init__(self, evaluator: Classification):
        self.name, self.charts, self.metric = evaluator.name, evaluator.charts, evaluator.metric
        self._evaluator = evaluator

    @property
    def chance(self) -> Mapping[str, float]:
        """Of the evaluator."""
        return {name: value for name, value in self._evaluator.chance.items() if name == self.metric}

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        return {self.metric: self._evaluator.run(params)[self.metric]}


class _Beside(_Around):
    """An evaluator of trained weights, with another result on the same pictures as '<word>_<metric>'."""

    word: str
    _evaluator: WithHeadline

    @property
    def chance(self) -> Mapping[str, float]:
        """Of the evaluator, and the same for the other result."""
        chance, metric = dict(self._evaluator.chance), self._evaluator.metric
        return chance | ({f"{self.word}_{metric}": chance[metric]} if metric in chance else {})

    def files(self) -> Mapping[str, bytes]:
        """Of the evaluator."""
        return self._evaluator.files()


class BesideProbe(_Beside):
    """A classification by fine-tuned weights, and what a linear probe of the first weights scores on the same images.

    Results: the classification's, and 'probe_<metric>'. The report says where the probe is not beaten.

    Args:
      evaluator: of the fine-tuned weights.
      probe: called with the parameters of the run, gives the probe's results.
    """

    word = "probe"

    def __init__(self, evaluator: Classification, probe: Callable[[Any], Mapping[str, float]]):
        self.name, self.charts = evaluator.name, evaluator.charts
        self._evaluator, self._probe = evaluator, probe
        self._sentence = ""

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        results, metric = self._evaluator.run(params), self._evaluator.metric
        probe = self._probe(params)
        self._sentence = _compared(self.name, metric, results[metric], probe[metric], int(results["images"]))
        return results | {f"probe_{metric}": probe[metric]}

    def report(self) -> list[str]:
        """The comparison, then the evaluator's."""
        if warned := NOT_BEATEN in self._sentence:
            logging.warning("%s", self._sentence)
        kind = ' class="warning"' if warned else ""
        return [f"<p{kind}>{html.escape(self._sentence)}</p>", *self._evaluator.report()]


def _compared(name: str, metric: str, tuned: float, probe: float, images: int) -> str:
    error = math.sqrt(max(probe * (1 - probe), 0) / max(images, 1))
    said = f"{name}: fine-tuned {metric} {tuned:.3f}, a linear probe of the first weights {probe:.3f} ({images} images"
    said += f", standard error about {error:.3f})"
    if tuned > probe:
        return said
    return (
        f"{said}. {NOT_BEATEN}, which takes seconds (protocol=probe): more images, other config.data.train_ops, or "
        "another config.optim.learning_rate or config.epochs may change that"
    )


class BesideStart(_Beside):
    """What trained weights score, and what the first ones scored on the same pictures.

    Results: the evaluator's, and 'start_<metric>', unless there is nothing to find. For a set that the first weights
    were not trained on that is their zero-shot result.

    Args:
      evaluator: of the trained weights.
      initial: called with them, gives the first ones on the same devices; evaluated once.
      what: the first weights, for the report: 'the detector of DIR'.
    """

    word = "start"

    def __init__(self, evaluator: WithHeadline, initial: Callable[[Any], Any], what: str):
        self.name, self.charts = evaluator.name, evaluator.charts
        self._evaluator, self._initial, self._what = evaluator, initial, what
        self._before: float | None = None
        self._now: float | None = None

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        metric = self._evaluator.metric
        if self._before is None:
            self._before = self._evaluator.run(self._initial(params)).get(metric)
        results = self._evaluator.run(params)
        self._now = results.get(metric)
        return results | ({} if self._before is None else {f"start_{metric}": self._before})

    def report(self) -> list[str]:
        """Both numbers, then the evaluator's."""
        if self._before is None or self._now is None:
            return self._evaluator.report()
        said = f"{self.name}: {self._evaluator.metric} {self._before:.3f} before this training, by {self._what}, "
        said += f"{self._now:.3f} after it"
        return [f"<p>{html.escape(said)}.</p>", *self._evaluator.report()]


class Remade(_Around):
    """An evaluator of parameters that are made of those of a run.

    Args:
      evaluator: what to run on them.
      made: called with the parameters of the run, gives them.
      name: prefix of the results.
    """

    def __init__(self, evaluator: WithHeadline, made: Callable[[Any], Any], name: str):
        self.name, self.metric = name, evaluator.metric
        self._evaluator, self._made = evaluator, made

    def run(self, params: Any) -> dict[str, float]:
        """The evaluator's results."""
        return self._evaluator.run(self._made(params))


class Interpolated(_Around):
    """Weight-space ensembling (WiSE-FT, Wortsman et al. 2022): evaluates (1 - alpha) initial + alpha fine-tuned.

    Args:
      evaluator: what to run on the interpolated parameters.
      initial: called with the fine-tuned parameters, gives the initial ones on the same devices.
      alpha: share of the fine-tuned parameters.
    """

    def __init__(self, evaluator: Evaluator, initial: Callable[[Any], Any], alpha: float):
        self.name = evaluator.name
        self._evaluator, self._initial, self._alpha = evaluator, initial, alpha

    def run(self, params: Any) -> dict[str, float]:
        """The evaluator's results on the interpolated parameters."""
        return self._evaluator.run(interpolate(self._initial(params), params, self._alpha))

    def report(self) -> list[str]:
        """The evaluator's."""
        return self._evaluator.report()

    def files(self) -> Mapping[str, bytes]:
        """The evaluator's, named after the share."""
        return {f"wise{self._alpha:g}_{name}": content for name, content in self._evaluator.files().items()}


def interpolate(start: Any, end: Any, alpha: float) -> Any:
    """(1 - alpha) start + alpha end, leaf by leaf."""
    return jax.tree.map(lambda a, b: (1 - alpha) * a + alpha * b, start, end)


class Forgetting(_Around):
    """Zero-shot results on another set before and after fine-tuning: warns where they dropped.

    Results: 'before', 'now' and 'drop' of the inner evaluator's metric; none where there is nothing to find.

    Args:
      evaluator: on a set that is not fine-tuned on.
      initial: as for `Interpolated`; evaluated once.
      threshold: drop above which it warns.
      mixing: the option that evaluates interpolated weights, for the warning.
    """

    _evaluator: WithHeadline

    def __init__(
        self,
        evaluator: WithHeadline,
        initial: Callable[[Any], Any],
        threshold: float,
        mixing: str = "config.wise_ft",
    ):
        self.name = evaluator.name
        title = f"zero-shot {evaluator.metric} on the watched set"
        self.charts = (Chart(title, {"before": "before", "now": "now"}),)
        self._evaluator, self._initial, self._threshold, self._mixing = evaluator, initial, threshold, mixing
        self._before: float | None = None
        self._said, self._warning, self._warned = "", "", False

    @property
    def chance(self) -> Mapping[str, float]:
        """Of the numbers before and now."""
        level = self._evaluator.chance.get(self._evaluator.metric)
        return {} if level is None else {"before": level, "now": level}

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        metric = self._evaluator.metric
        if self._before is None:
            self._before = self._evaluator.run(self._initial(params)).get(metric)
        now = self._evaluator.run(params).get(metric)
        if self._before is None or now is None:
            self._said = f"{self.name}: no zero-shot {metric}: there is nothing to find in this set."
            return {}
        drop = self._before - now
        self._said = f"{self.name}: zero-shot {metric} {self._before:.3f} before this training, {now:.3f} after it."
        self._warning = ""
        if drop > self._threshold:
            self._warning = (
                f"{self.name}: zero-shot {metric} fell from {self._before:.3f} to {now:.3f}, more than "
                f"{self._threshold:g}: fine-tuning forgets. Lower the learning rate or the number of epochs, lower "
                f"config.optim.layer_decay, or interpolate with the initial weights ({self._mixing})"
            )
            if not self._warned:
                logging.warning("%s", self._warning)
            self._warned = True  # not again in every epoch; the report has the last
        return {"before": self._before, "now": now, "drop": drop}

    def report(self) -> list[str]:
        """Both numbers, or the warning."""
        kind = ' class="warning"' if self._warning else ""
        return [f"<p{kind}>{html.escape(self._warning or self._said)}</p>"]
