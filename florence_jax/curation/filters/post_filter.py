"""The post-filter: takedowns, licences, domains, unsafe pictures, personal data, opt-outs."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from florence_jax.curation.blocks import Decision, Decisions, Stage, rows_of
from florence_jax.curation.filters.licences import allows, blocking_domain, host_of, normalise_licence
from florence_jax.curation.filters.opt_out import OptOutRules, SiteRules, decide_headers
from florence_jax.curation.filters.takedown import Takedown
from florence_jax.errors import UserError

_COLUMNS = ("licence_id", "host", "mails", "phones", "cards", "headers", "url")


@dataclasses.dataclass(frozen=True)
class SafetyRules:
    """Thresholds of `decide_safety`; the defaults switch off what needs a list or a model.

    Attributes:
      licences: patterns of allowed licence ids ('cc-by-*', see `normalise_licence` and `allows`); () allows all.
        Records without a licence are 'unknown', which must be listed to be allowed.
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


def rights_scores(record: Mapping[str, Any]) -> dict[str, str]:
    """Of a raw pair "licence" (normalised; 'unknown' without one) and "host" (of its "url"; '' without one)."""
    return {"licence": normalise_licence(record.get("licence") or ""), "host": host_of(record.get("url") or "")}


def decide_safety(scores: Mapping[str, Any], rules: SafetyRules) -> Decision | None:
    """The first reason to drop a pair on its `rights_scores` and `personal_scores`, or None.

    It has "nsfw" as well, where that is switched on.

    Returns:
      (reason, value, threshold); reasons: 'licence', 'domain', 'nsfw', 'mail', 'phone', 'card'. The value of personal
      data is a count, never the data.
    """
    licence = scores["licence"]
    if not allows(rules.licences, licence):
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


@dataclasses.dataclass(frozen=True)
class PostFilterRules:
    """What the post-filter reads.

    Attributes:
      safety, opt_out: thresholds.
      sites: robots.txt and tdmrep.json, or None.
      takedown: requests, or None.
    """

    safety: SafetyRules
    opt_out: OptOutRules
    sites: SiteRules | None = None
    takedown: Takedown | None = None


def decide_post_filter(scores: Mapping[str, Any], rules: PostFilterRules) -> Decision | None:
    """`decide_safety`, then `decide_opt_out`, of a row with `_COLUMNS` (and "nsfw", where that is switched on)."""
    safety = decide_safety(scores | {"licence": scores["licence_id"]}, rules.safety)
    return safety or decide_opt_out(scores, rules.opt_out, rules.sites)


def post_filter_columns(rules: PostFilterRules) -> tuple[str, ...]:
    """What `decide_post_filter` reads."""
    return _COLUMNS if rules.safety.max_nsfw is None else (*_COLUMNS, "nsfw")


def post_filter_decisions(block: pa.Table, rules: PostFilterRules) -> tuple[pa.Table, Decisions]:
    """Takedowns (of any member of the cluster, in the column "flag"), then `decide_post_filter`."""
    rows = rows_of(block, (*post_filter_columns(rules), "flag"))
    return block, [(row["flag"], "cluster", "") if row["flag"] else decide_post_filter(row, rules) for row in rows]


def post_filter_stage(rules: PostFilterRules) -> Stage:
    """The stage 'post_filter'; its blocks need the column "flag", which 'near_duplicates' adds."""
    return Stage("post_filter", post_filter_columns(rules), functools.partial(post_filter_decisions, rules=rules))
