"""The only source of randomness in curation: a keyed hash, the same on any machine, worker count and input order."""

import hashlib
from collections.abc import Sequence

import numpy as np


def keyed_hash(seed: int, *parts: str) -> int:
    """uint64: BLAKE2b keyed by the seed, over the parts, each with its length in front ('ab','c' is not 'a','bc')."""
    digest = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "big", signed=True))
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(4, "big") + data)
    return int.from_bytes(digest.digest(), "big")


def keyed_hashes(seed: int, uids: Sequence[str], entries: Sequence[str]) -> np.ndarray:
    """uint64 (N,): `keyed_hash(seed, uid, entry)` of each pair of uid and entry."""
    pairs = zip(uids, entries, strict=True)
    return np.fromiter((keyed_hash(seed, uid, entry) for uid, entry in pairs), np.uint64, len(uids))


def fractions(hashes: np.ndarray | int) -> np.ndarray | float:
    """Hashes as float64 in [0, 1): their upper 53 bits, so that 1.0 cannot occur."""
    return (hashes >> np.uint64(11)) * 2.0**-53 if isinstance(hashes, np.ndarray) else (hashes >> 11) * 2.0**-53


def rank_within(groups: np.ndarray, hashes: np.ndarray, uids: Sequence[str]) -> np.ndarray:
    """Rank of each element among the elements of its group: 0 for the smallest hash.

    Args:
      groups: (N,) of any sortable type.
      hashes: uint64 (N,).
      uids: break ties of the hash.

    Returns:
      int64 (N,).
    """
    if not len(groups):
        return np.zeros(0, np.int64)
    order = np.lexsort((np.asarray(uids), hashes, groups))
    ordered = np.asarray(groups)[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sizes = np.diff(np.r_[starts, len(ordered)])
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - np.repeat(starts, sizes)
    return ranks
