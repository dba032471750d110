"""Curation of one's own pictures: which rules are the default, what is refused is told, nothing left is an error."""

import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from configs.curate import get_config
from florence_jax.curation.filters.captions import TextRules, judge_captions
from florence_jax.curation.filters.licences import allows
from florence_jax.curation.ingest.measure import caption_scores
from florence_jax.curation.ingest.phase import check_usable, joined_captions
from florence_jax.curation.main import given_config
from florence_jax.curation.output.terminal import OPTIONS, summary_lines
from florence_jax.errors import UserError


@pytest.fixture
def command_line(monkeypatch):
    """Parses flags as the command does."""

    def parse(*arguments):
        monkeypatch.setattr(sys, "argv", ["curate", *arguments])  # ml_collections looks for its flags there
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["curate", *arguments])
        return given_config()

    with flagsaver.flagsaver():
        yield parse
        flags.FLAGS.mark_as_parsed()


def test_the_samples_rules_are_not_for_other_data(command_line):
    config = "--config=configs/curate.py"
    assert command_line(config)["post_filter"]["licences"] == ("cc-by-*", "cc0-*")
    own = command_line(config, "--input=my_pictures", "--config.size.min_side=48", "--config.text.cap=9")
    assert own["post_filter"]["licences"] == () == own["text"]["languages"] and own["inputs"] == "my_pictures"
    assert own["size"]["min_side"] == 48 and own["text"]["cap"] == 9 and own["size"]["min_bytes"] == 0
    chosen = command_line(f"{config}:preset=sample", "--input=my_pictures")
    assert chosen["text"]["languages"] == ("en",) and chosen["preset"] == "sample"


def test_what_is_refused_is_told_with_the_option_that_allows_it():
    stages = [{"stage": "text", "kept": 3, "reasons": {"language": 2, "empty": 1}}]
    stages += [{"stage": "post_filter", "kept": 0, "reasons": {"licence": 3}}]
    licences = [{"value": "gpl", "pairs": 2, "kept": 0}, {"value": "mit", "pairs": 4, "kept": 4}]
    summary = {"rows": 6, "stages": stages, "slices": {"licence": licences, "language": []}}
    summary |= {"refused_captions": {"url": 2}}
    lines = summary_lines(summary, get_config().to_dict())
    assert lines[-3:] == [
        "captions refused of pictures that are left with others: url 2",
        "licence 3 (none is left of: gpl 2): '--config.post_filter.licences=()' lets them pass; "
        "now ('cc-by-*', 'cc0-*')",
        "language 2: '--config.text.languages=()' lets them pass; now ('en',)",
    ]


def test_every_option_that_is_told_is_one():
    config = get_config()
    for option in OPTIONS.values():
        section, _, name = option.partition("=")[0].partition(".")
        assert name in config[section] or section == "text", option


def test_the_public_domain_is_allowed_where_cc_by_is():
    for licence in ("public-domain", "cc0-1.0", "cc-by", "cc-by-4.0"):
        assert allows(("cc-by-*",), licence) and allows((), licence)
    assert not allows(("cc-by-sa-*",), "public-domain") and not allows(("cc-by-*",), "unknown")


# -- several captions of a picture ------------------------------------------------------------------------------------


def judged(*captions, personal=("mail",)):
    """(captions that can be used, reasons of the others, decision) of a picture with these captions."""
    first, *others = map(caption_scores, captions)
    usable, refused, decision = judge_captions(first | {"others": others}, TextRules(), personal)
    return [caption["caption"] for caption in usable], refused, decision and decision[0]


def test_each_caption_of_a_picture_is_judged():
    assert judged("a dog") == (["a dog"], [], None)
    five = ("IMG_0001.jpg", "a dog", "A  DOG", "a dog on grass, mail a@b.org", "two dogs", "https://a.example/1")
    assert judged(*five) == (["a dog", "two dogs"], ["file_name", "url", "mail"], None)
    assert judged(*five, personal=())[0] == ["a dog", "a dog on grass, mail a@b.org", "two dogs"]
    assert judged("mail a@b.org", "IMG_1.jpg") == (["mail a@b.org"], ["file_name"], None)  # the post-filter says why
    assert judged("IMG_1.jpg", "https://a.example/1") == ([], [], "file_name")  # the pair goes, for its first


def test_rows_of_one_picture_far_apart_are_joined():
    def row(uid, image, *captions):
        first, *others = map(caption_scores, captions)
        return first | {"uid": uid, "image_id": image, "others": others}

    rows = [row("a", "x", "one", "two"), row("a", "x", "two", "three"), row("a", "y", "of another picture")]
    found = joined_captions([*rows, row("b", "z", "four")])
    assert {uid: [caption["caption"] for caption in others] for uid, others in found.items()} == {
        "a": ["two", "three"],
        "b": [],
    }


@pytest.mark.parametrize(
    ("sums", "fields", "message"),
    [
        ({"rows": 0}, [], "--input=x has no raw pairs"),
        (
            {"rows": 24, "pictures": 0},
            ["bild", "text"],
            "none of the 24 .* a picture. Fields seen: bild, text. W",
        ),
        ({"rows": 24, "pictures": 0}, ["file", "text"], "a picture; the files that 'file' names are not there. Fields"),
        (
            {"rows": 24, "pictures": 9, "captioned": 0},
            ["file", "x"],
            "24 .* has a caption. Fields seen: file, x",
        ),
    ],
)
def test_nothing_that_could_be_left_is_an_error(sums, fields, message):
    with pytest.raises(UserError, match=message):
        check_usable("x", sums, fields)
    check_usable("x", {"rows": 24, "pictures": 24, "captioned": 1}, fields)
