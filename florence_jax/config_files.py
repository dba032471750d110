"""Configuration files: where they are found, and the argument behind their name ('configs/pretrain.py:variant=B')."""

import functools
import importlib.util
import sys
import traceback
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from florence_jax.errors import UserError

PACKAGE = Path(__file__).parent
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")  # shipped files: in an installation, in a checkout


def find_config(path: str) -> str:
    """The file that `path` names: the one here or, for 'configs/NAME.py' that is not here, the shipped one.

    A shipped file that is taken is told on stderr, once.

    Raises:
      UserError: a path in configs/ that is neither here nor shipped.
    """
    file = Path(path)
    if file.parent != Path("configs") or file.exists():
        return path
    folder = next(filter(Path.is_dir, FOLDERS))
    if not (folder / file.name).is_file():
        raise UserError(f"there is no {path} here; shipped are {shipped_configs()}")
    _tell(f"{path} is not here: {folder / file.name} is used")
    return str(folder / file.name)


@functools.cache
def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def shipped_configs() -> str:
    """'configs/classify.py, ...', the configurations that come with the project."""
    folder = next(filter(Path.is_dir, FOLDERS))
    return ", ".join(f"configs/{known.name}" for known in sorted(folder.glob("*.py")))


class ConfigFileParser(config_flags.ConfigFileFlagParser):
    """Value of --config -> ConfigDict, from the file that `find_config` says.

    Attributes:
      file: the one that was read last; '' before.
      config: what it gave.
    """

    file = ""
    config: ConfigDict | None = None

    def parse(self, path: str) -> ConfigDict:
        """The configuration of 'FILE.py' or 'FILE.py:ARG'.

        Raises:
          UserError: for a file that is not there or has no get_config, and for whatever is wrong in it, by its line.
        """
        name, colon, arg = path.partition(":")
        self.file = file = find_config(name)
        if not Path(file).is_file():
            raise UserError(f"there is no configuration file {file}; those of the project are {shipped_configs()}")
        try:
            spec = importlib.util.spec_from_file_location(f"{self.name}_config", file)
            if spec is None or spec.loader is None:
                raise UserError(f"{file} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            if not hasattr(module, "get_config"):
                raise UserError(f"{file} has no function get_config(arg=None)")
            config = module.get_config(*([arg] if colon else []))
        except UserError:
            raise
        except Exception as error:  # whatever somebody's own file does wrong
            raise UserError(_what_is_wrong(file, error)) from error
        self.config = config
        if self._lock_config and hasattr(config, "lock"):
            config.lock()
        return config


def _what_is_wrong(file: str, error: Exception) -> str:
    """'FILE line N: TypeError: ...'."""
    if isinstance(error, SyntaxError):
        return f"{error.filename} line {error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}{f' line {lines[-1]}' if lines else ''}: {type(error).__name__}: {error}"


def read_config(path: str) -> ConfigDict:
    """The configuration of 'FILE.py' or 'FILE.py:ARG', not locked, for programs without a flag --config."""
    return ConfigFileParser("config", lock_config=False).parse(path)


def parse_arg(arg: str | None, **defaults: str | int | bool) -> ConfigDict:
    """Parses 'variant=H,res=384,runlocal' from `--config=file.py:ARG`.

    Args:
      arg: comma-separated `name=value`, or a bare `name` for a switch.
      **defaults: the known names, with default values whose types the given values take.

    Returns:
      A ConfigDict with every known name.

    Raises:
      UserError: for an unknown name or a value of the wrong type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, equals, text = item.partition("=")
        if name not in defaults:
            raise UserError(f"unknown config argument {name!r}; known: {', '.join(sorted(defaults))}")
        kind = type(defaults[name])
        if kind is bool:
            if equals and text not in ("True", "False"):
                raise UserError(f"config argument {item!r}: write {name}, {name}=True or {name}=False")
            values[name] = text != "False"
            continue
        try:
            values[name] = kind(text)
        except ValueError as error:
            raise UserError(f"config argument {item!r}: {name} takes {kind.__name__} values") from error
    return ConfigDict(values)
