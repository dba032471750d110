"""Import of PyTorch weights: the reference modules' numbers through files in the real formats, and every refusal."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import clip_shapes, cosx, fill, sinx, swin_shapes, text_shapes
from safetensors.numpy import save_file

from florence_jax.errors import UserError
from florence_jax.models import coswin
from florence_jax.models.florence import build, parameter_count
from florence_jax.models.resize import bicubic_matrix
from florence_jax.models.sizes import VARIANTS, resolve_config
from florence_jax.params.checkpoint import Checkpoints
from florence_jax.params.sharding import make_mesh
from florence_jax.tasks.encoder import Encoder
from florence_jax.tools.import_torch.__main__ import main
from florence_jax.tools.import_torch.convert import convert
from florence_jax.tools.import_torch.families import FAMILIES

POOLED = [
    0.63590381, -0.92559892, -1.47075678, 0.45316875, 1.73793879, 0.10269688, -1.57032031, -0.42661424, 1.32338115,
    0.74773342, -0.71532633, -0.35030492, 1.10831790, 1.08847068, -0.52023783, -1.26898631,
]  # fmt: skip
TEXT_POOLED = [
    [-2.38813656, -0.35507082, -0.34748451, 1.76719163, 1.06719306, 1.50981569, 0.07379498, -0.19010799],
    [-1.85424920, 0.50615503, 0.53636233, 2.20303496, 1.05953941, 0.94095802, -0.55075544, -0.84665050],
]  # fmt: skip
IMAGE = sinx(0.013, 1, 3, 64, 64).transpose(0, 2, 3, 1)
IDS = jnp.array([[18, 5, 7, 19, 0, 0], [18, 3, 19, 19, 19, 19]])
TABLE = "attn.relative_position_bias_table"
TINY_CLIP = dict(activation="quick_gelu", heads=(2,), text_heads=2)  # what tensors do not show


def swin_state():
    return fill(swin_shapes(), 0.2)


def timm_names(state):
    """timm counts the downsampling with the next stage, and its head is `head.fc`."""
    state = {name.replace("layers.0.downsample", "layers.1.downsample"): value for name, value in state.items()}
    buffers = {
        f"layers.{i}.blocks.{j}.attn.relative_position_index": np.zeros((16, 16), np.int64) for i, j in np.ndindex(2, 2)
    }
    return state | buffers | {"head.fc.weight": np.zeros((5, 16)), "head.fc.bias": np.zeros(5)}


def microsoft_extras(state):
    return state | {"layers.0.blocks.1.attn_mask": np.zeros((16, 16, 16)), "head.weight": np.zeros((5, 16))}


def unicl_state(
    image="image_encoder.", text="text_encoder.", image_projection="image_projection", text_projection="text_projection"
):
    """Golden Swin and golden text tower as one UniCL file, with projections of D = 4."""
    towers = {image: swin_state(), text: fill(text_shapes(), 0.3)}
    state = {prefix + name: value for prefix, tower in towers.items() for name, value in tower.items()}
    projections = {image_projection: cosx(16, 4), text_projection: cosx(8, 4), "logit_scale": np.float32(1.0)}
    return state | {name: np.asarray(value) for name, value in projections.items()}


def save(state, path, dtype=np.float32):
    save_file({name: np.array(value, dtype, order="C") for name, value in state.items()}, path)


def run(*args):
    return main([str(arg) for arg in args])


@pytest.mark.parametrize("naming", [microsoft_extras, timm_names])
def test_swin_golden_through_files(naming, tmp_path, capsys):
    """A classifier in a safetensors file, to a checkpoint, to the reference module's pooled features."""
    save(naming(swin_state()), tmp_path / "swin.safetensors")
    folder = tmp_path / "out"
    code = run("--from=swin", f"--file={tmp_path}/swin.safetensors", f"--out={folder}", "--res=64", "--window=4")
    assert code == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "variant Swin-" in printed and "head" in printed.split("dropped: ")[1]
    content = json.loads((folder / "model.json").read_text())
    assert content["source"]["from"] == "swin" and content["parts"]["towers"]["overrides"]["depths"] == [2, 2]
    assert not list(folder.glob("*.partial"))
    model, params = load(folder)
    assert set(params) == {"image"}
    tower = coswin.CoSwin(8, (2, 2), (2, 4), 4, embedding="patch")
    assert (model.config.res, model.config.heads, model.config.embedding) == (64, (2, 4), "patch")
    pooled = jax.jit(tower.apply)({"params": params["image"]}, IMAGE)["pooled"]
    np.testing.assert_allclose(pooled[0], POOLED, atol=1e-5)


def load(folder):
    encoder = Encoder(str(folder))
    return encoder.model, encoder.load_on(make_mesh(-1, 1))


