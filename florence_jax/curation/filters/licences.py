"""Licences in one form, and the hosts of URLs."""

import re
from collections.abc import Collection
from urllib.parse import urlsplit

UNKNOWN_LICENCE = "unknown"
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
