"""Ops on texts seen together with a picture: words to be guessed, pictures that do not belong to a text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from florence_jax.data.ops.captions import Caption, Label, Texts, candidate_texts, need
from florence_jax.data.ops.registry import Example, Op, checked_number, key_of, op
from florence_jax.data.others import Others, PairOp
from florence_jax.data.records import BadRecord, Record, Source, sample_of
from florence_jax.errors import UserError

MASK_SHARE = 0.15  # of the words (Devlin et al. 2019)
AS_MASK, AS_ANOTHER = 0.8, 0.1  # of the chosen tokens become the mask, any token; the others stay as they are
OTHERS_TRIED_FOR_A_TEXT = 64  # records, until one shows another picture and does not have the text
FIRST_CAPTIONS, MOST_CAPTIONS = 8, 1024  # records looked at for two different captions: at first, at most
OF_A_PICTURE = ("caption", "captions")  # of a record; whether drawn or not, they are texts of its picture
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
      fixed: for evaluations, whose ops are not random: the masks of a record depend on its row alone.
    """

    reads = frozenset(("text", "text_length"))

    def __init__(
        self, share: float = MASK_SHARE, whole: bool = True, fixed: bool = False, *, context: Mapping[str, Any]
    ):
        self.tokenizer = need(context, "tokenizer")
        self.share = checked_number("share", share, 1e-3, 1)
        self.whole, self.random = whole, not fixed
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


class CaptionOp(Op):
    """An op that asks which captions a record may have; `link_captions` tells it from which fields they are drawn.

    Attributes:
      fields: of captions, those of op 'caption' before it and the usual ones; () before `link_captions`.
      whole_source: whether it is in each source that captions must differ, not only in all together.
    """

    fields: tuple[str, ...] = ()
    whole_source = False
    reads = frozenset(("label",))

    def __init__(self, context: Mapping[str, Any]):
        self._label = Label(context)

    def labels_of(self, record: Record) -> set[bytes]:
        """Labels of all captions that a record may have; of those without tokens none."""
        texts = [text for name in self.fields for text in candidate_texts(record, name) if isinstance(text, str)]
        return set(self._labels(texts))

    def _labels(self, texts: Iterable[str]) -> Iterable[bytes]:
        for text in texts:
            try:
                yield self._label.of(text).tobytes()
            except UserError:
                continue

    def check(self, sources: Sequence[Source], batch_size: int) -> None:
        """Raises UserError for batches of one, and where all captions (of a sample) are alike."""
        if batch_size < 2:
            raise UserError(
                "whether a text and a picture belong together cannot be learned from batches of one: there is no other "
                "picture; set config.batch_size to 2 or more"
            )
        for group in [[source] for source in sources] if self.whole_source else [sources]:
            self._check_captions_differ(group)

    def _check_captions_differ(self, sources: Sequence[Source]) -> None:
        looked = 0
        for count in (FIRST_CAPTIONS, MOST_CAPTIONS):
            records = [row for source in sources for row in sample_of(source, -(-count // len(sources)))]
            looked, found = len(records), set().union(*map(self.labels_of, records))
            if len(found) > 1:
                return
        names = ", ".join(source.name for source in sources)
        raise UserError(
            f"{names}: all captions are alike ({looked:,} records looked at), so that no picture does not belong to a "
            "text: whether they match cannot be learned. Use data with different captions, or leave this loss out"
        )


@op("other")
class Other(PairOp, CaptionOp):
    """Puts a picture beside the text that belongs to it in half of the rows, and in the others does not: other(image).

    Exactly floor(B/2) rows of each global batch of B match; which, is drawn by the step. A row that does not match has
    the picture of another record of its source (so that the kind of picture tells nothing), drawn uniformly, never one
    that has the example's text among its captions, nor one known to be the same picture ("image_id", or equal bytes);
    such a one, or one that cannot be used, is drawn again. It goes through the ops before this one, with draws of its
    own. Comes after caption|label and the picture's ops. Adds
      other_image: as the ops before leave "image", here (H, W, 3), in a batch (B, H, W, 3): the other picture, or the
        example's own where it matches; so for each field named (`other_video`, ...);
      match: int32 (), 1 or 0, whether it is the text's own;
      redrawn: int32 (), how often a drawn record did not fit.
    Where none of 64 fits, the example is a bad record: counted, and another takes its place.

    Args:
      fields: of the other record that are wanted.
    """

    whole_source = True

    def __init__(self, *fields: str, context: Mapping[str, Any]):
        super().__init__(context)
        self.wanted = fields or ("image",)
        self.reads = frozenset((*self.wanted, "label"))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """The example as one that matches."""
        return self._with(example, example, 1, 0)

    def needs_other(self, others: Others) -> bool:
        """See the class."""
        return others.rank >= others.batch_size // 2

    def pair(self, example: Example, rng: np.random.Generator, others: Others) -> Example:
        """See the class."""
        if not self.needs_other(others):
            return self(example, rng)
        text = example["label"].tobytes()
        for redrawn in range(OTHERS_TRIED_FOR_A_TEXT):
            record = others.draw()
            if isinstance(record, BadRecord) or others.has_same_picture(record) or text in self.labels_of(record):
                continue
            try:
                return self._with(example, others.prepare(record), 0, redrawn)
            except BadRecord:
                continue
        tried = f"none of {OTHERS_TRIED_FOR_A_TEXT} others drawn for it fits"
        raise BadRecord(key_of(example), f"{tried}: they have its caption or its picture, or cannot be used")

    def _with(self, example: Example, other: Example, match: int, redrawn: int) -> Example:
        pictures = {f"other_{name}": other[name] for name in self.wanted}
        return example | pictures | {"match": np.int32(match), "redrawn": np.int32(redrawn)}


@op("caption_labels")
class CaptionLabels(CaptionOp):
    """Adds "caption_labels", int32 (count, 2): the labels of all captions of the picture; the rest repeats the first.

    For pairs that are made within a batch (`losses.pairing.pair_in_batch`): a picture does not match a text only if
    none of its captions is that text. Comes after caption|label.

    Args:
      count: at most so many different captions.

    Raises (on call):
      UserError: if a record has more.
    """

    def __init__(self, count: int = 8, *, context: Mapping[str, Any]):
        super().__init__(context)
        self.count = int(checked_number("count", count, 1, 1024))

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Adds the labels."""
        own = example["label"].tobytes()
        found = [own, *sorted(self.labels_of(example) - {own})]
        if len(found) > self.count:
            raise UserError(
                f"{key_of(example)!r} has {len(found)} different captions: write caption_labels({len(found)}) or more"
            )
        found += [own] * (self.count - len(found))
        return example | {"caption_labels": np.frombuffer(b"".join(found), np.int32).reshape(self.count, 2)}


def link_captions(ops: Sequence[Op]) -> None:
    """Tells each `CaptionOp` from which fields the ops before it draw the caption.

    Raises:
      UserError: where there is none, or several texts of an example.
    """
    for k, wants in enumerate(ops):
        if not isinstance(wants, CaptionOp):
            continue
        drawn = [before for before in ops[:k] if isinstance(before, (Caption, Texts))]
        if not drawn or isinstance(drawn[-1], Texts):
            raise UserError(f"{wants.name!r} needs one text of an example: put caption|label before it")
        wants.fields = tuple({*drawn[-1].fields, *OF_A_PICTURE})
