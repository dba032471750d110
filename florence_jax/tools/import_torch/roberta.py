"""RoBERTa in the naming of Hugging Face's transformers: the text encoder of a fusion."""

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from florence_jax.data.tokenizers import load_tokenizer
from florence_jax.errors import UserError
from florence_jax.models.roberta import ROBERTAS, Roberta, RobertaConfig
from florence_jax.params.rules import path_string
from florence_jax.tools.import_torch.family import Family, Shapes, Told
from florence_jax.tools.import_torch.names import Renames, rename_all
from florence_jax.tools.import_torch.openclip import refusal

ROBERTA_ENTRY = "roberta"
_HEAD_WIDTH = 64  # of the published models
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
# Parts of a layer of transformers' BERT, RoBERTa and BridgeTower, which METER's are too: all of them, in order, to
# names whose layer is ours already. Queries, keys and values are parts of one tensor.
BERT_LAYER: Renames = (
    (r"\.attention\.self\.query\.(\w+)$", r".self_attention.qkv.\1#0"),
    (r"\.attention\.self\.key\.(\w+)$", r".self_attention.qkv.\1#1"),
    (r"\.attention\.self\.value\.(\w+)$", r".self_attention.qkv.\1#2"),
    (r"\.crossattention\.self\.query\.", ".cross_attention.q."),
    (r"\.crossattention\.self\.key\.(\w+)$", r".cross_attention.kv.\1#0"),
    (r"\.crossattention\.self\.value\.(\w+)$", r".cross_attention.kv.\1#1"),
    (r"\.attention\.output\.dense\.", ".self_attention.output."),
    (r"\.attention\.output\.LayerNorm\.", ".self_attention.norm."),
    (r"\.crossattention\.output\.dense\.", ".cross_attention.output."),
    (r"\.crossattention\.output\.LayerNorm\.", ".cross_attention.norm."),
    (r"\.intermediate\.dense\.", ".fc1."),
    (r"(?<!_attention)\.output\.dense\.", ".fc2."),
    (r"(?<!_attention)\.output\.LayerNorm\.", ".norm."),
)
# Of the names of a RobertaModel without its prefix.
ROBERTA_RENAMES: Renames = (
    (r"^embeddings\.word_embeddings\.weight$", "roberta.token_embedding"),
    (r"^embeddings\.position_embeddings\.weight$", "roberta.position_embedding"),
    (r"^embeddings\.token_type_embeddings\.weight$", "roberta.type_embedding"),
    (r"^embeddings\.LayerNorm\.", "roberta.norm."),
    (r"^encoder\.layer\.(\d+)\.", r"roberta.layer\1."),
    *BERT_LAYER,
)
POOLER = (r"pooler\.dense\..*", "RoBERTa's pooler, which a fusion does not use")


@dataclasses.dataclass(frozen=True)
class RobertaSizes:
    """A RoBERTa of a file: its sizes, and the file of its tokenizer, '' where there is none."""

    encoder: RobertaConfig
    tokenizer: str = ""


