"""HTML pages that need no other file: style, curves, grids of pictures, contact sheets."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SHEET_STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:2em;background:#fff;color:#222}
section{border-top:1px solid #ccc;padding:.6em 0}h2{font-size:1em;margin:.2em 0 .6em}
div{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:160px;font-size:11px;overflow-wrap:anywhere}
img{max-width:160px;max-height:160px;display:block;background:#eee}
figcaption{margin-top:6px}.first img{outline:3px solid #2a7}"""


def contact_sheet(title: str, note: str, groups: Iterable[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """The page.

    Args:
      title, note: plain text. groups: (heading, [(thumbnail URL or '', caption), ...]); the first picture is marked.
    """
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{SHEET_STYLE}</style>"]
    parts.append(f"<h1>{html.escape(title)}</h1><p>{html.escape(note)}</p>")
    for heading, pictures in groups:
        parts.append(f"<section><h2>{html.escape(heading)}</h2><div>")
        for i, (url, caption) in enumerate(pictures):
            image = f'<img src="{url}" alt="">' if url else ""
            mark = " class=first" if not i else ""
            parts.append(f"<figure{mark}>{image}<figcaption>{html.escape(caption)}</figcaption></figure>")
        parts.append("</div></section>")
    return "\n".join(parts) + "\n"


DOTS = 20  # a curve of at most so many points shows them
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


def show_number(value: float) -> str:
    """A metric as people read it: three decimals, or fewer for large numbers."""
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
