"""Takedowns: pairs that must go because somebody asked, by uid, URL or picture."""

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from florence_jax.curation.blocks import Decision
from florence_jax.curation.filters.licences import host_of
from florence_jax.errors import UserError


def canonical_url(url: str) -> str:
    """A URL for comparison: no scheme, 'www.', port, fragment or trailing slash; lower-case host."""
    try:
        parts = urlsplit(url.strip() if "//" in url else f"//{url.strip()}")
    except ValueError:
        return url.strip()
    query = f"?{parts.query}" if parts.query else ""
    return host_of(url).removeprefix("www.") + parts.path.rstrip("/") + query


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
