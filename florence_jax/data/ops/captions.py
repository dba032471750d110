"""Ops on captions: which one an example has, its label, the prompt around it, its tokens."""

import ast
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from florence_jax.data.captions import caption_label, normalise_caption, token_label
from florence_jax.data.ops.registry import Example, Op, checked_number, key_of, op
from florence_jax.data.prompts import apply_prompt
from florence_jax.data.records import BadRecord
from florence_jax.data.remembered import Remembered
from florence_jax.errors import UserError

MAX_CAPTION = 10_000  # characters; longer ones are web pages, not captions
MADE_OF_TEXTS = ("text", "text_length", "label")
JOINED = "_joined"  # 'keywords_joined' is the list field 'keywords' as one string


@op("caption")
class Caption(Op):
    """Draws the example's caption from its text fields, by weight: caption(caption=3, keywords=1, group=2).

    A field that is a list of str gives one of its elements at random; 'NAME_joined' gives all of list field NAME,
    joined by ", ". Fields that a record lacks, or that are empty, are left out of its draw.

    Raises (on call):
      BadRecord: if nothing is left, or the caption is empty, over-long (10,000 characters) or not valid Unicode.
    """

    def __init__(self, **fields: float):
        fields = fields or {"caption": 1.0}
        self.fields = {name: checked_number(f"weight {name}", weight, 1e-6, 1e6) for name, weight in fields.items()}
        self.random = len(self.fields) > 1
        self.reads = frozenset(self.fields)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Replaces the caption."""
        found = {name: texts for name in self.fields if (texts := candidate_texts(example, name))}
        if not found:
            raise BadRecord(key_of(example), f"no text in {' or '.join(self.fields)}")
        name = _draw(found, self.fields, rng) if len(found) > 1 else next(iter(found))
        texts = found[name]
        text = texts[0] if len(texts) == 1 else texts[int(rng.random() * len(texts))]
        if problem := _caption_problem(text):
            raise BadRecord(key_of(example), problem)
        return example | {"caption": text}


def _draw(found: Mapping[str, Any], weights: Mapping[str, float], rng: np.random.Generator) -> str:
    place = rng.random() * sum(weights[name] for name in found)
    for name in found:
        place -= weights[name]
        if place < 0:
            break
    return name


def candidate_texts(record: Mapping[str, Any], field: str) -> Sequence[Any]:
    """What op `caption` may draw from one field of a record, blank strings left out; not all need be strings."""
    joined = field.endswith(JOINED) and field not in record
    value = record.get(field.removesuffix(JOINED) if joined else field)
    values = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    values = [text for text in values if not isinstance(text, str) or text.strip()]
    return [", ".join(map(str, values))] if joined and values else values


def _caption_problem(text: Any) -> str | None:
    if not isinstance(text, str):
        return f"its caption is {type(text).__name__}, not text"
    if len(text) > MAX_CAPTION:
        return f"its caption has {len(text)} characters, more than {MAX_CAPTION}"
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        return "its caption is not valid Unicode (lone surrogates)"
    return None if normalise_caption(text) else "its caption is empty"


@functools.cache
def parse_fields(fields: str) -> dict[str, float]:
    """'caption=3,keywords=1' -> {"caption": 3.0, "keywords": 1.0}, as `caption(...)` takes it. Raises UserError."""
    try:
        call = ast.parse(f"caption({fields})", mode="eval").body
        weights = {
            str(keyword.arg): keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            for keyword in call.keywords
        }
        return Caption(**weights).fields
    except (SyntaxError, ValueError) as error:  # UserError is a ValueError
        raise UserError(f"caption fields {fields!r}: {error}; write them as 'caption=3,keywords=1'") from error


@op("label")
class Label(Op):
    """Adds "label", int32 (2,), equal for equal captions. Goes before `prompt`.

    It is the hash of the normalised caption as context["tokenizer"] gives it to a model (`token_label`), so that
    captions that differ only where they are cut are one; without a tokenizer that of the caption (`caption_label`).
    A "label" of the record itself is replaced.
    """

    reads = frozenset(("caption",))

    def __init__(self, context: Mapping[str, Any]):
        self.tokenizer = context.get("tokenizer")
        self._labels = Remembered(self._label)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Adds the label."""
        caption = _caption(example)
        try:
            return example | {"label": self.of(caption)}
        except UserError as error:
            raise BadRecord(key_of(example), str(error)) from error

    def of(self, caption: str) -> np.ndarray:
        """The label of a caption. Raises UserError for one without tokens."""
        return self._labels(caption)

    def _label(self, caption: str) -> np.ndarray:
        if self.tokenizer is None:
            return caption_label(caption)
        return token_label(self.tokenizer(normalise_caption(caption)))


