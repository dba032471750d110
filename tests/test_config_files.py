"""A configuration file is found: the one that is here before the shipped one; also in an installation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from florence_jax.config_files import find_config, read_config
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
