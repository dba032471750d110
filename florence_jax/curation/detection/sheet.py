"""A page to look at: sampled records with their boxes drawn, and the counts of the build; one HTML file."""

import collections
import html
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from florence_jax.curation.detection.join import Merged
from florence_jax.curation.detection.write import read_picture, shard_digest
from florence_jax.data.ops.image import Decode
from florence_jax.data.records import BadRecord
from florence_jax.page import Html, figure_html, table_html, write_page
from florence_jax.pictures import draw_boxes, picture_uri

SAMPLES = 24
SHOWN_SIDE = 420  # pixels of the longer side, as a large figure shows it
SET_COLOURS = {
    "coco": "#e6194b",
    "lvis": "#0082c8",
    "objects365": "#2e9e3f",
    "openimages": "#f58231",
    "imagenet": "#911eb4",
}
LABEL_ROWS = 24  # names written into one picture
NAMED_LABELS = ("negative", "not_exhaustive", "positive")


def sample_records(merged: Merged, count: int = SAMPLES) -> list[int]:
    """Records to look at: in turn from each kind there is (each combination of sets, crowds, pseudo boxes, ...)."""
    boxes = merged.boxes
    kinds = collections.defaultdict(list)
    order = sorted(range(len(merged)), key=lambda record: shard_digest(merged.key(record)))
    special = np.zeros(len(merged), np.int8)
    np.bitwise_or.at(special, boxes.record, (boxes.crowd + 2 * boxes.group_of).astype(np.int8))
    for record in order:
        rows = boxes.table[merged.offsets[record] : merged.offsets[record + 1]]
        kinds[(*np.unique(rows).tolist(), "flags", int(special[record]))].append(record)
    turns = itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds, key=repr)))
    return list(itertools.islice((r for turn in turns for r in turn if r is not None), count))


def write_detection_sheet(merged: Merged, report: dict[str, Any], path: str, count: int = SAMPLES) -> None:
    """Writes the page, self-contained, with `count` sampled records."""
    figures = [_figure(merged, record) for record in sample_records(merged, count)]
    used = {table.spec.kind for table in merged.rows.tables}
    key = "".join(f'<span class="key" style="background:{c}">{k}</span>' for k, c in SET_COLOURS.items() if k in used)
    merges = collections.defaultdict(list)
    for row in merged.space.merge_table():
        merges[row["text"]].append(f"{row['source']}: {row['category']} ({row['how']})")
    joined = [[text, "; ".join(names)] for text, names in merges.items() if len(names) > 1]
    apart = [[a, b, why] for a, b, why in merged.space.kept_apart]
    split_rows = [[split, *totals.values()] for split, totals in report["totals"].items()]
    source_rows = [[s["source"], *(v for v in s.values() if isinstance(v, int))] for s in report["sources"]]
    source_head = ["", *(k for k, v in report["sources"][0].items() if isinstance(v, int))]
    title = f"Detection set: {len(merged)} images, {len(merged.boxes.record)} boxes, {len(merged.space)} classes"
    parts = [
        _table(["", *(name.replace("_", " ") for name in report["totals"]["train"])], split_rows),
        f"<h2>Sampled records</h2><p>{key} a pseudo box has its score</p><div class='tiles'>{''.join(figures)}</div>",
        "<h2>Sources</h2>",
        _turned_table(source_head, source_rows),
        f"<h2>Double boxes left out</h2>{_table(['kept + left out', 'boxes'], list(report['double_boxes'].items()))}",
        f"<h2>Merged classes ({len(joined)})</h2>{_table(['class', 'categories'], joined[:200])}",
        f"<h2>Kept apart ({len(apart)})</h2>{_table(['class', 'other class', 'why'], apart[:200])}",
    ]
    write_page(path, title, "\n".join(parts))


def _drawn(image: np.ndarray, record: dict[str, Any], side: int = SHOWN_SIDE) -> Image.Image:
    """The colour of a box is its set's; a pseudo box has its score; crowds and groups are drawn thin and marked."""
    marks = [
        " (crowd)" if crowd else " (group)" if group else ""
        for crowd, group in zip(record["iscrowd"], record["is_group_of"], strict=True)
    ]
    scores = ["" if score is None else f" {score:.2f}" for score in record["scores"]]
    texts = [name + mark + score for name, mark, score in zip(record["class_names"], marks, scores, strict=True)]
    colours = [SET_COLOURS[record["sources"][number]] for number in record["box_sources"]]
    return draw_boxes(image, record["boxes"], texts, colours, [bool(mark) for mark in marks], side, LABEL_ROWS)


def _figure(merged: Merged, number: int) -> str:
    record = merged.record(number)
    try:
        decoded = Decode()({"key": record["key"], "image": read_picture(merged, number)}, np.random.default_rng(0))
    except BadRecord as bad:
        return figure_html([""], str(bad), kind="large")
    split = "validation" if merged.validation[number] else "train"
    lines = [f"<b>{html.escape(record['key'])}</b> {split}, {record['width']} x {record['height']}"]
    lines[0] += f", {' + '.join(record['sources'])}, boxes: {len(record['boxes'])}"
    if len(record["image_ids"]) > 1:
        lines.append("same picture: " + html.escape(", ".join(record["image_ids"])))
    for name in NAMED_LABELS:
        texts = [merged.space.texts[c] for c in record[f"{name}_ids"]]
        if texts:
            more = f" and {len(texts) - 12} more" if len(texts) > 12 else ""
            lines.append(f"{name.replace('_', ' ')}: {html.escape(', '.join(texts[:12]))}{more}")
    if record["teacher"]:
        lines.append(f"teacher {html.escape(record['teacher'])}, score at least {record['threshold']}")
    return figure_html([picture_uri(_drawn(decoded["image"], record))], Html("<br>".join(lines)), kind="large")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return table_html(head, rows) or "<p>none</p>"


def _turned_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table with rows and columns exchanged, without lines of zeros."""
    columns = [list(line) for line in zip(head, *rows, strict=True)]
    return _table(
        [str(cell) for cell in columns[0]],
        [[line[0].replace("_", " "), *line[1:]] for line in columns[1:] if any(line[1:])],
    )
