"""Sets of boxes that people have: COCO JSON, Pascal VOC XML, CSV, records of `curation.detection`, own folders."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from florence_jax.data.box_files import TABLE_HEADING, is_box_table, read_box_table, read_voc
from florence_jax.data.box_problems import Problems
from florence_jax.data.openimages_boxes import read_openimages_boxes
from florence_jax.data.own_coco import read_own_coco
from florence_jax.data.records import first_line
from florence_jax.data.sources.array_record import ArrayRecordSource, array_record_paths
from florence_jax.data.sources.box_tables import finish_table
from florence_jax.data.sources.boxes import BoxSource, FileBoxSource, RecordBoxSource
from florence_jax.data.sources.merged_boxes import MergedBoxSource
from florence_jax.data.sources.odinw import odinw_part, odinw_parts, odinw_table
from florence_jax.data.sources.picture_files import Listing, list_pictures, shown, some
from florence_jax.data.sources.scenes import Scenes
from florence_jax.data.visual_genome import OBJECTS, find_files, read_visual_genome
from florence_jax.errors import UserError

COCO_NAMES = ("annotations.json", "_annotations.coco.json", "annotation.json", "labels.json", "coco.json")
TABLE_NAMES = ("boxes.csv", "annotations.csv", "_annotations.csv", "labels.csv")
OPENIMAGES_BOXES = "-annotations-bbox.csv"
LOOKED_INTO, COCO_BYTES = 20, 4096  # files of other names, at most; first bytes of a .json that are looked at
CLASSES_FILE = "classes.json"  # of the builder in curation.detection
# Names of the parts of a data set, as sub-folders and in names of files.
PARTS = {"train": ("train", "training"), "test": ("test", "testing"), "val": ("valid", "val", "validation")}


def open_boxes(spec: str, split: str = "", check: bool = False) -> BoxSource:
    """Opens pictures with boxes.

    Args:
      spec: 'coco:FILE.json[:IMAGES]'; 'voc:FOLDER[:SPLIT]', SPLIT a file of ImageSets/Main; 'boxes:FILE.csv[:IMAGES]';
        'scenes:SPLIT', see `Scenes`; 'lvis:FILE.json:IMAGES'; 'objects365:FILE.json:IMAGES';
        'openimages:BOXES.csv:IMAGES' or 'openimages:FOLDER[:SPLIT]'; 'vg:FOLDER[:SPLIT]', Visual Genome, SPLIT a file
        SPLIT.txt of image ids or names; 'odinw:FOLDER:SET', see `odinw_part`; ArrayRecord files with boxes; or a folder
        of pictures with annotations.json (COCO's form; also instances_*.json, _annotations.coco.json), boxes.csv, or an
        .xml for each picture. Several of these, joined by '|', become one, see `MergedBoxSource`.
      split: 'train' or 'test': which part of a folder that has several (train, valid and test of Roboflow's exports,
        ImageSets/Main of VOC); '' for all, or the only one.
      check: what cannot be trained on (no boxes, boxes in another form) is among the problems instead of an error.

    Raises:
      UserError: if there is nothing of that name, it cannot be read, or has no boxes.
    """
    if "|" in spec:
        return MergedBoxSource(spec, [open_boxes(_unweighted(part), split, check) for part in spec.split("|")])
    kind, colon, _ = spec.partition(":")
    if colon and kind == "odinw":
        return open_odinw(spec, check, split)
    if colon and kind in BOX_KINDS:
        return BOX_KINDS[kind](spec, check)
    if spec and (paths := array_record_paths(spec)):
        return _open_records(paths, spec)
    if spec and epath.Path(spec).is_dir():
        return _open_folder(spec, split, check)
    if not spec or not epath.Path(spec).exists():
        kinds = ", ".join(f"{name}:" for name in BOX_KINDS)
        raise UserError(f"data source {spec!r} does not exist; use {kinds} or an existing path")
    if spec.lower().endswith(".json"):
        return open_coco(f"coco:{spec}", check)
    if spec.lower().endswith((".csv", ".tsv", ".txt")):
        return open_box_table(f"boxes:{spec}", check)
    raise UserError(f"data source {spec}: use COCO's .json, a .csv with {TABLE_HEADING}, or a folder")


def _unweighted(part: str) -> str:
    if re.search(r"\*[\d.]+$", part.strip()):
        raise UserError(f"data source {part!r}: sets of boxes are joined picture by picture, without a weight")
    return part.strip()


def _parts(spec: str, form: str) -> list[str]:
    """What follows the kind: one or two paths; a ':' before '//' belongs to a path."""
    parts = re.split(r":(?!//)", spec.partition(":")[2])
    if not all(parts) or len(parts) > 2:
        raise UserError(f"data source {spec!r}: write {form}")
    return parts


def open_coco(spec: str, check: bool = False) -> FileBoxSource:
    """'coco:FILE.json:IMAGES', or 'coco:FILE.json' with the pictures beside the file; see `open_boxes`.

    Also lvis: and objects365:, see `read_own_coco`.
    """
    return _open_file(spec, *_parts(spec, f"{spec.partition(':')[0]}:FILE.json:IMAGES"), check=check)


def open_box_table(spec: str, check: bool = False) -> FileBoxSource:
    """'boxes:FILE.csv:IMAGES', or 'boxes:FILE.csv' with the pictures beside the file; see `open_boxes`."""
    return _open_file(spec, *_parts(spec, "boxes:FILE.csv:IMAGES"), check=check)


def _open_file(spec: str, file: str, images: str = "", check: bool = False) -> FileBoxSource:
    """A .json or a table, with the pictures of a folder, or beside it."""
    if not epath.Path(file).exists() or epath.Path(file).is_dir():
        raise UserError(f"data source {spec}: there is no file {file}")
    is_table = spec.startswith("boxes:") or file.lower().endswith((".csv", ".tsv"))
    kind = spec.partition(":")[0]
    kind = kind if kind in ("lvis", "objects365") else "coco"
    table = read_box_table(file, Problems()) if is_table else read_own_coco(file, Problems(), kind)
    return finish_table(spec, table, images or os.path.dirname(file) or ".", os.path.basename(file), check)


def open_openimages(spec: str, check: bool = False) -> FileBoxSource:
    """'openimages:FOLDER[:SPLIT]', with the .csv files and the pictures, or 'openimages:BOXES.csv:IMAGES'."""
    place, *more = _parts(spec, "openimages:FOLDER, openimages:FOLDER:SPLIT or openimages:BOXES.csv:IMAGES")
    if not epath.Path(place).is_dir():
        if not epath.Path(place).exists():
            raise UserError(f"data source {spec}: there is no {place}")
        table = read_openimages_boxes(place, Problems())
        return finish_table(spec, table, more[0] if more else os.path.dirname(place), os.path.basename(place), check)
    listing = list_pictures(place)
    ending = f"{more[0] if more else ''}{OPENIMAGES_BOXES}"
    found = [name for name in listing.annotations if name.endswith(ending)]
    if len(found) != 1:
        known = [name for name in listing.annotations if name.endswith(OPENIMAGES_BOXES)]
        raise UserError(
            f"data source {spec}: it needs one file *{ending}, there are {some(known) or 'none'}: name its split, "
            "as in openimages:FOLDER:train, or the file, openimages:BOXES.csv:IMAGES"
        )
    table = read_openimages_boxes(os.path.join(place, found[0]), Problems())
    return finish_table(spec, table, place, found[0], check, listing)


def open_visual_genome(spec: str, check: bool = False) -> FileBoxSource:
    """'vg:FOLDER[:SPLIT]', see `read_visual_genome`; the pictures are anywhere below the folder."""
    folder, *split = _parts(spec, "vg:FOLDER or vg:FOLDER:SPLIT")
    if not epath.Path(folder).is_dir():
        raise UserError(f"data source {spec}: there is no folder {folder}")
    listing, problems, chosen = list_pictures(folder), Problems(), None
    if split:
        path = epath.Path(folder) / f"{split[0]}.txt"
        if not path.exists():
            raise UserError(f"data source {spec}: there is no {path} with a picture's id, or its file, a line")
        names = (line.split()[0].rpartition("/")[2] for line in path.read_text().splitlines() if line.strip())
        chosen = {int(stem) for name in names if (stem := os.path.splitext(name)[0]).isdecimal()}
    table = read_visual_genome(find_files(folder, sorted(listing.texts)), folder, problems, chosen)
    return finish_table(spec, table, folder, OBJECTS + (f", {split[0]}.txt" if split else ""), check, listing)


def open_odinw(spec: str, check: bool = False, split: str = "") -> FileBoxSource:
    """'odinw:FOLDER:SET[:PART[:glip]]', see `odinw_part`."""
    part = odinw_part(spec, split)
    return finish_table(spec, odinw_table(part), part.images, os.path.basename(part.path), check)


def open_voc(spec: str, check: bool = False) -> FileBoxSource:
    """'voc:FOLDER', or 'voc:FOLDER:SPLIT' with the pictures that ImageSets/Main/SPLIT.txt lists; see `open_boxes`."""
    folder, *split = _parts(spec, "voc:FOLDER or voc:FOLDER:SPLIT")
    if not epath.Path(folder).is_dir():
        raise UserError(f"data source {spec}: there is no folder {folder}")
    return _voc(spec, list_pictures(folder), split[0] if split else "", check)


def _voc(spec: str, listing: Listing, split: str, check: bool) -> FileBoxSource:
    folder, problems = listing.folder, Problems()
    wanted = _voc_split(spec, listing, split) if split else None
    pictures = {os.path.splitext(name.rpartition("/")[2])[0]: name for name in reversed(listing.pictures)}
    stems = {os.path.splitext(name.rpartition("/")[2])[0]: name for name in reversed(_xml_files(listing))}
    if not stems:
        raise UserError(f"data source {spec}: no .xml in {folder}; found: {listing.sentence()}")
    chosen = sorted(stems) if wanted is None else wanted
    files = {stems[stem]: pictures.get(stem, "") for stem in chosen if stem in stems}
    for stem in chosen:
        if stem not in stems:
            problems.add("no_annotation", stem, f"in ImageSets/Main/{split}.txt, but it has no .xml")
    text = f"{len(files):,} .xml" + (f" of ImageSets/Main/{split}.txt" if split else "")
    return finish_table(spec, read_voc(folder, files, problems), folder, text, check, listing)


def _xml_files(listing: Listing) -> list[str]:
    """The .xml files of a folder; where it has Annotations, those in there."""
    found = [name for name in listing.annotations if name.lower().endswith(".xml")]
    inside = [name for name in found if name.startswith("Annotations/")]
    return inside or found


def _voc_split(spec: str, listing: Listing, split: str) -> list[str]:
    path = epath.Path(listing.folder) / "ImageSets" / "Main" / f"{split}.txt"
    if not path.exists():
        known = sorted(_voc_splits(listing))
        raise UserError(f"data source {spec}: there is no {path}; splits there: {', '.join(known) or 'none'}")
    # Lists of one class have a second column, 1 where the class is there.
    names = (re.sub(r"\s+-?[01]$", "", line.strip()) for line in path.read_text().splitlines())
    return list(dict.fromkeys(filter(None, names)))


def _voc_splits(listing: Listing) -> set[str]:
    """Names of the splits that a VOC folder lists."""
    inside = (name for name in listing.texts if name.startswith("ImageSets/Main/") and name.endswith(".txt"))
    return {name.rpartition("/")[2].removesuffix(".txt") for name in inside}


# -- records ----------------------------------------------------------------------------------------------------------


def _open_records(paths: Sequence[str], spec: str) -> RecordBoxSource:
    """ArrayRecord files with boxes, whose classes are in classes.json beside them or in the folder above."""
    records = ArrayRecordSource(paths, spec)
    if not any("boxes" in record for record in records.sample(8)):
        raise UserError(
            f"data source {spec}: its records have no boxes; fields: {', '.join(records.summary['fields'])}"
        )
    folder = os.path.dirname(paths[0])
    places = [os.path.join(folder, CLASSES_FILE), os.path.join(os.path.dirname(folder), CLASSES_FILE)]
    path = next((place for place in places if epath.Path(place).exists()), None)
    if path is None:
        raise UserError(f"data source {spec}: {places[0]}, the names of its classes, is not there, nor {places[1]}")
    try:
        content = json.loads(epath.Path(path).read_bytes())
        names = [str(item["text"]) for item in content["classes"]]
        numbers = {name: k for k, name in enumerate(names)}
        parents = [
            [numbers[text] for text in item.get("parents", ()) if text in numbers] for item in content["classes"]
        ]
        looked_for = content.get("exhaustive")
        pictures = _stated_pictures(content, os.path.basename(folder), len(records))
        source = RecordBoxSource(records, names, {}, looked_for, parents, pictures)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} does not hold classes as curation.detection writes them ({first_line(error)})"
        ) from error
    says = f"{shown(spec)}: {len(records):,} pictures in records, {len(names):,} classes ({some(names)})"
    if looked_for is not None:
        sets = ", ".join(f"{len(ids):,} in all of {name}" for name, ids in sorted(looked_for.items()))
        says += f"; classes that were looked for: {sets or 'in no set all'}, else those that a picture names"
    if pictures is None:
        says += f"; {path} does not say in how many of these records a class has boxes"
    elif empty := [name for name, count in zip(names, pictures.tolist(), strict=True) if not count]:
        says += f"; without boxes: {some(empty)}"
        for name in empty:
            source.problems.add("no_boxes", name)
    source.summary |= {"folder": spec, "pictures": len(records), "texts": "records", "says": says}
    return source


def _stated_pictures(content: Mapping[str, Any], split: str, records: int) -> np.ndarray | None:
    """In how many pictures of a split each class has a box; None where the file does not say it of so many records."""
    if content.get("records", {}).get(split) != records:
        return None
    return np.array([item["pictures"][split] for item in content["classes"]], np.float64)


# -- folders ----------------------------------------------------------------------------------------------------------


def _open_folder(folder: str, split: str, check: bool) -> FileBoxSource:
    """A folder of pictures with boxes, of whatever form; says which was taken where it has several."""
    listing = list_pictures(folder)
    found = [(kind, names) for kind, names in _candidates(listing) if names]
    if not found:
        raise UserError(
            f"data source {folder}: no boxes found: needs {COCO_NAMES[0]} (COCO's form; also instances_*.json, "
            f"{COCO_NAMES[1]}), {TABLE_NAMES[0]} ({TABLE_HEADING}), or an .xml for each picture (Pascal VOC); YOLO's "
            f".txt are not read: export them as COCO. Found: {listing.sentence()}"
        )
    kind, names = found[0]
    if kind != ".xml":
        name = _only(folder, _of_part(folder, names, split))
        inner = name.rpartition("/")[0]
        here = any(picture.startswith(f"{inner}/") for picture in listing.pictures)
        images = os.path.join(folder, inner) if inner and here else folder
        source = _open_file(folder, os.path.join(folder, name), images, check)
    elif split and (splits := _voc_splits(listing)):
        source = _voc(folder, listing, _only(folder, _of_part(folder, sorted(splits), split)), check)
    else:
        source = _voc(folder, _restricted(listing, _of_part(folder, names, split)), "", check)
    if len(found) > 1:
        others = " and ".join(f"{len(names):,} {kind}" for kind, names in found[1:])
        source.summary["says"] += f"; {others} there are not read"
    return source


def box_parts(spec: str) -> frozenset[str]:
    """Which of 'train' and 'test' a folder keeps apart, as `open_boxes` takes them; () for any other source.

    Of several sources that are joined, those that one of them does.
    """
    if "|" in spec:
        return frozenset().union(*(box_parts(part.strip()) for part in spec.split("|")))
    if spec.startswith("odinw:"):
        return odinw_parts(spec)
    if not spec or spec.partition(":")[0] in BOX_KINDS or array_record_paths(spec) or not epath.Path(spec).is_dir():
        return frozenset()
    listing = list_pictures(spec)
    kind, names = next(((kind, names) for kind, names in _candidates(listing) if names), ("", []))
    parts = {_part_of(name) for name in (kind == ".xml" and _voc_splits(listing)) or names}
    return frozenset(name for name, known in (("train", {"train"}), ("test", {"test", "val"})) if parts & known)


def _candidates(listing: Listing) -> Iterator[tuple[str, list[str]]]:
    """Kinds of files and those that may hold boxes: by their names, else by what is in them; the best kind first."""
    jsons = [name for name in sorted(listing.texts) if name.lower().endswith(".json")]
    tables = [name for name in listing.annotations if name.lower().endswith(".csv")]
    known_jsons = [name for name in jsons if _is_coco(name.rpartition("/")[2].lower())]
    known_tables = [name for name in tables if name.rpartition("/")[2].lower() in TABLE_NAMES]
    yield ".json", known_jsons
    yield ".csv", known_tables
    yield ".xml", _xml_files(listing)
    if not known_jsons and len(jsons) <= LOOKED_INTO:
        yield ".json", [name for name in jsons if _looks_like_coco(os.path.join(listing.folder, name))]
    if not known_tables and len(tables) <= LOOKED_INTO:
        yield ".csv", [name for name in tables if is_box_table(os.path.join(listing.folder, name))]


def _is_coco(base: str) -> bool:
    return base in COCO_NAMES or (base.endswith(".json") and (".coco." in base or base.startswith("instances_")))


def _looks_like_coco(path: str) -> bool:
    """Whether a JSON file begins as those of COCO's form do, such as the result.json of Label Studio."""
    try:
        with epath.Path(path).open("rb") as file:
            begins = file.read(COCO_BYTES)
    except OSError:
        return False
    return begins.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and any(
        section in begins for section in (b'"images"', b'"annotations"', b'"categories"')
    )


def _part_of(name: str) -> str:
    """Which of `PARTS` a name is of, by its folders and then by its words; '' for none."""
    words = [*name.lower().split("/")[:-1], *re.split(r"[^a-z]+", name.lower().rpartition("/")[2])]
    return next((part for word in words for part, known in PARTS.items() if word in known), "")


def _of_part(folder: str, names: Sequence[str], split: str) -> list[str]:
    """The names that are of a split: of 'test' else of the validation part; all where there are no parts."""
    parts = [_part_of(name) for name in names]
    if not split or not any(parts):
        return list(names)
    wanted = "val" if split == "test" and "test" not in parts else split
    found = [name for name, part in zip(names, parts, strict=True) if part == wanted]
    if not found:
        raise UserError(f"data source {folder}: no part for {split!r} among {some(names)}: name the data itself")
    return found


def _only(folder: str, names: Sequence[str]) -> str:
    """Of several files of boxes the one that is meant. Raises UserError where that is not clear."""
    if len(names) > 1:
        raise UserError(
            f"data source {folder}: it has boxes in several files, {some(names)}: name one, such as "
            f"coco:{os.path.join(folder, names[0])}:{folder}, or the sub-folder"
        )
    return names[0]


def _restricted(listing: Listing, xmls: Sequence[str]) -> Listing:
    """The listing with these .xml files, and where they lie in folders of their own with the pictures of these."""
    if len(xmls) == len(_xml_files(listing)):
        return listing
    tops = tuple({f"{name.split('/')[0]}/" for name in xmls})
    pictures = [name for name in listing.pictures if name.startswith(tops)]
    return dataclasses.replace(listing, pictures=pictures, annotations=list(xmls))


BOX_KINDS: dict[str, Callable[..., BoxSource]] = {
    "coco": open_coco,
    "voc": open_voc,
    "boxes": open_box_table,
    "scenes": Scenes,
    "lvis": open_coco,
    "objects365": open_coco,
    "openimages": open_openimages,
    "vg": open_visual_genome,
    "odinw": open_odinw,
}
