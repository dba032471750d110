"""Results of a function of a text, remembered: captions and words come again every epoch."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

Result = TypeVar("Result")
MOST = 32768  # texts; of 76 tokens some 20 MB


class Remembered(Generic[Result]):
    """A function of a str that works each out once; can be pickled, without what it remembers.

    Results are given out again, so that arrays cannot be written to. With more than `MOST` texts it begins anew.

    Args:
      function: gives the same for the same text; what it raises is not remembered.
    """

    def __init__(self, function: Callable[[str], Result]):
        self._function = function
        self._known: dict[str, Result] = {}

    def __call__(self, text: str) -> Result:
        """The function's result."""
        known = self._known  # another thread may begin anew meanwhile
        if text in known:
            return known[text]
        result = self._function(text)
        if isinstance(result, np.ndarray):
            result.flags.writeable = False
        if len(self._known) >= MOST:
            self._known = {}
        self._known[text] = result
        return result

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": {}}
