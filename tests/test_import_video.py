"""Video Swin's weights in both namings: the golden numbers, and the folder that is written."""

import jax
import numpy as np
import pytest
from golden import fill, sinx, swin_shapes
from safetensors.numpy import save_file

from configs.video import get_config
from florence_jax.errors import UserError
from florence_jax.inference import Florence
from florence_jax.params.sharding import make_mesh
from florence_jax.tasks import create_suite
from florence_jax.tasks.encoder import Encoder
from florence_jax.tasks.video_tower import VideoTower
from florence_jax.tools.import_torch.__main__ import main
from florence_jax.tools.import_torch.convert import convert
from florence_jax.tools.import_torch.families import FAMILIES

HEAD = {"weight": np.arange(48.0).reshape(3, 16) / 48, "bias": np.array([0.5, 0.0, -0.5])}


def video_state():
    """The golden Video Swin in its authors' names, with a head of three classes."""
    shapes = swin_shapes()
    for name in shapes:
        if name.endswith("bias_table"):
            shapes[name] = (3 * 7 * 7, shapes[name][1])
    shapes["patch_embed.proj.weight"] = (8, 3, 2, 4, 4)
    tower = {f"backbone.{name}": value.astype(np.float32) for name, value in fill(shapes, 0.2).items()}
    index = {"backbone.layers.0.blocks.0.attn.relative_position_index": np.zeros((32, 32), np.int64)}
    return tower | index | {f"cls_head.fc_cls.{name}": value.astype(np.float32) for name, value in HEAD.items()}


def as_torchvision(name):
    if name.startswith("cls_head"):
        return name.replace("cls_head.fc_cls", "head")
    name = name.removeprefix("backbone.").replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
    for stage in (0, 1):
        name = name.replace(f"layers.{stage}.blocks", f"features.{2 * stage}")
        name = name.replace(f"layers.{stage}.downsample", f"features.{2 * stage + 1}")
    return name


def test_the_golden_clip_through_a_folder(tmp_path):
    save_file(video_state(), tmp_path / "v.safetensors")
    (tmp_path / "names.txt").write_text("run\njump\nsit\n")
    flags = ["--from=videoswin", f"--file={tmp_path / 'v.safetensors'}", f"--set=classes={tmp_path / 'names.txt'}"]
    assert main([*flags, f"--out={tmp_path / 'out'}"]) == 0
    tower = VideoTower(Encoder(str(tmp_path / "out")))
    assert tower.classes == ("run", "jump", "sit") and not tower.model.video.mask_padding
    assert tower.model.video.window_frames == (2, 2) and tower.model.video.frames == 32
    params = tower.load_on(make_mesh(-1, 1))
    clip = sinx(0.013, 1, 3, 8, 40, 32).transpose(0, 2, 3, 4, 1)
    pooled = jax.jit(lambda p, v: tower.model.apply(p, {"video": v})["video/pooled"])(params, clip)
    np.testing.assert_allclose(pooled[0, :4], [0.76302054, -0.91257894, -1.46748051, 0.47856257], atol=1e-5)
    logits = tower.logits(params, pooled)
    np.testing.assert_allclose(logits[0], pooled[0] @ HEAD["weight"].T + HEAD["bias"], atol=1e-5)


@pytest.mark.parametrize("protocol", ["zeroshot", "retrieval"])
def test_weights_without_towers_for_texts(tmp_path, protocol):
    save_file(video_state(), tmp_path / "v.safetensors")
    assert main(["--from=videoswin", f"--file={tmp_path / 'v.safetensors'}", f"--out={tmp_path / 'out'}"]) == 0
    config = get_config(f"protocol={protocol}")
    config.init, config.data.test = str(tmp_path / "out"), "motions:held_out:4"
    with pytest.raises(UserError, match=f"out holds no text tower, which protocol '{protocol}' needs to read texts"):
        create_suite(config)
    model = Florence(str(tmp_path / "out"))
    with pytest.raises(UserError, match="holds no text tower: it can embed no texts"):
        model.classify_videos(["clip.mp4"], ["run", "jump"])
    with pytest.raises(UserError, match="the weights hold no image tower"):
        model.embed_videos([np.zeros((8, 32, 32, 3), np.uint8)])


def test_torchvision_names_the_same(tmp_path):
    state = video_state()
    found = [
        convert(tensors, FAMILIES[family])
        for tensors, family in ((state, "videoswin"), ({as_torchvision(n): v for n, v in state.items()}, "swin3d"))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), *(f.params for f in found))
    assert found[1].dropped == ["features.0.0.attn.relative_position_index"]
    assert found[0].config.classes == ("class 0", "class 1", "class 2")


def test_what_is_missing_is_named_as_in_the_file():
    state = video_state()
    del state["backbone.layers.1.blocks.0.norm1.bias"]
    with pytest.raises(Exception, match=r"backbone\.layers\.1\.blocks\.0\.norm1\.bias: missing"):
        convert(state, FAMILIES["videoswin"])