def test_patch_merging_golden():
    shapes = {"norm.bias": (32,), "norm.weight": (32,), "reduction.weight": (16, 32)}
    filled = fill(shapes, 0.3)
    params = {
        "norm": {"scale": filled["norm.weight"], "bias": filled["norm.bias"]},
        "reduction": {"kernel": filled["reduction.weight"].T},
    }
    y = coswin.PatchMerging(16).apply({"params": jax.tree.map(jnp.float32, params)}, cosx(1, 4, 4, 8))
    np.testing.assert_allclose(y[0, 0, 0, :4], [-0.56261316, 3.74598366, 6.16353164, 5.46960331], atol=1e-5)
    np.testing.assert_allclose([y.sum(), jnp.abs(y).sum()], [-5.27904231, 170.46730089], atol=1e-3)


@pytest.mark.parametrize(
    "names",
    [
        {},
        dict(image="visual.", text="text.", image_projection="vision_projection"),
        dict(text="lang_encoder.", text_projection="lang_projection"),
    ],
)
def test_unicl_namings(names):
    """Every naming gives the same parameters as the first, whose numbers `test_unicl_golden` checks."""
    options = dict(text_heads=2)
    config, params, *_ = convert(unicl_state(**names), FAMILIES["unicl"], options=options, res=64, window=4)
    want_config, want, *_ = convert(unicl_state(), FAMILIES["unicl"], options=options, res=64, window=4)
    assert config == want_config
    jax.tree.map(np.testing.assert_array_equal, params, want)


def test_unicl_golden(tmp_path):
    save(unicl_state(), tmp_path / "unicl.safetensors")
    args = ["--set", "text_heads=2", "--res=64", "--window=4"]
    assert run("--from=unicl", f"--file={tmp_path}/unicl.safetensors", f"--out={tmp_path}/out", *args) == 0
    model, params = load(tmp_path / "out")
    assert (model.config.text_eps, model.config.text_causal, model.config.text_pooling) == (1e-12, True, "eot")
    out = jax.jit(model.apply)(params, {"image": IMAGE, "text": IDS})
    np.testing.assert_allclose(out["image/pooled"][0], POOLED, atol=1e-5)
    np.testing.assert_allclose(out["text/pooled"], TEXT_POOLED, atol=1e-5)
    projected = np.asarray(POOLED) @ cosx(16, 4)
    np.testing.assert_allclose(out["image/embedding"][0], projected / np.linalg.norm(projected), atol=1e-5)
    np.testing.assert_allclose(out["logit_scale"], np.e, rtol=1e-6)
    # What `--config.init` does: the whole tree of a model, with shardings, from the folder itself.
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    restored = Checkpoints(str(tmp_path / "out"), read_only=True).restore({"params": target})["params"]
    assert jax.tree.structure(restored) == jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0)))


def test_scanned_layout():
    """Deep stages and towers are stacked as the model's scan wants them, in the order of depth."""
    deep = {name: shape for name, shape in swin_shapes().items() if not name.startswith("layers.1")}
    last = {name: shape for name, shape in swin_shapes().items() if name.startswith("layers.1")}
    for block in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11):  # two-digit indices must not sort as text
        last |= {
            name.replace("blocks.0", f"blocks.{block}"): shape for name, shape in last.items() if "blocks.0" in name
        }
    state = fill(deep | last, 0.2)
    config, params, *_ = convert(state, FAMILIES["swin"], res=64, window=4)
    shapes = jax.eval_shape(
        build(config.variant, **{k: config[k] for k in config if k != "variant"}).init, jax.random.key(0)
    )
    assert jax.tree.map(np.shape, params["image"]) == jax.tree.map(lambda leaf: leaf.shape, shapes["image"])
    pairs = params["image"]["stage1_pairs"]
    np.testing.assert_allclose(
        np.asarray(pairs["shifted"]["norm1"]["bias"])[5], state["layers.1.blocks.11.norm1.bias"], rtol=1e-6
    )


