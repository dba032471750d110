"""Configurations of Hugging Face's transformers (and of timm) beside a file: config.json, preprocessor_config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from florence_jax.errors import UserError
from florence_jax.tools.import_torch.family import Told, evaluation
from florence_jax.tools.import_torch.openclip import eos_fields, refusal, square_side

_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_RESAMPLES = {2: "bilinear", 3: "bicubic"}
_WRONG_EOS = 2  # in configurations older than 2023-07; transformers then takes the largest id, as OpenAI's CLIP
# Defaults of transformers' CLIPVisionConfig, CLIPTextConfig: what is missing in a file has these values.
_CLIP_DEFAULTS: dict[str, dict[str, Any]] = {
    "vision": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12},
    "text": {
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 8, "eos_token_id": 49407,
        "vocab_size": 49408,
    },
}  # fmt: skip
_SWIN_LISTS = (("depths", "depths"), ("heads", "num_heads"))


def told_by_clip_config(path: Path) -> Told:
    """What the config.json of a CLIPModel says, and the preprocessor_config.json beside it.

    Raises:
      UserError: of another model, which is named; a key that is not obeyed, with its value.
    """

    def read(content: Mapping[str, Any]) -> Told:
        if content.get("model_type") != "clip":
            raise refusal(path, "model_type", content.get("model_type"))
        vision, text = _section(content, "vision"), _section(content, "text")
        fields: dict[str, Any] = dict(
            image_activation=_activation(path, "vision_config", vision),
            text_activation=_activation(path, "text_config", text),
            image_eps=vision["layer_norm_eps"],
            text_eps=text["layer_norm_eps"],
            heads=(vision["num_attention_heads"],),
            text_heads=text["num_attention_heads"],
        )
        if text["eos_token_id"] == _WRONG_EOS:
            fields["text_pooling"] = "eot"
        else:
            fields |= eos_fields(text["eos_token_id"], text["vocab_size"])
        names = {"image_width": "hidden_size", "patch_size": "patch_size", "res": "image_size"}
        shown = {ours: square_side(vision[theirs]) for ours, theirs in names.items() if theirs in vision}
        names = {"text_width": "hidden_size", "text_length": "max_position_embeddings", "vocab_size": "vocab_size"}
        shown |= {ours: text[theirs] for ours, theirs in names.items() if theirs in text}
        pictures, evaluated = _preprocessor(path, shown.get("res"), squash=False)
        return Told(path.name, fields | pictures, shown, evaluated)

    return _told(path, read)


def told_by_swin_config(path: Path) -> Told:
    """What the config.json of a Swin of transformers (with its preprocessor_config.json) or of timm says.

    Raises:
      UserError: of another model, which is named; a key that is not obeyed, with its value.
    """

    def read(content: Mapping[str, Any]) -> Told:
        if "pretrained_cfg" in content or "architecture" in content:
            return _timm(path, content)
        if content.get("model_type") != "swin":
            raise refusal(path, "model_type", content.get("model_type"))
        for key, only in (
            ("hidden_act", "gelu"), ("layer_norm_eps", 1e-5), ("qkv_bias", True), ("use_absolute_embeddings", False),
            ("patch_size", 4),
        ):  # fmt: skip
            if square_side(content.get(key, only)) != only:
                raise refusal(path, key, content[key])
        fields = {"res": square_side(content.get("image_size", 224)), "window": content.get("window_size", 7)}
        shown: dict[str, Any] = {name: tuple(content[theirs]) for name, theirs in _SWIN_LISTS if theirs in content}
        if "embed_dim" in content:
            shown["image_width"] = content["embed_dim"]
        pictures, evaluated = _preprocessor(path, fields["res"], squash=True)
        return Told(path.name, fields | pictures, shown, evaluated)

    return _told(path, read)


def _told(path: Path, read: Any) -> Told:
    try:
        return read(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no configuration of these weights: {error!r}; correct it or move it away"
        ) from error


def _section(content: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Older files hold a section twice; in transformers the second, with the defaults of what it lacks, wins."""
    found = _CLIP_DEFAULTS[part] | (content.get(f"{part}_config") or {})
    second = content.get(f"{part}_config_dict")
    return found if second is None else found | _CLIP_DEFAULTS[part] | second


def _activation(path: Path, part: str, section: Mapping[str, Any]) -> str:
    if section["hidden_act"] not in _ACTIVATIONS:
        raise refusal(path, f"{part}.hidden_act", section["hidden_act"])
    return _ACTIVATIONS[section["hidden_act"]]


def _timm(path: Path, content: Mapping[str, Any]) -> Told:
    if not str(content.get("architecture")).startswith("swin_"):
        raise refusal(path, "architecture", content.get("architecture"))
    pretrained = content.get("pretrained_cfg") or {}
    if pretrained.get("crop_mode", "center") not in ("center", "squash"):
        raise refusal(path, "pretrained_cfg.crop_mode", pretrained["crop_mode"])
    fields: dict[str, Any] = {f"image_{key}": tuple(pretrained[key]) for key in ("mean", "std") if key in pretrained}
    if "input_size" in pretrained:
        fields["res"] = pretrained["input_size"][-1]
    if pretrained.get("interpolation", "bicubic") not in ("bicubic", "bilinear"):
        raise refusal(path, "pretrained_cfg.interpolation", pretrained["interpolation"])
    squash = pretrained.get("crop_mode") == "squash"
    crop, kernel = pretrained.get("crop_pct", 0.9), pretrained.get("interpolation", "bicubic")
    return Told(path.name, fields, evaluation=evaluation("squash" if squash else "shorter", crop, kernel))


def _preprocessor(config: Path, res: int | None, squash: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the model, and how pictures are made, from the preprocessor_config.json beside `config`, if any.

    `squash`: whether a `size` that is one number is both sides (ViTImageProcessor), not the shorter one (CLIP's).
    """
    path = config.with_name("preprocessor_config.json")
    if not path.is_file():
        return {}, {}
    content = json.loads(path.read_text())
    for key in ("do_resize", "do_normalize", "do_rescale"):
        if not content.get(key, True):
            raise refusal(path, key, content[key])
    if abs(content.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise refusal(path, "rescale_factor", content["rescale_factor"])
    size, crop = content.get("size", res), content.get("crop_size", res)
    if isinstance(size, dict):
        squash = "shortest_edge" not in size
        size = square_side([size.get("height"), size.get("width")]) if squash else size["shortest_edge"]
    if isinstance(crop, dict):
        crop = square_side([crop.get("height"), crop.get("width")])
    cropped = content.get("do_center_crop", not squash)
    if not isinstance(size, int) or (squash and res not in (None, size)) or not (squash or cropped):
        raise refusal(path, "size", content.get("size"))
    if cropped and crop not in ((size,) if squash else (res or crop,)):
        raise refusal(path, "crop_size", content.get("crop_size"))
    resample = content.get("resample", 2 if squash else 3)
    if resample not in _RESAMPLES:
        raise refusal(path, "resample", resample)
    fields = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)} if squash else {}  # transformers' defaults
    fields |= {key: tuple(content[key]) for key in ("image_mean", "image_std") if key in content}
    return fields, evaluation("squash" if squash else "shorter", 1.0 if squash else crop / size, _RESAMPLES[resample])
