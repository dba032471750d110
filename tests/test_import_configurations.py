"""What an import knows beside the tensors: configurations, names, prefixes; and what it refuses, by name."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from golden import clip_shapes, fill, swin_shapes
from safetensors.numpy import save_file

from florence_jax.data.ops.parse import parse_ops
from florence_jax.errors import UserError
from florence_jax.models.florence import build
from florence_jax.models.sizes import resolve_config
from florence_jax.params.weights import make_description, write_description
from florence_jax.tasks.encoder import Encoder, check_same_network, evaluation_ops
from florence_jax.tools.import_torch.__main__ import main
from florence_jax.tools.import_torch.convert import convert
from florence_jax.tools.import_torch.families import FAMILIES
from florence_jax.tools.import_torch.known import known_weights
from florence_jax.tools.import_torch.unwrap import unwrap

ASKED = dict(activation="quick_gelu", heads=(2,), text_heads=2)
VISION = dict(layers=3, width=16, patch_size=8, image_size=24, head_width=8)
TEXT = dict(layers=2, width=8, context_length=6, vocab_size=20, heads=2)
MODEL = dict(embed_dim=6, quick_gelu=True, vision_cfg=VISION, text_cfg=TEXT)
CLIP_CONFIG = {
    "model_type": "clip",
    "vision_config": {"hidden_act": "gelu", "num_attention_heads": 4, "image_size": 24, "layer_norm_eps": 1e-6},
    "text_config": {"hidden_act": "quick_gelu", "num_attention_heads": 2, "eos_token_id": 2, "vocab_size": 20},
}


def clip_state():
    return fill(clip_shapes(), 0.2)


def swin_state():
    return fill(swin_shapes(), 0.2)


def converted(tmp_path, state=None, family="clip", **files):
    """The result of a file beside which configurations lie: 'config' is config.json."""
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return convert(clip_state() if state is None else state, FAMILIES[family], file=tmp_path / "x.safetensors")


# -- OpenCLIP's configuration ---------------------------------------------------------------------------------------


def test_open_clip_configuration(tmp_path):
    pictures = dict(mean=[0.5] * 3, std=0.25, interpolation="bilinear", resize_mode="squash", size=[24, 24])
    found = converted(tmp_path, open_clip_config={"model_cfg": MODEL, "preprocess_cfg": pictures})
    config = found.config
    assert (config.heads, config.text_heads, config.image_activation) == ((2,), 2, "quick_gelu")
    assert (config.image_mean, config.image_std) == ((0.5,) * 3, (0.25,) * 3)
    assert evaluation_ops(found.evaluation, 24) == "decode|resize_exact(24, interpolation=bilinear)"
    assert found.notes == ["what tensors do not show is of open_clip_config.json"]


@pytest.mark.parametrize(
    "part,key,value",
    [
        ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "timm_model_name", "vit_base"),
        ("vision_cfg", "qk_norm", True),
        ("vision_cfg", "ls_init_value", 0.1),
        ("vision_cfg", "image_size", [24, 32]),
        ("vision_cfg", "new_key", 1),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "proj_bias", True),
        ("text_cfg", "embed_cls", True),
        ("text_cfg", "hf_tokenizer_name", "bert"),
        ("text_cfg", "tokenizer_kwargs", {"clean": "canonicalize"}),
        ("text_cfg", "act_kwargs", {"approximate": "tanh"}),  # not of quick GELU
        ("model_cfg", "multimodal_cfg", {"layers": 2}),
        ("preprocess_cfg", "resize_mode", "longest"),
        ("preprocess_cfg", "size", 32),
    ],
)
def test_keys_that_are_not_obeyed(part, key, value, tmp_path):
    content = {"model_cfg": MODEL | {"vision_cfg": dict(VISION), "text_cfg": dict(TEXT)}, "preprocess_cfg": {}}
    {**content, **content["model_cfg"]}[part][key] = value
    with pytest.raises(UserError) as caught:
        converted(tmp_path, open_clip_config=content)
    assert f"says {part}.{key}={json.dumps(value)}, which is not supported" in str(caught.value)


def test_a_configuration_of_other_weights(tmp_path):
    wrong = {"model_cfg": MODEL | {"text_cfg": TEXT | {"vocab_size": 49408}}}
    with pytest.raises(UserError, match="open_clip_config.json says vocab_size 49408, not 20 as the file has it"):
        converted(tmp_path, open_clip_config=wrong)


# -- transformers' and timm's -----------------------------------------------------------------------------------------


def test_configuration_of_a_clip_of_transformers(tmp_path):
    pictures = dict(image_mean=[0.4] * 3, image_std=[0.2] * 3, size={"shortest_edge": 32}, resample=2)
    pictures |= {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}}
    found = converted(tmp_path, config=CLIP_CONFIG, preprocessor_config=pictures)
    config = found.config
    assert (config.image_activation, config.text_activation, config.image_eps) == ("gelu", "quick_gelu", 1e-6)
    assert (config.heads, config.text_heads, config.image_mean) == ((4,), 2, (0.4,) * 3)
    ops = evaluation_ops(found.evaluation, 24)
    assert ops == "decode|resize(32, interpolation=bilinear)|center_crop(24)" and parse_ops(ops, {})
    twice = CLIP_CONFIG | {"vision_config_dict": {"num_attention_heads": 2}}  # whose defaults win, as in transformers
    config = converted(tmp_path, config=twice).config
    assert (config.image_activation, config.heads) == ("quick_gelu", (2,))
    for name, content, message in (
        ("config", {"model_type": "siglip"}, 'says model_type="siglip"'),
        ("preprocessor_config", pictures | {"crop_size": 20}, "says crop_size=20"),
        ("preprocessor_config", pictures | {"do_normalize": False}, "says do_normalize=false"),
        ("preprocessor_config", pictures | {"resample": 0}, "says resample=0"),
    ):
        with pytest.raises(UserError, match=message):
            converted(tmp_path, **{"config": CLIP_CONFIG, "preprocessor_config": pictures} | {name: content})


def transformers_swin(state):
    """Microsoft's names to those of transformers' SwinForImageClassification."""
    out = {"classifier.weight": np.zeros((3, 16))}
    stems = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "patch_embed.norm": "embeddings.norm",
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "attn.relative": "attention.self.relative", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    for name, value in state.items():
        renamed = {"norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias"}.get(name, name)
        for ours, theirs in stems.items():
            renamed = renamed.replace(ours, theirs)
        renamed = f"swin.encoder.{renamed}" if renamed.startswith("layers.") else f"swin.{renamed}"
        if "attn.qkv." in renamed:
            for part, values in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                out[renamed.replace("attn.qkv.", f"attention.self.{part}.")] = values
        else:
            out[renamed] = value
    return out


def test_swin_of_transformers(tmp_path):
    content = {"model_type": "swin", "image_size": 64, "window_size": 4, "embed_dim": 8, "num_heads": [2, 4]}
    files = dict(config=content, preprocessor_config={"size": 64, "resample": 3})
    found = converted(tmp_path, transformers_swin(swin_state()), "swin", **files)
    want = convert(swin_state(), FAMILIES["swin"], res=64, window=4)
    assert (found.config.res, found.config.window, found.config.image_mean) == (64, 4, (0.5,) * 3)
    jax.tree.map(np.testing.assert_array_equal, found.params, want.params)
    assert found.dropped == ["classifier.weight"] and "prefix 'swin.'" in found.notes[0]
    assert evaluation_ops(found.evaluation, 64) == "decode|resize_exact(64)"
    with pytest.raises(UserError, match="says hidden_act=.relu., which"):
        converted(tmp_path, swin_state(), "swin", config=content | {"hidden_act": "relu"})


def test_pictures_of_swin(tmp_path):
    """Microsoft's crop of 224 from 256 pixels, timm's from 248; the whole of 384; timm's config.json is obeyed."""

    def ops(state, **files):
        return evaluation_ops(converted(tmp_path, state, "swin", **files).evaluation, 224)

    timm = {name.replace("layers.0.downsample", "layers.1.downsample"): v for name, v in swin_state().items()}
    assert ops(swin_state()) == "decode|resize(256)|center_crop(224)"
    assert ops(timm) == "decode|resize(248)|center_crop(224)"
    large = convert(swin_state(), FAMILIES["swin"], res=384, window=12)
    assert evaluation_ops(large.evaluation, 384) == "decode|resize_exact(384)"
    known = {"architecture": "swin_tiny", "pretrained_cfg": {"crop_pct": 0.95, "input_size": [3, 64, 64]}}
    assert ops(timm, config=known) == "decode|resize(235)|center_crop(224)"
    with pytest.raises(UserError, match="architecture=.swinv2_tiny., which"):
        ops(timm, config={"architecture": "swinv2_tiny"})


