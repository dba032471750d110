"""Tokenizers: SentencePiece, CLIP's BPE and RoBERTa's.

Every tokenizer gives BOS, the text's ids, EOT, then the padding's id, as int32 of a fixed length.
"""

import abc
import functools
import gzip
import html
import importlib.resources
import json
import os
import zlib
from collections.abc import Callable, Sequence

import ftfy
import numpy as np
import sentencepiece
import tokenizers
from etils import epath
from tokenizers import models, pre_tokenizers

from florence_jax.data.captions import normalise_caption
from florence_jax.data.remembered import Remembered
from florence_jax.errors import UserError

# Florence cuts texts at 76 tokens, BOS and EOT included.
DEFAULT_LENGTH = 76
SHIPPED_MODEL = "sentencepiece"
# Ids that a SentencePiece model must have: the models' padding mask and pooling rely on pad 0.
SENTENCEPIECE_IDS = {"pad": 0, "unk": 1, "bos": 2, "eos": 3}
# Subword sampling draws one of a word's best segmentations, with probability proportional to (its own) ** SMOOTHING.
SEGMENTATIONS, SMOOTHING = 16, 0.2
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_VOCAB_SIZE = 49408
# English clitics, runs of letters, single digits, runs of anything else.
CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
END_OF_WORD = "</w>"
# RoBERTa's; its mask is the last one of the vocabulary.
ROBERTA_IDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
BYTE_SPACE = "\u0120"  # the space as a symbol of byte-level BPE
WORD_SPACE = "\u2581"  # what a piece of SentencePiece that begins a word begins with
MASK = "<mask>"  # in a text for `Tokenizer.with_masks`


