"""Masked words: which tokens, how many, what becomes of them; the same for any host and worker."""

import pickle

import numpy as np
import pytest
from stream_tools import ListSource, picture
from test_text import MERGES

from florence_jax.data.ops.language import LONGEST_WORD, mask_places
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.pipeline import Process, TrainData, train_stream
from florence_jax.data.tokenizers import load_tokenizer
from florence_jax.errors import UserError

WORDS = "a grinning squirrel photographs unquestionably bright chrysanthemums, near the old water-mill of my uncle"
LENGTH = 40


@pytest.fixture(scope="module")
def shipped():
    return load_tokenizer("sentencepiece", LENGTH)


def masked(tokenizer, texts, spec="mask_words", times=1, seed=0):
    """Stacked fields of the examples of each text, `times` over."""
    (op,) = parse_ops(spec, {"tokenizer": tokenizer})
    op = pickle.loads(pickle.dumps(op))  # as it comes to a worker process
    rng = np.random.default_rng(seed)
    rows = [{"text": ids, "text_length": tokenizer.lengths(ids)} for ids in tokenizer.encode_batch(texts)]
    made = [op(row, rng) for _ in range(times) for row in rows]
    return {name: np.stack([example[name] for example in made]) for name in made[0]}


def sentences(count):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS.split(), rng.integers(1, 14))) for _ in range(count)]


def chosen_tokens(batch):
    """bool (N, L): where places are."""
    found = np.zeros_like(batch["text"], bool)
    there = batch["mask_targets"] >= 0
    found[np.nonzero(there)[0], batch["places"][there]] = True
    assert found.sum() == there.sum()  # no place twice
    assert (there[:, :-1] >= there[:, 1:]).all() and not batch["places"][~there].any()
    return found


@pytest.mark.parametrize("whole", [True, False])
def test_shares_over_many_tokens(shipped, whole):
    """15 % of 10^5 tokens, in long words as in short ones; of them 80 % masks, 10 % any other, 10 % as they were."""
    batch = masked(shipped, sentences(275), f"mask_words(whole={whole})", times=20)
    text, new, found = batch["text"], batch["masked_text"], chosen_tokens(batch)
    words = shipped.words(text, batch["text_length"])
    assert (words >= 0).sum() > 1e5
    assert not found[words < 0].any() and not shipped.is_special[text[found]].any()
    assert (new[~found] == text[~found]).all()
    there = batch["mask_targets"] >= 0
    assert (np.take_along_axis(text, batch["places"], 1)[there] == batch["mask_targets"][there]).all()
    assert abs(found.sum() / (words >= 0).sum() - 0.15) < 0.004
    shares = [(new[found] == i).mean() for i in (shipped.mask_id, text[found])]
    assert abs(shares[0] - 0.8) < 0.01 and abs(shares[1] - 0.1) < 0.01
    assert not shipped.is_special[new[found & (new != shipped.mask_id)]].any()
    sizes = (words[:, :, None] == words[:, None, :]).sum(2)
    for size in (1, 2, 5, 7):
        of_size = (sizes == size) & (words >= 0)
        assert of_size.any() and abs(found[of_size].mean() - 0.15) < 0.02, size


def test_words_are_masked_whole(shipped):
    batch = masked(shipped, sentences(100), times=3)
    found, words = chosen_tokens(batch), shipped.words(batch["text"], batch["text_length"])
    together = words[:, :, None] == words[:, None, :]
    together &= (words >= 0)[:, :, None] & (together.sum(2, keepdims=True) <= LONGEST_WORD)
    assert (found[:, :, None] == found[:, None, :])[together].all()
    single = chosen_tokens(masked(shipped, sentences(100), "mask_words(whole=False)", times=3))
    assert not (single[:, :, None] == single[:, None, :])[together].all()


def test_places_are_enough_and_few(shipped):
    long = masked(shipped, [WORDS + WORDS, "x" * 300, "eeee " * 20], times=200)
    assert long["places"].shape[1] == mask_places(LENGTH) == 11
    assert chosen_tokens(long).sum(1).max() <= 11
    assert mask_places(50, whole=False) == 8
    every = masked(shipped, [WORDS], "mask_words(share=1)")
    assert (chosen_tokens(every) == (shipped.words(every["text"], every["text_length"]) >= 0)).all()


