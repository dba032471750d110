"""The video tower against Video Swin's numbers, and against the image tower that it is inflated from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import convert, fill, sinx, swin_shapes

from florence_jax.errors import UserError
from florence_jax.models.sizes import resolve_config
from florence_jax.models.video_coswin import VideoCoSwin, build_video, resolve_video, stage_windows
from florence_jax.models.windows import relative_position_index
from florence_jax.tools.bench.still_clips import inflated_params, small_video_model

SWIN_NAMES = (
    (r"^patch_embed\.", "stage0_embed."),
    (r"^layers\.0\.downsample\.", "stage1_embed."),
    (r"_embed\.proj\.", "_embed."),
    (r"^layers\.(\d)\.blocks\.0\.", r"stage\1_pair0.plain."),
    (r"^layers\.(\d)\.blocks\.1\.", r"stage\1_pair0.shifted."),
    (r"\.attn\.", ".attention."),
)


def test_video_swin_golden():
    shapes = swin_shapes()
    for name in shapes:
        if name.endswith("bias_table"):
            shapes[name] = (3 * 7 * 7, shapes[name][1])
    shapes["patch_embed.proj.weight"] = (8, 3, 2, 4, 4)
    model = VideoCoSwin(8, (2, 2), (2, 4), ((2, 4, 4),) * 2, "patch", mask_padding=False)
    clip = sinx(0.013, 1, 3, 8, 40, 32).transpose(0, 2, 3, 4, 1)
    out = jax.jit(model.apply)({"params": convert(fill(shapes, 0.2), SWIN_NAMES)}, clip)
    assert out["stage1"].shape == (1, 4, 5, 4, 16)
    np.testing.assert_allclose(out["pooled"][0, :4], [0.76302054, -0.91257894, -1.46748051, 0.47856257], atol=1e-5)
    tokens = np.asarray(out["tokens"], np.float64)
    sums = [2.55295979, 1163.60837274]
    np.testing.assert_allclose([tokens.sum(), np.abs(tokens).sum()], sums, rtol=0, atol=1e-5 * sums[1])


def test_index_of_a_smaller_window_in_a_larger_table():
    window, table = (2, 2, 1), (3, 2, 4)
    places = np.array(list(np.ndindex(*window)))
    box = [2 * side - 1 for side in table]
    want = [[np.ravel_multi_index(q - k + np.array(table) - 1, box) for k in places] for q in places]
    np.testing.assert_array_equal(relative_position_index(window, table), want)


# (frames, picture, window, embedding, merge, window_frames, scanned): every value that inflation must stand, not every
# combination. Pictures of (40, 28) are padded in all stages, those of (32, 32) in none.
INFLATED = [
    (1, (32, 32), 4, "conv", 3, (2, 4), False),
    (2, (40, 28), 3, "conv", 1, (8, 8), False),
    (5, (32, 32), 4, "patch", 1, (2, 4), True),
    (8, (40, 28), 3, "conv", 3, (2, 4), False),
    (18, (32, 32), 4, "conv", 3, (8, 8), True),
    (36, (40, 28), 3, "patch", 1, (8, 8), False),
]


@pytest.mark.parametrize(("frames", "size", "window", "embedding", "merge", "window_frames", "scan"), INFLATED)
def test_inflated_tower(frames, size, window, embedding, merge, window_frames, scan):
    """Of identical frames it gives what the image tower gives of one; it cannot tell a clip from its reverse."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        model = small_video_model(size, window, embedding, merge, window_frames, scan, "float64")
        params = inflated_params(model)
        image, clip = rng.normal(size=(1, *size, 3)), rng.normal(size=(1, frames, *size, 3))
        video = np.concatenate([np.repeat(image[:, None], frames, 1), clip, clip[:, ::-1]])
        run = jax.jit(model.apply)
        out = run(params, {"image": image, "video": video})
        pooled = np.asarray(out["video/pooled"])
        assert pooled.dtype == np.float64
        np.testing.assert_allclose(pooled[0], out["image/pooled"][0], rtol=0, atol=1e-10)
        np.testing.assert_allclose(out["video/embedding"][0], out["image/embedding"][0], rtol=0, atol=1e-5)
        assert frames == 1 or np.abs(pooled[1] - pooled[0]).max() > 1e-3
        if frames in (2, 8):  # whole tubes in whole windows
            np.testing.assert_allclose(pooled[2], pooled[1], rtol=0, atol=1e-10)
        turned = params | {"video": model.with_direction(params["video"], 1.0, jax.random.key(0))}
        told = np.asarray(run(turned, {"image": image, "video": video})["video/pooled"])
        np.testing.assert_allclose(told[0], pooled[0], rtol=0, atol=1e-6)  # the noisy kernels are float32
        assert frames == 1 or np.abs(told[2] - told[1]).max() > 1e-3


def test_windows_of_the_stages():
    tower = resolve_config("B", res=384)
    assert stage_windows(tower, resolve_video(tower)) == ((2, 12, 12), (4, 12, 12), (8, 12, 12), (16, 12, 12))
    small = resolve_config("ti")
    assert stage_windows(small, resolve_video(small, window_frames=(8,) * 4)) == ((8, 4, 4),) * 2 + (
        (8, 2, 2),
        (8, 1, 1),
    )
    for wrong in (dict(tube=0), dict(merge=2), dict(window_frames=(2, 2)), dict(dropout=1.0), dict(depth=3)):
        with pytest.raises(UserError):
            resolve_video(small, **wrong)
    with pytest.raises(UserError, match="made of a CoSwin"):
        resolve_video(resolve_config("ViT-B-32"))


def test_size_of_the_paper():
    """Table 10 has 647 M parameters; ours are counted with 400 classes."""
    tower = resolve_config("H", res=384)
    model = build_video(tower, resolve_video(tower, window_frames=(8,) * 4))
    shapes = jax.eval_shape(model.init_video, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) + 2049 * 400 == 647_548_384


def test_no_large_constants():
    """Masks and indices of large windows are made of small arrays."""
    tower = resolve_config("ti", res=384, image_width=8, window=12, depths=(2,))
    model = build_video(tower, resolve_video(tower, window_frames=(8,)))
    shapes = {"video": jax.eval_shape(model.init_video, jax.random.key(0))}
    clip = jax.ShapeDtypeStruct((1, 20, 384, 390, 3), jnp.float32)  # padded along time and width
    text = jax.jit(lambda p, v: model.apply(p, {"video": v})["video/pooled"]).lower(shapes, clip).as_text()
    assert max(map(len, text.splitlines())) < 2 * 2**20, "a constant is spelled out in the program"
