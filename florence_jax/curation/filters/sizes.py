"""Small, long and light pictures."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from florence_jax.curation.blocks import Decision, Decisions, Stage, rows_of


@dataclasses.dataclass(frozen=True)
class SizeRules:
    """Thresholds of `decide_size`; the defaults are DataComp's and COYO's.

    Attributes:
      min_side: pixels of the shorter side.
      max_aspect: longer side over shorter side.
      min_bytes, max_bytes: of the encoded image; 0 = no limit.
    """

    min_side: int = 200
    max_aspect: float = 3.0
    min_bytes: int = 5120
    max_bytes: int = 0


def decide_size(scores: Mapping[str, Any], rules: SizeRules) -> Decision | None:
    """The first reason to drop an image for its size, or None.

    Args:
      scores: "width", "height" (pixels) and "bytes".

    Returns:
      (reason, value, threshold); reasons: 'small_side', 'aspect', 'few_bytes', 'many_bytes'.
    """
    short, long = sorted((scores["width"], scores["height"]))
    if short < max(rules.min_side, 1):
        return "small_side", short, rules.min_side
    if long / short > rules.max_aspect:
        return "aspect", long / short, rules.max_aspect
    if scores["bytes"] < rules.min_bytes:
        return "few_bytes", scores["bytes"], rules.min_bytes
    if rules.max_bytes and scores["bytes"] > rules.max_bytes:
        return "many_bytes", scores["bytes"], rules.max_bytes
    return None


def size_decisions(block: pa.Table, rules: SizeRules) -> tuple[pa.Table, Decisions]:
    """`decide_size` of every row."""
    return block, [decide_size(row, rules) for row in rows_of(block, ("width", "height", "bytes"))]


def size_stage(rules: SizeRules) -> Stage:
    """The stage 'size'."""
    return Stage("size", ("width", "height", "bytes"), functools.partial(size_decisions, rules=rules))
