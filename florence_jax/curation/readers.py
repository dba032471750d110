"""What `inputs` needs to know of each format: field names, grouping of tar members, tables and files beside images."""

import csv
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from florence_jax.curation.table import filesystem, read_bytes
from florence_jax.data.sources import IMAGE_SUFFIXES
from florence_jax.errors import UserError

# Names of fields in data sets people have, the first that a record has wins; compared in lower case.
KEYS = ("key", "uid", "sample_id", "id")
IMAGES = ("image", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "image_bytes", "bytes")
PATHS = ("image_path", "path", "filepath", "file", "file_name", "filename")
CAPTIONS = ("caption", "text", "txt", "title", "alt", "alt_text")
URLS = ("url", "image_url")
LICENCES = ("licence", "license")
HEADERS = ("headers", "response_headers", "x_robots_tag")
TABLES = ("captions.csv", "metadata.csv", "metadata.jsonl")


def image_suffix(path: str) -> bool:
    """Whether the name is that of an image file."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def make_pair(
    fields: Mapping[str, Any], source: str, key: str, folder: str, max_bytes: int, problem: str = ""
) -> dict[str, Any]:
    """A raw pair (see `inputs`) from the fields of one record.

    Args:
      fields: as the file has them.
      source: name of the source.
      key: for a record without one.
      folder: that relative image paths start from.
      max_bytes: a larger image is not kept.
      problem: why there can be no image, if that is known.
    """
    left = {name.lower(): value for name, value in fields.items()}

    def take(names: tuple[str, ...]) -> Any:
        return next((left.pop(name) for name in names if left.get(name) is not None), None)

    locator = None
    given_key = take(KEYS)
    image, path = take(IMAGES), None
    if isinstance(image, Mapping):  # as Hugging Face data sets have them
        image, path = image.get("bytes"), image.get("path")
    if isinstance(image, str):
        image, path = None, image
    path = path or take(PATHS)
    if image is None and isinstance(path, str) and not problem:
        image, locator, problem = _read_image(path, folder, max_bytes)
    if isinstance(image, bytes) and len(image) > max_bytes:
        image, problem = None, "too_many_bytes"
    caption, headers = _text(take(CAPTIONS)), _header_lines(take(HEADERS))
    return {
        "key": _text(given_key if given_key is not None else path if isinstance(path, str) else key) or key,
        "image": image if isinstance(image, bytes) else b"",
        "caption": caption,
        "source": source,
        "url": _text(take(URLS)),
        "licence": _text(take(LICENCES)),
        "headers": headers,
        "extra": {name: value for name, value in left.items() if _plain(value)},
        "locator": locator,
        "problem": problem or ("" if isinstance(image, bytes) and image else "missing"),
    }


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else ""


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, (str, int, float))


def _header_lines(value: Any) -> list[str]:
    """Header lines from a list, a mapping, JSON of either, or the value of X-Robots-Tag."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            names_a_header = ":" in value and value.partition(":")[0].strip().lower() == "x-robots-tag"
            value = [value] if names_a_header else [f"X-Robots-Tag: {value}"] if value.strip() else []
    if isinstance(value, Mapping):
        value = [f"{name}: {line}" for name, line in value.items()]
    return [_text(line) for line in value] if isinstance(value, (list, tuple)) else []


def _read_image(path: str, folder: str, max_bytes: int) -> tuple[bytes | None, tuple | None, str]:
    full = path if "://" in path or os.path.isabs(path) else f"{folder}/{path}"
    if full.startswith(("http://", "https://")):
        return None, None, "missing"  # a link, not data: downloading is img2dataset's work
    try:
        fs, inner = filesystem(full)
        if (size := fs.size(inner)) is not None and size > max_bytes:
            return None, None, "too_many_bytes"
        data = fs.cat_file(inner)
    except FileNotFoundError:
        return None, None, "missing"
    except (OSError, ValueError):
        return None, None, "unreadable"
    return data, (full, 0, len(data)), ""


# -- tars -------------------------------------------------------------------------------------------------------------


