"""Folders, tables and lists of videos, and the public sets: what is missing is left out, counted and said."""

import json

import numpy as np
import pytest
from PIL import Image
from stream_tools import assert_same, take
from video_files import encode, moving_frames

from florence_jax.data.classes import open_classes
from florence_jax.data.pipeline import TrainData, eval_stream, train_stream
from florence_jax.data.records import sample_of
from florence_jax.data.sources.catalog import open_source
from florence_jax.data.sources.video import open_clips, open_videos
from florence_jax.data.videos import read_frames
from florence_jax.errors import UserError


@pytest.fixture
def make(tmp_path):
    """Writes files by name, videos without content unless given; returns the folder."""

    def write(*names, **texts):
        for name in (*names, *texts):
            path = tmp_path / name.replace("__", "/").replace("_csv", ".csv")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(texts.get(name, ""))
        return tmp_path

    return write


def rows(source, *fields):
    return [tuple(row.get(field) for field in ("key", *fields)) for row in source.metadata()]


def test_a_folder_of_classes(make):
    folder = make("wave/b.mp4", "wave/a.webm", "jump_up/deep/c.gif", "jump_up/a.webm", "jump_up/cover.jpg", "loose.mp4")
    source = open_videos(str(folder))
    wanted = [("jump_up/a.webm", "jump up"), ("jump_up/deep/c.gif", "jump up"), ("wave/a.webm", "wave")]
    assert rows(source, "caption") == [*wanted, ("wave/b.mp4", "wave")]
    assert source[3]["video"] == str(folder / "wave/b.mp4") and sample_of(source, 1)[0]["caption"]
    assert (
        "4 videos, 2 classes" in source.summary["says"] and "1 videos beside the sub-folders" in source.summary["says"]
    )
    assert source.summary["says"].endswith("; passed over: 1 .jpg")
    assert open_classes(source).first_names == ["jump up", "wave"]
    looked = open_clips(str(folder))
    assert len(looked) == 5 and looked[2]["caption"] == ""
    assert rows(open_clips(str(folder / "loose.mp4"))) == [("loose.mp4",)]


def test_folders_without_videos(make):
    folder = make("a/b.jpg", "c.txt")
    with pytest.raises(UserError, match=r"no videos in .*Found: 2 files, 1 .jpg, 1 .txt"):
        open_videos(str(folder))
    make("d.mp4")
    with pytest.raises(UserError, match="must lie in a sub-folder for each class.*d.mp4"):
        open_videos(str(folder))
    with pytest.raises(UserError, match="'gone' does not exist; use a folder.*kinetics:, ssv2:"):
        open_videos("gone")
    with pytest.raises(UserError, match="is neither a folder, nor a table or list"):
        open_videos(str(folder / "d.mp4"))


def test_a_table(make):
    folder = make("v/a.mp4", "v/b.mp4", t_csv="file,caption\nv/a.mp4,a dog runs\nv/a.mp4,it runs\nv/x.mp4,gone\n")
    source = open_videos(str(folder / "t.csv"))
    assert rows(source, "captions") == [("v/a.mp4", ["a dog runs", "it runs"])]
    assert "1 of 2 in the list (50.0%) are not in" in source.summary["says"] and source.summary["missing_first"] == [
        "v/x.mp4"
    ]


def test_a_list(make):
    folder = make("v/a.mp4", "v/b c.mp4")
    (folder / "l.txt").write_text("v/a.mp4 1\n\nv/b c.mp4 0\nv/gone.mp4 7\n")
    source = open_videos(str(folder / "l.txt"))
    assert rows(source, "class_id") == [("v/a.mp4", 1), ("v/b c.mp4", 0)] and source.summary["missing"] == 1
    with pytest.raises(UserError, match="its classes have numbers only; name them with --config.classes=FILE"):
        open_classes(source)
    (folder / "l.txt").write_text("v/a.mp4 1\nv/b c.mp4 wave\n")
    with pytest.raises(UserError, match="l.txt line 2: the label 'wave' is no number, those of other lines are"):
        open_videos(str(folder / "l.txt"))
    (folder / "l.txt").write_text("v/a.mp4\tjump_up\nv/b c.mp4\twave\n")
    assert rows(open_videos(str(folder / "l.txt")), "caption") == [("v/a.mp4", "jump up"), ("v/b c.mp4", "wave")]
    (folder / "l.txt").write_text("v/a.mp4\n")
    with pytest.raises(UserError, match="line 1: 'v/a.mp4' is not a path, a blank and a label"):
        open_videos(str(folder / "l.txt"))
    (folder / "l.txt").write_text("x.mp4 1\n")
    with pytest.raises(UserError, match="none of the 1 videos of the list is in .*, such as x.mp4"):
        open_videos(str(folder / "l.txt"))


