"""UniCL and KLITE: Swin and CLIP's text transformer."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from florence_jax.tools.import_torch.clip import TEXT_RULES, text_sizes
from florence_jax.tools.import_torch.family import Family, Shapes, Told
from florence_jax.tools.import_torch.names import Renames, rename
from florence_jax.tools.import_torch.swin import (
    SWIN_RULES,
    downsampling_before,
    of_timm,
    resize_swin,
    swin_evaluation,
    swin_resolution,
    swin_sizes,
)

# UniCL's current names, its older ones (also ELEVATER's), and KLITE's.
UNICL_RENAMES: Renames = (
    (r"(?:image_encoder|visual)\.", "image."),
    (r"(?:text_encoder|lang_encoder|text)\.", "text."),
    (r"(?:image|vision)_projection$", "image_projection"),
    (r"(?:text|lang)_projection$", "text_projection"),
)
PUBLISHED_TEXT = {512: 8}  # heads by width of the text towers that were published


def unicl_naming(names: Collection[str]) -> Callable[[str], str]:
    """See `Family.naming`."""
    timm = of_timm(names)
    return lambda name: rename(downsampling_before(name) if timm else name, UNICL_RENAMES)


def unicl_sizes(found: Shapes) -> dict[str, Any]:
    """Fields of both towers. The text tower's activation is part of UniCL's and KLITE's code, and no option."""
    sizes: Mapping[str, Any] = text_sizes(found)
    heads = {"text_heads": PUBLISHED_TEXT[sizes["text_width"]]} if sizes["text_width"] in PUBLISHED_TEXT else {}
    return swin_sizes(found) | sizes | heads | {"text_activation": "quick_gelu"}


UNICL = Family(
    name="unicl",
    about="UniCL, KLITE",
    base="Swin-T",
    naming=unicl_naming,
    rules={"image": SWIN_RULES, "text": TEXT_RULES},
    sizes=unicl_sizes,
    resolution=swin_resolution,
    resize=resize_swin,
    anchors=(r"(?:image_encoder|visual)\.patch_embed\.proj\.weight",),
    told=lambda file, names: Told(),
    evaluation=swin_evaluation,
    asked=("text_heads",),
)
