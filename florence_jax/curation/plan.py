"""All rules of a curation run, from its configuration; what is wrong with it is said before any work is done."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from florence_jax.curation.blocks import make_rules
from florence_jax.curation.dedup.join import DESIGNS, Join
from florence_jax.curation.filters.captions import TEXT_PRESETS, TextRules
from florence_jax.curation.filters.known_pictures import HashList
from florence_jax.curation.filters.opt_out import OptOutRules, SiteRules
from florence_jax.curation.filters.post_filter import SafetyRules
from florence_jax.curation.filters.sizes import SizeRules
from florence_jax.curation.filters.takedown import Takedown
from florence_jax.curation.ingest.hashing import Limits
from florence_jax.curation.ingest.measure import MeasureRules
from florence_jax.curation.select.queries import Metadata
from florence_jax.curation.select.relevance import RelevanceRules
from florence_jax.curation.select.rules import SelectRules
from florence_jax.errors import UserError
from florence_jax.files import filesystem, json_digest, read_json

FORMS = ("cmyk", "alpha", "orientation")
FORMATS = ("array_record", "parquet", "webdataset")
SCORES = ("relevance", "nsfw", "learner_loss", "reference_loss")
FIELD = "field:"
# Parts of the configuration that decisions depend on; a change of anything else moves no pair.
DECIDING = (
    "seed",
    "validity",
    "size",
    "near_duplicates",
    "text",
    "scores",
    "relevance",
    "selection",
    "post_filter",
    "decontamination",
)


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the stages read; can be pickled into workers.

    Attributes:
      seed: of the keyed hashes.
      measure: how splits are measured.
      forms: unusual pictures to drop: 'cmyk', 'alpha', 'orientation'. Otherwise they count as good: CMYK is converted,
        transparency is laid on white, orientation is applied.
      size, text, relevance, select, safety, opt_out: of the stages of those names.
      join: of near-duplicates, and `min_detail`: pictures with less are compared as exact copies only.
      star_above: components of more members are split again around their representatives.
      cap: pairs a caption.
      scores: name of a score to what makes it: 'field:NAME', 'module:function' or 'checkpoint:WORKDIR'; '' for none.
      clusters: of the image embeddings, for `select.cluster_t`.
      metadata: queries, or None.
      sites: robots.txt and tdmrep.json, or None.
      takedown: requests, or None.
      benchmarks: name to folder of pictures that must not be trained on.
      benchmark_detail: benchmark pictures with less detail are found as exact copies only; 0, since here a false match
        costs a pair and a missed one an evaluation.
      digest: stands for everything that decisions depend on.
    """

    seed: int
    measure: MeasureRules
    forms: tuple[str, ...]
    size: SizeRules
    join: Join
    min_detail: float
    star_above: int
    text: TextRules
    cap: int
    scores: Mapping[str, str]
    clusters: int
    relevance: RelevanceRules
    select: SelectRules
    metadata: Metadata | None
    safety: SafetyRules
    opt_out: OptOutRules
    sites: SiteRules | None
    takedown: Takedown | None
    benchmarks: Mapping[str, str]
    benchmark_detail: float
    digest: str

    @property
    def scorers(self) -> dict[str, str]:
        """The scores that need pictures, a pass of their own."""
        return {name: spec for name, spec in self.scores.items() if spec and not spec.startswith(FIELD)}


def make_all(config: Mapping[str, Any]) -> Rules:
    """The rules of a configuration as `configs/curate.py` lays it out.

    Raises:
      UserError: for an unknown option, a value out of range, or a list that cannot be read.
    """
    text, post = dict(config["text"]), dict(config["post_filter"])
    near, select = dict(config["near_duplicates"]), dict(config["selection"])
    forms = tuple(config["validity"]["drop"])
    if unknown := set(forms) - set(FORMS):
        raise UserError(f"validity.drop={sorted(unknown)[0]!r} is unknown; known: {', '.join(FORMS)}")
    preset = text.pop("preset")
    if preset not in TEXT_PRESETS:
        raise UserError(f"text.preset={preset!r} is unknown; known: {', '.join(TEXT_PRESETS)}")
    cap = text.pop("cap")
    text_rules = make_rules(TextRules, dataclasses.asdict(TEXT_PRESETS[preset]) | text)
    if near["k"] not in DESIGNS:
        raise UserError(f"near_duplicates.k={near['k']} must be one of {', '.join(map(str, DESIGNS))}")
    metadata, clusters = select.pop("metadata"), select.pop("clusters")
    select_rules = make_rules(SelectRules, select)
    relevance = make_rules(RelevanceRules, config["relevance"])
    _check_scores(config["scores"], select_rules, relevance, clusters, post["max_nsfw"])
    _check_output(config)
    if select_rules.t and not metadata:
        raise UserError("selection.t needs queries: give selection.metadata, a file with one query a line")
    takedown, robots, tdmrep = (post.pop(name) for name in ("takedown", "robots", "tdmrep"))
    post.pop("hash_list")
    opt_out = make_rules(OptOutRules, post.pop("opt_out"))
    files = [metadata, takedown, robots, tdmrep, *config["decontamination"]["benchmarks"].values()]
    return Rules(
        seed=config["seed"],
        measure=_measure_rules(config),
        forms=forms,
        size=make_rules(SizeRules, config["size"]),
        min_detail=near.pop("min_detail"),
        star_above=near.pop("star_above"),
        join=make_rules(Join, near),
        text=text_rules,
        cap=cap,
        scores=dict(config["scores"]),
        clusters=clusters,
        relevance=relevance,
        select=select_rules,
        metadata=Metadata.from_file(metadata) if metadata else None,
        safety=make_rules(SafetyRules, post),
        opt_out=opt_out,
        sites=SiteRules(_texts(robots), _texts(tdmrep)) if robots or tdmrep else None,
        takedown=Takedown.from_file(takedown) if takedown else None,
        benchmarks=dict(config["decontamination"]["benchmarks"]),
        benchmark_detail=config["decontamination"]["min_detail"],
        digest=json_digest([{name: config[name] for name in DECIDING}, list(map(_content, files))]),
    )


