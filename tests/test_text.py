"""Tokenizers, prompts and the tokenizer training command."""

import gzip
import importlib.util
import json
import os
import pathlib
import pickle

import numpy as np
import pytest
import sentencepiece

from florence_jax.data import remembered
from florence_jax.data.prompts import TEMPLATE_SETS, TEMPLATES, apply_prompt, class_prompts, template_set
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.tokenizers import ClipTokenizer, load_tokenizer
from florence_jax.errors import UserError
from florence_jax.tools import train_tokenizer

CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
CLIP_GOLDENS = {
    "a diagram": [49406, 320, 22697, 49407],
    "a photo of a cat.": [49406, 320, 1125, 539, 320, 2368, 269, 49407],
    "A photo of the Golden Retriever, a type of pet.": [
        *(49406, 320, 1125, 539, 518, 3878, 28394, 267, 320, 3877, 539, 3703, 269, 49407)
    ],
    "  it's   2022!! café &amp; co. ": [49406, 585, 568, 273, 271, 273, 273, 748, 15304, 261, 1320, 269, 49407],
    "猫 😀": [49406, 163, 234, 360, 7334, 49407],
}
# A CLIP-like vocabulary of six merges.
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("'", "s</w>"), ("o", "f</w>")]


def clip_vocabulary():
    """Path of CLIP's vocabulary, from the environment or the open-clip-torch wheel (found, not imported)."""
    if path := os.environ.get("FLORENCE_CLIP_VOCAB"):
        return path
    if (found := importlib.util.find_spec("open_clip")) and found.submodule_search_locations:
        path = pathlib.Path(found.submodule_search_locations[0]) / CLIP_FILE
        if path.exists():
            return str(path)
    pytest.skip(f"no {CLIP_FILE}: `pip install --no-deps open-clip-torch`, or set FLORENCE_CLIP_VOCAB to its path")


@pytest.fixture(scope="module")
def shipped():
    return load_tokenizer("sentencepiece")


@pytest.fixture
def merges_file(tmp_path):
    path = tmp_path / "merges.txt"
    path.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    return path


@pytest.fixture
def tiny_clip(merges_file):
    return load_tokenizer(str(merges_file), 8)


# -- CLIP ---------------------------


@pytest.mark.parametrize("text", CLIP_GOLDENS)
def test_clip_goldens(text):
    tokenizer = load_tokenizer(clip_vocabulary(), 77)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eot_id, tokenizer.pad_id) == (49408, 49406, 49407, 0)
    assert tokenizer.encode(text) == CLIP_GOLDENS[text]


def test_clip_repairs_what_its_texts_were_repaired_of(tiny_clip):
    """Full-width letters, ligatures, a broken encoding, typographic quotes, line breaks: as ftfy, which CLIP used."""
    assert tiny_clip.clean("ﬁne ＦＵＬＬ\ncafÃ© “a’s” &amp;lt;") == 'fine full café "a\'s" <'
    assert tiny_clip("ｃａｔ ﬀ").tolist() == tiny_clip("cat ff").tolist()


def test_clip_splits_clitics_digits_and_specials(tiny_clip):
    names = {i: token for token, i in tiny_clip._tokenizer.get_vocab().items()}
    pieces = [names[i] for i in tiny_clip.encode("Cat's 12dog!?<|endoftext|> of&amp;lt;")]
    expected = "<|startoftext|> cat</w> 's</w> 1</w> 2</w> dog</w> ! ?</w> <|endoftext|> of</w> <</w> <|endoftext|>"
    assert pieces == expected.split()


def test_clip_file_formats_agree(tiny_clip, merges_file, tmp_path):
    vocab = tiny_clip._tokenizer.get_vocab()
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "m.txt.gz").write_bytes(gzip.compress(merges_file.read_bytes()))
    for name, merges in (("a", [" ".join(m) for m in MERGES]), ("b", MERGES)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": merges}}))
    expected = tiny_clip("the dog of cat's ü")
    for name in ("vocab.json", "m.txt.gz", "a/tokenizer.json", "b/tokenizer.json"):
        np.testing.assert_array_equal(load_tokenizer(str(tmp_path / name), 8)("the dog of cat's ü"), expected)
    assert tiny_clip.vocab_size == 512 + len(MERGES) + 2 == len(vocab)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.bin", "", "unknown tokenizer"),
        ("gone.model", None, "cannot read"),
        ("gone.json", None, "cannot read"),
        ("x.model", "text", "not a SentencePiece model"),
        ("empty.model", "", "not a SentencePiece model"),
        ("x.txt", "header only", "not a merges file"),
        ("x.txt", "header\na b c", "not a merges file"),
        ("x.txt", "header\nqq zz", "do not belong together"),
        ("x.json", "{", "not a JSON file"),
        ("x.json", "[1]", "neither a tokenizer.json nor a vocab.json"),
        ("x.json", '{"a": "b"}', "neither a tokenizer.json nor a vocab.json"),
        ("x.json", '{"model": {"type": "WordPiece", "vocab": {"a": 0}}}', "not of a BPE model"),
        ("x.json", '{"model": {"vocab": {"a": 0}, "merges": ["a b"]}}', "not a CLIP vocabulary"),
        ("x.json", '{"a": 0}', "merges.txt"),
    ],
)
def test_bad_tokenizer_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(str(tmp_path / name), 8)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_truncated_gzip(tmp_path, merges_file):
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(merges_file.read_bytes())[:-12])
    with pytest.raises(UserError, match="not a merges file"):
        load_tokenizer(str(tmp_path / "x.txt.gz"), 8)