class Tokenizer(abc.ABC):
    """Text to a fixed number of ids: BOS, text, EOT, padding. Instances can be pickled.

    Attributes:
      length: ids per text, BOS and EOT included.
      vocab_size: rows that a token embedding needs.
      bos_id, eot_id: start and end of text. The end token is the largest id in CLIP's vocabulary but not in
        SentencePiece's, so find it as the first `eot_id`, not as the largest id.
      pad_id: 0, of RoBERTa 1. In CLIP's vocabulary 0 is also the id of "!": padding is known by length, never by id.
      mask_id: stands for a word that is to be guessed. A vocabulary without one has it as a new last id, `vocab_size`.
    """

    pad_id = 0

    def __init__(self, length: int, vocab_size: int, bos_id: int, eot_id: int):
        if length < 3:
            raise UserError(f"text length {length} leaves no room between the start and end tokens; use 3 or more")
        self.length = length
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eot_id = eot_id
        self.mask_id = vocab_size

    @property
    def masked_vocab_size(self) -> int:
        """Rows that the embedding of texts with masks needs: `vocab_size`, or one more."""
        return max(self.vocab_size, self.mask_id + 1)

    @functools.cached_property
    def is_special(self) -> np.ndarray:
        """bool (masked_vocab_size,): ids that are no part of a word: start, end, mask, unknown, padding's own."""
        special = self._specials()
        return np.append(special, np.ones(self.masked_vocab_size - len(special), bool))

    @functools.cached_property
    def _edges(self) -> np.ndarray:
        return np.append(self._word_edges(), np.zeros(self.masked_vocab_size - self.vocab_size, bool))

    @abc.abstractmethod
    def _specials(self) -> np.ndarray:
        """bool (vocab_size,)."""

    @abc.abstractmethod
    def _word_edges(self) -> np.ndarray:
        """bool (vocab_size,): the ids that a word begins with; ends with, where `_words_end`."""

    _words_end = False

    def words(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int32 (..., L): the number of the word that each token of ids (..., L) is part of, ascending.

        -1 for special tokens and for what comes after `lengths` (...) tokens. A word begins with the space mark of
        SentencePiece or of byte-level BPE, or ends with CLIP's end of word. With the first two, punctuation without a
        space before it belongs to the word.
        """
        edges = self._edges[ids]
        number = edges.cumsum(-1, dtype=np.int32) - (edges if self._words_end else 0)
        outside = self.is_special[ids] | (np.arange(ids.shape[-1]) >= np.asarray(lengths)[..., None])
        return np.where(outside, np.int32(-1), number)

    def with_masks(self, text: str) -> np.ndarray:
        """int32 (length,): as `self(text)`, with `mask_id` wherever the text says '<mask>'.

        Raises:
          UserError: as `encode`, and for a text without '<mask>', or with one that does not fit into `length`.
        """
        if not isinstance(text, str) or MASK not in text:
            raise UserError(f"text {text!r} has no {MASK}: write it where a word is to be found")
        *before, last = text.split(MASK)
        parts = [self._checked(part) for part in (*(part.rstrip() for part in before), last)]
        found = [self._split([part])[0] if part else [] for part in parts]
        ids = [self.bos_id, *found[0], *(i for part in found[1:] for i in (self.mask_id, *part)), self.eot_id]
        if self.mask_id in ids[self.length - 1 :]:
            raise UserError(f"text {text!r} is longer than {self.length} tokens before its last {MASK}: shorten it")
        return self._padded([ids])[0]

    def token_text(self, token: int) -> str:
        """What a token stands for, for people: no marks of words and bytes; '<mask>' for the mask."""
        return MASK if token == self.mask_id else self._token_text(int(token))

    @abc.abstractmethod
    def _token_text(self, token: int) -> str:
        """The same of a token below `vocab_size` that is not the mask."""

    @abc.abstractmethod
    def clean(self, text: str) -> str:
        """The normalised text that is split into tokens."""

    @abc.abstractmethod
    def _split(self, texts: list[str]) -> list[list[int]]:
        """Ids of clean texts, without start and end."""

    def encode(self, text: str) -> list[int]:
        """All ids of a text from BOS to EOT: not cut, not padded.

        Raises:
          UserError: for a text that is not a str, is not valid Unicode, or has no tokens.
        """
        return self._encode([text], self._split)[0]

    def __call__(self, text: str) -> np.ndarray:
        """int32 (length,): `encode` cut to `length` (the last id is then EOT) or padded with 0."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> np.ndarray:
        """int32 (len(texts), length): the rows are `self(text)`."""
        return self._padded(self._encode(texts, self._split))

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """int32 (...): tokens before the padding in each row of ids (..., length), the last of them the end token.

        Known by the place of the last end token: the padding's id may be a word's as well.
        """
        return (ids.shape[-1] - (ids[..., ::-1] == self.eot_id).argmax(-1)).astype(np.int32)

    def sample(self, text: str, rng: np.random.Generator) -> np.ndarray:
        """int32 (length,): as `self(text)`, but split into pieces at random; see `SentencePieceTokenizer`.

        Raises:
          UserError: from a tokenizer that knows one way only to split a text.
        """
        return self._padded(self._encode([text], lambda texts: [self._split_at_random(texts[0], rng)]))[0]

    def _split_at_random(self, text: str, rng: np.random.Generator) -> list[int]:
        raise UserError("subword sampling needs a SentencePiece tokenizer: set config.text.subword_sampling=0")

    def _padded(self, encoded: list[list[int]]) -> np.ndarray:
        out = np.full((len(encoded), self.length), self.pad_id, np.int32)
        for row, ids in zip(out, encoded, strict=True):
            if len(ids) > self.length:
                ids = [*ids[: self.length - 1], self.eot_id]
            row[: len(ids)] = ids
        return out

    def _encode(self, texts: Sequence[str], split: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
        cleaned = [self._checked(text) for text in texts]
        encoded = split(cleaned)
        for text, ids in zip(texts, encoded, strict=True):
            if not ids:
                raise UserError(f"caption {text!r} has no tokens: drop empty captions from the data")
        return [[self.bos_id, *ids, self.eot_id] for ids in encoded]

    def _checked(self, text: str) -> str:
        if not isinstance(text, str):
            raise UserError(f"a caption must be a str, not {type(text).__name__}: {text!r}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"caption {text!r} is not valid Unicode (lone surrogates): decode it again")
        return self.clean(text)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (Kudo and Richardson 2018) on captions as `normalise_caption` leaves them.

    `sample` draws the segmentation of each word among its `SEGMENTATIONS` best under the unigram model (subword
    regularisation, Kudo 2018). No piece spans two words, so that this samples segmentations of the text.
    SentencePiece's own sampling has a hidden random state; this is a function of the given generator.

    Args:
      model: serialized model with pad 0, unk 1, bos 2 and eos 3, as tools/train_tokenizer.py writes it.
      length: ids per text.

    Raises:
      UserError: for bytes that are not a model, and for other special ids.
    """

    def __init__(self, model: bytes, length: int = DEFAULT_LENGTH):
        try:
            if not model:  # SentencePiece takes no bytes for "load later"
                raise RuntimeError("empty")
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError("not a SentencePiece model: make one with florence_jax.tools.train_tokenizer") from error
        ids = {name: getattr(processor, f"{name}_id")() for name in SENTENCEPIECE_IDS}
        if ids != SENTENCEPIECE_IDS:
            raise UserError(
                f"SentencePiece model has the ids {ids}, needed are {SENTENCEPIECE_IDS}: "
                "train it with florence_jax.tools.train_tokenizer"
            )
        super().__init__(length, processor.vocab_size(), ids["bos"], ids["eos"])
        self._processor = processor
        self._segmentations = Remembered(self._best_segmentations)

    def clean(self, text: str) -> str:
        """`captions.normalise_caption`."""
        return normalise_caption(text)

    def _specials(self) -> np.ndarray:
        kinds = (self._processor.is_control, self._processor.is_unknown, self._processor.is_unused)
        return np.array([any(kind(i) for kind in kinds) for i in range(self.vocab_size)])

    def _word_edges(self) -> np.ndarray:
        pieces = self._processor.id_to_piece(list(range(self.vocab_size)))
        return np.array([piece.startswith(WORD_SPACE) for piece in pieces])

    def _token_text(self, token: int) -> str:
        return self._processor.decode([token]) or self._processor.id_to_piece(token)

    def _split(self, texts: list[str]) -> list[list[int]]:
        # One by one: two microseconds each. Given a list, SentencePiece starts a thread pool, even of one thread: 70.
        return [self._processor.encode(text) for text in texts]

    def _split_at_random(self, text: str, rng: np.random.Generator) -> list[int]:
        ids: list[int] = []
        for word in text.split():
            found, weights = self._segmentations(word)
            ids += found[int(weights.searchsorted(rng.random() * weights[-1], side="right"))]
        return ids

    def _best_segmentations(self, word: str) -> tuple[list[list[int]], np.ndarray]:
        """A word's best segmentations into pieces, and the running sum of their weights."""
        found = self._processor.nbest_encode_as_ids(word, SEGMENTATIONS)
        scores = np.array([sum(map(self._processor.get_score, pieces)) for pieces in found])
        return found, np.exp(SMOOTHING * (scores - scores.max())).cumsum()


class ClipTokenizer(Tokenizer):
    """CLIP's byte-level BPE (Radford et al. 2021): 49,408 ids, start 49406, end 49407; padded with 0 as by OpenAI.

    "<|startoftext|>" and "<|endoftext|>" inside a text become the special ids, as in CLIP.

    Args:
      vocab: token -> id: 256 byte symbols, each also with "</w>", the merges and the two special tokens.
      merges: pairs of tokens in order of rank.
      length: ids per text; CLIP's own is 77.

    Raises:
      UserError: if a token that CLIP's vocabulary has is missing, or merges and vocabulary disagree.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], length: int = DEFAULT_LENGTH):
        symbols = _byte_symbols()
        needed = [*symbols, *(s + END_OF_WORD for s in symbols), CLIP_START, CLIP_END]
        missing = [token for token in needed if token not in vocab]
        if missing:
            raise UserError(f"not a CLIP vocabulary: it lacks {len(missing)} needed tokens, e.g. {missing[0]!r}")
        super().__init__(length, max(vocab.values()) + 1, vocab[CLIP_START], vocab[CLIP_END])
        try:
            bpe = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=END_OF_WORD)
        except Exception as error:  # the Rust binding raises bare Exception
            raise UserError(f"CLIP vocabulary and merges do not belong together: {error}") from error
        self._tokenizer = tokenizers.Tokenizer(bpe)
        self._tokenizer.add_special_tokens([CLIP_START, CLIP_END])
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(CLIP_PATTERN), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    _words_end = True

    def _token_text(self, token: int) -> str:
        return _text_of_symbols(self._tokenizer.id_to_token(token).removesuffix(END_OF_WORD))

    def _specials(self) -> np.ndarray:
        return np.isin(np.arange(self.vocab_size), (self.bos_id, self.eot_id))

    def _word_edges(self) -> np.ndarray:
        edges = np.zeros(self.vocab_size, bool)
        edges[[i for token, i in self._tokenizer.get_vocab().items() if token.endswith(END_OF_WORD)]] = True
        return edges

    def clean(self, text: str) -> str:
        """CLIP's cleaning: repaired by ftfy (broken encodings, ligatures, full-width letters, typographic quotes), HTML
        unescaped twice, white space collapsed, lower case.
        """
        return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()

    def _split(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


class RobertaTokenizer(Tokenizer):
    """RoBERTa's byte-level BPE (Liu et al. 2019), GPT-2's with its own ids: <s> 0, <pad> 1, </s> 2, <unk> 3, <mask>.

    Texts are taken as they are: upper and lower case, white space. A text that says "</s>" or "<mask>" has these
    letters, not the special ids; see `with_masks`.

    Args:
      vocab: token -> id, 256 byte symbols and the special tokens among them. A vocabulary without <mask> gets a new id.
      merges: pairs of tokens in order of rank.
      length: ids per text; METER's is 50, RoBERTa's own at most 512.
      prefix_space: begin a text as if there were a space before it (RoBERTa's own files do not).

    Raises:
      UserError: if a needed token is missing or has another id, or merges and vocabulary disagree.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        length: int = DEFAULT_LENGTH,
        prefix_space: bool = False,
    ):
        if other := [f"{token} {vocab.get(token)}" for token, i in ROBERTA_IDS.items() if vocab.get(token) != i]:
            wanted = ", ".join(f"{token} {i}" for token, i in ROBERTA_IDS.items())
            raise UserError(f"not RoBERTa's vocabulary: it has {', '.join(other)}, needed are {wanted}")
        if missing := [symbol for symbol in _byte_symbols() if symbol not in vocab]:
            raise UserError(f"not RoBERTa's vocabulary: it lacks {len(missing)} byte symbols, e.g. {missing[0]!r}")
        super().__init__(length, max(vocab.values()) + 1, ROBERTA_IDS["<s>"], ROBERTA_IDS["</s>"])
        self.pad_id, self.mask_id = ROBERTA_IDS["<pad>"], vocab.get(MASK, self.vocab_size)
        try:
            self._tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
        except Exception as error:  # the Rust binding raises bare Exception
            raise UserError(f"RoBERTa's vocabulary and merges do not belong together: {error}") from error
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)

    def _specials(self) -> np.ndarray:
        return np.isin(np.arange(self.vocab_size), (*ROBERTA_IDS.values(), self.mask_id))

    def _word_edges(self) -> np.ndarray:
        edges = np.zeros(self.vocab_size, bool)
        edges[[i for token, i in self._tokenizer.get_vocab().items() if token.startswith(BYTE_SPACE)]] = True
        return edges

    def _token_text(self, token: int) -> str:
        return _text_of_symbols(self._tokenizer.id_to_token(token) or "<unk>").strip()

    def clean(self, text: str) -> str:
        """The text as it is; '' for white space alone."""
        return text if text.strip() else ""

    def _split(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def load_tokenizer(spec: str, length: int = DEFAULT_LENGTH) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      spec: 'sentencepiece' (the shipped model), or the path of: a SentencePiece model (`*.model`); CLIP's merges
        (`bpe_simple_vocab_16e6.txt.gz`, `merges.txt`); of CLIP or RoBERTa `tokenizer.json`, or `vocab.json` with
        `merges.txt` beside it, or their folder. Neither vocabulary is shipped: the open-clip-torch wheel has CLIP's,
        models on Hugging Face have both.
      length: ids per text, at least 3.

    Raises:
      UserError: for an unknown kind of file, a missing or unreadable one, or a length below 3.
    """
    if spec == SHIPPED_MODEL:
        resource = importlib.resources.files("florence_jax.data") / "emoji" / "tokenizer.model"
        return SentencePieceTokenizer(resource.read_bytes(), length)
    if epath.Path(spec).is_dir():
        names = [name for name in ("tokenizer.json", "vocab.json") if (epath.Path(spec) / name).exists()]
        if not names:
            raise UserError(f"tokenizer {spec}: the folder has neither tokenizer.json nor vocab.json with merges.txt")
        spec = os.path.join(spec, names[0])
    readers = {".model": SentencePieceTokenizer, ".txt.gz": _from_merges, ".txt": _from_merges, ".json": _from_json}
    reader = next((reader for suffix, reader in readers.items() if spec.endswith(suffix)), None)
    if reader is None:
        raise UserError(f"unknown tokenizer {spec!r}: use {SHIPPED_MODEL!r} or a file *{', *'.join(readers)}")
    try:
        if reader is _from_json:
            return _from_json(epath.Path(spec), length)
        return reader(_read(epath.Path(spec)), length)
    except UserError as error:
        raise UserError(f"tokenizer {spec}: {error}") from error


@functools.cache
def _symbol_bytes() -> dict[str, int]:
    """256 printable characters -> the bytes they stand for, as in CLIP's vocabulary: printable bytes first."""
    printable = [b for b in range(256) if chr(b).isprintable() and b != 0x20]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_symbols() -> list[str]:
    return list(_symbol_bytes())


def _text_of_symbols(symbols: str) -> str:
    """Part of a character becomes the replacement character."""
    return bytes(_symbol_bytes()[symbol] for symbol in symbols).decode("utf-8", "replace")


def _read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _merges(data: bytes) -> list[tuple[str, str]]:
    """Merge pairs of a merges file, gzipped or not: a header line, then two tokens a line."""
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"not a merges file: {error}") from error
    pairs = [tuple(line.split()) for line in text.strip().split("\n")[1:]]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise UserError("not a merges file: after the first line each line must have two tokens")
    return pairs


def _from_merges(data: bytes, length: int) -> ClipTokenizer:
    merges = _merges(data)[: CLIP_VOCAB_SIZE - 2 * 256 - 2]  # CLIP's file has more than CLIP uses
    if any(left.startswith(BYTE_SPACE) for left, _ in merges):
        raise UserError("merges of RoBERTa's kind, which do not say its ids: name the vocab.json beside them")
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + END_OF_WORD for s in symbols), *map("".join, merges), CLIP_START, CLIP_END]
    return ClipTokenizer({token: i for i, token in enumerate(tokens)}, merges, length)


def _from_json(path: epath.Path, length: int) -> Tokenizer:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"not a JSON file: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):  # tokenizer.json
        vocab, merges = content["model"].get("vocab"), content["model"].get("merges")
        if not isinstance(vocab, dict) or not merges:
            raise UserError("tokenizer.json is not of a BPE model with vocabulary and merges")
        # Older files have "a b", newer ones ["a", "b"].
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
        prefix_space = (content.get("pre_tokenizer") or {}).get("add_prefix_space") is True
        return _of_vocabulary(vocab, merges, length, prefix_space)
    if not isinstance(content, dict) or not all(type(i) is int for i in content.values()):
        raise UserError("neither a tokenizer.json nor a vocab.json (token -> id)")
    return _of_vocabulary(content, _merges(_read(path.parent / "merges.txt")), length)


def _of_vocabulary(
    vocab: dict[str, int], merges: list[tuple[str, str]], length: int, prefix_space: bool = False
) -> Tokenizer:
    """RoBERTa's tokenizer where the vocabulary has its start, else CLIP's."""
    if "<s>" in vocab and CLIP_START not in vocab:
        return RobertaTokenizer(vocab, merges, length, prefix_space)
    return ClipTokenizer(vocab, merges, length)