def test_a_folder_says_how_its_pictures_are_made(tmp_path):
    """From the import to an evaluation, and to what is trained from it."""
    arrays = {name: np.array(value, np.float32, order="C") for name, value in swin_state().items()}
    save_file(arrays, tmp_path / "s.safetensors")
    command = [f"--file={tmp_path}/s.safetensors", f"--out={tmp_path}/out", "--res=64", "--window=4"]
    assert main(["--from=swin", *command]) == 0
    encoder = Encoder(str(tmp_path / "out"))
    assert encoder.eval_ops == "decode|resize(73)|center_crop(64)"
    assert encoder.towers_part()["evaluation"] == {"resize": "shorter", "crop": 0.875, "interpolation": "bicubic"}


# -- names and prefixes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,activation,ops",
    [
        ("ViT-B-32.pt", "quick_gelu", "resize(24)|center_crop(24)"),
        (
            "models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K/snapshots/0/open_clip_model.safetensors",
            "gelu",
            "resize(24)",
        ),
        ("vit_b_32-quickgelu-laion400m_e32-46683a32.pt", "quick_gelu", "resize(24)"),
        ("b32_fullcc2.5b.pt", "quick_gelu", "resize(24)"),
        ("vit_base_patch32_clip_224.laion400m_e32/open_clip_model.safetensors", "quick_gelu", "resize(24)"),
        ("vit_b_16-laion400m_e32-55e67d44.pt", "gelu", "resize(24)"),
        ("vit_huge_patch14_clip_224.metaclip_2pt5b/open_clip_model.safetensors", "quick_gelu", "resize(24)"),
        ("DFN5B-CLIP-ViT-H-14/open_clip_pytorch_model.bin", "quick_gelu", "resize_exact(24)"),
        ("DFN2B-CLIP-ViT-L-14-39B/open_clip_pytorch_model.bin", "gelu", "resize(24)"),
        ("CLIP-ViT-B-16-DataComp.XL-s13B-b90K/open_clip_model.safetensors", "gelu", "resize(24)"),
    ],
)
def test_published_names(name, activation, ops):
    found = known_weights(Path("/nowhere") / name)
    assert (found.fields["image_activation"], found.fields["text_activation"]) == (activation, activation)
    assert found.published and ops in evaluation_ops(found.evaluation, 24)


