"""The post-filter: licences, opt-outs, blocked domains, unsafe pictures, known-hash lists, personal data, takedowns."""

import dataclasses
import fnmatch
import functools
import hashlib
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageOps

from florence_jax.curation.filters import MAX_CAPTION, Decision
from florence_jax.curation.opt_out import OptOutRules, SiteRules, decide_headers
from florence_jax.curation.personal import personal_scores
from florence_jax.errors import UserError

try:
    import pdqhash
except ImportError:  # optional: only lists of PDQ hashes need it
    pdqhash = None

UNKNOWN_LICENCE = "unknown"
# Reasons after which no copy, thumbnail, caption or URL of a record may be kept, only its uid.
QUARANTINE_REASONS = frozenset({"hash_list"})
# Bits of 256 and the quality below which a PDQ hash says nothing; both are ThreatExchange's recommendation.
PDQ_DISTANCE = 31
PDQ_QUALITY = 50
_SLOTS = 16


@dataclasses.dataclass(frozen=True)
class SafetyRules:
    """Thresholds of `decide_safety`; the defaults switch off what needs a list or a model.

    Attributes:
      licences: patterns of allowed licence ids ('cc-by-*', see `normalise_licence`); () allows all. Records without a
        licence are 'unknown', which must be listed to be allowed.
      blocked_domains: with their sub-domains.
      max_nsfw: largest "nsfw" score in [0, 1]; None = no such score.
      personal: kinds of personal data ('mail', 'phone', 'card') that drop a pair.

    Raises:
      UserError: for an unknown kind, or a domain that is not one.
    """

    licences: tuple[str, ...] = ()
    blocked_domains: tuple[str, ...] = ()
    max_nsfw: float | None = None
    personal: tuple[str, ...] = ("mail", "phone", "card")

    def __post_init__(self):
        if unknown := set(self.personal) - {"mail", "phone", "card"}:
            raise UserError(f"unknown kind of personal data {', '.join(sorted(unknown))}: known are mail, phone, card")
        if wrong := [d for d in self.blocked_domains if not d.strip(".") or "/" in d]:
            raise UserError(f"blocked domain {wrong[0]!r}: write a host name, such as example.com")

    @functools.cached_property
    def blocked_hosts(self) -> frozenset[str]:
        """`blocked_domains` in the form of `host_of`."""
        return frozenset(host_of(domain.strip(".")) for domain in self.blocked_domains)


def safety_scores(record: Mapping[str, Any]) -> dict[str, Any]:
    """Score columns of a raw pair that need neither a model nor a list.

    Args:
      record: "caption", optionally "url" and "licence".

    Returns:
      "mails", "phones", "cards" (counts), "licence" (normalised), "host" ('' without a URL).
    """
    return {
        **personal_scores(record["caption"][:MAX_CAPTION]),  # longer ones are dropped, and slow to normalise
        "licence": normalise_licence(record.get("licence") or ""),
        "host": host_of(record.get("url") or ""),
    }


def decide_safety(scores: Mapping[str, Any], rules: SafetyRules) -> Decision | None:
    """The first reason to drop a pair on its `safety_scores` (and "nsfw", where that is switched on), or None.

    Returns:
      (reason, value, threshold); reasons: 'licence', 'domain', 'nsfw', 'mail', 'phone', 'card'. The value of personal
      data is a count, never the data.
    """
    licence = scores["licence"]
    if rules.licences and not any(fnmatch.fnmatchcase(licence, p.lower()) for p in rules.licences):
        return "licence", licence, ",".join(rules.licences)
    if blocked := blocking_domain(scores["host"], rules.blocked_hosts):
        return "domain", scores["host"], blocked
    if rules.max_nsfw is not None and not scores["nsfw"] <= rules.max_nsfw:  # NaN, a failed score, is dropped too
        return "nsfw", scores["nsfw"], rules.max_nsfw
    for kind in rules.personal:
        if scores[f"{kind}s"]:
            return kind, scores[f"{kind}s"], 0
    return None


def decide_opt_out(record: Mapping[str, Any], rules: OptOutRules, sites: SiteRules | None = None) -> Decision | None:
    """The publisher's opt-out for a raw pair ("headers", "url"), or None; see `opt_out`."""
    decision = decide_headers(record.get("headers") or (), rules)
    if decision is None and sites is not None and record.get("url"):
        decision = sites.decide(record["url"], rules)
    return decision


# -- licences and hosts -----------------------------------------------------------------------------------------------

_CC_URL = re.compile(r"creativecommons\.org/(?:licenses/([a-z-]+)/([\d.]+)|publicdomain/(zero|mark)/[\d.]+)")
_CC_NAME = re.compile(
    r"(?:(?:cc|creative commons)[ _-]+)(by(?:[ _-]+(?:nc|nd|sa))*)(?:[ _-]*v?(\d\.\d))?"
    r"(?:[ _-]+(?:international|unported|generic|licen[cs]e|deed|(?!by|nc|nd|sa)[a-z]{2}))*"
)
_CC_WORDS = (("attribution", "by"), ("non-?commercial", "nc"), ("no-?deriv(?:ative)?s", "nd"), ("share-?alike", "sa"))
_LICENCE_NAMES = {
    "cc zero": "cc0-1.0", "cc0": "cc0-1.0", "cc0 1.0": "cc0-1.0", "pd": "public-domain",
    "publicdomain": "public-domain", "apache 2.0": "apache-2.0", "apache license 2.0": "apache-2.0",
    "apache-2": "apache-2.0", "mit license": "mit", "the mit license": "mit",
}  # fmt: skip


