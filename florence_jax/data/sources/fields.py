"""Which fields of foreign tables and records name the picture and its captions, for training and curation alike."""

import ast
import json
from collections.abc import Iterable, Mapping
from typing import Any

from florence_jax.data.records import Source, sample_of
from florence_jax.data.sources.picture_files import quoted, shown

# Names in data sets people have, compared in lower case; the first that a record has wins.
FILE_FIELDS = (
    "image_path path filepath file_path file file_name filename image_name image_file image_filename img_path"
).split()
IMAGE_FIELDS = "image jpg jpeg png webp gif bmp tif tiff img image_bytes bytes".split()
CAPTION_FIELDS = "caption text txt title alt alt_text captions texts sentences description comment".split()
LISTS = ("captions", "texts", "sentences")  # hold further captions beside one
# A class is the caption where a table has no other, as the name of a sub-folder is; the last holds several.
CLASS_FIELDS = "label class class_name classname category labels".split()
RECORDS_LOOKED_AT = 8
_INSIDE = ("raw", "caption", "text", "sentence")  # where a caption that is an object has its text


def caption_texts(value: Any) -> list[str]:
    """The captions in a field: a text, a list of texts, or such a list as JSON or Python text; blank ones left out.

    What a list holds may be objects with the text inside ("raw", "caption", "text", "sentence"), as COCO's and
    Karpathy's files have it.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        listed = _listed(value)
        return [value] if listed is None and value.strip() else listed or []
    if isinstance(value, Mapping):
        return next((texts for name in _INSIDE if (texts := caption_texts(value.get(name)))), [])
    if isinstance(value, int) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, (list, tuple)) or hasattr(value, "tolist"):
        return [text for item in (value if isinstance(value, (list, tuple)) else value.tolist()) for text in _one(item)]
    return []


def _one(item: Any) -> list[str]:
    """Of an item of a list, in which a text in brackets is a text."""
    return ([item] if item.strip() else []) if isinstance(item, str) else caption_texts(item)


def _listed(text: str) -> list[str] | None:
    """The texts of a list that is written as text ('["a", "b"]', as a CSV file has it); None for any other text."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(stripped)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return [item for item in value if item.strip()]
    return None


def distinct_captions(fields: Mapping[str, Any]) -> list[str]:
    """The captions of a record whose names are in lower case: of its first caption field, then of its lists."""
    first = next((fields[name] for name in CAPTION_FIELDS if fields.get(name) is not None), None)
    return list(dict.fromkeys(text for value in (first, *map(fields.get, LISTS)) for text in caption_texts(value)))


def captions_or_classes(fields: Mapping[str, Any]) -> list[str]:
    """As `distinct_captions`; of a record without such fields the text of its class, or of its classes: no number."""
    if not fields.keys().isdisjoint((*CAPTION_FIELDS, *LISTS)):
        return distinct_captions(fields)
    return caption_texts(next((fields[name] for name in CLASS_FIELDS if isinstance(fields.get(name), (str, list))), ""))


def known_field(names: Iterable[str], known: Iterable[str]) -> str | None:
    """The first of the `known` names that is among `names`, as it is written there."""
    given = {name.strip().lower(): name for name in names}
    return next((given[name] for name in known if name in given), None)


def known_names(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Those of `names` that are `known`, as they are written there."""
    return [name for name in names if name.strip().lower() in known]


def records_summary(source: Source, files: int | None = None) -> dict[str, Any]:
    """What a source of records says it found, as `FolderSource.summary`; a few records are read."""
    records = sample_of(source, RECORDS_LOOKED_AT)
    captions = [text for record in records for text in distinct_captions(record)]
    fields = sorted({name for record in records for name in record})
    head = f"{shown(source.name)}: " + (f"{files:,} files, " if files else "") + f"{len(source):,} records"
    found = f"{len(set(captions)):,} distinct captions, such as {quoted(captions[0])}" if captions else "no caption"
    return {
        "folder": source.name,
        "files": files,
        "pictures": len(source),
        "texts": "records",
        "distinct": None,
        "example": captions[0] if captions else "",
        "passed_over": {},
        "fields": fields,
        "says": f"{head}; of {len(records)} looked at {found}; fields: {', '.join(fields)}",
    }
