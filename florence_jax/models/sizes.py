"""The sizes of a model: the table of variants, overrides, and what fits together."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

import jax.numpy as jnp

from florence_jax.errors import UserError
from florence_jax.models.coswin import EMBEDDINGS, check_stages, embedded_size
from florence_jax.models.layers import ACTIVATIONS, REMATS
from florence_jax.models.text import POOLINGS
from florence_jax.models.vit import check_patches
from florence_jax.models.window_attention import ATTENTIONS
from florence_jax.models.windows import SIZE_MODES, stage_window

IMAGE_TOWERS = ("coswin", "vit")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Mapping):
    """All sizes of a model, resolved; read as attributes or as a read-only mapping (`dict(config)` is JSON-able).

    Attributes (units: pixels, tokens, channels; see `CoSwin`, `ViT` and `TextTransformer` for the meaning of each):
      variant: row of `VARIANTS` it started from.
      res: side of the square training image in pixels.
      projection: dimension D of the joint space.
      image_tower: 'coswin' (Florence; also plain Swin, see `embedding`) or 'vit' (CLIP).
      image_width, depths, heads, mlp_ratio: either image tower; depths and heads have an entry per stage (ViT: one).
      window, embedding, drop_path, size_mode, mask_padding, out_stages: of CoSwin only.
      patch_size, image_activation, image_eps: of ViT only.
      image_mean, image_std: per channel, of a full-scale pixel: the normalisation the parameters were trained with.
      text_width, text_layers, text_heads, text_length, vocab_size, text_causal, text_pooling, text_eps,
      text_activation, text_pad_id, text_eot_id: text tower.
      logit_scale_init: initial exp(parameter); 1/0.07 as in CLIP.
      logit_bias: whether there is a bias of the logits, as of weights trained with a sigmoid loss (SigLIP).
      dtype: compute dtype; parameters are float32.
      remat: one of `REMATS`, what the backward pass recomputes. scan: scan over depth instead of unrolling.
      attention: of CoSwin, one of `window_attention.ATTENTIONS`.
    """

    variant: str
    res: int
    projection: int
    image_width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    text_width: int
    text_layers: int
    text_heads: int
    text_length: int
    vocab_size: int
    image_tower: str = "coswin"
    embedding: str = "conv"
    patch_size: int = 4
    image_activation: str = "gelu"
    image_eps: float = 1e-5
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of ImageNet
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    mlp_ratio: float = 4
    drop_path: float = 0.0
    size_mode: str = "classification"
    mask_padding: bool = False
    out_stages: tuple[int, ...] = (0, 1, 2, 3)
    text_causal: bool = True
    text_pooling: str = "eot"
    text_eps: float = 1e-5
    text_activation: str = "quick_gelu"
    text_pad_id: int = 0
    text_eot_id: int = 49407
    logit_scale_init: float = 1 / 0.07
    logit_bias: bool = False
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True
    attention: str = "xla"

    def __getitem__(self, name: str) -> Any:
        if name not in self._names():
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))


# What a value of each type of field looks like, for the message about one that does not.
VALUE_KINDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a word",
    tuple[int, ...]: "whole numbers, such as (2, 2, 6, 2)",
    tuple[float, ...]: "numbers, such as (0.5, 0.5, 0.5)",
}
# Fields whose numbers are above 0 (and the window of CoSwin: a ViT has 0).
POSITIVE = (
    "res", "projection", "image_width", "depths", "heads", "patch_size", "text_width", "text_layers", "text_heads",
    "text_length", "vocab_size", "mlp_ratio", "logit_scale_init", "image_eps", "text_eps",
)  # fmt: skip
# T to L: Swin's widths and depths with UniCL's text tower. H: Florence gives only 637M + 256M parameters; C=256 with
# depths (2,2,24,6) is the choice that also meets the compute published for this encoder (about 88 GMAC at 224 px), and
# width 1152 with a vocabulary of 56,320 is our choice for 12 layers and 256M (it covers CLIP's 49,408 ids). ti is ours:
# it trains on a laptop's CPU in minutes. Swin-*: plain Swin with UniCL's text tower, as in UniCL's released weights.
# ViT-*: OpenAI's CLIP (Radford et al. 2021, table 20), also the sizes of OpenCLIP's models of the same name, most of
# which use the exact GELU instead. `window_divisor`: window = res // window_divisor (7 at 224 px, 12 at 384 px).
_UNICL_TEXT = dict(
    text_width=512, text_layers=12, text_heads=8, text_length=76, vocab_size=49408, projection=512, res=224,
    window_divisor=32,
)  # fmt: skip
_SWIN = dict(_UNICL_TEXT, embedding="patch", text_length=77, text_eps=1e-12)
_CLIP = dict(
    image_tower="vit", image_activation="quick_gelu", image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711), res=224, window=0, text_length=77, vocab_size=49408,
)  # fmt: skip
_CLIP_B = dict(_CLIP, image_width=768, depths=(12,), text_width=512, text_layers=12, text_heads=8, projection=512)
_CLIP_L = dict(
    _CLIP, image_width=1024, depths=(24,), patch_size=14, text_width=768, text_layers=12, text_heads=12, projection=768
)
VARIANTS: dict[str, dict[str, Any]] = {
    "ti": dict(
        res=32, window_divisor=8, image_width=32, depths=(2, 2, 2, 2), text_width=128, text_layers=2, text_heads=4,
        text_length=32, vocab_size=2048, text_causal=False, text_pooling="mean", projection=128,
    ),
    "T": dict(_UNICL_TEXT, image_width=96, depths=(2, 2, 6, 2)),
    "S": dict(_UNICL_TEXT, image_width=96, depths=(2, 2, 18, 2)),
    "B": dict(_UNICL_TEXT, image_width=128, depths=(2, 2, 18, 2)),
    "L": dict(_UNICL_TEXT, image_width=192, depths=(2, 2, 18, 2)),
    "H": dict(
        _UNICL_TEXT, image_width=256, depths=(2, 2, 24, 6), text_width=1152, text_heads=18, vocab_size=56320,
        projection=1024,
    ),
    "Swin-T": dict(_SWIN, image_width=96, depths=(2, 2, 6, 2)),
    "Swin-B": dict(_SWIN, image_width=128, depths=(2, 2, 18, 2)),
    "ViT-B-32": dict(_CLIP_B, patch_size=32),
    "ViT-B-16": dict(_CLIP_B, patch_size=16),
    "ViT-L-14": _CLIP_L,
    "ViT-L-14-336": dict(_CLIP_L, res=336),
}  # fmt: skip


def resolve_config(variant: str, **overrides: Any) -> ModelConfig:
    """The sizes of `variant` with `overrides` applied; see `build`."""
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    known = [name for name in ModelConfig._names() if name != "variant"]
    if unknown := sorted(set(overrides) - set(known)):
        raise UserError(f"unknown model option {', '.join(unknown)}: known are {', '.join(known)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    _check_given(given)
    sizes = {**VARIANTS[variant], **given}
    divisor = sizes.pop("window_divisor", 32)
    sizes.setdefault("window", max(sizes["res"] // divisor, 1))
    widths = [sizes["image_width"] * 2**i for i in range(len(sizes["depths"]))]
    head_width = 64 if sizes.get("image_tower") == "vit" else 32
    sizes.setdefault("heads", [max(width // head_width, 1) for width in widths])
    sizes.setdefault("out_stages", range(len(widths)))
    for name in ("depths", "heads", "out_stages", *({"image_mean", "image_std"} & sizes.keys())):
        sizes[name] = tuple(sizes[name])
    if not isinstance(sizes.setdefault("dtype", "float32"), str):
        try:
            sizes["dtype"] = jnp.dtype(sizes["dtype"]).name
        except TypeError as error:
            raise UserError(f"dtype={sizes['dtype']!r}: choose one of {', '.join(DTYPES)}") from error
    config = ModelConfig(variant=variant, **sizes)
    _check(config)
    return config


def _check_given(given: Mapping[str, Any]) -> None:
    """Raises `UserError` for a field of another type, or a size that is not positive."""
    for field in dataclasses.fields(ModelConfig):
        if field.name not in given or field.name == "dtype":  # which may be a type of numpy or JAX
            continue
        value = given[field.name]
        if not _fits(value, field.type):
            raise UserError(f"{field.name}={value!r}: must be {VALUE_KINDS[field.type]}")
        numbers = value if isinstance(value, Collection) else (value,)
        if field.name in POSITIVE and not (len(numbers) and all(number > 0 for number in numbers)):
            raise UserError(f"{field.name}={value!r}: must be above 0")


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of a type of `VALUE_KINDS`; True is no number."""
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    (entry, _) = kind.__args__
    return isinstance(value, Collection) and not isinstance(value, str) and all(_fits(v, entry) for v in value)


