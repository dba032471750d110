"""The phases of a run. Each leaves files and a manifest in the workdir; a restart goes on where the last one ended.

measured/   a part of the table of scores for each split of the input (and copies of its pictures, where needed)
table/      all rows, sorted by uid and divided into parts: the same for any order of the input
clusters/   edges between near-duplicates, and the cluster of each row
scores/     scores of pictures by models, where the configuration asks for some
decisions/  log-*: every uid once, with its reason; plan-*: the rows of each output shard; labels.npy
output/     the shards, their manifests and checksums, Croissant metadata and a data sheet
report/     funnel.json and funnel.html
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from absl import logging
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.runners.portability.portable_runner import JobServiceHandle

from florence_jax.curation import decide
from florence_jax.curation.audit import write_audit
from florence_jax.curation.clusters import CandidateEdges, WriteEdges, labels_in_memory, labels_in_rounds, save_array
from florence_jax.curation.dedup import BenchmarkIndex
from florence_jax.curation.hashing import measure
from florence_jax.curation.inputs import list_splits
from florence_jax.curation.measure import remove_other_parts, repeat_order
from florence_jax.curation.outputs import PLAN, Writer, WriteShards, by_shard, is_shard, shard_count, with_place
from florence_jax.curation.pipeline import (
    Alive,
    Measure,
    Relevance,
    Repartition,
    Selection,
    Stage,
    by_identifier,
    chain,
    decontaminate,
)
from florence_jax.curation.rules import Rules, make_all
from florence_jax.curation.table import (
    SCORES,
    filesystem,
    json_digest,
    list_files,
    read_bytes,
    read_json,
    read_table,
    write_bytes,
    write_file,
    write_json,
    write_table,
)
from florence_jax.data.sources import IMAGE_SUFFIXES
from florence_jax.errors import UserError

MAX_PARTS = 4096
# (in the error of Beam, what to do). Java runners need a job server: a jar that Beam downloads, or a running service.
RUNNER_TROUBLES = (
    ("Unexpected pipeline runner", ""),
    ("validations errors", "(write these options in --beam)"),
    ("apache_beam[gcp]", ""),
    (
        "job server jar",
        "Name the file with --beam='--flink_job_server_jar=FILE' (or --spark_job_server_jar), or a running job server "
        "with --runner=PortableRunner --beam='--job_endpoint=HOST:PORT'",
    ),
    (
        "Java must be installed",
        "Or name a running job server: --runner=PortableRunner --beam='--job_endpoint=HOST:PORT'",
    ),
    ("FutureTimeoutError", "no job server answers there; start it, or correct --beam='--job_endpoint=HOST:PORT'"),
)


class Run:
    """What the phases share.

    Args:
      config: as `configs/curate.py` lays it out, a plain dict.
      workdir: local folder or URL.
      beam_args: options for Beam; a runner of one's own among them.

    Raises:
      UserError: for what is wrong with the configuration.
    """

    def __init__(self, config: Mapping[str, Any], workdir: str, beam_args: Sequence[str] = ()):
        self.config, self.workdir = config, workdir.rstrip("/")
        self.rules: Rules = make_all(config)
        self._beam_args = list(beam_args)

    def beam(self, build: Callable[[beam.Pipeline], Any]) -> None:
        """Runs the pipeline that `build` adds to; a UserError or OSError in a worker is raised here as one."""
        options = PipelineOptions(self._beam_args)
        try:
            with beam.Pipeline(runner=_runner(options), options=options) as pipeline:
                build(pipeline)
        except UserError:
            raise
        except Exception as error:  # runners wrap what a worker raised in types of their own
            message = re.search(r"UserError: (.*?)(?: \[while running|\\n|\n|$)", str(error))
            if message:
                raise UserError(message[1]) from error
            if trouble := runner_trouble(error):
                raise UserError(f"--runner={options.view_as(StandardOptions).runner}: {trouble}") from error
            message = re.search(r"(?:OS|Permission)Error: (\[Errno [^\\\n]*?) \[while running", str(error))
            if message:
                raise OSError(message[1]) from error
            raise

    def phase(
        self, name: str, digest: str, build: Callable[[str], Mapping[str, Any]], again: bool = False
    ) -> dict[str, Any]:
        """The manifest of a phase; `build` fills its folder anew unless it was finished for the same `digest`.

        `again`: it is filled anew in any case.
        """
        folder = f"{self.workdir}/{name}"
        manifest = read_json(f"{folder}/manifest.json")
        if manifest is not None and manifest["digest"] == digest and not again:
            logging.info("%s: there already", name)
            return manifest
        begun = read_json(f"{folder}/begun.json")
        if begun is None or begun["digest"] != digest or again:
            _remove(folder)
            write_json(f"{folder}/begun.json", {"digest": digest})
        logging.info("%s: working", name)
        manifest = {"digest": digest, **build(folder)}
        write_json(f"{folder}/manifest.json", manifest)
        return manifest


def _runner(options: PipelineOptions) -> Any:
    """Beam's Python runner, told to pass the options on to its worker processes; any other is chosen by Beam."""
    if options.view_as(StandardOptions).runner != "FnApiRunner":
        return None
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    provision = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    return fn_runner.FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(provision))


