"""Readers of questions about pictures in the files that people have, into a `QuestionTable`."""

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from florence_jax.data.json_stream import json_items, json_members
from florence_jax.data.question_table import QuestionTable
from florence_jax.errors import UserError
from florence_jax.files import table_rows

IMAGE_NAMES = ("image", "img", "image_path", "path", "file", "file_name", "filename", "image_file")
ID_NAMES = ("question_id", "id", "qid")
TYPE_NAMES = ("question_type", "type")
GQA_FIELDS = {  # what is wanted -> where GQA's files have it
    "question": "question",
    "answer": "answer",
    "image": "imageId",
    "id": "questionId",
    "type": "types.structural",
}
NLVR2_CLASSES = ("false", "true")
SNLI_VE_CLASSES = ("contradiction", "neutral", "entailment")  # as METER numbers them


class PictureFiles:
    """The files of a folder by what sets of questions call them.

    Args:
      names: of the files, relative to the folder.
    """

    def __init__(self, names: Iterable[str]):
        self._names: dict[str, str] = {}
        self._numbers: dict[int, str] = {}
        self.same_number: list[str] = []
        for name in names:
            base = name.rpartition("/")[2]
            stem = os.path.splitext(base)[0]
            for known in (name, base, stem):
                self._names.setdefault(known, name)
            if number := re.search(r"\d+$", stem):
                if self._numbers.setdefault(int(number[0]), name) != name:
                    self.same_number.append(name)

    def named(self, name: Any) -> str:
        """The file with a name: its path in the folder, its own name, or that without a suffix; '' for none."""
        text = str(name).strip()
        return self._names.get(text) or self._names.get(text.rpartition("/")[2], "")

    def numbered(self, number: Any) -> str:
        """The file whose name ends in a number, as in COCO_train2014_000000000042.jpg; '' for none."""
        return self._numbers.get(int(number), "") if str(number).strip().isdecimal() else ""


def read_own_questions(path: str) -> QuestionTable:
    """Lines of "image" (a file, relative to the table's folder), "question", and "answer" or "answers".

    Also read: "question_id", else the number of the line; "type"; "answer_type". A .csv or .tsv with these columns is
    read too.

    Raises:
      UserError: for a line without an image or a question, or as `files.table_rows`.
    """
    table = QuestionTable()
    for row in table_rows(path):
        fields = {str(name).strip().lower(): value for name, value in row.fields.items() if value is not None}
        where = f"{path} line {row.line}"
        image = next((fields[name] for name in IMAGE_NAMES if fields.get(name)), None)
        if not isinstance(image, str):
            raise UserError(f"{where}: its 'image' must name a file; it has {', '.join(fields) or 'nothing'}")
        question = fields.get("question")
        if not isinstance(question, str):
            raise UserError(f"{where}: its 'question' must be a text; it has {', '.join(fields) or 'nothing'}")
        number = next((fields[name] for name in ID_NAMES if fields.get(name) not in (None, "")), row.line)
        answers = answer_texts(fields.get("answers", fields.get("answer")), where)
        kinds = {"question_type": next((str(fields[name]) for name in TYPE_NAMES if fields.get(name)), "")}
        if fields.get("answer_type"):
            kinds["answer_type"] = str(fields["answer_type"])
        file = os.path.normpath(image.strip())
        table.add((file,), file, question, number, answers, kinds)
    if not table.questions:
        raise UserError(f"{path} has no questions{table.said()}")
    table.check_ids(path)
    return table


class _Annotation(NamedTuple):
    answers: tuple[str, ...]
    fields: Mapping[str, str]


