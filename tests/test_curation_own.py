"""Curation of one's own pictures: which rules are the default, what is refused is told, nothing left is an error."""

import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from configs.curate import get_config
from florence_jax.curation.filters.licences import allows
from florence_jax.curation.main import given_config
from florence_jax.curation.output.terminal import OPTIONS, summary_lines


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
    lines = summary_lines(summary, get_config().to_dict())
    assert lines[-2:] == [
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
