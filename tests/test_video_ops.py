"""Which frames are looked at, and ops on clips: what is drawn is drawn once for all frames."""

import pickle

import numpy as np
import pytest
from video_files import moving_frames

from florence_jax.data.frame_numbers import even_clips, frames_by_time, random_clips, segment_frames
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.ops.rand_augment import AUGMENTATIONS
from florence_jax.data.records import BadRecord
from florence_jax.data.sides import sided_names
from florence_jax.errors import UserError

FRAMES = moving_frames(20, (16, 24))
COUNTS = [*range(1, 40), 63, 64, 65, 66, 127, 300]


def run(spec, example, seed=0):
    rng = np.random.default_rng(seed)
    for op in parse_ops(spec, {}):
        op = pickle.loads(pickle.dumps(op))
        example = op(example, rng)
    return example


def video(spec, frames=FRAMES, seed=0, **fields):
    return run(spec, {"key": "k", "video": frames} | fields, seed)["video"]


def numbered(count):
    """A video whose frame n is n everywhere."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 3)).copy()


# -- numbers of frames ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
def test_clips_are_those_of_the_reference(count):
    """Video Swin's SampleFrames, clip by clip."""
    rng = np.random.default_rng(count)
    for frames, interval in ((1, 1), (4, 1), (8, 4), (32, 2)):
        span = frames * interval
        for clips in (1, 3, 4):
            found = even_clips(count, clips, frames, interval)
            gap = (count - span + 1) / clips
            starts = [int(k * gap + gap / 2) for k in range(clips)] if count > span - 1 else [0] * clips
            np.testing.assert_array_equal(found, [[(s + i * interval) % count for i in range(frames)] for s in starts])
            room = (count - span + 1) // clips
            drawn = random_clips(count, clips, frames, interval, rng)
            assert drawn.shape == (clips, frames) and drawn.min() >= 0 and drawn.max() < count
            for k, start in enumerate(drawn[:, 0]):
                assert k * room <= start < (k + 1) * room if room > 0 else start == 0
            np.testing.assert_array_equal(drawn, (drawn[:, :1] + interval * np.arange(frames)) % count)


