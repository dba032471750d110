"""Which files of a folder are pictures: one listing for every command, and what it passed over.

A picture is what Pillow opens. A known suffix is believed; where it is unknown or missing, the first bytes of the file
decide. Sub-folders are searched at any depth, links to folders are followed, each real folder once. Hidden files, and
what systems leave behind, are passed over.
"""

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem
from PIL import Image, features

from florence_jax.errors import UserError
from florence_jax.files import filesystem
from florence_jax.pictures import HEIF_INSTALL, has_heif, is_heif, register_heif

PICTURE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .jpx .tga".split()
)
AVIF_SUFFIXES = frozenset((".avif", ".avifs"))
HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
TEXT_SUFFIXES = (".txt", ".json")  # beside a picture: its caption
BOX_SUFFIXES = (".xml", ".csv")
# Known to be something else, and therefore not looked into.
OTHER_SUFFIXES = frozenset(
    ".csv .tsv .jsonl .xml .yaml .yml .toml .ini .cfg .md .rst .html .htm .css .js .log .url .lnk .py .ipynb .sh .m "
    ".mat .npy .npz .pt .pth .safetensors .ckpt .bin .pkl .h5 .hdf5 .parquet .arrow .feather .tfrecord .array_record "
    ".meta .tar .gz .tgz .bz2 .xz .zip .7z .rar .pdf .doc .docx .xls .xlsx .ppt .pptx .eps .ps .svg .svgz .db .sqlite "
    ".lock .mp3 .wav .flac .ogg .m4a .part .tmp .crdownload .download".split()
)
VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .avi .divx .mkv .webm .mpg .mpeg .m2v .vob .ts .mts .m2ts .flv .f4v .wmv .asf .ogv .3gp .mxf .h264 "
    ".264 .h265 .265 .hevc".split()
)
STUB_FORMATS = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))  # Pillow knows them and cannot read them alone
SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
PREFIX_BYTES = 64  # of a file, enough for every format
HIDDEN, NOT_A_FILE, UNREADABLE = "hidden", "not a file", "unreadable"
NAMES_SHOWN = 8  # names in a sentence


@dataclasses.dataclass
class Listing:
    """What a folder holds. Names are relative to it, with '/'.

    Attributes:
      folder: path or URL.
      pictures: sorted.
      videos: sorted, the files with a suffix of videos; they are in `passed_over` too.
      texts: the .txt and .json files.
      annotations: sorted, the .xml and .csv files, which may hold boxes; they are in `passed_over` too.
      folders: those searched below it, in the order of the search.
      left: folders that were not searched, each with the reason.
      files: how many were seen; those in `left` are not.
      passed_over: how many files are no pictures, by suffix or reason; without `texts`.
    """

    folder: str
    pictures: list[str] = dataclasses.field(default_factory=list)
    videos: list[str] = dataclasses.field(default_factory=list)
    texts: set[str] = dataclasses.field(default_factory=set)
    annotations: list[str] = dataclasses.field(default_factory=list)
    folders: list[str] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)
    files: int = 0
    passed_over: Counter[str] = dataclasses.field(default_factory=Counter)

    def not_pictures(self, used: Iterable[str] = ()) -> dict[str, int]:
        """How many files were passed over, by suffix or reason; of the texts those that are not in `used`."""
        unused = Counter(os.path.splitext(text)[1].lower() for text in self.texts.difference(used))
        return dict((self.passed_over + unused).most_common())

    def passed_over_text(self, used: Iterable[str] = ()) -> str:
        """'; passed over: 2 .pdf, 1 hidden; ...' for people, '' where there is nothing to say."""
        parts = [f"{count:,} {reason}" for reason, count in self.not_pictures(used).items()]
        text = f"; passed over: {', '.join(parts)}" if parts else ""
        if not has_heif() and any(self.passed_over[suffix] for suffix in HEIF_SUFFIXES):
            text += f" ({HEIF_INSTALL})"
        return text + (f"; not searched: {some(self.left)}" if self.left else "")

    def sentence(self, used: Iterable[str] = ()) -> str:
        """Files found, pictures among them, what was passed over; `used`: texts that are not."""
        counts = f"{self.files:,} files, {len(self.pictures):,} read as pictures"
        return f"{shown(self.folder)}: {counts}{self.passed_over_text(used)}"


def some(names: Iterable[str]) -> str:
    """The first names of many, for a sentence."""
    listed = list(names)
    more = f" and {len(listed) - NAMES_SHOWN:,} more" if len(listed) > NAMES_SHOWN else ""
    return ", ".join(map(shown, listed[:NAMES_SHOWN])) + more


