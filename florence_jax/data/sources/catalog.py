"""Where records come from: the embedded emoji set, ArrayRecord files, TFDS, folders of images with captions.

A record is a dict: "key" (str, unique in its source), "image" (encoded bytes), "caption" (str), and further text fields
(str or list of str).
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from etils import epath

from florence_jax.data.records import Source
from florence_jax.data.sources.action_sets import VIDEO_KINDS
from florence_jax.data.sources.array_record import ArrayRecordSource, array_record_paths
from florence_jax.data.sources.caption_lists import open_caption_list
from florence_jax.data.sources.detection import BOX_KINDS
from florence_jax.data.sources.embedded import open_emoji
from florence_jax.data.sources.folder import FolderSource, open_folder, open_table
from florence_jax.data.sources.image_list import ImageList
from florence_jax.data.sources.karpathy import open_karpathy
from florence_jax.data.sources.picture_files import is_picture, list_pictures
from florence_jax.data.sources.scene_questions import SceneCaptions, SceneQuestions
from florence_jax.data.sources.scene_statements import SceneEntailment, ScenePairs
from florence_jax.data.sources.tables import PARQUET, TABLE_SUFFIXES, curation_command
from florence_jax.data.sources.tfds import open_tfds
from florence_jax.data.sources.vqa import QUESTION_KINDS, is_questions, open_own_questions
from florence_jax.errors import UserError
from florence_jax.files import check_store, expand_braces, filesystem

TARS = (".tar", ".tar.gz", ".tgz")


def open_source(spec: str) -> Source:
    """Opens a source by name.

    Args:
      spec: 'emoji:train' | 'emoji:new_style' | 'emoji:new_names'; a file, glob pattern or folder of `*.array_record`
        (also `*.array_record-00000-of-00010`); 'tfds:NAME:SPLIT'; 'karpathy:FILE.json:SPLIT@IMAGES';
        'captions:FILE:IMAGES', see `caption_lists.open_caption_list`; a table of images (.csv, .tsv, .jsonl, or
        .parquet with their paths, also several .parquet by a pattern or their folder); or a folder of images with a
        table called captions or metadata (columns file and caption, or file_name and text), with a .txt or .json beside
        each, or else with one sub-folder a class.
        Boxes: 'coco:FILE.json:IMAGES', 'voc:FOLDER:SPLIT', 'boxes:FILE.csv:IMAGES', and 'scenes:SPLIT', see
        `detection.open_boxes`. Pictures to look at: 'images:FILE.json:IMAGES', see `ImageList`. Questions: a folder
        with questions.jsonl, that file, 'scene_questions:SPLIT', and those of `vqa.QUESTION_KINDS`; captions of what is
        true, 'scene_captions:SPLIT'.

    Raises:
      UserError: if it does not exist, is empty, lacks a column, is of an unknown kind, or must be curated first.
    """
    kind, colon, _ = spec.partition(":")
    if colon and kind in KINDS:
        return KINDS[kind](spec)
    if "://" in spec:
        check_store(spec)
    paths = array_record_paths(spec)
    if paths:
        return ArrayRecordSource(paths, spec)
    if is_questions(spec):
        return open_own_questions(spec)
    if epath.Path(spec).is_dir():
        return open_folder(spec)
    if spec.lower().endswith((*TABLE_SUFFIXES, ".txt")) and epath.Path(spec).exists():
        return open_table(spec)
    found = _matches(spec) if spec.lower().endswith((*TARS, PARQUET)) else []
    if found and spec.lower().endswith(PARQUET) and len({os.path.dirname(name) for name in found}) == 1:
        return open_table(spec, found)
    if found:
        raise UserError(
            f"data source {spec}: records must be read one by one, which these files do not allow. Turn them into "
            f"ArrayRecord files: {curation_command(spec)}"
        )
    if epath.Path(spec).exists():
        raise UserError(f"data source {spec}: unknown kind of file; use *.array_record, a table (.csv) or a folder")
    if re.match(r"\w\w+:(?!//)", spec):
        raise UserError(f"data source {spec!r}: unknown kind; use a path or one of {', '.join(f'{k}:' for k in KINDS)}")
    raise UserError(f"data source {spec!r} does not exist; use emoji:train, tfds:NAME:SPLIT or an existing path")


def _matches(spec: str) -> list[str]:
    """The files that a name, a pattern or a name with braces stands for, sorted."""
    fs, inner = filesystem(spec)
    names = expand_braces(inner)
    found = {file for name in names for file in (fs.glob(name) if any(c in name for c in "*?[") else [name])}
    there = sorted(file for file in found if fs.exists(file))
    if "://" in spec:
        return [fs.unstrip_protocol(file) for file in there]
    return there if os.path.isabs(spec) else [os.path.relpath(file) for file in there]


def open_mixture(spec: str) -> tuple[list[Source], list[float]]:
    """Opens sources joined by '|', see `split_mixture`.

    Returns:
      The sources and their weights; the weights are the shares of each batch up to a factor.

    Raises:
      UserError: as `split_mixture` and `open_source` do.
    """
    parts = split_mixture(spec)
    return [open_source(name) for name, _ in parts], [weight for _, weight in parts]


def split_mixture(spec: str) -> list[tuple[str, float]]:
    """(source, weight) of sources joined by '|', each with an optional '*weight' (default 1).

    As in 'emoji:train*2|gs://b/pairs'. A pattern that ends in a star and digits needs its weight said: 'pairs-*00*1'.

    Raises:
      UserError: for a weight that is not positive.
    """
    parts = []
    for part in spec.split("|"):
        match = re.fullmatch(r"(.+?)(?:\*(-?\d[\d.eE+-]*))?", part.strip())
        if not match:
            raise UserError(f"data {spec!r} has an empty source; write SOURCE or SOURCE*WEIGHT, joined by '|'")
        try:
            weight = float(match[2] or 1)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise UserError(f"data source {part.strip()!r}: the weight after '*' must be a positive number")
        parts.append((match[1], weight))
    return parts


# How a source is opened whose name begins with 'KIND:'. Anything else is a path.
KINDS: dict[str, Callable[[str], Source]] = {
    "emoji": open_emoji,
    "tfds": open_tfds,
    "karpathy": open_karpathy,
    "captions": open_caption_list,
    "images": ImageList,
    **BOX_KINDS,
    **VIDEO_KINDS,
    "scene_questions": SceneQuestions,
    "scene_captions": SceneCaptions,
    "scene_pairs": ScenePairs,
    "scene_entailment": SceneEntailment,
    **QUESTION_KINDS,
}


def open_pictures(spec: str) -> Source:
    """Pictures to be looked at, whether they have captions or not.

    Args:
      spec: a folder, whose image files are taken at any depth, sorted; one image file; or a source by its name.

    Raises:
      UserError: for a folder without images, or as `open_source`.
    """
    path = Path(spec)
    if path.is_file() and not array_record_paths(spec) and is_picture(path):
        return FolderSource(str(path.parent), [{"key": path.name, "caption": ""}])
    if not is_picture_folder(spec):
        return open_source(spec)
    listing = list_pictures(path)
    if not listing.pictures:
        raise UserError(f"no pictures in {listing.sentence()}")
    rows = [{"key": key, "caption": ""} for key in listing.pictures]
    passed_over = listing.not_pictures()
    says = listing.sentence()
    return FolderSource(str(path), rows, {"pictures": len(rows), "passed_over": passed_over, "says": says})


def is_picture_folder(spec: str) -> bool:
    """Whether it is a folder of files, not of records."""
    return Path(spec).is_dir() and not array_record_paths(spec)
