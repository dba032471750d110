"""Measured pictures in one .npz file, so that a picture is decoded once in its life."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florence_jax.curation.ingest.hashing import PICTURE_LOOK_BYTES
from florence_jax.errors import UserError
from florence_jax.files import replacing

SCALARS = {
    "status": str,
    "width": np.int64,
    "height": np.int64,
    "bytes": np.int64,
    "detail": float,
    "flatness": float,
    "aspect": float,
}


def save(path: Path, pictures: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes key -> measurements (of `hashing.measure`, with `stamp`: an integer that changes with the file)."""
    items = list(pictures.values())
    columns: dict[str, np.ndarray] = {"key": np.array(list(pictures), str)}
    for name, kind in SCALARS.items():
        columns[name] = np.array([item[name] for item in items], kind)
    columns["stamp"] = np.array([item["stamp"] for item in items], np.int64)
    columns["h64"] = np.array([item["h64"] for item in items], np.uint64)
    columns["image_id"] = _bytes([item["image_id"] for item in items], 16)
    columns["h256"] = _bytes([item["h256"] or bytes(32) for item in items], 32)
    columns["looks"] = np.array([len(item["look"]) // PICTURE_LOOK_BYTES for item in items], np.int64)
    columns["look"] = _bytes([item["look"] for item in items], PICTURE_LOOK_BYTES)
    views = [view for item in items for view in item["probes"]]
    columns["views"] = np.array([len(item["probes"]) for item in items], np.int64)
    columns["view_kind"] = np.array([kind for kind, _, _ in views], str)
    columns["view_h64"] = np.array([h64 for _, h64, _ in views], np.uint64)
    columns["view_h256"] = _bytes([h256 for _, _, h256 in views], 32)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **columns)


def load_index(path: Path) -> dict[str, dict[str, Any]]:
    """Reads what `save` wrote. Raises UserError if it is not that."""
    try:
        with np.load(path) as file:
            columns = {name: file[name] for name in file.files}
            views = list(
                zip(
                    columns["view_kind"].tolist(),
                    columns["view_h64"].tolist(),
                    map(bytes, columns["view_h256"]),
                    strict=True,
                )
            )
            ends, look_ends = (np.cumsum(columns[name]).tolist() for name in ("views", "looks"))
            lists = {name: columns[name].tolist() for name in (*SCALARS, "stamp", "h64", "key")}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not an index of an earlier run ({error}); name its index.npz") from error
    result = {}
    for i, key in enumerate(lists.pop("key")):
        item = {name: values[i] for name, values in lists.items()}
        item.update(image_id=bytes(columns["image_id"][i]), h256=bytes(columns["h256"][i]))
        item["probes"] = views[ends[i] - int(columns["views"][i]) : ends[i]]
        item["look"] = columns["look"][look_ends[i] - int(columns["looks"][i]) : look_ends[i]].tobytes()
        result[key] = item
    return result


def _bytes(values: Sequence[bytes], width: int) -> np.ndarray:
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, width)
