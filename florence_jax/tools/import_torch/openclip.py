"""OpenCLIP's configuration beside a file: each of its keys is obeyed, or refused with its name and value."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from florence_jax.errors import UserError
from florence_jax.tools.import_torch.family import Told, evaluation

OPEN_CLIP_FILE = "open_clip_config.json"
# Keys that change nothing of an embedding: how weights are drawn, trained, named or returned; those of `timm_*` and
# `attn_pooler_*` follow keys that are refused.
_NO_MATTER = {
    "model_cfg": {"custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "output_dict"},
    "vision_cfg": {
        "patch_dropout", "output_tokens", "pos_embed_type", "attn_pooler_queries", "attn_pooler_heads", "mlp_ratio",
        "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
    },
    "text_cfg": {"output_tokens", "pad_id", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
}  # fmt: skip
# Keys that are obeyed where they have one of these values, with which they change nothing, and are refused otherwise.
_PLAIN = dict.fromkeys(
    ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), (False,)
) | {"block_type": (None, "default", "custom"), "ls_init_value": (None,)}
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "model_cfg": {"multimodal_cfg": (None,)},
    "vision_cfg": _PLAIN
    | {"attentional_pool": (False,), "no_ln_pre": (False,), "pool_type": ("tok",), "timm_model_name": (None,)},
    "text_cfg": _PLAIN
    | {
        "embed_cls": (False,), "no_causal_mask": (False,), "proj_bias": (False,), "proj_type": ("linear",),
        "mlp_ratio": (4,), "hf_model_name": (None,), "hf_tokenizer_name": (None,), "tokenizer_mode": (None,),
        "tokenizer_kwargs": (None, {}),
    },
}  # fmt: skip
# Keys that are obeyed, and what the shapes must show of them.
_READ = {
    "model_cfg": {"embed_dim": "projection", "vision_cfg": "", "text_cfg": "", "quick_gelu": ""},
    "vision_cfg": {
        "layers": "depths", "width": "image_width", "patch_size": "patch_size", "image_size": "res", "head_width": "",
        "act_kwargs": "", "norm_kwargs": "", "final_ln_after_pool": "",
    },
    "text_cfg": {
        "layers": "text_layers", "width": "text_width", "context_length": "text_length", "vocab_size": "vocab_size",
        "heads": "", "pool_type": "", "eos_id": "", "act_kwargs": "", "norm_kwargs": "", "final_ln_after_pool": "",
    },
}  # fmt: skip
# OpenCLIP's defaults of the keys that shapes do not show.
_WIDTH, _HEAD_WIDTH, _TEXT_HEADS, _EOS_ID, _VOCABULARY = 768, 64, 8, 2, 49408
_POOLINGS = {"argmax": "eot", "first": "first", "eos": "eos"}
_RESIZES = {"shortest": "shorter", "squash": "squash"}


def told_by_open_clip(path: Path) -> Told:
    """What an `open_clip_config.json` says.

    Raises:
      UserError: a file that is not such a configuration, or a key that is not obeyed, with its value.
    """
    try:
        content = json.loads(path.read_text())
        model, pictures = content["model_cfg"], content.get("preprocess_cfg") or {}
        sections = {"model_cfg": model, "vision_cfg": model["vision_cfg"], "text_cfg": model["text_cfg"]}
        shown: dict[str, Any] = {}
        for name, section in sections.items():
            shown |= _shown(path, name, dict(section))
        fields = _fields(path, model) | _statistics(path, pictures)
        size = pictures.get("size", shown.get("res"))
        if "res" in shown and square_side(size) != shown["res"]:
            raise refusal(path, "preprocess_cfg.size", size)
        return Told(path.name, fields, shown, _evaluation(path, pictures))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a configuration of OpenCLIP: {error!r}; correct it or move it away") from error


def refusal(path: Path, key: str, value: Any) -> UserError:
    """The error for a key of a configuration that is not obeyed."""
    return UserError(f"{path} says {key}={json.dumps(value)}, which is not supported here: the numbers would differ")


def square_side(size: Any) -> Any:
    """A size of a square, which configurations also give as [side, side]."""
    return size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size


def _shown(path: Path, name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """What shapes must show of a section; raises `UserError` for keys that are not obeyed."""
    shown = {}
    for key, value in section.items():
        field = _READ[name].get(key)
        allowed = _ONLY[name].get(key)
        if field is None and key not in _NO_MATTER[name] and (allowed is None or value not in allowed):
            raise refusal(path, f"{name}.{key}", value)
        if field:
            shown[field] = (value,) if field == "depths" else square_side(value)
            if not isinstance(square_side(value), int):
                raise refusal(path, f"{name}.{key}", value)
    return shown


def _fields(path: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    vision, text = model["vision_cfg"], model["text_cfg"]
    quick = bool(model.get("quick_gelu"))
    fields: dict[str, Any] = dict(
        image_activation=_activation(path, "vision_cfg", vision, quick),
        text_activation=_activation(path, "text_cfg", text, quick),
        image_eps=_eps(path, "vision_cfg", vision),
        text_eps=_eps(path, "text_cfg", text),
        heads=(vision.get("width", _WIDTH) // vision.get("head_width", _HEAD_WIDTH),),
        text_heads=text.get("heads", _TEXT_HEADS),
    )
    pooling = text.get("pool_type", "argmax")
    if pooling not in _POOLINGS:
        raise refusal(path, "text_cfg.pool_type", pooling)
    if _POOLINGS[pooling] != "eos":
        return fields | {"text_pooling": _POOLINGS[pooling]}
    return fields | eos_fields(text.get("eos_id", _EOS_ID), text.get("vocab_size", _VOCABULARY))


def eos_fields(eos: int, vocabulary: int) -> dict[str, Any]:
    """Pooling at the first token `eos`; as CLIP's at the largest id, where that is the last of the vocabulary."""
    return {"text_pooling": "eot"} if eos == vocabulary - 1 else {"text_pooling": "eos", "text_eot_id": eos}


