"""Files here and in buckets: whole or not at all, JSON, listings, digests."""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from typing import Any

import fsspec

from florence_jax.errors import UserError


def json_digest(value: Any) -> str:
    """32 hexadecimal digits that stand for a JSON-like value."""
    data = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()[:32]


def join(folder: str, *names: str) -> str:
    """Path of a file in a local folder or under a URL."""
    return "/".join([folder.rstrip("/"), *names])


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
      UserError: if fsspec does not know the protocol, or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot open {path}: {error} (s3fs for s3://, gcsfs for gs://)") from error


def exists(path: str) -> bool:
    """Whether a file is there."""
    fs, inner = filesystem(path)
    return fs.exists(inner)


def read_bytes(path: str, offset: int = 0, size: int = -1) -> bytes:
    """A whole file, or `size` bytes of it from `offset` on. Raises OSError."""
    fs, inner = filesystem(path)
    if size < 0 and not offset:
        return fs.cat_file(inner)
    return fs.cat_file(inner, start=offset, end=None if size < 0 else offset + size)


def write_file(path: str, write: Callable[[str], None]) -> tuple[int, str]:
    """Lets `write` fill a temporary local file, then gives it its name in one step.

    On a local disk the temporary file lies beside the result and is renamed; elsewhere it is uploaded whole.

    Returns:
      Size in bytes and sha256 (hexadecimal) of the file.
    """
    fs, inner = filesystem(path)
    local = isinstance(fs, fsspec.implementations.local.LocalFileSystem)
    folder = os.path.dirname(inner) if local else tempfile.mkdtemp()
    try:
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{os.path.basename(inner)}.{uuid.uuid4().hex}.tmp")
        try:
            write(temporary)
            with open(temporary, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
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
    return size, digest


def write_bytes(path: str, data: bytes) -> tuple[int, str]:
    """Writes a file in one step; returns its size and sha256."""

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(data)

    return write_file(path, write)


def write_json(path: str, value: Any) -> tuple[int, str]:
    """Writes indented JSON in one step; returns size and sha256."""
    return write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path: str) -> Any | None:
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
