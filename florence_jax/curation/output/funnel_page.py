"""The funnel report: one HTML file without links, with pictures of pairs that each reason removed."""

import base64
import html
import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from florence_jax.curation.filters.personal import redact
from florence_jax.curation.ingest.measure import image_bytes
from florence_jax.errors import UserError
from florence_jax.files import write_bytes

if TYPE_CHECKING:
    from florence_jax.curation.output.funnel import Funnel
THUMBNAIL = 96  # pixels
MAX_DECODED = 64_000_000  # pixels: what is larger is not opened for the report
CAPTION = 70  # characters shown
# What the second of two compared values is, where it is not a limit.
LIMITS = {
    "domain": "blocked",
    "licence": "allowed",
    "language": "allowed",
    "x_robots": "for agent",
    "robots_txt": "for agent",
    "tdmrep": "said by",
    "benchmark_near": "bits apart",
}
STYLE = """
:root { --ink:#1d2733; --soft:#5b6877; --line:#dde3ea; --bar:#2f6f9f; --lost:#e3a08a; --page:#ffffff; --tile:#f5f7f9; }
* { box-sizing:border-box } body { font:15px/1.5 system-ui,sans-serif; color:var(--ink); background:var(--page);
margin:0 auto; max-width:1080px; padding:32px 24px 64px }
h1 { font-size:26px; margin:0 0 4px } h2 { font-size:19px; margin:40px 0 12px } h3 { font-size:15px; margin:20px 0 8px }
h2::first-letter, h3::first-letter { text-transform:uppercase }
p { margin:4px 0; color:var(--soft) } code { font-size:13px; overflow-wrap:anywhere }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums }
th,td { text-align:left; padding:5px 10px 5px 0; border-bottom:1px solid var(--line); vertical-align:middle }
th { font-weight:600; color:var(--soft); font-size:13px } td.n,th.n { text-align:right }
.bar { display:flex; height:16px; background:var(--tile); min-width:260px }
.bar i { background:var(--bar) } .bar b { background:var(--lost) }
.tiles { display:flex; flex-wrap:wrap; gap:10px }
figure { margin:0; width:150px; background:var(--tile); border:1px solid var(--line); padding:8px; font-size:12px }
figure .picture { height:96px; display:flex; gap:6px; align-items:center; justify-content:center }
figure img { max-width:100%; max-height:96px; background:#fff }
figure .pair img { max-width:62px } figure .none { color:var(--soft) }
figcaption { margin-top:6px; overflow-wrap:anywhere } figcaption span { color:var(--soft); display:block }
.slices { display:grid; grid-template-columns:repeat(auto-fit,minmax(300px,1fr)); gap:24px 32px;
align-items:start }
"""


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
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>Curation funnel</title><style>{STYLE}</style><body>{"".join(body)}</body></html>
"""
    write_bytes(path, page.encode("utf-8", "replace"))


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, parts: Iterable[str]) -> str:
    return f"<h2>{_escape(title)}</h2>{''.join(parts)}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _head(summary: Mapping[str, Any]) -> str:
    share = summary["records"] / summary["rows"]
    notes = [
        f"{summary['records']:,} of {summary['rows']:,} raw pairs kept ({share:.1%}). "
        f"Captions that have a label, counted before the post-filter: {summary['labels']:,}.",
        f"Repeated keys: {summary['repeated_keys']:,}. Damaged input files: {len(summary['damaged_inputs']):,}. "
        f"Quarantined: {summary['quarantined']:,} (never shown).",
    ]
    notes += [f"Damaged: {damage}" for damage in summary["damaged_inputs"][:5]]
    shown = "".join(f"<p>{_escape(note)}</p>" for note in notes)
    shown += "<p>A pair leaves at the first stage that finds a reason; at most a few examples of each are drawn.</p>"
    content = f"<p>Content <code>{summary['root']}</code><br>Configuration <code>{summary['config']}</code></p>"
    return f"<h1>Curation funnel</h1>{shown}{content}"


def _funnel(summary: Mapping[str, Any]) -> str:
    rows = [f"<tr><td>raw pairs</td><td class=n></td><td class=n>{summary['rows']:,}</td><td>{_bar(1, 0)}</td></tr>"]
    for stage in summary["stages"]:
        lost = stage["came"] - stage["kept"]
        rows.append(
            f"<tr><td>{_words(stage['stage'])}</td><td class=n>{-lost if lost else 0:,}</td>"
            f"<td class=n>{stage['kept']:,}</td>"
            f"<td>{_bar(stage['kept'] / summary['rows'], lost / summary['rows'])}</td></tr>"
        )
    head = "<tr><th>stage</th><th class=n>removed</th><th class=n>left</th><th>left and removed</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _bar(left: float, lost: float) -> str:
    return f'<div class=bar><i style="width:{left:.2%}"></i><b style="width:{lost:.2%}"></b></div>'


def _stage(stage: Mapping[str, Any], workdir: str, funnel: "Funnel") -> str:
    parts = []
    for reason, count in sorted(stage["reasons"].items(), key=lambda item: (-item[1], item[0])):
        examples = funnel.examples(stage["stage"], reason)
        parts.append(f"<h3>{_escape(_words(reason))}: {count:,}</h3>{_tiles(examples, workdir, funnel.partners)}")
    return _section(_words(stage["stage"]), parts)


def _tiles(rows: Iterable[Mapping[str, Any]], workdir: str, partners: Mapping[str, Mapping[str, Any]]) -> str:
    figures = []
    for row in rows:
        pictures = [thumbnail(workdir, row)]
        if (partner := partners.get(row["value"])) is not None:
            pictures.append(thumbnail(workdir, partner))
        shown = "".join(
            f'<img alt="" src="{picture}">' if picture else "<span class=none>no picture</span>" for picture in pictures
        )
        caption = redact(row["caption"])
        caption = caption if len(caption) <= CAPTION else caption[:CAPTION] + "…"
        value = "copy of the picture at right" if len(pictures) > 1 else _compared(row)
        figures.append(
            f'<figure><div class="picture{" pair" if len(pictures) > 1 else ""}">{shown}</div>'
            f"<figcaption>{_escape(caption)}<span>{_escape(value)}</span></figcaption></figure>"
        )
    return f"<div class=tiles>{''.join(figures)}</div>" if figures else "<p>Examples are never shown.</p>"


def _compared(row: Mapping[str, Any]) -> str:
    """The value that the decision was made by, and what it was compared with."""
    if row["reason"] == "kept" or row["value"] == "":
        return ""
    value, limit = (f"{int(text):,}" if text.isdecimal() else text for text in (row["value"], row["threshold"]))
    shown = limit and row["reason"] != "benchmark_exact"
    return f"{value} ({LIMITS.get(row['reason'], 'limit')}: {limit})" if shown else value


def thumbnail(workdir: str, row: Mapping[str, Any]) -> str:
    """A picture of at most 96 pixels as a data URL; '' if it cannot be decoded, is too large or is quarantined."""
    if row["listed"] is not None or not row["size"]:
        return ""
    try:
        data = image_bytes(workdir, *(row[name] for name in ("path", "offset", "size", "image_id")))
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_DECODED:
                return ""
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except UserError:
        raise
    except Exception:  # these are the broken files: Pillow raises a dozen unrelated types
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=image.getchannel("A"))
    file = io.BytesIO()
    canvas.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _benchmarks(summary: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_escape(row['value'])}</td><td class=n>{row['exact']:,}</td><td class=n>{row['near']:,}</td></tr>"
        for row in summary["benchmarks"]
    )
    head = "<tr><th>benchmark</th><th class=n>exact copies</th><th class=n>resized copies</th></tr>"
    note = "<p>Removed in the last stage; pairs that an earlier one removed were not compared.</p>"
    return _section("Copies of benchmark pictures", [f"<table>{head}{rows}</table>{note}"]) if rows else ""


def _slices(summary: Mapping[str, Any]) -> str:
    tables = []
    for name, rows in summary["slices"].items():
        shown = "".join(
            f"<tr><td>{_escape(row['value'] or 'unknown')}</td><td class=n>{row['pairs']:,}</td>"
            f"<td class=n>{row['kept']:,}</td><td class=n>{row['dropped']:.0%}</td></tr>"
            for row in rows
        )
        head = f"<tr><th>{_escape(name)}</th><th class=n>pairs</th><th class=n>kept</th><th class=n>dropped</th></tr>"
        tables.append(f"<table>{head}{shown}</table>")
    return _section("Share dropped by slice", [f"<div class=slices>{''.join(tables)}</div>"])
