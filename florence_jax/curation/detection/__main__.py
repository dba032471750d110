"""Builds a FLOD-style detection set: COCO, LVIS, Objects365, OpenImages, and pseudo boxes on ImageNet-22K, in one form.

    python -m florence_jax.curation.detection --out=DIR \\
      --coco=annotations/instances_train2017.json:train2017 \\
      --coco=annotations/instances_val2017.json:val2017:validation \\
      --lvis=lvis_v1_train.json:train2017 \\
      --objects365=zhiyuan_objv2_train.json:objects365/train \\
      --openimages=oidv6-train-annotations-bbox.csv:openimages/train \\
      --imagenet=image_info.json:imagenet22k --teacher=results.json --teacher_classes=coco --imagenet_words=words.txt

Each source is ANNOTATIONS:IMAGES or ANNOTATIONS:IMAGES:validation and may be given several times. A record has: key,
image (the file's bytes), image_hash, image_ids, sources, width, height; for each box boxes (x1 y1 x2 y2, pixels of the
picture with its EXIF orientation applied), class_ids, class_names, box_sources (index into sources), iscrowd,
is_group_of, scores (None for boxes made by people); teacher and threshold of pseudo boxes; and the image-level labels
negative_ids (people checked: not there), not_exhaustive_ids (there, but not every instance has a box) and positive_ids.
A class in none of these lists and without box is unknown, unless a source in "exhaustive" of classes.json covers it.

DIR gets train/ and validation/ (ArrayRecord), classes.json (names, in how many pictures of each split a class has a
box, and how many records a split has), label_merges.csv, kept_apart.csv, leaks.csv, report.json and sheet.html. The
same inputs give the same bytes. A run that was interrupted is finished by the same command.
The Florence paper gives FLOD-9M as 8,967,286 images, 25,190 categories and 33,408,237 boxes; how it
merged names and found pseudo boxes is not stated, so the rules here are this project's.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from florence_jax.command_line import enter, exit_code
from florence_jax.curation.detection.boxes import ACROSS_IOU, WITHIN_IOU
from florence_jax.curation.detection.images import image_facts
from florence_jax.curation.detection.join import Merged, find_leaks, join_rows, refuse_leaks, refuse_other_sets
from florence_jax.curation.detection.labels import RULES, LabelSpace, csv_text, read_rules
from florence_jax.curation.detection.pseudo import (
    THRESHOLD,
    load_teacher,
    missing_predictions,
    read_imagenet,
    read_synset_words,
    run_teacher,
)
from florence_jax.curation.detection.sheet import write_detection_sheet
from florence_jax.curation.detection.write import prepare_folder, shards, write_records
from florence_jax.data.annotations import (
    FORMATS,
    SPLITS,
    Annotations,
    SourceSpec,
    file_paths,
    parse_spec,
    read_annotations,
)
from florence_jax.errors import UserError
from florence_jax.files import with_home, write_text

MERGE_COLUMNS = ("class_id", "text", "source", "category_id", "category", "how", "boxes_of_class")


def build_detection_set(
    tables: Sequence[Annotations],
    out: str,
    *,
    rules: Sequence[tuple[str, str, str]] = RULES,
    drop_leaks: bool = False,
    within: float = WITHIN_IOU,
    across: float = ACROSS_IOU,
    shard_count: int | None = None,
    workers: int = 8,
    verify: bool = False,
) -> dict[str, Any]:
    """Joins the sources and writes the set; returns the report.

    Args:
      tables: from `read_annotations` and `read_imagenet`.
      out: folder, made if needed.
      rules: for class names, see `detection_labels`.
      drop_leaks: leave evaluation images out of training instead of refusing them.
      within: IoU from which two boxes of one source, class and image are one.
      across: the same for boxes of two sources.
      shard_count: files of each split; None for one for each 4,096 records.
      workers: threads that read images.
      verify: decode every image, to leave out truncated files.

    Raises:
      UserError: for leaks, or images that are not there.
    """
    for name, value in (("within", within), ("across", across)):
        if not 0 < value <= 1:
            raise UserError(f"the IoU {name} sources must be above 0 and at most 1, not {value}")
    tables = sorted(tables, key=lambda t: (FORMATS.index(t.spec.kind), SPLITS.index(t.spec.split), t.spec.label))
    space = LabelSpace(tables, rules)
    paths = [path for table in tables for path in file_paths(table.spec, table.files)]
    rows = join_rows(tables, image_facts(paths, workers, verify))
    refuse_other_sets(rows)
    leaks = find_leaks(rows)
    if not drop_leaks:
        refuse_leaks(leaks)
    merged = Merged(rows, space, np.array([leak["row"] for leak in leaks], np.int64), within, across)
    if not len(merged):
        raise UserError("no image is left; see the counts: " + json.dumps(merged.sources))
    plan = {name: part for split in SPLITS for name, part in shards(merged, split, shard_count).items()}
    prepare_folder(out, plan, merged.fingerprint())
    files = write_records(merged, out, plan, workers)
    report = make_report(merged, files) | {"leaks_dropped": len(leaks)}
    report["settings"] = {"within_iou": within, "across_iou": across, "verified_pixels": verify}
    report["unused_rules"] = [rule for rule in space.unused_rules if rule not in RULES]
    _write_tables(merged, out, leaks)
    write_detection_sheet(merged, report, os.path.join(out, "sheet.html"))
    write_text(os.path.join(out, "report.json"), json.dumps(report, indent=1) + "\n")
    return report


def make_report(merged: Merged, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The counts of a build, ready for JSON.

    In each source, boxes = in_unused_images + not_finite + zero_area + outside + thin + contradicted + double +
    boxes_used, and images = leaked + missing + corrupt + size_mismatch + without_pseudo_boxes + images_used.
    """
    boxes, pseudo = merged.boxes, ~np.isnan(merged.boxes.scores)
    totals = {}
    for split in SPLITS:
        validation = split == "validation"
        mine = merged.validation[boxes.record] == validation
        totals[split] = {
            "images": int((merged.validation == validation).sum()),
            "images_without_boxes": int((np.diff(merged.offsets)[merged.validation == validation] == 0).sum()),
            "boxes": int(mine.sum()),
            "pseudo_boxes": int((mine & pseudo).sum()),
            "crowd_boxes": int((mine & boxes.crowd).sum()),
            "group_of_boxes": int((mine & boxes.group_of).sum()),
            "classes_with_boxes": len(np.unique(boxes.class_id[mine])),
        }
    return {
        "totals": totals,
        "classes": len(merged.space),
        "categories": len(merged.space.merge_table()),
        "sources": merged.sources,
        "double_boxes": dict(sorted(merged.doubles.items())),
        "contradicted": dict(merged.contradicted),
        "class_overlap": _class_overlap(merged),
        "files": files,
    }


