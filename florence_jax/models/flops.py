"""Analytic FLOPs of a forward pass."""

import math
from collections.abc import Sequence

from florence_jax.models.coswin import STAGE_CONV, embedded_size
from florence_jax.models.sizes import ModelConfig


def forward_flops(config: ModelConfig) -> dict[str, float]:
    """Floating point operations of one forward pass for one example, {'image': ..., 'text': ...}.

    Counts two per multiply-add of the convolutions, linear layers, attention products and projections; a training
    step is three times that, without rematerialisation. The image is `res` x `res`, the text `text_length` tokens.
    """
    return {"image": image_flops(config, config.res, config.res), "text": 2.0 * _text_macs(config)}


def image_flops(config: ModelConfig, height: int, width: int) -> float:
    """Those of the image tower for a picture of height x width pixels; a ViT takes pictures of `config.res` alone."""
    return 2.0 * (_vit_macs(config) if config.image_tower == "vit" else _stages_macs(config, height, width))


def video_flops(
    config: ModelConfig, frames: int, tube: int, merge: int, windows: Sequence[Sequence[int]], side: int = 0
) -> float:
    """Those of the video tower for a clip of `frames` frames of `side` x `side` pixels, `config.res` by default.

    Args:
      config: of the image tower that it is made of.
      frames, tube, merge, windows: see `video_coswin.VideoCoSwin`.
    """
    macs, time = 0.0, -(-frames // tube)
    sides: tuple[int, ...] = (side or config.res,) * 2
    for i, depth in enumerate(config.depths):
        channels = config.image_width * 2**i
        sides = tuple(embedded_size(size, i, config.embedding) for size in sides)
        tokens = time * math.prod(sides)
        sliding = config.embedding == "conv" or not i
        macs += _embed_macs(config, i, tokens) * ((merge if i else tube) if sliding else 1)
        used = [min(size, limit) for size, limit in zip((time, *sides), windows[i], strict=True)]
        padded = math.prod(-(-size // limit) * limit for size, limit in zip((time, *sides), used, strict=True))
        per_block = block_macs(tokens, channels, 0, config.mlp_ratio) + (padded - tokens) * 4 * channels**2
        macs += depth * (per_block + 2 * padded * math.prod(used) * channels)
    return 2.0 * (macs + channels * config.projection)


def block_macs(tokens: int, width: int, attended: int, mlp_ratio: float = 4) -> float:
    """qkv, output and MLP matrices, plus the two attention products over `attended` keys a query."""
    return tokens * ((4 + 2 * mlp_ratio) * width**2 + 2 * attended * width)


def _vit_macs(config: ModelConfig) -> float:
    patches = (config.res // config.patch_size) ** 2
    block = block_macs(patches + 1, config.image_width, patches + 1, config.mlp_ratio)
    return config.image_width * (config.patch_size**2 * 3 * patches + config.projection) + config.depths[0] * block


def _embed_macs(config: ModelConfig, stage: int, tokens: int) -> int:
    """Of the embedding that makes the map of `stage`."""
    width = config.image_width * 2**stage
    if config.embedding == "patch":
        return tokens * (4 * (width // 2) if stage else 4**2 * 3) * width
    kernel = STAGE_CONV[min(stage, 1)][0]
    return tokens * kernel**2 * (width // 2 if stage else 3) * width


def _stages_macs(config: ModelConfig, *sides: int) -> float:
    macs, channels = 0.0, config.image_width
    for i, depth in enumerate(config.depths):
        channels = config.image_width * 2**i
        sides = tuple(embedded_size(side, i, config.embedding) for side in sides)
        tokens = math.prod(sides)
        macs += _embed_macs(config, i, tokens)
        window = min(config.window, *sides) if config.size_mode == "classification" else config.window
        padded = math.prod(-(-side // window) * window for side in sides)
        # Padding adds tokens to attention but not to the MLP.
        per_block = block_macs(tokens, channels, 0, config.mlp_ratio) + (padded - tokens) * 4 * channels**2
        macs += depth * (per_block + 2 * padded * window**2 * channels)
    return macs + channels * config.projection


def _text_macs(config: ModelConfig) -> float:
    block = block_macs(config.text_length, config.text_width, config.text_length)
    return config.text_layers * block + config.text_width * config.projection
