"""The towers of a checkpoint folder, for tasks and tools that start from trained weights."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.tokenizers import Tokenizer, load_tokenizer
from florence_jax.errors import UserError
from florence_jax.models import florence
from florence_jax.models.base import Model
from florence_jax.models.layers import unit_norm
from florence_jax.models.products import compute_dtype
from florence_jax.models.sizes import VARIANTS, ModelConfig, resolve_config
from florence_jax.params.rules import Rules
from florence_jax.params.sharding import params_like
from florence_jax.params.weights import Description, describe, load
from florence_jax.tasks.linear_head import ENTRY, LinearHead

# Channel statistics of ImageNet, in units of a full-scale pixel.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
DEFAULT_TOKENIZER = "sentencepiece"  # the shipped one
# For `params.weights.load`: what depends on the image size is resized where it differs; all else must have its shape.
RESIZED = ((r".*/relative_position_bias_table|image/position_embedding", "adapt"), (".*", "read"))
MAP_NORMS = r"image/norm\d+/.*"  # norms of the tower's maps, which only detectors have
# Towers alone also of the folder of a detector.
TOWER_RULES = ((MAP_NORMS, "new"), *RESIZED)


# Fields of a model that the shapes of its parameters do not show.
UNSEEN = (
    "heads", "text_heads", "image_activation", "text_activation", "image_eps", "text_eps", "text_causal", "image_mean",
    "image_std",
)  # fmt: skip


class Encoder:
    """Image tower, and text tower where there is one, of a checkpoint folder.

    Args:
      init: the folder, see `params.weights.describe`; '' for no weights: towers of `variant`, and nothing to load.
      overrides: fields of the model on top of the folder's, such as `res`; None leaves a field alone. Another `res`
        brings the variant's window for it.
      tokenizer: see `data.tokenizers.load_tokenizer`; '' takes the one that the folder was trained with.
      precision: compute dtype, or another `config.precision`.
      variant: '' for the folder's.

    Attributes:
      description: of the folder. variant, overrides: of the towers, as for `florence.build`. model: `Model`.
      predict: pure functions (params, batch) -> float32 (B, D): 'image' and 'text', unit vectors of the joint space
        ('image' of a folder without projection: the features, made unit), 'features', what the image tower gives
        before the projection, and 'logits' (B, K) of the folder's classifier, where it holds one.

    Raises:
      UserError: for a folder without a model, unknown options, an unreadable tokenizer.
    """

    def __init__(
        self,
        init: str,
        overrides: Mapping[str, Any] | None = None,
        tokenizer: str = "",
        precision: str = "float32",
        variant: str = "",
    ):
        self.description = describe(init) if init else _fresh(variant)
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        if "towers" not in self.description.parts:
            raise UserError(f"{self.description.folder} holds no towers, only {', '.join(self.description.parts)}")
        self._part = self.description.parts["towers"]
        self.variant, base = self._part["variant"], dict(self._part["overrides"])
        if variant and variant != self.variant:
            raise UserError(f"the weights of {init} are of variant {self.variant}, not {variant}")
        if "res" in given and given["res"] != base.get("res", VARIANTS[self.variant]["res"]):
            base.pop("window", None)
        self.overrides = base | given
        self.tokenizer_spec = tokenizer or self.description.tokenizer
        self._tokenizer: Tokenizer | None = None
        if self.tokenizer_spec and self.has_text:
            options: dict[str, Any] = {"model": {"variant": self.variant, "overrides": self.overrides}}
            options |= {"text": {"tokenizer": self.tokenizer_spec}, "precision": precision}
            self._tokenizer, self.model = build_model(ConfigDict(options))
        else:
            self.model = florence.build(self.variant, **{**self.overrides, "dtype": compute_dtype(precision)})
        self.predict = {"image": self._image, "text": self._text, "features": self._features, "logits": self._logits}

    @property
    def has_text(self) -> bool:
        """Whether the folder holds a text tower."""
        return {"text", "text_projection", "image_projection"} <= set(self.description.entries)

    @property
    def can_embed_text(self) -> bool:
        """Whether texts can be embedded: there is a text tower, and its tokenizer is known."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the text tower; None for a folder that holds only an image tower.

        Raises:
          UserError: if there is a text tower and nobody said which tokenizer it was trained with.
        """
        if self.has_text and self._tokenizer is None:
            raise UserError(
                f"{self.description.folder} does not say which tokenizer it was trained with: give it with "
                "--config.text.tokenizer=FILE, from Python Florence(..., tokenizer=FILE) (CLIP, OpenCLIP and UniCL: "
                "bpe_simple_vocab_16e6.txt.gz of the open-clip-torch package)"
            )
        return self._tokenizer

    @functools.cached_property
    def head(self) -> LinearHead | None:
        """The classifier that the folder also holds, if it does; its classes are those of `description`."""
        part = self.description.parts.get(ENTRY)
        return None if part is None else LinearHead.of(part, len(self.description.classes))

    @property
    def known_head(self) -> LinearHead:
        """As `head`. Raises UserError if there is none."""
        if self.head is None:
            raise UserError(
                f"{self.description.folder} holds no classifier: give weights of configs/classify.py:"
                "protocol=finetune_linear, or name the classes (zero-shot)"
            )
        return self.head

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters, of the towers that the folder holds."""
        params = self.model.init(key)
        return {name: params[name] for name in self.description.entries if name in params}

    def towers_part(self) -> dict[str, Any]:
        """Of the folder's towers, for the `model.json` of a run that starts from them."""
        known: dict[str, Any] = {name: self._part[name] for name in ("entries", "evaluation") if name in self._part}
        return {"variant": self.variant, "overrides": self.overrides, **known}

    def load(self, like: Mapping[str, Any], new: tuple[str, ...] = ()) -> dict[str, Any]:
        """The folder's parameters on the devices of `like`, but for the entries `new`; see `params.weights.load`."""
        if not self.description.folder:
            raise UserError("no weights to load: give them with --config.init=DIR")
        rules = (*((f"{name}(/.*)?", "new") for name in new), *self.tower_rules)
        return load(self.description.folder, like, rules, self.model.adapt)

    @property
    def tower_rules(self) -> Rules[str]:
        """How `params.weights.load` reads the folder's towers."""
        return RESIZED if self.model.config.size_mode == "detection" else TOWER_RULES

    def load_on(self, mesh: Mesh, rules: Rules[int | str] = (), head: bool = False) -> dict[str, Any]:
        """The folder's parameters, sharded over a mesh.

        Args:
          mesh: device mesh.
          rules: are asked before the project's `SHARDING_RULES`.
          head: read the folder's classifier too.
        """
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        if head and (found := self.head) is not None:
            shapes[ENTRY] = jax.eval_shape(lambda: found.init(self.model.config))
        return self.load(params_like(shapes, mesh, policy=rules))

    @functools.cached_property
    def eval_ops(self) -> str:
        """Image ops of evaluation: as the folder says its publishers do, else as CLIP; see `evaluation_ops`."""
        return evaluation_ops(self._part.get("evaluation") or {}, self.model.config.res)

    def normalise(self, image: jax.Array) -> jax.Array:
        """uint8 (..., H, W, 3) as the model was trained with."""
        return normalise(image, self.model.config.image_mean, self.model.config.image_std)

    def _features(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.model.apply(params, {"image": self.normalise(batch["image"])})["image/pooled"]

    def _logits(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.known_head.logits(params, self.model.apply(params, {"image": self.normalise(batch["image"])}))

    def _image(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        if "image_projection" not in self.description.entries:
            return unit_norm(self._features(params, batch))
        return self.model.apply(params, {"image": self.normalise(batch["image"])})["image/embedding"]

    def _text(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.model.apply(params, text_inputs(batch))["text/embedding"]


def check_same_network(init: str, config: ModelConfig) -> None:
    """Raises `UserError` where a folder's towers differ from these in what the shapes of parameters do not show.

    Where a folder's weights start a model of the configuration's own, nothing else would notice that: the numbers would
    be wrong without a word. The resolution, the window and what only training uses may differ.
    """
    towers = describe(init).parts.get("towers")
    if towers is None:
        return  # `load` says what is missing
    saved = resolve_config(towers["variant"], **towers["overrides"])
    if wrong := [name for name in UNSEEN if saved[name] != config[name]]:
        given = " ".join(f'--config.model.overrides.{name}="{saved[name]}"'.replace(", ", ",") for name in wrong)
        said = ", ".join(f"{name} is {saved[name]}, not {config[name]}" for name in wrong)
        raise UserError(f"of the weights in {init} {said}: add {given}")


def evaluation_ops(evaluation: Mapping[str, Any], res: int) -> str:
    """The image ops of an evaluation at `res` pixels.

    Args:
      evaluation: of a part of `model.json`: "resize", 'shorter' (side, and a crop of the middle; the default) or
        'squash' (the whole picture, whatever its shape); "crop", side of the crop over the shorter side, default 1;
        "interpolation", default 'bicubic'.
      res: side of the square picture that the model takes.
    """
    kernel = evaluation.get("interpolation", "bicubic")
    how = "" if kernel == "bicubic" else f", interpolation={kernel}"
    if evaluation.get("resize") == "squash":
        return f"decode|resize_exact({res}{how})"
    shorter = int(res / evaluation.get("crop", 1.0) + 1e-6)  # as torchvision and timm round
    return f"decode|resize({shorter}{how})|center_crop({res})"


def text_inputs(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What the text tower takes of a batch: "text" and, where it is known, "text_length"."""
    return {name: batch[name] for name in ("text", "text_length") if name in batch}


def open_encoder(config: ConfigDict) -> Encoder:
    """The towers of `config.init`, or of `config.model.variant` where that is ''.

    Raises:
      UserError: as `Encoder`.
    """
    model = config.model
    return Encoder(config.init, model.overrides, config.text.tokenizer, config.precision, model.variant)


def _fresh(variant: str) -> Description:
    """Stands for a folder of towers that were never trained."""
    if not variant:
        raise UserError(
            "no weights: give them with --config.init=DIR; or the size of the model, --config.model.variant=NAME, to "
            "train from the beginning or to compile only"
        )
    entries = list(jax.eval_shape(florence.build(variant).init, jax.random.key(0)))
    towers = {"variant": variant, "overrides": {}, "entries": entries}
    return Description("", "", {"towers": towers}, DEFAULT_TOKENIZER, (), {})


def normalise(image: jax.Array, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> jax.Array:
    """uint8 (..., H, W, 3) on the device to float32 with mean 0 and deviation 1 per channel (default: of ImageNet)."""
    scale = 1.0 / (255.0 * np.asarray(std, np.float32))
    shift = -np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    ones = (1,) * (image.ndim - 1)
    return image.astype(jnp.float32) * scale.reshape(*ones, 3) + shift.reshape(*ones, 3)


def build_model(config: ConfigDict) -> tuple[Tokenizer, Model]:
    """The tokenizer of `config.text` and the model of `config.model` that fits it.

    The token embedding has the variant's number of rows, or the tokenizer's if that is larger. Where the end token is
    not the largest id of the vocabulary (SentencePiece), 'eot' pooling becomes 'eos', which looks for its id.

    Raises:
      UserError: for an unknown variant, option or tokenizer.
    """
    sizes = {**config.model.overrides, "dtype": compute_dtype(config.precision)}
    base = resolve_config(config.model.variant, **sizes)
    tokenizer = load_tokenizer(config.text.tokenizer, base.text_length)
    sizes["vocab_size"] = max(base.vocab_size, tokenizer.vocab_size)
    sizes |= {"text_pad_id": tokenizer.pad_id, "text_eot_id": tokenizer.eot_id}
    if base.text_pooling == "eot" and tokenizer.eot_id != tokenizer.vocab_size - 1:
        sizes["text_pooling"] = "eos"
    return tokenizer, florence.build(config.model.variant, **sizes)
