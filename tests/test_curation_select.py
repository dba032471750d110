"""Selection: metadata queries against a naive search, balance and its simulator, information, learnability."""

import pickle
import re

import numpy as np
import pyarrow as pa
import pytest

from florence_jax.curation.select import queries
from florence_jax.curation.select.queries import (
    UNMATCHED,
    Matches,
    Metadata,
    ahocorasick,
    predict_size,
    t_for_size,
    t_for_tail_share,
    tail_share,
)
from florence_jax.curation.select.rules import (
    SelectRules,
    cluster_scores,
    decide_selection,
    information,
    learnability,
    word_counts,
)
from florence_jax.curation.select.stage import query_ranks, with_balance
from florence_jax.errors import UserError

needs_automaton = pytest.mark.skipif(ahocorasick is None, reason="pyahocorasick is not installed")
ENTRIES = ["photo", "red car", "car", "dog", "new york", "犬", "T-shirt", "étude"]


# -- metadata queries -------------------------------------------------------------------------------------------------


@needs_automaton
@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A photo of a Red  CAR.", ["photo", "red car", "car"]),
        ("red-car", ["red car", "car"]),
        ("scarred cartoon photos", []),
        ("car car car", ["car"]),
        ("NEW&nbsp;YORK: dog!", ["dog", "new york"]),
        ("白い犬がいる", ["犬"]),
        ("t-shirt and T shirt", ["T-shirt"]),
        ("E\u0301tude in blue", ["étude"]),
        ("", []),
    ],
)
def test_whole_words_in_any_writing(caption, expected):
    metadata = Metadata(ENTRIES)
    assert [ENTRIES[i] for i in metadata.match(caption)] == expected
    assert [ENTRIES[i] for i in pickle.loads(pickle.dumps(metadata)).match(caption)] == expected


@needs_automaton
def test_equal_to_a_search_entry_by_entry():
    rng = np.random.default_rng(0)
    entries = sorted({" ".join(rng.choice(list("abcd"), rng.integers(1, 4))) for _ in range(40)})
    metadata = Metadata(entries)
    for _ in range(300):
        caption = " ".join(rng.choice(list("abcde"), rng.integers(0, 9)))
        naive = [i for i, e in enumerate(entries) if re.search(rf"(?<!\w){re.escape(e)}(?!\w)", caption)]
        assert metadata.match(caption) == naive


@needs_automaton
def test_metadata_file_and_its_errors(tmp_path):
    (tmp_path / "m.txt").write_text("dog\n\n cat \nDOG\n", "utf-8")
    metadata = Metadata.from_file(str(tmp_path / "m.txt"))
    assert metadata.entries == ("dog", "cat", "DOG") and metadata.match("a dog and a cat") == [0, 1]
    with pytest.raises(UserError, match="cannot read"):
        Metadata.from_file(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="no queries"):
        Metadata(["  ", "--"])


def test_the_library_is_named_when_missing(monkeypatch):
    monkeypatch.setattr(queries, "ahocorasick", None)
    with pytest.raises(UserError, match="pyahocorasick"):
        Metadata(["dog"])


# -- balance ----------------------------------------------------------------------------------------------------------


