"""Which pictures are put beside which texts: half match, no false negative, drawn by the step."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from stream_tools import CONTEXT, ListSource, assert_same, joined, pairs, take

from florence_jax.data.batches import BatchMaker
from florence_jax.data.captions import caption_label
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.pipeline import Process, TrainData, train_stream
from florence_jax.data.records import BadRecord
from florence_jax.errors import UserError
from florence_jax.losses.pairing import pair_in_batch, with_others


def labels(*texts):
    return np.stack([caption_label(text) for text in texts])


# -- in a batch -------------------------------------------------------------------------------------------------------


@jax.jit
def pair_with_keys(keys, captions, similarity):
    def one(key):
        return pair_in_batch(key, captions[:, 0], captions, similarity)

    return jax.vmap(one)(keys)


def draws(*texts, similarity=0.0):
    """(1000, 5) of as many keys: pictures, whether they match. "ax" is text a, of a picture with captions a and x."""
    captions = np.stack([labels(text[0], text[-1]) for text in texts])
    similarity = np.broadcast_to(np.float32(similarity), (5, 5))
    return map(np.asarray, pair_with_keys(jax.random.split(jax.random.key(0), 1000), captions, similarity))


def test_half_of_a_batch_matches_and_others_are_uniform():
    index, match = draws("a", "b", "a", "c", "d")
    assert (match.sum(1) == 2).all()
    assert (index[match == 1] == np.nonzero(match)[1]).all()
    assert np.abs(match.mean(0) - 0.4).max() < 0.06
    for i, allowed in enumerate(([1, 3, 4], [0, 2, 3, 4], [1, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3])):
        share = np.bincount(index[match[:, i] == 0, i], minlength=5) / (match[:, i] == 0).sum()
        assert not np.delete(share, allowed).any()
        assert np.abs(share[allowed] - 1 / len(allowed)).max() < 0.07


def test_a_picture_with_the_text_among_its_captions_is_no_other():
    index, match = draws("ax", "ba", "c", "d", "e")
    assert set(index[match[:, 0] == 0, 0]) == {2, 3, 4}  # picture 1 has caption a too
    assert set(index[match[:, 1] == 0, 1]) == {0, 2, 3, 4}


def test_texts_without_another_picture_keep_their_own():
    index, match = draws("ax", "ya", "za", "wa", "va")
    assert (match.sum(1) == 2).all() and (match[:, 0] == 1).all()
    index, match = draws(*"aaaaa")
    assert (match == 1).all() and (index == range(5)).all()
    index, match = draws(*"aaaab")
    assert (match.sum(1) == 2).all()
    assert (index[:, :4][match[:, :4] == 0] == 4).all()


def test_hard_pictures_are_drawn_by_similarity():
    index, match = draws(*"abcde", similarity=np.log([9.0, 6.0, 3.0, 0.5, 0.5]))
    share = np.bincount(index[match[:, 0] == 0, 0], minlength=5) / (match[:, 0] == 0).sum()
    assert np.abs(share - [0, 0.6, 0.3, 0.05, 0.05]).max() < 0.06
    assert (match.sum(1) == 2).all()


def test_the_same_on_any_number_of_devices():
    label = labels(*"abcdefghijklmnop")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.device_put(label, NamedSharding(mesh, PartitionSpec("data")))
    pair = jax.jit(pair_in_batch)
    for one, eight in zip(pair(jax.random.key(3), label), pair(jax.random.key(3), over), strict=True):
        assert (np.asarray(one) == np.asarray(eight)).all()


def test_a_batch_of_one_is_refused():
    with pytest.raises(UserError, match="batch of one has no picture that is not"):
        pair_in_batch(jax.random.key(0), labels("a"))


def test_where_the_pictures_of_others_are():
    rows, index = with_others(jnp.array([1, 0, 0, 1, 0]))
    assert rows.tolist() == [1, 2, 4] and index.tolist() == [0, 5, 6, 3, 7]


# -- another record of the data ---------------------------------------------------------------------------------------

OPS = "decode|rrc(8)|flip|caption|label|other(image)|tokenize|keep(image, other_image, match, redrawn, label, number)"


def numbered(n, prefix="r", first=0, **fields):
    rows = pairs(n, prefix)
    return ListSource([row | {"number": first + i} | fields for i, row in enumerate(rows)], prefix)


@pytest.fixture(scope="module")
def data():
    return TrainData([numbered(20), numbered(9, "s", 20)], [2, 1], OPS, CONTEXT)


def test_exactly_half_of_the_global_batch_matches(data):
    batches = take(train_stream(data, batch_size=7, seed=1), 6)
    assert [int(batch["match"].sum()) for batch in batches] == [3] * 6
    assert len({batch["match"].tobytes() for batch in batches}) > 3
    for batch in batches:
        same = (batch["image"] == batch["other_image"]).all((1, 2, 3))
        assert (same == (batch["match"] == 1)).all()


def test_the_same_for_any_number_of_hosts_and_starts(data):
    whole = take(train_stream(data, batch_size=6, seed=1), 4)
    parts = [take(train_stream(data, batch_size=6, seed=1, process=Process(i, 3)), 4) for i in range(3)]
    assert_same(whole, joined(parts))
    assert_same(whole[2:], take(train_stream(data, batch_size=6, seed=1, start_step=2, cache=True, prefetch=0), 2))
    other = take(train_stream(data, batch_size=6, seed=2), 4)
    assert any((a["match"] != b["match"]).any() for a, b in zip(whole, other, strict=True))


def test_the_same_in_a_worker_process(data):
    """What is sent there is a copy of the maker."""
    maker = BatchMaker(data.sources, parse_ops(OPS, CONTEXT), seed=1, on_corrupt="skip", batch_size=6)
    assert_same([maker.train(12, range(6))], [pickle.loads(pickle.dumps(maker)).train(12, range(6))])


def plain(n, **fields):
    """Pictures of one colour, the number of the record."""
    rows = [{"key": str(i), "image": np.full((4, 4, 3), i, np.uint8), "caption": f"c{i}"} | fields for i in range(n)]
    return rows


def others_drawn(rows, steps=200, on_corrupt="skip"):
    """Counts of (own picture, other picture) in rows that do not match, and all `redrawn`, of batches of 4."""
    fields = "captions=1, caption=1" if any("captions" in row for row in rows if isinstance(row, dict)) else "caption=1"
    ops = parse_ops(f"caption({fields})|label|other(image)|keep(image, other_image, match, redrawn)", {})
    maker = BatchMaker([ListSource(rows)], ops, seed=0, on_corrupt=on_corrupt, batch_size=4)
    order = np.resize(np.arange(len(rows)), 4 * steps)  # grain's shuffle is slow on so few records
    batches = [maker.train(4 * step, order[4 * step : 4 * step + 4].tolist()) for step in range(steps)]
    own, other, match, redrawn = (
        np.concatenate([batch[field].reshape(4, -1)[:, 0] for batch in batches])
        for field in ("image", "other_image", "match", "redrawn")
    )
    counts = np.zeros((len(rows), len(rows)), int)
    np.add.at(counts, (own[match == 0], other[match == 0]), 1)
    return counts, redrawn


def test_others_are_uniform_and_never_the_same():
    counts, redrawn = others_drawn(plain(5))
    assert not np.diag(counts).any() and not redrawn.any()
    share = counts / counts.sum(1, keepdims=True)
    assert np.abs(share[~np.eye(5, dtype=bool)] - 0.25).max() < 0.13


def test_a_record_with_the_text_or_the_picture_is_drawn_again():
    rows = plain(6)
    rows[1]["captions"] = ["other words", "C0 "]  # the text of record 0, normalised
    rows[2]["image_id"] = rows[3]["image_id"] = 7
    rows[5] = rows[4] | {"caption": "something else"}  # the same picture, numbered 4
    counts, redrawn = others_drawn(rows)
    assert not counts[0, 1] and counts[0, 2] and not counts[2, 3] and not counts[3, 2] and not counts[4, 4]
    assert counts[1, 0]  # where "other words" was drawn
    assert 0.02 < redrawn.mean() < 0.3


def test_a_bad_record_is_no_other(caplog):
    rows = plain(5)
    rows[2] = BadRecord("two", "broken")
    counts, redrawn = others_drawn(rows, 50)
    assert not counts[:, 2].any() and redrawn.any() and counts.sum() == 100
    with pytest.raises(UserError, match="'two': broken"):
        others_drawn(rows, 50, on_corrupt="error")


def test_a_text_that_nearly_all_have_is_a_bad_record(monkeypatch, caplog):
    monkeypatch.setattr("florence_jax.data.ops.language.OTHERS_TRIED_FOR_A_TEXT", 3)
    rows = [row | {"caption": "same" if i < 30 else "rare"} for i, row in enumerate(plain(31))]
    counts, _ = others_drawn(rows, 10)
    assert not counts[:30, :30].any() and counts.sum() == 20
    assert "none of 3 others drawn for it fits" in caplog.text


@pytest.mark.parametrize("op", ["other(image)", "caption_labels"])
def test_what_cannot_be_learned_is_refused_at_the_start(op):
    spec = f"caption|label|{op}|keep(image, label)"
    alike = [row | {"caption": "a  Cat" if i % 2 else "a cat"} for i, row in enumerate(plain(5))]
    with pytest.raises(UserError, match=r"alike: all captions are alike \(5 records looked at\)"):
        train_stream(TrainData([ListSource(alike, "alike")], None, spec, {}), batch_size=4, seed=0)
    with pytest.raises(UserError, match="batches of one: there is no other picture"):
        train_stream(TrainData([ListSource(plain(5))], None, spec, {}), batch_size=1, seed=0)


def test_captions_must_differ_in_each_source_of_which_others_are_drawn():
    sources = [ListSource(plain(5)), ListSource([row | {"caption": "x"} for row in plain(3)], "one")]
    with pytest.raises(UserError, match="one: all captions are alike"):
        train_stream(TrainData(sources, None, "caption|label|other(image)|keep(match)", {}), batch_size=4, seed=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("other(image)", "'other' needs one text of an example: put caption|label before it"),
        ("texts('caption=1')|other(image)", "'other' needs one text"),
        ("caption|label|other(image)|other(image)|keep(match)", "'other' twice"),
    ],
)
def test_mistakes(spec, message):
    with pytest.raises(UserError, match=message):
        train_stream(TrainData([ListSource(plain(5))], None, spec, CONTEXT), batch_size=4, seed=0)


def test_all_captions_of_a_picture_as_labels():
    ops = parse_ops("caption(captions=1)|label|caption_labels(3)", {})
    example = {"key": "k", "captions": ["a", "b", "A "]}
    for op in ops:
        example = op(example, np.random.default_rng(0))
    found = {tuple(row) for row in example["caption_labels"].tolist()}
    assert example["caption_labels"].shape == (3, 2)
    assert found == {tuple(row) for row in labels("a", "b").tolist()}
    with pytest.raises(UserError, match=r"'k' has 4 different captions: write caption_labels\(4\)"):
        ops[2](example | {"captions": list("abcd")}, np.random.default_rng(0))
