"""What a run does: the stages in their order, and all their rules from its configuration, checked before any work."""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from florence_jax.curation.blocks import Stage, WideStage, make_rules
from florence_jax.curation.dedup.join import DESIGNS, Join
from florence_jax.curation.dedup.stage import DuplicateRules, NearDuplicates, decontamination_stage
from florence_jax.curation.filters.captions import TEXT_PRESETS, Text, TextRules
from florence_jax.curation.filters.known_pictures import HashList, quarantine_stage
from florence_jax.curation.filters.opt_out import OptOutRules, SiteRules
from florence_jax.curation.filters.post_filter import PostFilterRules, SafetyRules, post_filter_stage
from florence_jax.curation.filters.sizes import SizeRules, size_stage
from florence_jax.curation.filters.takedown import Takedown
from florence_jax.curation.filters.validity import ValidityRules, validity_stage
from florence_jax.curation.ingest.hashing import Limits
from florence_jax.curation.ingest.measure import MeasureRules
from florence_jax.curation.select.queries import Metadata
from florence_jax.curation.select.relevance import RelevanceRules
from florence_jax.curation.select.rules import SelectRules
from florence_jax.curation.select.stage import Relevance, Selection
from florence_jax.curation.table import SCORES
from florence_jax.errors import UserError, require
from florence_jax.files import filesystem, json_digest, read_json

OUTPUT_FORMATS = ("array_record", "parquet", "webdataset")
SCORE_NAMES = ("relevance", "nsfw", "learner_loss", "reference_loss")
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
class CurationRules:
    """What the stages read; can be pickled into workers.

    Attributes:
      seed: of the keyed hashes.
      measure: how splits are measured.
      validity, size, text, relevance, select, post_filter: of the stages of those names.
      join: of near-duplicates, and `min_detail`: pictures with less are compared as exact copies only.
      cap: pairs a caption.
      scores: name of a score to what makes it: 'field:NAME', 'module:function' or 'checkpoint:FOLDER'; '' for none.
      tokenizer: of that folder; '' for the one that it names.
      clusters: of the image embeddings, for `select.cluster_t`.
      metadata: queries, or None.
      benchmarks: name to folder of pictures that must not be trained on.
      benchmark_detail: benchmark pictures with less detail are found as exact copies only; 0, since here a false match
        costs a pair and a missed one an evaluation.
      digest: stands for everything that decisions depend on.
    """

    seed: int
    measure: MeasureRules
    validity: ValidityRules
    size: SizeRules
    join: Join
    min_detail: float
    text: TextRules
    cap: int
    scores: Mapping[str, str]
    tokenizer: str
    clusters: int
    relevance: RelevanceRules
    select: SelectRules
    metadata: Metadata | None
    post_filter: PostFilterRules
    benchmarks: Mapping[str, str]
    benchmark_detail: float
    digest: str

    @property
    def scorers(self) -> dict[str, str]:
        """The scores that need pictures, a pass of their own."""
        return {name: spec for name, spec in self.scores.items() if spec and not spec.startswith(FIELD)}

    @property
    def duplicates(self) -> DuplicateRules:
        """Of the stage 'near_duplicates'."""
        safety = self.post_filter.safety
        known = dataclasses.replace(safety, max_nsfw=None) if "nsfw" in self.scorers else safety
        return DuplicateRules(self.join, self.text, dataclasses.replace(self.post_filter, safety=known))

    def picture_stages(self) -> list[Stage]:
        """The stages before near-duplicates are looked for: what they drop is compared with nothing."""
        return [quarantine_stage(), validity_stage(self.validity), size_stage(self.size)]


