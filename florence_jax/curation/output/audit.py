"""The audit: every uid once in the decision log, counts that add up, drop rates by slice, and the funnel report."""

import datetime
from collections.abc import Callable, Mapping
from typing import Any

import apache_beam as beam

import florence_jax
from florence_jax.curation.output.croissant import write_croissant, write_datasheet
from florence_jax.curation.output.funnel import AuditError, CountParts, Funnel
from florence_jax.curation.output.funnel_page import write_html
from florence_jax.curation.output.uid_lists import WriteUids, remove_other_lists
from florence_jax.files import read_json, write_json


def write_audit(
    run: Any,
    table: Mapping[str, Any],
    clusters: Mapping[str, Any],
    decisions: Mapping[str, Any],
    output: Mapping[str, Any],
) -> dict[str, Any]:
    """Checks the decision log, and writes the report, the metadata and the lists of uids.

    Args:
      run: the `driver.Run`.
      table, clusters, decisions, output: manifests of the phases.

    Returns:
      The summary in report/funnel.json.

    Raises:
      AuditError: if the counts do not add up.
    """
    examples = run.config["report"]["examples"]
    facts = count_log(run.workdir, len(table["parts"]), decisions["shards"], run.rules.seed, examples, run.beam)
    funnel = Funnel(facts)
    stages = funnel.stages(decisions["stages"])
    if sum(funnel.reasons.values()) != table["rows"] or not stages[-1]["kept"] == output["records"] == facts["kept"]:
        raise AuditError(
            f"{table['rows']} pairs, {sum(funnel.reasons.values())} decisions, {output['records']} records"
        )
    summary = {
        "rows": table["rows"],
        "repeated_keys": table["repeated"],
        "damaged_inputs": table["damage"],
        "stages": stages,
        "refused_captions": facts["refused_captions"],  # of pictures that are left with others
        "records": output["records"],
        "shards": decisions["shards"],
        "slices": funnel.slice_tables(),
        "benchmarks": funnel.benchmark_table(sorted(run.rules.benchmarks)),
        "near_duplicate_join": clusters["join"],
        "component_sizes": clusters["sizes"],
        "quarantined": facts["listed"],
        "root": output["root"],
        "config": run.rules.digest,
        "version": florence_jax.__version__,
    }
    report = f"{run.workdir}/report"
    write_json(f"{report}/funnel.json", summary)
    write_html(f"{report}/funnel.html", run.workdir, summary, funnel)
    today = datetime.date.today().isoformat()
    write_croissant(f"{run.workdir}/output/croissant.json", run.config["output"], output, today)
    write_datasheet(f"{run.workdir}/output/DATASHEET.md", run.config, summary, today)
    return summary


def count_log(
    workdir: str, parts: int, shards: int, seed: int, examples: int, run: Callable[[Callable], None]
) -> dict[str, Any]:
    """Joins the table with the decision log on the runner; only counts and a few rows come back.

    Writes the uids that are in the output to output/uids/, in as many files as it has shards, and those on a hash list
    to report/quarantine.txt.

    Args:
      workdir: of the run.
      parts: of the table.
      shards: of the output.
      seed: of the choice of examples.
      examples: a reason.
      run: runs a pipeline.

    Returns:
      The facts of `CountParts`, with "kept" and "listed", the numbers of those uids. They are in audit/facts.json.
    """
    path = f"{workdir}/audit/facts.json"
    kept = f"{workdir}/output/uids/uids-{{:05d}}-of-{shards:05d}.txt"

    def pipeline(root: beam.Pipeline) -> None:
        found = root | beam.Create(range(parts)) | CountParts(workdir, parts, seed, examples)
        numbers = {
            "kept": found["kept"] | "WriteKept" >> WriteUids(kept, shards),
            "listed": found["listed"] | "WriteListed" >> WriteUids(f"{workdir}/report/quarantine.txt", 1),
        }
        sides = {name: beam.pvalue.AsSingleton(number) for name, number in numbers.items()}
        _ = found["facts"] | "WriteFacts" >> beam.Map(_write_facts, path, **sides)

    run(pipeline)
    remove_other_lists(kept, shards)
    return read_json(path)


def _write_facts(facts: Mapping[str, Any], path: str, kept: int, listed: int) -> None:
    write_json(path, {**facts, "kept": kept, "listed": listed})
