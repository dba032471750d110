"""Finds a family's tensors in a file, under whatever prefix they stand; another network's are refused by name."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from florence_jax.errors import UserError
from florence_jax.tools.import_torch.family import Family, State

# Networks that are often taken for one of the families: a pattern of a name that only they have, and what they are.
FOREIGN_NETWORKS = (
    (r"(^|\.)text_decoder\.|(^|\.)visual\.attn_pool\.", "CoCa (a text decoder, attentional pooling)"),
    (r"attn\.(logit_scale|cpb_mlp\.)|(^|\.)continuous_position_bias_mlp\.", "Swin V2 (cosine attention)"),
    (r"(^|\.)vision_model\.head\.|(^|\.)visual\.trunk\.attn_pool\.", "SigLIP (a pooling head)"),
    (r"(^|\.)visual\.(layer1|attnpool)\.", "CLIP with a ResNet as image tower"),
    (r"(^|\.)visual\.trunk\.", "a model with an image tower of timm (EVA, ConvNeXt, MobileCLIP, SigLIP, ...)"),
    (
        r"(^|\.)text\.transformer\.(embeddings|encoder|shared|decoder)\.",
        "a model with a text tower of transformers (RoBERTa, XLM-RoBERTa, mT5)",
    ),
    (
        r"\.self_attn\.(q_norm|k_norm)\.|\.resblocks\.\d+\.(ls_1|attn\.ln_q|ln_attn)\b",
        "a ViT with layer scale or norms",
    ),
    (r"(^|\.)(bottom_up|body|backbone)\.(stem|res2|layer1|conv1)\.", "a detector on a ResNet"),
    (r"(^|\.)(roi_heads?|proposal_generator|rpn_head)\.", "a two-stage detector"),
    (
        r"(^|\.)head\.(cls_tower|cls_subnet)\.|(^|\.)bbox_head\.(cls_convs|retina_cls)\.",
        "a detector with convolutions of their own before each prediction",
    ),
)


class Unwrapped(NamedTuple):
    """The tensors of a network.

    Attributes:
      state: by name, without the prefix.
      prefix: under which the file has them.
      outside: names in the file that do not have it.
    """

    state: State
    prefix: str
    outside: list[str]


def unwrap(state: State, family: Family) -> Unwrapped:
    """The tensors of `family` in a file, without the prefix that wrappers give them ('module._orig_mod.', 'backbone.').

    Raises:
      UserError: another network's file, which is said by name where it is a known one; several networks in one.
    """
    for pattern, what in FOREIGN_NETWORKS:
        if hit := next((name for name in state if re.search(pattern, name)), None):
            raise UserError(
                f"this is {what}, which is not supported ({hit}): --from={family.name} reads {family.about}"
            )
    prefixes = {
        match[1]: None
        for name in state
        for anchor in family.anchors
        if (match := re.fullmatch(rf"((?:\w+\.)*?){anchor}", name))
    }
    if not prefixes:
        raise UserError(
            f"not a checkpoint of --from={family.name}: it has no tensor called {_plain(family.anchors)}, it holds "
            f"{', '.join(list(state)[:3]) or 'nothing'}{', ...' if len(state) > 3 else ''}"
        )
    if len(prefixes) > 1:
        raise UserError(f"the file holds several networks, {', '.join(map(repr, prefixes))}: save one of them alone")
    (prefix,) = prefixes
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return Unwrapped(inside, prefix, [name for name in state if not name.startswith(prefix)])


def _plain(patterns: Sequence[str]) -> str:
    return " or ".join(re.sub(r"\((?:\?:)?(\w+)[^)]*\)", r"\1", pattern).replace("\\", "") for pattern in patterns)
