"""What the page of a check shows of a set of boxes: mistakes, classes, sizes, pictures."""

import dataclasses
import html
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from florence_jax.data.box_problems import MISTAKES, Problems
from florence_jax.data.ops.image import Decode
from florence_jax.data.records import BadRecord, evenly
from florence_jax.data.sources.boxes import BoxColumns, BoxSource
from florence_jax.page import CHART_COLOURS, figure_html, share_bar, table_html
from florence_jax.pictures import draw_boxes, picture_uri

SIDE_EDGES = (0, 4, 8, 16, 32, 64, 96, 128, 256, 512, 1024, np.inf)  # of the square root of a box's area, pixels
SHARE_EDGES = (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.01)  # of it over that of its picture's
ASPECT_EDGES = (0, 1 / 8, 1 / 4, 1 / 2, 2 / 3, 1, 1.5, 2, 4, 8, np.inf)  # width over height
COUNT_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 100, 200, 1000, np.inf)  # boxes of a picture
SHEET = 24  # pictures
SHEET_SIDE = 420
PLACES = 3  # of each kind of mistake on the page
CLASS_ROWS = 200
SIZE_ROWS = 8
# Mistakes whose pictures are looked at first.
FIRST_SHOWN = ("turned", "rescaled", "clipped", "thin", "same_box", "crowded", "not_rgb", "same_picture", "no_size")


@dataclasses.dataclass(frozen=True, eq=False)
class BoxStatistics:
    """Numbers of N pictures with M boxes.

    Attributes:
      keys: N. sizes: int32 (N, 2), width and height. columns: the boxes; groups are crowds.
      class_names, category_ids: K.
      decoded: pictures that were read whole.
    """

    keys: Sequence[str]
    sizes: np.ndarray
    columns: BoxColumns
    class_names: tuple[str, ...]
    category_ids: tuple[Any, ...]
    decoded: int

    @property
    def each(self) -> np.ndarray:
        """int64 (N,): boxes of each picture."""
        return np.diff(self.columns.offsets)

    def totals(self) -> dict[str, float]:
        """The counts, by name."""
        return {
            "images": float(len(self.keys)),
            "boxes": float(len(self.columns.boxes)),
            "classes": float(len(self.class_names)),
            "crowds": float(self.columns.crowd.sum()),
            "images_without_boxes": float((self.each == 0).sum()),
            "boxes_an_image": len(self.columns.boxes) / max(len(self.keys), 1),
            "most_boxes": float(self.each.max(initial=0)),
            "decoded": float(self.decoded),
        }

    def classes(self) -> list[dict[str, Any]]:
        """Of each class: name, id, boxes, images, crowds, and the median side of its boxes, pixels."""
        columns, names = self.columns, self.class_names
        count = np.bincount(columns.class_ids, minlength=len(names))
        crowds = np.bincount(columns.class_ids[columns.crowd], minlength=len(names))
        image = np.repeat(np.arange(len(self.keys)), self.each)
        pairs = np.unique(np.stack([columns.class_ids, image], 1), axis=0)[:, 0]
        images = np.bincount(pairs, minlength=len(names))
        sides = self.sides()
        order = np.argsort(columns.class_ids, kind="stable")
        parts = np.split(sides[order], np.cumsum(count)[:-1]) if len(names) else []
        return [
            {
                "name": name,
                "id": self.category_ids[k],
                "boxes": int(count[k]),
                "images": int(images[k]),
                "crowds": int(crowds[k]),
                "median_side": round(float(np.median(parts[k]))) if count[k] else 0,
            }
            for k, name in enumerate(names)
        ]

    def sides(self) -> np.ndarray:
        """float (M,): the side of the square of the same area as each box, pixels."""
        return np.sqrt((self.columns.boxes[:, 2:] - self.columns.boxes[:, :2]).prod(1))


def box_report(name: str, said: str, statistics: BoxStatistics, problems: Problems, source: BoxSource) -> list[str]:
    """HTML fragments about one set.

    Args:
      name: of the evaluator.
      said: what was found, a sentence.
      statistics, problems: of the set.
      source: of the pictures.
    """
    title = html.escape(name)
    read = f"{statistics.decoded:,} of {len(statistics.keys):,} pictures, evenly spread, were decoded."
    return [
        f"<h2>{title}: boxes</h2><p>{html.escape(said)}</p>",
        f"<h2>{title}: mistakes</h2>{_mistakes(problems)}<p>{read}</p>",
        f"<h2>{title}: classes</h2>{_classes(statistics)}",
        f"<h2>{title}: sizes</h2>{_sizes(statistics)}",
        f"<h2>{title}: pictures</h2>{_sheet(statistics, problems, source)}",
    ]


