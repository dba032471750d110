"""How commands are entered and left: Ctrl-C; of those that take a configuration --config, --workdir, mistakes."""

import contextlib
import difflib
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from florence_jax.config_files import ConfigFileParser, shipped_configs
from florence_jax.config_help import help_text
from florence_jax.errors import EXIT_INTERRUPTED, EXIT_MISTAKE, UserError
from florence_jax.files import with_home

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config(arg).", lock_config=True)
PARSER = ConfigFileParser("config")
flags.FLAGS["config"].parser = PARSER
HELP = ("--help", "-help", "-h")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; default: the config's workdir.")


def enter(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the program with its exit code.

    Ctrl-C is one line on stderr and exit code 130: what the command holds is let go, but nothing that its threads or
    processes are at is waited for. A second one ends at once. Nor is anything waited for, or tried again by libraries
    at the end, after a failure: its message is the last line.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except SystemExit as error:
        if not isinstance(error.code, int) or error.code == 0:
            raise
        code = error.code
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader has gone
            stream.flush()
    os._exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """For SIGINT: says so, and lets nobody else, as threads and libraries do that are cut off."""
    del number, frame
    signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    _last_line()
    raise KeyboardInterrupt


def _last_line() -> None:
    os.write(2, b"\nstopped by Ctrl-C\n")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def leave_at_ctrl_c() -> None:
    """From now on Ctrl-C ends this process at once, with all that it started: for workers that are not our own.

    They would answer Ctrl-C with a traceback each. They are started to ignore it, and a thread here waits for it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what is blocked can be waited for, although ...
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ... it is ignored, which programs started from here inherit

    def wait() -> None:
        signal.sigwait({signal.SIGINT})
        _last_line()
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=wait, daemon=True, name="Ctrl-C").start()


def _descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that these did; none where the system does not tell (no Linux)."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return [*found, *(inner for child in found for inner in _descendants(child))]


def exit_code(work: Callable[[], int | None]) -> int:
    """What `work` returns, 0 for None; after a user's mistake, or trouble with a file, one line on stderr and 2."""
    try:
        return work() or 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MISTAKE


def enter_with_flags(main: Callable[[list[str]], None]) -> NoReturn:
    """As `enter`, for a command that takes a configuration."""
    enter(lambda: app.run(main, flags_parser=parse_flags))


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a bad flag or config is one message on stderr and exit code 2.

    With --help it prints the program's options and, with --config, those of the configuration; exit code 0.
    ml_collections reports an unknown config key as AttributeError, a wrong type as TypeError or ValueError.
    """
    given = [word for word in with_home(argv) if word not in HELP]
    wants_help = len(given) < len(argv)
    try:
        rest = flags.FLAGS(given)
        if CONFIG.value is None and not wants_help:
            raise UserError("--config is missing; for example --config=configs/pretrain.py")
        if CONFIG.value is not None:
            _expand_home(CONFIG.value)
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        fail(error)
    if wants_help:
        print_help()
        sys.exit(0)
    return rest


def _expand_home(config: ConfigDict) -> None:
    """As `with_home`, of the texts in a configuration, which come from a file."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _expand_home(value)
        elif isinstance(value, str) and (expanded := with_home([value])[0]) != value:
            config[name] = expanded


def print_help() -> None:
    """What the program does, its own options, and those of the configuration that is given."""
    print(sys.modules["__main__"].__doc__ or "")
    for module, known in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("florence_jax") or module == sys.argv[0]:
            for flag in known:
                if "." not in flag.name:
                    print(f"--{flag.name:<12}{flag.help}")
    if CONFIG.value is None:
        print(f"\nThe options of a configuration are listed with it: --config=FILE.py --help ({shipped_configs()})")
    else:
        print(f"\n{help_text(PARSER.file, CONFIG.value)}")


def no_more_arguments(argv: list[str]) -> None:
    """Ends the program if `argv`, the command line without its flags, has more than the program's name."""
    if len(argv) > 1:
        fail(UserError(f"unexpected argument {argv[1]!r}; options are written --config.name=value"))


def fail(error: Exception) -> NoReturn:
    """Prints `error` as one line on stderr, and exits with code 2."""
    inner = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    # ml_collections wraps the name of an unknown key, with a guess at the right one, in a KeyError.
    unknown = isinstance(inner, KeyError) and inner.args
    text = str(error)
    if unknown:
        key = str(inner.args[0]).partition("Did you mean")[0].strip(" '\n")
        text = f"unknown config key {key!r}{_alike(key)}; --help lists the options"
    if isinstance(error, flags.UnrecognizedFlagError) and "Did you mean" not in text:
        names = [*flags.FLAGS, *(f"config.{path}" for path in _paths(PARSER.config or ConfigDict()))]
        near = difflib.get_close_matches(error.flagname, names, n=1, cutoff=0.8)
        text += f": did you mean --{near[0]}?" if near else "; --help lists the options"
    flag, is_group, _ = text.partition(": Failed to parse ")
    if is_group and "as a ConfigDict" in text:
        name = flag.removeprefix("flag ").partition("=")[0]
        text = f"{flag}: {name} is a group of options, of which one is given by its name, as {name}.NAME=VALUE"
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(EXIT_MISTAKE)


def _alike(key: str) -> str:
    """Known options that end as the one on the command line does that has the unknown `key` in it, for people."""
    option = next((word.partition("=")[0] for word in sys.argv if key in word.partition("=")[0].split(".")), "")
    if not option or PARSER.config is None:
        return ""
    known: dict[str, list[str]] = {}
    for path in _paths(PARSER.config):
        known.setdefault(path.rpartition(".")[2], []).append(path)
    names = difflib.get_close_matches(option.rpartition(".")[2], known, n=2, cutoff=0.8)
    found = [f"--config.{path}" for name in names for path in known[name]]
    return f": did you mean {' or '.join(found[:3])}?" if found else ""


def _paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield from _paths(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else (prefix + name,)