def transformers_names(state):
    """OpenAI's names to those of Hugging Face's CLIPModel: separate q, k, v and projections as (D, width) matrices."""
    out = {"vision_model.embeddings.position_ids": np.arange(10)}
    plain = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "logit_scale": "logit_scale",
    }
    stems = {
        "visual.transformer.resblocks": "vision_model.encoder.layers", "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm", "ln_final": "text_model.final_layer_norm",
        "transformer.resblocks": "text_model.encoder.layers", "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2",
    }  # fmt: skip
    for name, value in state.items():
        if name in ("visual.proj", "text_projection"):
            out[{"visual.proj": "visual_projection"}.get(name, name) + ".weight"] = value.T
            continue
        renamed = plain.get(name, name)
        for theirs, ours in stems.items() if name not in plain else ():
            renamed = renamed.replace(theirs, ours)
        if "attn.in_proj_" in renamed:
            for letter, part in zip("qkv", np.split(value, 3), strict=True):
                out[renamed.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part
        else:
            out[renamed] = value
    return out


def custom_text_names(state):
    """OpenCLIP with a separate text module."""
    ours = ("visual.", "logit_scale")
    return {name if name.startswith(ours) else f"text.{name}": value for name, value in state.items()}


@pytest.mark.parametrize("naming", [custom_text_names, transformers_names])
def test_clip_namings(naming):
    """Every naming gives the same parameters as OpenAI's, whose numbers test_vit.py checks."""
    options = TINY_CLIP
    state = fill(clip_shapes(), 0.2)
    extras = {"input_resolution": np.int64(24), "context_length": np.int64(6), "vocab_size": np.int64(20)}
    config, params, dropped, *_ = convert(naming(state), FAMILIES["clip"], options=options)
    want_config, want, want_dropped, *_ = convert(state | extras, FAMILIES["clip"], options=options)
    assert config == want_config and config.image_activation == "quick_gelu" and config.text_eps == 1e-5
    assert want_dropped == sorted(extras) and len(dropped) == (naming is transformers_names)
    jax.tree.map(np.testing.assert_array_equal, params, want)


def test_clip_position_embeddings_for_another_size():
    config, params, *_ = convert(fill(clip_shapes(), 0.2), FAMILIES["clip"], options=TINY_CLIP, res=40)
    assert config.res == 40 and params["image"]["position_embedding"].shape == (26, 16)
    with pytest.raises(UserError, match="patch_size=8"):
        convert(fill(clip_shapes(), 0.2), FAMILIES["clip"], options=TINY_CLIP, res=36)
    with pytest.raises(UserError, match="--window is for Swin"):
        convert(fill(clip_shapes(), 0.2), FAMILIES["clip"], options=TINY_CLIP, window=7)


def test_open_clip_configuration_and_half_precision(tmp_path, capsys):
    state = fill(clip_shapes(), 0.2)
    save(state, tmp_path / "open_clip_model.safetensors", np.float16)
    model_cfg = dict(quick_gelu=True, vision_cfg=dict(width=16, head_width=8), text_cfg=dict(heads=2))
    preprocess_cfg = dict(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(dict(model_cfg=model_cfg, preprocess_cfg=preprocess_cfg)))
    args = ("--from=openclip", f"--file={tmp_path}/open_clip_model.safetensors", f"--out={tmp_path}/out")
    assert run(*args) == 0
    config = Encoder(str(tmp_path / "out"), precision="bfloat16").model.config
    assert (config.heads, config.text_heads, config.image_mean) == ((2,), 2, (0.5, 0.5, 0.5))
    assert (config.image_activation, config.text_activation, config.dtype) == ("quick_gelu", "quick_gelu", "bfloat16")
    params = load(tmp_path / "out")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    want = np.float16(state["visual.conv1.weight"]).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["image"]["patch_embed"]["kernel"], want)
    capsys.readouterr()
    assert run(*args) == 2 and "already holds a checkpoint" in capsys.readouterr().err
    path.write_text("[]")
    assert run(*args[:2], f"--out={tmp_path}/other") == 2
    assert "open_clip_config.json" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_window_and_resolution():
    """--res alone gives the window res / 32, in stages with a smaller map the side of that map."""
    config, params, *_ = convert(swin_state(), FAMILIES["swin"], res=256)
    assert (config.res, config.window) == (256, 8)
    name = "relative_position_bias_table"
    table = params["image"]["stage0_pair0"]["plain"]["attention"][name]
    matrix = bicubic_matrix(7, 15)
    source = swin_state()[f"layers.0.blocks.0.{TABLE}"][:, 0].reshape(7, 7)
    np.testing.assert_allclose(table[:, 0].reshape(15, 15), matrix @ source @ matrix.T, atol=1e-6)
    config, params, *_ = convert(swin_state(), FAMILIES["swin"], res=32, window=8)
    tables = [params["image"][f"stage{i}_pair0"]["shifted"]["attention"][name].shape for i in range(2)]
    assert config.window == 8 and tables == [(225, 2), (49, 4)]  # maps of 8 and 4
    with pytest.raises(UserError, match="does not divide by window=6"):
        convert(swin_state(), FAMILIES["swin"], res=64, window=6)


