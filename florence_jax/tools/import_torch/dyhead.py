"""DyHead's detectors (Dai et al. 2021) with ATSS's predictions, as detectron2 stores them."""

from florence_jax.tools.import_torch.detectors import block_renames, detector_family, naming_by
from florence_jax.tools.import_torch.names import Renames

# The parts of a block in the authors' code, which GLIP took over.
BLOCK_PARTS = {
    r"DyConv\.0\.conv": "coarser",
    r"DyConv\.1\.conv": "same",
    r"DyConv\.2\.conv": "finer",
    r"DyConv\.0\.bn": "coarser.norm",
    r"DyConv\.1\.bn": "same.norm",
    r"DyConv\.2\.bn": "finer.norm",
    r"AttnConv\.1": "scale_attention",
    r"relu\.fc\.0": "dyrelu.fc1",
    r"relu\.fc\.2": "dyrelu.fc2",
}


def prediction_renames(prefix: str) -> Renames:
    """Names of the predictions below `prefix`, a pattern; those of the authors' code and of GLIP."""
    return (
        (rf"^{prefix}cls_logits\.", "detector.class_logits."),
        (rf"^{prefix}bbox_pred\.", "detector.box_deltas."),
        (rf"^{prefix}centerness\.", "detector.centerness."),
        (rf"^{prefix}scales\.(\d+)\.scale$", r"detector.scales.weight#\1"),
    )


_FPN = r"^backbone\.(?:backbone\.)?"  # the blocks are around the pyramid, in a module of their own
_RENAMES: Renames = (
    (_FPN + r"bottom_up\.", "image."),
    (_FPN + r"fpn_(lateral|output)(\d)\.", r"detector.pyramid.\1\2."),
    (_FPN + r"top_block\.(p[67])\.", r"detector.pyramid.\1."),
    (r"^backbone\.dyhead_tower\.(\d+)\.", r"detector.block\1."),
    *prediction_renames(r"head\."),
    *block_renames(r"detector\.block", BLOCK_PARTS),
)


DYHEAD_FAMILY = detector_family(
    name="dyhead",
    about="DyHead's one-stage detectors on Swin (microsoft/DynamicHead, detectron2's names)",
    naming=naming_by(_RENAMES),
    anchors=(r"backbone\.(?:backbone\.)?bottom_up\.patch_embed\.proj\.weight",),
    sides=(800, 1333),
    dropped=r"anchor_generator\.cell_anchors\.\d+",
    head=dict(coarse="flat", padding="published"),
)
