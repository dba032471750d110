"""A configuration file is found: the one that is here before the shipped one; also in an installation. --help."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from florence_jax.command_line import CONFIG, parse_flags
from florence_jax.config_files import find_config, read_config
from florence_jax.config_help import HEADING, help_text, option_comments
from florence_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.name for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_is_used_away_from_the_checkout_and_told(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = find_config(f"configs/{name}")
    assert Path(path).samefile(ROOT / "configs" / name)
    assert capsys.readouterr().err == f"configs/{name} is not here: {path} is used\n"
    assert read_config(f"configs/{name}:runlocal").workdir


def test_local_file_wins_and_other_paths_stay_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "pretrain.py").write_text("def get_config(arg='none'):\n    return {'mine': arg}\n")
    assert read_config("configs/pretrain.py") == {"mine": "none"}
    assert read_config("configs/pretrain.py:a=1") == {"mine": "a=1"}
    for path in ("my/configs/pretrain.py", "pretrain.py", "/configs/pretrain.py"):
        assert find_config(path) == path
    with pytest.raises(UserError, match="no configs/nothing.py here; shipped are configs/classify.py, "):
        find_config("configs/nothing.py")
    assert capsys.readouterr().err == ""


def test_installed_package_has_the_configs_and_works_elsewhere(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for folder in ("florence_jax", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, f"--target={site}", str(source)], check=True)
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"florence_jax"}
    assert sorted(path.name for path in (site / "florence_jax" / "configs").glob("*.py")) == SHIPPED
    checkout, installed = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        for folder in (ROOT / "florence_jax", site / "florence_jax")
    )
    assert checkout <= installed  # class names, emoji, tokenizer, templates
    for module, config in (("florence_jax.main", "pretrain"), ("florence_jax.curation.main", "curate")):
        done = subprocess.run(
            [sys.executable, "-m", module, f"--config=configs/{config}.py:nonsense"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        told, error = done.stderr.strip().splitlines()[-2:]  # Beam may have something to say before
        assert told.endswith(f"{site}/florence_jax/configs/{config}.py is used")
        assert ".py:nonsense: unknown config argument" in error and done.returncode == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(arg", "mine.py line 1: '(' was never closed"),
        ("import nothing_of_this_name", "mine.py line 1: ModuleNotFoundError: No module named"),
        ("x = 1\n", "mine.py has no function get_config(arg=None)"),
        ("def get_config(arg=None):\n    x = {}\n    return x['gone']\n", "mine.py line 3: KeyError: 'gone'"),
        ("def get_config():\n    pass\n", "mine.py: TypeError: get_config() takes 0 positional arguments"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_message(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_config(f"{file}:x")
    assert message in str(error.value) and "Traceback" not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="no configuration file .*gone.py; those of the project are configs/classify"):
        read_config(str(tmp_path / "gone.py"))


def test_home_in_the_texts_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=None):\n"
        "    return ConfigDict({'init': '~/run', 'data': {'train': 'a*2|~/b', 'x': 1}, 'text': 'a ~ b'})\n"
    )
    arguments = ["x", f"--config={tmp_path}/mine.py", "--config.data.x=2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        parse_flags(arguments)
        found = CONFIG.value.to_dict()
    assert found == {"init": "/home/a/run", "data": {"train": "a*2|/home/a/b", "x": 2}, "text": "a ~ b"}


# -- --help -----------------------------------------------------------------------------------------------------------


def test_comments_behind_above_inside_and_of_what_a_file_builds_upon(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\n"
        "from florence_jax.train.defaults import common\n"
        "def get_config(arg=None):\n"
        "    config = common('runs/mine')\n"
        "    # Above it,\n"
        "    # in two lines.\n"
        "    config.speed = 3\n"
        "    config.a, config.b = 1, 2  # of both\n"
        "    config.data.train = ''  # my own words\n"
        "    config.part = {\n"
        "        'x': 1,  # inside\n"
        "        'deep': {'y': 2},  # deeper\n"
        "    }\n"
        "    _change(config)\n"
        "    return config\n"
        "def _change(config):\n"
        "    config.speed = 4  # said before\n"
        "    config.seed = 1  # said of common's\n"
    )
    found = option_comments(str(tmp_path / "mine.py"))
    assert found["speed"] == "Above it, in two lines." and found["a"] == found["b"] == "of both"
    assert found["data.train"] == "my own words" and found["data.test"] == "held-out images with their classes"
    assert found["part.x"] == "inside" and found["part.deep"] == found["part.deep.y"] == "deeper"
    assert found["optim.clip_norm"] == "0: no clipping" and found["seed"].startswith("of the first parameters")


@pytest.mark.parametrize("name", SHIPPED)
def test_help_lists_every_option_with_its_value(name):
    config = read_config(f"configs/{name}")
    config.seed = 12345
    lines = help_text(str(ROOT / "configs" / name), config).splitlines()
    assert "--config.seed=12345" in "\n".join(lines) and max(map(len, lines)) < 200
    options = [line.split("=")[0] for line in lines[lines.index(HEADING) :] if line.startswith("--config.")]
    assert f"--config.{max(config)}" in options and len(set(options)) == len(options)
    assert len(option_comments(str(ROOT / "configs" / name))) > len(options) / 2  # most are explained


def test_help_on_the_command_line(capsys, monkeypatch):
    arguments = ["main", "--config=configs/classify.py:protocol=probe", "--help", "--config.holdout=0.3"]
    monkeypatch.setattr(sys, "argv", arguments)  # ml_collections looks for its flags there
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
        flags.FLAGS.unparse_flags()
        try:
            parse_flags(arguments)
        finally:
            flags.FLAGS.mark_as_parsed()
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--workdir" in out and "Classification with trained weights: " in out
    line = next(line for line in out.splitlines() if line.startswith("--config.holdout="))
    assert line.startswith("--config.holdout=0.3 ") and "share of each class" in line
    assert re.search(r"--config.init=DIR \\\n        --config.data.test=DIR_OR_TFDS", out)  # as it stands in the file
