"""Broken, excluded and small pictures."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from florence_jax.curation.blocks import Decision, Decisions, rows_of


def validity_decisions(block: pa.Table, rules: Any) -> tuple[pa.Table, Decisions]:
    """The status that measuring found, and forms of pictures that the configuration excludes."""
    limits = rules.measure.limits
    names = ("status", "width", "height", "bytes", "format", "mode", "has_alpha", "orientation")
    known = {
        "too_many_pixels": (lambda row: row["width"] * row["height"], limits.max_pixels),
        "too_many_bytes": (lambda row: row["bytes"], limits.max_bytes),
        "too_narrow": (lambda row: row["width"] / max(row["height"], 1), limits.max_aspect),
    }

    def decide(row: dict[str, Any]) -> Decision | None:
        if row["status"] != "ok":
            value, threshold = known.get(row["status"], (lambda row: row["format"], ""))
            return row["status"], value(row), threshold
        forms = {"cmyk": row["mode"] == "CMYK", "alpha": row["has_alpha"], "orientation": row["orientation"] != 1}
        form = next((name for name in rules.forms if forms[name]), None)
        return (form, row["mode"], "") if form else None

    return block, [decide(row) for row in rows_of(block, names)]


def size_decisions(block: pa.Table, rules: Any) -> tuple[pa.Table, Decisions]:
    """`filters.decide_size`."""
    return block, [decide_size(row, rules.size) for row in rows_of(block, ("width", "height", "bytes"))]


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