# -- what all tokenizers do ---------------------------


@pytest.fixture(params=["sentencepiece", "clip"])
def tokenizer(request, tiny_clip):
    return load_tokenizer("sentencepiece", 8) if request.param == "sentencepiece" else tiny_clip


def test_pads_and_cuts(tokenizer):
    ids = tokenizer("cat")
    n = len(tokenizer.encode("cat"))
    assert ids.dtype == np.int32 and ids.shape == (8,)
    assert ids[0] == tokenizer.bos_id and ids[n - 1] == tokenizer.eot_id and not ids[n:].any()
    text = "cat dog " * 20
    full, cut = tokenizer.encode(text), tokenizer(text)
    assert len(full) > 8
    assert cut.tolist() == [*full[:7], tokenizer.eot_id]


def test_lengths_know_padding_from_words_of_its_id(tokenizer, tiny_clip):
    texts = ["cat", "cat dog", "dog " * 30]
    want = [min(len(tokenizer.encode(text)), 8) for text in texts]
    lengths = tokenizer.lengths(tokenizer.encode_batch(texts))
    assert lengths.dtype == np.int32 and lengths.tolist() == want == [tokenizer.lengths(tokenizer(t)) for t in texts]
    # Id 0 is "!" in CLIP's vocabulary: a word, also right before the end; and the end token may be in the text.
    ids = np.array([[1, 0, 5, 0, tiny_clip.eot_id, 0, 0, 0], [1, tiny_clip.eot_id, 4, 0, 0, 0, 0, tiny_clip.eot_id]])
    assert tiny_clip.lengths(ids).tolist() == [5, 8]


def test_exact_fit_is_not_cut(tokenizer):
    full = tokenizer.encode("cat cat dog")
    tokenizer.length = len(full)
    assert tokenizer("cat cat dog").tolist() == full


def test_batch_and_pickle_agree_with_single(tokenizer):
    texts = ["cat", "A DOG &amp; a cat's 猫 12", "dog " * 30]
    expected = np.stack([tokenizer(text) for text in texts])
    np.testing.assert_array_equal(tokenizer.encode_batch(texts), expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenizer)).encode_batch(texts), expected)
    assert tokenizer.encode_batch([]).shape == (0, 8)


def test_subword_sampling(shipped):
    text, plain = "a Strawberry on  a speedboat", shipped("a strawberry on a speedboat").tolist()
    drawn = [shipped.sample(text, np.random.default_rng(seed)).tolist() for seed in range(50)]
    assert drawn == [shipped.sample(text, np.random.default_rng(seed)).tolist() for seed in range(50)]
    decode = shipped._processor.decode
    assert {decode([i for i in ids if i > 3]) for ids in drawn} == {decode([i for i in plain if i > 3])}
    assert len({tuple(ids) for ids in drawn}) > 10 and all(ids[0] == shipped.bos_id for ids in drawn)
    assert shipped.sample("cat", np.random.default_rng(0)).shape == (shipped.length,)


def test_subword_sampling_follows_the_unigram_model(shipped):
    processor, rng = shipped._processor, np.random.default_rng(0)
    found = [tuple(ids) for ids in processor.nbest_encode_as_ids("zombie", 16)]
    weights = np.exp([0.2 * sum(map(processor.get_score, ids)) for ids in found])
    drawn = [tuple(i for i in shipped.sample("zombie", rng) if i > 3) for _ in range(3000)]
    shares = np.array([drawn.count(ids) for ids in found]) / 3000
    assert shares.sum() == 1 and np.abs(shares - weights / weights.sum()).max() < 0.03


