"""Classes that a mirror changes, by their names."""

import re
from collections.abc import Iterable

SIDE_WORDS = frozenset(
    "left right leftward leftwards rightward rightwards clockwise anticlockwise counterclockwise east west eastward "
    "westward lefthand righthand".split()
)


def sided_names(names: Iterable[str], words: Iterable[str] = SIDE_WORDS) -> list[str]:
    """The names of classes with one of these words: a mirrored picture or video of such a class is of another.

    "push from left to right" and "turn anti-clockwise" are, "copyright" is not.

    Args:
      names: of classes.
      words: in lower case.
    """
    listed = frozenset(words)
    return [name for name in names if listed & set(re.findall(r"[^\W\d_]+", name.lower()))]
