"""The report of a run: a table for the terminal, and one self-contained HTML page with curves and pictures."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from florence_jax.page import curve, show_number, write_page


def results_table(results: Mapping[str, float], chance: Mapping[str, float]) -> str:
    """Fixed-width lines: metric, value, what guessing scores."""
    width = max(map(len, results), default=0)
    lines = [f"{'metric':<{width}}   value  chance"]
    for name, value in results.items():
        guess = f"{chance[name]:.3f}" if name in chance else ""
        lines.append(f"{name:<{width}}  {show_number(value):>6}  {guess:>6}".rstrip())
    return "\n".join(lines)


def history_curves(history: Sequence[Mapping[str, Any]]) -> str:
    """Charts of what a metrics.jsonl holds: loss, accuracy, logit scale, learning rate, speed."""
    charts = (
        ("training loss", {"loss": "train/loss", "lowest possible": "train/floor"}),
        ("accuracy within the batch", {"image to text": "train/i2t_accuracy", "text to image": "train/t2i_accuracy"}),
        ("accuracy of the head on the batch", {"": "train/accuracy"}),
        ("held-out top-1", {"": "eval/test/top1"}),
        ("held-out recall@1", {"image to text": "eval/held_out/i2t_r@1", "text to image": "eval/held_out/t2i_r@1"}),
        ("zero-shot accuracy on the watched set", {"before": "eval/forgetting/before", "now": "eval/forgetting/now"}),
        ("logit scale", {"": "train/logit_scale"}),
        ("learning rate", {"": "train/learning_rate"}),
        ("images per second", {"": "perf/images_per_second"}),
    )
    parts = []
    for title, series in charts:
        lines = [row for row in history if any(key in row for key in series.values())]
        values = {name: [row.get(key) for row in lines] for name, key in series.items()}
        parts.append(curve(title, [row["step"] for row in lines], values))
    return "".join(parts)


def _provenance(config: Mapping[str, Any]) -> str:
    """A line that says which weights met which data, for somebody who sees only the page."""
    data, evaluation = config.get("data", ""), config.get("eval", {})
    facts = {
        "weights": config.get("init"),
        "model": config.get("model", {}).get("variant"),
        "data": data if isinstance(data, str) else data.get("train"),
        "tested on": config.get("test") or evaluation.get("source"),
        "class names": config.get("classes"),
    }
    text = "; ".join(f"{name}: {value}" for name, value in facts.items() if value)
    return f"<p>{html.escape(text)}</p>" if text else ""


def write_report(
    path: Path,
    *,
    title: str,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    results: Mapping[str, float],
    chance: Mapping[str, float],
    fragments: Sequence[str],
) -> None:
    """Writes the page of a run: results with chance levels, curves, the evaluators' pictures, the configuration."""
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{show_number(value)}</td>'
        f'<td class="n">{f"{chance[name]:.3f}" if name in chance else ""}</td></tr>'
        for name, value in results.items()
    )
    table = f"<table><tr><th>metric</th><th>value</th><th>chance</th></tr>{rows}</table>"
    dump = html.escape(json.dumps(config, indent=1, default=str))
    body = [
        _provenance(config),
        "<h2>Results</h2>" + (table if results else "<p>No evaluation set for this data.</p>"),
        f"<h2>Training</h2>{curves}" if (curves := history_curves(history)) else "",
        *fragments,
        f"<details><summary>Configuration</summary><pre>{dump}</pre></details>",
    ]
    write_page(path, title, "\n".join(body))
