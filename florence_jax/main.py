"""Entry point: `python -m florence_jax.main --config=configs/pretrain.py[:args] [--workdir=DIR] [--config.x=y ...]`."""

import contextlib
import sys
from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from florence_jax.command_line import CONFIG, WORKDIR, enter_with_flags, fail, no_more_arguments
from florence_jax.errors import UserError
from florence_jax.jobs.host_memory import keep_freed_memory
from florence_jax.jobs.hosts import joined
from florence_jax.jobs.stop_signals import stopped_at_once
from florence_jax.tasks import create_suite
from florence_jax.tasks.base import Task
from florence_jax.train.loop import run
from florence_jax.train.workdir import free_workdir


def work(config: ConfigDict, given: str | None) -> int:
    """Runs the configured task in the folder `given`; returns the exit code. A mistake ends the program with a message.

    Without a folder it is the configuration's or, where that holds an evaluation of something else, one beside it.
    """
    workdir = Path(given or config.workdir)
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    try:
        suite = create_suite(config)
        if given is None and not isinstance(suite, Task):
            workdir = free_workdir(suite.identity, config, workdir)
        return run(config, suite, workdir)
    except KeyboardInterrupt:
        sys.exit(stopped_at_once())  # a job's other processes are told, and must not be waited for
    except UserError as error:
        fail(error)
    except OSError as error:
        fail(UserError(f"{error}; check the free space and permissions of {workdir}, then run the same command again"))


def main(argv: list[str]) -> None:
    """Runs the configured task, alone or as one process of a job."""
    no_more_arguments(argv)
    keep_freed_memory()
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every phase of a save at INFO
    config = CONFIG.value
    workdir = WORKDIR.value or config.workdir
    if "://" in workdir:
        fail(
            UserError(
                f"--workdir={workdir}: a line cannot be added to a file in a bucket. Give a local or shared folder, "
                f"and the bucket for the checkpoints alone: --config.checkpoint.directory={workdir}/checkpoints"
            )
        )
    try:
        with joined(config.hosts) if config.distributed else contextlib.nullcontext():
            code = work(config, WORKDIR.value)
    except UserError as error:
        fail(error)
    sys.exit(code)


if __name__ == "__main__":
    enter_with_flags(main)
