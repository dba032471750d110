"""Every command that the documents give is understood by its program; the files and modules they name are there."""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags
from absl.testing import flagsaver

from florence_jax import predict
from florence_jax.command_line import CONFIG, parse_flags
from florence_jax.tasks import PRETRAINED
from tests.test_house import FLOORS

ROOT = Path(__file__).parents[1]
START = r"python -m (florence_jax\.[\w.]+)(.*)$"
# Programs whose options are absl's; those of the others are argparse's.
WITH_CONFIG = ("florence_jax.main", "florence_jax.tools.aot_compile", "florence_jax.curation.main")


def commands():
    """(file, module, arguments) of all commands of the documents and the notebook, continued lines joined."""
    for file in (ROOT / "docs").glob("*.ipynb"):
        for cell in json.loads(file.read_text())["cells"]:
            for module, line in re.findall(rf"^!{START}", "".join(cell["source"]), re.MULTILINE):
                yield file.name, module, shlex.split(line)
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = file.read_text().replace("\\\n", " ")
        for module, line in re.findall(rf"^    (?:.*&& |time )?{START}", text, re.MULTILINE):
            yield file.name, module, shlex.split(line, comments=True)


FOUND = [pytest.param(*found, id=f"{name}-{i}") for i, (name, *found) in enumerate(commands())]


def test_the_documents_have_commands():
    names = {param.id.rpartition("-")[0] for param in FOUND}
    assert {"README.md", "classification.md", "colab.ipynb"} <= names and len(FOUND) > 50


@pytest.mark.parametrize(("module", "arguments"), [found for found in FOUND if found.values[0] in WITH_CONFIG])
def test_a_command_with_a_configuration_is_understood(module, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    load_program(module)
    monkeypatch.setattr(sys, "argv", ["main", *arguments])  # ml_collections looks for its flags there
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        assert parse_flags(["main", *arguments]) == ["main"]
        assert module == "florence_jax.curation.main" or CONFIG.value.task
        flags.FLAGS.mark_as_parsed()


@pytest.mark.parametrize(("module", "arguments"), [found for found in FOUND if found.values[0] not in WITH_CONFIG])
def test_a_command_is_understood(module, arguments, monkeypatch, capsys):
    """The program is stopped once it has parsed its options; what it leaves are settings of the runs it starts."""

    class Parsed(Exception):
        pass

    def parse_and_stop(parser, *given):
        options, rest = parse(parser, *given)
        if parser.add_help:  # not one that only looks for some option
            raise Parsed(rest)
        return options, rest

    parse = argparse.ArgumentParser.parse_known_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    task = "vqa" if any(argument.startswith("--question") for argument in arguments) else PRETRAINED
    monkeypatch.setattr(predict, "describe", lambda folder: SimpleNamespace(task=task))
    with pytest.raises((Parsed, SystemExit)) as stopped:
        load_program(module).main(arguments)
    if stopped.type is Parsed:
        assert all(option.startswith("--config.") for option in stopped.value.args[0])
    else:
        assert not stopped.value.code, capsys.readouterr().err


def load_program(module):
    """The module with `main`; skips the test where a package that only it needs is not installed."""
    package = ROOT.joinpath(*module.split(".")).is_dir()
    return pytest.importorskip(f"{module}.__main__" if package else module, reason="an extra is not installed")


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
