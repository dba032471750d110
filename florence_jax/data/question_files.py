"""Readers of questions about pictures in the files that people have, into a `QuestionTable`."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from florence_jax.data.question_table import QuestionTable
from florence_jax.errors import UserError
from florence_jax.files import table_rows

IMAGE_NAMES = ("image", "img", "image_path", "path", "file", "file_name", "filename", "image_file")
ID_NAMES = ("question_id", "id", "qid")
TYPE_NAMES = ("question_type", "type")


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
        table.add((file,), file, question, number, answers, **kinds)
    if not table.questions:
        raise UserError(f"{path} has no questions{table.said()}")
    table.check_ids(path)
    return table


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
        if value.strip().startswith("[") and value.strip().endswith("]"):
            try:
                return answer_texts(json.loads(value), where)
            except ValueError:
                pass  # a text in brackets
        return [value] if value.strip() else []
    if isinstance(value, Mapping) and "answer" in value:
        return answer_texts(value["answer"], where)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [text for item in value for text in answer_texts(item, where)]
    raise UserError(f"{where}: its answers must be texts, not {str(value)[:60]!r}")