def test_what_is_remembered_changes_no_draw(shipped, monkeypatch):
    texts = [f"a {word} zombie on a {word}" for word in ("striped", "red", "golden", "red")]
    rng = np.random.default_rng(0)
    drawn = [shipped.sample(text, rng) for text in texts]
    rng = np.random.default_rng(0)
    monkeypatch.setattr(shipped, "_segmentations", shipped._best_segmentations)
    np.testing.assert_array_equal(drawn, [shipped.sample(text, rng) for text in texts])


def test_remembered_begins_anew_when_full_and_cannot_be_changed(monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 2)
    asked = []

    def length(text):
        asked.append(text)
        if not text:
            raise UserError("empty")
        return np.array([len(text)])

    known = remembered.Remembered(length)
    assert [int(known(text)[0]) for text in ("a", "bb", "a", "ccc", "bb")] == [1, 2, 1, 3, 2]
    assert asked == ["a", "bb", "ccc", "bb"]
    with pytest.raises(ValueError, match="read-only"):
        known("bb")[0] = 5
    for _ in range(2):
        with pytest.raises(UserError, match="empty"):
            known("")


def test_subword_sampling_needs_a_unigram_model(tiny_clip):
    with pytest.raises(UserError, match="subword sampling needs a SentencePiece tokenizer"):
        tiny_clip.sample("cat", np.random.default_rng(0))


def test_case_and_space_do_not_matter(tokenizer):
    assert tokenizer.encode("  A\tCat \n") == tokenizer.encode("a cat")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no tokens"), (" \n\t", "no tokens"), (None, "must be a str"), (b"cat", "bytes"), ("\ud83d", "surrogates")],
)
def test_bad_captions(tokenizer, text, message):
    with pytest.raises(UserError, match=message):
        tokenizer(text)
    with pytest.raises(UserError, match=message):
        tokenizer.encode_batch(["cat", text])


def test_too_short_length(merges_file):
    for spec in ("sentencepiece", str(merges_file)):
        with pytest.raises(UserError, match="length 2"):
            load_tokenizer(spec, 2)


# -- the shipped model ---------------------------


def test_shipped_model(shipped):
    assert (shipped.length, shipped.vocab_size) == (76, 2000)
    assert (shipped.pad_id, shipped.bos_id, shipped.eot_id) == (0, 2, 3)


def test_shipped_model_encodes_anything(shipped):
    for text in ("猫 😀", "ÆØÅ ½ №5", "<s></s><pad>", "\U0010fffd", "a\x00b"):
        assert 1 not in shipped.encode(text)
        assert not {0, 2, 3} & set(shipped.encode(text)[1:-1])


def test_shipped_model_fits_the_emoji_captions(shipped):
    train = {record["caption"] for record in open_source("emoji:train").metadata()}
    unseen = {record["caption"] for record in open_source("emoji:new_names").metadata()}
    lengths = {text: len(shipped.encode(text)) for text in train | unseen}
    assert max(lengths.values()) <= 16
    assert np.mean([lengths[text] for text in train]) < 5.5
    # Nearly all pieces of unseen names occur in the training captions or keywords.
    known = {i for text in set(train_tokenizer.source_texts("emoji:train")) for i in shipped.encode(text)}
    pieces = [i for text in unseen for i in shipped.encode(text)]
    assert np.mean([i in known for i in pieces]) > 0.99


def test_shipped_model_is_reproducible(shipped, tmp_path):
    out = tmp_path / "tokenizer.model"
    assert train_tokenizer.main(["--source=emoji:train", "--vocab_size=2000", f"--out={out}"]) == 0
    rebuilt = load_tokenizer(str(out))
    pieces = [{t._processor.id_to_piece(i) for i in range(t.vocab_size)} for t in (shipped, rebuilt)]
    # Other releases of SentencePiece may prune differently.
    assert len(pieces[0] & pieces[1]) >= (2000 if sentencepiece.__version__ == "0.2.3" else 1900)


# -- training ---------------------------


LINES = [f"{a} {b}" for a in ("red", "green", "blue", "Small", "large") for b in ("circle", "square", "cat", "dog")]


def test_training_depends_on_the_set_of_texts_only():
    texts = [*LINES, *TEMPLATES]
    model = train_tokenizer.train_pieces(texts, 320)
    assert train_tokenizer.train_pieces([*texts[::-1], "", "  ", "RED  cat"], 320) == model
    assert b"/" not in model.replace(b"</s>", b"")  # no path of the machine that trained it


def test_training_command(tmp_path, capsys):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "new.model"
    corpus.write_text("\n".join(LINES))
    assert train_tokenizer.main([f"--corpus={corpus}", "--vocab_size=330", f"--out={out}"]) == 0
    assert "330 pieces" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(out), 12)
    assert tokenizer.vocab_size == 330
    assert 1 not in tokenizer("a photo of a red zebra")


