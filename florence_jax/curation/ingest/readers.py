"""What `inputs` needs to know of each format: field names, grouping of tar members, tables and files beside images."""

import dataclasses
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from florence_jax.data.sources.fields import CAPTION_FIELDS, FILE_FIELDS, IMAGE_FIELDS, LISTS, captions_or_classes
from florence_jax.data.sources.picture_files import SYSTEM_FOLDERS, known_suffixes, list_pictures
from florence_jax.data.sources.tables import TABLES
from florence_jax.errors import UserError
from florence_jax.files import TableRow, filesystem

# Names of fields in data sets people have, the first that a record has wins; compared in lower case. Those of pictures
# and captions are in `data.sources.fields`.
KEYS = ("key", "uid", "sample_id", "id")
# Samples of a tar that wait for the rest of their members, and bytes that they hold.
SAMPLES_WAITING, BYTES_WAITING = 65_536, 1 << 28
URLS = ("url", "image_url")
LICENCES = ("licence", "license")
HEADERS = ("headers", "response_headers", "x_robots_tag")  # all that a record has count
# What tells 'name: value' from a value of X-Robots-Tag, in which a crawler's name may come first ('googlebot: noai').
RESPONSE_HEADERS = frozenset(
    "accept-ranges age alt-svc cache-control connection content-disposition content-encoding content-language "
    "content-length content-location content-range content-security-policy content-type content-usage date etag "
    "expires keep-alive last-modified link location nel p3p pragma referrer-policy report-to retry-after server "
    "server-timing set-cookie strict-transport-security tdm-policy tdm-reservation timing-allow-origin "
    "transfer-encoding upgrade vary via warning x-robots-tag".split()
)


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
    left = {name.strip().lower(): value for name, value in fields.items() if name}

    def take(names: Iterable[str]) -> Any:
        return next((left.pop(name) for name in names if left.get(name) is not None), None)

    locator = None
    given_key = take(KEYS)
    # A number, or text under 'bytes', is about the picture: most often its size.
    kinds = {name: bytes if name == "bytes" else (bytes, str, Mapping) for name in IMAGE_FIELDS}
    image, path = next((left.pop(name) for name, kind in kinds.items() if isinstance(left.get(name), kind)), None), None
    if isinstance(image, Mapping):  # as Hugging Face data sets have them
        image, path = image.get("bytes"), image.get("path")
        if isinstance(image, bytes):  # the path is then only a name, often the same in every row
            path = None
    if isinstance(image, str):
        image, path = None, image
    path = path or take(FILE_FIELDS)
    if image is None and isinstance(path, str) and not problem:
        image, locator, problem = _read_image(path, folder, max_bytes)
    if isinstance(image, bytes) and len(image) > max_bytes:
        image, problem = None, "too_many_bytes"
    captions, headers = captions_or_classes(left), []
    take(CAPTION_FIELDS)
    for name in LISTS:
        left.pop(name, None)
    for name in HEADERS:
        headers += _header_lines(left.pop(name, None), name == "x_robots_tag")
    return {
        "key": _text(given_key if given_key is not None else path if isinstance(path, str) else key) or key,
        "image": image if isinstance(image, bytes) else b"",
        "caption": captions[0] if captions else "",
        "captions": captions,
        "fields": list(fields),
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


def _header_lines(value: Any, tag: bool) -> list[str]:
    """Header lines from a text or list of lines, a mapping, (name, value) pairs, or JSON of these.

    Args:
      value: of a field; a value inside it may be a list. Text without the name of a response header, and lines without
        a colon, are values of X-Robots-Tag.
      tag: whether the field is X-Robots-Tag: any line without the name of a response header is then such a value.
    """
    if isinstance(value, (str, bytes)):
        text = _text(value)
        try:
            value = json.loads(text)
        except ValueError:
            lines = text.splitlines()
            return _named(lines, tag or not any(map(_response_header, lines)))
        if isinstance(value, str):
            return _header_lines(value, tag)
    if isinstance(value, Mapping):
        value = list(value.items())
    return [line for item in value for line in _item_lines(item, tag)] if isinstance(value, (list, tuple)) else []


def _item_lines(item: Any, tag: bool) -> list[str]:
    """Header lines of an item of a list: a line, or a pair, as which pyarrow gives the entries of a map."""
    if isinstance(item, (str, bytes)):
        return _named(_text(item).splitlines(), tag)
    if isinstance(item, (list, tuple)) and len(item) == 2 and ":" not in (name := _text(item[0])) and name:
        values = item[1] if isinstance(item[1], (list, tuple)) else [item[1]]
        lines = [line for value in values for line in _text(value).splitlines()]
        return [f"{name.replace('_', '-')}: {line}" for line in lines]
    return _header_lines(item, tag)


def _named(lines: Iterable[str], tag: bool) -> list[str]:
    """Lines with a name; `tag`: a line without the name of a response header is a value of X-Robots-Tag."""
    found = []
    for line in lines:
        given = _response_header(line) or (":" in line and not tag)
        if line.strip() and not line.startswith("HTTP/"):
            found.append(line if given else f"X-Robots-Tag: {line}")
    return found


def _response_header(line: str) -> bool:
    name, colon, _ = line.partition(":")
    return bool(colon) and name.strip().lower() in RESPONSE_HEADERS


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


_Given = tuple[str, dict[str, Any], tuple[int, int] | None, str]  # see `tar_samples`


@dataclasses.dataclass
class _Sample:
    """Members of a tar that share a name; `image` is not read yet where that can be done later."""

    key: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    image: tarfile.TarInfo | None = None
    problem: str = ""
    described: bool = False  # has a .txt or a .json
    in_one_piece: bool = True
    held: int = 0  # bytes

    @property
    def is_whole(self) -> bool:
        return self.in_one_piece and self.described and (self.image is not None or bool(self.problem))


def tar_samples(file: BinaryIO, max_bytes: int, plain: bool, name: str) -> Iterator[_Given]:
    """(key, fields, (offset, size) of the image, problem) of each sample.

    A sample is the members whose names are the same up to the first dot. One that came in one piece, with a picture and
    a .txt or .json, is given when the next begins; another waits for the rest, at most until SAMPLES_WAITING samples or
    BYTES_WAITING wait. What systems put beside the members (`._NAME`, PaxHeaders, ...) is passed over.

    Args:
      file: of the tar; one that can seek, if it is not compressed.
      max_bytes: a larger image is not read.
      plain: whether the tar is not compressed: its members are then read in one piece each, pictures when their sample
        is given.
      name: of the tar, for messages.

    Raises:
      UserError: for a part of a sample that comes after the sample was given.
      tarfile.TarError (an Exception of its own), OSError: where the tar is damaged; all before has been given.
    """
    waiting = _Waiting(file, plain)
    last = ""
    try:
        with tarfile.open(fileobj=file, mode="r:" if plain else "r|*") as tar:
            for member in tar:
                if not member.isfile() or _is_of_a_system(member.name):
                    continue
                key, suffix = _key_and_suffix(member.name)
                if key != last:
                    yield from waiting.give_whole(last)
                    waiting.go_on(key)
                last = key
                if not _is_used(suffix):
                    continue
                if waiting.is_late(key) and suffix in ("txt", "json"):
                    raise UserError(_not_adjacent(name, key))
                waiting.add(key, suffix, tar, member, max_bytes)
                yield from waiting.give_too_many()
            # tarfile takes a header that it cannot read for the end.
            if plain and _block_at(tar) != bytes(tarfile.BLOCKSIZE):
                raise OSError(f"no mark of the end after {last}: damaged or cut short")
    except (OSError, EOFError, tarfile.TarError, zlib.error):
        yield from waiting.give_all()
        raise
    yield from waiting.give_all()


class _Waiting:
    """The samples of a tar that are not given yet.

    Args:
      file, plain: as in `tar_samples`.
    """

    def __init__(self, file: BinaryIO, plain: bool):
        self._file, self._plain, self._held = file, plain, 0
        self._samples: dict[str, _Sample] = {}
        self._given: set[str] = set()

    def go_on(self, key: str) -> None:
        """Another sample begins, or one that waits goes on."""
        if key in self._samples:
            self._samples[key].in_one_piece = False

    def is_late(self, key: str) -> bool:
        """Whether the sample was given."""
        return key in self._given and key not in self._samples

    def add(self, key: str, suffix: str, tar: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int) -> None:
        """A member, to a new sample where none of that name waits."""
        sample = self._samples.setdefault(key, _Sample(key))
        before = sample.held
        _add_member(sample, suffix, tar, member, max_bytes, self._plain)
        self._held += sample.held - before

    def give_whole(self, key: str) -> Iterator[_Given]:
        """The sample, if it can be given."""
        if key in self._samples and self._samples[key].is_whole:
            yield self._give(key)

    def give_too_many(self) -> Iterator[_Given]:
        """The oldest, while too many wait."""
        while len(self._samples) > SAMPLES_WAITING or (self._held > BYTES_WAITING and len(self._samples) > 1):
            yield self._give(next(iter(self._samples)))

    def give_all(self) -> Iterator[_Given]:
        """All, in the order in which they began."""
        while self._samples:
            yield self._give(next(iter(self._samples)))

    def _give(self, key: str) -> _Given:
        sample = self._samples.pop(key)
        self._given.add(key)
        self._held -= sample.held
        image, place = sample.image, None
        if image is not None:
            place = image.offset_data, image.size
            if self._plain:
                sample.fields["image"] = _read_at(self._file, image)
        return key, sample.fields, place, sample.problem


def _is_of_a_system(name: str) -> bool:
    """Whether a member is what macOS or a tar program adds: `._NAME`, hidden files, PaxHeaders, __MACOSX."""
    *folders, base = name.split("/")
    return base.startswith(".") or any(part in SYSTEM_FOLDERS or part.startswith("PaxHeader") for part in folders)


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}".lstrip("./"), suffix.lower()


