"""The one place where a picture is decoded for its scores: a split of the input becomes a part of the table of scores.

Image bytes that cannot be read again alone (parquet columns, ArrayRecord, compressed tars) are copied once into a file
beside the part, so that writing the output later needs one small read per picture, whatever the input was.
"""

import dataclasses
import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa

from florence_jax.curation.filters.captions import text_scores
from florence_jax.curation.filters.known_pictures import HashList
from florence_jax.curation.filters.opt_out import OptOutRules, decide_headers
from florence_jax.curation.filters.personal import personal_scores
from florence_jax.curation.filters.post_filter import rights_scores
from florence_jax.curation.ingest.hashing import Limits, measure
from florence_jax.curation.ingest.inputs import DamagedInput, Pair, Split, read_split
from florence_jax.curation.table import SCORES, read_table, uid_of, write_table
from florence_jax.data.ops.captions import MAX_CAPTION
from florence_jax.data.sources.picture_files import shown
from florence_jax.errors import UserError
from florence_jax.files import exists, filesystem, join, read_bytes, write_file

COPY = "copy:"
QUOTED = "quoted:"  # before a path that is not UTF-8, with %-escapes: parquet could not hold it
MAX_EXTRA = 4096  # characters of the further fields of one pair
# A file in measured/: a part, the copies of its pictures, or either half written by a run that was killed.
PART = re.compile(r"\.?([0-9a-f]{32}-[0-9a-f]{8})\.(?:parquet|images)(?:\.[0-9a-f]{32}\.tmp)?")
QUARANTINED: Pair = {"key": "", "captions": [], "url": "", "licence": "", "headers": [], "extra": {}, "fields": []}
MAX_FIELDS = 64  # names of fields that a part notes


@dataclasses.dataclass(frozen=True)
class MeasureRules:
    """How a split is measured.

    Attributes:
      limits: what is not decoded.
      extra_fields: fields of the raw pairs that are kept beside the known ones.
      hash_list: known pictures to quarantine, or None.
      retry: parts with one of these statuses ('unreadable', 'missing', ...) are measured again.
      digest: stands for all of it but `retry`; in the names of the parts.
    """

    limits: Limits
    extra_fields: tuple[str, ...]
    hash_list: HashList | None
    retry: tuple[str, ...]
    digest: str


def part_path(workdir: str, split: Split, settings: str) -> str:
    """The part of a split; `settings` stands for the configuration of measuring."""
    return join(workdir, "measured", f"{split.identity()}-{settings[:8]}.parquet")


def measure_split(split: Split, workdir: str, rules: MeasureRules) -> str:
    """Reads and measures a split, and writes its part; nothing is done if the part is there.

    Of a picture on the hash list nothing is kept but its uid, hashes and sizes. Damage of the input file is noted in
    the metadata of the part ('damage'); the pairs before it are kept. The names of the fields are there too ('fields').

    Returns:
      Path of the part.
    """
    path = part_path(workdir, split, rules.digest)
    if exists(path) and not (rules.retry and statuses(path) & set(rules.retry)):
        return path
    pictures: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    damage = ""

    def fill(copies: BinaryIO | None) -> None:
        nonlocal damage
        name = path.rpartition("/")[2].replace(".parquet", ".images")
        try:
            for pair in read_split(split, rules.limits.max_bytes):
                row = measure_picture(pair, rules)
                if not row["path"] and pair["image"] and copies is not None and row["listed"] is None:
                    row |= {"path": COPY + name, "offset": copies.tell(), "size": copies.write(pair["image"])}
                pictures.append(row)
                pairs.append(pair | {"image": b""} if row["listed"] is None else QUARANTINED)
        except DamagedInput as error:
            damage = str(error)

    def fill_file(temporary: str) -> None:
        with open(temporary, "wb") as copies:
            fill(copies)

    if split.kind in ("parquet", "array_record") or split.path.endswith("gz"):
        write_file(path.replace(".parquet", ".images"), fill_file)
    else:
        fill(None)
    # The captions after the pictures: decoding would push the detector of languages out of the processor's caches.
    rows = [picture | measure_caption(pair, rules) for picture, pair in zip(pictures, pairs, strict=True)]
    fields = sorted(dict.fromkeys(name for pair in pairs for name in pair["fields"]))[:MAX_FIELDS]
    notes = {"damage": damage, "fields": json.dumps(fields)}
    table = pa.Table.from_pylist(rows, SCORES.with_metadata(notes))
    write_table(path, table)
    return path


