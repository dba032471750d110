"""Frames with given numbers are those of decoding from the start."""

import numpy as np
import pytest
from video_files import encode, moving_frames

from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.sources.video import open_videos

pytest.importorskip("av")


def test_clip_of_a_folder_of_classes(tmp_path):
    for name in ("to_the_left", "to_the_right"):
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / name / f"{i}.mp4").write_bytes(encode(moving_frames(9, seed=i)))
    source = open_videos(str(tmp_path))
    assert [row["caption"] for row in source.metadata()] == ["to the left"] * 2 + ["to the right"] * 2
    ops = parse_ops(
        "clip(4, interval=2)|resize(24, field=video)|rrc(16, field=video)|flip(field=video)|keep(video)", {}
    )
    example, rng = source[3], np.random.default_rng(0)
    for op in ops:
        example = op(example, rng)
    assert example["video"].shape == (4, 16, 16, 3) and example["video"].dtype == np.uint8
