"""The table of families. A new one is a file with its `Family`, and a line here."""

from florence_jax.tools.import_torch.clip import CLIP, OPENCLIP
from florence_jax.tools.import_torch.dyhead import DYHEAD_FAMILY
from florence_jax.tools.import_torch.family import Family
from florence_jax.tools.import_torch.glip import GLIP_FAMILY
from florence_jax.tools.import_torch.meter import METER_FAMILY
from florence_jax.tools.import_torch.mmdet import MMDET_FAMILY
from florence_jax.tools.import_torch.roberta import ROBERTA_FAMILY
from florence_jax.tools.import_torch.swin import SWIN
from florence_jax.tools.import_torch.unicl import UNICL
from florence_jax.tools.import_torch.video_swin import SWIN3D, VIDEO_SWIN

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        SWIN,
        UNICL,
        CLIP,
        OPENCLIP,
        DYHEAD_FAMILY,
        GLIP_FAMILY,
        MMDET_FAMILY,
        METER_FAMILY,
        ROBERTA_FAMILY,
        VIDEO_SWIN,
        SWIN3D,
    )  # fmt: skip
}
