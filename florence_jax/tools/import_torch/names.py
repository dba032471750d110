"""Parameter names of public PyTorch checkpoints: every naming to one canonical form, and that form to ours.

Canonical names are those of the original releases under a tower's prefix: `image.` + Swin's (layers.0.blocks.0...) or
CLIP's visual tower (conv1, resblocks.0...), `text.` + CLIP's transformer (token_embedding, resblocks.0...), and
`image_projection`, `text_projection`, `logit_scale`.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

FAMILIES = ("swin", "unicl", "clip", "openclip")
# Buffers that follow from the sizes, and classifier heads, which the two towers do not have.
DROPPED = re.compile(
    r".*\b(relative_position_index|attn_mask|relative_coords_table|position_ids)|(image\.)?head(\.fc)?\.(weight|bias)"
    r"|input_resolution|context_length|vocab_size"
)
# (pattern, replacement) pairs; the first pattern that matches at the start of a name renames it.
_SWIN = ((r"", "image."),)
# UniCL's current names, its older ones (also ELEVATER's), and KLITE's.
_UNICL = (
    (r"(?:image_encoder|visual)\.", "image."),
    (r"(?:text_encoder|lang_encoder|text)\.", "text."),
    (r"(?:image|vision)_projection$", "image_projection"),
    (r"(?:text|lang)_projection$", "text_projection"),
)
_CLIP = (
    (r"visual\.proj$", "image_projection"),
    (r"visual\.(?:transformer\.)?", "image."),
    (r"(?:text\.)?text_projection$", "text_projection"),
    (r"(?:text\.)?transformer\.resblocks\.", "text.resblocks."),
    (r"(?:text\.)?(?=token_embedding\.|positional_embedding$|ln_final\.|attn_mask$)", "text."),
)
_RENAMES = {"swin": _SWIN, "unicl": _UNICL, "clip": _CLIP, "openclip": _CLIP}
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
# Our names to canonical ones. Transformer blocks first: both towers of CLIP use them.
_BLOCK = (
    (r"layer(\d+)/norm(\d)/", r"resblocks.\1.ln_\2."),
    (r"layer(\d+)/qkv/(?:kernel)", r"resblocks.\1.attn.in_proj_weight"),
    (r"layer(\d+)/qkv/bias", r"resblocks.\1.attn.in_proj_bias"),
    (r"layer(\d+)/proj/", r"resblocks.\1.attn.out_proj."),
    (r"layer(\d+)/mlp/fc1/", r"resblocks.\1.mlp.c_fc."),
    (r"layer(\d+)/mlp/fc2/", r"resblocks.\1.mlp.c_proj."),
)
_OURS = {
    "text": (
        *_BLOCK,
        (r"token_embedding", "token_embedding.weight"),
        (r"position_embedding", "positional_embedding"),
        (r"norm/", "ln_final."),
    ),
    "vit": (
        *_BLOCK,
        (r"patch_embed/", "conv1."),
        (r"position_embedding", "positional_embedding"),
        (r"norm_pre/", "ln_pre."),
        (r"norm/", "ln_post."),
    ),
    "swin": (
        (r"stage0_embed/(?=kernel|bias)", "patch_embed.proj."),
        (r"stage0_embed/norm/", "patch_embed.norm."),
        (r"(stage\d+)_pair(\d+)/(plain|shifted)/attention/", r"\1.pair\2.\3.attn."),
        (r"(stage\d+)_pair(\d+)/(plain|shifted)/", r"\1.pair\2.\3."),
    ),
}


def from_transformers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A CLIP of Hugging Face's transformers under OpenAI's names; any other state dict unchanged.

    Separate q, k and v become one `in_proj`; the projections are transposed to (width, dimension).
    """
    if not any(name.startswith("vision_model.") for name in state):
        return dict(state)
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


def canonical_names(state: Mapping[str, np.ndarray], family: str) -> dict[str, list[str]]:
    """{canonical name: names in the file} (more than one is a clash, for the caller to report).

    Names that no rule knows keep their own. timm's Swin counts a stage's downsampling with the following stage
    (`layers.1.downsample` where the original has `layers.0.downsample`); it is recognised by the last stage having one.
    """
    names: dict[str, list[str]] = {}
    for name in state:
        plain = re.sub(r"^(module\.)+", "", name)
        for pattern, replacement in _RENAMES[family]:
            if re.match(pattern, plain):
                plain = re.sub(rf"\A(?:{pattern})", replacement, plain, count=1)
                break
        names.setdefault(plain, []).append(name)
    stage = r"image\.layers\.(\d+)\."
    stages = {int(match[1]) for name in names if (match := re.match(stage + "blocks", name))}
    downsamples = {int(match[1]) for name in names if (match := re.match(stage + "downsample", name))}
    if not stages or max(stages) not in downsamples:
        return names
    return {
        re.sub(stage + "downsample", lambda m: f"image.layers.{int(m[1]) - 1}.downsample", name): found
        for name, found in names.items()
    }


def source_name(path: str, tower: str) -> str:
    """Canonical name of one of our unrolled parameters.

    Args:
      path: such as 'image/stage1_pair0/shifted/attention/qkv/kernel' or 'text/layer3/norm1/scale'.
      tower: the image tower, 'swin' or 'vit'.
    """
    if path.endswith("_projection/kernel"):
        return path.removesuffix("/kernel")
    prefix, slash, rest = path.partition("/")
    if not slash:  # logit_scale
        return path
    for pattern, replacement in _OURS["text" if prefix == "text" else tower]:
        if re.match(pattern, rest):
            rest = re.sub(rf"\A(?:{pattern})", replacement, rest, count=1)
            break
    # Swin counts blocks one by one, and a stage's downsampling with the stage before it.
    rest = re.sub(
        r"stage(\d+)\.pair(\d+)\.(plain|shifted)",
        lambda m: f"layers.{m[1]}.blocks.{2 * int(m[2]) + (m[3] == 'shifted')}",
        rest,
    )
    rest = re.sub(r"stage(\d+)_embed/", lambda m: f"layers.{int(m[1]) - 1}.downsample.", rest)
    rest = re.sub(r"(kernel|scale)$", "weight", rest.replace("/", "."))
    return f"{prefix}.{rest}"


def torch_shape(path: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape in PyTorch's layout of our parameter `path` of shape `shape`."""
    if not path.endswith("/kernel") or "_projection/" in path:  # CLIP multiplies by its projections from the right
        return tuple(shape)
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else tuple(reversed(shape))


def to_our_layout(path: str, value: np.ndarray) -> np.ndarray:
    """A PyTorch tensor in the layout of our parameter `path`: (out, in) -> (in, out), OIHW -> HWIO."""
    if not path.endswith("/kernel") or "_projection/" in path:
        return value
    return np.ascontiguousarray(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)