def test_kinetics(make):
    table = 'label,youtube_id,time_start,time_end,split\nabseiling,-abc,20,30,train\n"air drumming",d_e,1,11,train\n'
    folder = make(
        "v/abseiling/-abc_000020_000030.mp4", "v/d_e.mkv", k_csv=table + "abseiling,gone,0,10,train\nx,d_e,1,2,val\n"
    )
    source = open_source(f"kinetics:{folder}/k.csv:{folder}/v:train")
    assert rows(source, "caption", "clip") == [
        ("abseiling/-abc_000020_000030.mp4", "abseiling", None),
        ("d_e.mkv", "air drumming", (1, 11)),
    ]
    assert "1 of 3 in the list (33.3%)" in source.summary["says"] and "gone_000000_000010" in source.summary["says"]
    assert len(open_videos(f"kinetics:{folder}/k.csv:{folder}/v")) == 3
    make(k_csv="youtube_id,time_start\na,0\n")
    with pytest.raises(
        UserError, match="has no column 'label', only: youtube_id, time_start; test lists have no labels"
    ):
        open_videos(f"kinetics:{folder}/k.csv:{folder}/v")
    make(k_csv="label,youtube_id,time_start,time_end\na,b,x,3\n")
    with pytest.raises(UserError, match="k.csv line 2: time_start and time_end must be numbers"):
        open_videos(f"kinetics:{folder}/k.csv:{folder}/v")
    with pytest.raises(UserError, match="write kinetics:FILE.csv:VIDEOS"):
        open_videos("kinetics:a.csv")


def test_ssv2(make):
    folder = make("v/1.webm", "v/2.webm")
    items = [
        {"id": "1", "label": "holding a cup", "template": "Holding [something]"},
        {"id": 2, "label": "pushing a pen left", "template": "Pushing [something] to the left"},
        {"id": "3", "label": "holding", "template": "Holding [something]"},
    ]
    (folder / "train.json").write_text(json.dumps(items))
    source = open_videos(f"ssv2:{folder}/train.json:{folder}/v")
    assert rows(source, "caption", "description") == [
        ("1.webm", "Holding something", "holding a cup"),
        ("2.webm", "Pushing something to the left", "pushing a pen left"),
    ]
    labels = {"Pushing something to the left": "1", "Holding something": "0", "Other": "2"}
    (folder / "labels.json").write_text(json.dumps(labels))
    source = open_videos(f"ssv2:{folder}/train.json:{folder}/v")
    assert rows(source, "class_id") == [("1.webm", 0), ("2.webm", 1)]
    assert open_classes(source).first_names == ["Holding something", "Pushing something to the left", "Other"]
    (folder / "labels.json").write_text(json.dumps({"Holding something": "1"}))
    with pytest.raises(UserError, match="the numbers of its 1 classes are not 0 to 0"):
        open_videos(f"ssv2:{folder}/train.json:{folder}/v")
    (folder / "labels.json").write_text(json.dumps({"Holding something": "0"}))
    with pytest.raises(UserError, match="video 2 is of the class 'Pushing something to the left', which is not in"):
        open_videos(f"ssv2:{folder}/train.json:{folder}/v")
    (folder / "test.json").write_text('[{"id": "1"}]')
    with pytest.raises(UserError, match="has no 'template'; test lists have no labels"):
        open_videos(f"ssv2:{folder}/test.json:{folder}/v")