@pytest.mark.parametrize(
    ("lines", "size", "out", "message"),
    [
        (None, 300, "x.model", "cannot read the corpus"),
        (LINES, 300, "x.bin", "must end in .model"),
        (LINES, 90_000, "x.model", "too high"),
        (LINES, 100, "x.model", "cannot train 100 pieces"),
        (LINES, 330, "gone/x.model", "gone"),
    ],
)
def test_training_command_errors(tmp_path, capsys, lines, size, out, message):
    corpus = tmp_path / "corpus.txt"
    if lines:
        corpus.write_text("\n".join(lines))
    assert train_tokenizer.main([f"--corpus={corpus}", f"--vocab_size={size}", f"--out={tmp_path / out}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / out).exists()


def test_training_on_nothing_and_on_a_missing_source(tmp_path, capsys):
    with pytest.raises(UserError, match="no text"):
        train_tokenizer.train_pieces(["", " "], 300)
    assert train_tokenizer.main(["--source=emoji:gone", f"--out={tmp_path / 'x.model'}"]) == 2
    assert "emoji" in capsys.readouterr().err
    assert train_tokenizer.main(["--source=emoji:train", "--fields=gone", f"--out={tmp_path / 'x.model'}"]) == 2
    assert "no record has the field 'gone'; fields: caption" in capsys.readouterr().err


def test_texts_of_a_source_are_strings_only(tmp_path):
    rows = [{"file": "a.png", "text": None}, {"file": "b.png", "text": "b", "group": 3, "keywords": ["k", 4]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.png").write_bytes(b"-")  # only whether it is there is asked
    assert list(train_tokenizer.source_texts(str(tmp_path))) == ["b", "k"]


# -- prompts ---------------------------


def test_templates():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 81
    assert TEMPLATES[-1] == "{}." and template_set("imagenet2012") == TEMPLATES[:80]
    assert all(t.count("{}") == 1 for templates in TEMPLATE_SETS.values() for t in templates)
    counts = dict(birdsnap=1, cars196=8, cifar10=18, cifar100=18, country211=5, dtd=8, eurosat=3, fgvc_aircraft=2)
    counts |= dict(food101=1, mnist=1, oxford_flowers102=1, oxford_iiit_pet=1, stl10=2, sun397=2)
    assert {name: len(set(template_set(name))) for name in counts} == counts
    with pytest.raises(UserError, match="food102.*food101"):
        template_set("food102")


@pytest.mark.parametrize("caption", ["cat", "snow leopard", " snow  leopard "])
def test_prompt_around_short_captions(caption):
    name = " ".join(caption.split())
    rng = np.random.default_rng(0)
    drawn = [apply_prompt(caption, rng, TEMPLATES) for _ in range(2000)]
    assert set(drawn) == {t.replace("{}", name) for t in TEMPLATES}
    # Uniform: 2000/81 = 24.7 each, standard deviation 4.9.
    assert max(map(drawn.count, set(drawn))) < 24.7 + 5 * 4.9
    assert drawn[:9] == [apply_prompt(caption, r, TEMPLATES) for r in [np.random.default_rng(0)] for _ in range(9)]


@pytest.mark.parametrize("caption", ["man on mars", "a  photo, of a + b", "", "  "])
def test_other_captions_stay(caption):
    assert apply_prompt(caption, np.random.default_rng(0), TEMPLATES) == caption


def test_no_templates_no_prompt():
    assert apply_prompt("cat", np.random.default_rng(0), ()) == "cat"


def test_class_prompts():
    assert class_prompts("C++, smiling + {} face", ("a {}.", "{}")) == ["a C smiling {} face.", "C smiling {} face"]
    assert apply_prompt("salt+pepper,", np.random.default_rng(0), ("the {}",)) == "the salt pepper"
    assert class_prompts(" + ", ("the {}",)) == ["the +"] == [apply_prompt("+", np.random.default_rng(0), ("the {}",))]
    assert len(class_prompts("grinning face with big eyes")) == 81


def test_prompt_errors():
    with pytest.raises(UserError, match="exactly once"):
        class_prompts("cat", ("a photo",))
    with pytest.raises(UserError, match="exactly once"):
        apply_prompt("cat", np.random.default_rng(0), ("{} and {}",))
    with pytest.raises(UserError, match="at least one template"):
        class_prompts("cat", ())
    with pytest.raises(UserError, match="is empty"):
        class_prompts(" ")


def test_clip_vocabulary_with_wrong_merges(tiny_clip):
    vocab = dict(tiny_clip._tokenizer.get_vocab())
    with pytest.raises(UserError, match="do not belong together"):
        ClipTokenizer(vocab, [("x", "y")], 8)
