"""Imported weights against the modules that they are from, on random weights; where PyTorch and these are installed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from golden import sinx

from florence_jax.models.sizes import VARIANTS
from florence_jax.params.sharding import make_mesh
from florence_jax.tasks.encoder import Encoder
from florence_jax.tools.import_torch.__main__ import main
from florence_jax.tools.import_torch.known import known_weights

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")

VISION = dict(layers=2, width=32, patch_size=8, image_size=24, head_width=16)
TEXT = dict(layers=2, width=32, context_length=8, vocab_size=60, heads=4)
IMAGE = sinx(0.013, 2, 3, 24, 24)
IDS = np.array([[58, 5, 7, 59, 0, 0, 0, 0], [58, 3, 9, 11, 13, 15, 17, 59]])


def compare(folder, images, texts):
    """Features before they are made unit, of the imported folder and of the module."""
    encoder = Encoder(str(folder))
    params = encoder.load_on(make_mesh(-1, 1))
    batch = {"image": IMAGE.transpose(0, 2, 3, 1)} | ({} if texts is None else {"text": IDS.astype(np.int32)})
    out = jax.jit(encoder.model.apply)(params, batch)
    for name, want in (("image/embedding", images), ("text/embedding", texts)):
        if want is not None:
            want = want.detach().double().numpy()
            np.testing.assert_allclose(out[name], want / np.linalg.norm(want, axis=1, keepdims=True), atol=2e-5)
    return encoder, params


def make_wild(model):
    """Random weights large enough that every option shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim():
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize(
    "model,vision,text",
    [
        (dict(quick_gelu=True), {}, {}),
        (dict(custom_text=True, nonscalar_logit_scale=True, init_logit_bias=-10), {}, {}),
        ({}, dict(head_width=8, mlp_ratio=2.0, norm_kwargs={"eps": 0.1}), dict(heads=2, norm_kwargs={"eps": 0.1})),
        ({}, dict(act_kwargs={"approximate": "tanh"}), dict(act_kwargs={"approximate": "tanh"})),
        ({}, dict(pos_embed_type="sin_cos_2d", patch_dropout=0.5, block_type="custom"), dict(pool_type="first")),
        ({}, dict(final_ln_after_pool=True), dict(pool_type="eos", eos_id=7)),
    ],
)
def test_keys_of_open_clip(model, vision, text, tmp_path):
    """Each key that is obeyed gives what open_clip's own module gives."""
    config = dict(embed_dim=12, vision_cfg=VISION | vision, text_cfg=TEXT | text) | model
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    kind = open_clip.CustomTextCLIP if "custom_text" in config else open_clip.CLIP
    module = make_wild(kind(**arguments))
    torch.save(module.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    assert main(["--from=openclip", f"--file={tmp_path}/open_clip_pytorch_model.bin", f"--out={tmp_path}/out"]) == 0
    images, texts = module.encode_image(torch.tensor(IMAGE)), module.encode_text(torch.tensor(IDS))
    _, params = compare(tmp_path / "out", images, texts)
    if "init_logit_bias" in model:
        np.testing.assert_allclose(params["logit_bias"], module.logit_bias.item(), rtol=1e-6)


def test_published_names():
    """By its file's or repository's name each published ViT has the activation and pictures of open_clip's table."""
    from open_clip.pretrained import _PRETRAINED

    for architecture, tags in _PRETRAINED.items():
        if not architecture.startswith("ViT-"):
            continue
        for tag, published in tags.items():
            owner, _, repository = (published.get("hf_hub") or "").strip("/").partition("/")
            names = [f"models--{owner}--{repository}/snapshots/0/x.bin", f"{repository}/x.bin"] if repository else []
            names += [published["url"].split("/")[-1]] if published.get("url") else []
            for name in names:
                found = known_weights(Path("/nowhere") / name)
                if any(other in architecture for other in ("SigLIP", "CLIPA", "worldwide")):
                    assert not found.published, name
                    continue
                want = "quick_gelu" if published.get("quick_gelu") else "gelu"
                assert found.fields["image_activation"] == want, (architecture, tag, name)
                mean = found.fields.get("image_mean", VARIANTS["ViT-B-32"]["image_mean"])
                resize = {"shortest": "shorter", "squash": "squash"}[published["resize_mode"]]
                assert (tuple(mean), found.evaluation["resize"]) == (tuple(published["mean"]), resize), name


def test_position_embeddings_of_another_size(tmp_path):
    """Resized as open_clip does when it builds a model for larger, and for smaller, images."""
    from open_clip.model import resize_pos_embed

    small = make_wild(open_clip.CLIP(embed_dim=12, vision_cfg=VISION, text_cfg=TEXT))
    torch.save(small.state_dict(), tmp_path / "small.pt")
    for size in (40, 16):
        state = dict(small.state_dict())
        other = open_clip.CLIP(embed_dim=12, vision_cfg=VISION | {"image_size": size}, text_cfg=TEXT).eval()
        resize_pos_embed(state, other)
        other.load_state_dict(state)
        options = ["--set", "activation=gelu", "--set", "heads=(2,)", "--set", "text_heads=4"]
        out = tmp_path / str(size)
        assert main(["--from=openclip", f"--file={tmp_path}/small.pt", f"--out={out}", f"--res={size}", *options]) == 0
        encoder = Encoder(str(out))
        params = encoder.load_on(make_mesh(-1, 1))
        table = params["image"]["position_embedding"]
        np.testing.assert_allclose(table, other.visual.positional_embedding.detach(), atol=1e-5)


def test_clip_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    vision = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=24)
    text = dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
    vision |= dict(patch_size=8, hidden_act="gelu", layer_norm_eps=0.1)
    text |= dict(max_position_embeddings=8, eos_token_id=59, bos_token_id=58, hidden_act="gelu_new")
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    module = make_wild(transformers.CLIPModel(config))
    module.save_pretrained(tmp_path)
    assert main(["--from=clip", f"--file={tmp_path}/model.safetensors", f"--out={tmp_path}/out"]) == 0
    out = module(input_ids=torch.tensor(IDS), pixel_values=torch.tensor(IMAGE))
    compare(tmp_path / "out", out.image_embeds, out.text_embeds)


def test_swin_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4, num_labels=3
    )
    module = make_wild(transformers.SwinForImageClassification(config))
    module.save_pretrained(tmp_path)
    assert main(["--from=swin", f"--file={tmp_path}/model.safetensors", f"--out={tmp_path}/out"]) == 0
    encoder = Encoder(str(tmp_path / "out"))
    image = sinx(0.013, 1, 3, 64, 64)
    params = encoder.load_on(make_mesh(-1, 1))
    got = jax.jit(encoder.model.apply)(params, {"image": image.transpose(0, 2, 3, 1)})["image/pooled"]
    want = module.swin(torch.tensor(image)).pooler_output.detach()
    np.testing.assert_allclose(got, want, atol=2e-5)
