"""Comparing settings over seeds."""

import json
from pathlib import Path

import pytest

from florence_jax.errors import UserError
from florence_jax.tools import compare


@pytest.fixture
def calls(monkeypatch):
    """Runs that only write a result; the list of their (loss, seed, total_steps)."""
    made = []

    def fake_run(command, **kwargs):
        flags = dict(flag.lstrip("-").split("=", 1) for flag in command[3:])
        workdir = Path(flags["workdir"])
        made.append((flags["config.loss"], flags["config.seed"], flags["config.total_steps"]))
        value = (0.5 if flags["config.loss"] == "unicl" else 0.25) + int(flags["config.seed"]) / 10
        (workdir / "config.json").write_text("{}")
        (workdir / "result.json").write_text(json.dumps({"eval/x": value, "step": 3}))
        return type("Done", (), {"returncode": 0})()

    monkeypatch.setattr(compare.subprocess, "run", fake_run)
    return made


def test_runs_every_setting_with_every_seed_and_prints_the_spread(tmp_path, calls, capsys):
    arguments = ["--seeds=0,2", "--vary=loss=unicl,clip", f"--workdir={tmp_path}", "--config.total_steps=3"]
    assert compare.main(arguments) == 0
    assert calls == [("unicl", "0", "3"), ("clip", "0", "3"), ("unicl", "2", "3"), ("clip", "2", "3")]
    header, row = capsys.readouterr().out.splitlines()[1:]
    assert header.split() == ["metric", "loss=unicl", "loss=clip"]
    assert row.split()[1:] == "0.600 ± 0.141 (0.500 to 0.700) 0.350 ± 0.141 (0.250 to 0.450)".split()
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["loss=clip"]["eval/x"] == {"mean": 0.35, "deviation": pytest.approx(0.02**0.5), "values": [0.25, 0.45]}
    assert "0.600 ± 0.141 (0.500 to 0.700)" in (tmp_path / "report.html").read_text()


def test_cases_hold_several_settings(tmp_path, calls, capsys):
    cases = ["--case=one loss: loss=unicl total_steps=3", "--case=other:loss=clip config.total_steps=4"]
    assert compare.main(["--seeds=0,1", *cases, f"--workdir={tmp_path}"]) == 0
    assert calls == [("unicl", "0", "3"), ("clip", "0", "4"), ("unicl", "1", "3"), ("clip", "1", "4")]
    assert capsys.readouterr().out.splitlines()[1].split()[1:] == ["one", "loss", "other"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        f"{case}_seed{seed}" for case in ("one_loss", "other") for seed in (0, 1)
    ]
    claimed = json.loads((tmp_path / "other_seed1" / "compare.json").read_text())
    assert claimed["extra"] == ["--config.loss=clip", "--config.total_steps=4"]
    assert compare.parse_case("as it is:").options == ()
    assert compare.parse_case("a: x.y='1, 2' init=").options == ("--config.x.y=1, 2", "--config.init=")


@pytest.mark.parametrize("other", [["--config.total_steps=4"], ["--config.total_steps=3", "--config=other.py"]])
def test_a_folder_of_other_runs_is_left_alone(tmp_path, calls, capsys, other):
    arguments = ["--seeds=0", "--vary=loss=unicl", f"--workdir={tmp_path}"]
    assert compare.main([*arguments, "--config.total_steps=3"]) == 0
    assert compare.main([*arguments, "--config.total_steps=3"]) == 0  # the same again: continues
    assert compare.main([*arguments, *other]) == 2
    assert "holds a run that was started with {" in capsys.readouterr().err and len(calls) == 2
    (tmp_path / "loss_unicl_seed0" / "compare.json").unlink()
    assert compare.main([*arguments, "--config.total_steps=3"]) == 2
    assert "started with unknown settings" in capsys.readouterr().err


def test_table_of_runs_with_different_metrics():
    text = compare.comparison_table({"a": [{"eval/x": 0.5, "step": 1}], "b": [{"eval/y": 0.25}, {"eval/y": None}]})
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["eval/x", "0.500", "-"],
        ["eval/y", "-", "0.250"],
    ]


def test_a_failed_run_ends_the_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 2})())
    assert compare.main([f"--workdir={tmp_path}"]) == 2
    assert "ended with exit code 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--vary=loss"], "--vary"),
        (["--seeds=a"], "--seeds"),
        (["--x=1"], "--x"),
        (["--case=loss=clip"], "--case='LABEL: NAME=VALUE"),
        (["--case=a: clip"], "--case='LABEL: NAME=VALUE"),
        (["--case=a: x='1"], "No closing quotation"),
        (["--case=a:", "--vary=loss=clip"], "not both"),
        (["--case=a b:", "--case=a_b:"], "two cases are called 'a b'"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert compare.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_vary_names_a_config_key():
    assert compare.parse_vary("config.loss=a,b") == [("loss", "a"), ("loss", "b")]
    with pytest.raises(UserError):
        compare.parse_vary("=3")
