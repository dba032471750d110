"""Pictures on lists of known hashes (MD5, SHA-1, PDQ) go before anything else sees them."""

import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from florence_jax.curation.blocks import Decision, Decisions, Stage, rows_of
from florence_jax.errors import UserError

try:
    import pdqhash
except ImportError:  # optional: only lists of PDQ hashes need it
    pdqhash = None
# Reasons after which no copy, thumbnail, caption or URL of a record may be kept, only its uid.
QUARANTINE_REASONS = frozenset({"hash_list"})
# Bits of 256 and the quality below which a PDQ hash says nothing; both are ThreatExchange's recommendation.
PDQ_DISTANCE = 31
PDQ_QUALITY = 50
_SLOTS = 16


def quarantine_decisions(block: pa.Table) -> tuple[pa.Table, Decisions]:
    """Pictures that measuring found on the list of known hashes (`MeasureRules.hash_list`)."""
    rows = rows_of(block, ("listed", "listed_limit"))
    return block, [None if r["listed"] is None else ("hash_list", r["listed"], r["listed_limit"]) for r in rows]


def quarantine_stage() -> Stage:
    """The stage 'quarantine'."""
    return Stage("quarantine", ("listed", "listed_limit"), quarantine_decisions)


class HashList:
    """Matches pictures against a list of known ones, exactly by digest or nearly by PDQ.

    Nothing of the list shows in messages, representations or results. PDQ hashes are found by multi-index hashing
    (Norouzi et al. 2012): a hash within 31 of 256 bits differs in at most one bit in one of 16 slots of 16 bits, so the
    17 neighbours of each slot are looked up and the candidates are verified.

    Args:
      digests: MD5, SHA-1 or SHA-256, hexadecimal.
      pdq: uint8 (N, 32).
      distance: largest Hamming distance of a PDQ match, at most 31.

    Raises:
      UserError: if distance is not in 0 to 31, or pdqhash is missing while there are PDQ hashes.
    """

    def __init__(self, digests: Iterable[str] = (), pdq: np.ndarray | None = None, distance: int = PDQ_DISTANCE):
        if not 0 <= distance <= PDQ_DISTANCE:
            raise UserError(f"a PDQ distance of {distance} is outside 0 to {PDQ_DISTANCE}")
        self._digests = frozenset(digest.lower() for digest in digests)
        self._pdq = np.zeros((0, 32), np.uint8) if pdq is None else np.asarray(pdq, np.uint8)
        self._distance = distance
        slots = self._pdq.view(">u2").reshape(len(self._pdq), _SLOTS).astype(np.uint16)
        self._order = np.argsort(slots, axis=0, kind="stable")
        self._sorted = np.take_along_axis(slots, self._order, axis=0)

    @classmethod
    def from_file(cls, path: str, distance: int = PDQ_DISTANCE) -> "HashList":
        """Reads one hash a line: 32, 40 or 64 hex digits are MD5, SHA-1, SHA-256; 'pdq:' and 64 digits are PDQ.

        Raises:
          UserError: if the file cannot be read, or a line is none of these (the line's number is given, not its text).
        """
        digests, pdq = [], []
        try:
            lines = Path(path).read_text("ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the hash list {path}: {type(error).__name__}") from None
        for number, line in enumerate(map(str.strip, lines), 1):
            if re.fullmatch(r"pdq:[0-9a-fA-F]{64}", line):
                pdq.append(bytes.fromhex(line[4:]))
            elif re.fullmatch(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{64}", line):
                digests.append(line)
            elif line and not line.startswith("#"):
                raise UserError(f"hash list {path} line {number}: not an MD5, SHA-1, SHA-256 or 'pdq:' hash")
        return cls(digests, np.frombuffer(b"".join(pdq), np.uint8).reshape(-1, 32), distance)

    def __len__(self) -> int:
        return len(self._digests) + len(self._pdq)

    def __repr__(self) -> str:
        return f"HashList({len(self)} hashes)"

    def decide(self, data: bytes, decodes: bool = True) -> Decision | None:
        """('hash_list', distance, largest distance) for a picture on the list, or None; distance 0 for a digest.

        Args:
          data: the encoded image.
          decodes: whether it can be decoded (the validity stage has seen it); if not, only digests are compared.

        Raises:
          UserError: if the list has PDQ hashes and pdqhash is not installed.
        """
        if self._digests and any(f(data).hexdigest() in self._digests for f in (_md5, _sha1, hashlib.sha256)):
            return "hash_list", 0, self._distance
        if decodes and len(self._pdq):
            code, quality = pdq_hash(data)
            nearest = self.nearest(code) if quality >= PDQ_QUALITY else None
            if nearest is not None:
                return "hash_list", nearest, self._distance
        return None

    def nearest(self, code: np.ndarray) -> int | None:
        """Smallest distance of a PDQ hash, uint8 (32,), to the list; None if all are farther than the limit."""
        slots = np.ascontiguousarray(code, np.uint8).view(">u2").astype(np.uint16)
        masks = np.concatenate([[0], 1 << np.arange(16)]).astype(np.uint16)
        found = []
        for slot in range(_SLOTS):
            column, keys = self._sorted[:, slot], slots[slot] ^ masks
            starts, ends = np.searchsorted(column, keys, "left"), np.searchsorted(column, keys, "right")
            found += [self._order[a:b, slot] for a, b in zip(starts, ends, strict=True) if a < b]
        if not found:
            return None
        candidates = self._pdq[np.unique(np.concatenate(found))]
        distance = int(np.bitwise_count(candidates ^ np.asarray(code, np.uint8)[None]).sum(1, dtype=np.int64).min())
        return distance if distance <= self._distance else None


def _md5(data: bytes) -> Any:
    return hashlib.md5(data, usedforsecurity=False)


def _sha1(data: bytes) -> Any:
    return hashlib.sha1(data, usedforsecurity=False)


def pdq_hash(data: bytes) -> tuple[np.ndarray, int]:
    """PDQ hash, uint8 (32,), and quality (0 to 100) of a fully decoded picture, by Meta's own code.

    Only for matching lists: PDQ depends on the decoder and is slow. Transparency is dropped, not laid on white, as by
    those who make such lists.

    Raises:
      UserError: if pdqhash is not installed.
    """
    if pdqhash is None:
        raise UserError("this hash list has PDQ hashes: pip install pdqhash (it compiles C++), or use digests only")
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    bits, quality = pdqhash.compute(pixels)
    return np.packbits(np.asarray(bits, np.uint8)), int(quality)