@pytest.mark.parametrize("name", ["model.pt", "vit_b_32.pt", "metaclip2_worldwide.pt", "datacomp/run/7.pt"])
def test_names_that_say_nothing(name):
    assert not known_weights(Path("/nowhere") / name).fields


def test_what_nobody_says_is_asked_for(tmp_path):
    named = convert(clip_state(), FAMILIES["clip"], file=tmp_path / "b32_400m.pt").config
    assert (named.heads, named.text_heads) == ((1,), 1)  # 64 channels a head, as published
    for family in ("clip", "openclip"):
        with pytest.raises(UserError) as caught:
            converted(tmp_path, family=family)
        message = str(caught.value)
        assert "tensors do not show image_activation, text_activation, heads, text_heads" in message
        assert "--set activation=quick_gelu (OpenAI's" in message and "--set 'heads=(1,)'" in message
    buffers = {name: np.int64(1) for name in ("input_resolution", "context_length", "vocab_size")}
    assert converted(tmp_path, clip_state() | buffers).config.image_activation == "quick_gelu"
    given = convert(clip_state(), FAMILIES["clip"], options=ASKED | {"text_activation": "gelu"}).config
    assert (given.image_activation, given.text_activation) == ("quick_gelu", "gelu")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "model.", "backbone.", "encoder.", "net.model."])
