"""METER (Dou et al. 2022): an image tower, RoBERTa, and the fusion on them, from its checkpoints of Lightning."""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from florence_jax.data.answers import AnswerVocabulary
from florence_jax.errors import UserError
from florence_jax.models.base import Model
from florence_jax.models.fusion import FUSIONS, HEAD_WIDTH, build_fusion
from florence_jax.models.sizes import ModelConfig, resolve_config
from florence_jax.tasks.encoder import evaluation_ops
from florence_jax.tools.import_torch.clip import VIT_RULES, resize_vit, vit_resolution
from florence_jax.tools.import_torch.family import DROPPED, Family, Shapes, Told, evaluation, nearest_variant
from florence_jax.tools.import_torch.names import Renames, rename_all
from florence_jax.tools.import_torch.roberta import (
    BERT_LAYER,
    POOLER,
    ROBERTA_RENAMES,
    RobertaSizes,
    roberta_of,
    roberta_part,
    roberta_sizes,
    tokenizer_beside,
)
from florence_jax.tools.import_torch.swin import SWIN_RULES, resize_swin, swin_resolution, swin_sizes

FUSION_ENTRY = "fusion"
ANSWER_FILES = ("answers.txt", "answers.json", "vqa_dict.json")
HEAD_TENSORS = {
    "mlm": "fusion.mlm.bias", "itm": "fusion.itm.bias", "vqa": "fusion.vqa.output.bias",
    "nlvr2": "fusion.nlvr2.output.bias", "snli_ve": "fusion.snli_ve.output.bias", "rank": "fusion.rank.bias",
}  # fmt: skip
_CLASSIFIERS = r"^(vqa|nlvr2|snli)_classifier\."
_RENAMES: Renames = (
    (r"^text_transformer\.", ""),
    (r"^vit_model\.visual\.ln_post\.", "image.norm."),  # as Swin calls its last norm
    (r"^vit_model\.visual\.(?:transformer\.)?", "image."),
    # What METER's copy of CLIP has beside its visual tower, and never reads.
    (r"^vit_model\.(token_embedding|positional_embedding|ln_final)\b", r"clip.\1"),
    (r"^vit_model\.", "image."),
    (r"^cross_modal_(text|image)_transform\.", rf"{FUSION_ENTRY}.\1_input."),
    (r"^cross_modal_(text|image)_pooler\.dense\.", rf"{FUSION_ENTRY}.\1_pooler."),
    (r"^cross_modal_(text|image)_layers\.(\d+)\.", rf"{FUSION_ENTRY}.co_attention.layer\2.\1."),
    (r"^token_type_embeddings\.weight$", f"{FUSION_ENTRY}.token_types"),
    (r"^mlm_score\.transform\.dense\.", f"{FUSION_ENTRY}.mlm.hidden."),
    (r"^mlm_score\.transform\.LayerNorm\.", f"{FUSION_ENTRY}.mlm.norm."),
    (r"^mlm_score\.(?:decoder\.)?", f"{FUSION_ENTRY}.mlm."),
    (r"^itm_score\.fc\.", f"{FUSION_ENTRY}.itm."),
    (r"^rank_output\.", f"{FUSION_ENTRY}.rank."),
    (_CLASSIFIERS + r"0\.", rf"{FUSION_ENTRY}.\1.hidden."),
    (_CLASSIFIERS + r"1\.", rf"{FUSION_ENTRY}.\1.norm."),
    (_CLASSIFIERS + r"3\.", rf"{FUSION_ENTRY}.\1.output."),
    (rf"^{FUSION_ENTRY}\.snli\.", f"{FUSION_ENTRY}.snli_ve."),
    *ROBERTA_RENAMES[: -len(BERT_LAYER)],
    *BERT_LAYER,
)


