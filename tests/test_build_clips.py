"""Clips of motions: pairs that are each other's time reversal, written by a command, the same each time."""

import hashlib
import pickle

import numpy as np
import pytest

from florence_jax.data.sources import motions
from florence_jax.data.sources.motions import MOTION_PAIRS, MOTIONS, MotionClips
from florence_jax.data.sources.video import open_videos
from florence_jax.data.video_writer import VIDEO_FORMATS, encode_video
from florence_jax.data.videos import read_frames
from florence_jax.errors import UserError
from florence_jax.tools import build_clips

pytest.importorskip("av")


@pytest.fixture(scope="module")
def clips():
    made = MotionClips("train", 32, 8, "noise")
    return [made[i] for i in range(30)]


def test_clips_are_the_same_on_any_machine(clips):
    digest = hashlib.sha256(b"".join(clip["frames"].tobytes() for clip in clips)).hexdigest()[:16]
    assert digest == "a6ee70ca7ac42f58"
    assert [clip["label"] for clip in clips] == 3 * list(MOTIONS)
    assert clips[2]["caption"].startswith(("a ", "an ")) and clips[2]["caption"].endswith(" moves up")
    assert len({clip["caption"] for clip in clips}) == 30


def _centres(frames):
    """Where the object is: the mean place of what is not as in most frames, (T, 2), y and x."""
    changed = np.abs(frames.astype(int) - np.median(frames, 0)).sum(3)
    weights = np.where(changed > 60, changed, 0) + 1e-9
    y, x = np.indices(frames.shape[1:3])
    return np.stack([(weights * y).sum((1, 2)), (weights * x).sum((1, 2))], 1) / weights.sum((1, 2))[:, None]


def test_objects_move_as_the_label_says():
    made = MotionClips("train", 48, 9, "noise")
    ways = {"moves to the left": (1, -1), "moves to the right": (1, 1), "moves up": (0, -1), "moves down": (0, 1)}
    for motion, (axis, sign) in ways.items():
        for turn in range(3):
            clip = made[MOTIONS.index(motion) + 10 * turn]
            way = np.subtract(*_centres(clip["frames"])[[-1, 0]])
            assert sign * way[axis] > 10 > abs(way[1 - axis]), (motion, way)


def test_the_second_motion_of_a_pair_is_the_first_in_reverse(monkeypatch):
    bare = np.random.PCG64
    # As if both of a pair drew the same.
    monkeypatch.setattr(motions.np.random, "PCG64", lambda seed: bare([seed[0], seed[1] // 2]))
    made = MotionClips("train", 32, 8, "noise")
    for number, (first, second) in enumerate(MOTION_PAIRS):
        one, other = made[2 * number], made[2 * number + 1]
        assert (one["label"], other["label"]) == (first, second)
        np.testing.assert_array_equal(one["frames"], other["frames"][::-1])
        assert (one["frames"] != other["frames"]).any()


def test_first_motions_are_what_they_are_called():
    rng = np.random.default_rng(0)
    for number, field, way in ((2, "side", 1), (3, "degrees", -1), (4, "opacity", 1)):
        for _ in range(20):
            values = getattr(motions._POSES[number](64, 16, rng), field)
            assert (way * np.diff(values) >= 0).all() and way * (values[-1] - values[0]) > 8


def test_a_source_composes_clips_when_they_are_asked_for():
    """As frames or encoded; what is said of them paints nothing and is the same."""
    source, encoded = open_videos("motions:new_names:20::noise"), open_videos("motions:new_names:20:h264:noise")
    assert len(source) == 20 and tuple(source.class_names) == MOTIONS
    record = pickle.loads(pickle.dumps(source))[13]
    assert record["video"].shape == (16, 64, 64, 3) and record["video"].dtype == np.uint8
    assert list(source.metadata())[13] == {name: value for name, value in record.items() if name != "video"}
    assert MOTIONS[record["class_id"]] == record["label"] == "moves down"
    assert encoded[13]["video"] == encoded[13]["video"]
    difference = np.abs(read_frames(encoded[13]["video"], range(16)).astype(int) - record["video"]).mean()
    assert 0 < difference < 9
    for spec in ("motions:test", "motions:train:0", "motions:train:10:h266", "motions:train:10:h264:noise:1"):
        with pytest.raises(UserError, match="write motions:SPLIT"):
            open_videos(spec)


@pytest.mark.parametrize("kind", VIDEO_FORMATS)
def test_encoded_frames_are_nearly_those_that_were_given(clips, kind):
    frames = clips[0]["frames"]
    data = encode_video(frames, 12, kind, exact=True)
    assert data == encode_video(frames, 12, kind, exact=True)
    difference = np.abs(read_frames(data, range(8)).astype(int) - frames).mean()
    assert difference < (1e-9 if kind == "ffv1" else 9)


def test_the_command(tmp_path, capsys):
    options = [f"--out={tmp_path / 'clips'}", "--train=20", "--held_out=10", "--new_style=0", "--new_names=0"]
    options += ["--side=32", "--frames=8", "--backgrounds=noise"]
    assert build_clips.main(options) == 0
    assert "20 clips of 10 motions, 8 frames each, on noise" in capsys.readouterr().out
    source = open_videos(str(tmp_path / "clips/train"))
    assert [row["caption"] for row in source.metadata()] == [name for name in sorted(MOTIONS) for _ in range(2)]
    assert read_frames(source[0]["video"], [0, 7]).shape == (2, 32, 32, 3)
    told = open_videos(str(tmp_path / "clips/held_out.csv"))
    assert len(told) == 10 and told[3]["caption"].endswith(" moves down") and told[3]["label"] == "moves down"
    assert read_frames(told[3]["video"], [7]).shape == (1, 32, 32, 3)
    before = {path: path.read_bytes() for path in (tmp_path / "clips").rglob("*") if path.is_file()}
    assert build_clips.main(options) == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "clips").rglob("*") if path.is_file()}
    assert build_clips.main([*options, "--frames=9"]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert build_clips.main([*options, "--side=33"]) == 2
