"""The report of a run: a table for the terminal, and one self-contained HTML page with curves and pictures."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from florence_jax.data.sources import BadRecord, Source

DOTS = 20  # a curve of at most so many points shows them
THUMBNAIL = 96  # pixels of the longer side
TINY = 48  # pictures of fewer pixels are enlarged
SMALLEST = 5e-4  # with three decimals, what is nearer to 0 would read 0.000
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d6a9f", "#c77d0a", "#4a4a4a")
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; }
td, th { padding: 3px 14px 3px 0; border-bottom: 1px solid #e4e4e4; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { background: #fafafa; margin: 0 1em 1em 0; } svg text { font: 11px system-ui, sans-serif; fill: #444; }
.row { display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 8px; align-items: stretch; }
.cell { width: 128px; text-align: center; font-size: 12px; padding: 5px; border: 2px solid #ddd; border-radius: 5px;
  overflow-wrap: anywhere; display: flex; flex-direction: column; justify-content: center; align-items: center; }
.cell img { max-width: 96px; max-height: 96px; } .cell.query { background: #f2f2f2; }
.cell.right { border-color: #3a7d44; background: #eef7ef; } .cell.wrong { border-color: #d9b4ba; }
.warning { background: #fdf1dc; border-left: 4px solid #c77d0a; padding: 6px 12px; }
.confusion td { text-align: center; min-width: 26px; padding: 3px; border: 1px solid #e4e4e4; }
.confusion th { padding: 2px 8px; border: 0; white-space: nowrap; }
.turn { vertical-align: bottom; } .turn span { writing-mode: vertical-rl; transform: rotate(180deg); }
.arrow { align-self: center; color: #888; }
details { margin-top: 1em; } summary { cursor: pointer; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12px; }
"""


class Example(NamedTuple):
    """One cell of a grid: a text, a picture (data URI or None), and whether it is right."""

    text: str
    picture: str | None
    right: bool


def thumbnail(source: Source, index: int) -> str:
    """Data URI of a source's image, its longer side 48 to 96 pixels; '' for one that cannot be read."""
    try:
        data = source[index]["image"]
    except BadRecord:
        return ""
    try:
        image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else Image.fromarray(np.squeeze(data))
        if isinstance(data, bytes) and TINY <= max(image.size) <= THUMBNAIL and image.format in Image.MIME:
            return data_uri(data, Image.MIME[image.format])
        image = image.convert("RGB")
    except Exception:  # PIL's decoders raise a dozen unrelated types on corrupt data and for too many pixels
        return ""
    if (times := TINY // max(image.size)) > 1:
        image = image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return data_uri(file.getvalue(), "image/webp")


def data_uri(data: bytes, mime: str) -> str:
    """The bytes as a URI that a page can hold."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def matches_html(title: str, rows: Sequence[tuple[Example, Sequence[Example]]], judged: bool = True) -> str:
    """A grid: each query with its answers, best first; right answers have a green frame (where they are `judged`)."""
    lines = [f"<h2>{html.escape(title)}</h2>"]
    for query, answers in rows:
        cells = [_cell(query, "query"), '<div class="arrow">&rarr;</div>']
        cells += [_cell(answer, ("right" if answer.right else "wrong") if judged else "") for answer in answers]
        lines.append(f'<div class="row">{"".join(cells)}</div>')
    return "\n".join(lines)


def _cell(example: Example, kind: str) -> str:
    picture = f'<img src="{example.picture}" alt="">' if example.picture else ""
    text = f"<div>{html.escape(example.text)}</div>" if example.text else ""
    return f'<div class="cell {kind}">{picture}{text}</div>'


def results_table(results: Mapping[str, float], chance: Mapping[str, float]) -> str:
    """Fixed-width lines: metric, value, what guessing scores."""
    width = max(map(len, results), default=0)
    lines = [f"{'metric':<{width}}   value  chance"]
    for name, value in results.items():
        guess = f"{chance[name]:.3f}" if name in chance else ""
        lines.append(f"{name:<{width}}  {_number(value):>6}  {guess:>6}".rstrip())
    return "\n".join(lines)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(float(value))
    if 0 < abs(value) < SMALLEST:
        return f"{value:.0e}"
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) and abs(value) > 1 else f"{value:.3f}"


def curve(title: str, steps: Sequence[float], series: Mapping[str, Sequence[float]]) -> str:
    """An SVG line chart, 480 x 260 pixels; points that are not finite are left out, and series without a point."""
    points = {
        name: line
        for name, values in series.items()
        if (line := [(x, y) for x, y in zip(steps, values, strict=True) if y is not None and math.isfinite(y)])
    }
    ys = [y for line in points.values() for _, y in line]
    if not ys or len(steps) < 2:
        return ""
    left, right, top, bottom, width, height = 64, 22, 28, 30, 480, 260
    x0, x1, y0, y1 = min(steps), max(steps), min(ys), max(ys)
    if y0 == y1:  # a constant runs through the middle
        y0, y1 = y0 - 0.1 * (abs(y0) or 1), y1 + 0.1 * (abs(y1) or 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        return across, height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    parts = [f'<svg width="{width}" height="{height}" role="img"><text x="{left}" y="16">{html.escape(title)}</text>']
    for i, tick in enumerate(_ticks(y0, y1)):
        _, at = place(x0, y0 + (y1 - y0) * i / 4)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{tick}</text>')
    for x in (x0, (x0 + x1) / 2, x1):
        at, _ = place(x, y0)
        parts.append(f'<text x="{at:.1f}" y="{height - 10}" text-anchor="middle">{x:.0f}</text>')
    for i, line in enumerate(points.values()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(line) <= DOTS:
            parts += [
                '<circle cx="{:.1f}" cy="{:.1f}" r="2.5" fill="{}"/>'.format(*place(x, y), colour) for x, y in line
            ]
    if len(points) > 1:
        names = "".join(
            f'<tspan dx="12" style="fill:{COLOURS[i % len(COLOURS)]}">{html.escape(name)}</tspan>'
            for i, name in enumerate(points)
        )
        parts.append(f'<text x="{width - right}" y="16" text-anchor="end">{names}</text>')
    return "".join(parts) + "</svg>"


def _ticks(low: float, high: float) -> list[str]:
    """Five numbers from `low` to `high`, with as many digits, from three to six, as tell them apart."""
    for digits in range(3, 7):
        texts = [f"{low + (high - low) * i / 4:.{digits}g}" for i in range(5)]
        if len(set(texts)) == len(texts):
            break
    return texts


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


def page(title: str, body: str) -> str:
    """A self-contained HTML page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def write_page(path: Path, title: str, body: str) -> None:
    """Writes `page` to `path`; the file appears under its name only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page(title, body))
    partial.replace(path)


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
        f'<tr><td>{html.escape(name)}</td><td class="n">{_number(value)}</td>'
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
