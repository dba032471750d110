"""A folder of pictures with annotations.json in COCO's form, written picture by picture."""

import json
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florence_jax.data.annotations import NEGATIVE, NOT_EXHAUSTIVE
from florence_jax.data.records import Record
from florence_jax.errors import UserError
from florence_jax.files import read_json, write_json, write_text

STORED = 65535  # bytes of a block of deflate that is not compressed


def stored_png(picture: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a PNG file that is not compressed: compressors differ, so that their files do."""
    height, width = picture.shape[:2]
    raw = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter: none
    raw[:, 1:] = picture.reshape(height, -1)
    data = raw.tobytes()
    blocks = [data[start : start + STORED] for start in range(0, len(data), STORED)]
    packed = [b"\x78\x01"]
    for number, block in enumerate(blocks, 1):
        packed.append(struct.pack("<BHH", number == len(blocks), len(block), len(block) ^ 0xFFFF) + block)
    packed.append(struct.pack(">I", zlib.adler32(data)))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", b"".join(packed)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def claim_folder(out: Path, marker: str, settings: Any) -> None:
    """Makes the folder `out` one of these settings, which it has in the file `marker`.

    Raises:
      UserError: if it is a file, or holds anything that was not written with these settings.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not out.is_dir() or read_json(out / marker) != settings:
            raise UserError(f"{out} holds something else than what is to be written: give another --out, or delete it")
    write_json(out / marker, settings)


class CocoFolder:
    """Pictures and, when all are there, annotations.json.

    Args:
      folder: made anew; what lies there, of a run that was stopped, goes.
      class_names, category_ids: see `BoxSource`.
      description: goes into annotations.json.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], category_ids: Sequence[Any], description: str):
        self._folder, self._ids = folder, tuple(category_ids)
        named = zip(category_ids, class_names, strict=True)
        self._content: dict[str, Any] = {
            "info": {"description": description},
            "images": [],
            "annotations": [],
            "categories": [{"id": number, "name": name} for number, name in named],
        }
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def add(self, name: str, picture: np.ndarray, record: Record) -> None:
        """A picture, uint8 (H, W, 3), with the boxes of a record, see `BoxSource`; groups become crowds.

        A record with "negative_ids" and "not_exhaustive_ids" is written with LVIS's lists.
        """
        (self._folder / name).write_bytes(stored_png(picture))
        images, annotations = self._content["images"], self._content["annotations"]
        number = len(images)
        images.append({"id": number, "file_name": name, "width": picture.shape[1], "height": picture.shape[0]})
        if "negative_ids" in record:
            for field, ids in ((NEGATIVE, "negative_ids"), (NOT_EXHAUSTIVE, "not_exhaustive_ids")):
                images[-1][field] = [self._ids[k] for k in np.asarray(record[ids]).tolist()]
        crowd = np.asarray(record["iscrowd"]) | np.asarray(record["is_group_of"])
        columns = (
            np.asarray(values).tolist() for values in (record["boxes"], record["class_ids"], crowd, record["areas"])
        )
        for (x1, y1, x2, y2), label, is_crowd, area in zip(*columns, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": self._ids[label],
                    "bbox": [_plain(value) for value in (x1, y1, x2 - x1, y2 - y1)],
                    "area": _plain(area),
                    "iscrowd": int(is_crowd),
                }
            )

    def finish(self) -> None:
        """Writes annotations.json."""
        write_text(self._folder / "annotations.json", json.dumps(self._content, separators=(",", ":")) + "\n")


def _plain(value: float) -> int | float:
    """Whole numbers as such: shorter, and what people write."""
    return int(value) if value == int(value) else value