def make_all(config: Mapping[str, Any]) -> CurationRules:
    """The rules of a configuration as `configs/curate.py` lays it out.

    Raises:
      UserError: for an unknown option, a value out of range, or a list that cannot be read.
    """
    text, post = dict(config["text"]), dict(config["post_filter"])
    near, select = dict(config["near_duplicates"]), dict(config["selection"])
    preset = text.pop("preset")
    if preset not in TEXT_PRESETS:
        raise UserError(f"text.preset={preset!r} is unknown; known: {', '.join(TEXT_PRESETS)}")
    cap = text.pop("cap")
    text_rules = make_rules(TextRules, dataclasses.asdict(TEXT_PRESETS[preset]) | text)
    if near["k"] not in DESIGNS:
        raise UserError(f"near_duplicates.k={near['k']} must be one of {', '.join(map(str, DESIGNS))}")
    metadata, clusters = select.pop("metadata"), select.pop("clusters")
    select_rules = make_rules(SelectRules, select)
    relevance_options = dict(config["relevance"])
    tokenizer = relevance_options.pop("tokenizer")
    relevance = make_rules(RelevanceRules, relevance_options)
    _check_scores(config["scores"], select_rules, relevance, clusters, post["max_nsfw"])
    _check_output(config)
    if select_rules.t and not metadata:
        raise UserError("selection.t needs queries: give selection.metadata, a file with one query a line")
    files = [metadata, *(post[name] for name in ("takedown", "robots", "tdmrep"))]
    files += config["decontamination"]["benchmarks"].values()
    measure = _measure_rules(config)
    return CurationRules(
        seed=config["seed"],
        measure=measure,
        validity=make_rules(ValidityRules, config["validity"] | {"limits": measure.limits.by_status()}),
        size=make_rules(SizeRules, config["size"]),
        min_detail=near.pop("min_detail"),
        join=make_rules(Join, near),
        text=text_rules,
        cap=cap,
        scores=dict(config["scores"]),
        tokenizer=tokenizer,
        clusters=clusters,
        relevance=relevance,
        select=select_rules,
        metadata=Metadata.from_file(metadata) if metadata else None,
        post_filter=_post_filter_rules(post),
        benchmarks=dict(config["decontamination"]["benchmarks"]),
        benchmark_detail=config["decontamination"]["min_detail"],
        digest=json_digest([{name: config[name] for name in DECIDING}, list(map(_content, files))]),
    )


def make_stages(rules: CurationRules, count: int, benchmarks: str = "") -> list[Stage | WideStage]:
    """The stages in their order. A pair leaves at the first that finds a reason.

    Args:
      rules: of the run.
      count: blocks of the table, and of every shuffle.
      benchmarks: file of the index of benchmark pictures; '' where there are none.
    """
    return [
        *rules.picture_stages(),
        NearDuplicates(rules.duplicates, count),
        Text(rules.cap, rules.seed, count),
        Relevance(rules.relevance if rules.scores.get("relevance") else None),
        Selection(rules.select, rules.metadata, rules.seed, count),
        post_filter_stage(rules.post_filter),
        decontamination_stage(benchmarks, rules.benchmark_detail),
    ]


def stages_before(stages: Sequence[Stage | WideStage], columns: Collection[str]) -> list[Stage | WideStage]:
    """The stages before the first that reads one of these columns."""
    return list(itertools.takewhile(lambda stage: not set(columns) & set(stage.columns), stages))


def _post_filter_rules(options: Mapping[str, Any]) -> PostFilterRules:
    options = dict(options)
    options.pop("hash_list")  # of `_measure_rules`
    takedown, robots, tdmrep = (options.pop(name) for name in ("takedown", "robots", "tdmrep"))
    opt_out = make_rules(OptOutRules, options.pop("opt_out"))
    return PostFilterRules(
        make_rules(SafetyRules, options),
        opt_out,
        SiteRules(_texts(robots), _texts(tdmrep)) if robots or tdmrep else None,
        Takedown.from_file(takedown) if takedown else None,
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
        json_digest([options, extra, _content(hash_list), SCORES.names]),
    )


def _check_output(config: Mapping[str, Any]) -> None:
    """Raises UserError for what would fail after all the work."""
    if unknown := sorted(set(config["output"]["formats"]) - set(OUTPUT_FORMATS)):
        raise UserError(f"output.formats={unknown[0]!r} is unknown; known: {', '.join(OUTPUT_FORMATS)}")
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
    if unknown := set(scores) - set(SCORE_NAMES):
        raise UserError(f"scores.{sorted(unknown)[0]} is unknown; known: {', '.join(SCORE_NAMES)}")
    for name, spec in scores.items():
        if spec and ":" not in spec:
            raise UserError(f"scores.{name}={spec!r}: write field:NAME, module:function or checkpoint:FOLDER")
        if spec.startswith("checkpoint:") and name != "relevance":
            raise UserError(f"scores.{name}={spec!r}: a checkpoint gives 'relevance' only")
    needed = [("post_filter.max_nsfw", max_nsfw is not None, ("nsfw",))]
    needed += [("relevance.min_score", relevance.min_score is not None, ("relevance",))]
    needed += [("relevance.keep", relevance.keep < 1, ("relevance",))]
    needed += [("selection.min_gap", select.min_gap is not None, ("learner_loss", "reference_loss"))]
    for option, used, names in needed:
        if used and not all(scores.get(name) for name in names):
            raise UserError(f"{option} needs a score: set {' and '.join(f'scores.{name}' for name in names)}")
    if clusters:
        require("sklearn", "selection.clusters needs scikit-learn: pip install '.[curation]'")
    if select.cluster_t and not (clusters and scores["relevance"].startswith("checkpoint:")):
        raise UserError(
            "selection.cluster_t needs selection.clusters and image embeddings: set scores.relevance=checkpoint:FOLDER"
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