def normalise_licence(text: str) -> str:
    """A licence name, SPDX id or Creative Commons URL as a lower-case SPDX id: 'CC BY 4.0' -> 'cc-by-4.0'.

    An unrecognised text is only lower-cased, with '-' for white space; no text is 'unknown'.
    """
    text = " ".join(text.lower().split())
    if not text:
        return UNKNOWN_LICENCE
    if match := _CC_URL.search(text):
        kind, version, domain = match.groups()
        if domain:
            return "cc0-1.0" if domain == "zero" else "public-domain"
        return f"cc-{kind}-{version}"
    if text in _LICENCE_NAMES:
        return _LICENCE_NAMES[text]
    short = text
    for word, letters in _CC_WORDS:
        short = re.sub(word, letters, short)
    if match := _CC_NAME.fullmatch(short):
        return "-".join(filter(None, ("cc", *re.split(r"[ _-]+", match[1]), match[2])))
    return text.replace(" ", "-")


def host_of(url: str) -> str:
    """Host of a URL: lower case, IDNA, without port, user and trailing dot; '' if there is none."""
    try:
        host = (urlsplit(url if "//" in url else f"//{url}").hostname or "").rstrip(".")
        return host if host.isascii() else host.encode("idna").decode("ascii")
    except (ValueError, UnicodeError):
        return ""


def blocking_domain(host: str, domains: Collection[str]) -> str:
    """The one of the `domains`, from `host_of`, that a host is or lies under, or ''.

    'notexample.com' does not lie under 'example.com'.
    """
    labels = host.split(".")
    return next((d for i in range(len(labels)) if (d := ".".join(labels[i:])) in domains), "")


def canonical_url(url: str) -> str:
    """A URL for comparison: no scheme, 'www.', port, fragment or trailing slash; lower-case host."""
    try:
        parts = urlsplit(url.strip() if "//" in url else f"//{url.strip()}")
    except ValueError:
        return url.strip()
    query = f"?{parts.query}" if parts.query else ""
    return host_of(url).removeprefix("www.") + parts.path.rstrip("/") + query


# -- lists of known pictures ------------------------------------------------------------------------------------------


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

    Only for matching lists: PDQ depends on the decoder and is slow.

    Raises:
      UserError: if pdqhash is not installed.
    """
    if pdqhash is None:
        raise UserError("this hash list has PDQ hashes: pip install pdqhash (it compiles C++), or use digests only")
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    bits, quality = pdqhash.compute(pixels)
    return np.packbits(np.asarray(bits, np.uint8)), int(quality)


# -- takedown ---------------------------------------------------------------------------------------------------------


class Takedown:
    """Records to remove on request, by uid, URL or SHA-256 of the image bytes.

    Args:
      uids: hexadecimal.
      urls: compared as `canonical_url` leaves them.
      hashes: SHA-256 of the image bytes, hexadecimal, whole or the first 32 digits (`image_id`).
    """

    def __init__(self, uids: Iterable[str] = (), urls: Iterable[str] = (), hashes: Iterable[str] = ()):
        self._uids = frozenset(uid.strip().lower() for uid in uids)
        self._urls = frozenset(map(canonical_url, urls))
        self._hashes = frozenset(digest.strip().lower()[:32] for digest in hashes)

    @classmethod
    def from_file(cls, path: str) -> "Takedown":
        """Reads one request a line: 'uid HEX', 'url URL' or 'hash HEX'; '#' starts a comment line.

        Raises:
          UserError: if the file cannot be read or a line is none of these.
        """
        requests: dict[str, list[str]] = {"uid": [], "url": [], "hash": []}
        try:
            lines = Path(path).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the takedown list {path}: {error}") from error
        for number, line in enumerate(map(str.strip, lines), 1):
            kind, _, value = line.partition(" ")
            if line and not line.startswith("#"):
                if kind not in requests or not value.strip():
                    raise UserError(f"takedown list {path} line {number}: write 'uid HEX', 'url URL' or 'hash HEX'")
                requests[kind].append(value.strip())
        return cls(requests["uid"], requests["url"], requests["hash"])

    def decide(self, uid: str, url: str, image_id: str) -> Decision | None:
        """('takedown', 'uid' | 'url' | 'hash', '') for a record on the list, or None."""
        if uid.lower() in self._uids:
            return "takedown", "uid", ""
        if url and canonical_url(url) in self._urls:
            return "takedown", "url", ""
        return ("takedown", "hash", "") if image_id.lower()[:32] in self._hashes else None


def takedown_clusters(taken: np.ndarray, clusters: np.ndarray | Sequence[Any]) -> np.ndarray:
    """bool (N,): `taken`, plus every other member of a near-duplicate cluster with a taken member.

    Args:
      taken: bool (N,).
      clusters: (N,) cluster label of each record, of any sortable type.
    """
    _, places = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(places, weights=taken)[places] > 0 if len(places) else np.zeros(0, bool)
