"""The visual part of GLIP (Li et al. 2021), and of its detectors without language: Swin, pyramid, Dynamic Head."""

import functools
import re
from collections.abc import Callable, Collection
from typing import Any

from florence_jax.tools.import_torch.detectors import block_renames, detector_family
from florence_jax.tools.import_torch.dyhead import BLOCK_PARTS, prediction_renames
from florence_jax.tools.import_torch.family import Shapes
from florence_jax.tools.import_torch.names import Renames, rename_all

_TOWER = r"rpn\.head\.dyhead_tower\."
_OF_A_BLOCK = r"(?:DyConv|AttnConv|offset|relu)\."
LANGUAGE = (r"language_backbone\..*", "the language backbone")
FUSION = (rf"{_TOWER}\d+\.(?!{_OF_A_BLOCK}).*", "the layers between the blocks that fuse pictures with language")
WORDS = (
    r"rpn\.(head\.)?(dot_product_projection_text|token_logits|contrastive_align_projection_\w+|log_scale|bias_lang|bias0"
    r"|mlm_head|resizer|tunable_linear)(\..*)?",
    "the predictions that compare places with words",
)
_RENAMES: Renames = (
    (r"^backbone\.body\.patch_embed\.proj\.weight$", "image.patch_embed.proj.weight#bgr"),
    (r"^backbone\.body\.", "image."),
    # It counts maps from 1, the first of which the pyramid does not read.
    (r"^backbone\.fpn\.fpn_inner(\d)\.", lambda match: f"detector.pyramid.lateral{int(match[1]) + 1}."),
    (r"^backbone\.fpn\.fpn_layer(\d)\.", lambda match: f"detector.pyramid.output{int(match[1]) + 1}."),
    (r"^backbone\.fpn\.top_blocks\.(p[67])\.", r"detector.pyramid.\1."),
    *prediction_renames(r"rpn\.head\."),
)


def glip_naming(names: Collection[str]) -> Callable[[str], str]:
    """See `Family.naming`. Blocks are counted without the layers of language between them."""
    found = (re.match(rf"{_TOWER}(\d+)\.{_OF_A_BLOCK}", name) for name in names)
    numbers = sorted({int(match[1]) for match in found if match})
    blocks: Renames = tuple(
        (rf"^{_TOWER}{number}\.(?={_OF_A_BLOCK})", f"detector.block{place}.") for place, number in enumerate(numbers)
    )
    rules = (*_RENAMES, *blocks, *block_renames(r"detector\.block", BLOCK_PARTS))
    return functools.partial(rename_all, rules=rules)


def _reads_words(found: Shapes) -> bool:
    """Whether classes are told by language, so that the class layer in the file was never trained."""
    return "rpn.head.dot_product_projection_text.weight" in found or "rpn.head.token_logits.weight" in found


def glip_sizes(found: Shapes) -> dict[str, Any]:
    """Names of the classes that are of no set."""
    count = found.vote(r"detector\.class_logits\.bias", lambda s: s[0], 1)
    return {"classes": tuple(f"class {number}" for number in range(count))} if _reads_words(found) else {}


def glip_remarks(found: Shapes) -> list[str]:
    """What is missing where the language part was left out."""
    remarks = []
    if found.count(rf"{_TOWER}(\d+)\.(?!{_OF_A_BLOCK}).*"):
        remarks.append("the blocks were trained with fused language between them: train them further")
    if _reads_words(found):
        remarks.append(
            "its classes are told by words, and the class layer of the file, which was never trained, tells nothing: "
            "train it further on your classes (configs/detect.py)"
        )
    return remarks


GLIP_FAMILY = detector_family(
    name="glip",
    about="the visual part of GLIP on Swin (microsoft/GLIP, maskrcnn-benchmark's names)",
    naming=glip_naming,
    anchors=(r"backbone\.body\.patch_embed\.proj\.weight",),
    sides=(800, 1333),
    dropped=r"rpn\.anchor_generator\.cell_anchors\.\d+",
    left_out=(LANGUAGE, FUSION, WORDS),
    sizes=glip_sizes,
    remarks=glip_remarks,
    head=dict(coarse="flat", padding="published", multiple=32),
    options=dict(root=True),
)
