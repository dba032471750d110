"""Swin classifiers in Microsoft's, timm's or transformers' naming: the image tower alone."""

import functools
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from florence_jax.models.coswin import embedded_size
from florence_jax.models.resize import resize_bias_tables
from florence_jax.models.sizes import ModelConfig
from florence_jax.models.windows import stage_window
from florence_jax.tools.import_torch.family import Family, Shapes, Told, evaluation
from florence_jax.tools.import_torch.names import Renames, rename_all
from florence_jax.tools.import_torch.transformers import told_by_swin_config

WHOLE_FROM = 384  # pixels: models of this size are evaluated on whole pictures


def _block(match: re.Match[str]) -> str:
    """Swin counts the blocks of a stage one by one."""
    return f"layers.{match[1]}.blocks.{2 * int(match[2]) + (match[3] == 'shifted')}."


_PAIR = r"stage(\d+)_pair(\d+)/(plain|shifted)/"
SWIN_RULES: Renames = (
    (r"stage0_embed/(?=kernel|bias)", "patch_embed.proj."),
    (r"stage0_embed/norm/", "patch_embed.norm."),
    (_PAIR + "attention/", lambda match: _block(match) + "attn."),
    (_PAIR, _block),
    # It counts a stage's downsampling with the stage before.
    (r"stage(\d+)_embed/", lambda match: f"layers.{int(match[1]) - 1}.downsample."),
)


# Hugging Face's transformers: all of them, in order. Queries, keys and values are parts of one tensor.
_TRANSFORMERS: Renames = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.query\.(\w+)$", r".attn.qkv.\1#0"),
    (r"\.attention\.self\.key\.(\w+)$", r".attn.qkv.\1#1"),
    (r"\.attention\.self\.value\.(\w+)$", r".attn.qkv.\1#2"),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^", "image."),
)


def of_timm(names: Collection[str]) -> bool:
    """Whether a stage's downsampling is counted with the following stage, which shows in the last stage having one."""
    blocks, downsamples = (
        {int(match[1]) for name in names if (match := re.search(rf"\blayers\.(\d+)\.{part}\.", name))}
        for part in ("blocks", "downsample")
    )
    return bool(blocks) and max(blocks) in downsamples


def downsampling_before(name: str) -> str:
    """timm's name of a downsampling as Microsoft's, with the stage before; other names as they are."""
    return re.sub(r"(?<=\blayers\.)(\d+)(?=\.downsample\.)", lambda match: str(int(match[0]) - 1), name, count=1)


def swin_naming(names: Collection[str]) -> Callable[[str], str]:
    """See `Family.naming`."""
    if any(name.startswith("embeddings.patch_embeddings.") for name in names):
        return functools.partial(rename_all, rules=_TRANSFORMERS)
    timm = of_timm(names)
    return lambda name: "image." + (downsampling_before(name) if timm else name)


def swin_told(file: Path, names: Collection[str]) -> Told:
    """What the config.json of transformers or timm beside a file says, if there is one."""
    path = file.with_name("config.json")
    return told_by_swin_config(path) if path.is_file() else Told()


def swin_evaluation(config: ModelConfig, names: Collection[str]) -> dict[str, Any]:
    """Microsoft's (shorter side 8/7 of the crop; from 384 pixels on the whole picture) or timm's, by the naming."""
    whole = config.res >= WHOLE_FROM
    if of_timm(names):
        return evaluation(crop=1.0 if whole else 0.9)
    return evaluation("squash") if whole else evaluation(crop=7 / 8)


def swin_sizes(found: Shapes) -> dict[str, Any]:
    """Fields of the image tower."""
    stages = found.count(r"image\.layers\.(\d+)\.blocks\..*")
    table = r"image\.layers\.{}\.blocks\.\d+\.attn\.relative_position_bias_table"
    fc1 = r"image\.layers\.\d+\.blocks\.\d+\.mlp\.fc1\.weight"
    window = found.vote(table.format(r"\d+"), lambda s: (round(s[0] ** 0.5) + 1) // 2, 2)
    return dict(
        image_width=found.vote(r"image\.layers\.0\.blocks\.\d+\.norm\d\.weight", lambda s: s[0], 1),
        depths=tuple(found.count(rf"image\.layers\.{i}\.blocks\.(\d+)\..*") for i in range(stages)),
        heads=tuple(found.vote(table.format(i), lambda s: s[1], 2) for i in range(stages)),
        mlp_ratio=found.vote(fc1, lambda s: s[0] / s[1], 2),
        window=window,
        res=4 * 2 ** (stages - 1) * window,  # the last map is one window, as in all published models
    )


def swin_resolution(config: ModelConfig, res: int | None, window: int | None) -> dict[str, Any]:
    """Another image size brings the window res / 32, unless one is given."""
    if res is None and window is None:
        return {}
    res = config.res if res is None else res
    return {"res": res, "window": max(res // 32, 1) if window is None else window}


def resize_swin(params: dict[str, Any], config: ModelConfig, target: ModelConfig) -> dict[str, Any]:
    """Bias tables for the windows of `target`: in a stage with a smaller map, the side of that map."""
    side, windows = target.res, []
    for stage in range(len(target.depths)):
        side = embedded_size(side, stage, target.embedding)
        windows.append(stage_window(side, side, target.window, target.size_mode)[0])
    return params if set(windows) == {config.window} else resize_bias_tables(params, windows)


SWIN = Family(
    name="swin",
    about="Swin classifiers in Microsoft's, timm's or transformers' naming (only the image tower: there is no text)",
    base="Swin-T",
    naming=swin_naming,
    rules={"image": SWIN_RULES},
    sizes=swin_sizes,
    resolution=swin_resolution,
    resize=resize_swin,
    anchors=(r"patch_embed\.proj\.weight", r"embeddings\.patch_embeddings\.projection\.weight"),
    told=swin_told,
    evaluation=swin_evaluation,
    entries=("image",),
)
