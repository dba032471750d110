r"""Runs one configuration on each of the paper's eleven detection sets (table 7), and prints AP by set and its mean.

    python -m florence_jax.tools.eleven_sets --odinw=odinw --config=configs/detect.py:protocol=fewshot,shots=5 \
        --seeds=0,1,2 --workdir=runs/eleven_5_shots --config.init=DIR
    python -m florence_jax.tools.eleven_sets --odinw=odinw --config=configs/detect.py \
        --workdir=runs/eleven_full --config.init=DIR

--odinw is the folder of GLIP's collection, with Aquarium, BCCD, ... in it; nothing is fetched. The sets are tested on
their test part, as the paper does; --part=val gives GLIP's, with minival for OxfordPets and PKLot. What trains does so
on the train part. --glip gives some classes GLIP's wordings. Each run is `python -m florence_jax.main` in a folder of
its own below --workdir; an interrupted command continues where it was. The table is also in WORKDIR/report.html, the
numbers are in WORKDIR/result.json.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florence_jax.command_line import enter, exit_code
from florence_jax.config_files import read_config
from florence_jax.data.sources.odinw import ODINW_SETS, odinw_part
from florence_jax.errors import UserError
from florence_jax.files import with_home, write_json
from florence_jax.page import markup, table_html, write_page
from florence_jax.tools.compare import claim, mean_and_deviation, parse_seeds, train_run

METRIC = "eval/test/AP"
# AP in per cent: DyHead on Swin-L trained on all pictures, on 5 shots; Florence, zero-shot.
PAPER_COLUMNS = ("paper: full", "5 shots", "zero-shot")
PAPER_AP = {
    "Aquarium": (53.1, 39.0, 43.1),
    "BCCD": (62.6, 40.6, 15.3),
    "ChessPieces": (80.7, 57.3, 13.4),
    "MaskWearing": (52.0, 26.8, 15.0),
    "OxfordPets": (85.9, 47.5, 68.9),
    "Packages": (52.0, 32.8, 79.6),
    "pistols": (74.4, 20.0, 41.4),
    "PKLot": (98.0, 22.1, 31.4),
    "pothole": (61.8, 10.8, 53.3),
    "thermalDogsAndPeople": (75.9, 54.9, 46.9),
    "WildfireSmoke": (58.7, 14.2, 48.7),
}


def chosen_sets(text: str) -> list[str]:
    """'Aquarium,BCCD' -> those, in the order of the paper's table; '' -> all. Raises UserError for an unknown one."""
    wanted = [name.strip() for name in text.split(",") if name.strip()] or list(ODINW_SETS)
    if unknown := [name for name in wanted if name not in ODINW_SETS]:
        raise UserError(f"--sets: unknown set {unknown[0]!r}; known: {', '.join(ODINW_SETS)}")
    return [name for name in ODINW_SETS if name in wanted]


def set_options(folder: str, name: str, part: str, glip: bool, trains: bool) -> list[str]:
    """The options of the run on a set: what it is tested on, and where it trains what on.

    Raises:
      UserError: for files that are not there.
    """
    if part == "val" and ODINW_SETS[name].reduced:
        part = "minival"
    end = ":glip" if glip else ""
    test = f"odinw:{folder}:{name}:{part}{end}"
    train = f"odinw:{folder}:{name}:train{end}"
    for spec in (test, train)[: 1 + trains]:
        odinw_part(spec)
    return [f"--config.data.test={test}", *([f"--config.data.train={train}"] if trains else [])]


def summary_rows(found: Mapping[str, Sequence[float]]) -> list[tuple[str, ...]]:
    """(set, AP, the paper's) of each set, in per cent, and of the mean over them; a value for each seed."""
    rows = [(name, _cell(values), *map(str, PAPER_AP[name])) for name, values in found.items()]
    means = np.mean(list(found.values()), axis=0).tolist()
    paper = np.mean([PAPER_AP[name] for name in found], axis=0)
    return [*rows, (f"mean of {len(found)}", _cell(means), *(f"{value:.1f}" for value in paper))]


def _cell(values: Sequence[float]) -> str:
    mean, spread = mean_and_deviation([100 * value for value in values])
    return f"{mean:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def write_summary(workdir: Path, what: str, found: Mapping[str, Sequence[float]]) -> str:
    """Writes result.json and report.html; returns the table as text."""
    head, rows = ("set", "AP", *PAPER_COLUMNS), summary_rows(found)
    means = np.mean(list(found.values()), axis=0).tolist()
    write_json(workdir / "result.json", {"sets": {k: list(v) for k, v in found.items()}, "mean": means})
    note = "The paper's numbers are of other weights; beside few sets the mean is of these alone."
    body = f"<p>{markup(what)}</p>{table_html(head, rows)}<p>{note}</p>"
    write_page(workdir / "report.html", "Eleven detection sets", body)
    widths = [max(len(row[k]) for row in (head, *rows)) for k in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--odinw", required=True, help="folder of the collection")
    parser.add_argument("--config", default="configs/detect.py")
    parser.add_argument("--sets", default="", help="comma-separated; default: all eleven")
    parser.add_argument("--part", default="test", choices=("test", "val"), help="that is tested on (%(default)s)")
    parser.add_argument("--glip", action="store_true", help="GLIP's wordings of some classes")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--workdir", default="runs/eleven_sets")

    def work() -> None:
        args, extra = parser.parse_known_args(with_home(argv))
        if unknown := [option for option in extra if not option.startswith("--config.")]:
            raise UserError(f"unknown option {unknown[0]!r}; settings of the runs are written --config.name=value")
        trains = read_config(args.config).mode == "train"
        seeds, names = parse_seeds(args.seeds), chosen_sets(args.sets)
        options = {name: set_options(args.odinw, name, args.part, args.glip, trains) for name in names}
        runs: list[tuple[str, Path, dict[str, Any]]] = []
        for seed in seeds:
            for name in names:
                settings = {"config": args.config, "seed": seed, "name": "", "value": ""}
                settings["extra"] = [*options[name], *extra]
                runs.append((name, Path(args.workdir) / f"{name}_seed{seed}", settings))
                claim(*runs[-1][1:])  # all before the first: one that is taken is no news for the last hour
        found: dict[str, list[float]] = {}
        for name, workdir, settings in runs:
            result = train_run(workdir, settings).get(METRIC)
            if result is None:
                raise UserError(f"the run in {workdir} has no {METRIC}: pycocotools is needed, and boxes")
            found.setdefault(name, []).append(result)
        what = f"{args.config}, seeds {args.seeds}, part {args.part}: AP in per cent"
        print(f"{what}\n{write_summary(Path(args.workdir), what, found)}")

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
