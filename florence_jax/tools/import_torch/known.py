"""Published CLIP models by the names of their files and repositories, for files that lie alone."""

import re
from pathlib import Path
from typing import Any

from florence_jax.tools.import_torch.family import Told, evaluation

_HALF = (0.5, 0.5, 0.5)
_QUICK, _EXACT = "quick_gelu", "gelu"
# Patterns of a name; the activation; other fields; how pictures are made. The first that matches counts.
KNOWN: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    (r"metaclip[-_]?2(?!pt5b)|worldwide|clipa|xlm|coca|siglip", "", {}, {}),  # none of what follows
    (r"vit[-_](s|b|l|h|g|bigg)[-_]\d\d[\w.-]*quick-?gelu", _QUICK, {}, evaluation()),
    (
        r"(^|/)vit-(b-32|b-16|l-14|l-14-336px)\.pt$|(^|/|--)clip-vit-\w+-patch\d+(-336)?(/|$)|vit_\w+_clip_\d+\.openai",
        _QUICK,
        {},
        evaluation(),
    ),
    (r"vit[-_]b[-_]32[\w.-]*laion-?400m|vit_base_patch32_clip_224\.laion400m", _QUICK, {}, evaluation()),
    (r"metaclip_altogether|(^|/)h14_v1\.2_altogether", _EXACT, {}, evaluation()),
    (r"metaclip_(400m|fullcc|2pt5b)|(^|/)[bhlg]\d\d_(400m|fullcc2\.5b)\.pt$", _QUICK, {}, evaluation()),
    (r"dfn2b-clip-vit-l-14-39b|dfn2b_s39b", _EXACT, {}, evaluation()),
    (r"dfn2b-clip-vit", _QUICK, {}, evaluation()),
    (r"dfn5b-clip-vit", _QUICK, {}, evaluation("squash")),
    (r"vit-l-14-laion2b-s32b", _EXACT, dict(image_mean=_HALF, image_std=_HALF), evaluation()),
    # Their tags end in samples seen or epochs, so that a folder called after a data set is none of them.
    (r"(laion-?2b|laion-?400m|datacomp|commonpool)[\w.-]*?[-_.](s\d+[bm]|e\d\d|39b)\b", _EXACT, {}, evaluation()),
)


def known_weights(file: Path) -> Told:
    """What the name of a file, or of the folders that it lies in, says of a published CLIP with a ViT.

    The repositories' names count as well, as the cache of the Hugging Face hub spells them
    ('models--laion--CLIP-ViT-H-14-laion2B-s32B-b79K/snapshots/HASH/open_clip_pytorch_model.bin').
    """
    name = "/".join(file.absolute().parts[-4:]).lower()
    for pattern, activation, fields, pictures in KNOWN:
        if match := re.search(pattern, name):
            if not activation:
                break
            both = dict(image_activation=activation, text_activation=activation)
            return Told(f"the name {match[0].strip('/')!r}", both | fields, evaluation=pictures, published=True)
    return Told()
