"""The folder of a run: config.json, what the run is of, results. Checkpoints and metrics have files of their own."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from florence_jax.errors import UserError
from florence_jax.files import write_bytes

CONFIG_FILE = "config.json"


def make_workdir(workdir: Path) -> None:
    """Creates `workdir`; raises `UserError` if it cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(b"space")
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error}; choose a writable folder with space") from error


def checkpoint_directory(config: ConfigDict, workdir: Path) -> epath.Path:
    """Where the checkpoints of a run are: `config.checkpoint.directory`, or checkpoints/ in the workdir."""
    return epath.Path(config.checkpoint.directory or workdir / "checkpoints")


def write_json_file(file: Path, content: Any) -> None:
    """Writes JSON in the order that it has, in one step."""
    write_bytes(str(file), (json.dumps(content, indent=1, default=str) + "\n").encode())


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes config.json, what the folder's checkpoints and results are of: only once it is known that they will be."""
    write_json_file(workdir / CONFIG_FILE, config.to_dict())


def check_same_run(identity: Mapping[str, str], config: ConfigDict, workdir: Path) -> None:
    """Compares what a run is of with the config.json of the workdir, whose checkpoints it would resume.

    Args:
      identity: see `tasks.base.Suite`.
      config: of the run.
      workdir: of the run.

    Raises:
      UserError: for a difference: the old checkpoints would pass for ones of the new data; for an unreadable file.
    """
    try:
        before = json.loads((workdir / CONFIG_FILE).read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {workdir / CONFIG_FILE}, which says what the run there is of: {error}; choose another "
            "--workdir, or remove that file to resume with this configuration"
        ) from error
    for name, new in identity.items():
        old = _text_at(before, name)
        if old is not None and old != new:
            raise UserError(
                f"{workdir} holds a run with config.{name}={old!r}, which would be resumed with {new!r}: choose "
                f"another --workdir (to start from its weights, --config.init={checkpoint_directory(config, workdir)})"
            )


def _text_at(config: Mapping[str, Any], name: str) -> str | None:
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None
