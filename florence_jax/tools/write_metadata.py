"""Writes the side files that ArrayRecord files of older versions lack: their records without the pictures.

    python -m florence_jax.tools.write_metadata DATA ...

DATA is a file, a glob pattern or a folder of `*.array_record*` files. Beside each file PATH its PATH.meta is written,
also where there is one. Each file is read once, pictures and all.
"""

import argparse
from collections.abc import Sequence

from florence_jax.command_line import enter, exit_code
from florence_jax.data.sources.array_record import META, array_record_paths, write_side_file
from florence_jax.errors import UserError
from florence_jax.files import with_home


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code (2 for a user's mistake)."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m florence_jax.tools.write_metadata", description=__doc__, formatter_class=layout
    )
    parser.add_argument("data", nargs="+", help="file, pattern or folder of *.array_record* files")

    def work() -> None:
        for spec in parser.parse_args(with_home(argv)).data:
            paths = array_record_paths(spec)
            if not paths:
                raise UserError(f"{spec}: no *.array_record files there")
            for path in paths:
                print(f"{path}{META}: {write_side_file(path)} records", flush=True)

    return exit_code(work)


if __name__ == "__main__":
    enter(main)
