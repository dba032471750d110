"""The decisions of the stages: pure functions from a block of the table of scores to a reason for each row, or None.

A block is an Arrow table, sorted by uid. Functions named after a stage give the block, perhaps with new columns, and
one decision a row: None to keep it, or (reason, value, threshold). No image is opened here.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.curation.filters import (
    Decision,
    decide_frequency,
    decide_size,
    decide_text,
    frequency_ranks,
    text_id,
)
from florence_jax.curation.keyed import keyed_hashes, rank_within
from florence_jax.curation.personal import personal_scores
from florence_jax.curation.rules import Rules
from florence_jax.curation.safety import decide_opt_out, decide_safety
from florence_jax.curation.select import UNMATCHED, decide_selection, information, learnability
from florence_jax.curation.table import DECISIONS, with_column
from florence_jax.data.captions import normalise_caption

Decisions = list[Decision | None]
TEXT_SCORES = ("characters", "words", "language", "language_probability", "repetition", "run", "url_share")
TEXT_SCORES += ("letter_share", "garbled", "file_name", "markup", "boilerplate")
KEPT = ("kept", "", "")


def rows_of(block: pa.Table, names: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of a block as a dict for each row."""
    return block.select(list(names)).to_pylist()


def decision_rows(block: pa.Table, stage: str, decisions: Sequence[Decision], config: str) -> pa.Table:
    """The log rows of a block whose rows have all been decided; see `table.DECISIONS`."""
    reasons, values, thresholds = zip(*decisions, strict=True) if decisions else ((), (), ())
    columns = [
        block["uid"],
        block["source"],
        pa.array([stage] * len(block), pa.string()),
        pa.array(reasons, pa.string()),
        pa.array(map(_shown, values), pa.string()),
        pa.array(map(_shown, thresholds), pa.string()),
        pa.array([config] * len(block), pa.string()),
    ]
    return pa.table(columns, schema=DECISIONS)


