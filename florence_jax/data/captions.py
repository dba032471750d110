"""Captions as labels: one normalisation for labels and tokens, and dense ids for distinct captions."""

import hashlib
import html
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from florence_jax.errors import UserError


def normalise_caption(text: str) -> str:
    """HTML entities replaced, Unicode NFKC, lower case, white space collapsed and stripped; idempotent.

    Two captions are the same description (UniCL's label, Yang et al. 2022) exactly if this gives the same string. The
    result may be empty.
    """
    if text.isascii() and "&" not in text:
        return " ".join(text.lower().split())
    while (cleaned := _clean_once(text)) != text:  # '&amp;amp;' and full-width '＆amp;' take more than one pass
        text = cleaned
    return cleaned


def _clean_once(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", html.unescape(text)).lower().split())


def caption_digest(text: str) -> int:
    """64-bit BLAKE2b digest of the normalised caption: the same on every machine, unlike Python's `hash`."""
    data = normalise_caption(text).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class CaptionIndex:
    """Normalised caption -> dense id in [0, len(index)), kept as sorted digests: 8 bytes a caption, can be pickled.

    Args:
      digests: uint64 (N,), strictly increasing; use `build` to make them from captions.
    """

    def __init__(self, digests: np.ndarray):
        self._digests = digests

    @classmethod
    def build(cls, captions: Iterable[str]) -> "CaptionIndex":
        """The index of the distinct normalised captions; ids do not depend on their order. Empty ones are left out.

        Raises:
          UserError: if there is no caption, or two different ones share a digest (expect this near 2**32 captions).
        """
        texts = {normalised for text in captions if (normalised := normalise_caption(text))}
        if not texts:
            raise UserError("the data has no captions to make labels of: check the caption fields")
        digests = np.sort(np.fromiter(map(caption_digest, texts), np.uint64, len(texts)))
        if (digests[1:] == digests[:-1]).any():
            raise UserError(f"two of the {len(texts)} captions share a 64-bit digest: change or drop one of them")
        return cls(digests)

    def __len__(self) -> int:
        return len(self._digests)

    def id(self, caption: str) -> int:
        """Dense id of a caption, which is normalised first.

        Raises:
          UserError: for a caption that the index was not built with.
        """
        digest = np.uint64(caption_digest(caption))
        place = int(self._digests.searchsorted(digest))
        if place == len(self._digests) or self._digests[place] != digest:
            raise _unknown(caption)
        return place

    def ids(self, captions: Sequence[str]) -> np.ndarray:
        """int32 (len(captions),): `id` of each. Raises UserError as `id` does."""
        digests = np.fromiter(map(caption_digest, captions), np.uint64, len(captions))
        places = np.minimum(self._digests.searchsorted(digests), len(self) - 1)
        wrong = np.flatnonzero(self._digests[places] != digests)
        if wrong.size:
            raise _unknown(captions[wrong[0]])
        return places.astype(np.int32)


def _unknown(caption: str) -> UserError:
    return UserError(
        f"caption {caption[:80]!r} is not in the caption index: build the index from the same data and fields"
    )
