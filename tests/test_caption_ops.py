"""Ops on captions: which is drawn, its label, prompts, tokens, several texts."""

import collections

import numpy as np
import pytest
from test_transforms import CONTEXT, TEMPLATES, rng, run

from florence_jax.data.captions import caption_label, token_label
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.records import BadRecord
from florence_jax.data.tokenizers import load_tokenizer
from florence_jax.errors import UserError

RECORD = {
    "key": "k",
    "caption": "Red Fox",
    "keywords": ["animal", " ", "fur"],
    "group": "animals",
    "none": "",
    "label": 7,
}


def draws(spec, record=RECORD, n=3000):
    (op,) = parse_ops(spec, {})
    generator = rng()
    return collections.Counter(op(record, generator)["caption"] for _ in range(n))


def test_caption_proportions():
    counts = draws("caption(caption=3, keywords=2, group=1, none=5, absent=5)")
    shares = {text: count / 3000 for text, count in counts.items()}
    expected = {"Red Fox": 3 / 6, "animal": 1 / 6, "fur": 1 / 6, "animals": 1 / 6}
    assert shares.keys() == expected.keys()
    assert all(abs(shares[text] - share) < 0.03 for text, share in expected.items())
    assert draws("caption(keywords_joined=1)", n=3) == {"animal, fur": 3}
    assert draws("caption", n=3) == {"Red Fox": 3}


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("", "no text in caption"),
        (None, "no text in caption"),
        ([], "no text in caption"),
        (" \n", "no text in caption"),
        ("&#x20;", "its caption is empty"),
        ("x" * 10_001, "10001 characters"),
        ("a \ud800 b", "not valid Unicode"),
        ([3], "its caption is int, not text"),
    ],
)
def test_bad_captions(caption, message):
    with pytest.raises(BadRecord, match=f"'k'.*{message}"):
        run("caption", {"key": "k", "caption": caption})


def test_labels():
    without = {"templates": TEMPLATES}
    for spec in ("caption|label", "label", "caption|label|prompt"):
        label = run(spec, RECORD, context=without)["label"]
        assert label.dtype == np.int32 and label.tolist() == caption_label("red fox").tolist()
    label = run("caption(group=1)|label|prompt", RECORD, context=without)["label"]
    assert label.tolist() == caption_label("animals").tolist() != caption_label("red fox").tolist()
    with pytest.raises(BadRecord, match="'k': its caption is NoneType"):
        run("label", {"key": "k"})


def test_captions_that_are_cut_to_one_text_have_one_label():
    context = {"tokenizer": load_tokenizer("sentencepiece", 8)}

    def label(caption):
        return run("label", {"key": "k", "caption": caption}, context=context)["label"].tolist()

    start = "a red fox on the snow in the"  # more tokens than the model sees
    assert label(f"{start} morning") == label(f"{start} evening") == label(start) != label("a red fox")
    assert label(" A red  FOX") == label("a red fox") != label("a red cat")
    with pytest.raises(BadRecord, match="'k': caption '-' has no tokens"):
        run("label", {"key": "k", "caption": "-"})


def test_prompt():
    seen = {run("prompt", {"caption": "red fox"}, seed)["caption"] for seed in range(30)}
    assert seen == {"a photo of a red fox.", "the red fox"}
    assert run("prompt", {"caption": "a red fox"})["caption"] == "a red fox"
    assert run("prompt", {"caption": "red fox"}, context={"templates": ()})["caption"] == "red fox"


def test_tokenize():
    out = run("tokenize", {"key": "k", "caption": "a red fox"})
    assert out["text"].dtype == out["text_length"].dtype == np.int32
    assert out["text"].tolist() == [1, 3, 3, 0] and out["text_length"] == 3
    for caption in ("-", "", None):
        with pytest.raises(BadRecord, match="'k'"):
            run("tokenize", {"key": "k", "caption": caption})


def test_tokenize_with_sampling():
    context = {"tokenizer": load_tokenizer("sentencepiece", 12)}
    texts = [run("tokenize(sampling=0.5)", {"caption": "strawberry"}, seed, context)["text"] for seed in range(100)]
    plain = run("tokenize(sampling=0)", {"caption": "strawberry"}, 0, context)["text"]
    assert 45 < sum((text == plain).all() for text in texts) < 85  # half, and those that sampling splits the same way
    with pytest.raises(UserError, match=r"sampling must be a number from 0 to 1.*usage: tokenize\(sampling"):
        run("tokenize(sampling=2)", {"caption": "x"}, 0, context)


def test_texts():
    (op,) = parse_ops("texts('caption=1', 'group=1', 'caption=1,keywords=1')", CONTEXT)
    assert op.random and op.reads == {"caption", "group", "keywords"}
    out = op(RECORD, rng(3))
    assert out["text"].dtype == out["label"].dtype == np.int32
    assert out["text"].shape == (3, 4) and out["label"].shape == (3, 2)
    assert out["caption"] == RECORD["caption"]  # each text is drawn from the record, not from the text before it
    generator = rng(3)
    for k, fields in enumerate(("caption=1", "group=1", "caption=1,keywords=1")):
        single = RECORD
        for step in parse_ops(f"caption({fields})|label|prompt|tokenize", CONTEXT):
            single = step(single, generator)
        np.testing.assert_array_equal(out["text"][k], single["text"])
        assert out["text_length"][k] == single["text_length"] and out["text_length"].dtype == np.int32
        np.testing.assert_array_equal(out["label"][k], single["label"])
    assert not parse_ops("texts('caption=1')", CONTEXT | {"templates": ()})[0].random
    bare = run("texts('caption=1', 'group=1,none=1')", {"key": "k", "caption": "Red Fox", "none": ""})
    assert bare["label"].tolist() == [token_label(CONTEXT["tokenizer"]("red fox")).tolist()] * 2


def test_keep():
    assert run("keep(caption, label)", RECORD) == {"caption": "Red Fox", "label": 7}
    with pytest.raises(UserError, match="no field 'text', only: key, caption"):
        run("keep(image, text)", {"key": 1, "caption": 1, "image": 1})
