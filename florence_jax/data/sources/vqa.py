"""Sets of questions about pictures that people have, as sources."""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from etils import epath

from florence_jax.data.question_files import (
    GQA_FIELDS,
    NLVR2_CLASSES,
    SNLI_VE_CLASSES,
    PictureFiles,
    read_easy_vqa,
    read_json_questions,
    read_nlvr2,
    read_own_questions,
    read_snli_ve,
    read_vqa,
)
from florence_jax.data.question_table import QuestionTable
from florence_jax.data.records import BaseSource, Record, picture_bytes, scattered
from florence_jax.data.sources.picture_files import list_pictures, quoted, shown
from florence_jax.errors import UserError

MOST_COMPARED = 20_000  # pictures of one's own that are compared with each other
OWN_QUESTIONS = ("questions.jsonl", "questions.csv", "questions.tsv")


class QuestionSource(BaseSource):
    """Questions with their pictures.

    A record has "key", "image" (bytes), or "images" where a question is about several, "image_id", "question",
    "question_id", "question_type", and where they are known "answers" and "answer_type".

    Args:
      name: for messages.
      table: of the questions. folder: of the pictures.
      summary: what was found.
      class_names: of sets whose questions have one of a few classes ("class_id").
    """

    def __init__(
        self, name: str, table: QuestionTable, folder: str, summary: dict[str, Any], class_names: Sequence[str] = ()
    ):
        self.name, self.summary, self.class_names = name, summary, tuple(class_names)
        self._table, self._folder = table, folder

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:
        record, files = self._table.record(index), self._table.files[index]
        pictures = [picture_bytes(os.path.join(self._folder, file), record["key"]) for file in files]
        return record | ({"image": pictures[0]} if len(pictures) == 1 else {"images": pictures})

    def metadata(self) -> Iterator[Record]:
        """All records without their pictures, which are not touched."""
        return map(self._table.record, range(len(self)))

    @property
    def image_ids(self) -> Sequence[Any]:
        """Of each question."""
        return self._table.image_ids

    def described(self, index: int) -> Record:
        """See `records.described`; no picture is touched."""
        return self._table.record(index)

    def sample(self, count: int) -> list[Record]:
        """See `records.sample_of`; no picture is touched."""
        return list(map(self.described, scattered(len(self), count).tolist()))


def open_own_questions(spec: str) -> QuestionSource:
    """A folder with questions.jsonl, or such a table itself; see `question_files.read_own_questions`."""
    path = spec
    if epath.Path(spec).is_dir():
        path = next((os.path.join(spec, name) for name in OWN_QUESTIONS if (epath.Path(spec) / name).exists()), "")
        if not path:
            raise UserError(
                f"data source {spec}: it has no {OWN_QUESTIONS[0]} with lines of image, question and answer"
            )
    folder, table = os.path.dirname(path) or ".", read_own_questions(path)
    leave_out_missing(table, folder)
    join_same_pictures(table, folder)
    return finish_questions(spec, table, folder, os.path.basename(path))


def is_questions(spec: str) -> bool:
    """Whether it is a folder with a table of questions, or such a table by its name."""
    base = spec.rstrip("/").rpartition("/")[2]
    names = [spec] if base in OWN_QUESTIONS else [os.path.join(spec, name) for name in OWN_QUESTIONS]
    return any(epath.Path(name).exists() for name in names)


def open_vqa(spec: str) -> QuestionSource:
    """'vqa:QUESTIONS.json:ANNOTATIONS.json:IMAGES', VQA v2's own files; without ANNOTATIONS.json a test set.

    The pictures are known by the number at the end of their names, as COCO_val2014_000000000042.jpg.
    """
    form = "vqa:QUESTIONS.json:ANNOTATIONS.json:IMAGES, or vqa:QUESTIONS.json:IMAGES for a test set"
    parts = _parts(spec, (2, 3), form)
    questions, annotations, images = parts[0], parts[1] if len(parts) == 3 else "", parts[-1]
    table = read_vqa(_file(spec, questions), annotations and _file(spec, annotations), _pictures(spec, images))
    return finish_questions(spec, table, images, questions)


def open_easy_vqa(spec: str) -> QuestionSource:
    """'easy_vqa:SPLIT' of the installed package easy-vqa, or 'easy_vqa:FOLDER:SPLIT'; SPLIT is train or test."""
    *folders, split = _parts(spec, (1, 2), "easy_vqa:train, easy_vqa:test or easy_vqa:FOLDER:SPLIT")
    if folders:
        folder = folders[0]
    else:
        package = importlib.util.find_spec("easy_vqa")
        if package is None or not package.submodule_search_locations:
            raise UserError(f"data source {spec}: the package is not installed: pip install easy-vqa")
        folder = os.path.join(package.submodule_search_locations[0], "data")
    known = [name for name in ("train", "test") if (epath.Path(folder) / name / "questions.json").exists()]
    if split not in known:
        raise UserError(
            f"data source {spec}: {folder} has no {split}/questions.json; splits there: {', '.join(known) or 'none'}"
        )
    images = os.path.join(folder, split, "images")
    table = read_easy_vqa(os.path.join(folder, split, "questions.json"), _pictures(spec, images))
    return finish_questions(spec, table, images, f"{split}/questions.json")


