"""Analytic FLOPs of a forward pass."""

from florence_jax.models.coswin import STAGE_CONV, embedded_size
from florence_jax.models.sizes import ModelConfig


def forward_flops(config: ModelConfig) -> dict[str, float]:
    """Floating point operations of one forward pass for one example, {'image': ..., 'text': ...}.

    Counts two per multiply-add of the convolutions, linear layers, attention products and projections; a training
    step is three times that, without rematerialisation. The image is `res` x `res`, the text `text_length` tokens.
    """
    return {"image": 2.0 * _image_macs(config), "text": 2.0 * _text_macs(config)}


def _block_macs(tokens: int, width: int, attended: int, mlp_ratio: float = 4) -> float:
    """qkv, output and MLP matrices, plus the two attention products over `attended` keys a query."""
    return tokens * ((4 + 2 * mlp_ratio) * width**2 + 2 * attended * width)


def _vit_macs(config: ModelConfig) -> float:
    patches = (config.res // config.patch_size) ** 2
    block = _block_macs(patches + 1, config.image_width, patches + 1, config.mlp_ratio)
    return config.image_width * (config.patch_size**2 * 3 * patches + config.projection) + config.depths[0] * block


def _embed_macs(config: ModelConfig, stage: int, side: int) -> int:
    """Of the embedding that makes the `side` x `side` map of `stage`."""
    width = config.image_width * 2**stage
    if config.embedding == "patch":
        return side**2 * (4 * (width // 2) if stage else 4**2 * 3) * width
    kernel = STAGE_CONV[min(stage, 1)][0]
    return side**2 * kernel**2 * (width // 2 if stage else 3) * width


def _image_macs(config: ModelConfig) -> float:
    if config.image_tower == "vit":
        return _vit_macs(config)
    macs, side, width = 0, config.res, config.image_width
    for i, depth in enumerate(config.depths):
        width = config.image_width * 2**i
        side = embedded_size(side, i, config.embedding)
        macs += _embed_macs(config, i, side)
        window = min(config.window, side) if config.size_mode == "classification" else config.window
        padded = -(-side // window) * window
        # Padding adds tokens to attention but not to the MLP.
        per_block = _block_macs(side**2, width, 0, config.mlp_ratio) + (padded**2 - side**2) * 4 * width**2
        macs += depth * (per_block + 2 * padded**2 * window**2 * width)
    return macs + width * config.projection


def _text_macs(config: ModelConfig) -> float:
    block = _block_macs(config.text_length, config.text_width, config.text_length)
    return config.text_layers * block + config.text_width * config.projection
