"""How a command ends: one line and an exit code for mistakes; packages are asked for at the start."""

import importlib.util

import numpy as np
import pytest

from configs.curate import get_config
from florence_jax.command_line import exit_code
from florence_jax.curation.plan import make_all
from florence_jax.data.records import ArraySource
from florence_jax.data.sources.labelled import Labelled, open_labelled
from florence_jax.errors import UserError, require
from florence_jax.evaluators.probe import LinearProbe


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (UserError("no such thing"), "error: no such thing\n"),
        (OSError(28, "No space left on device", "x"), "error: [Errno 28] No space left on device: 'x'\n"),
    ],
)
def test_an_end_is_one_line_and_a_code(raised, message, capsys):
    def work():
        raise raised

    assert exit_code(work) == 2 and capsys.readouterr().err == message
    assert exit_code(lambda: None) == 0 and exit_code(lambda: 3) == 3


def test_packages_are_asked_for_at_the_start(monkeypatch):
    require("json", "never said")
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else there(name))
    config = get_config("preset=coyo").to_dict()
    make_all(config | {"inputs": "x"})
    config["selection"]["clusters"] = 4
    with pytest.raises(UserError, match=r"selection.clusters needs scikit-learn: pip install '.\[curation\]'"):
        make_all(config | {"inputs": "x"})
    data = Labelled(ArraySource("x", np.zeros((2, 2, 2), np.uint8), ["a", "b"]), np.arange(2), ("a", "b"))
    with pytest.raises(UserError, match=r"config.probe.sklearn needs scikit-learn: pip install '.\[eval\]'"):
        LinearProbe("probe", data, data, "decode", None, compare=True)  # before a picture is read
    with pytest.raises(UserError, match="the digits set needs scikit-learn"):
        open_labelled("digits")
