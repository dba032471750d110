"""The phases of a run. Each leaves files and a manifest in the workdir; a restart goes on where the last one ended.

measured/   a part of the table of scores for each split of the input (and copies of its pictures, where needed)
table/      all rows, sorted by uid and divided into parts: the same for any order of the input
clusters/   edges between near-duplicates, and the cluster of each row
scores/     scores of pictures by models, where the configuration asks for some
decisions/  log-*: every uid once, with its reason; plan-*: the rows of each output shard
output/     the shards, their manifests and checksums, lists of uids, Croissant metadata and a data sheet
audit/      what the report is made of: counts, and rows that are examples
report/     funnel.json and funnel.html
"""

from collections.abc import Mapping, Sequence
from typing import Any

from florence_jax.curation.dedup.phase import build_benchmarks, build_clusters
from florence_jax.curation.ingest.phase import build_table
from florence_jax.curation.output.audit import write_audit
from florence_jax.curation.output.phase import write_output
from florence_jax.curation.run import Run
from florence_jax.curation.stages import build_decisions


def curate(config: Mapping[str, Any], workdir: str, beam_args: Sequence[str] = ()) -> dict[str, Any]:
    """All phases; returns the summary that is also in report/funnel.json.

    Raises:
      UserError: for a mistake in the configuration or the input.
    """
    run = Run(config, workdir, beam_args)
    table = build_table(run)
    clusters = build_clusters(run, table)
    scores = ""
    if run.rules.scorers:
        from florence_jax.curation.scores.phase import build_scores  # loads JAX, which the other phases do without

        scores = build_scores(run, table)
    decisions = build_decisions(run, table, scores, build_benchmarks(run))
    output = write_output(run, decisions)
    return write_audit(run, table, clusters, decisions, output)
