"""People's own boxes in Pascal VOC XML, and in tables with a row a box: mistakes are counted, the rest is used."""

import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from florence_jax.data.box_problems import Problems
from florence_jax.data.box_table import BoxTable, TableBuilder, stated_size
from florence_jax.data.records import BadRecord, picture_bytes
from florence_jax.data.sources.fields import FILE_FIELDS, known_field
from florence_jax.errors import UserError
from florence_jax.files import csv_cells, delimiter_of, table_rows

# Headings of tables of boxes, in lower case; the first that a table has counts.
PICTURE_COLUMNS = (*FILE_FIELDS, "image", "img", "picture", "imageid", "image_id")
NAME_COLUMNS = tuple("name label class class_name classname category category_name label_name labelname".split())
CORNER_COLUMNS = (
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
    ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"),
)
SIDE_COLUMNS = (
    ("bbox_x", "bbox_y", "bbox_width", "bbox_height"),
    ("x", "y", "w", "h"),
    ("left", "top", "box_width", "box_height"),
)
LIST_COLUMNS = ("bbox", "box")  # of all four sides, as '[x, y, width, height]'
WIDTH_COLUMNS, HEIGHT_COLUMNS = ("width", "image_width", "img_width"), ("height", "image_height", "img_height")
TABLE_HEADING = "image,x1,y1,x2,y2,name"


def read_voc(folder: str, files: Mapping[str, str], problems: Problems) -> BoxTable:
    """Reads Pascal VOC XML.

    Files of the VOC challenges themselves (their <database> says so) count pixels from 1; all others are taken as they
    are, from 0. What is <difficult> is a crowd: neither an object nor background.

    Args:
      folder: of the XML files, for messages and their paths.
      files: name of each XML file, below `folder` -> that of the picture beside it, '' where there is none.
      problems: those met.
    """
    builder = TableBuilder(folder, "object {}", problems)
    for name, picture in files.items():
        try:
            root = ElementTree.fromstring(picture_bytes(os.path.join(folder, name), name))
            if root.tag != "annotation":
                raise ValueError(f"its root is <{root.tag}>, not <annotation>")
        except (BadRecord, ElementTree.ParseError, ValueError) as error:
            problems.add("bad_annotation", name, getattr(error, "reason", str(error)))
            continue
        _add_voc(builder, root, name, picture)
    return builder.table()


def _add_voc(builder: TableBuilder, root: ElementTree.Element, name: str, picture: str) -> None:
    stem = os.path.splitext(name.rpartition("/")[2])[0]
    stated = (root.findtext("filename") or "").strip()
    size = stated_size(root.findtext("size/width"), root.findtext("size/height"))
    row = builder.add_picture(picture or stated or stem, stem, size)
    from_one = "VOC" in (root.findtext("source/database") or "")
    for number, item in enumerate(root.iter("object")):
        place = f"{name}: object {number}"
        label = (item.findtext("name") or "").strip()
        try:
            box = [float(item.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError:
            builder.problems.add("bad_box", builder.files[row], place)
            continue
        if not label:
            builder.problems.add("unknown_category", builder.files[row], f"{place} has no name")
            continue
        if from_one:
            box[0], box[1] = box[0] - 1, box[1] - 1
        builder.add_box(row, label, box, (item.findtext("difficult") or "0").strip() == "1", number)


def read_box_table(path: str, problems: Problems) -> BoxTable:
    """Reads a table with a row for each box; a row without numbers is a picture without boxes.

    The columns are found by the usual names (`PICTURE_COLUMNS`, `NAME_COLUMNS`, ...); a table without heading has
    image, x1, y1, x2, y2, name, as keras-retinanet's. Without a column for the class there is one class, 'object'.

    Raises:
      UserError: for a file that cannot be read, or lacks columns.
    """
    builder = TableBuilder(path, "line {}", problems)
    heading, rows = _table(path)
    picture, name = known_field(heading, PICTURE_COLUMNS), known_field(heading, NAME_COLUMNS)
    width, height = known_field(heading, WIDTH_COLUMNS), known_field(heading, HEIGHT_COLUMNS)
    corners = _four(heading, CORNER_COLUMNS)
    sides = None if corners else _four(heading, SIDE_COLUMNS)
    whole = known_field(heading, LIST_COLUMNS) if corners is None and sides is None else None
    columns = corners or sides or ([whole] if whole else None)
    if picture is None or columns is None:
        raise UserError(
            f"{path} has no columns {TABLE_HEADING} (or xmin, ymin, xmax, ymax, label, image_path, ...), only: "
            f"{', '.join(heading)[:300]}; rename them"
        )
    known: dict[str, int] = {}
    for line, fields in rows:
        file = (fields.get(picture) or "").strip()
        if not file:
            problems.add("bad_image", path, f"line {line} names no picture")
            continue
        if file not in known:
            size = stated_size(fields.get(width), fields.get(height)) if width and height else (0, 0)
            known[file] = builder.add_picture(file, file, size)
        values = [(fields.get(column) or "").strip() for column in columns]
        if whole:
            values = values[0].strip("[](){} ").replace(",", " ").split()
        if not any(values):
            continue
        label = (fields.get(name) or "").strip() if name else "object"
        try:
            x1, y1, x2, y2 = map(float, values)
        except ValueError:
            problems.add("bad_box", file, f"line {line}: {' '.join(values)}"[:200])
            continue
        if not label:
            problems.add("unknown_category", file, f"line {line} names no class")
            continue
        box = (x1, y1, x2, y2) if corners else (x1, y1, x1 + x2, y1 + y2)
        builder.add_box(known[file], label, box, False, line)
    return builder.table(corners is None)


def is_box_table(path: str) -> bool:
    """Whether a table has the columns of pictures and boxes."""
    try:
        heading, _ = _table(path)
    except UserError:
        return False
    boxes = _four(heading, CORNER_COLUMNS) or _four(heading, SIDE_COLUMNS) or known_field(heading, LIST_COLUMNS)
    return known_field(heading, PICTURE_COLUMNS) is not None and boxes is not None


def _four(heading: Sequence[str], known: Sequence[tuple[str, ...]]) -> list[str] | None:
    """The four columns of the first set of names that the heading has."""
    for names in known:
        found = [known_field(heading, (name,)) for name in names]
        if None not in found:
            return found
    return None


def _table(path: str) -> tuple[list[str], Iterable[tuple[int, dict[str, Any]]]]:
    """The heading, and (line, fields) of each row."""
    _, _, first = next(csv_cells(path), (0, 0, []))
    if len(first) == 6 and (_are_numbers(first[1:5]) or not any(first[1:])) and "." in first[0]:
        heading = TABLE_HEADING.split(",")
        return heading, ((line, dict(zip(heading, row, strict=False))) for line, _, row in csv_cells(path))
    rows = csv_cells(path, delimiter=delimiter_of(path))
    _, _, heading = next(rows, (0, 0, []))
    if next(rows, None) is None:
        raise UserError(f"{path} has no rows")
    return [name.strip() for name in heading], ((row.line, row.fields) for row in table_rows(path))


def _are_numbers(cells: Sequence[str]) -> bool:
    try:
        return all(math.isfinite(float(cell)) for cell in cells)
    except ValueError:
        return False