@dataclasses.dataclass(frozen=True)
class RobertaFamily(Family):
    """Checkpoints of RoBERTa."""

    def configure(self, sizes: Mapping[str, Any]) -> RobertaSizes:
        """See `Family`. `sizes` has fields of `RobertaConfig`, and "tokenizer"."""
        return roberta_of(sizes)

    def parts(
        self, config: RobertaSizes, entries: Sequence[str], evaluation: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """See `Family`."""
        return {ROBERTA_ENTRY: roberta_part(config.encoder)}

    def targets(self, config: RobertaSizes) -> dict[str, tuple[int, ...]]:
        """See `Family`."""
        module = Roberta(config.encoder, scan=False)
        ids = jax.ShapeDtypeStruct((1, 1), "int32")
        shapes = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
        return {
            f"{ROBERTA_ENTRY}/{path_string(path)}": leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
        }

    def tokenizer(self, config: RobertaSizes) -> str:
        """See `Family`."""
        return config.tokenizer


def roberta_of(sizes: Mapping[str, Any]) -> RobertaSizes:
    """From fields of `RobertaConfig` and perhaps "tokenizer", a file.

    Raises:
      UserError: an unknown field, a tokenizer that needs more rows than there are.
    """
    known = {field.name for field in dataclasses.fields(RobertaConfig)}
    if unknown := sorted(sizes.keys() - known - {"tokenizer"}):
        raise UserError(f"unknown option {', '.join(unknown)}: known are {', '.join(sorted(known | {'tokenizer'}))}")
    fields = {name: value for name, value in sizes.items() if name in known}
    positions = fields.get("positions", RobertaConfig.positions)
    config = RobertaConfig(**{"length": min(RobertaConfig.length, positions - 2)} | fields)
    spec = sizes.get("tokenizer", "")
    if spec and (needed := load_tokenizer(spec, max(config.length, 3)).masked_vocab_size) > config.vocabulary:
        raise UserError(
            f"the tokenizer {spec} has {needed} ids, the weights {config.vocabulary} rows: it is of other weights"
        )
    return RobertaSizes(config, spec)


def roberta_part(config: RobertaConfig) -> dict[str, Any]:
    """Of `model.json`: the row of `ROBERTAS` that needs the fewest options."""

    def differences(variant: str) -> dict[str, Any]:
        row = dataclasses.asdict(ROBERTAS[variant])
        return {name: value for name, value in dataclasses.asdict(config).items() if value != row[name]}

    variant = min(ROBERTAS, key=lambda name: len(differences(name)))
    return {"variant": variant, "overrides": differences(variant), "entries": [ROBERTA_ENTRY]}


def roberta_sizes(found: Shapes) -> dict[str, Any]:
    """Fields of `RobertaConfig`; the heads as in published models."""
    vocabulary, width = found.vote(r"roberta\.token_embedding", tuple, 2)
    return dict(
        vocabulary=vocabulary,
        width=width,
        positions=found.vote(r"roberta\.position_embedding", lambda s: s[0], 2),
        layers=found.count(r"roberta\.layer(\d+)\..*"),
        mlp_ratio=found.vote(r"roberta\.layer\d+\.fc1\.weight", lambda s: s[0] / s[1], 2),
        heads=max(width // _HEAD_WIDTH, 1),
    )


def tokenizer_beside(file: Path) -> dict[str, str]:
    """{"tokenizer": the file of a tokenizer beside `file`}, {} where there is none."""
    found = [str(file.with_name(name)) for name in TOKENIZER_FILES if file.with_name(name).is_file()]
    return {"tokenizer": found[0]} if found else {}


def roberta_told(file: Path, names: Collection[str]) -> Told:
    """What the config.json of a RobertaModel beside a file says, and the tokenizer beside it.

    Raises:
      UserError: of another model, which is named; a key that is not obeyed, with its value.
    """
    fields: dict[str, Any] = {**tokenizer_beside(file)}
    path = file.with_name("config.json")
    if not path.is_file():
        return Told("the tokenizer beside it" if fields else "", fields)
    try:
        content = json.loads(path.read_text())
        for key, only in (
            ("model_type", "roberta"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute"),
            ("pad_token_id", 1),
        ):  # fmt: skip
            if content.get(key, only) != only:
                raise refusal(path, key, content[key])
        known = {"heads": "num_attention_heads", "eps": "layer_norm_eps"}
        fields |= {ours: content[theirs] for ours, theirs in known.items() if theirs in content}
        known = {"width": "hidden_size", "layers": "num_hidden_layers", "vocabulary": "vocab_size"}
        shown = {ours: content[theirs] for ours, theirs in known.items() if theirs in content}
        return Told(path.name, fields, shown)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is no configuration of these weights: {error!r}; correct it or move it away"
        ) from error


def no_resolution(config: Any, res: int | None, window: int | None) -> dict[str, Any]:
    """A text encoder has no image size; raises `UserError` for one."""
    if res is not None or window is not None:
        raise UserError("--res and --window are for image towers; this is a text encoder")
    return {}


def roberta_naming(names: Collection[str]) -> Callable[[str], str]:
    """See `Family.naming`."""
    return functools.partial(rename_all, rules=ROBERTA_RENAMES)


ROBERTA_FAMILY = RobertaFamily(
    name="roberta",
    about="RoBERTa, as a text encoder, in transformers' naming (safetensors or .bin, with or without 'roberta.')",
    base="",
    naming=roberta_naming,
    rules={ROBERTA_ENTRY: ()},
    sizes=roberta_sizes,
    resolution=no_resolution,
    resize=lambda params, config, target: params,
    anchors=(r"embeddings\.word_embeddings\.weight",),
    told=roberta_told,
    evaluation=lambda config, names: {},
    left_out=(POOLER,),
)