def _shown(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def split_decided(block: pa.Table, stage: str, decisions: Decisions, config: str) -> tuple[pa.Table, pa.Table]:
    """(rows that go on, log rows of those that do not)."""
    keep = np.array([decision is None for decision in decisions], bool)
    dropped = block.filter(pa.array(~keep))
    return block.filter(pa.array(keep)), decision_rows(dropped, stage, [d for d in decisions if d], config)


# -- quarantine, validity and size ------------------------------------------------------------------------------------


def quarantine(block: pa.Table, rules: Rules) -> tuple[pa.Table, Decisions]:
    """Pictures on the list of known hashes, before anything else sees them."""
    rows = rows_of(block, ("listed", "listed_limit"))
    return block, [None if r["listed"] is None else ("hash_list", r["listed"], r["listed_limit"]) for r in rows]


def validity(block: pa.Table, rules: Rules) -> tuple[pa.Table, Decisions]:
    """The status that measuring found, and forms of pictures that the configuration excludes."""
    limits = rules.measure.limits
    names = ("status", "width", "height", "bytes", "format", "mode", "has_alpha", "orientation")
    known = {
        "too_many_pixels": (lambda row: row["width"] * row["height"], limits.max_pixels),
        "too_many_bytes": (lambda row: row["bytes"], limits.max_bytes),
        "too_narrow": (lambda row: row["width"] / max(row["height"], 1), limits.max_aspect),
    }

    def decide(row: dict[str, Any]) -> Decision | None:
        if row["status"] != "ok":
            value, threshold = known.get(row["status"], (lambda row: row["format"], ""))
            return row["status"], value(row), threshold
        forms = {"cmyk": row["mode"] == "CMYK", "alpha": row["has_alpha"], "orientation": row["orientation"] != 1}
        form = next((name for name in rules.forms if forms[name]), None)
        return (form, row["mode"], "") if form else None

    return block, [decide(row) for row in rows_of(block, names)]


def size(block: pa.Table, rules: Rules) -> tuple[pa.Table, Decisions]:
    """`filters.decide_size`."""
    return block, [decide_size(row, rules.size) for row in rows_of(block, ("width", "height", "bytes"))]


# -- near-duplicates and text -----------------------------------------------------------------------------------------


def caption_choice(block: pa.Table, rules: Rules) -> pa.Table:
    """Adds what the stages after this one need of every member of a cluster.

    "text_decision" (JSON of the decision on its own caption, or ''), "clean" (no personal data in the caption),
    "flag" ('takedown' or ''): why the whole cluster must go.
    """
    decisions, clean, flags = [], [], []
    names = ("uid", "url", "image_id", "mails", "phones", "cards", *TEXT_SCORES)
    for row in rows_of(block, names):
        decision = decide_text(row, rules.text)
        decisions.append(json.dumps(decision) if decision else "")
        clean.append(not any(row[f"{kind}s"] for kind in rules.safety.personal))
        taken = rules.takedown and rules.takedown.decide(row["uid"], row["url"], row["image_id"])
        flags.append("takedown" if taken else "")
    block = with_column(block, "text_decision", decisions, pa.string())
    return with_column(with_column(block, "clean", clean, pa.bool_()), "flag", flags, pa.string())


def singletons(block: pa.Table) -> pa.Table:
    """Pairs without a near-duplicate, with the columns that `clusters` adds to representatives."""
    captions = [
        [] if decision else [caption]
        for caption, decision in zip(block["caption"].to_pylist(), block["text_decision"].to_pylist(), strict=True)
    ]
    block = with_column(block, "captions", captions, pa.list_(pa.string()))
    return with_column(block, "members", [1] * len(block), pa.int32())


def clusters(block: pa.Table, places: np.ndarray, reasons: Decisions) -> tuple[pa.Table, Decisions]:
    """Gives each representative the captions of its cluster, their number, and the flag of any member.

    Args:
      block: whole clusters, after `caption_choice`.
      places: int64 (N,), row of the representative of each row.
      reasons: why each row goes; None for representatives.
    """
    rows = rows_of(block, ("uid", "caption", "text", "text_decision", "clean", "flag"))
    captions: list[list[str]] = [[] for _ in rows]
    members, flags = [0] * len(rows), [""] * len(rows)
    for place in np.unique(places).tolist():
        inside = np.flatnonzero(places == place).tolist()
        captions[place] = _captions([rows[place], *(rows[i] for i in inside if i != place)])
        members[place] = len(inside)
        flags[place] = max(rows[i]["flag"] for i in inside)
    block = with_column(block, "captions", captions, pa.list_(pa.string()))
    block = with_column(block, "members", members, pa.int32())
    return with_column(block, "flag", flags, pa.string()), reasons


def _captions(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Distinct usable captions of a cluster, if possible without personal data; the first row's comes first."""
    usable = [row for row in rows if not row["text_decision"]]
    usable = [row for row in usable if row["clean"]] or usable[:1]
    found: dict[str, str] = {}
    for row in usable:
        found.setdefault(row["text"], row["caption"])
    return list(found.values())


def text(block: pa.Table, rules: Rules) -> tuple[pa.Table, Decisions]:
    """A pair without a usable caption goes for what is wrong with its own; else its caption is the first usable one."""
    chosen = ("caption", "text", "text_id", "mails", "phones", "cards")
    rows = rows_of(block, (*chosen, "captions", "text_decision"))
    decisions: Decisions = []
    for row in rows:
        decisions.append(None if row["captions"] else tuple(json.loads(row["text_decision"])))
        if row["captions"]:  # usable, so no longer than `filters.MAX_CAPTION`: others cost too much to normalise
            caption = row["captions"][0]
            row |= personal_scores(caption) if caption != row["caption"] else {}
            normalised = normalise_caption(caption)
            row |= {"caption": caption, "text": normalised, "text_id": text_id(normalised)}
    for name in chosen:
        block = with_column(block, name, [row[name] for row in rows], block.schema.field(name).type)
    return block, decisions


def frequency(block: pa.Table, rules: Rules) -> tuple[pa.Table, Decisions]:
    """The cap of pairs with one caption; the block holds all pairs with each of its captions."""
    ranks = frequency_ranks(block["uid"].to_pylist(), block["text_id"].to_pylist(), rules.seed)
    return block, [decide_frequency(rank, rules.cap) for rank in ranks.tolist()]


# -- relevance and selection ------------------------------------------------------------------------------------------


def relevance_scores(block: pa.Table) -> np.ndarray:
    """float32 (N,): NaN where a pair could not be scored."""
    return block["relevance"].to_numpy().astype(np.float32)


def relevance(block: pa.Table, threshold: float) -> tuple[pa.Table, Decisions]:
    """Pairs below the threshold, and those that could not be scored."""
    decisions: Decisions = []
    for score in relevance_scores(block).tolist():
        if math.isnan(score):
            decisions.append(("unscored", "", threshold))
        else:
            decisions.append(None if score >= threshold else ("relevance", score, threshold))
    return block, decisions


def query_matches(block: pa.Table, rules: Rules) -> pa.Table:
    """(uid, query) of every metadata query in every caption; the query '' for a caption without any."""
    uids, queries = [], []
    for row in rows_of(block, ("uid", "text")):
        found = [rules.metadata.entries[i] for i in rules.metadata.match(row["text"])] or [UNMATCHED]
        uids += [row["uid"]] * len(found)
        queries += found
    return pa.table({"uid": pa.array(uids, pa.string()), "query": pa.array(queries, pa.string())})


def query_ranks(matches: pa.Table, rules: Rules) -> pa.Table:
    """(uid, matched, rank from 1 within its query by keyed hash); `matches` holds all pairs of each of its queries."""
    uids, queries = matches["uid"].to_pylist(), matches["query"].to_pylist()
    ranks = rank_within(np.asarray(queries), keyed_hashes(rules.seed, uids, queries), uids) + 1
    matched = [int(query != UNMATCHED) for query in queries]
    return pa.table({"uid": matches["uid"], "matched": pa.array(matched, pa.int32()), "rank": pa.array(ranks)})


def with_balance(block: pa.Table, ranks: pa.Table) -> pa.Table:
    """Adds "balance_t", the smallest t that keeps each pair, and "matches", the number of its queries."""
    best = ranks.group_by("uid").aggregate([("rank", "min"), ("matched", "sum")])
    order = pc.index_in(block["uid"], value_set=best["uid"].combine_chunks())
    block = with_column(block, "balance_t", best["rank_min"].take(order))
    return with_column(block, "matches", best["matched_sum"].take(order))


def selection(block: pa.Table, rules: Rules, words: dict[str, int], pairs: int) -> tuple[pa.Table, Decisions]:
    """`select.decide_selection` on the columns of the rules that are on.

    Args:
      block: with "balance_t" and "matches", and "cluster_t", where those rules are on.
      rules: of the run.
      words: captions with each word, and their number, where `min_bits` is on.
      pairs: number of pairs that came to this stage.
    """
    select = rules.select
    if select.min_bits:
        bits = [information(caption, words, pairs)[0] for caption in block["text"].to_pylist()]
        block = with_column(block, "bits", bits, pa.float64())
    if select.min_gap is not None:
        losses = [block[name].to_numpy() for name in ("learner_loss", "reference_loss")]
        block = with_column(block, "gap", learnability(*losses))
    names = [name for name in ("balance_t", "matches", "bits", "cluster_t", "gap") if name in block.column_names]
    rows = rows_of(block, names) if names else [{}] * len(block)
    return block, [decide_selection(row, select) for row in rows]


# -- post-filter and decontamination ----------------------------------------------------------------------------------


def post_filter(block: pa.Table, rules: Rules) -> tuple[pa.Table, Decisions]:
    """Takedowns (of any member of the cluster), licences, domains, unsafe pictures, personal data, opt-outs."""
    names = ["flag", "licence_id", "host", "mails", "phones", "cards", "headers", "url"]
    names += ["nsfw"] if rules.safety.max_nsfw is not None else []
    decisions: Decisions = []
    for row in rows_of(block, names):
        if row["flag"]:
            decisions.append((row["flag"], "cluster", ""))
        else:
            scores = row | {"licence": row["licence_id"]}
            decisions.append(decide_safety(scores, rules.safety) or decide_opt_out(row, rules.opt_out, rules.sites))
    return block, decisions
