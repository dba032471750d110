"""How much of the texts of training data a model sees: what is cut, and which texts become equal by that."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from florence_jax.data.captions import normalise_caption
from florence_jax.data.ops.captions import Caption, Texts, Tokenize, candidate_texts
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.ops.questions import EachQuestion
from florence_jax.data.ops.registry import Op
from florence_jax.data.pipeline import TrainData, ops_of
from florence_jax.data.records import sample_of
from florence_jax.data.tokenizers import Tokenizer
from florence_jax.errors import UserError

SAMPLED = 1024  # records, of all sources together
WHOLE_SHARE = 0.99  # of the texts that are whole at the length that is named first


def text_lengths(data: TrainData) -> dict[str, Any]:
    """What a tokenizer leaves of the texts that are trained on, before prompts; of a sample, whatever the data's size.

    Returns:
      "looked_at" texts, "cut" (longer than the model's), "different" (normalised) and "left" (of these, after cutting),
      "length" of the model, "longest", "most" (length at which 99 % are whole), all in tokens, and "says", the sentence
      for people, '' where nothing is cut or becomes equal. {} for ops without texts.
    """
    sources, ops = data.sources, parse_ops(ops_of(data.ops, data.buckets)[0], data.context)
    fields, tokenizer = _drawn(ops)
    if tokenizer is None:
        return {}
    records = [row for source in sources for row in sample_of(source, max(SAMPLED // len(sources), 1))]
    texts = [text for row in records for name in fields for text in candidate_texts(row, name) if isinstance(text, str)]
    whole, lengths = {}, []
    for text in texts:
        try:
            ids = tokenizer.encode(text)
        except UserError:  # told when the record is used
            continue
        whole[normalise_caption(text)] = (*ids[: tokenizer.length - 1], *ids[tokenizer.length - 1 :][-1:])
        lengths.append(len(ids))
    if not lengths:
        return {}
    found = {
        "looked_at": len(lengths),
        "cut": int(sum(length > tokenizer.length for length in lengths)),
        "different": len(whole),
        "left": len(set(whole.values())),
        "length": tokenizer.length,
        "longest": max(lengths),
        "most": int(np.quantile(lengths, WHOLE_SHARE, method="higher")),
    }
    sampled = len(records) < sum(map(len, sources))
    return found | {"says": _sentence(found, sampled)}


def _drawn(ops: Sequence[Op]) -> tuple[list[str], Tokenizer | None]:
    """Fields that captions are drawn from, and what makes tokens of them."""
    fields: dict[str, None] = {}
    tokenizer = None
    for op in ops:
        chains = op.chains if isinstance(op, Texts) else [op.chain] if isinstance(op, EachQuestion) else [[op]]
        for step in [inner for chain in chains for inner in chain]:
            if isinstance(step, Caption):
                fields |= dict.fromkeys(step.fields)
            elif isinstance(step, Tokenize):
                tokenizer = step.tokenizer
    return list(fields), tokenizer


def _sentence(found: dict[str, int], sampled: bool) -> str:
    cut, same = found["cut"], found["different"] - found["left"]
    if not cut and not same:
        return ""
    says = f"texts: {cut / found['looked_at']:.1%} of {found['looked_at']:,} looked at{' (a sample)' * sampled} "
    says += f"are longer than the {found['length']} tokens that the model sees, and are cut"
    if same:
        says += f"; {found['different']:,} different ones become {found['left']:,}, equal ones have one label"
    if not cut:
        return says
    longest, most = found["longest"], found["most"]
    keeps = (
        f"{most} keeps {WHOLE_SHARE:.0%} whole, {longest}" if found["length"] < most < longest else f"{longest} keeps"
    )
    return f"{says}. --config.model.overrides.text_length={keeps} all (of a model that begins with no other's weights)"
