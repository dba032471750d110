"""HTML pages that need no other file: one style, tables, curves, grids of pictures, contact sheets."""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from florence_jax.files import write_text

DOTS = 20  # a curve of at most so many points shows them
SMALLEST = 5e-4  # with three decimals, what is nearer to 0 would read 0.000
LONG_TEXT = 80  # characters: more may be cut off in a cell, and is shown under the mouse
FIGURE_SIDE = 160  # pixels, of a figure's longer side
CHART_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d6a9f", "#c77d0a", "#4a4a4a")
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.15em; margin-top: 2em; } h3 { font-size: 1em; margin: 1.3em 0 .5em; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; }
td, th { padding: 3px 14px 3px 0; border-bottom: 1px solid #e4e4e4; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: 13px; overflow-wrap: anywhere; } .soft { color: #667; }
svg { background: #fafafa; margin: 0 1em 1em 0; } svg text { font: 11px system-ui, sans-serif; fill: #444; }
.row { display: flex; gap: 8px; margin-bottom: 8px; padding-bottom: 4px; align-items: stretch; overflow-x: auto; }
.cell { flex: none; width: 128px; text-align: center; font-size: 12px; padding: 5px; border: 2px solid #ddd;
  border-radius: 5px; overflow-wrap: anywhere; display: flex; flex-direction: column; justify-content: center;
  align-items: center; }
.cell img { max-width: 96px; max-height: 96px; }
.cell.wide { width: 372px; } .cell.wide img { max-width: 360px; }
.cell.query { background: #f2f2f2; position: sticky; left: 0; }
.cell div { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 6; overflow: hidden;
  white-space: pre-line; }
.cell.right { border-color: #3a7d44; background: #eef7ef; } .cell.wrong { border-color: #d9b4ba; }
.tiles { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
figure { margin: 0; width: 160px; font-size: 12px; } figure.large { width: 420px; }
figure.pair { width: 518px; }
figcaption { margin-top: 5px; overflow-wrap: anywhere; } figcaption span { color: #667; display: block; }
.pictures { display: flex; gap: 6px; align-items: center; justify-content: center; min-height: 96px; color: #667;
  background: #f2f2f2; }
.pictures img { max-width: 100%; max-height: 160px; } .pictures img:not(:only-child) { max-width: 77px; }
.large .pictures img, .pair .pictures img { max-height: none; } .first img { outline: 3px solid #3a7d44; }
.side-by-side { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 24px 32px;
  align-items: start; }
.bar { display: flex; height: 16px; background: #f2f2f2; width: 360px; }
.bar i { background: #1b6ca8; } .bar b { background: #e3a08a; }
figure .bar { height: 10px; width: 200px; } .cell .bar { display: flex; height: 6px; width: 100%; }
.key { display: inline-block; padding: 0 8px; margin-right: 8px; color: #fff; border-radius: 3px; }
.warning { background: #fdf1dc; border-left: 4px solid #c77d0a; padding: 6px 12px; }
.confusion td { text-align: center; min-width: 26px; padding: 3px; border: 1px solid #e4e4e4; }
.confusion th { padding: 2px 8px; border: 0; white-space: nowrap; }
.turn { vertical-align: bottom; } .turn span { writing-mode: vertical-rl; transform: rotate(180deg); }
.arrow { align-self: center; color: #888; }
details { margin-top: 1em; } summary { cursor: pointer; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12px; }
"""
_NUMBER = re.compile(r"-?[\d.,]+(?:e-?\d+)?%?|nan|-?inf")


class Html(str):
    """Text that is HTML already: it goes into a page as it is, any other text is escaped."""


def markup(text: Any) -> str:
    """What stands for a text, a whole number or a metric in a page."""
    if isinstance(text, Html):
        return text
    if isinstance(text, int):
        text = f"{text:,}"
    return html.escape(show_number(text) if isinstance(text, float) else str(text))


def table_html(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers, and the heads of columns that have some, are at the right. '' for one without rows."""
    cells = [[markup(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    right = [any(map(_NUMBER.fullmatch, column)) for column in zip(*cells, strict=True)]

    def line(tag: str, shown: Sequence[str], numbers: Sequence[bool]) -> str:
        return "".join(
            f'<{tag} class="n">{cell}</{tag}>' if number else f"<{tag}>{cell}</{tag}>"
            for cell, number in zip(shown, numbers, strict=True)
        )

    body = "".join(f"<tr>{line('td', row, [bool(_NUMBER.fullmatch(c)) for c in row])}</tr>" for row in cells)
    return f"<table><tr>{line('th', list(map(markup, head)), right)}</tr>{body}</table>"


def share_bar(share: float) -> Html:
    """A bar of which that share is filled, for a cell of a table."""
    return Html(f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>')


def figure_html(pictures: Sequence[str], caption: Any, note: Any = "", kind: str = "") -> str:
    """Pictures with a text below; put figures into a `<div class="tiles">`.

    Args:
      pictures: data URIs; '' for one that cannot be shown.
      caption, note: texts, or `Html`.
      kind: class: 'large', 'pair' for two pictures drawn side by side, or 'first' for a frame.
    """
    shown = "".join(f'<img src="{picture}" alt="">' if picture else "<span>no picture</span>" for picture in pictures)
    below = f"{markup(caption)}<span>{markup(note)}</span>" if note else markup(caption)
    style = f' class="{kind}"' if kind else ""
    return f'<figure{style}><div class="pictures">{shown}</div><figcaption>{below}</figcaption></figure>'


Group = tuple[str, Sequence[tuple[str, str, str]]]  # heading, [(data URI or '', caption, note), ...]


def contact_sheet(title: str, note: str, sections: Iterable[tuple[str, Sequence[Group]]]) -> str:
    """A page of groups of pictures.

    Args:
      title, note: plain text. sections: (heading, groups), left out where there are none; the first picture of a group
        with a heading is marked.
    """
    parts = [f"<p>{markup(note)}</p>"]
    for heading, groups in sections:
        shown = []
        for name, pictures in groups:
            figures = [
                figure_html([url], caption, text, kind="first" if name and not i else "")
                for i, (url, caption, text) in enumerate(pictures)
            ]
            above = f"<h3>{markup(name)}</h3>" if name else ""
            shown.append(f'<section>{above}<div class="tiles">{"".join(figures)}</div></section>' if figures else "")
        if any(shown):
            parts += [f"<h2>{markup(heading)}</h2>", *shown]
    return page(title, "\n".join(parts))


class GridCell(NamedTuple):
    """One cell of a grid.

    Attributes:
      text: what it says.
      picture: data URI, or None.
      right: whether it is right.
      note: said below the text, less loudly.
      link: where a click on the picture leads; '' for nowhere.
      share: of a bar that is filled; None for no bar.
      wide: the picture is several in a row.
    """

    text: str
    picture: str | None
    right: bool
    note: str = ""
    link: str = ""
    share: float | None = None
    wide: bool = False


def matches_html(title: str, rows: Sequence[tuple[GridCell, Sequence[GridCell]]], judged: bool = True) -> str:
    """A grid: each query with its answers, best first; right answers have a green frame (where they are `judged`).

    A line that is wider than the page is scrolled; its query stays.
    """
    lines = [f"<h2>{html.escape(title)}</h2>"]
    for query, answers in rows:
        cells = [_cell(query, "query"), '<div class="arrow">&rarr;</div>']
        cells += [_cell(answer, ("right" if answer.right else "wrong") if judged else "") for answer in answers]
        lines.append(f'<div class="row">{"".join(cells)}</div>')
    return "\n".join(lines)


def _cell(example: GridCell, kind: str) -> str:
    picture = f'<img src="{example.picture}" alt="">' if example.picture else ""
    if picture and example.link:
        picture = f'<a href="{html.escape(example.link)}">{picture}</a>'
    text, note = html.escape(example.text), html.escape(example.note)
    said = f'<div title="{text}">{text}</div>' if len(text) > LONG_TEXT else f"<div>{text}</div>" if text else ""
    below = f'<div class="soft">{note}</div>' if note else ""
    bar = "" if example.share is None else share_bar(example.share)
    return f'<div class="cell {kind}{" wide" if example.wide else ""}">{picture}{said}{below}{bar}</div>'


def show_number(value: float) -> str:
    """A metric as people read it: three decimals, or fewer for large numbers."""
    if not math.isfinite(value):
        return str(float(value))
    if 0 < abs(value) < SMALLEST:
        return f"{value:.0e}"
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) and abs(value) > 1 else f"{value:.3f}"


def curve(title: str, steps: Sequence[float], series: Mapping[str, Sequence[float | None]]) -> str:
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
        colour = CHART_COLOURS[i % len(CHART_COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(line) <= DOTS:
            parts += [
                '<circle cx="{:.1f}" cy="{:.1f}" r="2.5" fill="{}"/>'.format(*place(x, y), colour) for x, y in line
            ]
    if len(points) > 1:
        names = "".join(
            f'<tspan dx="12" style="fill:{CHART_COLOURS[i % len(CHART_COLOURS)]}">{html.escape(name)}</tspan>'
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
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def write_page(path: str | Path, title: str, body: str) -> None:
    """Writes `page` to `path`; the file appears under its name only when it is complete."""
    write_text(path, page(title, body))