def _mistakes(problems: Problems) -> str:
    places: dict[str, list[str]] = defaultdict(list)
    for flaw in problems:
        if len(places[flaw.kind]) < PLACES:
            places[flaw.kind].append(" ".join(filter(None, (flaw.where, f"({flaw.detail})" if flaw.detail else ""))))
    rows = [
        (problems.counts[kind], mistake.what, mistake.done, "; ".join(places[kind]))
        for kind, mistake in MISTAKES.items()
        if problems.counts[kind]
    ]
    return table_html(("count", "what", "what becomes of it", "such as"), rows) or "<p>None was found.</p>"


def _classes(statistics: BoxStatistics) -> str:
    classes = sorted(statistics.classes(), key=lambda row: -row["boxes"])
    most = max((row["boxes"] for row in classes), default=0)
    rows = [(*row.values(), share_bar(row["boxes"] / max(most, 1))) for row in classes[:CLASS_ROWS]]
    left = len(classes) - CLASS_ROWS
    more = f"<p>{left:,} classes with fewer boxes are not shown.</p>" if left > 0 else ""
    return table_html(("class", "id", "boxes", "pictures", "crowds", "median side (px)", ""), rows) + more


def _sizes(statistics: BoxStatistics) -> str:
    boxes, columns = statistics.columns.boxes, statistics.columns
    sides = statistics.sides()
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    whole = np.sqrt(statistics.sizes.astype(np.float64).prod(1))
    shares = sides / np.maximum(np.repeat(whole, np.diff(columns.offsets)), 1)
    parts = [
        _histogram("side of a box (root of its area, px)", sides, SIDE_EDGES),
        _histogram("side of a box as a share of its picture's", shares, SHARE_EDGES),
        _histogram("width over height", width / np.maximum(height, 1e-6), ASPECT_EDGES),
        _histogram("boxes of a picture", statistics.each, COUNT_EDGES),
    ]
    common = Counter(map(tuple, statistics.sizes.tolist())).most_common(SIZE_ROWS)
    total = max(len(statistics.keys), 1)
    rows = [(f"{w} x {h}", count, share_bar(count / total)) for (w, h), count in common]
    parts.append(table_html(("width x height of a picture", "pictures", ""), rows))
    return f'<div class="tiles">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def _histogram(what: str, values: np.ndarray, edges: Sequence[float]) -> str:
    counts, _ = np.histogram(values, edges)
    ranges = [f"{low:.3g} to {high:.3g}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    ranges[-1] = ranges[-1] if np.isfinite(edges[-1]) else f"from {edges[-2]:.3g}"
    shown = [(text, int(count)) for text, count in zip(ranges, counts, strict=True) if count]
    rows = [(text, count, share_bar(count / counts.max())) for text, count in shown]
    return table_html((what, "count", ""), rows)


def _sheet(statistics: BoxStatistics, problems: Problems, source: BoxSource) -> str:
    """Pictures with mistakes in them first, then others, evenly spread."""
    rows = {key: row for row, key in enumerate(statistics.keys)}
    notes: dict[int, list[str]] = defaultdict(list)
    for kind in FIRST_SHOWN:
        found = [rows[flaw.where] for flaw in problems if flaw.kind == kind and flaw.where in rows]
        for row in list(dict.fromkeys(found))[:PLACES]:
            notes[row].append(kind.replace("_", " "))
    chosen = list(dict.fromkeys([*list(notes)[: SHEET // 2], *evenly(len(rows), SHEET).tolist()]))[:SHEET]
    figures = "".join(_figure(statistics, source, row, ", ".join(notes[row])) for row in chosen)
    return f'<div class="tiles">{figures}</div>'


def _figure(statistics: BoxStatistics, source: BoxSource, row: int, note: str) -> str:
    try:
        record = source[row]
        image = Decode()(record, np.random.default_rng(0))["image"]
    except BadRecord as bad:
        return figure_html([""], bad.key, bad.reason, kind="large")
    crowd = [bool(a or b) for a, b in zip(record["iscrowd"], record["is_group_of"], strict=True)]
    names = [statistics.class_names[k] for k in np.asarray(record["class_ids"]).tolist()]
    colours = [CHART_COLOURS[k % len(CHART_COLOURS)] for k in np.asarray(record["class_ids"]).tolist()]
    texts = [name + " (crowd)" if apart else name for name, apart in zip(names, crowd, strict=True)]
    drawn = draw_boxes(image, np.asarray(record["boxes"]).tolist(), texts, colours, crowd, side=SHEET_SIDE)
    said = f"{record['width']} x {record['height']}, boxes: {len(names)}" + (f"; {note}" if note else "")
    return figure_html([picture_uri(drawn)], record["key"], said, kind="large")
