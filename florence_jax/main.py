"""Entry point: `python -m florence_jax.main --config=configs/pretrain.py[:args] [--workdir=DIR] [--config.x=y ...]`."""

import json
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from florence_jax.errors import UserError
from florence_jax.tasks import create_task
from florence_jax.train.loop import run

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config(arg).", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default: the config's workdir.")


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a bad flag or config is one message on stderr and exit code 2.

    ml_collections reports an unknown config key as AttributeError, a wrong type as TypeError or ValueError.
    """
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            raise UserError("--config is missing; for example --config=configs/pretrain.py")
        _CONFIG.value.lock()  # a file that could not be loaded says so only when it is used
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        fail(error)
    return rest


def fail(error: Exception) -> None:
    """Prints `error` as one line on stderr, and exits with code 2."""
    inner = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    # ml_collections wraps the name of an unknown key, with a guess at the right one, in a KeyError.
    text = f"unknown config key {inner.args[0]}" if isinstance(inner, KeyError) and inner.args else str(error)
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def prepare_workdir(workdir: Path, config: ConfigDict) -> None:
    """Creates `workdir` and dumps the configuration; raises `UserError` if it cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = workdir / "config.json.partial"
        partial.write_text(json.dumps(config.to_dict(), indent=1, default=str) + "\n")
        partial.replace(workdir / "config.json")
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error}; choose a writable folder with space") from error


def main(argv: list[str]) -> None:
    """Runs the configured task."""
    if len(argv) > 1:
        fail(UserError(f"unexpected argument {argv[1]!r}; options are written --config.name=value"))
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every phase of a save at INFO
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or config.workdir)
    try:
        if config.distributed:
            jax.distributed.initialize()
        task = create_task(config)
        if config.mode != "eval" or config.init:
            task.open_data()
        fresh = config.mode != "eval" or (config.init and not (workdir / "checkpoints").exists())
        if fresh and jax.process_index() == 0:
            prepare_workdir(workdir, config)
        code = run(config, task, workdir)
    except UserError as error:
        fail(error)
    except OSError as error:
        fail(UserError(f"{error}; check the free space and permissions of {workdir}, then run the same command again"))
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
