"""Captions as labels: one normalisation for labels and tokens, and its hash."""

import hashlib
import html
import unicodedata

import numpy as np


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


def caption_label(text: str) -> np.ndarray:
    """UniCL's label of a caption, int32 (2,): the 64-bit BLAKE2b hash of the normalised caption.

    A function of the caption alone, the same on every machine, so that no list of all captions is needed. Two labels
    are equal or not; nothing more is asked of them. That any two of n different captions share one has probability
    n^2 / 2^65: 1e-7 for 2 million captions, 0.03 for a billion; they would be positives of each other in the batches
    where they meet.
    """
    return _label(normalise_caption(text).encode("utf-8", "surrogatepass"))


def token_label(ids: np.ndarray) -> np.ndarray:
    """As `caption_label`, int32 (2,), of the int32 ids (L,) that a model sees: captions cut to one text are equal."""
    return _label(np.ascontiguousarray(ids, "<i4").tobytes())


def _label(data: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(data, digest_size=8).digest(), "<i4").astype(np.int32)