def _check(config: ModelConfig) -> None:
    choices = dict(
        image_tower=IMAGE_TOWERS, embedding=EMBEDDINGS, image_activation=ACTIVATIONS, size_mode=SIZE_MODES,
        text_pooling=POOLINGS, text_activation=ACTIVATIONS, remat=REMATS, dtype=DTYPES, attention=ATTENTIONS,
    )  # fmt: skip
    for name, known in choices.items():
        if config[name] not in known:
            raise UserError(f"{name}={config[name]!r}: choose one of {', '.join(known)}")
    if not 0 <= config.drop_path < 1:
        raise UserError(f"drop_path={config.drop_path}: must be in [0, 1)")
    if config.text_width % config.text_heads:
        raise UserError(f"text_width={config.text_width} does not divide by text_heads={config.text_heads}")
    if len(config.image_mean) != 3 or len(config.image_std) != 3 or min(config.image_std) <= 0:
        raise UserError(f"image_mean={config.image_mean}, image_std={config.image_std}: give 3 values each, std > 0")
    if config.image_tower == "vit":
        _check_vit(config)
        return
    check_stages(config.image_width, config.depths, config.heads)
    if config.window < 1:
        raise UserError(f"window={config.window}: must be above 0")
    side = config.res
    for i in range(len(config.depths)):
        side = embedded_size(side, i, config.embedding)
        if side < 1:
            raise UserError(f"res={config.res}: no token is left of so small an image")
        try:
            stage_window(side, side, config.window, config.size_mode)
        except UserError as error:
            raise UserError(f"res={config.res}: {error}") from None


def _check_vit(config: ModelConfig) -> None:
    check_patches(config.res, config.patch_size)
    if len(config.depths) != 1 or len(config.heads) != 1 or config.image_width % config.heads[0]:
        raise UserError(
            f"depths={config.depths}, heads={config.heads}: image_tower='vit' has one stage, whose heads divide "
            f"image_width={config.image_width}"
        )
    if config.drop_path or config.size_mode != "classification":
        raise UserError("image_tower='vit' has no stochastic depth and no detection mode: drop_path=0, no size_mode")