def read_vqa(questions: str, annotations: str, pictures: PictureFiles) -> QuestionTable:
    """VQA v2's own files (and v1's): questions, and annotations, '' for a test set.

    Raises:
      UserError: for files of another form, or of which nothing fits together.
    """
    known = _read_annotations(annotations) if annotations else {}
    table, listed, total = QuestionTable(), set(), 0
    for item in _items(questions, "questions", ("question_id", "image_id", "question")):
        total += 1
        number = str(item["question_id"])
        annotation = known.get(number)
        if annotations and annotation is None:
            table.wrong("no_annotation", number)
            continue
        listed.add(number)
        if not (file := pictures.numbered(item["image_id"])):
            table.wrong("no_picture", item["image_id"])
            continue
        answers, fields = annotation or _Annotation((), {})
        table.add((file,), item["image_id"], str(item["question"]), item["question_id"], answers, fields)
    if known and not listed:
        raise UserError(
            f"none of the {total:,} questions of {questions} has an annotation in {annotations}, whose first is of "
            f"question {next(iter(known))}: are they files of one split?"
        )
    for number in known.keys() - listed if len(known) > len(listed) else ():
        table.wrong("unknown_annotation", number)
    for name in pictures.same_number:
        table.wrong("same_number", name)
    table.check_ids(questions)
    return table


def _read_annotations(path: str) -> dict[str, _Annotation]:
    known, shared = {}, {}
    for item in _items(path, "annotations", ("question_id", "answers")):
        fields = {name: sys.intern(str(item[name])) for name in ("question_type", "answer_type") if item.get(name)}
        if item.get("multiple_choice_answer"):
            fields["answer"] = sys.intern(str(item["multiple_choice_answer"]))
        where = f"{path}, question {item['question_id']}"
        answers = tuple(map(sys.intern, answer_texts(item["answers"], where)))
        fields = shared.setdefault(tuple(fields.items()), fields)
        known[str(item["question_id"])] = _Annotation(answers, fields)
    return known


def _items(path: str, section: str, needed: Sequence[str]) -> Iterable[Mapping[str, Any]]:
    """The objects of a list in a JSON file. Raises UserError where there are none, or one lacks a field."""
    found = 0
    for name, item in json_items(path):
        if name != section:
            continue
        if missing := [field for field in needed if not isinstance(item, dict) or field not in item]:
            raise UserError(f"{path}: {section}[{found}] has no {missing[0]!r}")
        found += 1
        yield item
    if not found:
        raise UserError(f"{path} has no list {section!r}: it is no file of VQA's {section}")


def read_easy_vqa(path: str, pictures: PictureFiles) -> QuestionTable:
    """questions.json of the package easy-vqa: a list of [question, answer, number of the picture]."""
    table = QuestionTable()
    for row, item in enumerate(json_members(path)):
        try:
            question, answer, image = item[1]
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: item {row} is no [question, answer, image]: {str(item[1])[:60]}") from error
        if file := pictures.numbered(image):
            table.add((file,), image, question, row, answer_texts(answer, f"{path}, item {row}"))
        else:
            table.wrong("no_picture", image)
    return table


def read_json_questions(path: str, pictures: PictureFiles, fields: Mapping[str, str] = GQA_FIELDS) -> QuestionTable:
    """JSON of questions as GQA has it: an object of id -> question, or a list of questions.

    Args:
      path: the file. pictures: where the pictures are, whose names (without a suffix too) the questions have.
      fields: of `GQA_FIELDS`, what is wanted -> the name of the field that has it; with '.' a field inside a field.

    Raises:
      UserError: for a question without its text, its picture or an id.
    """
    table = QuestionTable()
    for row, (name, item) in enumerate(json_members(path)):
        where = f"{path}, question {name or row}"
        found = {wanted: _field(item, place) for wanted, place in fields.items()}
        number = found.get("id") if found.get("id") is not None else name or row
        for wanted in ("question", "image"):
            if found.get(wanted) is None:
                there = ", ".join(item) if isinstance(item, dict) else type(item).__name__
                raise UserError(
                    f"{where}: it has no {fields[wanted]!r}, only {there}; say where it is, such as {wanted}=NAME"
                )
        if file := pictures.named(found["image"]) or pictures.numbered(found["image"]):
            kinds = {"question_type": str(found["type"])} if found.get("type") else {}
            answers = answer_texts(found.get("answer"), where)
            table.add((file,), found["image"], str(found["question"]), number, answers, kinds)
        else:
            table.wrong("no_picture", found["image"])
    table.check_ids(path)
    return table


