"""OpenCLIP's ViT models: CLIP with the exact GELU, and a configuration beside the file."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from florence_jax.errors import UserError
from florence_jax.tools.import_torch.clip import CLIP, clip_sizes
from florence_jax.tools.import_torch.family import Shapes


def openclip_sizes(found: Shapes) -> dict[str, Any]:
    """Fields of both towers."""
    return clip_sizes(found) | dict(image_activation="gelu", text_activation="gelu")


def open_clip_options(file: Path) -> dict[str, Any]:
    """What an `open_clip_config.json` beside `file` says and shapes do not: {} if there is none.

    Raises:
      UserError: a file that is not such a configuration.
    """
    path = file.with_name("open_clip_config.json")
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        model, preprocess = content["model_cfg"], content.get("preprocess_cfg", {})
        vision, text = model["vision_cfg"], model["text_cfg"]
        activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
        options: dict[str, Any] = dict(image_activation=activation, text_activation=activation)
        if "width" in vision and "head_width" in vision:
            options["heads"] = (vision["width"] // vision["head_width"],)
        if "heads" in text:
            options["text_heads"] = text["heads"]
        for ours, theirs in (("image_mean", "mean"), ("image_std", "std")):
            if theirs in preprocess:
                options[ours] = tuple(preprocess[theirs])
        return options
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a configuration of OpenCLIP: {error!r}; correct it or move it away") from error


OPENCLIP = dataclasses.replace(
    CLIP,
    name="openclip",
    about="OpenCLIP's ViT models; an open_clip_config.json beside the file is read for what weights do not show",
    sizes=openclip_sizes,
    options=open_clip_options,
)
