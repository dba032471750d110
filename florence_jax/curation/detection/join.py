"""Joins annotated sources into one set of detection records, as columns."""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from florence_jax.curation.detection.boxes import (
    ACROSS_IOU,
    WITHIN_IOU,
    dense_codes,
    find_doubles,
    group_rows,
)
from florence_jax.curation.detection.images import STATUSES, ImageFacts
from florence_jax.curation.detection.labels import LabelSpace
from florence_jax.data.annotations import FORMATS, Annotations
from florence_jax.data.box_frames import REASONS, PictureFrames, boxes_in_picture, clean_boxes
from florence_jax.errors import UserError

# Splits of the publishers that are for evaluation.
OFFICIAL_EVALUATION = ("val2017", "test2017", "validation", "test")
LEAKS_SHOWN = 5


@dataclasses.dataclass
class Rows:
    """The images of all sources, R rows in the order of the sources.

    Attributes:
      tables: the sources.
      table, local: int64 (R,), the source and the row in it.
      ids: R identities.
      id_code: int64 (R,), equal for equal identities.
      facts: of the R files.
      group: int64 (R,): rows with the same number show the same picture.
      validation: bool (R,).
    """

    tables: Sequence[Annotations]
    table: np.ndarray
    local: np.ndarray
    ids: list[str]
    id_code: np.ndarray
    facts: ImageFacts
    group: np.ndarray
    validation: np.ndarray