def runner_trouble(error: Exception) -> str:
    """What keeps a runner from starting, and the remedy; '' for any other error."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for sign, advice in RUNNER_TROUBLES:
        if sign in text:
            return f"{text.partition(': ')[2][:300]} {advice}".strip()
    return ""


def _remove(folder: str) -> None:
    fs, inner = filesystem(folder)
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


def part_paths(folder: str, count: int, name: str = "part") -> list[tuple[int, str]]:
    """(number, path) of the parts of a folder."""
    return [(number, f"{folder}/{name}-{number:05d}.parquet") for number in range(count)]


# -- the table --------------------------------------------------------------------------------------------------------


def build_table(run: Run) -> dict[str, Any]:
    """Measures what is not measured yet, and sorts all rows by uid."""
    splits = list_splits(run.config["inputs"], run.config["measure"]["rows_per_split"])
    splits.sort(key=lambda split: split.identity())  # the order in which inputs are named does not count
    count = run.config["parts"] or min(MAX_PARTS, max(4, len(splits) // 2))
    rules = run.rules.measure
    digest = json_digest([[split.identity() for split in splits], rules.digest, rules.retry, count])

    def build(folder: str) -> Mapping[str, Any]:
        def pipeline(root: beam.Pipeline) -> None:
            parts = root | beam.Create(splits) | Measure(run.workdir, run.rules)
            _ = parts | "Damage" >> beam.FlatMap(_damage) | beam.combiners.ToList() | beam.Map(_write_damage, folder)
            numbers = functools.partial(by_identifier, column="uid", count=count)
            tables = parts | "Read" >> beam.Map(read_table) | Repartition(numbers)
            _ = tables | "Write" >> beam.MapTuple(functools.partial(write_part, folder=folder))

        run.beam(pipeline)
        parts = [_part_facts(folder, number) for number in range(count)]
        rows = sum(part["rows"] for part in parts)
        if not rows:
            raise UserError(f"--input={run.config['inputs']} has no raw pairs")
        repeated = sum(part["repeated"] for part in parts)
        return {"parts": parts, "rows": rows, "repeated": repeated, "damage": read_json(f"{folder}/damage.json")}

    table = run.phase("table", digest, build, again=bool(rules.retry))
    remove_other_parts(run.workdir, splits, rules.digest)
    return table


def _damage(path: str) -> list[str]:
    damage = read_table(path, ["uid"]).schema.metadata.get(b"damage", b"").decode()
    return [damage] if damage else []


def _write_damage(damage: Sequence[str], folder: str) -> None:
    write_json(f"{folder}/damage.json", sorted(damage))


def write_part(number: int, table: pa.Table, folder: str) -> None:
    """Writes one part; of rows with one uid (a key that occurs twice in a source) one stays: see `repeat_order`."""
    table = table.replace_schema_metadata(None)
    uids = np.array(table["uid"].to_pylist())  # sorted
    first = np.concatenate([[True], uids[1:] != uids[:-1]])
    repeats = np.flatnonzero(~first | np.append(~first[1:], False))
    order = np.arange(len(table))
    order[repeats] = repeats[repeat_order(table.take(repeats).to_pylist())]
    table = table.take(order).combine_chunks()
    _, sha256 = write_table(f"{folder}/part-{number:05d}.parquet", table.filter(pa.array(first)))
    facts = {"rows": int(first.sum()), "repeated": int((~first).sum()), "sha256": sha256}
    write_json(f"{folder}/part-{number:05d}.json", facts)


def _part_facts(folder: str, number: int) -> dict[str, Any]:
    """Size and checksum of a part; an empty one is written where no uid fell into it."""
    facts = read_json(f"{folder}/part-{number:05d}.json")
    if facts is None:
        _, sha256 = write_table(f"{folder}/part-{number:05d}.parquet", SCORES.empty_table())
        facts = {"rows": 0, "repeated": 0, "sha256": sha256}
        write_json(f"{folder}/part-{number:05d}.json", facts)
    return facts


# -- near-duplicates --------------------------------------------------------------------------------------------------


def build_clusters(run: Run, table: Mapping[str, Any]) -> dict[str, Any]:
    """Finds near-duplicates; each row gets the number of its cluster, -1 if it is alone."""
    count = len(table["parts"])
    names = ("validity", "size", "near_duplicates")
    digest = json_digest([[part["sha256"] for part in table["parts"]], [run.config[name] for name in names]])
    rows = [part["rows"] for part in table["parts"]]
    firsts = np.concatenate([[0], np.cumsum(rows)]).tolist()

    def build(folder: str) -> Mapping[str, Any]:
        edges = f"{folder}/edges"
        if read_json(f"{edges}/counts.json") is None:
            starts = [(path, firsts[i]) for i, path in part_paths(f"{run.workdir}/table", count) if rows[i]]

            def pipeline(root: beam.Pipeline) -> None:
                found = root | beam.Create(starts) | CandidateEdges(run.rules, count)
                _ = found["edges"] | WriteEdges(edges, count)
                _ = found["counts"] | "WriteCounts" >> beam.Map(_write_value, f"{edges}/counts.json")

            run.beam(pipeline)
        sizes = [read_bytes(path, 0, 128) for path in edge_paths(edges)]
        in_memory = sum(map(_array_rows, sizes)) <= run.config["max_edges_in_memory"]
        if in_memory:
            labels = labels_in_memory(edge_paths(edges), firsts[-1])
        else:
            labels = labels_in_rounds(edges, firsts[-1], count, run.beam, edge_paths)
        members = np.bincount(labels, minlength=firsts[-1])
        labels = np.where(members[labels] > 1, labels, -1)
        for number in range(count):
            part = pa.table({"cluster": pa.array(labels[firsts[number] : firsts[number + 1]])})
            write_table(f"{folder}/part-{number:05d}.parquet", part)
        return {"join": read_json(f"{edges}/counts.json"), "sizes": _histogram(members), "in_memory": in_memory}

    return run.phase("clusters", digest, build)


def edge_paths(folder: str) -> list[str]:
    """The edge files of a folder."""
    return [f"{folder}/{name}" for name in list_files(folder, ".npy")]


def _write_value(value: Any, path: str) -> None:
    write_json(path, value)


def _array_rows(header: bytes) -> int:
    return int(re.search(rb"'shape': \((\d+)", header)[1])


def _histogram(members: np.ndarray) -> dict[str, int]:
    """How many components there are of each size, before large ones are split."""
    sizes, counts = np.unique(members[members > 1], return_counts=True)
    return {str(size): count for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)}


# -- scores, benchmarks, decisions ------------------------------------------------------------------------------------


def build_scores(run: Run, table: Mapping[str, Any]) -> str:
    """Folder of the scores of pictures, '' if the configuration asks for none."""
    if not run.rules.scorers:
        return ""
    from florence_jax.curation import scoring  # loads JAX

    count, step = len(table["parts"]), scoring.newest_step(run.rules)
    # Not in the digest: thresholds. Pairs that a new one lets live are scored, the others are known.
    models = json_digest([table["digest"], run.rules.scorers, run.rules.select.cluster_t > 0, step])
    folder = f"{run.workdir}/scores/{models}"
    parts = part_paths(f"{run.workdir}/table", count)
    _remove(f"{folder}/alive")  # of an earlier run
    score = scoring.ScoreAlive(run.workdir, run.rules, count, f"{run.workdir}/clusters", folder, step)
    run.beam(lambda root: root | beam.Create(parts) | score)
    scoring.fill_missing_parts(folder, run.rules.scorers, count)
    if not run.rules.select.cluster_t:
        return folder
    return scoring.cluster_embeddings(folder, count, run.rules.clusters, run.rules.seed)


def build_benchmarks(run: Run) -> str:
    """Path of the index of the pictures that must not be trained on, '' if there are none."""
    if not run.rules.benchmarks:
        return ""
    digest = json_digest([run.rules.digest, run.rules.measure.digest])
    path = f"{run.workdir}/benchmarks-{digest[:8]}.npz"
    if not filesystem(path)[0].exists(filesystem(path)[1]):
        pictures = {name: _pictures(folder, run.rules) for name, folder in run.rules.benchmarks.items()}
        index = BenchmarkIndex.build(pictures, run.rules.join, run.rules.benchmark_detail)
        write_file(path, index.save)
    return path


def _pictures(folder: str, rules: Rules) -> Iterable[Mapping[str, Any]]:
    fs, inner = filesystem(folder)
    for path in sorted(fs.find(inner)):
        if path.lower().endswith(IMAGE_SUFFIXES):
            yield measure(fs.cat_file(path), rules.measure.limits)


def build_decisions(run: Run, table: Mapping[str, Any], scores: str, benchmarks: str) -> dict[str, Any]:
    """Decides every pair: the log, the rows of each output shard, and the dense ids of the captions."""
    count = len(table["parts"])
    shards = run.config["output"]["shards"] or shard_count(table["rows"], run.config["output"]["records_per_shard"])
    contents = [part["sha256"] for part in table["parts"]]
    made = [hashlib.sha256(read_bytes(path)).hexdigest() for _, path in part_paths(scores, count)] if scores else []
    digest = json_digest([contents, run.rules.digest, run.rules.measure.digest, made, shards])

    def build(folder: str) -> Mapping[str, Any]:
        run.beam(lambda root: _decide(root, run, count, shards, folder, scores, benchmarks))
        labels = [read_table(path)["text_id"].to_pylist() for path in _paths(folder, "labels")]
        save_array(f"{folder}/labels.npy", np.array([text for part in labels for text in part], "S32"))
        log = [facts for i in range(count) if (facts := read_json(f"{folder}/log-{i:05d}.json")) is not None]
        return {"shards": shards, "labels": sum(map(len, labels)), "log": log}

    return run.phase("decisions", digest, build)


def _paths(folder: str, name: str) -> list[str]:
    return [f"{folder}/{file}" for file in list_files(folder, ".parquet") if file.startswith(name)]


def _decide(root: beam.Pipeline, run: Run, count: int, shards: int, folder: str, scores: str, benchmarks: str) -> None:
    """The pipeline of all stages."""
    rules, workdir = run.rules, run.workdir
    parts = root | beam.Create([part for part in part_paths(f"{workdir}/table", count)])
    first = parts | Alive(rules, count, f"{workdir}/clusters", scores)
    stages = [Relevance(rules), Selection(rules, count), Stage("post_filter", decide.post_filter, rules)]
    if benchmarks:
        stages.append(Stage("decontamination", functools.partial(decontaminate, index=benchmarks), rules))
    rest = chain(first["blocks"], stages)
    placed = rest["blocks"] | "Place" >> beam.Map(with_place, rules.seed, shards)
    kept = placed | "Kept" >> beam.Map(_kept_rows, rules.digest)
    logs = (*first["dropped"], *rest["dropped"], kept) | "AllLogs" >> beam.Flatten()
    by_uid = functools.partial(by_identifier, column="uid", count=count)
    _ = (
        logs
        | "LogByUid" >> Repartition(by_uid)
        | "WriteLog" >> beam.MapTuple(functools.partial(_write_log, folder=folder))
    )
    plans = placed | "Columns" >> beam.Map(lambda block: block.select([*PLAN, "shard", "place"]))
    plans = plans | "ByShard" >> Repartition(by_shard)
    _ = plans | "WritePlan" >> beam.MapTuple(functools.partial(_write_plan, folder=folder))
    # Labels count captions before the post-filter: a takedown moves no label of another pair.
    texts = rest["entering"]["post_filter"] | "Texts" >> beam.Map(lambda block: block.select(["text_id"]))
    by_text = functools.partial(by_identifier, column="text_id", count=count)
    texts = texts | "TextsOnce" >> beam.Map(_distinct) | "ByText" >> Repartition(by_text, "text_id")
    _ = texts | "WriteLabels" >> beam.MapTuple(functools.partial(_write_labels, folder=folder))


def _kept_rows(block: pa.Table, config: str) -> pa.Table:
    decisions = [("kept", shard, "") for shard in block["shard"].to_pylist()]
    return decide.decision_rows(block, "output", decisions, config)


def _write_log(number: int, log: pa.Table, folder: str) -> None:
    _, sha256 = write_table(f"{folder}/log-{number:05d}.parquet", log)
    write_json(f"{folder}/log-{number:05d}.json", {"rows": len(log), "sha256": sha256})


def _write_plan(number: int, plan: pa.Table, folder: str) -> None:
    plan = plan.sort_by([("place", "ascending"), ("uid", "ascending")]).drop_columns(["shard"])
    write_table(f"{folder}/plan-{number:05d}.parquet", plan)


def _distinct(texts: pa.Table) -> pa.Table:
    return pa.table({"text_id": texts["text_id"].unique()})


def _write_labels(number: int, texts: pa.Table, folder: str) -> None:
    write_table(f"{folder}/labels-{number:05d}.parquet", _distinct(texts).sort_by("text_id"))


# -- output -----------------------------------------------------------------------------------------------------------


def write_output(run: Run, decisions: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the shards that are not there yet; removes those of other runs; checksums and their Merkle root."""
    folder, output = f"{run.workdir}/decisions", run.config["output"]
    writer = Writer(
        run.workdir,
        folder,
        f"{folder}/labels.npy",
        decisions["digest"],
        output["formats"],
        output["face_detector"],
        decisions["shards"],
    )
    counts = f"{run.workdir}/output/manifest/written.json"
    run.beam(lambda root: root | beam.Create(list(range(decisions["shards"]))) | WriteShards(writer, counts))
    manifests = [read_json(f"{run.workdir}/output/manifest/{i:05d}.json") for i in range(decisions["shards"])]
    files = {name: facts for manifest in manifests for name, facts in manifest["files"].items()}
    _remove_others(f"{run.workdir}/output", files, decisions["shards"])
    lines = [f"{facts['sha256']}  {name}\n" for name, facts in sorted(files.items())]
    write_bytes(f"{run.workdir}/output/SHA256SUMS", "".join(lines).encode())
    return {
        "records": sum(manifest["records"] for manifest in manifests),
        "files": files,
        "root": merkle_root([facts["sha256"] for _, facts in sorted(files.items())]),
        **read_json(counts),
    }


