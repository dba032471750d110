"""Configuration files: where they are found, and the argument behind their name ('configs/pretrain.py:variant=B')."""

import sys
from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from florence_jax.errors import UserError

PACKAGE = Path(__file__).parent
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")  # shipped files: in an installation, in a checkout


def find_config(path: str) -> str:
    """The file that `path` names: the one here or, for 'configs/NAME.py' that is not here, the shipped one.

    A shipped file that is taken is told on stderr.

    Raises:
      UserError: a path in configs/ that is neither here nor shipped.
    """
    file = Path(path)
    if file.parent != Path("configs") or file.exists():
        return path
    folder = next(filter(Path.is_dir, FOLDERS))
    if not (folder / file.name).is_file():
        names = ", ".join(f"configs/{known.name}" for known in sorted(folder.glob("*.py")))
        raise UserError(f"there is no {path} here; shipped are {names}")
    print(f"{path} is not here: {folder / file.name} is used", file=sys.stderr, flush=True)
    return str(folder / file.name)


class ConfigFileParser(config_flags.ConfigFileFlagParser):
    """Value of --config -> ConfigDict, from the file that `find_config` says."""

    def parse(self, path: str) -> ConfigDict:
        """The configuration of 'FILE.py' or 'FILE.py:ARG'."""
        name, colon, arg = path.partition(":")
        try:
            return super().parse(find_config(name) + colon + arg)
        except UserError as error:
            # ml_collections raises it anew, with its traceback in the message; the original is the context.
            raise error.__context__ if isinstance(error.__context__, UserError) else error from None


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
