"""OpenAI's CLIP with a ViT, as released or in the naming of Hugging Face's transformers."""

import re
from typing import Any

import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.resize import resize_position_embedding
from florence_jax.models.sizes import ModelConfig
from florence_jax.tools.import_torch.family import Family, Shapes, State
from florence_jax.tools.import_torch.names import Renames

# Width of an attention head by the width of the tower, where OpenCLIP's is not 64: its ViT-H, ViT-g and ViT-bigG.
VIT_HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104}
CLIP_RENAMES: Renames = (
    (r"visual\.proj$", "image_projection"),
    (r"visual\.(?:transformer\.)?", "image."),
    (r"(?:text\.)?text_projection$", "text_projection"),
    (r"(?:text\.)?transformer\.resblocks\.", "text.resblocks."),
    (r"(?:text\.)?(?=token_embedding\.|positional_embedding$|ln_final\.|attn_mask$)", "text."),
)
# The blocks of both towers.
_BLOCK: Renames = (
    (r"layer(\d+)/norm(\d)/", r"resblocks.\1.ln_\2."),
    (r"layer(\d+)/qkv/(?:kernel)", r"resblocks.\1.attn.in_proj_weight"),
    (r"layer(\d+)/qkv/bias", r"resblocks.\1.attn.in_proj_bias"),
    (r"layer(\d+)/proj/", r"resblocks.\1.attn.out_proj."),
    (r"layer(\d+)/mlp/fc1/", r"resblocks.\1.mlp.c_fc."),
    (r"layer(\d+)/mlp/fc2/", r"resblocks.\1.mlp.c_proj."),
    (r"position_embedding", "positional_embedding"),
)
TEXT_RULES: Renames = (*_BLOCK, (r"token_embedding", "token_embedding.weight"), (r"norm/", "ln_final."))
VIT_RULES: Renames = (
    *_BLOCK,
    (r"patch_embed/", "conv1."),
    (r"norm_pre/", "ln_pre."),
    (r"norm/", "ln_post."),
)
# Hugging Face's transformers, in the order applied; q, k and v are fused after that.
_TRANSFORMERS = (
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.embeddings\.", "visual."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.embeddings\.", ""),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def from_transformers(state: State) -> State:
    """A CLIP of Hugging Face's transformers under OpenAI's names; any other state dict unchanged.

    Separate q, k and v become one `in_proj`; the projections are transposed to (width, dimension).
    """
    if not any(name.startswith("vision_model.") for name in state):
        return state
    renamed = {}
    for name, value in state.items():
        if name in ("visual_projection.weight", "text_projection.weight") and np.ndim(value) == 2:
            name, value = name.replace("visual_projection", "visual.proj").removesuffix(".weight"), value.T
        for pattern, replacement in _TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    for name in [name for name in renamed if name.endswith((".q_proj.weight", ".q_proj.bias"))]:
        stem, _, kind = name.rpartition(".q_proj.")
        parts = [f"{stem}.{letter}_proj.{kind}" for letter in "qkv"]
        shapes = {np.shape(renamed[part]) for part in parts if part in renamed}
        if all(part in renamed for part in parts) and len(shapes) == 1:
            renamed[f"{stem}.in_proj_{kind}"] = np.concatenate([renamed.pop(part) for part in parts])
    return renamed


def scalar_logit_scale(state: State) -> State:
    """OpenCLIP has an option that makes `logit_scale` (1,); here it is ()."""
    if np.size(state.get("logit_scale", ())) != 1:
        return state
    return {**state, "logit_scale": np.reshape(state["logit_scale"], ())}


def text_sizes(found: Shapes) -> dict[str, Any]:
    """Fields of the text tower and of the joint space."""
    width, projection = found.vote(r"text_projection", tuple, 2)
    return dict(
        text_width=width,
        projection=projection,
        text_length=found.vote(r"text\.positional_embedding", lambda s: s[0], 2),
        text_layers=found.count(r"text\.resblocks\.(\d+)\..*"),
        text_heads=max(width // 64, 1),
        vocab_size=found.vote(r"text\.token_embedding\.weight", lambda s: s[0], 2),
        text_activation="quick_gelu",
    )


def clip_sizes(found: Shapes) -> dict[str, Any]:
    """Fields of both towers."""
    width, patch = found.vote(r"image\.conv1\.weight", lambda s: (s[0], s[3]), 4)
    positions = found.vote(r"image\.positional_embedding", lambda s: s[0], 2)
    image = dict(
        image_width=width,
        patch_size=patch,
        depths=(found.count(r"image\.resblocks\.(\d+)\..*"),),
        heads=(max(width // VIT_HEAD_WIDTH.get(width, 64), 1),),
        mlp_ratio=found.vote(r"image\.resblocks\.\d+\.mlp\.c_fc\.weight", lambda s: s[0] / s[1], 2),
        res=round(max(positions - 1, 1) ** 0.5) * patch,
        image_activation="quick_gelu",
    )
    return image | text_sizes(found)


def vit_resolution(config: ModelConfig, res: int | None, window: int | None) -> dict[str, Any]:
    """A ViT has an image size and no window; raises `UserError` for one."""
    if window is not None:
        raise UserError("--window is for Swin; a ViT attends to the whole image")
    return {} if res is None else {"res": res}


def resize_vit(params: dict[str, Any], config: ModelConfig, target: ModelConfig) -> dict[str, Any]:
    """Position embeddings for the images of `target`."""
    if target.res == config.res:
        return params
    table = resize_position_embedding(params["image"]["position_embedding"], target.res // target.patch_size)
    return params | {"image": params["image"] | {"position_embedding": table}}


CLIP = Family(
    name="clip",
    about="OpenAI's CLIP with a ViT, its TorchScript files or a state dict, or transformers' CLIPModel",
    base="ViT-B-32",
    renames=CLIP_RENAMES,
    rules={"image": VIT_RULES, "text": TEXT_RULES},
    sizes=clip_sizes,
    resolution=vit_resolution,
    resize=resize_vit,
    prepare=lambda state: scalar_logit_scale(from_transformers(state)),
)
