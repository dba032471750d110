"""Videos packed as ArrayRecord files: smaller, or as they are; what cannot be read is left out and listed."""

import numpy as np
import pytest
from video_files import encode, moving_frames

from florence_jax.data.sources.video import open_videos
from florence_jax.data.videos import open_video, read_frames
from florence_jax.tools.pack_videos import __main__ as pack_videos

pytest.importorskip("av")
FRAMES = moving_frames(13, (32, 64))


@pytest.fixture
def clips(tmp_path):
    for name in ("left", "right"):
        (tmp_path / "clips" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "clips" / name / f"{i}.mkv").write_bytes(encode(FRAMES, "matroska", "ffv1", pix_fmt="bgr0"))
    (tmp_path / "clips/right/broken.mp4").write_bytes(b"no video" * 9)
    return tmp_path / "clips"


def pack(clips, *options):
    return pack_videos.main([f"--data={clips}", f"--out={clips.parent / 'packed'}", *options])


def test_videos_as_they_are(clips, capsys):
    assert pack(clips, "--in_a_file=2") == 0
    out = clips.parent / "packed"
    assert "4 videos; 1 left out, see" in capsys.readouterr().out
    assert "right/broken.mp4,it cannot be read as a video" in (out / "left_out.csv").read_text()
    source = open_videos(str(out))
    found = {record["key"]: record for record in (source[i] for i in range(len(source)))}
    assert {key: record["caption"] for key, record in found.items()} == {
        f"{name}/{i}.mkv": name for name in ("left", "right") for i in range(2)
    }
    assert found["left/1.mkv"]["video"] == (clips / "left/1.mkv").read_bytes()
    assert len(list(source.metadata())) == 4


def test_smaller_videos_and_going_on(clips, capsys):
    assert pack(clips, "--short=16", "--in_a_file=3", "--codec=ffv1") == 0
    out = clips.parent / "packed"
    source = open_videos(str(out))
    with open_video(source[0]["video"]) as video:
        assert video.count == 13 and video.times()[-1] == pytest.approx(1.2, abs=0.01)
        frames = video.read(range(13))
    np.testing.assert_array_equal(frames, open_frames(clips / "left/0.mkv", 16))
    files = sorted(out.glob("*.array_record"))
    assert len(files) == 2
    before = files[1].stat().st_mtime_ns
    files[0].unlink()
    assert pack(clips, "--short=16", "--in_a_file=3", "--codec=ffv1") == 0
    assert files[0].exists() and files[1].stat().st_mtime_ns == before
    assert "4 videos; 1 left out" in capsys.readouterr().out.splitlines()[-1]
    assert pack(clips, "--short=24") == 2
    assert "holds something else" in capsys.readouterr().err


def open_frames(path, short):
    with open_video(path) as video:
        return video.read(range(video.count), short)


def test_the_part_that_is_meant(clips, tmp_path):
    (tmp_path / "k.csv").write_text("label,youtube_id,time_start,time_end\nleft,0,0,1\n")
    long = encode(moving_frames(30, (32, 64)), "matroska", "ffv1", pix_fmt="bgr0")
    (clips / "left/0.mkv").write_bytes(long)
    (clips / "right/0.mkv").unlink()
    options = [f"--data=kinetics:{tmp_path}/k.csv:{clips}", f"--out={tmp_path / 'out'}", "--short=32", "--codec=ffv1"]
    assert pack_videos.main(options) == 0
    record = open_videos(str(tmp_path / "out"))[0]
    assert "clip" not in record
    with open_video(record["video"]) as video:
        assert video.count == 10
        np.testing.assert_array_equal(video.read([9]), read_frames(long, [9]))


def test_all_videos_are_broken(tmp_path, capsys):
    (tmp_path / "clips/a").mkdir(parents=True)
    (tmp_path / "clips/a/b.mp4").write_bytes(b"")
    assert pack(tmp_path / "clips") == 2
    assert "none of the 1 videos of" in capsys.readouterr().err