def zipf_matches(pairs=20_000, queries=300, seed=0):
    """Pairs with 0 to 4 queries of a Zipf distribution."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, queries + 1)
    drawn = [sorted(set(rng.choice(queries, rng.integers(0, 5), p=share / share.sum()).tolist())) for _ in range(pairs)]
    return Matches.build([f"{i:08x}" for i in range(pairs)], drawn, queries), [f"query {q}" for q in range(queries)]


def balance(matches, entries, seed=3, order=slice(None)):
    """(smallest t that keeps each pair, number of its queries), by the functions of the stage.

    `order`: of the matches in the block.
    """
    uids = np.array(matches.uids)
    names = np.array([*entries, UNMATCHED])[matches.queries]  # -1 is the last
    block = query_ranks(pa.table({"uid": uids[matches.pairs][order], "query": names[order]}), seed)
    found = with_balance(pa.table({"uid": uids}), block)
    return found["balance_t"].to_numpy(), found["matches"].to_numpy()


@pytest.fixture(scope="module")
def zipf():
    matches, entries = zipf_matches()
    return matches, entries, *balance(matches, entries)


def test_matches_in_compressed_rows():
    matches = Matches.build(["a", "b", "c"], [[0, 2], [], [2]], 3)
    assert matches.pairs.tolist() == [0, 0, 1, 2] and matches.queries.tolist() == [0, 2, -1, 2]
    assert matches.counts().tolist() == [1, 0, 2, 1]
    scores, queries = balance(matches, ["x", "y", "z"])
    assert queries.tolist() == [2, 0, 1] and scores[:2].tolist() == [1, 1] and scores[2] in (1, 2)


def test_each_query_admits_exactly_t_pairs(zipf):
    matches, entries, scores, _ = zipf
    for t in (1, 20, 500):
        # A pair is admitted through a query if its rank there is within t: recompute it from single queries.
        for query in (0, 5, 250):
            rows = matches.pairs[matches.queries == query]
            alone = Matches.build([matches.uids[i] for i in rows], [[query]] * len(rows), matches.size)
            admitted = balance(alone, entries)[0] <= t
            assert admitted.sum() == min(t, len(rows))
            assert (scores[rows[admitted]] <= t).all()


def test_sampling_is_nested_in_t_and_does_not_depend_on_order(zipf):
    matches, entries, scores, _ = zipf
    sizes = [int((scores <= t).sum()) for t in (1, 10, 100, 10_000)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    order = np.random.default_rng(1).permutation(len(matches.pairs))
    np.testing.assert_array_equal(balance(matches, entries, order=order)[0], scores)


@pytest.mark.parametrize("keep_unmatched", [False, True])
@pytest.mark.parametrize("t", [20, 200])
def test_the_predicted_size_is_within_one_percent(zipf, t, keep_unmatched):
    matches, entries, scores, queries = zipf
    kept = (scores <= t) & ((queries > 0) | keep_unmatched)
    counts, n = matches.counts(), len(matches.uids)
    assert predict_size(matches, counts, n, t, keep_unmatched) == pytest.approx(kept.sum(), rel=0.01)
    naive = np.minimum(counts[:-1], t).sum()
    assert t < 100 or naive > 1.1 * kept.sum()  # adding up over queries counts pairs several times


def test_a_sample_predicts_the_whole(zipf):
    matches = zipf[0]
    counts, n = matches.counts(), len(matches.uids)
    part = Matches(matches.uids[:5000], matches.pairs[matches.pairs < 5000], matches.queries[matches.pairs < 5000], 300)
    assert predict_size(part, counts, n, 100) == pytest.approx(predict_size(matches, counts, n, 100), rel=0.03)


def test_t_for_a_size_and_for_a_tail_share(zipf):
    matches = zipf[0]
    counts, n = matches.counts(), len(matches.uids)
    t = t_for_size(matches, counts, n, 5000)
    assert predict_size(matches, counts, n, t) <= 5000 < predict_size(matches, counts, n, t + 1)
    t = t_for_tail_share(counts, 0.3)
    assert tail_share(counts, t) >= 0.3 > tail_share(counts, t - 1)


def test_decisions_and_switches():
    row = {"matches": 2, "balance_t": 12.0, "bits": 9.0, "cluster_t": 3, "gap": 0.5}
    assert decide_selection({}, SelectRules()) is None
    assert decide_selection(row, SelectRules(t=12, min_bits=9, cluster_t=3, min_gap=0.5)) is None
    assert decide_selection(row, SelectRules(t=11)) == ("balance", 12.0, 11)
    assert decide_selection(row | {"matches": 0, "balance_t": 1}, SelectRules(t=11)) == ("no_query", 0, 1)
    assert decide_selection(row | {"matches": 0, "balance_t": 1}, SelectRules(t=11, keep_unmatched=True)) is None
    assert decide_selection(row, SelectRules(min_bits=10)) == ("information", 9.0, 10)
    assert decide_selection(row, SelectRules(cluster_t=2)) == ("cluster", 3, 2)
    assert decide_selection(row, SelectRules(min_gap=0.6)) == ("learnability", 0.5, 0.6)
    assert decide_selection(row | {"gap": np.nan}, SelectRules(min_gap=-9.0))[0] == "learnability"


# -- informativeness and learnability ---------------------------------------------------------------------------------


def test_information_of_known_frequencies():
    captions = ["a dog", "a cat", "a dog", "a zebra a"]
    counts = word_counts(captions)
    assert counts == {"a": 4, "dog": 2, "cat": 1, "zebra": 1}
    assert counts == word_counts(captions[:2]) + word_counts(captions[2:])
    assert information("a dog", counts, 4) == (1.0, 0.5)
    assert information("A zebra, a cat", counts, 4) == (4.0, 4 / 3)
    assert information("unknown", counts, 4) == (2.0, 2.0)
    assert information("", counts, 4) == (0.0, 0.0)


def test_cluster_balance_is_exact():
    clusters = np.repeat([0, 1, 2], [100, 10, 1])
    scores = cluster_scores([str(i) for i in range(111)], clusters, seed=0)
    assert np.bincount(clusters[scores <= 20]).tolist() == [20, 10, 1]


def test_learnability_prefers_hard_but_learnable():
    easy, noise, learnable = 0, 1, 2
    gap = learnability(np.float32([0.1, 5.0, 5.0]), np.float32([0.05, 4.9, 0.3]))
    assert gap.argmax() == learnable and gap[easy] < 0.1 and gap[noise] < 0.2
    with pytest.raises(UserError, match="one loss a pair"):
        learnability(np.zeros(2), np.zeros(3))
