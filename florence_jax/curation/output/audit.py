"""The audit: every uid once in the decision log, counts that add up, drop rates by slice, and the funnel report."""

import datetime
from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc

import florence_jax
from florence_jax.curation.output.croissant import write_croissant, write_datasheet
from florence_jax.curation.output.funnel import AuditError, Funnel, joined_parts
from florence_jax.curation.output.funnel_page import write_html
from florence_jax.files import write_bytes, write_json


def write_audit(
    run: Any,
    table: Mapping[str, Any],
    clusters: Mapping[str, Any],
    decisions: Mapping[str, Any],
    output: Mapping[str, Any],
) -> dict[str, Any]:
    """Checks the decision log, and writes the report, the metadata and the list of uids.

    Args:
      run: the `driver.Run`.
      table, clusters, decisions, output: manifests of the phases.

    Returns:
      The summary in report/funnel.json.

    Raises:
      AuditError: if the counts do not add up.
    """
    funnel = Funnel(run.rules.seed, run.config["report"]["examples"])
    kept: list[str] = []
    for part in joined_parts(run.workdir, len(table["parts"])):
        funnel.add(part)
        kept += part.filter(pc.equal(part["stage"], "output"))["uid"].to_pylist()
    for part in joined_parts(run.workdir, len(table["parts"])):
        funnel.find_partners(part)
    stages = funnel.stages(decisions["stages"])
    if sum(funnel.reasons.values()) != table["rows"] or not stages[-1]["kept"] == output["records"] == len(kept):
        raise AuditError(
            f"{table['rows']} pairs, {sum(funnel.reasons.values())} decisions, {output['records']} records"
        )
    summary = {
        "rows": table["rows"],
        "repeated_keys": table["repeated"],
        "damaged_inputs": table["damage"],
        "stages": stages,
        "records": output["records"],
        "labels": decisions["labels"],
        "shards": decisions["shards"],
        "slices": funnel.slice_tables(),
        "benchmarks": funnel.benchmark_table(sorted(run.rules.benchmarks)),
        "near_duplicate_join": clusters["join"],
        "component_sizes": clusters["sizes"],
        "quarantined": len(funnel.listed),
        "root": output["root"],
        "config": run.rules.digest,
        "version": florence_jax.__version__,
    }
    report = f"{run.workdir}/report"
    write_json(f"{report}/funnel.json", summary)
    write_bytes(f"{run.workdir}/output/uids.txt", "".join(f"{uid}\n" for uid in kept).encode())
    write_bytes(f"{report}/quarantine.txt", "".join(f"{uid}\n" for uid in sorted(funnel.listed)).encode())
    write_html(f"{report}/funnel.html", run.workdir, summary, funnel)
    today = datetime.date.today().isoformat()
    write_croissant(f"{run.workdir}/output/croissant.json", run.config["output"], output, today)
    write_datasheet(f"{run.workdir}/output/DATASHEET.md", run.config, summary, today)
    return summary