def _activation(path: Path, name: str, section: Mapping[str, Any], quick: bool) -> str:
    given = section.get("act_kwargs")
    if given in (None, {}):
        return "quick_gelu" if quick else "gelu"
    if quick or given not in ({"approximate": "tanh"}, {"approximate": "none"}):
        raise refusal(path, f"{name}.act_kwargs", given)
    return "gelu_tanh" if given["approximate"] == "tanh" else "gelu"


def _eps(path: Path, name: str, section: Mapping[str, Any]) -> float:
    given = section.get("norm_kwargs") or {}
    if set(given) - {"eps"}:
        raise refusal(path, f"{name}.norm_kwargs", given)
    return float(given.get("eps", 1e-5))


def _statistics(path: Path, pictures: Mapping[str, Any]) -> dict[str, Any]:
    fields = {}
    for ours, theirs in (("image_mean", "mean"), ("image_std", "std")):
        if pictures.get(theirs) is not None:
            value = pictures[theirs]
            fields[ours] = tuple(map(float, value)) if isinstance(value, list) else (float(value),) * 3
    if pictures.get("mode", "RGB") != "RGB":
        raise refusal(path, "preprocess_cfg.mode", pictures["mode"])
    return fields


def _evaluation(path: Path, pictures: Mapping[str, Any]) -> dict[str, Any]:
    """`fill_color` only matters for what is refused here; OpenCLIP ignores keys that it does not know."""
    resize, interpolation = pictures.get("resize_mode") or "shortest", pictures.get("interpolation") or "bicubic"
    if resize not in _RESIZES:
        raise refusal(path, "preprocess_cfg.resize_mode", resize)
    if interpolation not in ("bicubic", "bilinear", "random"):
        raise refusal(path, "preprocess_cfg.interpolation", interpolation)
    return evaluation(_RESIZES[resize], interpolation="bilinear" if interpolation == "bilinear" else "bicubic")
