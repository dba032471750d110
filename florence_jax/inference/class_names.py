"""Names of classes on the command line."""

from pathlib import Path

from florence_jax.data.classes import load_class_names, shipped_class_names
from florence_jax.errors import UserError


def read_names(given: str) -> tuple[tuple[str, ...], ...]:
    """The names of each class: 'cat,dog', or a file of class names or a shipped set, see `data.classes`.

    Raises:
      UserError: for a file that cannot be read, a name that occurs twice, or none.
    """
    if Path(given).is_file() or given.replace("/", "") in shipped_class_names():
        classes = load_class_names(given).names
        if len(classes) > 1 or "," not in classes[0][0]:
            return classes
        given = classes[0][0]  # all on one line
    names = [name.strip() for name in given.split(",") if name.strip()]
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"--names={given}: {repeated[0]!r} is there twice")
    if given and not names:
        raise UserError(f"--names={given} names no class")
    return tuple((name,) for name in names)