@dataclasses.dataclass(frozen=True)
class MeterSizes:
    """A METER of a file.

    Attributes:
      tower: its image tower. text: RoBERTa and its tokenizer.
      variant: of `models.fusion.FUSIONS`. overrides: fields of its sizes that differ. heads: that the file holds.
      answers: of the head 'vqa', in the order of its logits.
    """

    tower: ModelConfig
    text: RobertaSizes
    variant: str
    overrides: Mapping[str, Any]
    heads: tuple[str, ...]
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MeterFamily(Family):
    """Checkpoints of METER."""

    def configure(self, sizes: Mapping[str, Any]) -> MeterSizes:
        """See `Family`. `sizes` is as `meter_sizes` gives it, and perhaps "answers" and "tokenizer", files."""
        own = ("text", "fusion", "fusion_heads", "count", "answers", "tokenizer")
        tower = {name: value for name, value in sizes.items() if name not in own}
        base = "ViT-B-16" if tower.get("image_tower") == "vit" else self.base
        text = sizes["text"] | ({"tokenizer": sizes["tokenizer"]} if "tokenizer" in sizes else {})
        return MeterSizes(
            nearest_variant(resolve_config(base, **tower)),
            roberta_of(text),
            "meter",
            {name: value for name, value in sizes["fusion"].items() if value != getattr(FUSIONS["meter"], name)},
            sizes["fusion_heads"],
            _answers(sizes["count"], sizes.get("answers", "")),
        )

    def changed(self, config: MeterSizes, changes: Mapping[str, Any]) -> MeterSizes:
        """See `Family`."""
        return dataclasses.replace(config, tower=super().changed(config.tower, changes))

    def parts(
        self, config: MeterSizes, entries: Sequence[str], evaluation: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """See `Family`: the image tower, RoBERTa, and the fusion as a run of configs/vqa.py describes it."""
        part = {
            "variant": config.variant,
            "overrides": dict(config.overrides),
            "heads": list(config.heads),
            "entries": [FUSION_ENTRY],
            "eval_ops": evaluation_ops(evaluation, config.tower.res),
        }
        if config.answers:
            part["answers"] = list(config.answers)
        towers = super().parts(config.tower, ["image"], evaluation)
        return towers | {"roberta": roberta_part(config.text.encoder), FUSION_ENTRY: part}

    def unrolled(self, config: MeterSizes) -> Model[ModelConfig]:
        """See `Family`."""
        tower = dataclasses.replace(config.tower, scan=False)
        return build_fusion(
            tower, config.variant, config.text.encoder, **config.overrides, heads=config.heads,
            answers=len(config.answers),
        )  # fmt: skip

    def tokenizer(self, config: MeterSizes) -> str:
        """See `Family`."""
        return config.text.tokenizer


def _answers(count: int, file: str) -> tuple[str, ...]:
    """The answers of the head 'vqa', of which there are `count`."""
    if not count:
        return ()
    if not file:
        raise UserError(
            f"the file does not name its {count} answers: put {' or '.join(ANSWER_FILES)} beside it, one a line or "
            "JSON, in the order of their numbers, or add --set answers=FILE"
        )
    answers = AnswerVocabulary.load(file).answers
    if len(answers) != count:
        raise UserError(f"the weights choose between {count} answers, {file} names {len(answers)}: it is of others")
    return answers


def meter_naming(names: Collection[str]) -> Callable[[str], str]:
    """See `Family.naming`."""
    return functools.partial(rename_all, rules=_RENAMES)


def meter_sizes(found: Shapes) -> dict[str, Any]:
    """Fields of the image tower; "text" and "fusion", those of the other parts; "fusion_heads", "count" of answers."""
    layer = r"fusion\.co_attention\.layer\d+\.(?:text|image)\."
    types, width = found.vote(r"fusion\.token_types", tuple, 2)
    heads = tuple(name for name, tensor in HEAD_TENSORS.items() if tensor in found)
    count = found.vote(re.escape(HEAD_TENSORS["vqa"]), lambda s: s[0], 1) if "vqa" in heads else 0
    fusion: dict[str, Any] = dict(
        layers=found.count(r"fusion\.co_attention\.layer(\d+)\..*"),
        width=width,
        head_width=HEAD_WIDTH if width % HEAD_WIDTH == 0 else width,
        mlp_ratio=found.vote(layer + r"fc1\.weight", lambda s: s[0] / s[1], 2),
        token_types=types,
    )
    tower = _vit_sizes(found) if "image.conv1.weight" in found else swin_sizes(found)
    return tower | {"text": roberta_sizes(found), "fusion": fusion, "fusion_heads": heads, "count": count}


def _vit_sizes(found: Shapes) -> dict[str, Any]:
    """Of CLIP's visual tower without its last block and without projection."""
    width, patch = found.vote(r"image\.conv1\.weight", lambda s: (s[0], s[3]), 4)
    positions = found.vote(r"image\.positional_embedding", lambda s: s[0], 2)
    return dict(
        image_tower="vit",
        image_width=width,
        patch_size=patch,
        depths=(found.count(r"image\.resblocks\.(\d+)\..*"),),
        heads=(max(width // HEAD_WIDTH, 1),),
        mlp_ratio=found.vote(r"image\.resblocks\.\d+\.mlp\.c_fc\.weight", lambda s: s[0] / s[1], 2),
        res=round(max(positions - 1, 1) ** 0.5) * patch,
    )


def _resolution(config: MeterSizes, res: int | None, window: int | None) -> dict[str, Any]:
    change = vit_resolution if config.tower.image_tower == "vit" else swin_resolution
    return change(config.tower, res, window)


def _resize(params: dict[str, Any], config: MeterSizes, target: MeterSizes) -> dict[str, Any]:
    resize = resize_vit if config.tower.image_tower == "vit" else resize_swin
    return resize(params, config.tower, target.tower)


def meter_told(file: Path, names: Collection[str]) -> Told:
    """The tokenizer and the list of answers beside a file."""
    fields: dict[str, Any] = {**tokenizer_beside(file)}
    if any(name.startswith("vqa_classifier.") for name in names):
        found = [str(file.with_name(name)) for name in ANSWER_FILES if file.with_name(name).is_file()]
        fields |= {"answers": found[0]} if found else {}
    where = ", ".join(Path(value).name for value in fields.values())
    return Told(where, fields)


METER_FAMILY = MeterFamily(
    name="meter",
    about="METER on Swin or CLIP's ViT, with RoBERTa (zdou0830/METER, Lightning's checkpoints)",
    base="Swin-B",
    naming=meter_naming,
    rules={"image": (*SWIN_RULES, *VIT_RULES[:-1]), "roberta": (), FUSION_ENTRY: ()},  # but for the ViT's last norm
    sizes=meter_sizes,
    resolution=_resolution,
    resize=_resize,
    anchors=(r"cross_modal_text_transform\.weight",),
    told=meter_told,
    evaluation=lambda config, names: evaluation(),
    entries=("image", "roberta", FUSION_ENTRY),
    dropped=f"{DROPPED}|(train|val|dev|test)_\\w+_(loss|accuracy|score)(\\..*)?",
    left_out=(POOLER, (r"clip\..*", "CLIP's tables of texts, which METER does not read")),
    task="vqa",
)
