"""The one exception type for mistakes a user can fix; exit codes that commands share."""

EXIT_INTERRUPTED = 130  # of Ctrl-C, as shells have it


class UserError(ValueError):
    """A user's mistake: the message names the thing and the fix in one line.

    `main.py` and the tools print it without a traceback and exit with code 2.
    """
