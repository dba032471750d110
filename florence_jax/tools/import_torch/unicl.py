"""UniCL and KLITE: Swin and CLIP's text transformer."""

from florence_jax.tools.import_torch.clip import TEXT_RULES, scalar_logit_scale, text_sizes
from florence_jax.tools.import_torch.family import Family
from florence_jax.tools.import_torch.swin import (
    SWIN_RULES,
    downsampling_before,
    resize_swin,
    swin_resolution,
    swin_sizes,
)

UNICL = Family(
    name="unicl",
    about="UniCL, KLITE",
    base="Swin-T",
    # UniCL's current names, its older ones (also ELEVATER's), and KLITE's.
    renames=(
        (r"(?:image_encoder|visual)\.", "image."),
        (r"(?:text_encoder|lang_encoder|text)\.", "text."),
        (r"(?:image|vision)_projection$", "image_projection"),
        (r"(?:text|lang)_projection$", "text_projection"),
    ),
    rules={"image": SWIN_RULES, "text": TEXT_RULES},
    sizes=lambda found: swin_sizes(found) | text_sizes(found),
    resolution=swin_resolution,
    resize=resize_swin,
    prepare=lambda state: scalar_logit_scale(downsampling_before(state)),
)
