"""The funnel report: one HTML file without links, with pictures of pairs that each reason removed."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from florence_jax.curation.filters.personal import redact
from florence_jax.curation.ingest.measure import image_bytes
from florence_jax.page import Html, figure_html, markup, table_html, write_page
from florence_jax.pictures import thumbnail

if TYPE_CHECKING:
    from florence_jax.curation.output.funnel import Funnel
CAPTION = 70  # characters shown
# What the second of two compared values is, where it is not a limit.
COMPARED_WITH = {
    "domain": "blocked",
    "licence": "allowed",
    "language": "allowed",
    "x_robots": "for agent",
    "robots_txt": "for agent",
    "tdmrep": "said by",
    "benchmark_near": "bits apart",
}


def write_html(path: str, workdir: str, summary: Mapping[str, Any], funnel: "Funnel") -> None:
    """Writes the report.

    Args:
      path: of the file.
      workdir: where pictures are read from.
      summary: as in funnel.json.
      funnel: gives the examples.
    """
    body = [_head(summary), _funnel(summary)]
    for stage in summary["stages"]:
        if stage["reasons"]:
            body.append(_stage(stage, workdir, funnel))
    body += [_section("Kept", [_tiles(funnel.examples("output", "kept"), workdir, {})]), _benchmarks(summary)]
    body += [_slices(summary)]
    write_page(path, "Curation funnel", "\n".join(body))


def _section(title: str, parts: Iterable[str]) -> str:
    return f"<h2>{markup(_title(title))}</h2>{''.join(parts)}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _title(words: str) -> str:
    return words[:1].upper() + words[1:]


def _head(summary: Mapping[str, Any]) -> str:
    share = summary["records"] / summary["rows"]
    notes = [
        f"{summary['records']:,} of {summary['rows']:,} raw pairs kept ({share:.1%}).",
        f"Repeated keys: {summary['repeated_keys']:,}. Damaged input files: {len(summary['damaged_inputs']):,}. "
        f"Quarantined: {summary['quarantined']:,} (never shown).",
    ]
    notes += [f"Damaged: {damage}" for damage in summary["damaged_inputs"][:5]]
    if lost := summary["refused_captions"]:
        each = ", ".join(f"{reason} {count:,}" for reason, count in lost.items())
        notes.append(f"Captions refused of pictures that are left with others: {each}.")
    notes.append("A pair leaves at the first stage that finds a reason; at most a few examples of each are drawn.")
    shown = "".join(f"<p>{markup(note)}</p>" for note in notes)
    return f"{shown}<p>Content <code>{summary['root']}</code><br>Configuration <code>{summary['config']}</code></p>"


def _funnel(summary: Mapping[str, Any]) -> str:
    rows = [("raw pairs", "", summary["rows"], _bar(1, 0))]
    for stage in summary["stages"]:
        lost = stage["came"] - stage["kept"]
        bar = _bar(stage["kept"] / summary["rows"], lost / summary["rows"])
        rows.append((_words(stage["stage"]), -lost if lost else 0, stage["kept"], bar))
    return table_html(("stage", "removed", "left", "left and removed"), rows)


def _bar(left: float, lost: float) -> Html:
    return Html(f'<div class="bar"><i style="width:{left:.2%}"></i><b style="width:{lost:.2%}"></b></div>')


def _stage(stage: Mapping[str, Any], workdir: str, funnel: "Funnel") -> str:
    parts = []
    for reason, count in sorted(stage["reasons"].items(), key=lambda item: (-item[1], item[0])):
        examples = funnel.examples(stage["stage"], reason)
        parts.append(
            f"<h3>{markup(_title(_words(reason)))}: {count:,}</h3>{_tiles(examples, workdir, funnel.partners)}"
        )
    return _section(_words(stage["stage"]), parts)


def _tiles(rows: Iterable[Mapping[str, Any]], workdir: str, partners: Mapping[str, Mapping[str, Any]]) -> str:
    figures = []
    for row in rows:
        pictures = [row_thumbnail(workdir, row)]
        if (partner := partners.get(row["value"])) is not None:
            pictures.append(row_thumbnail(workdir, partner))
        caption = redact(row["caption"])
        caption = caption if len(caption) <= CAPTION else caption[:CAPTION] + "…"
        figures.append(
            figure_html(pictures, caption, "copy of the picture at right" if len(pictures) > 1 else _compared(row))
        )
    return f'<div class="tiles">{"".join(figures)}</div>' if figures else "<p>Examples are never shown.</p>"


def _compared(row: Mapping[str, Any]) -> str:
    """The value that the decision was made by, and what it was compared with."""
    if row["reason"] == "kept" or row["value"] == "":
        return ""
    value, limit = (f"{int(text):,}" if text.isdecimal() else text for text in (row["value"], row["threshold"]))
    shown = limit and row["reason"] != "benchmark_exact"
    return f"{value} ({COMPARED_WITH.get(row['reason'], 'limit')}: {limit})" if shown else value


def row_thumbnail(workdir: str, row: Mapping[str, Any]) -> str:
    """Data URI of a pair's picture; '' if it cannot be decoded, is too large or is quarantined. Raises UserError."""
    if row["listed"] is not None or not row["size"]:
        return ""
    return thumbnail(image_bytes(workdir, *(row[name] for name in ("path", "offset", "size", "image_id"))))


def _benchmarks(summary: Mapping[str, Any]) -> str:
    rows = [(row["value"], row["exact"], row["near"]) for row in summary["benchmarks"]]
    table = table_html(("benchmark", "exact copies", "resized copies"), rows)
    note = "<p>Removed in the last stage; pairs that an earlier one removed were not compared.</p>"
    return _section("Copies of benchmark pictures", [table, note]) if rows else ""


def _slices(summary: Mapping[str, Any]) -> str:
    tables = []
    for name, found in summary["slices"].items():
        rows = [(row["value"] or "unknown", row["pairs"], row["kept"], f"{row['dropped']:.0%}") for row in found]
        tables.append(f"<div>{table_html((name, 'pairs', 'kept', 'dropped'), rows)}</div>")
    return _section("Share dropped by slice", [f'<div class="side-by-side">{"".join(tables)}</div>'])