def tar_samples(
    file: BinaryIO, max_bytes: int, plain: bool
) -> Iterator[tuple[str, dict[str, Any], tuple[int, int] | None, str]]:
    """(key, fields, (offset, size) of the image, problem) of each sample.

    A sample is a run of members whose names are the same up to the first dot.

    Args:
      file: of the tar; one that can seek, if it is not compressed.
      max_bytes: a larger image is not read.
      plain: whether the tar is not compressed: its members are then read in one piece each.

    Raises:
      tarfile.TarError (an Exception of its own), OSError: where the tar is damaged.
    """
    key, fields, place, problem = "", {}, None, ""
    with tarfile.open(fileobj=file, mode="r:" if plain else "r|*") as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            member_key, suffix = f"{folder}/{stem}".lstrip("./"), suffix.lower()
            if member_key != key and fields:
                yield key, fields, place, problem
                fields, place, problem = {}, None, ""
            key = member_key
            if suffix in IMAGES:
                place = member.offset_data, member.size
                if member.size > max_bytes:
                    problem = "too_many_bytes"
                else:
                    fields["image"] = _content(tar, member, plain)
            elif suffix == "txt":
                fields["caption"] = _content(tar, member, plain)
            elif suffix == "json":
                fields = _json_fields(_content(tar, member, plain)) | fields
        if fields:
            yield key, fields, place, problem
        # tarfile takes a header that it cannot read for the end.
        if plain and _block_at(tar) != bytes(tarfile.BLOCKSIZE):
            raise OSError(f"no mark of the end after {key}: damaged or cut short")


def _block_at(tar: tarfile.TarFile) -> bytes:
    tar.fileobj.seek(tar.offset)
    return tar.fileobj.read(tarfile.BLOCKSIZE)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, plain: bool) -> bytes:
    if plain:  # as `measure.image_bytes` will read it
        tar.fileobj.seek(member.offset_data)
        data = tar.fileobj.read(member.size)
    else:
        data = tar.extractfile(member).read()
    if len(data) != member.size:
        raise OSError(f"{member.name} is cut short")
    return data


def _json_fields(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}  # the picture and caption.txt beside it may still be good
    return (
        {name: field for name, field in value.items() if name not in ("key", "image")}
        if isinstance(value, dict)
        else {}
    )


# -- folders ----------------------------------------------------------------------------------------------------------


def folder_tables(folder: str) -> list[str]:
    """captions.csv, metadata.csv or metadata.jsonl of a folder: paths of those it has."""
    fs, inner = filesystem(folder)
    return [f"{folder.rstrip('/')}/{name}" for name in TABLES if fs.exists(f"{inner.rstrip('/')}/{name}")][:1]


def read_table_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a csv or jsonl file.

    Raises:
      UserError: if it is not comma-separated UTF-8 with a heading, or not one JSON object a line.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
        if path.endswith(".csv"):
            for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
                yield {name: value for name, value in row.items() if isinstance(name, str)}
            return
        for line in text.split("\n"):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a line is not a JSON object")
                yield row
    except (ValueError, csv.Error, OSError) as error:
        raise UserError(f"cannot read {path}: {error}; it must be comma-separated UTF-8, or JSON lines") from error


def folder_rows(folder: str) -> Iterator[dict[str, Any]]:
    """Fields of each image file of a folder; the caption is in a .txt or .json of the same name, else ''."""
    fs, inner = filesystem(folder)
    files = sorted(path for path in fs.ls(inner, detail=False) if fs.isfile(path))
    known = set(files)
    for file in files:
        if not image_suffix(file):
            continue
        stem = file.rpartition(".")[0]
        fields = _json_fields(fs.cat_file(f"{stem}.json")) if f"{stem}.json" in known else {}
        if f"{stem}.txt" in known:
            fields["caption"] = fs.cat_file(f"{stem}.txt")
        name = os.path.basename(file)
        yield fields | {"key": f"{os.path.basename(inner.rstrip('/'))}/{name}", "image_path": name}