def test_ucf101_and_hmdb51(make):
    folder = make("v/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "v/brush_hair/a b.avi", "v/brush_hair/c.avi")
    (folder / "list01.txt").write_text("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\nYoYo/v_YoYo_g01_c01.avi 101\n")
    source = open_videos(f"ucf101:{folder}/list01.txt:{folder}/v")
    assert rows(source, "caption") == [("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "Apply Eye Makeup")]
    (folder / "brush_hair_test_split1.txt").write_text("a b.avi 1 \nc.avi 2\nd.avi 0\n")
    assert rows(open_videos(f"hmdb51:{folder}:train1:{folder}/v"), "caption") == [("brush_hair/a b.avi", "brush hair")]
    assert rows(open_videos(f"hmdb51:{folder}:test1:{folder}/v")) == [("brush_hair/c.avi",)]
    with pytest.raises(UserError, match="no files CLASS_test_split2.txt in"):
        open_videos(f"hmdb51:{folder}:test2:{folder}/v")
    with pytest.raises(UserError, match="PART train1, test1"):
        open_videos(f"hmdb51:{folder}:val:{folder}/v")


def test_msrvtt(make):
    folder = make(
        "v/video1.mp4", "v/video2.mp4", "v/video7.mp4", t_csv="key,vid_key,video_id,sentence\nret0,msr7,video7,a cat\n"
    )
    make(train_csv="video_id\nvideo1\nvideo9\n")
    content = {
        "videos": [
            {"video_id": f"video{i}", "split": split}
            for i, split in ((1, "train"), (2, "test"), (7, "test"), (9, "train"))
        ],
        "sentences": [
            {"video_id": f"video{i}", "caption": text} for i in (1, 2, 7, 9) for text in ("one", " two", "one")
        ],
    }
    (folder / "d.json").write_text(json.dumps(content))
    data = f"msrvtt:{folder}/d.json"
    assert rows(open_videos(f"{data}:{folder}/t.csv:{folder}/v"), "captions") == [("video7.mp4", ["a cat"])]
    source = open_videos(f"{data}:{folder}/train.csv:{folder}/v")
    assert rows(source, "caption", "captions") == [("video1.mp4", "one", ["one", "two"])]
    assert "1 videos, 2 captions; 1 of 2 in the list (50.0%)" in source.summary["says"]
    assert len(open_videos(f"{data}:test:{folder}/v")) == 2
    with pytest.raises(UserError, match=r"val is neither a file nor a split of .* \(test, train\)"):
        open_videos(f"{data}:val:{folder}/v")


def test_animated_emoji(tmp_path):
    pictures = [Image.fromarray(frame) for frame in moving_frames(3)]
    for name in ("1f426", "1f600", "ffff"):
        pictures[0].save(tmp_path / f"{name}-fe0f.webp", save_all=True, append_images=pictures[1:])
    pictures[0].save(tmp_path / "1f601.webp")
    source = open_videos(f"animated_emoji:{tmp_path}")
    assert rows(source, "caption", "seen") == [("1f426-fe0f.webp", "bird", 0), ("1f600-fe0f.webp", "grinning face", 1)]
    assert (
        "2 animated drawings with a name in the embedded set; left out: 1 without one, 1 that do not move"
        in (source.summary["says"])
    )
    assert read_frames(source[0]["video"], [2]).shape == (1, 32, 48, 3)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no animated WebP called by code points"):
        open_videos(f"animated_emoji:{empty}")


def test_a_stream_of_clips_goes_on_where_it_stopped_and_passes_over_broken_files(tmp_path):
    for name in ("to_the_left", "to_the_right"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.mp4").write_bytes(encode(moving_frames(9, seed=i)))
    whole = (tmp_path / "to_the_left/1.mp4").read_bytes()
    (tmp_path / "to_the_left/1.mp4").write_bytes(whole[:500])
    source = open_videos(str(tmp_path))
    ops = "clip(4, interval=2)|resize(24, field=video)|rrc(16, field=video)|flip(field=video)|class_label"
    data = TrainData([source], None, f"{ops}|keep(video, label)", {"classes": open_classes(source)})
    batches = take(train_stream(data, batch_size=4, seed=3), 5)
    assert batches[0]["video"].shape == (4, 4, 16, 16, 3) and batches[0]["video"].dtype == np.uint8
    assert sum(batch["corrupt"].sum() for batch in batches) >= 2
    assert_same(take(train_stream(data, batch_size=4, seed=3, start_step=3), 2), batches[3:])
    with pytest.raises(UserError, match="record 'to_the_left/1.mp4': it cannot be read as a video"):
        take(train_stream(data, batch_size=6, seed=3, on_corrupt="error"), 1)
    tested = "views(2, 3)|resize(16, field=video)|three_crops(16)|split_views(3)|class_label|keep(video, label)"
    found = take(eval_stream(source, tested, data.context, batch_size=4, on_corrupt="skip"), 2)
    assert [batch["mask"].sum() for batch in found] == [3, 2] and found[0]["video"].shape == (4, 6, 3, 16, 16, 3)
