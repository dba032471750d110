"""The report of a run: a table for the terminal, and one self-contained HTML page with curves and pictures."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from florence_jax.evaluators.base import Chart
from florence_jax.page import curve, show_number, table_html, write_page


def results_table(results: Mapping[str, float], chance: Mapping[str, float]) -> str:
    """Fixed-width lines: metric, value, what guessing scores."""
    width = max(map(len, results), default=0)
    lines = [f"{'metric':<{width}}   value  chance"]
    for name, value in results.items():
        guess = f"{chance[name]:.3f}" if name in chance else ""
        lines.append(f"{name:<{width}}  {show_number(value):>6}  {guess:>6}".rstrip())
    return "\n".join(lines)


def history_curves(history: Sequence[Mapping[str, Any]], charts: Sequence[Chart]) -> str:
    """Charts of what a metrics.jsonl holds: loss, learning rate and speed of every run, and `charts`."""
    parts = []
    for title, series in (
        Chart("training loss", {"loss": "train/loss", "lowest possible": "train/floor"}),
        *charts,
        Chart("learning rate", {"": "train/learning_rate"}),
        Chart("images per second", {"": "perf/images_per_second"}),
    ):
        lines = [row for row in history if any(key in row for key in series.values())]
        values = {name: [row.get(key) for row in lines] for name, key in series.items()}
        parts.append(curve(title, [row["step"] for row in lines], values))
    return "".join(parts)


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    charts: Sequence[Chart],
    results: Mapping[str, float],
    chance: Mapping[str, float],
    fragments: Sequence[str],
) -> None:
    """Writes the page of a run: results with chance levels, curves, the evaluators' pictures, the configuration.

    `facts` say which weights met which data, for somebody who sees only the page; empty ones are left out.
    """
    provenance = "; ".join(f"{name}: {value}" for name, value in facts.items() if value)
    rows = [(name, float(value), float(chance[name]) if name in chance else "") for name, value in results.items()]
    table = table_html(("metric", "value", "chance"), rows) or "<p>No evaluation set for this data.</p>"
    dump = html.escape(json.dumps(config, indent=1, default=str))
    body = [
        f"<p>{html.escape(provenance)}</p>",
        f"<h2>Results</h2>{table}",
        f"<h2>Training</h2>{curves}" if (curves := history_curves(history, charts)) else "",
        *fragments,
        f"<details><summary>Configuration</summary><pre>{dump}</pre></details>",
    ]
    write_page(path, title, "\n".join(body))