@pytest.mark.parametrize("width,heads", [(1280, 16), (1408, 16), (1664, 16), (1280, 20)])
def test_heads_of_a_wide_tower_stay_as_they_are(width, heads):
    """OpenCLIP's ViT-H, ViT-g and ViT-bigG have 16 heads, as the row that is nearest to them."""
    deep = ("visual.transformer.resblocks.1.", "visual.transformer.resblocks.2.")
    sizes = {16: width, 48: 3 * width, 64: 4 * width}
    state = {
        name: np.zeros([sizes.get(n, n) for n in shape] if name.startswith("visual.") else shape, np.float32)
        for name, shape in clip_shapes().items()
        if not name.startswith(deep)
    }
    options = {"text_heads": 2, "activation": "gelu"} | ({} if heads == 16 else {"heads": (heads,)})
    named = Path("CLIP-ViT-bigG-14-laion2B-39B-b160k/open_clip_model.safetensors")
    config, *_ = convert(state, FAMILIES["openclip"], file=named, options=options)
    assert (config.image_width, config.heads) == (width, (heads,))


def test_another_resolution_keeps_a_window_that_fits():
    """7 tokens at 448 pixels: the window of the row, though not at this size of image."""
    state = swin_state()
    state |= {name: np.zeros((169, len(table[0]))) for name, table in state.items() if name.endswith(TABLE)}
    config, params, *_ = convert(state, FAMILIES["swin"], res=448, window=7)
    assert (config.res, config.window) == (448, 7)
    assert params["image"]["stage0_pair0"]["plain"]["attention"]["relative_position_bias_table"].shape == (169, 2)


def test_mismatches_are_listed_together():
    state = microsoft_extras(swin_state())
    del state["layers.0.blocks.1.mlp.fc2.bias"], state["norm.weight"]
    state["layers.0.blocks.0.attn.qkv.weight"] = np.zeros((24, 9))
    state[f"layers.1.blocks.1.{TABLE}"] = np.zeros((81, 4))
    state |= {"layers.0.blocks.0.attn.gate": np.zeros((2, 1, 1)), "layers.0.more": np.zeros(3)}
    with pytest.raises(UserError) as caught:
        convert(state, FAMILIES["swin"], res=64, window=4)
    message = str(caught.value)
    assert "--from=swin; 6 mismatches" in message
    for part in (
        ": layers.0.blocks.1.mlp.fc2.bias: missing, should be (8,)",
        "; norm.weight: missing, should be (16,)",
        "; layers.0.blocks.0.attn.gate: unknown, (2, 1, 1)",
        "; layers.0.more: unknown, (3,)",
        "; layers.0.blocks.0.attn.qkv.weight: (24, 9), should be (24, 8)",
        f"; layers.1.blocks.1.{TABLE}: (81, 4), should be (49, 4)",
    ):
        assert part in message


@pytest.mark.parametrize("family", ["swin", "unicl", "clip", "openclip"])
def test_another_networks_file(family):
    with pytest.raises(UserError, match=f"not a checkpoint of --from={family}.*conv1.weight"):
        convert({"conv1.weight": np.zeros((8, 3, 7, 7))}, FAMILIES[family])


def test_a_wrong_family_is_an_error():
    with pytest.raises(UserError, match="--from=clip"):
        convert(unicl_state(), FAMILIES["clip"])
    with pytest.raises(UserError, match="74 mismatches: ln_final.bias: unknown, .8,.; .* and 68 more"):
        convert(fill(clip_shapes(), 0.2) | swin_state(), FAMILIES["swin"])


def test_mistakes_on_the_command_line(tmp_path, capsys):
    save(swin_state(), tmp_path / "swin.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 64)
    good = f"--file={tmp_path}/swin.safetensors"
    for args, message in (
        (["--file=/nowhere.safetensors"], "no such file: /nowhere.safetensors"),
        ([f"--file={tmp_path}/bad.safetensors"], "not a safetensors file"),
        ([good, "--set", "text_heads"], "write NAME=VALUE"),
        ([good, "--set", "haeds=3"], "unknown model option haeds"),
        ([good, "--set", "heads=16"], "heads=16: must be whole numbers"),
        ([good, "--set", "text_causal=false"], "text_causal='false': must be True or False"),
        ([good, "--res=64", "--window=0"], "window=0: must be above 0"),
    ):
        assert run("--from=swin", f"--out={tmp_path}/out", *args) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"model\.json"):
        Encoder(str(tmp_path))


def test_published_swin_and_unicl_sizes():
    np.testing.assert_equal(parameter_count("Swin-T")["image"], 27_519_354)
    np.testing.assert_allclose(parameter_count("Swin-B")["image"], 86.74e6, rtol=1e-3)
    assert parameter_count("Swin-T")["total"] == 91_340_667
    assert parameter_count("Swin-B")["total"] == 150_695_609
    assert resolve_config("Swin-B", res=384).window == 12 and "Swin-B" in VARIANTS
