"""Files here and in buckets: whole or not at all, JSON, tables of text, listings, digests."""

import codecs
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import fsspec

from florence_jax.errors import UserError

# What a store needs beside fsspec.
STORE_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
    "abfs": "adlfs",
    "az": "adlfs",
}


def json_digest(value: Any) -> str:
    """32 hexadecimal digits that stand for a JSON-like value."""
    data = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()[:32]


def join(folder: str, *names: str) -> str:
    """Path of a file in a local folder or under a URL."""
    return "/".join([folder.rstrip("/"), *names])


def filesystem(path: str | os.PathLike) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
      UserError: if fsspec does not know the protocol, or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(os.fspath(path))
    except (ImportError, ValueError) as error:
        package = STORE_PACKAGES.get(os.fspath(path).partition("://")[0])
        fix = f"; pip install {package}" if package else f" (known: {', '.join(f'{p}://' for p in STORE_PACKAGES)})"
        raise UserError(f"cannot open {path}: {error}{fix}") from error


def with_home(arguments: Sequence[str] | None) -> list[str]:
    """Arguments of a command (None: of this program) with the home folder for '~', also behind '=', '|', ':' and '@'.

    A shell does that at the beginning of a word only, not in '--init=~/run'.
    """
    given = sys.argv[1:] if arguments is None else arguments
    home = os.path.expanduser("~")
    return [re.sub(r"(^|[=|:@])~(?=/|$)", lambda match: match[1] + home, word) for word in given]


def check_store(path: str, pages: bool = False) -> None:
    """Raises UserError for a URL of a store that cannot be reached; without `pages` also for one of a web page."""
    if not pages and path.startswith(("http://", "https://")):
        raise UserError(f"cannot open {path}: download it first, and give the local path")
    fs, inner = filesystem(path)
    try:
        fs.exists(inner)
    except Exception as error:  # the packages of the stores have types of their own
        raise UserError(f"cannot reach {path}: {str(error) or type(error).__name__}") from error


def expand_braces(path: str) -> list[str]:
    """The names that '{000..009}' (numbers, as wide as the first) or '{a,b}' in a path stand for."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", path)
    if match is None:
        return [path]
    first, last, names = match.groups()
    parts = names.split(",") if names else (f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    return [whole for part in parts for whole in expand_braces(path[: match.start()] + part + path[match.end() :])]


def exists(path: str) -> bool:
    """Whether a file is there."""
    fs, inner = filesystem(path)
    return fs.exists(inner)


def read_bytes(path: str | os.PathLike, offset: int = 0, size: int = -1) -> bytes:
    """A whole file, or `size` bytes of it from `offset` on. Raises OSError."""
    fs, inner = filesystem(path)
    if size < 0 and not offset:
        return fs.cat_file(inner)
    return fs.cat_file(inner, start=offset, end=None if size < 0 else offset + size)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """A local file to fill: when the block ends it gets its name in one step, and if the block fails nothing is left.

    On a local disk the temporary file ('.NAME.HEX.tmp') lies beside the result and is renamed; elsewhere it is uploaded
    whole.
    """
    fs, inner = filesystem(path)
    local = isinstance(fs, fsspec.implementations.local.LocalFileSystem)
    folder = os.path.dirname(inner) if local else tempfile.mkdtemp()
    try:
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{os.path.basename(inner)}.{uuid.uuid4().hex}.tmp")
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            if local:
                os.replace(temporary, inner)
            else:
                fs.makedirs(os.path.dirname(inner), exist_ok=True)
                fs.put_file(temporary, inner)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
    finally:
        if not local:
            shutil.rmtree(folder, ignore_errors=True)


def write_file(path: str | os.PathLike, write: Callable[[str], None]) -> tuple[int, str]:
    """Lets `write` fill the file of `replacing`.

    Returns:
      Size in bytes and sha256 (hexadecimal) of the file.
    """
    with replacing(path) as temporary:
        write(temporary)
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    return size, digest


def write_bytes(path: str | os.PathLike, data: bytes) -> tuple[int, str]:
    """Writes a file in one step; returns its size and sha256."""

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(data)

    return write_file(path, write)


def write_text(path: str | os.PathLike, text: str) -> tuple[int, str]:
    """Writes UTF-8 in one step, with '?' for lone surrogates (as names of files can hold); returns size and sha256."""
    return write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: str | os.PathLike, value: Any) -> tuple[int, str]:
    """Writes indented JSON in one step; returns size and sha256. What is not UTF-8 in names of files is escaped."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    return write_bytes(path, text.encode("utf-8", "backslashreplace"))


