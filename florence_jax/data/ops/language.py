"""Ops on texts that are looked at together with a picture: words that are masked, to be guessed."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from florence_jax.data.ops.captions import need
from florence_jax.data.ops.registry import Example, Op, checked_number, op
from florence_jax.errors import UserError

MASK_SHARE = 0.15  # of the words (Devlin et al. 2019)
AS_MASK, AS_ANOTHER = 0.8, 0.1  # of the chosen tokens become the mask, any token; the others stay as they are
LONGEST_WORD = 6  # tokens; what is longer (a sentence of a language without spaces) is masked in parts of so many


def mask_places(length: int, share: float = MASK_SHARE, whole: bool = True) -> int:
    """P, the places that `mask_words` has for a text of `length` tokens, start, end and padding included.

    They are enough for whatever is drawn: `share` of the tokens and the rest of the last word.
    """
    return math.ceil(share * max(length - 2, 1)) + (LONGEST_WORD - 1) * whole


@op("mask_words")
class MaskWords(Op):
    """Hides words of the text, for a model to guess: BERT's masked words (Devlin et al. 2019).

    Reads "text", int32 (L,), and "text_length", as op 'tokenize' leaves them. Adds
      masked_text: int32 (L,), of each chosen token in 80 % of the cases the mask, in 10 % any token, else itself;
      places: int32 (P,), positions of the chosen tokens, ascending, then 0; P = `mask_places(L, share, whole)`;
      mask_targets: int32 (P,), their ids in the text, -1 where there is none.
    Start, end, padding and unknown tokens are never chosen. Drawn anew for each place in the order of examples.

    The words lie in a random order on a circle, and those that begin within an arc of `share` of it are chosen. So
    each word is chosen with probability `share`, however long it and the text are, and about `share` of the tokens
    are. (Drawing words until enough tokens are covered would choose long ones less often.)

    Args:
      share: of the tokens.
      whole: whole words (`Tokenizer.words`); else single tokens.
    """

    random = True
    reads = frozenset(("text", "text_length"))

    def __init__(self, context: Mapping[str, Any], share: float = MASK_SHARE, whole: bool = True):
        self.tokenizer = need(context, "tokenizer")
        self.share = checked_number("share", share, 1e-3, 1)
        self.whole = whole
        self._plain = np.flatnonzero(~self.tokenizer.is_special).astype(np.int32)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Adds the masked text, places and targets."""
        text = example["text"]
        if text.ndim != 1:
            raise UserError(f"op {self.name!r} takes one text of an example, not {len(text)}: use caption and tokenize")
        masked, targets = text.copy(), np.full(mask_places(len(text), self.share, self.whole), -1, np.int32)
        places = np.zeros_like(targets)
        chosen = self._choose(text, example["text_length"], rng)
        count = len(chosen)
        places[:count], targets[:count] = chosen, text[chosen]
        fate = rng.random(count)
        masked[chosen[fate < AS_MASK]] = self.tokenizer.mask_id
        another = chosen[(fate >= AS_MASK) & (fate < AS_MASK + AS_ANOTHER)]
        masked[another] = self._plain[rng.integers(len(self._plain), size=len(another))]
        return example | {"masked_text": masked, "places": places, "mask_targets": targets}

    def _choose(self, text: np.ndarray, length: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Positions of the chosen tokens, ascending."""
        words = self.tokenizer.words(text, length)
        at = np.flatnonzero(words >= 0)
        count = len(at)
        if not self.whole:
            order = rng.permutation(count)
            return at[(order - rng.random() * count) % max(count, 1) < self.share * count]
        part = _parts(words[at])  # of each token
        sizes = np.bincount(part)
        order = rng.permutation(len(sizes))
        on_circle = np.empty(len(order))
        on_circle[order] = sizes[order].cumsum() - sizes[order]
        chosen = (on_circle - rng.random() * count) % max(count, 1) < self.share * count
        return at[chosen[part]]


def _parts(words: np.ndarray) -> np.ndarray:
    """int (n,): the number of the part that each token is in, for numbers of words: parts of `LONGEST_WORD` tokens."""
    here = np.arange(len(words))
    begin = np.searchsorted(words, words)  # where each token's word begins
    first = (here - begin) % LONGEST_WORD == 0
    return first.cumsum() - 1