def _is_used(suffix: str) -> bool:
    return suffix in ("txt", "json") or suffix in IMAGE_FIELDS or f".{suffix}" in known_suffixes()


def _add_member(
    sample: _Sample, suffix: str, tar: tarfile.TarFile, member: tarfile.TarInfo, max_bytes: int, plain: bool
) -> None:
    if suffix in ("txt", "json"):
        data = _content(tar, member, plain)
        sample.described = True
        sample.held += len(data)
        sample.fields = sample.fields | {"caption": data} if suffix == "txt" else _json_fields(data) | sample.fields
    elif member.size > max_bytes:
        sample.problem = "too_many_bytes"
    else:
        sample.image = member
        if not plain:
            sample.fields["image"] = _content(tar, member, plain)
            sample.held += member.size


def _not_adjacent(name: str, key: str) -> str:
    return (
        f"{name}: the members of a sample are not adjacent: a part of {key!r} comes after its picture and text, or "
        f"more than {SAMPLES_WAITING:,} samples ({BYTES_WAITING >> 20} MB, where it is compressed) after the rest. "
        f"Sort it: mkdir unpacked && tar -xf {name} -C unpacked && tar --sort=name -cf sorted.tar -C unpacked ."
    )


def _block_at(tar: tarfile.TarFile) -> bytes:
    tar.fileobj.seek(tar.offset)
    return tar.fileobj.read(tarfile.BLOCKSIZE)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, plain: bool) -> bytes:
    if plain:
        return _read_at(tar.fileobj, member)
    data = tar.extractfile(member).read()
    if len(data) != member.size:
        raise OSError(f"{member.name} is cut short")
    return data


