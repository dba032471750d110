"""RoBERTa's tokenizer, on a small vocabulary whose ids are those of roberta-base where it has them."""

import json

import numpy as np
import pytest
import tokenizers
from test_language_ops import chosen_tokens, masked

from florence_jax.data.tokenizers import load_tokenizer
from florence_jax.errors import UserError

MERGES = "H e|l l|He ll|Hell o|\u0120 w|o r|\u0120w or|l d|\u0120wor ld|\u0120 c|a t|\u0120c at|\u0120 a|a b".split("|")
HELLO_WORLD = [0, 31414, 232, 2]  # of roberta-base


def vocabulary():
    """256 byte symbols, what the merges make, and the special tokens."""
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = [merge.replace(" ", "") for merge in MERGES]
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "Hello": 31414, "\u0120world": 232, "<mask>": 50264}
    free = iter(i for i in range(4, 1000) if i != 232)
    return vocab | {token: next(free) for token in [*symbols, *made] if token not in vocab}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("roberta")
    (path / "vocab.json").write_text(json.dumps(vocabulary()))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return path


@pytest.fixture(scope="module")
def roberta(folder):
    return load_tokenizer(str(folder), 12)


def test_ids(roberta):
    assert roberta("Hello world").tolist() == HELLO_WORLD + [1] * 8
    assert (roberta.bos_id, roberta.eot_id, roberta.pad_id, roberta.mask_id) == (0, 2, 1, 50264)
    assert roberta.vocab_size == roberta.masked_vocab_size == 50265
    assert np.flatnonzero(roberta.is_special).tolist() == [0, 1, 2, 3, 50264]
    assert roberta.lengths(roberta.encode_batch(["Hello", "Hello world " * 9])).tolist() == [3, 12]


@pytest.mark.parametrize(
    "text", ["Hello world", " Hello  world\n", "hello", "a cat, ab 12 it's caf\u00e9 \u732b", "</s> <mask>"]
)
def test_as_the_library_of_byte_level_bpe(roberta, folder, text):
    theirs = tokenizers.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    assert roberta.encode(text) == [0, *theirs.encode(text).ids, 2]


def test_file_formats_agree(roberta, folder, tmp_path):
    model = {"vocab": vocabulary(), "merges": MERGES}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "pre_tokenizer": {"type": "ByteLevel"}}))
    prefixed = tmp_path / "prefixed.json"
    prefixed.write_text(json.dumps({"model": model, "pre_tokenizer": {"add_prefix_space": True}}))
    for path in (folder / "vocab.json", tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(path), 12)("Hello world cat").tolist() == roberta("Hello world cat").tolist()
    assert load_tokenizer(str(prefixed)).encode("cat") == roberta.encode(" cat")


def test_words_and_masks(roberta):
    ids = roberta("Hello world ab, cat")
    assert roberta.words(ids, roberta.lengths(ids)).tolist() == [-1, 0, 1, 2, 2, 2, 3, -1, -1, -1, -1, -1]
    assert roberta.with_masks("Hello <mask> cat")[:5].tolist() == [0, 31414, 50264, *roberta.encode(" cat")[1:]]
    assert roberta.with_masks("<mask> cat")[:4].tolist() == [0, 50264, *roberta.encode(" cat")[1:]]
    assert [roberta.token_text(i) for i in (31414, 232, 50264, 2)] == ["Hello", "world", "<mask>", "</s>"]
    batch = masked(roberta, ["Hello world ab, cat"], times=2000)
    found, words = chosen_tokens(batch), roberta.words(batch["text"], batch["text_length"])
    assert abs(found.sum() / (words >= 0).sum() - 0.15) < 0.02
    assert (found[:, 3] == found[:, 4]).all() and (found[:, 3] == found[:, 5]).all()
    assert (batch["masked_text"][found] == 50264).mean() > 0.75


def test_white_space_is_no_text(roberta):
    with pytest.raises(UserError, match="has no tokens"):
        roberta(" \n")


def test_mistakes(folder, tmp_path):
    def said(vocab, merges=MERGES):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({"model": {"vocab": vocab, "merges": merges}}))
        with pytest.raises(UserError) as error:
            load_tokenizer(str(path))
        return str(error.value)

    vocab = vocabulary()
    assert "has <pad> 5, needed are <s> 0, <pad> 1" in said(vocab | {"<pad>": 5})
    assert "lacks 1 byte symbols, e.g. 'q'" in said({token: i for token, i in vocab.items() if token != "q"})
    assert "do not belong together" in said(vocab, ["q z"])
    with pytest.raises(UserError, match="merges of RoBERTa's kind.*name the vocab.json"):
        load_tokenizer(str(folder / "merges.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has neither tokenizer.json nor vocab.json"):
        load_tokenizer(str(tmp_path / "empty"))


def test_a_vocabulary_without_a_mask_gets_one(tmp_path):
    vocab = {token: i for token, i in vocabulary().items() if token != "<mask>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": MERGES}}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.masked_vocab_size) == (31415, 31415, 31416)
