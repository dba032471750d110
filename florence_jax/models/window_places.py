"""Where the tokens of a map's windows lie, and which of them attend to each other: what kernels are given."""

import dataclasses
import math

import numpy as np

LOG2E = math.log2(math.e)
MASKED = -100.0  # Swin's additive mask value: finite, so that a softmax row never becomes NaN


@dataclasses.dataclass(frozen=True)
class Places:
    """Which tokens of a map make up its windows, and which of them attend to each other.

    Attributes:
      tokens: int (windows, tokens), row-major indices into the map.
      regions: int (windows, tokens); tokens of a window attend to those of their own region.
      outside: bool (windows, tokens), tokens that nothing attends to.
    """

    tokens: np.ndarray
    regions: np.ndarray
    outside: np.ndarray

    def pieces(self) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, int, int], ...]]:
        """Runs of tokens that follow each other in the map, at the same places in all windows, the longest first.

        Returns:
          int32 (windows, pieces), the map's token that each piece begins with; int32 (pieces,), the window's; and
          (length, first, end) for each length: the pieces first to end - 1 have it.
        """
        broken = (np.diff(self.tokens, axis=1) != 1).any(0)
        offsets = np.concatenate([[0], np.flatnonzero(broken) + 1])
        lengths = np.diff(np.append(offsets, self.tokens.shape[1]))
        order = np.argsort(-lengths, kind="stable")
        offsets, lengths = offsets[order], lengths[order]
        runs = [(int(n), np.flatnonzero(lengths == n)) for n in dict.fromkeys(lengths.tolist())]
        groups = tuple((n, int(found[0]), int(found[-1]) + 1) for n, found in runs)
        return self.tokens[:, offsets].astype(np.int32), offsets.astype(np.int32), groups

    def kinds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows that differ: the kind of each, int32 (windows,); regions and outside, (kinds, tokens) each."""
        both = np.stack([self.regions.astype(np.int32), self.outside.astype(np.int32)], 1)
        _, first, kind = np.unique(both.reshape(len(both), -1), axis=0, return_index=True, return_inverse=True)
        return kind.reshape(-1).astype(np.int32), self.regions[first], self.outside[first]
