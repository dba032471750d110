"""mmdetection's ATSS with a DyHead neck on Swin."""

from florence_jax.tools.import_torch.detectors import block_renames, detector_family, naming_by
from florence_jax.tools.import_torch.names import Renames

_BLOCK_PARTS = {
    r"spatial_conv_high\.conv": "coarser",
    r"spatial_conv_mid\.conv": "same",
    r"spatial_conv_low\.conv": "finer",
    r"spatial_conv_high\.norm": "coarser.norm",
    r"spatial_conv_mid\.norm": "same.norm",
    r"spatial_conv_low\.norm": "finer.norm",
    r"spatial_conv_offset": "offset",
    r"scale_attn_module\.1": "scale_attention",
    r"task_attn_module\.conv1\.conv": "dyrelu.fc1",
    r"task_attn_module\.conv2\.conv": "dyrelu.fc2",
}
_COARSEST = {"3": "p6", "4": "p7"}
_RENAMES: Renames = (
    (r"^backbone\.patch_embed\.projection\.", "image.patch_embed.proj."),
    (r"^(backbone\.stages\.\d+\.downsample\..*)$", r"\1#unfold"),
    (r"^backbone\.stages\.", "image.layers."),
    (r"^backbone\.", "image."),
    (r"^(image\..*\.attn)\.w_msa\.", r"\1."),
    (r"^(image\..*)\.ffn\.layers\.0\.0\.", r"\1.mlp.fc1."),
    (r"^(image\..*)\.ffn\.layers\.1\.", r"\1.mlp.fc2."),
    (r"^neck\.0\.lateral_convs\.(\d)\.conv\.", lambda match: f"detector.pyramid.lateral{int(match[1]) + 3}."),
    (r"^neck\.0\.fpn_convs\.([012])\.conv\.", lambda match: f"detector.pyramid.output{int(match[1]) + 3}."),
    (r"^neck\.0\.fpn_convs\.([34])\.conv\.", lambda match: f"detector.pyramid.{_COARSEST[match[1]]}."),
    (r"^neck\.1\.dyhead_blocks\.(\d+)\.", r"detector.block\1."),
    *block_renames(r"detector\.block", _BLOCK_PARTS),
    (r"^bbox_head\.atss_cls\.", "detector.class_logits."),
    (r"^bbox_head\.atss_reg\.", "detector.box_deltas."),
    (r"^bbox_head\.atss_centerness\.", "detector.centerness."),
    (r"^bbox_head\.scales\.(\d+)\.scale$", r"detector.scales.weight#\1"),
)


MMDET_FAMILY = detector_family(
    name="mmdet",
    about="mmdetection's ATSS with DyHead on Swin",
    naming=naming_by(_RENAMES),
    anchors=(r"backbone\.patch_embed\.projection\.weight",),
    sides=(1200, 2000),
    absent=((r"detector/block\d+/(coarser|same|finer)/bias", 0.0, "the biases of the deformable convolutions: 0"),),
    head=dict(coarse="topleft", padding="published", relu_p7=False),
)
