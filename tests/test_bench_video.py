"""`bench video` and `bench still_clips`: what they print, what attention adds to a stage, their mistakes."""

import json
import time

import jax
import pytest
from empty_programs import jit_to_zeros

import florence_jax.tools.bench.__main__ as bench
from florence_jax.models.sizes import VARIANTS, resolve_config
from florence_jax.tools.bench import step, still_clips, video


def test_steps_are_timed_by_frames_beside_single_images(capsys, monkeypatch):
    """The functions are traced, not compiled, which takes most of a minute."""
    monkeypatch.setitem(VARIANTS, "tiny", dict(VARIANTS["ti"], image_width=16, text_layers=1, window=4))
    shapes = []

    class Traced:
        peak_bytes = 2**20

        def __init__(self, function, argument, *_):
            shapes.append(jax.eval_shape(function, argument).shape)

        def __call__(self):
            time.sleep(0.001)

    monkeypatch.setattr(step, "TimedStep", Traced)
    monkeypatch.setattr(step, "TimedFunction", Traced)
    monkeypatch.setattr(jax, "jit", jit_to_zeros)
    assert bench.main("video --parts=frames,policies --variant=tiny --frames=2,4 --batch=3 --rounds=1".split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert shapes[:6] == [(), (3, 128), (6, 128), (), (3, 128), (12, 128)]
    assert set(report["frames"]) == {"2", "4"} and "windows" not in report
    row = report["frames"]["4"]
    assert row["train"]["frames_per_s"] == pytest.approx(12e3 / row["train"]["ms"], rel=1e-2)
    assert 0.4 < row["flops_over_images"] < 1  # half as many tokens as single images have, and attention over time
    assert set(report["policies"]) == {"none", *video.REMATS}


def test_attention_of_a_stage_takes_memory_with_its_window():
    config = resolve_config("ti", image_width=16)
    least, small, large = (video.stage_bytes(config, 8, 0, window) for window in ((1, 1, 1), (2, 4, 4), (4, 4, 4)))
    logits = 4 * 8 * 8 * 4 * 4 * 4  # bytes: tokens x tokens of half a large window x float32
    assert least < small < large and large - small >= logits


def test_memory_of_a_test_does_not_grow_with_its_views(monkeypatch):
    monkeypatch.setattr(video, "VIEWS", (2, 12))
    monkeypatch.setitem(VARIANTS, "tiny", dict(VARIANTS["ti"], image_width=16, depths=(2,), text_layers=1, window=4))
    args = video.argparse.Namespace(variant="tiny", res=None, dtype="float32", remat="none", batch=2)
    found = video.measure_views(args, 4)
    assert found["12"] <= 1.05 * found["2"]


@pytest.mark.parametrize("arguments", [["--parts", "frames,all"], ["--frames", "8,x"], ["--batch", "0"]])
def test_mistakes_are_one_message(capsys, arguments):
    assert bench.main(["video", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_an_inflated_tower_beside_its_image_tower(capsys, monkeypatch):
    monkeypatch.setattr(still_clips, "STILL_SIZES", {"40x28": ((40, 28), 3)})
    monkeypatch.setattr(still_clips, "STILL_WINDOWS", {"growing": (2, 4)})
    assert bench.main(["still_clips", "--frames=5", "--towers=swin", "--dtypes=float32"]) == 0
    (difference,) = json.loads(capsys.readouterr().out)["results"]["swin"]["growing"]["40x28"]["5"]
    assert difference < 1e-5
    assert bench.main(["still_clips", "--towers=resnet"]) == 2
    assert "--towers: unknown resnet; known are coswin, " in capsys.readouterr().err