def shown(name: str) -> str:
    """A name that can be printed: what is not UTF-8 in it is escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def quoted(text: str) -> str:
    """An example in a sentence: in quotes, cut."""
    return repr(shown(text if len(text) <= 80 else f"{text[:77]}..."))


class _Entry(NamedTuple):
    name: str
    kind: str  # 'file', 'folder' or another
    identity: Any  # of a folder, the same for all its names; None where there are no links


def list_pictures(folder: str | os.PathLike, deep: bool = True) -> Listing:
    """The pictures of a folder; nothing of a file is read whose suffix is known.

    Args:
      folder: local, or any fsspec URL.
      deep: whether sub-folders are searched.

    Raises:
      UserError: if the folder cannot be listed.
    """
    path = os.fspath(folder)
    fs, root = filesystem(path) if "://" in path else (None, path)
    fs = None if isinstance(fs, LocalFileSystem) else fs
    found, seen, waiting = Listing(path), set(), [""]
    if fs is None and os.path.isdir(root):
        seen.add(_identity(os.stat(root)))
    while waiting:
        inner = waiting.pop()
        try:
            entries = sorted(_scan(fs, os.path.join(root, inner) if inner else root))
        except OSError as error:
            if not inner:
                raise UserError(f"cannot list the folder {path}: {error}") from error
            found.left.append(f"{inner} ({error.strerror or error})")
            continue
        folders = []
        for entry in entries:
            name = f"{inner}/{entry.name}" if inner else entry.name
            if entry.kind != "folder":
                found.files += 1
                _add_file(found, fs, root, name, entry.kind)
            elif deep and _enters(found, name, entry, seen):
                folders.append(name)
        found.folders += folders
        waiting += reversed(folders)
    found.pictures.sort()
    found.videos.sort()
    found.annotations.sort()
    return found


def _scan(fs: fsspec.AbstractFileSystem | None, folder: str) -> Iterator[_Entry]:
    """Files and folders in one folder; `fs` is None for a local one."""
    if fs is None:
        with os.scandir(folder) as entries:
            for entry in entries:
                is_folder = entry.is_dir()
                kind = "folder" if is_folder else "file" if entry.is_file() else "other"
                yield _Entry(entry.name, kind, _identity(entry.stat()) if is_folder else None)
        return
    kinds = {"directory": "folder", "file": "file"}
    for info in fs.ls(folder, detail=True):
        name = info["name"].rstrip("/").rpartition("/")[2]
        if name and info["name"].rstrip("/") != folder.rstrip("/"):  # some stores list the folder itself
            yield _Entry(name, kinds.get(info["type"], "other"), None)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _enters(found: Listing, name: str, entry: _Entry, seen: set[Any]) -> bool:
    """Whether to search a folder; if not, says why in `found.left`."""
    if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
        found.left.append(f"{name} ({'hidden' if entry.name.startswith('.') else 'of the system'})")
        return False
    if entry.identity is not None and entry.identity in seen:
        found.left.append(f"{name} (a link to a folder that is searched)")
        return False
    seen.add(entry.identity)
    return True


def _add_file(found: Listing, fs: fsspec.AbstractFileSystem | None, root: str, name: str, kind: str) -> None:
    """Puts a file where it belongs."""
    base = name.rpartition("/")[2]
    suffix = os.path.splitext(base)[1].lower()
    if kind != "file":
        found.passed_over[NOT_A_FILE] += 1
    elif base.startswith("."):
        found.passed_over[HIDDEN] += 1
    elif suffix in known_suffixes():
        found.pictures.append(name)
    elif suffix in TEXT_SUFFIXES:
        found.texts.add(name)
    elif suffix in VIDEO_SUFFIXES:
        found.passed_over[suffix] += 1
        found.videos.append(name)
    elif suffix in OTHER_SUFFIXES or suffix in HEIF_SUFFIXES or suffix in AVIF_SUFFIXES:
        found.passed_over[suffix] += 1
        if suffix in BOX_SUFFIXES:
            found.annotations.append(name)
    else:
        try:
            if picture_reader(_first_bytes(fs, f"{root.rstrip('/')}/{name}")):
                found.pictures.append(name)
            else:
                found.passed_over[suffix or "without a suffix"] += 1
        except OSError:
            found.passed_over[UNREADABLE] += 1


def _first_bytes(fs: fsspec.AbstractFileSystem | None, path: str) -> bytes:
    if fs is not None:
        return fs.cat_file(path, start=0, end=PREFIX_BYTES)
    with open(path, "rb") as file:
        return file.read(PREFIX_BYTES)


@functools.cache
def known_suffixes() -> frozenset[str]:
    """Suffixes of pictures that the Pillow here opens."""
    avif = AVIF_SUFFIXES if features.check("avif") else frozenset()
    return PICTURE_SUFFIXES | avif | (HEIF_SUFFIXES if has_heif() else frozenset())


def is_picture(path: str | os.PathLike) -> bool:
    """Whether a local file is a picture, as `list_pictures` sees it. Raises OSError."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix in known_suffixes() or picture_reader(_first_bytes(None, os.fspath(path))) is not None


def picture_reader(prefix: bytes, formats: Collection[str] = ()) -> Callable[..., Image.Image] | None:
    """Pillow's reader for a file with these first bytes, `PREFIX_BYTES` of them; None where it has none.

    `formats`: by Pillow's names, only these; () for all.
    """
    if is_heif(prefix):
        if not has_heif():
            return None
        register_heif()
    Image.init()
    names = [name for name in Image.ID if name not in STUB_FORMATS and (name in formats or not formats)]
    readers = (Image.OPEN[name] for name in names if len(prefix) >= 16)
    return next((reader for reader, accept in readers if accept and accept(prefix[:16]) is True), None)
