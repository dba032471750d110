r"""Runs one configuration with several settings and several seeds, and prints the results side by side.

    python -m florence_jax.tools.compare --seeds=0,1,2                                # the laptop run and its spread
    python -m florence_jax.tools.compare --seeds=0,1,2 --vary=loss=unicl,clip         # UniCL against plain CLIP targets
    python -m florence_jax.tools.compare --config=configs/pretrain.py:runlocal --vary=optim.weight_decay=0.1,0.3
    python -m florence_jax.tools.compare --config=configs/detect.py --workdir=runs/compare_detect \
        --case="pretrained: init=runs/pretrain/checkpoints" \
        --case="frozen random encoder: init= model.variant=ti detector.tower_lr=0" \
        --case="all random: init= model.variant=ti"

`--vary` gives one setting several values; each `--case` is a name and, after the ':', any number of settings.
Each run is `python -m florence_jax.main` in a folder of its own below --workdir, so that an interrupted comparison
continues where it was, and a finished run is not repeated; `compare.json` there says what the run was started with, and
another comparison does not take the folder. The table has mean, deviation and lowest to highest over the seeds; it is
also in WORKDIR/report.html, and the numbers are in WORKDIR/result.json.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from florence_jax.command_line import enter, exit_code
from florence_jax.errors import UserError
from florence_jax.files import with_home, write_json, write_text
from florence_jax.page import markup, table_html, write_page

SETTINGS_FILE = "compare.json"


class Column(NamedTuple):
    """What a column of the table is of.

    Attributes:
      label: its head. folder: beginning of the names of its runs' folders.
      name, value: of the setting that is varied; '' for none.
      options: further ones of the command.
    """

    label: str
    folder: str
    name: str = ""
    value: str = ""
    options: tuple[str, ...] = ()


def parse_case(text: str) -> Column:
    """'large: batch_size=256 epochs=40' as a column. Raises UserError without a name, or for what is no NAME=VALUE."""
    label, colon, settings = text.partition(":")
    label = label.strip()
    try:
        words = shlex.split(settings)
    except ValueError as error:
        raise UserError(f"--case={text!r}: {error}") from error
    if not colon or not label or not all(re.match(r"[\w.]+=", word) for word in words):
        raise UserError(
            f"--case={text!r}: write --case='LABEL: NAME=VALUE NAME=VALUE', such as --case='large: batch_size=256'"
        )
    options = tuple(f"--config.{word.removeprefix('config.')}" for word in words)
    return Column(label, re.sub(r"[^\w.-]+", "_", label), options=options)


def columns_of(vary: str, cases: Sequence[str]) -> list[Column]:
    """The columns of the table. Raises UserError for both, or two cases of one name."""
    if not cases:
        return [
            Column(f"{name}={value}", f"{name}_{value}".replace("/", "_"), name, value)
            if name
            else Column("as configured", "default")
            for name, value in parse_vary(vary)
        ]
    if vary:
        raise UserError("give --vary or --case, not both: a case holds any number of settings")
    columns = [parse_case(case) for case in cases]
    folders = [column.folder for column in columns]
    if twice := next((c.label for c in columns if folders.count(c.folder) > 1), None):
        raise UserError(f"--case: two cases are called {twice!r}")
    return columns


def parse_vary(text: str) -> list[tuple[str, str]]:
    """'loss=unicl,clip' -> [('loss', 'unicl'), ('loss', 'clip')]; '' -> [('', '')], the configuration as it is.

    Raises:
      UserError: without a name or without values.
    """
    if not text:
        return [("", "")]
    name, equals, values = text.partition("=")
    chosen = [value for value in values.split(",") if value]
    if not equals or not name or not chosen:
        raise UserError(f"--vary={text!r}: write NAME=VALUE,VALUE, such as loss=unicl,clip")
    return [(name.removeprefix("config."), value) for value in chosen]


def parse_seeds(text: str) -> list[int]:
    """'0,1,2' -> [0, 1, 2]. Raises UserError for anything else."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds={text!r}: write whole numbers, such as 0,1,2") from error


def claim(workdir: Path, settings: Mapping[str, Any]) -> None:
    """Creates the folder of a run and writes into it what the run is started with.

    Raises:
      UserError: if the folder holds a run that was started with something else, or not by a comparison.
    """
    path = workdir / SETTINGS_FILE
    if path.exists() or (workdir / "config.json").exists():
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            found = None
        if found != settings:
            other = json.dumps(found) if found else "unknown settings"
            raise UserError(
                f"{workdir} holds a run that was started with {other}, not with {json.dumps(settings)}: choose another "
                "--workdir, or remove the folder"
            )
        return
    write_text(path, json.dumps(settings) + "\n")


