"""Entry point of data curation; see configs/curate.py for the command lines.

Options: --config=configs/curate.py[:args], --input=NAME=PATH|..., --workdir=DIR, --runner=DirectRunner (default) or a
Beam runner, --workers=N processes of DirectRunner, --beam='options of the runner', --config.x=y.
"""

import logging as python_logging
import os
import shlex
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from florence_jax.command_line import CONFIG, WORKDIR, enter_with_flags, fail, leave_at_ctrl_c, no_more_arguments
from florence_jax.config_files import read_config
from florence_jax.curation.sample import SOURCES, build_sample
from florence_jax.errors import UserError, require
from florence_jax.files import read_json, write_json

BY_INPUT, FOR_INPUT = "by input", "preset=own"  # see configs/curate.py
_INPUT = flags.DEFINE_string("input", None, "Raw pairs: NAME=PATH, several joined by '|'; default: config.inputs.")
_RUNNER = flags.DEFINE_string("runner", "DirectRunner", "Beam runner.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes of DirectRunner; 0: one a core.", lower_bound=0)
_BEAM = flags.DEFINE_string("beam", "", "Further options for the Beam runner, as on a command line.")


def beam_options(runner: str, workers: int, more: str) -> list[str]:
    """Options for Beam. DirectRunner is Beam's own Python one in processes: its default choice looks for a download.

    Args:
      runner: 'DirectRunner' or any that Beam knows.
      workers: processes; 0 for one a core, 1 for none beside this one.
      more: further options, as on a command line.
    """
    if runner != "DirectRunner":
        return [f"--runner={runner}", *shlex.split(more)]
    workers = workers or os.cpu_count() or 1
    mode = "multi_processing" if workers > 1 else "in_memory"
    direct = ["--runner=FnApiRunner", f"--direct_running_mode={mode}", f"--direct_num_workers={workers}"]
    return [*direct, "--default_sdk_harness_log_level=ERROR", *shlex.split(more)]


def given_config() -> dict[str, Any]:
    """The configuration of the command line; where that names inputs and no preset, the one for data of one's own."""
    flag, config = flags.FLAGS["config"], CONFIG.value
    inputs = _INPUT.value or config.inputs
    if inputs and config.get("preset") == BY_INPUT:
        file, _, arg = config_flags.get_config_filename(flag).partition(":")
        config = read_config(f"{file}:{','.join(filter(None, (arg, FOR_INPUT)))}")
        config.update_from_flattened_dict(config_flags.get_override_values(flag))
    return config.to_dict() | {"inputs": inputs}


def with_sample(config: dict[str, Any], workdir: str) -> dict[str, Any]:
    """Without inputs, the project's own raw sample, with its benchmark and hash list, in the workdir."""
    if config["inputs"]:
        return config
    folder = os.path.abspath(f"{workdir}/sample") if "://" not in workdir else None
    if folder is None:
        raise UserError(f"--workdir={workdir}: give --input; the project's own sample needs a local workdir")
    if not os.path.exists(f"{folder}/truth.json"):
        build_sample(folder)
    post = config["post_filter"] | {"hash_list": f"{folder}/blocked_hashes.txt"}
    return config | {
        "inputs": "|".join(f"{name}={folder}/{name}" for name in SOURCES),
        "post_filter": post,
        "decontamination": config["decontamination"] | {"benchmarks": {"sample": f"{folder}/benchmark"}},
    }


def quiet() -> None:
    """Beam's workers report every connection; only what goes wrong is of interest here."""
    for name in ("apache_beam", "root", "__main__"):
        python_logging.getLogger(name).setLevel(python_logging.ERROR)


def main(argv: list[str]) -> None:
    """Runs curation and prints the funnel."""
    no_more_arguments(argv)
    workdir = WORKDIR.value or CONFIG.value.workdir
    workdir = workdir if "://" in workdir else os.path.abspath(workdir)
    quiet()
    try:
        require("apache_beam", "data curation needs Apache Beam: pip install '.[curation]'")
        from florence_jax.curation.driver import curate
        from florence_jax.curation.output.terminal import summary_lines

        config = given_config()
        config = with_sample(config, workdir)
        if read_json(f"{workdir}/config.json") != config:
            write_json(f"{workdir}/config.json", config)
        summary = curate(config, workdir, beam_options(_RUNNER.value, _WORKERS.value, _BEAM.value))
    except UserError as error:
        fail(error)
    except OSError as error:
        fail(
            UserError(
                f"{error}; check the free space and the permissions of {workdir}, then run the same command again"
            )
        )
    print("\n".join(summary_lines(summary, config)))
    print(f"output: {workdir}/output\nreport: {workdir}/report/funnel.html\nroot:   {summary['root']}", flush=True)
    if not summary["records"]:
        fail(UserError(f"nothing is left of {summary['rows']:,} raw pairs; the lines above say why"))
    logging.info("done")


if __name__ == "__main__":
    leave_at_ctrl_c()  # Beam's workers are not our own
    enter_with_flags(main)