def _measure_rules(config: Mapping[str, Any]) -> MeasureRules:
    options = dict(config["measure"])
    retry, extra = tuple(options.pop("retry")), tuple(options.pop("extra_fields"))
    fields = [spec.removeprefix(FIELD) for spec in config["scores"].values() if spec.startswith(FIELD)]
    extra += tuple(sorted(set(fields) - set(extra)))
    options.pop("rows_per_split")
    hash_list = config["post_filter"]["hash_list"]
    return MeasureRules(
        make_rules(Limits, options),
        extra,
        HashList.from_file(hash_list) if hash_list else None,
        retry,
        json_digest([options, extra, _content(hash_list)]),
    )


def _check_output(config: Mapping[str, Any]) -> None:
    """Raises UserError for what would fail after all the work."""
    if unknown := sorted(set(config["output"]["formats"]) - set(FORMATS)):
        raise UserError(f"output.formats={unknown[0]!r} is unknown; known: {', '.join(FORMATS)}")
    least = {"measure.rows_per_split": 1, "output.records_per_shard": 1, "output.shards": 0, "report.examples": 0}
    for option, low in least.items():
        section, _, name = option.partition(".")
        if config[section][name] < low:
            raise UserError(f"{option}={config[section][name]} must be at least {low}")


def _check_scores(
    scores: Mapping[str, str],
    select: SelectRules,
    relevance: RelevanceRules,
    clusters: int,
    max_nsfw: float | None,
) -> None:
    if unknown := set(scores) - set(SCORES):
        raise UserError(f"scores.{sorted(unknown)[0]} is unknown; known: {', '.join(SCORES)}")
    for name, spec in scores.items():
        if spec and ":" not in spec:
            raise UserError(f"scores.{name}={spec!r}: write field:NAME, module:function or checkpoint:WORKDIR")
        if spec.startswith("checkpoint:") and name != "relevance":
            raise UserError(f"scores.{name}={spec!r}: a checkpoint gives 'relevance' only")
    needed = [("post_filter.max_nsfw", max_nsfw is not None, ("nsfw",))]
    needed += [("relevance.min_score", relevance.min_score is not None, ("relevance",))]
    needed += [("relevance.keep", relevance.keep < 1, ("relevance",))]
    needed += [("selection.min_gap", select.min_gap is not None, ("learner_loss", "reference_loss"))]
    for option, used, names in needed:
        if used and not all(scores.get(name) for name in names):
            raise UserError(f"{option} needs a score: set {' and '.join(f'scores.{name}' for name in names)}")
    if select.cluster_t and not (clusters and scores["relevance"].startswith("checkpoint:")):
        raise UserError(
            "selection.cluster_t needs selection.clusters and image embeddings: set scores.relevance=checkpoint:WORKDIR"
        )


def _texts(path: str) -> dict[str, str]:
    """A JSON object of host to file text."""
    if not path:
        return {}
    try:
        texts = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; it must be a JSON object of host to text") from error
    if not isinstance(texts, dict):
        raise UserError(f"{path} does not exist or is not a JSON object of host to text")
    return texts


def _content(path: str) -> str:
    """Stands for the content of a file, or the names and sizes in a folder of pictures."""
    if not path:
        return ""
    fs, inner = filesystem(path)
    try:
        if fs.isdir(inner):
            return json_digest(sorted((name, info["size"]) for name, info in fs.find(inner, detail=True).items()))
        return json_digest(fs.cat_file(inner).hex())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