def train_run(workdir: Path, settings: Mapping[str, Any]) -> dict[str, float | None]:
    """One run in `workdir`, or its results where it is finished.

    Raises:
      UserError: if the run fails; its own message is on stderr.
    """
    command = [sys.executable, "-m", "florence_jax.main", f"--config={settings['config']}", f"--workdir={workdir}"]
    varied = [f"--config.{settings['name']}={settings['value']}"] if settings["name"] else []
    command += [f"--config.seed={settings['seed']}", *varied, *settings["extra"]]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise UserError(f"the run in {workdir} ended with exit code {done.returncode}; see its message above")
    return json.loads((workdir / "result.json").read_text())


def metric_names(results: Mapping[str, Sequence[Mapping[str, float | None]]]) -> list[str]:
    """The names of all results of evaluations, each once, in the order in which the runs have them."""
    every = [name for runs in results.values() for run in runs for name in run if name.startswith("eval/")]
    return list(dict.fromkeys(every))


def values_of(runs: Sequence[Mapping[str, float | None]], metric: str) -> list[float]:
    """The values of a metric in the runs that have it."""
    return [value for run in runs if (value := run.get(metric)) is not None]


def comparison_table(results: Mapping[str, Sequence[Mapping[str, float | None]]]) -> str:
    """A column for each setting: 'mean ± deviation (lowest to highest)' over its runs, '-' for none."""
    metrics = metric_names(results)
    width = max(map(len, metrics), default=6)
    columns = [max(len(label), 30) for label in results]
    lines = [f"{'metric':<{width}}" + "".join(f"  {label:>{w}}" for label, w in zip(results, columns, strict=True))]
    for metric in metrics:
        cells = [_cell(values_of(runs, metric)) for runs in results.values()]
        lines.append(f"{metric:<{width}}" + "".join(f"  {c:>{w}}" for c, w in zip(cells, columns, strict=True)))
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, spread = mean_and_deviation(values)
    return f"{mean:.3f}" + (f" ± {spread:.3f} ({min(values):.3f} to {max(values):.3f})" if spread is not None else "")


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean, and standard deviation by the number of values less one; None where there are too few."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)) if values else None, spread


def write_comparison(workdir: Path, what: str, results: Mapping[str, Sequence[Mapping[str, float | None]]]) -> None:
    """result.json, {column: {metric: {"mean", "deviation", "values"}}}, and report.html, the table."""
    content: dict[str, Any] = {}
    for label, runs in results.items():
        for metric in metric_names({label: runs}):
            values = values_of(runs, metric)
            mean, spread = mean_and_deviation(values)
            content.setdefault(label, {})[metric] = {"mean": mean, "deviation": spread, "values": values}
    write_json(workdir / "result.json", content)
    rows = [(name, *(_cell(values_of(runs, name)) for runs in results.values())) for name in metric_names(results)]
    body = f"<p>{markup(what)}</p>{table_html(('metric', *results), rows)}"
    write_page(workdir / "report.html", "Comparison", body)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pretrain.py")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--vary", default="", help="NAME=VALUE,VALUE: a config key and its values")
    parser.add_argument(
        "--case", action="append", default=[], help="'LABEL: NAME=VALUE NAME=VALUE': a column of several settings"
    )
    parser.add_argument("--workdir", default="runs/compare")

    def work() -> None:
        args, extra = parser.parse_known_args(with_home(argv))
        if unknown := [option for option in extra if not option.startswith("--config.")]:
            raise UserError(f"unknown option {unknown[0]!r}; settings of the runs are written --config.name=value")
        columns, runs = columns_of(args.vary, args.case), []
        for seed in parse_seeds(args.seeds):  # seed by seed, so that an interrupted comparison has whole rows
            for column in columns:
                workdir = Path(args.workdir) / f"{column.folder}_seed{seed}"
                settings = {"config": args.config, "seed": seed, "name": column.name, "value": column.value}
                runs.append((column.label, workdir, settings | {"extra": [*extra, *column.options]}))
                claim(*runs[-1][1:])
        results: dict[str, list[dict[str, float | None]]] = {}
        for label, workdir, settings in runs:
            results.setdefault(label, []).append(train_run(workdir, settings))
        what = f"{args.config}, seeds {args.seeds}: mean ± deviation (lowest to highest)"
        write_comparison(Path(args.workdir), what, results)
        print(f"{what}\n{comparison_table(results)}")

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