def _remove_others(folder: str, files: Mapping[str, Any], shards: int) -> None:
    fs, inner = filesystem(folder)
    for path in fs.ls(inner, detail=False):
        name = path.rpartition("/")[2]
        if is_shard(name) and name not in files:
            fs.rm_file(path)
    for path in fs.ls(f"{inner}/manifest", detail=False):
        number = path.rpartition("/")[2].removesuffix(".json")
        if number.isdigit() and int(number) >= shards:
            fs.rm_file(path)


def merkle_root(digests: Sequence[str]) -> str:
    """SHA-256 tree over hexadecimal digests in their order: one value that stands for the whole output."""
    level = [bytes.fromhex(digest) for digest in digests] or [b""]
    while len(level) > 1:
        level += level[-1:] if len(level) % 2 else []
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [hashlib.sha256(left + right).digest() for left, right in pairs]
    return level[0].hex()


def curate(config: Mapping[str, Any], workdir: str, beam_args: Sequence[str] = ()) -> dict[str, Any]:
    """All phases; returns the summary that is also in report/funnel.json.

    Raises:
      UserError: for a mistake in the configuration or the input.
    """
    run = Run(config, workdir, beam_args)
    table = build_table(run)
    clusters = build_clusters(run, table)
    scores = build_scores(run, table)
    decisions = build_decisions(run, table, scores, build_benchmarks(run))
    output = write_output(run, decisions)
    return write_audit(run, table, clusters, decisions, output)