@pytest.mark.parametrize("count", COUNTS)
def test_segments_are_those_of_the_reference(count):
    """SlowFast's ssv2.py."""
    for frames in (1, 3, 8, 16, 50):
        size = float(count - 1) / frames
        bounds = [(int(np.round(size * i)), int(np.round(size * (i + 1)))) for i in range(frames)]
        assert segment_frames(count, frames).tolist() == [(start + end) // 2 for start, end in bounds]
        drawn = segment_frames(count, frames, np.random.default_rng(1))
        assert all(start <= number <= end for number, (start, end) in zip(drawn, bounds, strict=True))
        assert drawn.max() < count


@pytest.mark.parametrize("count", COUNTS)
def test_frames_by_time(count):
    times = np.arange(count) / 25
    for frames in (1, 2, 8, 50):
        found = frames_by_time(times, frames)
        assert found.tolist() == [min(count - 1, int((k + 0.5) * count / frames)) for k in range(frames)] or count == 1
        assert (np.diff(found) >= 0).all() and found.min() >= 0 and found.max() < count
        some = frames_by_time(times, frames, per_second=2)
        assert len(some) == min(frames, max(1, -(-2 * count // 25))) or count == 1
        assert some.max() < count


def test_frames_by_time_follow_the_time_not_the_number():
    """Ten frames in the first second, then one a second: two thirds of the time are the last two frames."""
    times = np.concatenate([np.arange(10) / 10, [1.0, 2.0]])
    assert frames_by_time(times, 2).tolist() == [5, 10] and (frames_by_time(times, 20) >= 10).sum() == 11


def test_every_start_is_drawn():
    starts = [random_clips(13, 1, 4, 2, np.random.default_rng(seed))[0, 0] for seed in range(200)]
    assert set(starts) == set(range(6))


# -- reading ----------------------------------------------------------------------------------------------------------


def test_ops_read_the_frames_of_the_functions():
    frames = numbered(20)

    def first(spec, seed=0):
        return video(spec, frames, seed)[:, 0, 0, 0].tolist()

    assert first("clip(4, interval=3)") == random_clips(20, 1, 4, 3, np.random.default_rng(0))[0].tolist()
    assert first("clip(4, interval=3)", 1) != first("clip(4, interval=3)", 5)
    assert first("views(3, 4, interval=2)") == even_clips(20, 3, 4, 2).reshape(-1).tolist()
    assert first("segments(5, middle=True)") == segment_frames(20, 5).tolist() == first("segments(5, middle=True)", 9)
    assert first("segments(5)") == segment_frames(20, 5, np.random.default_rng(0)).tolist()
    assert first("uniform(4)") == [2, 7, 12, 17]
    ops = parse_ops("clip(4)|segments(4)|segments(4, middle=True)|views(1, 2)|uniform(3)", {})
    assert [op.random for op in ops] == [True, True, False, False, False]
    assert video("clip(4, short=8)", FRAMES).shape == (4, 8, 12, 3)


def test_a_part_of_a_video_in_seconds():
    frames = numbered(100)  # 25 a second

    def first(spec, **fields):
        return video(spec, frames, **fields)[:, 0, 0, 0].tolist()

    assert first("uniform(4)", clip=(1, 2)) == [28, 34, 40, 46]
    assert set(range(50, 75)) >= set(first("clip(8, interval=2)", clip=[2.0, 3.0]))
    cut = first("views(2, 2)", clip=(10, 14))  # as long as the part: cut out already
    assert cut == first("views(2, 2)")
    with pytest.raises(BadRecord, match="ends after 4.0 s, before its part from 5 to 6 s"):
        first("uniform(4)", clip=(5, 6))
    with pytest.raises(BadRecord, match="its clip is 'x', not"):
        first("uniform(4)", clip="x")
    with pytest.raises(BadRecord, match="it has no video"):
        run("clip(4)", {"key": "k"})


def test_as_many_frames_as_there_are_seconds():
    example = run("uniform(6, per_second=1)", {"video": numbered(75)})
    assert example["shown"].tolist() == [True] * 3 + [False] * 3
    assert example["video"][:, 0, 0, 0].tolist() == [12, 37, 62, 62, 62, 62]


# -- ops --------------------------------------------------------------------------------------------------------------


def test_three_crops_and_views():
    whole = video("views(2, 3)")
    views = video("views(2, 3)|three_crops(12)|split_views(3)")
    assert views.shape == (6, 3, 12, 12, 3)
    for crop, left in enumerate((0, 12, 6)):
        for clip in range(2):
            wanted = whole[3 * clip : 3 * clip + 3, 2:14, left : left + 12]
            np.testing.assert_array_equal(views[2 * crop + clip], wanted)
    tall = video("three_crops(12)", FRAMES.swapaxes(1, 2))
    np.testing.assert_array_equal(tall[20:40], FRAMES.swapaxes(1, 2)[:, 12:24, 2:14])
    np.testing.assert_array_equal(video("three_crops(16)")[40:], video("center_crop(16, field=video)"))


def test_erasing_takes_the_same_box_of_all_frames():
    out = video("erase(1, area=(0.1, 0.3))")
    changed = (out != FRAMES).any(3)
    rows, columns = changed.any((0, 2)), changed.any((0, 1))
    assert changed[:, rows][:, :, columns].mean() > 0.98 and 0.05 < changed.mean() < 0.35
    assert (np.diff(np.flatnonzero(rows)) == 1).all() and (np.diff(np.flatnonzero(columns)) == 1).all()
    np.testing.assert_array_equal(video("erase(0)"), FRAMES)
    assert (out[0] != out[1])[changed[0]].any()  # noise of its own in each frame


@pytest.mark.parametrize(
    "spec",
    [
        "randaugment(3, 9, p=1, field=video)",
        "rrc(8, field=video)",
        "flip(field=video)",
        "jitter(0.4, 0.4, 0.4, field=video)",
    ],
)
def test_one_draw_for_all_frames(spec):
    same = np.repeat(FRAMES[:1], 4, 0)
    for seed in range(6):
        out = video(spec, same, seed)
        assert (out == out[0]).all()


@pytest.mark.parametrize("number", range(len(AUGMENTATIONS)))
def test_changes_of_randaugment(number, monkeypatch):
    monkeypatch.setattr("florence_jax.data.ops.rand_augment.AUGMENTATIONS", (AUGMENTATIONS[number],))
    frames = moving_frames(2, (16, 24), seed=3)
    mild, strong = (video(f"randaugment(1, {m}, spread=0, p=1, field=video)", frames) for m in (1, 10))
    assert strong.shape == frames.shape and (strong != frames).any() and (strong.max() > 0)
    if number > 2:  # the first three have no strength
        difference = [np.abs(out.astype(int) - frames).mean() for out in (mild, strong)]
        assert difference[0] < difference[1]


def test_randaugment_refuses_boxes():
    with pytest.raises(UserError, match="leaves boxes where they are"):
        run("randaugment", {"image": FRAMES[0], "boxes": np.zeros((0, 4))})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip(0)", "frames must be a positive whole number, not 0"),
        ("clip(4, interval=0.5)", "interval must be a positive whole number"),
        ("clip(4, short=0)", "positive whole number of pixels"),
        ("segments(4, middle=2)", "middle must be True or False"),
        ("uniform(4, per_second=0)", "per_second must be a number"),
        ("erase(2)", "p must be a number"),
        ("randaugment(2, 11)", "m must be a number from 0 to 10"),
    ],
)
def test_bad_arguments(spec, message):
    with pytest.raises(UserError, match=message):
        parse_ops(spec, {})


def test_ops_in_the_wrong_order():
    with pytest.raises(UserError, match="smaller than 32: put resize\\(32, field=video\\) before it"):
        video("three_crops(32)")
    with pytest.raises(UserError, match="7 frames are no views of 3 each"):
        video("split_views(3)", FRAMES[:7])
    with pytest.raises(UserError, match="put clip, views, ... before it"):
        run("three_crops(8)", {"video": b""})


def test_names_that_a_mirror_changes():
    names = ["Push from left to right", "turn anti-clockwise", "copyright", "swimming", "going_left", "TurnRight"]
    assert sided_names(names) == ["Push from left to right", "turn anti-clockwise", "going_left"]
    assert sided_names(["wave"], {"wave"}) == ["wave"]
