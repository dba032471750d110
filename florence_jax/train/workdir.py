"""The folder of a run: config.json, what the run is of, results. Checkpoints and metrics have files of their own."""

import itertools
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from florence_jax.errors import UserError
from florence_jax.files import write_bytes

CONFIG_FILE, RESULT_FILE = "config.json", "result.json"
RUN_OF = "identity"  # in config.json


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


def has_steps(directory: epath.Path) -> bool:
    """Whether a folder holds checkpoints, which a run there would resume."""
    return directory.exists() and any(path.name.isdigit() for path in directory.iterdir())


def write_json_file(file: Path, content: Any) -> None:
    """Writes JSON in the order that it has, in one step."""
    write_bytes(str(file), (json.dumps(content, indent=1, default=str) + "\n").encode())


def write_config(config: ConfigDict, identity: Mapping[str, Any], workdir: Path) -> None:
    """Writes config.json, what the folder's checkpoints and results are of: only once it is known that they will be.

    Args:
      config: as it was given; of a training with the precision that was chosen.
      identity: see `tasks.base.Suite`; under "identity", with the data that are evaluated.
      workdir: of the run.
    """
    content = config.to_dict() | {RUN_OF: {**_evaluated(config), **identity}}
    write_json_file(workdir / CONFIG_FILE, content)


def add_evaluated(config: ConfigDict, workdir: Path) -> None:
    """Notes in the config.json of a trained run, where it has one, what it was evaluated on."""
    if content := saved_config(workdir):
        content[RUN_OF] = {**content.get(RUN_OF, {}), **_evaluated(config)}
        write_json_file(workdir / CONFIG_FILE, content)


def check_same_run(identity: Mapping[str, Any], config: ConfigDict, workdir: Path) -> None:
    """Compares what a run is of with the config.json of the workdir, whose checkpoints it would use.

    Args:
      identity: see `tasks.base.Suite`.
      config: of the run.
      workdir: of the run.

    Raises:
      UserError: for a difference: the old checkpoints would pass for ones of the new data; for an unreadable file.
    """
    if different := _differences(identity, _saved_identity(workdir)):
        raise UserError(
            f"{workdir} holds a run with {different}: give the options that it was begun with, or choose another "
            f"--workdir (to start from its weights, --config.init={checkpoint_directory(config, workdir)})"
        )


def check_same_results(identity: Mapping[str, Any], config: ConfigDict, workdir: Path) -> None:
    """As `check_same_run`, for an evaluation, whose results would replace those in the workdir.

    Data that were not evaluated before may be added: nothing is lost.

    Raises:
      UserError: for a difference; for checkpoints of which no config.json says what they are, beside `config.init`.
    """
    directory, saved = checkpoint_directory(config, workdir), _saved_identity(workdir)
    if not saved and config.init and directory.exists():
        raise UserError(
            f"{directory} holds checkpoints and no {CONFIG_FILE} says what of, so whether they or --config.init="
            f"{config.init} are to be evaluated is not known: choose another --workdir"
        )
    check_same_run(identity, config, workdir)
    if saved_config(workdir).get("mode") == "train" and not directory.exists():
        check_no_results(config, workdir)
    added = {name: value for name, value in _evaluated(config).items() if saved.get(name) and name not in identity}
    if different := _differences(added, saved):
        raise UserError(
            f"{workdir} holds results with {different}: an evaluation would replace them; choose another --workdir "
            f"(for the weights there, --config.init={directory})"
        )


def check_no_results(config: ConfigDict, workdir: Path) -> None:
    """For a folder that should have checkpoints and has none. Raises `UserError` where it has results."""
    if (workdir / RESULT_FILE).exists():
        raise UserError(
            f"{workdir} holds a {RESULT_FILE} but no checkpoints (looked in {checkpoint_directory(config, workdir)}): "
            f"choose another --workdir, or remove {workdir / RESULT_FILE}"
        )


def free_workdir(identity: Mapping[str, Any], config: ConfigDict, workdir: Path) -> Path:
    """`workdir` or, where that is of something else, `workdir`_2, _3, ...: the first that is free or of the same."""
    wanted = {**_evaluated(config), **identity}
    names = itertools.chain([workdir.name], (f"{workdir.name}_{number}" for number in itertools.count(2)))
    folders = map(workdir.with_name, names)
    return next(
        folder
        for folder in folders
        if not (folder / CONFIG_FILE).exists() or (saved := _saved_identity(folder)) and not _differences(wanted, saved)
    )


# -- what a folder is of ----------------------------------------------------------------------------------------------


def _evaluated(config: ConfigDict) -> dict[str, str]:
    return {"data.test": config.data.test, "eval.source": config.eval.source}


def saved_config(workdir: Path) -> dict[str, Any]:
    """The config.json of a folder, {} where it has none. Raises `UserError` for an unreadable one."""
    try:
        content = json.loads((workdir / CONFIG_FILE).read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {workdir / CONFIG_FILE}, which says what the run there is of: {error}; choose another "
            "--workdir, or remove that file to resume with this configuration"
        ) from error


def _saved_identity(workdir: Path) -> dict[str, Any]:
    """{} where nothing is known."""
    return saved_config(workdir).get(RUN_OF, {})


def _differences(new: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """Such as "config.text.tokenizer='a', which would now be 'b'; config.loss='clip', ..."; '' for none."""
    found = {name: value for name, value in json.loads(json.dumps(new, default=str)).items() if name in saved}
    return "; ".join(
        f"config.{name}={saved[name]!r}, which would now be {value!r}"
        for name, value in found.items()
        if not _same(saved[name], value)
    )


def _same(old: Any, new: Any) -> bool:
    """Whether two values are equal, or the same paths: relative and absolute, with and without a slash at their end."""
    if not isinstance(old, str) or not isinstance(new, str):
        return old == new
    return old == new or bool(old and new) and _places(old) == _places(new)


def _places(spec: str) -> list[tuple[str, str]]:
    """(absolute path, weight) of each source of a mixture; see `catalog.open_mixture`."""
    parts = (re.fullmatch(r"(.*?)(\*-?\d[\d.eE+-]*)?", part.strip(), re.DOTALL) for part in spec.split("|"))
    return [(os.path.abspath(part[1]), part[2] or "") for part in parts if part]
