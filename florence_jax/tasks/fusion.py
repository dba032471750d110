"""A fusion of image and text on the towers of a folder: what its training and its use share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.tokenizers import Tokenizer, load_tokenizer
from florence_jax.errors import UserError
from florence_jax.losses.grad_cache import encode_cached
from florence_jax.models.fusion import HEADS, begin_in_joint_space, build_fusion, resolve_fusion
from florence_jax.models.resize import TOKEN_TYPES
from florence_jax.models.roberta import resolve_roberta
from florence_jax.params.rules import Policy, Rules
from florence_jax.params.sharding import ambient_batch_axes, params_like
from florence_jax.params.weights import Description, checkpoint_folder, describe, load, make_description
from florence_jax.tasks.base import model_identity
from florence_jax.tasks.encoder import MAP_NORMS, RESIZED, Encoder, open_encoder

FUSION_PART, ROBERTA_PART = "fusion", "roberta"  # parts in model.json, and entries of parameters
# Sizes of towers that were trained on smaller pictures: 3 x 3 image tokens.
LAPTOP = {"res": 96, "window": 6, "text_length": 26}
BEGINS = ("joint", "random")  # of a fresh fusion
TOKENIZED = "How many red umbrellas are there?"  # tokenizers that agree on it are taken for one
FREEZES = ("", "image", "text", "both")
# The table of words gets a row for the mask, that of places rows for longer texts.
GROWN = ((r"text/(token|position)_embedding", "adapt"),)
# What no loss on the fusion reaches. It stays as it was, so that the folder can still be asked for other things.
NOT_REACHED = r"(text_projection|image_projection)/.*|logit_scale|logit_bias"
# METER's groups: not decayed are also the text embedding (the project's own rules) and the table of modalities.
NO_DECAY = ((TOKEN_TYPES, False), (rf"{ROBERTA_PART}/type_embedding", False))


class RobertaEncoder:
    """RoBERTa of a folder.

    Args:
      description: of the folder, which holds that part. length: tokens of a text; None for what the folder says.

    Attributes:
      folder: where the weights are. config: sizes. tokenizer.

    Raises:
      UserError: for a folder without RoBERTa, or whose tokenizer is not known.
    """

    def __init__(self, description: Description, length: int | None = None):
        if ROBERTA_PART not in description.parts:
            raise UserError(
                f"{description.folder} holds no RoBERTa, only {', '.join(description.parts)}: import one with "
                "python -m florence_jax.tools.import_torch --from=roberta"
            )
        part = description.parts[ROBERTA_PART]
        self.folder, self._variant = description.folder, part["variant"]
        self._overrides = part["overrides"] | ({} if length is None else {"length": length})
        self.config = resolve_roberta(self._variant, **self._overrides)
        self._spec = part.get("tokenizer") or description.tokenizer
        if not self._spec:
            raise UserError(f"{self.folder} does not say which tokenizer its RoBERTa was trained with: import it again")
        self.tokenizer = load_tokenizer(self._spec, self.config.length)

    @classmethod
    def of(cls, description: Description) -> "RobertaEncoder | None":
        """That of a folder which may hold one."""
        return cls(description) if ROBERTA_PART in description.parts else None

    def describe(self) -> dict[str, Any]:
        """Its part of `model.json`."""
        sizes = {"variant": self._variant, "overrides": self._overrides}
        return {**sizes, "tokenizer": self._spec, "entries": [ROBERTA_PART]}


class FusedTowers:
    """An image tower, a text encoder and the co-attention on top.

    Args:
      encoder: the towers, see `open_fusion_encoder`.
      variant: of the fusion, a key of `models.fusion.FUSIONS`; '' for the folder's, or a choice by the tower.
      heads: names of `models.fusion.HEADS` that are wanted; () for the folder's.
      answers: of the head 'vqa', in the order of its logits; () for the folder's.
      overrides: fields of the fusion's sizes on top of the folder's; None leaves one alone.
      text: reads the texts; None for the folder's RoBERTa, or else its text tower.
      begin: of a fresh fusion, one of `BEGINS`: 'joint', see `begin_in_joint_space`, or 'random'.

    Attributes:
      encoder. model: `Model`. variant, overrides, heads, answers. tokenizer: of the texts. text_length: their tokens.
      part: the fusion's in the folder's `model.json`; {} where it holds none. trained: whether it holds one.

    Raises:
      UserError: for an unknown variant, option or head; where the folder holds no fusion and no heads are named.
    """

    def __init__(
        self,
        encoder: Encoder,
        variant: str = "",
        heads: Sequence[str] = (),
        answers: Sequence[str] = (),
        overrides: Mapping[str, Any] | None = None,
        text: RobertaEncoder | None = None,
        begin: str = BEGINS[0],
    ):
        if begin not in BEGINS:
            raise UserError(f"config.fusion.begin={begin!r}: choose one of {', '.join(BEGINS)}")
        self.begin = begin
        folder = encoder.description.folder
        self.part: dict[str, Any] = encoder.description.parts.get(FUSION_PART, {})
        self.encoder, self.trained = encoder, bool(self.part)
        self.heads = tuple(heads or self.part.get("heads", ()))
        if not self.heads:
            raise UserError(
                f"{folder} holds no fusion of image and text: train one with python -m florence_jax.main "
                f"--config=configs/vlp.py --config.init={folder}"
            )
        self.answers = tuple(answers or self.part.get("answers", ()))
        if "vqa" in self.heads and not self.answers:
            raise UserError(
                f"{folder} answers no questions: train it with python -m florence_jax.main --config=configs/vqa.py "
                f"--config.init={folder}"
            )
        self.roberta = text or RobertaEncoder.of(encoder.description)
        self.tokenizer, self.text_length = self._texts()
        self.variant = variant or self.part.get("variant", "ti" if encoder.variant == "ti" else "meter")
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        known = dict(self.part["overrides"]) if self.variant == self.part.get("variant") else {}
        self.overrides = known | given
        self.config = resolve_fusion(self.variant, **self.overrides)
        sizes: dict[str, Any] = {**self.overrides, "heads": self.heads, "answers": len(self.answers)}
        language = None if self.roberta is None else self.roberta.config
        self.model = build_fusion(encoder.model.config, self.variant, language, **sizes)

    def _texts(self) -> tuple[Tokenizer, int]:
        """What makes tokens of texts, and how many of one."""
        if self.roberta is not None:
            return self.roberta.tokenizer, self.roberta.config.length
        tokenizer = self.encoder.tokenizer
        if tokenizer is None:
            raise UserError(
                f"{self.encoder.description.folder} holds no text tower to read texts with: give a text encoder with "
                "--config.language.init=DIR, a folder of florence_jax.tools.import_torch --from=roberta"
            )
        return tokenizer, self.encoder.model.config.text_length

    def describe(self) -> dict[str, dict[str, Any]]:
        """Parts of `model.json`: the towers, RoBERTa where there is one, and the fusion."""
        part = {
            "variant": self.variant,
            "overrides": self.overrides,
            "heads": list(self.heads),
            "entries": [FUSION_PART],
        }
        part |= {"answers": list(self.answers)} if self.answers else {}
        language = {} if self.roberta is None else {ROBERTA_PART: self.roberta.describe()}
        return {"towers": self.encoder.towers_part(), **language, FUSION_PART: part}

    # -- parameters -------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters, of the towers that the folder holds and of the fusion."""
        params, own = self.model.init(key), (ROBERTA_PART, FUSION_PART)
        return self.encoder.init(key) | {name: params[name] for name in ("image", *own) if name in params}

    def load(self, like: Mapping[str, Any]) -> dict[str, Any]:
        """The folder's parameters on the devices of `like`, whose fresh values are taken for what it lacks.

        A head is read where the folder has it, of the same answers; a head that this fusion lacks is left there.
        """
        description = self.encoder.description
        if not description.folder:
            raise UserError("no weights to load: give them with --config.init=DIR")
        read = {}
        if self.roberta is not None and self.roberta.folder != description.folder:
            read = load(self.roberta.folder, {ROBERTA_PART: like[ROBERTA_PART]})
            like = {name: value for name, value in like.items() if name != ROBERTA_PART}
        fresh = [FUSION_PART]
        if self.trained:
            saved, same = set(self.part["heads"]), self.answers == tuple(self.part.get("answers", ()))
            heads = [name for name in HEADS if (name in self.heads) != (name in saved) or (name == "vqa" and not same)]
            fresh = [f"{FUSION_PART}/{name}" for name in heads]
        rules: Rules[str] = tuple((rf"{name}/.*", "new") for name in fresh)
        rules = (*rules, (TOKEN_TYPES, "adapt"), (MAP_NORMS, "new"), *GROWN, *RESIZED)
        params = load(description.folder, like, rules, self.model.adapt) | read
        if self.trained or not self.begins_joint:
            return params
        places = jax.tree.map(lambda leaf: leaf.sharding, params)
        return jax.jit(begin_in_joint_space, out_shardings=places)(params)

    @property
    def begins_joint(self) -> bool:
        """Whether a fresh fusion begins in the joint space of the towers, if they have one that fits into its width."""
        there = {"text", "text_projection", "image_projection"} <= set(self.encoder.description.entries)
        fits = there and self.encoder.model.config.projection <= self.config.width
        return self.begin == "joint" and self.roberta is None and fits

    def load_on(self, mesh: Mesh, rules: Rules[int | str] = ()) -> dict[str, Any]:
        """The parameters of a folder that holds a fusion with these heads, sharded over a mesh."""
        return self.load(params_like(jax.eval_shape(self.init, jax.random.key(0)), mesh, rules))

    def policy(self, options: ConfigDict) -> Policy:
        """METER's groups by path.

        Args:
          options: of the configuration: "fusion_lr", "head_lr", multipliers of the rate of the fusion (its projections
            and poolers too) and of the heads; "freeze", one of `FREEZES`: towers that are not trained.

        Raises:
          UserError: for another `freeze`.
        """
        if options.freeze not in FREEZES:
            raise UserError(f"config.fusion.freeze={options.freeze!r}: choose image, text, both, or leave it empty")
        towers = {"image": r"image/.*", "text": rf"(text|{ROBERTA_PART})/.*"}
        still = [towers[name] for name in towers if options.freeze in (name, "both")]
        still += [] if self.roberta is None else [r"text/.*"]  # a text tower beside RoBERTa reads nothing
        lr = [(NOT_REACHED, 0.0), *((pattern, 0.0) for pattern in still)]
        lr += [(rf"{FUSION_PART}/({'|'.join(HEADS)})/.*", options.head_lr), (TOKEN_TYPES, 1.0)]
        return Policy(lr=(*lr, (rf"{FUSION_PART}/.*", options.fusion_lr)), decay=NO_DECAY)

    # -- use --------------------------------------------------------------------------------------------------------

    def encode(
        self, params: Any, image: jax.Array, train: bool = False, key: jax.Array | None = None, micro_batch: int = 0
    ) -> dict[str, jax.Array]:
        """Pictures, uint8 (I, H, W, 3): "image_tokens" (I, T, C), and "image/embedding" (I, D) of folders with one."""
        rngs = None if key is None else {"drop_path": key}

        def encode(params: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
            inputs = inputs | {"image": self.encoder.normalise(inputs["image"])}
            out = self.model.apply(params, inputs, train, rngs)
            return {name: out[name] for name in ("image_tokens", "image/embedding") if name in out}

        inputs = {"image": image, "image_example": jnp.arange(len(image))}
        return by_micro_batches(encode, params, inputs, micro_batch)

    def fuse(
        self, params: Any, inputs: Mapping[str, jax.Array], train: bool = False, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Outputs of the fusion for "image_tokens" (N, T, C), "text" (N, L), "text_length" (N,) and what else it takes.

        Training draws dropout by "example" (N,).
        """
        rngs = None if key is None else {"dropout": key}
        return self.model.apply(params, inputs, train, rngs)


def by_micro_batches(encode: Any, params: Any, inputs: Any, micro_batch: int) -> Any:
    """`encode(params, inputs)`, at most `micro_batch` examples of a device at a time; 0: all at once."""
    if not micro_batch:
        return encode(params, inputs)
    axes = ambient_batch_axes()
    replicated = [axis for axis in axes if axis != "fsdp"]
    return encode_cached(encode, params, inputs, micro_batch=micro_batch, axes=axes, replicated=replicated)


def summed(function: Any, params: Any, inputs: Any, micro_batch: int) -> Any:
    """As `by_micro_batches`, of a function that gives sums over the examples: scalars, which are added up."""
    if not micro_batch:
        return function(params, inputs)

    def shares(params: Any, inputs: Any) -> Any:
        rows = len(jax.tree.leaves(inputs)[0])
        return jax.tree.map(lambda total: jnp.broadcast_to(total / rows, (rows,)), function(params, inputs))

    return jax.tree.map(jnp.sum, by_micro_batches(shares, params, inputs, micro_batch))


def text_ids(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, int]:
    """int32 (L,) and the number of its tokens. Raises UserError for a text without any."""
    ids = tokenizer(text)
    return ids, int(tokenizer.lengths(ids))


def open_fusion_encoder(config: ConfigDict) -> Encoder:
    """The towers of `config.init`, with a row of the table of words for the mask.

    Towers of very small pictures, such as those of configs/pretrain.py, are given the sizes `LAPTOP` where the
    configuration says none: one token for a picture tells nothing about where things are in it.

    Raises:
      UserError: as `Encoder`.
    """
    given = config.model.overrides.to_dict()
    encoder = open_encoder(config)
    _check_tokenizer(config, encoder)
    if (
        FUSION_PART not in encoder.description.parts
        and encoder.model.config.res < LAPTOP["res"]
        and given["res"] is None
    ):
        length = max(encoder.model.config.text_length, LAPTOP["text_length"])
        given |= {"res": LAPTOP["res"], "window": LAPTOP["window"], "text_length": given["text_length"] or length}
        encoder = _again(config, given)
    if not encoder.has_text or encoder.tokenizer is None:
        return encoder
    rows = max(encoder.model.config.vocab_size, encoder.tokenizer.masked_vocab_size)
    return encoder if rows == encoder.model.config.vocab_size else _again(config, given | {"vocab_size": rows})


def _check_tokenizer(config: ConfigDict, encoder: Encoder) -> None:
    """Raises UserError where the tokenizer that is given is not the one that the weights know the words of."""
    trained, given = encoder.description.tokenizer, config.text.tokenizer
    if not encoder.has_text or not (config.init and trained and given) or encoder.tokenizer is None:
        return
    own = load_tokenizer(trained, encoder.tokenizer.length)
    if own.vocab_size != encoder.tokenizer.vocab_size or not np.array_equal(
        own(TOKENIZED), encoder.tokenizer(TOKENIZED)
    ):
        raise UserError(
            f"config.text.tokenizer={given} has another vocabulary than {trained}, which the weights of {config.init} "
            "were trained with: leave it empty"
        )


def _again(config: ConfigDict, given: Mapping[str, Any]) -> Encoder:
    return Encoder(config.init, given, config.text.tokenizer, config.precision, config.model.variant)


def towers_folder(fusion: FusedTowers, init: str) -> str:
    """Where the fusion of a folder has its towers from, if that is still there; else the folder.

    What has been trained with a fusion has forgotten some of what the towers alone could do.
    """
    first = str(fusion.encoder.description.source.get("init", ""))
    try:
        return checkpoint_folder(first) if first and fusion.trained else init
    except UserError:
        return init


def grown_towers(folder: str, like: Encoder) -> tuple[Encoder, Callable[[Mesh], Any]]:
    """The towers of another folder at the sizes of `like`, and what loads their parameters."""
    sizes = {name: like.model.config[name] for name in ("res", "window", "text_length", "vocab_size")}
    encoder = Encoder(folder, sizes, like.tokenizer_spec, like.model.config.dtype)

    def load_on(mesh: Mesh) -> Any:
        shapes = jax.eval_shape(encoder.init, jax.random.key(0))
        places = jax.tree.map(lambda leaf: leaf.sharding, params_like(shapes, mesh))
        fresh = jax.jit(encoder.init, out_shardings=places)(jax.random.key(0))
        return load(encoder.description.folder, fresh, ((MAP_NORMS, "new"), *GROWN, *RESIZED), encoder.model.adapt)

    return encoder, load_on


def open_fusion(
    config: ConfigDict, heads: Sequence[str], answers: Sequence[str] = (), sizes: Mapping[str, Any] | None = None
) -> FusedTowers:
    """The fusion of `config.fusion` on the towers of `config.init`; `sizes` are the task's own. Raises as both."""
    given = {**config.fusion.overrides.to_dict(), **(sizes or {})}
    encoder, language, text = open_fusion_encoder(config), config.language, None
    if language.init or ROBERTA_PART in encoder.description.parts:
        text = RobertaEncoder(describe(language.init) if language.init else encoder.description, language.length)
    return FusedTowers(encoder, config.fusion.variant, heads, answers, given, text, config.fusion.begin)


def fusion_identity(fusion: FusedTowers) -> dict[str, Any]:
    """What says which model it is, for `Suite.identity`."""
    found = {f"fusion.{name}": value for name, value in sorted(fusion.overrides.items())}
    found |= {
        "fusion.begin": fusion.begin,
        "fusion.variant": fusion.variant,
        "text.tokenizer": fusion.encoder.tokenizer_spec,
    }
    found |= {} if fusion.roberta is None else {f"language.{k}": v for k, v in fusion.roberta.describe().items()}
    return found | model_identity(fusion.encoder.model)


def describe_fusion(name: str, fusion: FusedTowers, config: ConfigDict, **own: Any) -> dict[str, Any]:
    """Content of the `model.json` of a task called `name`; `own`: more of the fusion's part."""
    parts = fusion.describe()
    return make_description(
        name,
        parts | {FUSION_PART: parts[FUSION_PART] | own},
        tokenizer=fusion.encoder.tokenizer_spec,
        source={"init": config.init, "data": config.data.train},
    )