def test_a_text_without_a_known_word_is_left_alone(shipped):
    (op,) = parse_ops("mask_words", {"tokenizer": shipped})
    text = np.array([2, 1, 1, 3, 0, 0], np.int32)
    out = op({"text": text, "text_length": np.int32(4)}, np.random.default_rng(0))
    assert (out["mask_targets"] == -1).all() and (out["masked_text"] == text).all()


def test_two_texts_are_refused(shipped):
    (op,) = parse_ops("mask_words", {"tokenizer": shipped})
    with pytest.raises(UserError, match="takes one text of an example, not 2"):
        op({"text": np.zeros((2, 8), np.int32), "text_length": np.ones(2, np.int32)}, np.random.default_rng(0))


def test_the_same_for_any_host_worker_and_start(shipped):
    records = [{"key": str(i), "image": picture(i), "caption": text} for i, text in enumerate(sentences(12))]
    ops = "caption|tokenize|mask_words|keep(masked_text, places, mask_targets)"
    data = TrainData([ListSource(records)], None, ops, {"tokenizer": shipped})

    def steps(start, **options):
        with train_stream(data, batch_size=4, seed=3, start_step=start, **options) as stream:
            return [next(stream) for _ in range(5 - start)]

    whole = steps(0)
    halves = [steps(2, process=Process(i, 2)) for i in range(2)]
    for name in ("masked_text", "places", "mask_targets"):
        for k in range(3):
            assert (whole[2 + k][name] == np.concatenate([half[k][name] for half in halves])).all()
    assert not (whole[0]["masked_text"] == whole[3]["masked_text"]).all()  # a record of the next epoch


# -- words of each vocabulary -----------------------------------------------------------------------------------------


def numbers(tokenizer, text):
    ids = tokenizer(text)
    return tokenizer.words(ids, tokenizer.lengths(ids)).tolist()


def test_words_of_sentencepiece(shipped):
    text = "a cat, photographs"
    pieces = [shipped._processor.id_to_piece(int(i)) for i in shipped.encode(text)[1:-1]]
    begins = np.cumsum([piece.startswith("\u2581") for piece in pieces]).tolist()
    assert numbers(shipped, text) == [-1, *begins, -1, *([-1] * (LENGTH - 2 - len(begins)))]
    assert max(begins) == 3 and len(begins) > 4


def test_words_of_clip(tmp_path):
    path = tmp_path / "merges.txt"
    path.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    clip = load_tokenizer(str(path), 12)
    assert numbers(clip, "cat's ox <|endoftext|> dog") == [-1, 0, 1, 2, 2, -1, 3, -1, -1, -1, -1, -1]
    assert clip.mask_id == clip.vocab_size == clip.masked_vocab_size - 1
    assert [clip.token_text(i) for i in clip.encode("cat's")[1:-1]] == ["cat", "'s"]
    assert clip.token_text(clip.eot_id) == "<|endoftext|>" and clip.token_text(clip.mask_id) == "<mask>"
    again = pickle.loads(pickle.dumps(clip))
    assert numbers(again, "a!") == [-1, 0, 1, *[-1] * 9]  # "!" is the id of padding too: known by length


# -- masks in a text --------------------------------------------------------------------------------------------------


def test_masks_in_a_text(shipped):
    found = shipped.with_masks("a <mask> of a cat <mask>")
    left, right = shipped.encode("a")[1:-1], shipped.encode("of a cat")[1:-1]
    assert found[: shipped.lengths(found)].tolist() == [2, *left, shipped.mask_id, *right, shipped.mask_id, 3]
    assert shipped.with_masks("<mask>")[:4].tolist() == [2, shipped.mask_id, 3, 0]
    with pytest.raises(UserError, match="'a cat' has no <mask>"):
        shipped.with_masks("a cat")
    with pytest.raises(UserError, match="longer than 40 tokens before its last <mask>"):
        shipped.with_masks("cat " * 40 + "<mask>")


def test_tokens_for_people(shipped):
    assert [shipped.token_text(i) for i in shipped.encode("a cat")[1:-1]][0] == "a"
    assert shipped.token_text(shipped.mask_id) == "<mask>" and shipped.token_text(3) == "</s>"