def remove_other_parts(workdir: str, splits: Iterable[Split], settings: str) -> None:
    """Removes the parts of other splits and settings, with their copies of pictures.

    They may hold what has since been put on the hash list. Call it when nothing is being measured.
    """
    kept = {part_path(workdir, split, settings).rpartition("/")[2].removesuffix(".parquet") for split in splits}
    fs, inner = filesystem(join(workdir, "measured"))
    for path in fs.ls(inner, detail=False) if fs.exists(inner) else ():
        name = PART.fullmatch(path.rpartition("/")[2])
        if name and name[1] not in kept:
            fs.rm_file(path)


def measure_picture(pair: Pair, rules: MeasureRules) -> dict[str, Any]:
    """What the table of scores (`table.SCORES`) says of the picture of a raw pair, and which pair it is."""
    scores = measure(pair["image"], rules.limits)
    row = scores | {
        "uid": uid_of(pair["source"], pair["key"]),
        "source": _valid(pair["source"]),
        "status": pair["problem"] or scores["status"],
        "image_id": scores["image_id"].hex(),
        "probes": [{"kind": kind, "h64": h64, "h256": h256} for kind, h64, h256 in scores["probes"]],
        "listed": None,
        "listed_limit": None,
    }
    locator = pair["locator"]
    if rules.hash_list is not None and pair["image"]:
        if found := rules.hash_list.decide(pair["image"], decodes=row["status"] == "ok"):
            row |= {"listed": int(found[1]), "listed_limit": int(found[2])}
            locator = None
    row["path"], row["offset"], row["size"] = locator or ("", 0, 0)
    if row["path"] != _valid(row["path"]):
        row["path"] = QUOTED + urllib.parse.quote(os.fsencode(row["path"]))
    return row


def measure_caption(pair: Pair, rules: MeasureRules) -> dict[str, Any]:
    """What the table of scores says of all else: captions, URL, licence, headers, further fields."""
    extra = {name: pair["extra"][name] for name in rules.extra_fields if name in pair["extra"]}
    packed = json.dumps(extra, sort_keys=True, ensure_ascii=False)
    rights = rights_scores(pair)
    first, *others = map(caption_scores, pair["captions"] or [""])
    return {
        **first,
        "others": others,
        "licence_id": rights["licence"],
        "host": rights["host"],
        "key": shown(pair["key"]),
        **{name: _valid(pair[name]) for name in ("url", "licence")},
        "headers": [_valid(line) for line in pair["headers"]],
        "extra": _valid(packed) if len(packed) <= MAX_EXTRA else "{}",
    }


def caption_scores(caption: str) -> dict[str, Any]:
    """What the table of scores says of a caption; "caption" as found, "text" normalised."""
    row = text_scores(caption)
    row["text"] = _valid(row.pop("caption"))
    # Of longer ones, which are dropped, the end is not looked at: it costs too much.
    return row | personal_scores(caption[:MAX_CAPTION]) | {"caption": _valid(caption)}


def _valid(text: str) -> str:
    """Lone surrogates, which parquet cannot hold, as U+FFFD."""
    return text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def repeat_order(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Places of rows of the table by uid and, of one uid, opt-outs first; the order of the rows does not count.

    Any opt-out in the headers is one, whatever the rules: the table is not made again when they change.
    """

    def place(number: int) -> tuple[Any, ...]:
        row = dict(rows[number])
        where = [row.pop(name) for name in ("path", "offset", "size")]
        consents = decide_headers(row["headers"], OptOutRules()) is None
        known = [row[name] for name in ("image_id", "caption", "url")]
        return row["uid"], consents, known, -len(row["headers"]), json.dumps(row, default=bytes.hex), where

    return sorted(range(len(rows)), key=place)


def statuses(path: str) -> set[str]:
    """The distinct statuses in a part."""
    return set(read_table(path, ["status"])["status"].unique().to_pylist())


def image_bytes(workdir: str, path: str, offset: int, size: int, image_id: str) -> bytes:
    """The bytes of a picture, from its row's `path`, `offset` and `size`.

    Raises:
      UserError: if they cannot be read any more, or are others than those with this `image_id`.
    """
    name = join(workdir, "measured", path.removeprefix(COPY)) if path.startswith(COPY) else path
    if path.startswith(QUOTED):
        name = os.fsdecode(urllib.parse.unquote_to_bytes(path.removeprefix(QUOTED)))
    try:
        data = read_bytes(name, offset, size) if size else b""
    except OSError as error:
        raise UserError(f"cannot read {name} again: {error}; restore it or remove it from --input") from error
    if hashlib.sha256(data).hexdigest()[:32] != image_id:
        raise UserError(f"{name} has changed since it was measured; restore it or run in a new --workdir")
    return data
