"""Opt-outs of publishers, as machines can read them: X-Robots-Tag, Content-Usage, TDMRep and robots.txt.

There is no HTML here: the records are images with the headers they came with. Everything is without regard to case, and
where a rule is addressed to one crawler, `OptOutRules.agents` says whether it counts.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from florence_jax.curation.blocks import Decision
from florence_jax.errors import UserError

try:
    from protego import Protego
except ImportError:  # optional: only robots.txt needs it
    Protego = None
# Directives of X-Robots-Tag that have a value after a colon; any other name before a colon is a crawler's.
_VALUED = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
_AGENT = re.compile(r"\s*([a-z*][\w.*/+-]*)\s*:(.*)", re.S | re.I)


@dataclasses.dataclass(frozen=True)
class OptOutRules:
    """What counts as an opt-out.

    Attributes:
      directives: of X-Robots-Tag. 'none' stands for 'noindex' (and nofollow).
      usage: categories of Content-Usage (IETF AIPREF) that a value of 'n' forbids.
      tdm: whether a TDMRep reservation counts.
      agents: crawlers whose rules count, besides those addressed to all. () in headers: those addressed to any crawler
        count, the cautious reading, since the user's own crawler is rarely named; in robots.txt: those to all only.
        A crawler that robots.txt names is judged by its own group alone (RFC 9309).
    """

    directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    usage: tuple[str, ...] = ("train-ai", "train-genai", "bots")
    tdm: bool = True
    agents: tuple[str, ...] = ()


def header_values(headers: Iterable[str], name: str) -> list[str]:
    """Values of all header lines 'Name: value' with this name, in order."""
    split = (line.partition(":") for line in headers)
    return [value.strip() for key, _, value in split if key.strip().lower() == name.lower()]


def parse_x_robots(value: str) -> list[tuple[str, str]]:
    """Directives of one X-Robots-Tag value as (crawler, directive), lower case; the crawler is '*' until one is named.

    The grammar is that of Google and MDN: a list with commas, in which 'name: ' starts the rules of a crawler, unless
    the name is that of a directive with a value ('unavailable_after: 25 Jun 2010 15:00:00 PST', 'max-snippet: 50').
    Values are left out; the part of a date after its comma shows as an unknown directive.
    """
    agent, found = "*", []
    for item in value.split(","):
        while (match := _AGENT.fullmatch(item)) and match[1].lower() not in _VALUED:
            agent, item = match[1].lower(), match[2]
        directive = (match[1] if match else item).strip().strip("\"'").lower()
        if directive:
            found.append((agent, directive))
    return found


def parse_content_usage(value: str) -> dict[str, str]:
    """Content-Usage, an RFC 8941 dictionary such as 'train-ai=n, bots=y;exp=1', as {category: value}, lower case.

    A category without a value is a boolean and says nothing about usage: it is left out.
    """
    members = (item.partition(";")[0].partition("=") for item in value.split(","))
    return {key.strip().lower(): val.strip().lower() for key, equals, val in members if equals}


def decide_headers(headers: Iterable[str], rules: OptOutRules) -> Decision | None:
    """The first opt-out in the headers, or None.

    Args:
      headers: response header lines of the image.

    Returns:
      ('x_robots', directive, crawler), ('content_usage', 'category=n', category) or ('tdm_reservation', '1', '0').
    """
    headers = list(headers)
    for value in header_values(headers, "x-robots-tag"):
        for agent, directive in parse_x_robots(value):
            addressed = agent == "*" or not rules.agents or agent in map(str.lower, rules.agents)
            if addressed and ("noindex" if directive == "none" else directive) in rules.directives:
                return "x_robots", directive, agent
    for value in header_values(headers, "content-usage"):
        usage = parse_content_usage(value)
        if refused := next((category for category in rules.usage if usage.get(category) == "n"), None):
            return "content_usage", f"{refused}=n", refused
    if rules.tdm and any(_reserved(value) for value in header_values(headers, "tdm-reservation")):
        return "tdm_reservation", "1", "0"
    return None


def _reserved(value: Any) -> bool:
    """Whether a tdm-reservation is set; it is 1 in the specification, and servers quote it or repeat it."""
    return any(part.strip().strip("\"'") in ("1", "true") for part in str(value).lower().split(","))


class SiteRules:
    """robots.txt and tdmrep.json of the sites that the images come from.

    Args:
      robots: host -> text of its robots.txt.
      tdmrep: host -> text of its /.well-known/tdmrep.json.

    Raises:
      UserError: if there are robots.txt texts and Protego is not installed, a robots.txt is not text, a tdmrep.json is
        not a JSON list of objects (a file that cannot be read must not count as consent), or a host occurs twice.
    """

    def __init__(self, robots: Mapping[str, str], tdmrep: Mapping[str, str]):
        if robots and Protego is None:
            raise UserError("robots.txt needs protego: pip install '.[curation]'")
        self._robots = _by_host("robots.txt", robots)
        self._tdmrep = {host: _tdm_rules(host, text) for host, text in _by_host("tdmrep.json", tdmrep).items()}
        self._parsed: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parsed": {}}

    def decide(self, url: str, rules: OptOutRules) -> Decision | None:
        """('robots_txt', path, crawler), ('tdmrep', path, location) or None for an image's URL."""
        try:
            parts = urlsplit(url)
        except ValueError:
            return None
        host, path = (parts.hostname or "").rstrip("."), parts.path or "/"
        if host in self._robots:
            robots = self._parsed.get(host) or self._parsed.setdefault(host, Protego.parse(self._robots[host]))
            for agent in rules.agents or ("*",):
                if not robots.can_fetch(url, agent):
                    return "robots_txt", path, agent
        target = path + (f"?{parts.query}" if parts.query else "")
        for location, reserved in self._tdmrep.get(host, ()) if rules.tdm else ():
            if _path_pattern(location).match(target):  # the first location that matches decides
                return ("tdmrep", path, location) if reserved else None
        return None


def _by_host(name: str, texts: Mapping[str, str]) -> dict[str, str]:
    """The texts by host in lower case."""
    found: dict[str, str] = {}
    for host, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{name} of {host} is {type(text).__name__}, not text: fix it or leave the site out")
        if found.setdefault(host.lower().rstrip("."), text) != text:
            raise UserError(f"{name} of {host.lower()} is given twice, with other texts: leave one of them out")
    return found


def _tdm_rules(host: str, text: str) -> list[tuple[str, bool]]:
    try:
        entries = json.loads(text)
        if isinstance(entries, dict):
            entries = [entries]
        return [(str(entry.get("location", "/")), _reserved(entry.get("tdm-reservation", 0))) for entry in entries]
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"tdmrep.json of {host} is not a list of objects: fix it or leave the site out") from error


@functools.lru_cache(4096)
def _path_pattern(location: str) -> re.Pattern:
    """A path pattern of robots.txt and TDMRep: a prefix, '*' any characters, '$' at the end the end of the path."""
    body, end = (location[:-1], r"\Z") if location.endswith("$") else (location, "")
    return re.compile(".*".join(map(re.escape, re.split(r"\*+", body))) + end, re.S)
