"""From a table of boxes and a folder of pictures to a source: what is used, and the sentence about it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from florence_jax.data.box_classes import ClassLists
from florence_jax.data.box_cleaning import (
    check_classes,
    check_form,
    check_lists,
    drop_bad_boxes,
    place_boxes,
    place_files,
)
from florence_jax.data.box_problems import LEFT_OUT
from florence_jax.data.box_table import BoxTable
from florence_jax.data.sources.boxes import BoxColumns, FileBoxSource
from florence_jax.data.sources.picture_files import Listing, list_pictures, shown, some
from florence_jax.errors import UserError


def finish_table(
    spec: str, table: BoxTable, folder: str, text: str, check: bool, listing: Listing | None = None
) -> FileBoxSource:
    """The source of a table: looks for the files, cleans the boxes, says what there is.

    Args:
      spec: for messages.
      table: is changed.
      folder: of the pictures.
      text: of what it was read.
      check: see `detection.open_boxes`.
      listing: of the folder, where it is known.

    Raises:
      UserError: without pictures or boxes.
    """
    remote = "://" in folder
    if not epath.Path(folder).is_dir():
        raise UserError(f"data source {spec}: there is no folder {folder} of pictures")
    listing = listing or (Listing(folder) if remote else list_pictures(folder))
    named = len(table.files)
    example = table.files[0] if table.files else ""
    if not remote:  # in a bucket a listing takes long
        place_files(table, listing.pictures)
        if named and not table.files:
            raise UserError(
                f"data source {spec}: none of its {named:,} pictures is in {folder}, such as {example!r}; "
                f"there: {listing.sentence()}"
            )
    place_boxes(table, folder)
    check_form(table, check)
    check_lists(table)
    drop_bad_boxes(table)
    check_classes(table)
    if not len(table.boxes):
        if not check:
            raise UserError(_no_boxes(spec, table))
        table.problems.add("nothing", spec)
    return _source(spec, table, folder, text)


def _no_boxes(spec: str, table: BoxTable) -> str:
    left_out = table.problems.sentence(LEFT_OUT)
    return (
        f"data source {spec}: no boxes: {len(table.files):,} pictures, classes: {some(table.class_names) or 'none'}"
        + (f"; left out: {left_out}" if left_out else "; its annotations are empty")
    )


def _source(spec: str, table: BoxTable, folder: str, text: str) -> FileBoxSource:
    sides = table.boxes[:, 2:] - table.boxes[:, :2]
    count = len(table.files)
    columns = BoxColumns(
        pictures=count,
        box_image=table.box_image,
        boxes=table.boxes,
        class_ids=table.box_class,
        crowd=table.crowd,
        areas=np.where(np.isnan(table.areas), sides.prod(1), table.areas),
        group_of=table.group_of,
        attributes=table.attributes if table.attribute_names else None,
    )
    lists = ClassLists(count, *table.negative), ClassLists(count, *table.not_exhaustive)
    return FileBoxSource(
        name=spec,
        folder=folder,
        files=table.files,
        image_ids=table.image_ids,
        sizes=table.sizes,
        columns=columns,
        class_names=table.class_names,
        category_ids=table.category_ids,
        summary=_summary(spec, table, folder, text, columns),
        problems=table.problems,
        looked_for=None if table.exhaustive else lists,
        attribute_names=table.attribute_names,
        uids=table.uids,
        frequencies=table.frequencies,
    )


def _summary(spec: str, table: BoxTable, folder: str, text: str, columns: BoxColumns) -> dict[str, Any]:
    without = int((np.diff(columns.offsets) == 0).sum())
    says = "; ".join(_found(spec, table, text, columns, without)) + table.problems.said()
    counts = np.bincount(columns.class_ids, minlength=len(table.class_names)).tolist()
    if empty := [name for name, count in zip(table.class_names, counts, strict=True) if not count]:
        says += f"; without boxes: {some(empty)}"
    return {
        "folder": folder,
        "files": None,
        "pictures": len(table.files),
        "texts": text,
        "boxes": len(columns.boxes),
        "classes": list(table.class_names),
        "crowds": int(columns.crowd.sum()),
        "groups": int(columns.group_of.sum()),
        "without_boxes": without,
        "passed_over": {kind: count for kind, count in table.problems.counts.items() if count},
        "says": says,
    }


def _found(spec: str, table: BoxTable, text: str, columns: BoxColumns, without: int) -> Iterator[str]:
    """Parts of the sentence about what there is."""
    names = table.class_names
    # The file's own numbers of the classes, where it has such: class k of the detector has the k-th of them.
    ids = f"; their ids: {some(map(str, table.category_ids))}" if table.numbered else ""
    classes = f"{len(names):,} class{'es' * (len(names) != 1)} ({some(names)}{ids})"
    says = f"{shown(spec)}: {text}: {counted(len(table.files), 'picture')}, "
    says += f"{counted(len(columns.boxes), 'box', 'es')} of {classes}"
    for marks, what in ((columns.crowd, "crowds"), (columns.group_of, "groups")):
        says += f", {int(marks.sum()):,} of them {what}" if marks.any() else ""
    yield says
    if without:
        yield f"{counted(without, 'picture')} without boxes"
    if table.attribute_names:
        known: Sequence[str] = table.attribute_names
        yield f"{counted(len(table.attributes[0]), 'attribute')} of {len(known):,} ({some(known)})"
    if not table.exhaustive:
        absent, partly = len(table.negative[0]), len(table.not_exhaustive[0])
        yield (
            "not every class was looked for in every picture, what has no box is unknown, not absent: "
            f"{absent:,} times a class is said not to be in a picture, {partly:,} times not to have all its boxes"
        )


def counted(count: int, word: str, plural: str = "s") -> str:
    """'1 box', '2 boxes'."""
    return f"{count:,} {word}" + plural * (count != 1)