def _field(item: Any, place: str) -> Any:
    """What is at 'a.b' in nested objects; None where there is nothing."""
    for name in place.split("."):
        item = item.get(name) if isinstance(item, dict) else None
    return item


def read_nlvr2(path: str, pictures: PictureFiles) -> QuestionTable:
    """Lines of NLVR2 (Suhr et al. 2019): a sentence that is true or false of two pictures."""
    table = QuestionTable()
    for row in table_rows(path):
        where, fields = f"{path} line {row.line}", row.fields
        identifier, label = str(fields.get("identifier", "")), str(fields.get("label", "")).lower()
        if not identifier or "sentence" not in fields or label not in ("", *NLVR2_CLASSES):
            raise UserError(f"{where}: a line of NLVR2 has an identifier, a sentence and a label, True or False")
        pair = identifier.rpartition("-")[0]
        files = [pictures.named(f"{pair}-img{side}.png") or pictures.named(f"{pair}-img{side}") for side in (0, 1)]
        if not all(files):
            table.wrong("no_picture", pair)
            continue
        more: dict[str, Any] = {"question_type": "nlvr2"}
        more |= {"class_id": NLVR2_CLASSES.index(label)} if label else {}
        parts = identifier.split("-")  # split, set, pair, sentence: those of one sentence are judged together
        more["sentence_id"] = "-".join((*parts[:2], *parts[3:]))
        sentence = str(fields["sentence"])
        table.add(files, pair, sentence, identifier, [label] * bool(label), more)
    table.check_ids(path)
    return table


def read_snli_ve(path: str, pictures: PictureFiles) -> QuestionTable:
    """Lines of SNLI-VE (Xie et al. 2019): does a picture entail or contradict a sentence, or neither?

    "question" is the sentence (the hypothesis), "premise" the caption that people saw instead of the picture.
    """
    table = QuestionTable()
    for row in table_rows(path):
        where, fields = f"{path} line {row.line}", row.fields
        image = fields.get("Flickr30K_ID", fields.get("Flickr30kID"))
        label = str(fields.get("gold_label", ""))
        if image is None or "sentence2" not in fields or label not in ("", "-", *SNLI_VE_CLASSES):
            raise UserError(f"{where}: a line of SNLI-VE has Flickr30K_ID, sentence2 and gold_label")
        number = fields.get("pairID", row.line)
        if label == "-":
            table.wrong("no_label", number)
        elif file := pictures.named(image):
            more: dict[str, Any] = {"question_type": "snli_ve"}
            more |= {"premise": fields["sentence1"]} if fields.get("sentence1") else {}
            more |= {"class_id": SNLI_VE_CLASSES.index(label)} if label else {}
            answers = [label] * bool(label)
            table.add((file,), str(image), str(fields["sentence2"]), number, answers, more)
        else:
            table.wrong("no_picture", image)
    table.check_ids(path)
    return table


def _listed(text: str) -> list[Any] | None:
    """The list that a text is, as JSON writes it; None for another text, also one in brackets."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def answer_texts(value: Any, where: str) -> list[str]:
    """The answers in a field: a text, a number, yes or no, an object with "answer", or a list of these; [] for none.

    Raises:
      UserError: for anything else.
    """
    if value is None:
        return []
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, (int, float)):
        return [f"{value:g}" if isinstance(value, float) else str(value)]
    if isinstance(value, str):
        listed = _listed(value.strip())
        if listed is not None:
            return answer_texts(listed, where)
        return [value] if value.strip() else []
    if isinstance(value, Mapping) and "answer" in value:
        return answer_texts(value["answer"], where)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [text for item in value for text in answer_texts(item, where)]
    raise UserError(f"{where}: its answers must be texts, not {str(value)[:60]!r}")