def _class_overlap(merged: Merged) -> list[dict[str, Any]]:
    """For each validation source: which of its classes have training boxes. 'Zero-shot' is only true of the others."""
    training = set(merged.boxes.class_id[~merged.validation[merged.boxes.record]].tolist())
    found = []
    for table in merged.rows.tables:
        if table.spec.split == "validation":
            classes = set(merged.space.ids(table.spec.kind, table.categories).tolist())
            unseen = sorted(merged.space.texts[c] for c in classes - training)
            counts = {"classes": len(classes), "in_training": len(classes & training), "not_in_training": unseen}
            found.append({"source": table.spec.label, **counts})
    return found


def _write_tables(merged: Merged, out: str, leaks: list[dict[str, Any]]) -> None:
    space = merged.space
    covered = {t.spec.kind: t for t in merged.rows.tables if t.exhaustive}
    exhaustive = {k: sorted(set(space.ids(k, t.categories).tolist())) for k, t in sorted(covered.items())}
    pictures = {split: _pictures_by_class(merged, split) for split in SPLITS}
    classes = json.dumps(
        {
            "classes": [
                one | {"pictures": {split: found[one["id"]] for split, found in pictures.items()}}
                for one in space.classes()
            ],
            "exhaustive": exhaustive,
            "records": {split: int((merged.validation == (split == "validation")).sum()) for split in SPLITS},
        },
        ensure_ascii=False,
        indent=1,
    )
    counts = np.bincount(merged.boxes.class_id, minlength=len(space))
    merges = [row | {"boxes_of_class": int(counts[row["class_id"]])} for row in space.merge_table()]
    apart = [{"text": a, "other": b, "why": why} for a, b, why in space.kept_apart]
    for name, text in {
        "classes.json": classes + "\n",
        "label_merges.csv": csv_text(MERGE_COLUMNS, merges),
        "kept_apart.csv": csv_text(("text", "other", "why"), apart),
        "leaks.csv": csv_text(("image", "source", "why", "other"), leaks),
    }.items():
        write_text(os.path.join(out, name), text)


