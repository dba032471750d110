"""How many pairs a balance over metadata queries would keep, before it is run.

    python -m florence_jax.curation.select.simulate runs/curate --metadata=queries.txt --t=20,200
    python -m florence_jax.curation.select.simulate runs/curate --metadata=queries.txt --size=400 --tail=0.06

Counts the queries in the captions of the pairs that came to the selection stage of a finished run (one with
`selection.t` or without), and prints for each t the pairs that it is expected to keep. A pair that matches several
queries is counted once. --size finds the largest t that keeps at most that many pairs; --tail the smallest t whose
queries with fewer than t pairs have at least that share of all matches (MetaCLIP 2 carries the share from one language
to another). The captions are those of the pairs themselves; a run takes a near-duplicate's where that one is unusable.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from florence_jax.command_line import enter, exit_code
from florence_jax.curation.keyed import fractions, keyed_hashes
from florence_jax.curation.select.queries import (
    Matches,
    Metadata,
    predict_size,
    t_for_size,
    t_for_tail_share,
    tail_share,
)
from florence_jax.curation.table import read_table
from florence_jax.errors import UserError
from florence_jax.files import read_json, with_home


def matches_of_run(workdir: str, metadata: Metadata, share: float = 1.0) -> tuple[Matches, np.ndarray, int]:
    """The queries of the pairs of a finished run that came to its selection stage.

    Args:
      workdir: of the run. metadata: the queries.
      share: of the pairs to keep matches of, chosen by keyed hash; all are counted.

    Returns:
      (matches of the chosen pairs, int64 (queries + 1,) counts of all pairs, number of all pairs).

    Raises:
      UserError: `workdir` holds no finished run, or no pair came to its selection stage.
    """
    manifest, decided = (read_json(f"{workdir}/{name}/manifest.json") for name in ("table", "decisions"))
    if manifest is None or decided is None:
        raise UserError(f"{workdir} holds no finished run of florence_jax.curation.main")
    stages = decided["stages"]
    came_to = pa.array([*stages[stages.index("selection") :], "output"])  # where pairs that came to selection left
    counts, pairs = np.zeros(len(metadata) + 1, np.int64), 0
    uids: list[str] = []
    chosen: list[list[int]] = []
    for number, part in enumerate(manifest["parts"]):
        if not part["rows"]:
            continue
        log = read_table(f"{workdir}/decisions/log-{number:05d}.parquet", ["uid", "stage"])
        came = log.filter(pc.is_in(log["stage"], value_set=came_to))["uid"]
        table = read_table(f"{workdir}/table/part-{number:05d}.parquet", ["uid", "text"])
        table = table.filter(pc.is_in(table["uid"], value_set=came.combine_chunks()))
        names = table["uid"].to_pylist()
        matched = [metadata.match(text) for text in table["text"].to_pylist()]
        counts += Matches.build(names, matched, len(metadata)).counts()
        pairs += len(names)
        inside = np.flatnonzero(fractions(keyed_hashes(0, names, ["simulate"] * len(names))) < share).tolist()
        uids += [names[i] for i in inside]
        chosen += [matched[i] for i in inside]
    if not uids:
        raise UserError(f"{workdir}: no pair came to the selection stage, or --share is too small")
    return Matches.build(uids, chosen, len(metadata)), counts, pairs


def simulate(workdir: str, metadata: Metadata, args: argparse.Namespace) -> dict[str, Any]:
    """`pairs` that came to the stage, `matched` of them, and for each t `pairs` expected and `tail_share`."""
    matches, counts, pairs = matches_of_run(workdir, metadata, args.share)
    wanted = list(args.t)
    if args.size:
        wanted.append(t_for_size(matches, counts, pairs, args.size, args.keep_unmatched))
    if args.tail:
        wanted.append(t_for_tail_share(counts, args.tail))
    lines = [
        {
            "t": t,
            "pairs": round(predict_size(matches, counts, pairs, t, args.keep_unmatched), 1),
            "tail_share": round(tail_share(counts, t), 4),
        }
        for t in sorted(set(wanted))
    ]
    return {
        "pairs": pairs,
        "matched": pairs - int(counts[-1]),
        "queries_found": int((counts[:-1] > 0).sum()),
        "t": lines,
    }


def whole_numbers(text: str) -> tuple[int, ...]:
    """'20,200' as integers of at least 1; raises ValueError otherwise."""
    numbers = tuple(int(item) for item in text.split(","))
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the prediction as JSON; returns the exit code (2 for a user's mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m florence_jax.curation.select.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", help="of a finished run")
    parser.add_argument("--metadata", required=True, help="file with one query a line")
    parser.add_argument("--t", type=whole_numbers, default=(), help="most pairs a query, several joined by ','")
    parser.add_argument("--size", type=int, help="find the t that keeps at most so many pairs")
    parser.add_argument("--tail", type=float, help="find the t with this share of matches in rare queries")
    parser.add_argument("--keep_unmatched", action="store_true", help="as selection.keep_unmatched")
    parser.add_argument("--share", type=float, default=1.0, help="of the pairs to hold in memory, for large runs")

    def work() -> None:
        args = parser.parse_args(with_home(argv))
        if not (args.t or args.size or args.tail):
            raise UserError("nothing to predict: give --t, --size or --tail")
        print(json.dumps(simulate(args.workdir.rstrip("/"), Metadata.from_file(args.metadata), args), indent=1))

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
