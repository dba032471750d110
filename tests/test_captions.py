"""The caption normalisation, and labels as hashes of it."""

import subprocess
import sys

import numpy as np
import pytest

from florence_jax.data.batches import known_captions
from florence_jax.data.captions import caption_label, normalise_caption
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.sources.catalog import open_source


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A  Red\tCar \n", "a red car"),
        ("Tom &amp; Jerry", "tom & jerry"),
        ("Tom &amp;amp; Jerry", "tom & jerry"),
        ("ＦＵＬＬ　Ｗｉｄｔｈ", "full width"),
        ("＆amp;", "&"),
        ("ﬁne", "fine"),
        ("Cafe\u0301", "café"),
        ("a&nbsp;b", "a b"),
        ("&#x20;", ""),
        ("", ""),
        ("ÉTÉ", "été"),
    ],
)
def test_normalise(text, expected):
    assert normalise_caption(text) == expected


def test_normalise_is_idempotent_on_any_unicode():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        text = "".join(map(chr, rng.integers(1, 0xD7FF, 12))) + "&amp;" * int(rng.integers(3))
        once = normalise_caption(text)
        assert normalise_caption(once) == once


def test_labels_do_not_depend_on_writing():
    label = caption_label("Caption 7")
    assert label.dtype == np.int32 and label.shape == (2,)
    for text in ("CAPTION&nbsp;7", " caption  7\n"):
        np.testing.assert_array_equal(caption_label(text), label)
    others = [caption_label(f"Caption {i}") for i in range(1000)]
    assert len({other.tobytes() for other in others}) == 1000
    # Both words are hashes: neither is constant, nor short of large and negative values.
    assert (np.std(others, axis=0) > 1e9).all()


def test_labels_are_the_same_in_another_process():
    code = "from florence_jax.data.captions import caption_label as f; print([f(c).tolist() for c in 'abcdefgh'])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.strip() == str([caption_label(c).tolist() for c in "abcdefgh"])


def test_positives_of_the_embedded_set_are_those_of_dense_ids():
    """Equal labels mark the same pairs as numbers of distinct captions, of all texts of configs/pretrain.py, uncut."""
    (op,) = parse_ops("label", {})
    captions = []
    for record in open_source("emoji:train").metadata():
        keywords = record.get("keywords") or []
        captions += filter(None, [record["caption"], record.get("group"), *keywords, ", ".join(keywords)])
    assert len(captions) > 10_000
    labels = np.stack([op({"caption": caption}, None)["label"] for caption in captions])
    numbers: dict[str, int] = {}
    dense = [numbers.setdefault(normalise_caption(caption), len(numbers)) for caption in captions]
    # The relation is the same if hash -> number and number -> hash are functions.
    pairs = np.unique(np.column_stack([labels, dense]), axis=0)
    assert len(numbers) == len(np.unique(labels, axis=0)) == len(pairs)
    chosen = np.random.default_rng(0).permutation(len(captions))[:1000]
    rows, ids = labels[chosen], np.array(dense)[chosen]
    np.testing.assert_array_equal((rows[:, None] == rows[None]).all(-1), ids[:, None] == ids[None])
    assert (ids[:, None] == ids[None]).sum() > len(ids)


class Records(list):
    """Stands for a source."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


@pytest.mark.parametrize(
    ("records", "fields"),
    [
        ([{"caption": "a"}, {"caption": "b"}], ["caption=1"]),
        ([{"caption": "a", "captions": ["a", "b"]}] * 3, ["captions=1"]),
        ([{"caption": "a", "captions": ["a", "b"]}, {"caption": "a"}], ["captions=1,caption=1"]),
        ([{"caption": "a", "group": "x"}], ["caption=1", "keywords_joined=1,group=2"]),
        ([{"caption": "a", "keywords": ["x", "y"]}], ["caption=1", "keywords_joined=1,group=2"]),
    ],
)
def test_own_records_have_the_caption_fields_that_are_there(records, fields):
    assert known_captions([Records(records)], "keywords_joined=1,group=2") == fields
    assert known_captions([Records(records)]) == fields[:1]