def _pictures_by_class(merged: Merged, split: str) -> list[int]:
    """In how many pictures of a split each class has a box."""
    mine = merged.validation[merged.boxes.record] == (split == "validation")
    pairs = np.unique(np.stack([merged.boxes.record[mine], merged.boxes.class_id[mine]]), axis=1)
    return np.bincount(pairs[1], minlength=len(merged.space)).tolist()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m florence_jax.curation.detection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for kind in FORMATS:
        parser.add_argument(f"--{kind}", action="append", default=[], metavar="ANNOTATIONS:IMAGES[:validation]")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--teacher", help="RESULTS.json of COCO results, or package.module:callable to run now")
    parser.add_argument("--teacher_name", help="for the records; default: the --teacher without folders")
    parser.add_argument(
        "--teacher_classes", choices=FORMATS[:-1], default="", help="the set that its classes are named by"
    )
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="least score of a pseudo box (%(default)s)")
    parser.add_argument("--imagenet_words", help="words.txt or LOC_synset_mapping.txt: names of the images' classes")
    parser.add_argument(
        "--pseudo_labels", choices=("teacher", "image"), default="teacher", help="class of pseudo boxes"
    )
    parser.add_argument("--label_rules", help="CSV with source, category, text; added to the built-in rules")
    parser.add_argument("--leaks", choices=("refuse", "drop"), default="refuse", help="evaluation images in training")
    parser.add_argument("--within_iou", type=float, default=WITHIN_IOU, help="double boxes of one source (%(default)s)")
    parser.add_argument(
        "--across_iou", type=float, default=ACROSS_IOU, help="double boxes of two sources (%(default)s)"
    )
    parser.add_argument("--shards", type=int, help="number of files; default: one for each 4096 records")
    parser.add_argument("--workers", type=int, default=8, help="threads that read images (%(default)s)")
    parser.add_argument("--verify", action="store_true", help="decode every image, to leave out truncated files")
    return parser


def _read_tables(args: argparse.Namespace) -> list[Annotations]:
    specs = [parse_spec(kind, text) for kind in FORMATS for text in getattr(args, kind)]
    if not specs:
        raise UserError(f"no source: give at least one of {', '.join('--' + kind for kind in FORMATS)}")
    for value, name in ((args.shards or 1, "shards"), (args.workers, "workers")):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    words = read_synset_words(args.imagenet_words) if args.imagenet_words else None
    tables = []
    for spec in specs:
        print(f"reading {spec.annotations}", file=sys.stderr)
        if spec.kind == "imagenet":
            name = args.teacher_name or os.path.basename(args.teacher or "")
            predictions = _predictions(args.teacher, spec, args.out)
            how = (args.threshold, words, args.pseudo_labels, args.teacher_classes)
            tables.append(read_imagenet(spec, predictions, name, *how))
        else:
            tables.append(read_annotations(spec))
    return tables


def _predictions(teacher: str | None, spec: SourceSpec, out: str) -> str:
    """The file of the teacher's results; a live teacher runs first and leaves them in the output folder."""
    if not teacher:
        raise missing_predictions(spec)
    if ":" not in teacher or epath.Path(teacher).exists():
        if not epath.Path(teacher).exists():
            raise UserError(f"--teacher={teacher} does not exist")
        return teacher
    path = os.path.join(out, f"teacher_{os.path.basename(spec.annotations)}")
    epath.Path(out).mkdir(parents=True, exist_ok=True)
    run_teacher(spec, load_teacher(teacher), path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (2 for a user's mistake)."""

    def work() -> None:
        args = _parser().parse_args(with_home(argv))
        for path in filter(None, (args.imagenet_words, args.label_rules)):
            if not epath.Path(path).exists():
                raise UserError(f"{path} does not exist")
        rules = (*RULES, *(read_rules(args.label_rules) if args.label_rules else ()))
        report = build_detection_set(
            _read_tables(args),
            args.out,
            rules=rules,
            drop_leaks=args.leaks == "drop",
            within=args.within_iou,
            across=args.across_iou,
            shard_count=args.shards,
            workers=args.workers,
            verify=args.verify,
        )
        print(json.dumps(report["totals"]))

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
