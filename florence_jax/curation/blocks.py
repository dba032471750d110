"""Blocks of the table of scores: how a stage decides one, how they meet by key, their log rows."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import apache_beam as beam
import numpy as np
import pyarrow as pa

from florence_jax.curation.table import DECISIONS, concatenate, partitions, split_by
from florence_jax.errors import UserError

Decision = tuple[str, float | str, float | str]
Decisions = list[Decision | None]
# What stages write of the log; the digest of the configuration joins it when it goes into a file.
LOG = pa.schema([field for field in DECISIONS if field.name != "config"])


def rows_of(block: pa.Table, names: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of a block as a dict for each row."""
    return block.select(list(names)).to_pylist()


def decision_rows(block: pa.Table, stage: str, decisions: Sequence[Decision]) -> pa.Table:
    """The log rows of a block whose rows have all been decided; see `LOG`."""
    reasons, values, thresholds = zip(*decisions, strict=True) if decisions else ((), (), ())
    columns = [
        block["uid"],
        block["source"],
        pa.array([stage] * len(block), pa.string()),
        pa.array(reasons, pa.string()),
        pa.array(map(_shown, values), pa.string()),
        pa.array(map(_shown, thresholds), pa.string()),
        block["refused"] if "refused" in block.column_names else pa.array([[]] * len(block), LOG.field("refused").type),
    ]
    return pa.table(columns, schema=LOG)


def _shown(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def split_decided(block: pa.Table, stage: str, decisions: Decisions) -> tuple[pa.Table, pa.Table]:
    """(rows that go on, log rows of those that do not)."""
    keep = np.array([decision is None for decision in decisions], bool)
    dropped = block.filter(pa.array(~keep))
    return block.filter(pa.array(keep)), decision_rows(dropped, stage, [d for d in decisions if d])


R = TypeVar("R")


def make_rules(cls: type[R], values: Mapping[str, Any]) -> R:
    """A rules dataclass from a part of the configuration.

    Raises:
      UserError: for an unknown name, and as `cls` does for a bad value.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"unknown option {', '.join(unknown)} of {cls.__name__}: known are {', '.join(known)}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def load_callable(spec: str) -> Callable[..., Any]:
    """The function that 'module:name' names. Raises UserError."""
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot load {spec!r}: {error}; write module:function") from error


Numbers = Callable[[pa.Table], np.ndarray]


class Repartition(beam.PTransform):
    """Blocks -> (number, block of all rows with it, sorted), where `numbers` gives the number of each row."""

    def __init__(self, numbers: Numbers, sort_by: str = "uid"):
        super().__init__()
        self._numbers, self._sort_by = numbers, sort_by

    def expand(self, blocks: beam.PCollection[pa.Table]) -> beam.PCollection[tuple[int, pa.Table]]:
        """One shuffle."""
        return (
            blocks
            | "Split" >> beam.FlatMap(_split, self._numbers)
            | "Group" >> beam.GroupByKey()
            | "Join" >> beam.MapTuple(functools.partial(_joined, sort_by=self._sort_by))
        )


def _split(block: pa.Table, numbers: Numbers) -> Iterator[tuple[int, pa.Table]]:
    return iter(split_by(block, numbers(block))) if len(block) else iter(())


def _joined(number: int, blocks: Iterable[pa.Table], sort_by: str) -> tuple[int, pa.Table]:
    return number, concatenate(blocks, sort_by)


def by_identifier(block: pa.Table, column: str, count: int) -> np.ndarray:
    """Numbers for `Repartition`: ranges of a hexadecimal column."""
    return partitions(block[column], count)


class Stage(NamedTuple):
    """A stage that decides every row by itself: what a filter is to the pipeline.

    Attributes:
      name: in the decision log, the report and Beam's graph.
      columns: of the table of scores that it reads; a column that no stage names is not loaded.
      decide: block -> (block, for each row None or why it goes), its rules bound. It is pickled into workers: a
        function of a module, or a `functools.partial` of one.
    """

    name: str
    columns: tuple[str, ...]
    decide: Callable[[pa.Table], tuple[pa.Table, Decisions]]


class WideStage(beam.PTransform):
    """A stage that must see rows of several blocks together, or numbers of all rows.

    Its subclasses bring together what belongs together, and decide by `Decide`.

    Args:
      name, columns: as in `Stage`.
    """

    def __init__(self, name: str, columns: Sequence[str]):
        super().__init__(name)
        self.name, self.columns = name, tuple(columns)


class Decide(beam.PTransform):
    """Blocks -> {"kept": blocks, "dropped": log rows}.

    Args:
      name: of the stage, in the decision log.
      decide: (block, *side inputs) -> (block, decisions); see `Stage`.
      sides: side inputs.
    """

    def __init__(self, name: str, decide: Callable[..., tuple[pa.Table, Decisions]], *sides: Any):
        super().__init__(name)
        self._name, self._decide, self._sides = name, decide, sides

    def expand(self, blocks: beam.PCollection[pa.Table]) -> Any:
        """One pass over the blocks."""
        outputs = blocks | "Decide" >> beam.ParDo(_Decide(self._name, self._decide), *self._sides).with_outputs(
            "dropped", main="kept"
        )
        return {"kept": outputs.kept, "dropped": outputs.dropped}


class _Decide(beam.DoFn):
    def __init__(self, name: str, decide: Callable[..., tuple[pa.Table, Decisions]]):
        self._name, self._decide = name, decide

    def process(self, block: pa.Table, *sides: Any) -> Iterator[Any]:
        block, decisions = self._decide(block, *sides)
        kept, dropped = split_decided(block, self._name, decisions)
        if len(kept):
            yield kept
        if len(dropped):
            yield beam.pvalue.TaggedOutput("dropped", dropped)


def chain_stages(blocks: beam.PCollection[pa.Table], stages: Iterable[Stage | WideStage]) -> dict[str, Any]:
    """{"blocks": what the last stage keeps, "dropped": log rows of all}."""
    dropped = []
    for stage in stages:
        outputs = blocks | (Decide(stage.name, stage.decide) if isinstance(stage, Stage) else stage)
        blocks = outputs["kept"]
        dropped.append(outputs["dropped"])
    return {"blocks": blocks, "dropped": dropped}