def read_json(path: str | os.PathLike) -> Any | None:
    """The content of a JSON file; None if it is not there."""
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError:
        return None


def list_files(folder: str, suffix: str) -> list[str]:
    """Names of the finished files of a folder with that suffix, sorted; [] if there is no folder."""
    fs, inner = filesystem(folder)
    if not fs.exists(inner):
        return []
    names = (os.path.basename(path) for path in fs.ls(inner, detail=False))
    return sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))


# -- tables of text ---------------------------------------------------------------------------------------------------


# Between cells: the one that the heading has most of; a tab before all others.
DELIMITERS = ("\t", ",", ";", "|")
DELIMITED = (".csv", ".tsv", ".txt")  # ends of names of tables with a heading
AS_UTF8 = "save the file as UTF-8, as does, where it is Latin-1, iconv -f LATIN1 -t UTF-8 OLD > NEW"
MANY_BREAKS = 3  # line breaks in one cell; more are suspicious
_PICTURE_NAME = re.compile(r"\S*\.(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|hei[cf]|ppm)", re.IGNORECASE)


def csv_bytes(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A CSV file with a heading, in UTF-8; names of files that are not UTF-8 keep their bytes."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(heading)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


class TableRow(NamedTuple):
    """A row of a CSV or JSON-lines file.

    Attributes:
      line: number of its (last) line, from 1; within the part that is read.
      at: the byte of the file where it begins.
      fields: its values by the names of their columns; those at the end of a short row are missing.
    """

    line: int
    at: int
    fields: dict[str, Any]


class _Lines:
    """The lines of a text; `at`: the byte of the file where the next one begins."""

    def __init__(self, text: io.TextIOWrapper, at: int):
        self._text, self.at = text, at

    def __iter__(self) -> Iterator[str]:
        for line in self._text:
            self.at += len(line.encode())
            yield line


@contextlib.contextmanager
def _open_lines(path: str | os.PathLike, start: int, stop: int, newline: str) -> Iterator[_Lines]:
    """A whole file line by line, or the bytes from `start` to `stop`, which are read at once."""
    if start or stop >= 0:
        binary = io.BytesIO(read_bytes(path, start, stop - start if stop >= 0 else -1))
    else:
        fs, inner = filesystem(path)
        binary = fs.open(inner, "rb")
    with binary:
        marked = binary.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        if not marked:
            binary.seek(0)
        yield _Lines(io.TextIOWrapper(binary, "utf-8", newline=newline), start + marked * len(codecs.BOM_UTF8))


def csv_cells(
    path: str | os.PathLike, start: int = 0, stop: int = -1, delimiter: str = ","
) -> Iterator[tuple[int, int, list[str]]]:
    """(line, first byte, cells) of the rows of a CSV file, a heading among them; empty lines are left out.

    Args:
      path: of the file.
      start, stop: bytes at which rows begin; 0 and -1 for the whole file, of which one line is in memory at a time.
      delimiter: between cells.

    Raises:
      UserError: if it cannot be read, or is not UTF-8 with this delimiter.
    """
    line = 0
    try:
        with _open_lines(path, start, stop, newline="") as lines:
            # Flickr30k's table has a blank behind each bar.
            reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=delimiter == "|")
            at = lines.at
            for cells in reader:
                line = reader.line_num
                if cells:
                    yield line, at, cells
                at = lines.at
    except UnicodeDecodeError as error:
        raise _not_utf8(path, start) from error
    except csv.Error as error:
        where = f"line {line + 1}" if not start else f"line {line + 1} after byte {start}"
        raise UserError(
            f"cannot read {path}: {where}: {error}; it must be {_separated(delimiter)} UTF-8, a text with quotes, line "
            "breaks or such marks inside quotes, and its own quotes doubled"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _not_utf8(path: str | os.PathLike, start: int) -> UserError:
    """The error of a text file, with its first line from byte `start` on that is not UTF-8.

    What decodes a file a block at a time fails before it has come to that line.
    """
    fs, inner = filesystem(path)
    number, text = 0, ""
    with fs.open(inner, "rb") as file:
        file.seek(start)
        for line in file:
            number += 1
            try:
                line.decode()
            except UnicodeDecodeError:
                text = line.decode(errors="backslashreplace").strip()
                break
    where = f"line {number}" if not start else f"line {number} after byte {start}"
    return UserError(f"cannot read {path}: {where} is not UTF-8 ({text[:80]}); {AS_UTF8}")


def _separated(delimiter: str) -> str:
    return {",": "comma-separated", "\t": "tab-separated"}.get(delimiter, f"{delimiter!r}-separated")


def table_rows(path: str | os.PathLike, start: int = 0, stop: int = -1) -> Iterator[TableRow]:
    """The rows of a table with a heading (.csv, .tsv, .txt), or of a file with a JSON object a line.

    What is between the cells of a row is seen from the heading, see `DELIMITERS`.

    Args:
      path: of the file.
      start, stop: as in `csv_cells`.

    Raises:
      UserError: if it cannot be read, is not UTF-8, or a row has more cells than the heading, or is no JSON object;
        for a quoted text that goes on over rows of its own, as a stray quote makes it.
    """
    return (_csv_rows if os.fspath(path).lower().endswith(DELIMITED) else _json_rows)(path, start, stop)


def _csv_rows(path: str | os.PathLike, start: int, stop: int) -> Iterator[TableRow]:
    delimiter = delimiter_of(path)
    rows = csv_cells(path, start, stop, delimiter)
    _, _, heading = next(csv_cells(path, delimiter=delimiter) if start else rows, (0, 0, []))
    heading = [name.strip() for name in heading]
    for line, at, cells in rows:
        where = f"the row at byte {at}" if start else f"line {line}"
        if any(cell.strip() for cell in cells[len(heading) :]):
            raise UserError(
                f"cannot read {path}: {where} has more cells than the heading ({delimiter.join(cells)[:100]}): quote "
                f"texts with {delimiter!r}"
            )
        if len(heading) > 1 and (swallowed := next(filter(None, (_row_inside(c, delimiter) for c in cells)), None)):
            raise UserError(
                f"cannot read {path}: the row that ends in {where} has a text in quotes that goes on over what look "
                f"like rows of their own, such as {swallowed[:80]!r}: is there a stray quote? It must be doubled"
            )
        yield TableRow(line, at, dict(zip(heading, cells, strict=False)))


def delimiter_of(path: str | os.PathLike) -> str:
    """What is between the cells of a table's heading, see `DELIMITERS`."""
    try:
        with _open_lines(path, 0, -1, newline="") as lines:
            heading = next(iter(lines), "")
    except (OSError, UnicodeDecodeError):  # told by the one who reads the rows
        return ","
    return "\t" if "\t" in heading else max(DELIMITERS[1:], key=heading.count)


def _row_inside(cell: str, delimiter: str) -> str | None:
    """The first line of a cell, after its first, that has several cells, one of them the name of a picture."""
    if "\n" not in cell:
        return None
    lines = (line for line in cell.splitlines()[1:] if delimiter in line)
    return next((line for line in lines if any(map(_PICTURE_NAME.fullmatch, line.split(delimiter)))), None)


def has_many_lines(fields: Mapping[str, Any]) -> bool:
    """Whether a text in a row has more line breaks than captions have, as a stray quote makes it."""
    return any(isinstance(value, str) and value.count("\n") > MANY_BREAKS for value in fields.values())


def _json_rows(path: str | os.PathLike, start: int, stop: int) -> Iterator[TableRow]:
    number = 0
    try:
        with _open_lines(path, start, stop, newline="\n") as lines:
            at = lines.at
            for number, line in enumerate(lines, 1):
                if line.strip():
                    fields = json.loads(line)
                    if not isinstance(fields, dict):
                        raise ValueError("not a JSON object")
                    yield TableRow(number, at, fields)
                at = lines.at
    except UnicodeDecodeError as error:
        raise _not_utf8(path, start) from error
    except ValueError as error:
        raise UserError(f"cannot read {path}: line {number}: {error}; it must have one JSON object a line") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
