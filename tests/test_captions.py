"""The caption normalisation and the index of caption ids."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from florence_jax.data import captions
from florence_jax.data.captions import CaptionIndex, normalise_caption
from florence_jax.errors import UserError


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


def test_ids_are_dense_and_do_not_depend_on_order_or_writing():
    texts = [f"Caption {i}" for i in range(100)]
    index = CaptionIndex.build([*texts, "caption  7", "", " "])
    other = CaptionIndex.build(reversed(texts))
    assert len(index) == 100
    assert sorted(index.id(text) for text in texts) == list(range(100))
    assert [index.id(text) for text in texts] == [other.id(text) for text in texts]
    assert index.id("CAPTION&nbsp;7") == index.id("Caption 7")
    ids = index.ids(texts)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [index.id(text) for text in texts])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(index)).ids(texts), ids)


def test_ids_are_the_same_in_another_process():
    code = (
        "from florence_jax.data.captions import CaptionIndex as C; print(C.build('abcdefgh').ids('abcdefgh').tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.strip() == str(CaptionIndex.build("abcdefgh").ids("abcdefgh").tolist())


@pytest.mark.parametrize("caption", ["unknown", "zzz", "", "0"])
def test_unknown_caption(caption):
    index = CaptionIndex.build(["a", "b", "c"])
    with pytest.raises(UserError, match="not in the caption index"):
        index.id(caption)
    with pytest.raises(UserError, match="not in the caption index"):
        index.ids(["a", caption])


def test_nothing_to_index():
    with pytest.raises(UserError, match="no captions"):
        CaptionIndex.build(["", "  "])


def test_collision_is_an_error(monkeypatch):
    monkeypatch.setattr(captions, "caption_digest", lambda text: len(text))
    with pytest.raises(UserError, match="digest"):
        CaptionIndex.build(["ab", "cd"])
