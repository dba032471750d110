"""Every training and evaluation command that the documents give is understood by the command line."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from florence_jax.command_line import CONFIG, parse_flags

ROOT = Path(__file__).parents[1]
START = "python -m florence_jax.main "


def commands():
    """(file, arguments) of all commands of the documents and the notebook, continued lines joined."""
    for file in (ROOT / "docs").glob("*.ipynb"):
        for cell in json.loads(file.read_text())["cells"]:
            for line in re.findall(rf"^!{START}(.*)$", "".join(cell["source"]), re.MULTILINE):
                yield file.name, shlex.split(line)
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = file.read_text().replace("\\\n", " ")
        for line in re.findall(rf"^    (?:.*&& )?{START}(.*)$", text, re.MULTILINE):
            yield file.name, shlex.split(line, comments=True)


FOUND = list(commands())


def test_the_documents_have_commands():
    assert {"README.md", "classification.md", "colab.ipynb"} <= {name for name, _ in FOUND} and len(FOUND) > 20


@pytest.mark.parametrize("arguments", [pytest.param(a, id=f"{name}-{i}") for i, (name, a) in enumerate(FOUND)])
def test_a_command_of_the_documents_is_understood(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["main", *arguments])  # ml_collections looks for its flags there
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        assert parse_flags(["main", *arguments]) == ["main"]
        assert CONFIG.value.task
        flags.FLAGS.mark_as_parsed()