def open_gqa(spec: str) -> QuestionSource:
    """'gqa:FILE.json:IMAGES[:question=NAME,image=NAME,answer=NAME,id=NAME,type=NAME]': GQA's questions, or such JSON.

    Names of fields that are not given are GQA's, see `question_files.read_json_questions`.
    """
    form = f"gqa:FILE.json:IMAGES, or gqa:FILE.json:IMAGES:question=q,image=img with any of {', '.join(GQA_FIELDS)}"
    path, images, *mapping = _parts(spec, (2, 3), form)
    fields = dict(GQA_FIELDS)
    for pair in mapping[0].split(",") if mapping else ():
        name, _, place = (text.strip() for text in pair.partition("="))
        if name not in GQA_FIELDS or not place:
            raise UserError(f"data source {spec!r}: {pair!r} names no field; write {form}")
        fields[name] = place
    return finish_questions(spec, read_json_questions(_file(spec, path), _pictures(spec, images), fields), images, path)


def open_nlvr2(spec: str) -> QuestionSource:
    """'nlvr2:FILE.json:IMAGES', NLVR2's lines; its pictures, two a sentence, are anywhere below IMAGES."""
    path, images = _parts(spec, (2,), "nlvr2:FILE.json:IMAGES")
    table = read_nlvr2(_file(spec, path), _pictures(spec, images))
    return finish_questions(spec, table, images, path, NLVR2_CLASSES)


def open_snli_ve(spec: str) -> QuestionSource:
    """'snli_ve:FILE.jsonl:IMAGES', SNLI-VE's lines and Flickr30k's pictures."""
    path, images = _parts(spec, (2,), "snli_ve:FILE.jsonl:IMAGES")
    table = read_snli_ve(_file(spec, path), _pictures(spec, images))
    return finish_questions(spec, table, images, path, SNLI_VE_CLASSES)


def _parts(spec: str, counts: Sequence[int], form: str) -> list[str]:
    """What follows the kind; a ':' before '//' belongs to a path. Raises UserError for another number of parts."""
    parts = re.split(r":(?!//)", spec.partition(":")[2])
    if len(parts) not in counts or not all(parts):
        raise UserError(f"data source {spec!r}: write {form}")
    return parts


def _file(spec: str, path: str) -> str:
    if not epath.Path(path).exists() or epath.Path(path).is_dir():
        raise UserError(f"data source {spec}: there is no file {path}")
    return path


def _pictures(spec: str, folder: str) -> PictureFiles:
    if not epath.Path(folder).is_dir():
        raise UserError(f"data source {spec}: there is no folder {folder} of pictures")
    return PictureFiles(list_pictures(folder).pictures)


def finish_questions(
    spec: str, table: QuestionTable, folder: str, text: str, class_names: Sequence[str] = ()
) -> QuestionSource:
    """The source of a table; says what there is.

    Args:
      spec: for messages. table: of the questions. folder: of the pictures. text: of what it was read.
      class_names: see `QuestionSource`.

    Raises:
      UserError: if there is no question.
    """
    if not len(table):
        raise UserError(f"data source {spec}: no question of {text} can be used{table.said()}")
    pictures = len(set(table.files))
    answered = sum(map(bool, table.answers))
    said = f"{len(table):,} questions about {pictures:,} pictures"
    if answered < len(table):
        said += f", {len(table) - answered:,} of them without an answer" if answered else ", without answers"
    says = f"{shown(spec)}: {said}, such as {quoted(table.questions[0])}{table.said()}"
    summary = {"folder": folder, "questions": len(table), "pictures": pictures, "answered": answered, "says": says}
    return QuestionSource(spec, table, folder, summary, class_names)


def leave_out_missing(table: QuestionTable, folder: str) -> None:
    """Leaves out the questions whose picture is not in a folder; in a bucket, where looking takes long, none."""
    if "://" in folder:
        return
    wanted = {file for files in table.files for file in files}
    there = set(list_pictures(folder).pictures)
    missing = {file for file in wanted - there if not os.path.isfile(os.path.join(folder, file))}
    keep = np.array([missing.isdisjoint(files) for files in table.files], bool)
    for row in np.flatnonzero(~keep).tolist():
        table.wrong("no_picture", next(file for file in table.files[row] if file in missing))
    table.kept(keep)


def join_same_pictures(table: QuestionTable, folder: str) -> None:
    """Gives pictures that are the same file twice one image_id; of at most `MOST_COMPARED`, none in a bucket.

    Only files of equal sizes are read.
    """
    files = list(dict.fromkeys(file for files in table.files for file in files))
    if "://" in folder or len(files) > MOST_COMPARED:
        return
    sizes: dict[int, list[str]] = {}
    for file in files:
        sizes.setdefault(os.path.getsize(os.path.join(folder, file)), []).append(file)
    first: dict[bytes, str] = {}
    same = {}
    for file in (file for alike in sizes.values() if len(alike) > 1 for file in alike):
        digest = blake2b(picture_bytes(os.path.join(folder, file)), digest_size=16).digest()
        if first.setdefault(digest, file) != file:
            same[file] = first[digest]
            table.wrong("same_picture", f"{file} is {first[digest]}")
    table.image_ids = [same.get(image, image) for image in table.image_ids]


# How a set is opened whose name begins with 'KIND:'.
QUESTION_KINDS: dict[str, Callable[[str], QuestionSource]] = {
    "vqa": open_vqa,
    "easy_vqa": open_easy_vqa,
    "gqa": open_gqa,
    "nlvr2": open_nlvr2,
    "snli_ve": open_snli_ve,
}