@op("prompt")
class Prompt(Op):
    """Puts a caption of one or two words into a random one of context["templates"], as `prompts.apply_prompt` does."""

    reads = frozenset(("caption",))

    def __init__(self, context: Mapping[str, Any]):
        self.templates = tuple(context.get("templates") or ())
        self.random = bool(self.templates)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Replaces the caption."""
        if not self.templates:
            return example
        return example | {"caption": apply_prompt(_caption(example), rng, self.templates)}


@op("tokenize")
class Tokenize(Op):
    """Adds "text", int32 (L,), the caption through context["tokenizer"], and "text_length", int32 (), its tokens.

    What comes after them is padding. A caption without tokens is a bad record.
    With probability `sampling` the caption is split into pieces at random (`Tokenizer.sample`).
    """

    reads = frozenset(("caption",))

    def __init__(self, context: Mapping[str, Any], sampling: float = 0.0):
        self.tokenizer = need(context, "tokenizer")
        self._tokens = Remembered(self.tokenizer)
        self.sampling = checked_number("sampling", sampling, 0, 1)
        self.random = sampling > 0
        if self.random:
            self.tokenizer.sample("word", np.random.default_rng(0))  # raises now if it cannot

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Adds the ids and their number."""
        caption = _caption(example)
        try:
            sampled = self.random and rng.random() < self.sampling
            text = self.tokenizer.sample(caption, rng) if sampled else self._tokens(caption)
        except UserError as error:
            raise BadRecord(key_of(example), str(error)) from error
        return example | {"text": text, "text_length": self.tokenizer.lengths(text)}


@op("texts")
class Texts(Op):
    """Several texts of one example: texts('caption=1', 'keywords=1,group=2', sampling=0.2) gives it two.

    Each is made from the example as by `caption(<fields>)|label|prompt|tokenize(sampling=...)`. Adds "text", int32
    (K, L), "text_length", int32 (K,), and "label", int32 (K, 2), for K sets of fields. A set of which an example has no
    field gives a text of the first set instead, so that plain pairs can be mixed with ones that have keywords.
    """

    def __init__(self, *fields: str, context: Mapping[str, Any], sampling: float = 0.0):
        if not fields:
            raise UserError("name the caption fields of each text")
        self.sets = [parse_fields(names) for names in fields]
        rest = (Label(context), Prompt(context), Tokenize(context, sampling))
        self.chains = [(Caption(**names), *rest) for names in self.sets]
        self.reads = frozenset(name for names in self.sets for name in names)
        self.random = any(op.random for chain in self.chains for op in chain)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Adds texts and labels."""
        made = []
        for names, chain in zip(self.sets, self.chains, strict=True):
            text = example
            for step in chain if any(candidate_texts(example, name) for name in names) else self.chains[0]:
                text = step(text, rng)
            made.append(text)
        return example | {name: np.stack([text[name] for text in made]) for name in MADE_OF_TEXTS}


@op("keep")
class Keep(Op):
    """Drops all fields but the named ones: keep(image, text, label)."""

    def __init__(self, *names: str):
        if not names:
            raise UserError("name the fields to keep")
        self.names, self.reads = names, frozenset(names)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Raises UserError for a field that the example lacks."""
        missing = [name for name in self.names if name not in example]
        if missing:
            raise UserError(f"keep: no field {missing[0]!r}, only: {', '.join(example)}")
        return {name: example[name] for name in self.names}


def _caption(example: Example) -> str:
    text = example.get("caption")
    if problem := _caption_problem(text):
        raise BadRecord(key_of(example), problem)
    return text


def need(context: Mapping[str, Any], name: str) -> Any:
    """What an op needs of the context. Raises UserError where it is not there."""
    if context.get(name) is None:
        raise UserError(f"needs {name!r} in the context")
    return context[name]