def _read_at(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """As `measure.image_bytes` will read it."""
    file.seek(member.offset_data)
    data = file.read(member.size)
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
    """The table of captions of a folder, where it has one."""
    fs, inner = filesystem(folder)
    return [f"{folder.rstrip('/')}/{name}" for name in TABLES if fs.exists(f"{inner.rstrip('/')}/{name}")][:1]


def row_picture(row: TableRow) -> Any:
    """The file that a row of a table is about; the place of the row if it names none."""
    left = _lowered(row)
    return next((left[name] for name in ("image", *FILE_FIELDS) if isinstance(left.get(name), str)), row.at)


def row_captions(rows: Iterable[TableRow]) -> list[str]:
    """The different captions of rows."""
    return list(dict.fromkeys(text for row in rows for text in captions_or_classes(_lowered(row))))


def _lowered(row: TableRow) -> dict[str, Any]:
    return {name.strip().lower(): value for name, value in row.fields.items() if name}


def folder_rows(folder: str, short: str, caption: str = "") -> Iterator[dict[str, Any]]:
    """Fields of each image file of a folder; the caption is `caption`, or in a .txt or .json of the same name.

    `short` stands for the folder in keys.
    """
    listing = list_pictures(folder, deep=False)
    fs, inner = filesystem(folder)
    for name in listing.pictures:
        stem = os.path.splitext(name)[0]
        fields = _json_fields(fs.cat_file(f"{inner}/{stem}.json")) if f"{stem}.json" in listing.texts else {}
        if caption:
            fields["caption"] = caption
        elif f"{stem}.txt" in listing.texts:
            fields["caption"] = fs.cat_file(f"{inner}/{stem}.txt")
        yield fields | {"key": f"{short}/{name}", "image_path": name}
