"""Pictures that cannot be used as they are: broken ones, and forms that the configuration excludes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from florence_jax.curation.blocks import Decision, Decisions, Stage, rows_of
from florence_jax.errors import UserError

FORMS = ("cmyk", "alpha", "orientation")
_COLUMNS = ("status", "width", "height", "bytes", "format", "mode", "has_alpha", "orientation")
# What was compared with a limit of measuring, by the status that it gave.
_LIMITED = {
    "too_many_pixels": lambda row: row["width"] * row["height"],
    "too_many_bytes": lambda row: row["bytes"],
    "too_narrow": lambda row: row["width"] / max(row["height"], 1),
}


@dataclasses.dataclass(frozen=True)
class ValidityRules:
    """Which pictures are no use.

    Attributes:
      drop: unusual forms, of `FORMS`, to drop. Otherwise they count as good: CMYK is converted, transparency is laid
        on white, orientation is applied.
      limits: of measuring, by the status of pictures beyond them; the log names them.

    Raises:
      UserError: for an unknown form.
    """

    drop: tuple[str, ...] = ()
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if unknown := set(self.drop) - set(FORMS):
            raise UserError(f"validity.drop={sorted(unknown)[0]!r} is unknown; known: {', '.join(FORMS)}")


def decide_validity(scores: Mapping[str, Any], rules: ValidityRules) -> Decision | None:
    """What is wrong with a picture, or None.

    Args:
      scores: the columns of `_COLUMNS`.

    Returns:
      (reason, value, threshold); the reason is the status that measuring found, or a form of `FORMS`.
    """
    status = scores["status"]
    if status in _LIMITED:
        return status, _LIMITED[status](scores), rules.limits.get(status, "")
    if status != "ok":
        return status, scores["format"], ""
    forms = {"cmyk": scores["mode"] == "CMYK", "alpha": scores["has_alpha"], "orientation": scores["orientation"] != 1}
    form = next((name for name in rules.drop if forms[name]), None)
    return (form, scores["mode"], "") if form else None


def validity_decisions(block: pa.Table, rules: ValidityRules) -> tuple[pa.Table, Decisions]:
    """`decide_validity` of every row."""
    return block, [decide_validity(row, rules) for row in rows_of(block, _COLUMNS)]


def validity_stage(rules: ValidityRules) -> Stage:
    """The stage 'validity'."""
    return Stage("validity", _COLUMNS, functools.partial(validity_decisions, rules=rules))
