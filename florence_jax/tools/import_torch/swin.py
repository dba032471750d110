"""Swin classifiers in Microsoft's or timm's naming: the image tower alone."""

import re
from typing import Any

from florence_jax.models.coswin import embedded_size
from florence_jax.models.resize import resize_bias_tables
from florence_jax.models.sizes import ModelConfig
from florence_jax.models.windows import stage_window
from florence_jax.tools.import_torch.family import Family, Shapes, State
from florence_jax.tools.import_torch.names import Renames


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


def downsampling_before(state: State) -> State:
    """timm counts a stage's downsampling with the following stage, which shows in the last stage having one."""
    pattern = r"(.*\blayers\.|layers\.)(\d+)\.{}\..*"
    blocks, downsamples = (
        {int(match[2]) for name in state if (match := re.fullmatch(pattern.format(part), name))}
        for part in ("blocks", "downsample")
    )
    if not blocks or max(blocks) not in downsamples:
        return state

    def original(name: str) -> str:
        return re.sub(r"(?<=\blayers\.)(\d+)(?=\.downsample\.)", lambda match: str(int(match[0]) - 1), name, count=1)

    return {original(name): value for name, value in state.items()}


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
    about="Swin classifiers in Microsoft's or timm's naming (only the image tower: there is no text)",
    base="Swin-T",
    renames=((r"", "image."),),
    rules={"image": SWIN_RULES},
    sizes=swin_sizes,
    resolution=swin_resolution,
    resize=resize_swin,
    prepare=downsampling_before,
    entries=("image",),
)
