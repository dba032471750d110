"""protocol=check: a set of videos is looked at before anybody trains on it."""

import csv
import io
import json

import pytest
from video_files import encode, moving_frames

from configs import video
from florence_jax.data.sources.video import open_videos
from florence_jax.evaluators.video_check import VIDEO_MISTAKES, VideoCheck
from florence_jax.page import page
from florence_jax.tasks import create_suite

pytest.importorskip("av")


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A check of a set with every mistake, and its results."""
    folder = tmp_path_factory.mktemp("videos")
    good = encode(moving_frames(20), "matroska", "ffv1", pix_fmt="bgr0")
    mpeg4 = encode(moving_frames(20, seed=1), "avi", "mpeg4")
    # The number of frames in the headers of the file and of the stream.
    wrong = mpeg4.replace((20).to_bytes(4, "little"), (21).to_bytes(4, "little"), 2)
    files = {
        "jump/a.mkv": good,
        "jump/b.mkv": encode(moving_frames(20, seed=2), "matroska", "ffv1", pix_fmt="bgr0"),
        "jump/short.mkv": encode(moving_frames(5), "matroska", "ffv1", pix_fmt="bgr0"),
        "jump/still.mkv": encode(moving_frames(1), "matroska", "ffv1", pix_fmt="bgr0"),
        "jump/again.mkv": good,
        "wave/again.mkv": good,
        "wave/wrong.avi": wrong,
        "wave/empty.mp4": b"",
        "wave/c.avi": mpeg4,
        "rare/d.avi": encode(moving_frames(20, seed=3), "avi", "mpeg4"),
    }
    lines = []
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        lines.append(f"{name} {name.split('/')[0]}")
    (folder / "list.txt").write_text("\n".join([*lines, "wave/gone.mp4 wave"]))
    check = VideoCheck(open_videos(str(folder / "list.txt")), "test", span=9)
    return folder, check, check.run({})


def test_all_mistakes_are_in_one_report(checked, capsys):
    _, check, results = checked
    problems = {name.partition("/")[2]: count for name, count in results.items() if "/" in name}
    assert problems == {
        "unreadable": 1,
        "missing": 1,
        "declared": 1,
        "short": 1,
        "still": 1,
        "same_video": 1,
        "two_classes": 1,
        "one_video": 1,
    }
    assert results["videos"] == 10 and results["classes"] == 3 and results["opened"] == results["watched"] == 9
    assert results["problems"] == 8 and results["frames"] == 20 and results["seconds"] == pytest.approx(2)
    body = "".join(check.report())
    assert "9 of 10 videos, evenly spread, were opened" in body and "mpeg4" in body and "48 x 32" in body
    page("check", body)
    rows = list(csv.DictReader(io.StringIO(check.files()["test_problems.csv"].decode())))
    assert {row["kind"]: row["where"] for row in rows}["declared"] == "wave/wrong.avi"
    assert {row["kind"]: row["detail"] for row in rows}["declared"] == "says 21, has 20"
    counted = json.loads(check.files()["test_videos.json"])
    assert counted["classes"] == {"jump": 5, "wave": 4, "rare": 1} and set(counted["problems"]) <= set(VIDEO_MISTAKES)


def test_what_it_costs_is_bounded(checked):
    folder, *_ = checked
    check = VideoCheck(open_videos(str(folder / "list.txt")), "test", span=9, opened=4, watched=1)
    results = check.run({})
    assert results["opened"] + results.get("problems/unreadable", 0) == 4 and results["watched"] <= 1


def test_the_protocol(checked):
    folder, *_ = checked
    config = video.get_config("protocol=check")
    config.data.test = str(folder / "list.txt")
    (check,) = create_suite(config).evaluators(None)
    assert check.name == "test" and check.run({})["problems/short"] == 8  # clips of 32 frames, every other one