@dataclasses.dataclass
class Boxes:
    """The boxes to write, M of them, by record and then by source.

    Attributes:
      record, class_id, table: int64 (M,), int32 (M,), int64 (M,).
      xyxy: float32 (M, 4), in pixels.
      crowd, group_of: bool (M,).
      scores: float32 (M,), NaN for boxes made by people.
    """

    record: np.ndarray
    class_id: np.ndarray
    table: np.ndarray
    xyxy: np.ndarray
    crowd: np.ndarray
    group_of: np.ndarray
    scores: np.ndarray

    def take(self, index: np.ndarray) -> "Boxes":
        """The boxes that an index or mask picks."""
        return Boxes(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


def join_rows(tables: Sequence[Annotations], facts: ImageFacts) -> Rows:
    """Finds the rows that show one picture: the same identity, or files with the same bytes.

    Args:
      tables: the sources.
      facts: of their R image files, in order.
    """
    sizes = [len(table.ids) for table in tables]
    table = np.repeat(np.arange(len(tables)), sizes)
    ids = [image_id for t in tables for image_id in t.ids]
    id_code = dense_codes(ids)
    digests = np.ascontiguousarray(facts.digest).view("V16")[:, 0]
    hash_code = np.where(facts.status == 0, np.unique(digests, return_inverse=True)[1], -1)
    return Rows(
        tables=tables,
        table=table,
        local=np.concatenate([np.arange(size) for size in sizes]),
        ids=ids,
        id_code=id_code,
        facts=facts,
        group=group_rows(id_code, hash_code),
        validation=np.array([t.spec.split == "validation" for t in tables])[table],
    )


def refuse_other_sets(rows: Rows) -> None:
    """Raises UserError where files that are given as one set are of two: a class or a picture of an id is another."""
    first: dict[str, Annotations] = {}
    for table in rows.tables:
        known = first.setdefault(table.spec.kind, table) if table.exhaustive else table
        ours, theirs = ({(each.id, each.name) for each in one.categories} for one in (table, known))
        for number, name in sorted(ours ^ theirs)[:1]:
            raise _two_sets(known, table, f"only one of them has a class {name!r} of id {number}")
    kinds = np.array([FORMATS.index(table.spec.kind) for table in rows.tables])[rows.table]
    order = np.argsort(rows.id_code, kind="stable")
    one, other = order[:-1], order[1:]
    same = (rows.id_code[one] == rows.id_code[other]) & (kinds[one] == kinds[other])
    same &= rows.table[one] != rows.table[other]
    for pair in zip(one[same].tolist(), other[same].tolist(), strict=True):
        tables = [rows.tables[rows.table[row]] for row in pair]
        names = [_file_name(table.files[rows.local[row]]) for table, row in zip(tables, pair, strict=True)]
        if names[0] != names[1]:
            raise _two_sets(*tables, f"{rows.ids[pair[0]]} is {names[0]} in the one and {names[1]} in the other")


def _file_name(path: str) -> str:
    """Without what COCO's names of 2014 begin with."""
    return re.sub(r"^COCO_(train|val|test)\d{4}_", "", path.rpartition("/")[2])


def _two_sets(one: Annotations, other: Annotations, why: str) -> UserError:
    kind, paths = one.spec.kind, f"{one.spec.annotations} and {other.spec.annotations}"
    return UserError(
        f"--{kind}: {paths} are not of one set: {why}. Files of one kind share ids of classes and pictures: give the "
        "second as another kind that has the same form, such as --objects365, or train on 'one|other' instead"
    )


def find_leaks(rows: Rows) -> list[dict[str, Any]]:
    """The training images that are validation pictures too: dicts of row, image, source, why and other.

    A picture leaks by its id, by the bytes of its file, or because its publishers put it in an evaluation split.
    """
    none = len(rows.ids)
    first = np.full(none, none)
    evaluation = np.flatnonzero(rows.validation)
    np.minimum.at(first, rows.group[evaluation], evaluation)
    other = first[rows.group]
    same_id = np.isin(rows.id_code, rows.id_code[evaluation])
    leaks = []
    for row in np.flatnonzero(~rows.validation).tolist():
        table = rows.tables[rows.table[row]]
        official = table.official[rows.local[row]]
        leak = {"row": row, "image": rows.ids[row], "source": table.spec.label, "why": "", "other": ""}
        if other[row] < none:
            where = rows.tables[rows.table[other[row]]].spec.label
            leak |= {"why": "same id" if same_id[row] else "same file", "other": f"{rows.ids[other[row]]} of {where}"}
        elif official in OFFICIAL_EVALUATION:
            leak |= {"why": "published for evaluation", "other": official}
        if leak["why"]:
            leaks.append(leak)
    return leaks


def refuse_leaks(leaks: Sequence[dict[str, Any]]) -> None:
    """Raises UserError, naming the first of them, if there are leaks."""
    if leaks:
        shown = "; ".join(f"{k['image']} of {k['source']} ({k['why']}: {k['other']})" for k in leaks[:LEAKS_SHOWN])
        more = f"; and {len(leaks) - LEAKS_SHOWN} more" if len(leaks) > LEAKS_SHOWN else ""
        raise UserError(
            f"{len(leaks)} training images are evaluation images too: {shown}{more}; remove them from the training "
            "annotations, or leave them out of training with --leaks=drop"
        )


def choose_pictures(rows: Rows, keep: np.ndarray) -> np.ndarray:
    """int64 (R,): for each row, the row whose file stands for the picture; -1 if `keep` has none with a usable file.

    It is the one of the preferred source and, there, of the first identity.
    """
    usable = np.flatnonzero(keep & (rows.facts.status == 0))
    rank = np.empty(len(rows.ids), np.int64)
    order = np.lexsort((np.array(rows.ids), rows.table))
    rank[order] = np.arange(len(order))
    best = np.full(len(rows.ids), len(order))
    np.minimum.at(best, rows.group[usable], rank[usable])
    best = best[rows.group]
    return np.where(best < len(order), np.append(order, -1)[best], -1)


class Merged:
    """The joined set: what to write for each record, and the counts that say what became of the rest.

    Args:
      rows: see `join_rows`.
      space: the classes.
      leaked: rows to leave out.
      within: IoU, see `detection_merge.double_boxes`.
      across: IoU, likewise.

    Attributes:
      pictures: int64 (G,), the row whose file stands for each record.
      validation: bool (G,).
      boxes: the boxes to write; `offsets` (G + 1,) cuts them into records.
      sources: for each source of `rows.tables` the counts of its images and boxes.
      doubles: counts of boxes left out as repeats, by 'kept set + dropped set'.
      contradicted: counts of negative labels, and pseudo boxes, that another set's boxes or labels overrule.
    """

    def __init__(
        self,
        rows: Rows,
        space: LabelSpace,
        leaked: np.ndarray,
        within: float = WITHIN_IOU,
        across: float = ACROSS_IOU,
    ):
        self.rows, self.space = rows, space
        self.sources: list[dict[str, Any]] = []
        self._class_ids = [space.ids(t.spec.kind, t.categories) for t in rows.tables]
        keep = np.ones(len(rows.ids), bool)
        keep[leaked] = False
        picture = choose_pictures(rows, keep)
        boxes = self._placed_boxes(picture, keep)
        used = np.flatnonzero(self._used)
        self.pictures, record = np.unique(picture[used], return_inverse=True)
        self._row_record = np.full(len(rows.ids), -1)
        self._row_record[used] = record
        boxes.record = self._row_record[boxes.record]
        boxes = boxes.take(np.argsort(boxes.record, kind="stable"))
        self._labels = {name: self._label_codes(name) for name in ("negative", "not_exhaustive", "positive")}
        self.contradicted: collections.Counter = collections.Counter()
        boxes = self._resolve_contradictions(boxes)
        boxes = self._drop_doubles(boxes, within, across)
        self._drop_unknown(boxes)
        self._count_used()

    def _placed_boxes(self, picture: np.ndarray, keep: np.ndarray) -> Boxes:
        """All usable boxes with `record` holding the row; fills `sources` and `_used` (R,)."""
        rows, parts = self.rows, []
        self._used = keep & (picture >= 0)
        facts = rows.facts
        for t, table in enumerate(rows.tables):
            mine = np.flatnonzero(rows.table == t)
            shown = picture[mine]
            frames = PictureFrames(shown >= 0, facts.raw[shown], facts.size[shown], facts.orientation[shown])
            placed, how = boxes_in_picture(table.boxes, table.box_image, table.sizes, frames)
            self._used[mine] &= ~how["size_mismatch"]
            used = self._used[mine]
            lost = keep[mine] & (shown < 0)
            counts = {"images": len(mine), "leaked": int((~keep[mine]).sum())}
            counts |= {s: int((lost & (facts.status[mine] == STATUSES.index(s))).sum()) for s in STATUSES[1:]}
            counts |= {name: int((how[name] & keep[mine]).sum()) for name in how}
            counts["joined_to_another_row"] = int((used & (shown != mine)).sum())
            counts["boxes"] = len(placed)
            live = used[table.box_image]
            counts["in_unused_images"] = int((~live).sum())
            clean, reason, clipped = clean_boxes(placed[live], frames.size[table.box_image[live]])
            counts |= {name: int((reason == i).sum()) for i, name in enumerate(REASONS) if i}
            ok = reason == 0
            counts["clipped"] = int((clipped & ok).sum())
            index = np.flatnonzero(live)[ok]
            parts.append(
                Boxes(
                    record=mine[table.box_image[index]],
                    class_id=self._class_ids[t][table.box_category[index]],
                    table=np.full(len(index), t),
                    xyxy=clean[ok],
                    crowd=table.crowd[index],
                    group_of=table.group_of[index],
                    scores=table.scores[index],
                )
            )
            skipped = {name: int(count) for name, count in sorted(table.skipped.items()) if count}
            self.sources.append({"source": table.spec.label, **counts, "not_read": skipped})
        return Boxes(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Boxes)))

    def _label_codes(self, name: str) -> np.ndarray:
        """Sorted distinct record x classes + class of the image-level labels of one kind."""
        parts = [np.zeros(0, np.int64)]
        for t, table in enumerate(self.rows.tables):
            image, category = getattr(table, name)
            mine = np.flatnonzero(self.rows.table == t)
            record = self._row_record[mine[image]]
            codes = record * len(self.space) + self._class_ids[t][category]
            parts.append(codes[record >= 0])
        return np.unique(np.concatenate(parts))

    def _resolve_contradictions(self, boxes: Boxes) -> Boxes:
        """Where sets disagree: a person's box or positive label beats a negative label, and that a pseudo box."""
        codes = boxes.record * len(self.space) + boxes.class_id
        pseudo = ~np.isnan(boxes.scores)
        there = np.union1d(codes[~pseudo], self._labels["positive"])
        wrong = np.isin(self._labels["negative"], there)
        self._labels["negative"] = self._labels["negative"][~wrong]
        denied = pseudo & np.isin(codes, self._labels["negative"])
        self.contradicted.update(negative_labels=int(wrong.sum()), pseudo_boxes=int(denied.sum()))
        self._denied = np.bincount(boxes.table[denied], minlength=len(self.rows.tables))
        return boxes.take(~denied)

    def _drop_doubles(self, boxes: Boxes, within: float, across: float) -> Boxes:
        special = boxes.crowd | boxes.group_of  # never doubles of a box for one object
        runs = (boxes.record * len(self.space) + boxes.class_id) * 2 + special
        repeats = find_doubles(runs, boxes.xyxy, boxes.table, ~np.isnan(boxes.scores), within, across)
        double = repeats >= 0
        kinds = [table.spec.kind for table in self.rows.tables]
        kept, gone = boxes.table[repeats[double]], boxes.table[double]
        pairs, counts = np.unique(np.stack([kept, gone], 1), axis=0, return_counts=True)
        self.doubles: collections.Counter = collections.Counter()
        for (a, b), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self.doubles[f"{kinds[a]} + {kinds[b]}"] += count
        self._doubled = np.bincount(gone, minlength=len(kinds))
        return boxes.take(~double)

    def _drop_unknown(self, boxes: Boxes) -> None:
        """Leaves out the records that only a teacher saw and found nothing in: nothing is known about them."""
        people = np.array([table.teacher is None for table in self.rows.tables])
        used = np.flatnonzero(self._row_record >= 0)
        known = np.zeros(len(self.pictures), bool)
        known[self._row_record[used[people[self.rows.table[used]]]]] = True
        known[boxes.record] = True
        number = np.where(known, np.cumsum(known) - 1, -1)
        self._row_record[used] = number[self._row_record[used]]
        self._without_boxes = np.bincount(
            self.rows.table[used[self._row_record[used] < 0]], minlength=len(self.rows.tables)
        )
        boxes.record = number[boxes.record]
        for name, codes in self._labels.items():
            record, class_id = np.divmod(codes, len(self.space))
            self._labels[name] = (number[record] * len(self.space) + class_id)[number[record] >= 0]
        self.pictures = self.pictures[known]
        self.boxes = boxes
        self.validation = self.rows.validation[self.pictures]
        self.offsets = np.searchsorted(boxes.record, np.arange(len(self.pictures) + 1))
        rows = np.flatnonzero(self._row_record >= 0)
        self._members = rows[np.argsort(self._row_record[rows], kind="stable")]
        self._member_offsets = np.searchsorted(self._row_record[self._members], np.arange(len(self.pictures) + 1))
        self._label_offsets = {
            name: np.searchsorted(codes, np.arange(len(self.pictures) + 1) * len(self.space))
            for name, codes in self._labels.items()
        }

    def _count_used(self) -> None:
        used = np.bincount(self.rows.table[self._members], minlength=len(self.rows.tables))
        boxes = np.bincount(self.boxes.table, minlength=len(self.rows.tables))
        for t, counts in enumerate(self.sources):
            counts["double"] = int(self._doubled[t])
            counts["contradicted"] = int(self._denied[t])
            counts["boxes_used"] = int(boxes[t])
            counts["without_pseudo_boxes"] = int(self._without_boxes[t])
            counts["images_used"] = int(used[t])

    def __len__(self) -> int:
        return len(self.pictures)

    def key(self, record: int) -> str:
        """The record's key: the identity of its picture."""
        return self.rows.ids[self.pictures[record]]

    def record(self, record: int) -> dict[str, Any]:
        """A record without "image"; see `detection` for the fields."""
        rows, picture = self.rows, self.pictures[record]
        members = self._members[self._member_offsets[record] : self._member_offsets[record + 1]]
        tables = [rows.tables[t] for t in np.unique(rows.table[members])]
        sources = list(dict.fromkeys(table.spec.kind for table in tables))
        teachers = [table for table in tables if table.teacher is not None]
        boxes = self.boxes.take(slice(self.offsets[record], self.offsets[record + 1]))
        width, height = rows.facts.size[picture].tolist()
        classes = boxes.class_id.tolist()
        kinds = [rows.tables[t].spec.kind for t in boxes.table.tolist()]
        scores = [None if np.isnan(s) else s for s in boxes.scores.tolist()]
        return {
            "key": rows.ids[picture],
            "image_hash": rows.facts.digest[picture].tobytes().hex(),
            "image_ids": sorted({rows.ids[row] for row in members.tolist()}),
            "sources": sources,
            "width": width,
            "height": height,
            "boxes": boxes.xyxy.tolist(),
            "class_ids": classes,
            "class_names": [self.space.texts[c] for c in classes],
            "box_sources": [sources.index(kind) for kind in kinds],
            "iscrowd": boxes.crowd.tolist(),
            "is_group_of": boxes.group_of.tolist(),
            "scores": scores,
            "teacher": teachers[0].teacher if teachers else None,
            "threshold": teachers[0].threshold if teachers else None,
            **{f"{name}_ids": self.labels(name, record) for name in self._labels},
        }

    def labels(self, name: str, record: int) -> list[int]:
        """Class ids of the image-level labels 'negative', 'not_exhaustive' or 'positive'."""
        offsets = self._label_offsets[name]
        return (self._labels[name][offsets[record] : offsets[record + 1]] % len(self.space)).tolist()

    def fingerprint(self) -> str:
        """A digest of all that the records are made of."""
        digest = hashlib.blake2b(digest_size=16)
        for texts in (self.space.texts, self.rows.ids):
            digest.update("\n".join(texts).encode("utf-8", "surrogatepass"))
        for table in self.rows.tables:
            digest.update(repr((table.spec.kind, table.spec.split, table.teacher, table.threshold)).encode())
        columns = [getattr(self.boxes, field.name) for field in dataclasses.fields(Boxes)]
        columns += [self.pictures, self._members, self._member_offsets, self.rows.facts.digest, self.rows.facts.size]
        for column in [*columns, *self._labels.values()]:
            digest.update(np.ascontiguousarray(column))
        return digest.hexdigest()
