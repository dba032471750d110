"""Licences in one form, and the hosts of URLs."""

import fnmatch
import re
from collections.abc import Collection
from urllib.parse import urlsplit

UNKNOWN_LICENCE = "unknown"
NO_CONDITIONS = ("public-domain", "cc0-1.0")  # ask for nothing
_CC_URL = re.compile(r"creativecommons\.org/licenses/([a-z-]+)/([\d.]+)")
# Addresses of Creative Commons, the old ones too, and names with a blank for every mark between words.
_CC0_URL = re.compile(r"creativecommons\.org/(?:publicdomain|licenses)/zero\b")
_PUBLIC_DOMAIN_URL = re.compile(
    r"creativecommons\.org/(?:publicdomain(?:/(?:mark|certification)\b|/?$)|licenses/publicdomain\b)"
    r"|web\.resource\.org/cc/publicdomain\b"
)
_CC0_NAME = re.compile(
    r"(?:public domain )?(?:cc|creative commons) ?(?:0|zero)(?: v?1 0)?"
    r"(?: (?:universal|deed|licen[cs]e|waiver|cc0|1 0|public ?domain(?: dedication)?))*"
)
_PUBLIC_DOMAIN_NAME = re.compile(
    r"(?:cc |creative commons )?(?:pd(?: mark)?|pdm|public ?domain(?: mark| dedication)?)(?: v?1 0)?"
    r"|pd (?:us|usa|old|self|art|author|user|nasa|usgov|gov|expired|simple|shape|textlogo)(?: [a-z0-9]+){0,4}"
    r"|(?:dedicated to|in|released into) the public domain|unlicense"
)
_CC_NAME = re.compile(
    r"(?:(?:cc|creative commons)[ _-]+)(by(?:[ _-]+(?:nc|nd|sa))*)(?:[ _-]*v?(\d\.\d))?"
    r"(?:[ _-]+(?:international|unported|generic|licen[cs]e|deed|(?!by|nc|nd|sa)[a-z]{2}))*"
)
_CC_WORDS = (("attribution", "by"), ("non-?commercial", "nc"), ("no-?deriv(?:ative)?s", "nd"), ("share-?alike", "sa"))
_LICENCE_NAMES = {
    "apache 2.0": "apache-2.0", "apache license 2.0": "apache-2.0", "apache-2": "apache-2.0",
    "mit license": "mit", "the mit license": "mit",
}  # fmt: skip


def normalise_licence(text: str) -> str:
    """A licence name, SPDX id or Creative Commons URL as a lower-case SPDX id: 'CC BY 4.0' -> 'cc-by-4.0'.

    All that says public domain is 'public-domain', or 'cc0-1.0' where it names CC0. An unrecognised text is only
    lower-cased, with '-' for white space; no text is 'unknown'.
    """
    text = " ".join(text.lower().split())
    if not text:
        return UNKNOWN_LICENCE
    if match := _CC_URL.search(text):
        return f"cc-{match[1]}-{match[2]}"
    words = " ".join(re.split(r"[\s_./()-]+", text)).strip()
    if _CC0_URL.search(text) or _CC0_NAME.fullmatch(words):
        return "cc0-1.0"
    if _PUBLIC_DOMAIN_URL.search(text) or _PUBLIC_DOMAIN_NAME.fullmatch(words):
        return "public-domain"
    if text in _LICENCE_NAMES:
        return _LICENCE_NAMES[text]
    short = text
    for word, letters in _CC_WORDS:
        short = re.sub(word, letters, short)
    if match := _CC_NAME.fullmatch(short):
        return "-".join(filter(None, ("cc", *re.split(r"[ _-]+", match[1]), match[2])))
    return text.replace(" ", "-")


def allows(patterns: Collection[str], licence: str) -> bool:
    """Whether one of the patterns ('cc-by-*') fits a licence of `normalise_licence`; () allows all.

    One without a version fits the patterns of all versions. What is in the public domain is allowed where CC-BY is.
    """
    if not patterns or _fits(patterns, licence):
        return True
    return licence in NO_CONDITIONS and _fits(patterns, "cc-by-4.0")


def _fits(patterns: Collection[str], licence: str) -> bool:
    return any(fnmatch.fnmatchcase(name, p.lower()) for p in patterns for name in (licence, f"{licence}-"))


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
