"""Frames with given numbers are those of decoding from the start."""

import contextlib
import io
import wave

import numpy as np
import pytest
from PIL import Image
from video_files import OPEN_H265, decoded, encode, moving_frames, remuxed

from florence_jax import errors
from florence_jax.data import video_containers
from florence_jax.data.records import BadRecord
from florence_jax.data.video_containers import ContainerVideo
from florence_jax.data.videos import open_video, read_frames
from florence_jax.errors import UserError

pytest.importorskip("av")

FRAMES = moving_frames(23)
X264 = {"bf": "2", "preset": "ultrafast", "threads": "1"}
FILES = {
    "H.264 with B-frames": dict(options=X264),
    "H.264, open groups": dict(options={"x264-params": "open-gop=1:keyint=6:min-keyint=6:bframes=3:scenecut=0"}, gop=6),
    "H.264, one key frame": dict(options=X264, gop=100),
    "H.264 in MPEG-TS": dict(container="mpegts", options=X264),
    "H.264 in MKV": dict(container="matroska", options=X264),
    "VP9": dict(container="webm", codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    "VP8 with hidden frames": dict(
        container="webm", codec="libvpx", gop=9, options={"auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "4"}
    ),
    "MPEG-4 in AVI": dict(container="avi", codec="mpeg4"),
    "MPEG-4 in AVI with B-frames": dict(container="avi", codec="mpeg4", options={"bf": "2"}),
    "MPEG-2 in MPEG-TS": dict(container="mpegts", codec="mpeg2video", options={"bf": "2"}),
    "MPEG-2, interlaced": dict(container="mpeg", codec="mpeg2video", rate=25, options={"flags": "+ildct+ilme"}),
    "H.264 without a container, no time stamps": dict(container="h264", options=X264),
    "MJPEG in AVI": dict(container="avi", codec="mjpeg", pix_fmt="yuvj420p"),
    "FFV1 in MKV": dict(container="matroska", codec="ffv1"),
    "variable rate": dict(container="matroska", options=X264, stamps=np.cumsum(1 + np.arange(23) % 4).tolist()),
    "variable rate in mp4": dict(options=X264, stamps=np.cumsum(1 + np.arange(23) % 3).tolist()),
    "sound": dict(options=X264, audio=True),
    "10 bits": dict(options=X264, pix_fmt="yuv420p10le"),
}


@pytest.mark.parametrize("kind", FILES)
def test_frames_are_those_of_decoding_from_the_start(kind, tmp_path):
    check_frames(encode(FRAMES, **FILES[kind]), tmp_path, len(FRAMES))


def test_frames_of_h265_are_those_of_decoding_from_the_start(tmp_path):
    check_frames(OPEN_H265, tmp_path, 11)


def check_frames(data, tmp_path, count):
    wanted, rng = decoded(data), np.random.default_rng(0)
    (tmp_path / "a: b?.mp4").write_bytes(data)
    for given in (data, tmp_path / "a: b?.mp4"):
        with open_video(given) as video:
            assert video.count == len(wanted) == count
            for numbers in (rng.integers(0, count, 6), [count - 1], [0], [9, 3, 3, 7]):
                np.testing.assert_array_equal(video.read(numbers), wanted[numbers])
    for number in range(1, count, 4):
        np.testing.assert_array_equal(read_frames(data, [number])[0], wanted[number], err_msg=str(number))


@pytest.fixture(scope="module")
def long_video():
    """2,500 frames without loss, each with its number in its colours; a key frame every 50."""
    numbers = np.arange(2500)
    frames = np.zeros((2500, 8, 8, 3), np.uint8)
    frames[:, :, :4, 0], frames[:, :, 4:, 1] = (numbers % 256)[:, None, None], (numbers // 256)[:, None, None]
    return frames, encode(frames, "matroska", "ffv1", pix_fmt="bgr0", gop=50)


@pytest.mark.parametrize("counted", [True, False])
def test_only_what_is_needed_of_a_long_video_is_decoded(long_video, monkeypatch, counted):
    frames, data = long_video
    if not counted:  # as if it were too large to count its packets
        monkeypatch.setattr(video_containers, "COUNTED_BYTES", 0)
    seen = []
    bare = ContainerVideo._decoded
    monkeypatch.setattr(ContainerVideo, "_decoded", lambda *args: (seen.append(1) or f for f in bare(*args)))
    numbers = np.concatenate([2251 + np.arange(0, 64, 2), [12, 1777, 2499]])
    with open_video(data) as video:
        assert video.count == 2500 and not seen
        np.testing.assert_array_equal(video.read(numbers), frames[numbers])
        np.testing.assert_allclose(video.times()[[0, 2499]], [0, 249.9], atol=0.06)
    assert len(seen) < 200


def test_one_frame():
    data = encode(FRAMES[:1])
    with open_video(data) as video:
        assert video.count == 1 and (video.read([0, 0]) == decoded(data)[[0, 0]]).all()


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_videos_are_upright(degrees):
    data = encode(FRAMES[:4], rotation=degrees)
    np.testing.assert_array_equal(read_frames(data, [3])[0], np.rot90(decoded(data)[3], degrees // 90))


def test_smaller_frames():
    frames = np.repeat(FRAMES[:3].repeat(4, 1).repeat(4, 2)[:, :127, :191], 1, 0)  # odd sizes
    data = encode(frames, "matroska", "ffv1", pix_fmt="bgr0")
    np.testing.assert_array_equal(read_frames(data, [0, 2]), frames[[0, 2]])
    with open_video(data) as video:
        small, whole = video.read([2], short=32), video.read([2], short=200)
    assert small.shape == (1, 32, 48, 3) and whole.shape == (1, 127, 191, 3)
    wanted = np.asarray(Image.fromarray(frames[2]).resize((48, 32), Image.Resampling.BICUBIC))
    assert np.abs(small[0].astype(int) - wanted).mean() < 2
    with open_video(frames) as video:
        np.testing.assert_array_equal(video.read([2], short=32)[0], wanted)


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF"])
def test_animated_pictures(kind, tmp_path):
    pictures = [Image.fromarray(frame).convert("P" if kind == "GIF" else "RGB") for frame in FRAMES[:5]]
    options = {"lossless": True} if kind == "WEBP" else {}
    pictures[0].save(tmp_path / "a.mp4", kind, save_all=True, append_images=pictures[1:], duration=50, **options)
    wanted = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    with open_video(tmp_path / "a.mp4") as video:
        assert video.count == 5 and video.times() == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
        np.testing.assert_array_equal(video.read([4, 0, 2, 2]), wanted[[4, 0, 2, 2]])


def test_transparent_parts_are_on_white():
    frames = np.concatenate([FRAMES[:2], np.zeros((2, *FRAMES.shape[1:3], 1), np.uint8)], 3)
    data = encode(frames, "matroska", "ffv1", pix_fmt="bgra")
    assert (read_frames(data, [1]) == 255).all()


def _shown(data):
    """What a bare loop decodes in spite of damage."""
    import av

    found = []
    with av.open(io.BytesIO(data)) as file:
        for packet in file.demux(video=0):
            with contextlib.suppress(av.FFmpegError):
                found += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
    return np.stack(found)


def test_frames_that_nothing_shows_are_not_counted():
    data = encode(FRAMES, "webm", "libvpx", gop=9, options={"cpu-used": "8"})
    hidden = remuxed(
        data, "webm", lambda i, content: bytes([content[0] & ~16]) + content[1:] if i in (5, 12) else content
    )
    with open_video(hidden) as video:
        assert video.count == 21
        np.testing.assert_array_equal(video.read(range(21)), _shown(hidden))


def test_damaged_videos():
    data = encode(FRAMES, "matroska", options=X264)
    damaged = remuxed(
        data, "matroska", lambda i, content: content[:5] + bytes(len(content) - 5) if i in (7, 8) else content
    )
    np.testing.assert_array_equal(
        read_frames(damaged, range(23)), _shown(damaged)[[0, 1, 2, 3, 4, 5, 5, 5, *range(6, 21)]]
    )
    np.testing.assert_array_equal(read_frames(damaged, [7])[0], _shown(damaged)[5])
    late = remuxed(data, "matroska", lambda i, content: content if i > 2 else None)
    np.testing.assert_array_equal(read_frames(late, range(20)), _shown(late)[[0, 0, *range(18)]])
    cut = data[: len(data) // 2]
    shown = _shown(cut)
    assert 1 < len(shown) < 23
    np.testing.assert_array_equal(read_frames(cut, range(len(shown))), shown)
    nothing = remuxed(data, "matroska", lambda i, content: bytes(len(content)))
    with pytest.raises(BadRecord, match="none of its frames can be decoded"):
        read_frames(nothing, [0])


def _picture(kind):
    file = io.BytesIO()
    Image.fromarray(FRAMES[0]).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"no video" * 99, r"cannot be read as a video \(Invalid data"),
        (encode(FRAMES[:9])[:900], r"cannot be read as a video \(Invalid data"),
        (_picture("JPEG"), r"a still picture \(JPEG\), not a video"),
        (_picture("PNG"), r"a still picture \(PNG\), not a video"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "corrupt animation"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n", "cannot be read as a video"),
        (np.zeros((2, 8, 8), np.uint8), r"uint8 \(2, 8, 8\), not uint8 \(T, H, W, 3\)"),
        (7, "is int, neither bytes nor a path"),
        ("gone.mp4", "gone.mp4.*cannot read the file: No such file"),
    ],
    ids=str,
)
def test_what_is_no_video(data, message):
    with pytest.raises(BadRecord, match=message):
        read_frames(data, [0])


def test_sound_without_pictures(tmp_path):
    with wave.open(str(tmp_path / "a.mp4"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    with pytest.raises(BadRecord, match="no video stream but sound"):
        read_frames(tmp_path / "a.mp4", [0])


def test_frames_with_too_many_pixels(monkeypatch):
    monkeypatch.setattr(video_containers, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(BadRecord, match="48 x 32 pixels, more than"):
        read_frames(encode(FRAMES[:2]), [0])


def test_without_pyav(monkeypatch):
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '.\[video\]'"):
        read_frames(encode(FRAMES[:2]), [0])
