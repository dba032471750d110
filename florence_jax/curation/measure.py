"""The one place where a picture is decoded for its scores: a split of the input becomes a part of the table of scores.

Image bytes that cannot be read again alone (parquet columns, ArrayRecord, compressed tars) are copied once into a file
beside the part, so that writing the output later needs one small read per picture, whatever the input was.
"""

import json
from collections.abc import Sequence
from typing import Any, BinaryIO

import pyarrow as pa

from florence_jax.curation.filters import text_scores
from florence_jax.curation.hashing import Limits, measure
from florence_jax.curation.inputs import DamagedInput, Pair, Split, read_split
from florence_jax.curation.table import SCORES, exists, join, read_bytes, read_table, uid_of, write_file, write_table
from florence_jax.errors import UserError

COPY = "copy:"
MAX_EXTRA = 4096  # characters of the further fields of one pair


def part_path(workdir: str, split: Split, settings: str) -> str:
    """The part of a split; `settings` stands for the configuration of measuring."""
    return join(workdir, "measured", f"{split.identity()}-{settings[:8]}.parquet")


def measure_split(split: Split, workdir: str, settings: str, limits: Limits, extra_fields: Sequence[str]) -> str:
    """Reads and measures a split, and writes its part; nothing is done if the part is there.

    Damage of the input file is noted in the metadata of the part ('damage'); the pairs before it are kept.

    Returns:
      Path of the part.
    """
    path = part_path(workdir, split, settings)
    if exists(path):
        return path
    rows: list[dict[str, Any]] = []
    damage = ""

    def fill(copies: BinaryIO | None) -> None:
        nonlocal damage
        name = path.rpartition("/")[2].replace(".parquet", ".images")
        try:
            for pair in read_split(split, limits.max_bytes):
                if pair["locator"] is None and pair["image"] and copies is not None:
                    pair["locator"] = (COPY + name, copies.tell(), copies.write(pair["image"]))
                rows.append(measure_pair(pair, limits, extra_fields))
        except DamagedInput as error:
            damage = str(error)

    def fill_file(temporary: str) -> None:
        with open(temporary, "wb") as copies:
            fill(copies)

    if split.kind in ("parquet", "array_record") or split.path.endswith("gz"):
        write_file(path.replace(".parquet", ".images"), fill_file)
    else:
        fill(None)
    table = pa.Table.from_pylist(rows, SCORES.with_metadata({"damage": damage}))
    write_table(path, table)
    return path


def measure_pair(pair: Pair, limits: Limits, extra_fields: Sequence[str]) -> dict[str, Any]:
    """The row of the table of scores for a raw pair; see `table.SCORES`."""
    scores = measure(pair["image"], limits)
    text = text_scores(pair["caption"])
    extra = {name: pair["extra"][name] for name in extra_fields if name in pair["extra"]}
    packed = json.dumps(extra, sort_keys=True, ensure_ascii=False)
    path, offset, size = pair["locator"] or ("", 0, 0)
    return {
        **scores,
        **text,
        "uid": uid_of(pair["source"], pair["key"]),
        **{name: _valid(pair[name]) for name in ("source", "key", "url", "licence", "caption")},
        "headers": [_valid(line) for line in pair["headers"]],
        "extra": _valid(packed) if len(packed) <= MAX_EXTRA else "{}",
        "path": path,
        "offset": offset,
        "size": size,
        "status": pair["problem"] or scores["status"],
        "image_id": scores["image_id"].hex(),
        "probes": [{"kind": kind, "h64": h64, "h256": h256} for kind, h64, h256 in scores["probes"]],
        "text": _valid(text["caption"]),
    }


def _valid(text: str) -> str:
    """Lone surrogates, which parquet cannot hold, as U+FFFD."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def statuses(path: str) -> set[str]:
    """The distinct statuses in a part."""
    return set(read_table(path, ["status"])["status"].unique().to_pylist())


def image_bytes(workdir: str, path: str, offset: int, size: int) -> bytes:
    """The bytes of a picture, from its row's `path`, `offset` and `size`.

    Raises:
      UserError: if they cannot be read any more.
    """
    name = join(workdir, "measured", path.removeprefix(COPY)) if path.startswith(COPY) else path
    try:
        data = read_bytes(name, offset, size) if size else b""
    except OSError as error:
        raise UserError(f"cannot read {name} again: {error}; restore it or remove it from --input") from error
    if len(data) != size:
        raise UserError(f"{name} has become shorter since it was measured; restore it or run in a new --workdir")
    return data
