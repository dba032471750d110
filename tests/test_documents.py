"""The documents' commands: those of training and evaluation are understood by the command line, all are programs."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from florence_jax.command_line import CONFIG, parse_flags
from tests.test_house import FLOORS

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


def started_modules():
    """Names of the project's modules that documents, scripts, configurations and docstrings start as programs."""
    files = (*ROOT.glob("*.md"), *ROOT.glob("docs/*"), *ROOT.glob("configs/*.py"), *ROOT.glob("launch/*.sh"))
    text = "\n".join(file.read_text() for file in (*files, *ROOT.glob("florence_jax/**/*.py")))
    return sorted(set(re.findall(r"python3? -m (florence_jax(?:\.[a-z_]+)+)(?!\.?\w)", text)))


def test_the_modules_that_are_started_are_programs():
    """A package has its program in `__main__`; without the last lines of a program nothing would happen, and well."""
    modules = started_modules()
    assert {"florence_jax.main", "florence_jax.predict", "florence_jax.curation.dedup"} <= set(modules)
    places = [ROOT.joinpath(*module.split(".")) for module in modules]
    files = [place / "__main__.py" if place.is_dir() else place.with_suffix(".py") for place in places]
    assert not [str(file) for file in files if 'if __name__ == "__main__":' not in file.read_text()]


def test_files_that_the_documents_name_are_there():
    now = {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {ROOT / "CHANGELOG.md"}  # which names what is gone
    for file in now:
        text = file.read_text()
        names = re.findall(r"\b(?:florence_jax|tests|docs|configs|launch)/[\w/]+\.(?:py|md|sh|json|txt|ipynb)", text)
        names += re.findall(
            r"`((?:models|losses|data|params|jobs|evaluators|tasks|train|inference|tools)/[\w/]+\.py)", text
        )
        assert not [name for name in names if not ((ROOT / name).exists() or (ROOT / "florence_jax" / name).exists())]


def test_the_picture_of_the_floors():
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## The floors")[2].partition("\n## ")[0]
    lines = re.findall(r"^    (.*)\|", section, re.MULTILINE)
    assert tuple(tuple(line.replace("↓", "").split()) for line in lines) == FLOORS