def test_prefixes(prefix):
    """Found by what follows them; what lies beside is left out, and listed."""
    state = {prefix + name: value for name, value in clip_state().items()} | {"head.0.weight": np.zeros(3)}
    found = unwrap(state, FAMILIES["clip"])
    assert (set(found.state), found.prefix, found.outside) == (set(clip_state()), prefix, ["head.0.weight"])


def test_several_networks_in_one_file():
    state = {prefix + name: value for prefix in ("student.", "teacher.") for name, value in swin_state().items()}
    with pytest.raises(UserError, match="several networks, 'student.', 'teacher.'"):
        convert(state, FAMILIES["swin"])


@pytest.mark.parametrize(
    "family,name,what",
    [
        ("swin", "layers.0.blocks.0.attn.logit_scale", "Swin V2"),
        ("swin", "layers.0.blocks.0.attn.cpb_mlp.0.weight", "Swin V2"),
        ("clip", "visual.layer1.0.conv1.weight", "CLIP with a ResNet"),
        ("clip", "vision_model.head.probe", "SigLIP"),
        ("openclip", "visual.trunk.attn_pool.latent", "SigLIP"),
        ("openclip", "visual.trunk.patch_embed.proj.weight", "image tower of timm"),
        ("openclip", "text_decoder.resblocks.0.ln_1.weight", "CoCa"),
        ("openclip", "text.transformer.embeddings.word_embeddings.weight", "RoBERTa"),
        ("openclip", "visual.transformer.resblocks.0.ls_1.gamma", "layer scale"),
    ],
)
def test_networks_that_are_refused_by_name(family, name, what):
    with pytest.raises(UserError) as caught:
        convert(clip_state() | {name: np.zeros((2, 2))}, FAMILIES[family])
    message = str(caught.value)
    assert what in message and name in message and "not supported" in message and len(message) < 300


def test_a_sigmoid_losss_bias_is_kept():
    found = convert(clip_state() | {"logit_bias": np.float32([-10])}, FAMILIES["openclip"], options=ASKED)
    assert found.config.logit_bias and np.asarray(found.params["logit_bias"]) == -10
    options = {name: found.config[name] for name in found.config if name != "variant"}
    params = jax.tree.map(np.asarray, found.params)
    out = jax.eval_shape(build(found.config.variant, **options).apply, params, {})
    assert set(out) == {"logit_scale", "logit_bias"}


def test_messages_use_the_names_of_the_file():
    tables = {name: value for name, value in swin_state().items() if not name.endswith("bias_table")}
    with pytest.raises(UserError, match="lacks layers.0.blocks.0.attn.relative_position_bias_table$"):
        convert(tables, FAMILIES["swin"])
    image = {name: value for name, value in clip_state().items() if name.startswith("visual.")}
    with pytest.raises(UserError, match="not a whole checkpoint of --from=clip: it lacks text_projection$"):
        convert(image, FAMILIES["clip"])
    state = {f"module.{name}": value for name, value in clip_state().items()}
    del state["module.visual.transformer.resblocks.1.ln_1.bias"]
    with pytest.raises(UserError, match="1 mismatches: visual.transformer.resblocks.1.ln_1.bias: missing"):
        convert(state, FAMILIES["clip"], options=ASKED)


def test_a_model_of_another_activation_does_not_start_from_weights(tmp_path):
    """What shapes do not show is compared where a configuration says the model, as in pretraining."""
    towers = {"variant": "ViT-B-32", "overrides": {"text_activation": "gelu", "heads": [24]}, "entries": ["image"]}
    write_description(str(tmp_path), make_description("import", {"towers": towers}))
    same = resolve_config("ViT-B-32", text_activation="gelu", heads=(24,), res=448, dtype="bfloat16")
    check_same_network(str(tmp_path), same)
    with pytest.raises(UserError) as caught:
        check_same_network(str(tmp_path), resolve_config("ViT-B-32"))
    message = str(caught.value)
    assert "heads is (24,), not (12,), text_activation is gelu, not quick_gelu: add " in message
    assert '--config.model.overrides.heads="(24,)" --config.model.overrides.text_activation="gelu"' in message
