"""The one exception type for mistakes a user can fix; exit codes that commands share; packages that are missing."""

import importlib.util

EXIT_MISTAKE = 2  # of a user, told in one line
EXIT_INTERRUPTED = 130  # of Ctrl-C, as shells have it


class UserError(ValueError):
    """A user's mistake: the message names the thing and the fix in one line.

    `main.py` and the tools print it without a traceback and exit with code 2.
    """


def require(module: str, message: str) -> None:
    """Raises `UserError` with the message where a module is not installed: at the start, not when it is used."""
    if importlib.util.find_spec(module) is None:
        raise UserError(message)
