"""CLIP with a ViT: OpenAI's and OpenCLIP's files, and those in the naming of Hugging Face's transformers."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.resize import resize_position_embedding
from florence_jax.models.sizes import ModelConfig
from florence_jax.tools.import_torch.family import Family, Shapes, Told, evaluation
from florence_jax.tools.import_torch.known import known_weights
from florence_jax.tools.import_torch.names import Renames, rename, rename_all
from florence_jax.tools.import_torch.openclip import OPEN_CLIP_FILE, told_by_open_clip
from florence_jax.tools.import_torch.transformers import told_by_clip_config

# Channels of an image tower's head by the tower's width, where they are not 64: OpenCLIP's ViT-H, ViT-g and ViT-bigG.
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}
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
# Hugging Face's transformers: all of them, in order. Queries, keys and values are parts of one tensor.
_TRANSFORMERS: Renames = (
    (r"^vision_model\.encoder\.layers\.", "image.resblocks."),
    (r"^text_model\.encoder\.layers\.", "text.resblocks."),
    (r"^vision_model\.embeddings\.patch_embedding\.", "image.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "image.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "image.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "image.ln_post."),
    (r"^vision_model\.embeddings\.", "image."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "text.positional_embedding"),
    (r"^text_model\.embeddings\.", "text."),
    (r"^text_model\.final_layer_norm\.", "text.ln_final."),
    (r"^visual_projection\.weight$", "image_projection#T"),
    (r"^text_projection\.weight$", "text_projection#T"),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.q_proj\.(\w+)$", r".attn.in_proj_\1#0"),
    (r"\.self_attn\.k_proj\.(\w+)$", r".attn.in_proj_\1#1"),
    (r"\.self_attn\.v_proj\.(\w+)$", r".attn.in_proj_\1#2"),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
# Buffers of OpenAI's own archives, which its later code removes.
OPENAI_BUFFERS = {"input_resolution", "context_length", "vocab_size"}


def of_transformers(names: Collection[str]) -> bool:
    """Whether a CLIP has the names of Hugging Face's transformers."""
    return any(name.startswith("vision_model.") for name in names)


def clip_naming(names: Collection[str]) -> Callable[[str], str]:
    """See `Family.naming`."""
    if of_transformers(names):
        return functools.partial(rename_all, rules=_TRANSFORMERS)
    return functools.partial(rename, rules=CLIP_RENAMES)


def clip_told(file: Path, names: Collection[str]) -> Told:
    """What the configuration beside a CLIP says: that of its naming, else the other's; else the file's own name."""
    readers = [(OPEN_CLIP_FILE, told_by_open_clip), ("config.json", told_by_clip_config)]
    for name, read in reversed(readers) if of_transformers(names) else readers:
        if (path := file.with_name(name)).is_file():
            return read(path)
    if OPENAI_BUFFERS <= set(names):
        quick = dict(image_activation="quick_gelu", text_activation="quick_gelu")
        return Told("OpenAI's own archive", quick, published=True)
    return known_weights(file)


def text_sizes(found: Shapes) -> dict[str, Any]:
    """Fields of the text tower and of the joint space."""
    width, projection = found.vote(r"text_projection", tuple, 2)
    return dict(
        text_width=width,
        projection=projection,
        text_length=found.vote(r"text\.positional_embedding", lambda s: s[0], 2),
        text_layers=found.count(r"text\.resblocks\.(\d+)\..*"),
        vocab_size=found.vote(r"text\.token_embedding\.weight", lambda s: s[0], 2),
    )


def clip_sizes(found: Shapes) -> dict[str, Any]:
    """Fields of both towers."""
    width, patch = found.vote(r"image\.conv1\.weight", lambda s: (s[0], s[3]), 4)
    positions = found.vote(r"image\.positional_embedding", lambda s: s[0], 2)
    image = dict(
        image_width=width,
        patch_size=patch,
        depths=(found.count(r"image\.resblocks\.(\d+)\..*"),),
        mlp_ratio=found.vote(r"image\.resblocks\.\d+\.mlp\.c_fc\.weight", lambda s: s[0] / s[1], 2),
        res=round(max(positions - 1, 1) ** 0.5) * patch,
    )
    return image | text_sizes(found) | ({"logit_bias": True} if "logit_bias" in found else {})


def clip_heads(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The heads that OpenAI's and OpenCLIP's models of these widths have; what others have does not show."""
    width = sizes["image_width"]
    return {"heads": (max(width // HEAD_WIDTHS.get(width, 64), 1),), "text_heads": max(sizes["text_width"] // 64, 1)}


def vit_resolution(config: ModelConfig, res: int | None, window: int | None) -> dict[str, Any]:
    """A ViT has an image size and no window; raises `UserError` for one."""
    if window is not None:
        raise UserError("--window is for Swin; a ViT attends to the whole image")
    return {} if res is None else {"res": res}


def resize_vit(params: dict[str, Any], config: ModelConfig, target: ModelConfig) -> dict[str, Any]:
    """Position embeddings for the images of `target`."""
    if target.res == config.res:
        return params
    table = resize_position_embedding(
        np.asarray(params["image"]["position_embedding"]), target.res // target.patch_size
    )
    return params | {"image": params["image"] | {"position_embedding": table}}


CLIP = Family(
    name="clip",
    about="CLIP with a ViT: OpenAI's archives, OpenCLIP's files, transformers' CLIPModel",
    base="ViT-B-32",
    naming=clip_naming,
    rules={"image": VIT_RULES, "text": TEXT_RULES},
    sizes=clip_sizes,
    resolution=vit_resolution,
    resize=resize_vit,
    anchors=(r"visual\.conv1\.weight", r"vision_model\.embeddings\.patch_embedding\.weight"),
    told=clip_told,
    evaluation=lambda config, names: evaluation(),
    asked=("image_activation", "text_activation", "heads", "text_heads"),
    published=clip_heads,
)
OPENCLIP = dataclasses.replace(CLIP, name="openclip")
