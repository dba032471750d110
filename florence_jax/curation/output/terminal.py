"""What a run of curation says on the terminal when it ends."""

from collections.abc import Mapping
from typing import Any

from florence_jax.curation.filters.captions import UNDETERMINED

# What lets a pair pass that was dropped for this (stage, reason), beside the report's examples.
OPTIONS = {
    ("size", "small_side"): "size.min_side",
    ("size", "aspect"): "size.max_aspect",
    ("size", "few_bytes"): "size.min_bytes",
    ("size", "many_bytes"): "size.max_bytes",
    ("validity", "animated"): "measure.animated=True",
    ("validity", "too_many_pixels"): "measure.max_pixels",
    ("validity", "too_many_bytes"): "measure.max_bytes",
    ("validity", "too_narrow"): "measure.max_aspect",
    **dict.fromkeys((("validity", form) for form in ("cmyk", "alpha", "orientation")), "validity.drop=()"),
    ("near_duplicates", "near_duplicate"): "near_duplicates.k",
    ("text", "few_characters"): "text.min_characters",
    ("text", "many_characters"): "text.max_characters",
    ("text", "few_words"): "text.min_words",
    ("text", "many_words"): "text.max_words",
    ("text", "file_name"): "text.drop_file_names=False",
    ("text", "url"): "text.max_url_share",
    ("text", "markup"): "text.drop_markup=False",
    ("text", "boilerplate"): "text.drop_boilerplate=False",
    ("text", "few_letters"): "text.min_letter_share",
    ("text", "run"): "text.max_run",
    ("text", "repetition"): "text.max_repetition",
    ("text", "garbled"): "text.max_garbled",
    ("text", "language"): "text.languages=()",
    ("text", "frequency"): "text.cap=0",
    ("relevance", "relevance"): "relevance.keep",
    ("post_filter", "licence"): "post_filter.licences=()",
    ("post_filter", "domain"): "post_filter.blocked_domains=()",
    ("post_filter", "nsfw"): "post_filter.max_nsfw",
    **dict.fromkeys((("post_filter", kind) for kind in ("mail", "phone", "card")), "post_filter.personal=()"),
}
SLICE_OF = {"licence": "licence", "language": "language"}  # reason -> the slice whose values it looks at
LISTED = 6  # reasons, and values of one


def summary_lines(summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Pairs left after each stage with the commonest reasons, and the options that would let more pass.

    Args:
      summary: of `audit.write_audit`.
      config: of the run.
    """
    lines = [f"{summary['rows']:>12,}  raw pairs"]
    dropped = []
    for stage in summary["stages"]:
        reasons = sorted(stage["reasons"].items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{reason} {count:,}" for reason, count in reasons[:4])
        lines.append(f"{stage['kept']:>12,}  after {stage['stage']}" + (f"  ({shown})" if shown else ""))
        dropped += [(count, stage["stage"], reason) for reason, count in reasons]
    if lost := summary["refused_captions"]:
        each = ", ".join(f"{reason} {count:,}" for reason, count in sorted(lost.items(), key=lambda item: -item[1]))
        lines.append(f"captions refused of pictures that are left with others: {each}")
    known = sorted((entry for entry in dropped if entry[1:] in OPTIONS), key=lambda entry: -entry[0])
    return lines + [_allowing(summary, config, *entry) for entry in known[:LISTED]]


def _allowing(summary: Mapping[str, Any], config: Mapping[str, Any], count: int, stage: str, reason: str) -> str:
    """What was refused, by which rule, and the option that changes it."""
    option, equals, free = OPTIONS[stage, reason].partition("=")
    section, _, name = option.partition(".")
    rule = config[section].get(name)
    refused = ", ".join(
        f"{row['value']} {row['pairs']:,}"
        for row in summary["slices"].get(SLICE_OF.get(reason, ""), ())[: 4 * LISTED]
        if not row["kept"] and row["value"] != UNDETERMINED  # such a caption is dropped for other reasons
    )
    of = f" (none is left of: {refused})" if refused else ""
    change = f"'--config.{option}={free}' lets them pass" if equals else f"--config.{option} moves the limit"
    return f"{reason} {count:,}{of}: {change}" + ("" if rule is None else f"; now {rule!r}")
