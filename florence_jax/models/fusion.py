"""Fusion of an image and a text on the two towers, with the heads of pretraining and of what is trained on it.

METER (Dou et al. 2022, arXiv 2111.02387), which Florence's section 3.4 adapts: two input projections, token types,
co-attention (`models/cross_attention.py`), poolers, heads.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from florence_jax.errors import UserError
from florence_jax.models.base import Model
from florence_jax.models.coswin import embedded_size
from florence_jax.models.cross_attention import CoAttention
from florence_jax.models.dropout import Dropout, drop_examples
from florence_jax.models.flops import forward_flops
from florence_jax.models.florence import TwoTowers, tower_inputs
from florence_jax.models.layers import NORMAL, Dense, Dtype, LayerNorm, gelu
from florence_jax.models.roberta import Roberta, RobertaConfig, roberta_flops
from florence_jax.models.sizes import ModelConfig

HEADS = ("mlm", "itm", "vqa", "nlvr2", "snli_ve", "rank")
CLASSES = {"itm": 2, "nlvr2": 2, "snli_ve": 3, "rank": 1}  # of the heads that choose; index 1 of itm: they match
HEAD_WIDTH = 64
KEY_SCALE = 4.0  # see `begin_in_joint_space`


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """Sizes of a fusion.

    Attributes:
      layers, width, mlp_ratio: of the two streams.
      head_width: channels of an attention head; it divides `width`.
      dropout: rate, of attention weights and of outputs, in [0, 1).
      token_types: rows of the token types: text, image, and for NLVR2 its second image.
      heads: some of `HEADS`.
      answers: of the head 'vqa'.
      vocabulary: words of the head 'mlm'; 0: as many as the text encoder has.

    Raises:
      UserError: for an unknown head, or sizes that do not fit together.
    """

    layers: int = 6
    width: int = 768
    head_width: int = HEAD_WIDTH
    mlp_ratio: float = 4
    dropout: float = 0.1
    token_types: int = 2
    heads: tuple[str, ...] = ("mlm", "itm")
    answers: int = 0
    vocabulary: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(self.heads))
        if unknown := [name for name in self.heads if name not in HEADS]:
            raise UserError(f"unknown head of the fusion {', '.join(unknown)}: choose of {', '.join(HEADS)}")
        for name in ("layers", "width", "head_width", "token_types"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"fusion {name}={value!r}: must be a whole number above 0")
        if self.width % self.head_width:
            raise UserError(f"fusion width={self.width} does not divide by head_width={self.head_width}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"fusion dropout={self.dropout}: must be in [0, 1)")
        if "vqa" in self.heads and self.answers < 1:
            raise UserError("the head 'vqa' needs its number of answers, at least one")
        if "nlvr2" in self.heads and self.token_types < 3:
            raise UserError("the head 'nlvr2' needs token_types=3: its second image has one of its own")


# ti is ours, for a laptop's CPU; meter has the sizes of METER's base models, whose towers do not matter.
FUSIONS = {"ti": FusionConfig(layers=2, width=128), "meter": FusionConfig()}


class _Classifier(nn.Module):
    """Linear, LayerNorm, GELU, linear: (N, C) -> float32 (N, classes); `bias`: what its logits begin at."""

    width: int
    classes: int
    bias: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = LayerNorm(dtype=self.dtype, name="norm")(Dense(self.width, dtype=self.dtype, name="hidden")(x))
        begin = nn.initializers.constant(self.bias)
        return Dense(self.classes, bias_init=begin, name="output")(gelu(hidden).astype(jnp.float32))


class _WordHead(nn.Module):
    """BERT's head of masked words: linear, GELU, LayerNorm, words: (N, P, W) -> float32 (N, P, vocabulary)."""

    vocabulary: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = gelu(Dense(x.shape[-1], dtype=self.dtype, name="hidden")(x))
        hidden = LayerNorm(1e-12, self.dtype, name="norm")(hidden)
        kernel = self.param("kernel", NORMAL, (x.shape[-1], self.vocabulary))
        bias = self.param("bias", nn.initializers.zeros, (self.vocabulary,))
        logits = jnp.matmul(hidden, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        return logits + bias[None, None]


class Fusion(nn.Module):
    """Projections, token types, co-attention, poolers and heads; see `build_fusion` for inputs and outputs.

    Attributes:
      config: sizes.
      vocabulary: of the head 'mlm'.
      pool_first: the image is pooled as its first token (a ViT's class token), not as the mean.
      remat, scan, dtype: as of the towers.
    """

    config: FusionConfig
    vocabulary: int
    pool_first: bool = False
    remat: str = "none"
    scan: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        text: jax.Array,
        image: jax.Array,
        lengths: jax.Array | None,
        batch: Mapping[str, jax.Array],
        drop: Dropout | None,
    ) -> dict[str, jax.Array]:
        """Fuses texts (N, L, C) with images (I, T, C')."""
        c, dense = self.config, functools.partial(Dense, dtype=self.dtype)
        types = self.param("token_types", NORMAL, (c.token_types, c.width)).astype(self.dtype)
        x = dense(c.width, name="text_input")(text) + types[None, None, 0]
        images = dense(c.width, name="image_input")(image)
        y = images_of_texts(images, batch.get("image_index"), len(x)) + types[None, None, 1]
        passes = 1
        if "image2_index" in batch and "nlvr2" in c.heads:
            second = images_of_texts(images, batch["image2_index"], len(x)) + types[None, None, 2]
            # Beside each other, not one after the other: a split of the batch over devices stays one.
            passes, y = 2, jnp.stack([y, second], 1).reshape(-1, *y.shape[1:])
            x, lengths = jnp.repeat(x, 2, axis=0), None if lengths is None else jnp.repeat(lengths, 2, axis=0)
            drop = drop and drop.copies(2)
        stack = CoAttention(
            c.layers, c.width // c.head_width, c.mlp_ratio, self.remat, self.scan, self.dtype, name="co_attention"
        )
        fused_text, fused_image, look = stack(x, y, lengths, drop)
        of_image = fused_image[:, 0] if self.pool_first else fused_image.astype(jnp.float32).mean(1)
        pooled = jnp.concatenate(
            [
                jnp.tanh(dense(c.width, name="text_pooler")(fused_text[:, 0])),
                jnp.tanh(dense(c.width, name="image_pooler")(of_image)),
            ],
            axis=-1,
        )
        first = {"fused_text": fused_text, "fused_image": fused_image, "attention": look, "pooled": pooled}
        outputs = {name: value[::passes] for name, value in first.items()}
        return outputs | self._heads(outputs, pooled.reshape(-1, passes * pooled.shape[-1]), batch.get("places"))

    def _heads(
        self, outputs: Mapping[str, jax.Array], both: jax.Array, places: jax.Array | None
    ) -> dict[str, jax.Array]:
        """The heads' logits; `both` is 'pooled', of the passes of two images beside each other."""
        c, pooled, logits = self.config, outputs["pooled"], {}
        classifier = functools.partial(_Classifier, 2 * c.width, dtype=self.dtype)
        for name in c.heads:
            if name in ("itm", "rank"):
                logits[f"{name}_logits"] = Dense(CLASSES[name], name=name)(pooled.astype(jnp.float32))
            elif name == "vqa":
                # One of the answers is right: else the first hundreds of steps learn that each is mostly wrong.
                rare = -math.log(max(c.answers - 1, 1))
                logits["answer_logits"] = classifier(c.answers, rare, name=name)(pooled)
            elif name == "snli_ve":
                logits["snli_ve_logits"] = classifier(CLASSES[name], name=name)(pooled)
            elif name == "nlvr2" and both.shape[-1] > pooled.shape[-1]:
                logits["nlvr2_logits"] = classifier(CLASSES[name], name=name)(both)
            elif name == "mlm" and places is not None:
                texts = outputs["fused_text"]
                states = jnp.take_along_axis(texts[:: len(texts) // len(places)], places[..., None], axis=1)
                logits["mlm_logits"] = _WordHead(self.vocabulary, self.dtype, name=name)(states)
        return logits


def images_of_texts(images: jax.Array, index: jax.Array | None, texts: int) -> jax.Array:
    """(I, ...) -> (N, ...), the image of each text.

    Args:
      images: (I, ...).
      index: int32 (N,), rows of `images`; None: the texts of an image lie beside each other, as many of each.
      texts: N.

    Raises:
      UserError: without an index, a number of texts that is no multiple of that of the images.
    """
    if index is not None:
        return jnp.take(images, index, axis=0)
    if texts % len(images):
        raise UserError(f"{texts} texts and {len(images)} images: say with image_index which belongs to which")
    return images if texts == len(images) else jnp.repeat(images, texts // len(images), axis=0)


def rank_as_match(fusion: Mapping[str, Any]) -> dict[str, Any]:
    """The fusion's parameters with the head 'rank' as what 'itm' says for a match: how ranking begins in METER."""
    return dict(fusion) | {"rank": {name: leaf[..., 1:] for name, leaf in fusion["itm"].items()}}


def begin_in_joint_space(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with a fresh fusion that begins with what the towers' training has aligned.

    The input projections begin as the towers' projections into their joint space, scaled to keep the size of what they
    project, and the keys of each cross-attention as its queries, `KEY_SCALE` times: a token of the text looks at those
    of the image that are like it. Drawn at random as in METER, the fusion needs far more steps to find that out.

    Args:
      params: "fusion", "image_projection", "text_projection"; the joint space has at most the width of the fusion.
    """
    fusion = dict(params["fusion"])
    for name in ("image", "text"):
        kernel, own = params[f"{name}_projection"]["kernel"], fusion[f"{name}_input"]
        kernel = kernel / (jnp.std(kernel) * kernel.shape[0] ** 0.5)
        fusion[f"{name}_input"] = own | {"kernel": own["kernel"].at[:, : kernel.shape[1]].set(kernel)}
    layers = {}
    for layer, streams in fusion["co_attention"].items():
        changed = {}
        for stream, parts in streams.items():
            attention = parts["cross_attention"]
            query = KEY_SCALE * attention["q"]["kernel"]
            both = attention["kv"]["kernel"].at[..., : query.shape[-1]].set(query)
            new = {"q": attention["q"] | {"kernel": query}, "kv": attention["kv"] | {"kernel": both}}
            changed[stream] = parts | {"cross_attention": attention | new}
        layers[layer] = changed
    return dict(params) | {"fusion": fusion | {"co_attention": layers}}


class FusionTowers(TwoTowers):
    """The towers and the fusion; see `build_fusion`."""

    sizes: FusionConfig
    encoder: RobertaConfig | None = None

    def setup(self) -> None:
        """Makes the submodules."""
        super().setup()
        c, words = self.config, _vocabulary(self.config, self.sizes, self.encoder)
        common: dict[str, Any] = dict(remat=c.remat, scan=c.scan, dtype=jnp.dtype(c.dtype))
        self.fusion = Fusion(self.sizes, words, c.image_tower == "vit", **common)
        if self.encoder is not None:
            self.roberta = Roberta(self.encoder, **common)

    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> dict[str, jax.Array]:
        """The towers' outputs, and the fusion's."""
        towers = ("image",) if self.encoder else ("image", "text", "text_length")
        given = {name: batch[name] for name in towers if name in batch}
        if self.is_initializing():
            batch = {name: value for name, value in batch.items() if name != "image_tokens"}
        elif ("image" in batch) == ("image_tokens" in batch):
            raise UserError("the fusion takes image or image_tokens, one of them")
        outputs = super().__call__(given | self._image_ids(batch, train), train)
        tokens = batch["image_tokens"] if "image_tokens" in batch else self._image_tokens(outputs)
        outputs["image_tokens"] = tokens
        if "text" not in batch:
            return outputs
        lengths = batch.get("text_length")
        if self.encoder is None:
            words = outputs["text/tokens"]
        else:
            words = self.roberta(batch["text"], lengths, self._drop(batch, train, self.encoder.dropout))
        outputs["text_tokens"] = words
        return outputs | self.fusion(words, tokens, lengths, batch, self._drop(batch, train, self.sizes.dropout))

    def _image_tokens(self, outputs: Mapping[str, jax.Array]) -> jax.Array:
        """(I, T, C): all tokens of the last stage after its LayerNorm, a ViT's class token first."""
        tokens = outputs["image/tokens"]
        if self.config.image_tower != "vit":
            return tokens
        return jnp.concatenate([outputs["image/pooled"][:, None].astype(tokens.dtype), tokens], axis=1)

    def _image_ids(self, batch: Mapping[str, jax.Array], train: bool) -> dict[str, jax.Array]:
        """The ids by which images draw their stochastic depth."""
        if "image_example" in batch:
            return {"example": batch["image_example"]}
        own = "text" not in batch or len(batch["text"]) == len(batch.get("image", ()))
        if "example" not in batch or ("image_index" not in batch and own):
            return {"example": batch["example"]} if "example" in batch else {}
        if train and self.config.drop_path and "image" in batch:
            raise UserError("texts share images: give image_example, the ids by which images draw stochastic depth")
        return {}

    def _drop(self, batch: Mapping[str, jax.Array], train: bool, rate: float) -> Dropout | None:
        if not train or not rate:
            return None
        if not self.has_rng("dropout"):
            raise UserError("training a fusion with dropout needs rngs={'dropout': key}")
        examples = batch["example"] if "example" in batch else jnp.arange(len(batch["text"]))
        return drop_examples(self.make_rng("dropout"), examples, rate)


def _vocabulary(config: ModelConfig, sizes: FusionConfig, encoder: RobertaConfig | None) -> int:
    """Words of the head 'mlm'."""
    return sizes.vocabulary or (config.vocab_size if encoder is None else encoder.vocabulary)


def resolve_fusion(variant: str, **overrides: Any) -> FusionConfig:
    """The sizes of a row of `FUSIONS` with `overrides` applied; None = keep the table's value.

    Raises:
      UserError: an unknown variant, option or choice; the message lists the known ones.
    """
    if variant not in FUSIONS:
        raise UserError(f"unknown fusion {variant!r}: choose one of {', '.join(FUSIONS)}")
    known = [field.name for field in dataclasses.fields(FusionConfig)]
    if unknown := sorted(overrides.keys() - set(known)):
        raise UserError(f"unknown fusion option {', '.join(unknown)}: known are {', '.join(known)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    return dataclasses.replace(FUSIONS[variant], **given)


def image_token_count(config: ModelConfig) -> int:
    """Tokens of an image of `config.res` pixels: 144 at 384, 324 at 576; of a ViT one more than its patches."""
    if config.image_tower == "vit":
        return 1 + (config.res // config.patch_size) ** 2
    side = config.res
    for stage in range(len(config.depths)):
        side = embedded_size(side, stage, config.embedding)
    return side**2


def image_token_width(config: ModelConfig) -> int:
    """Channels of the last stage."""
    return config.image_width * 2 ** (len(config.depths) - 1)


def place_count(length: int, share: float = 0.15) -> int:
    """Places of masked words that a text of `length` tokens has room for."""
    return math.ceil(share * length) + 1


def fusion_flops(config: ModelConfig, sizes: FusionConfig, encoder: RobertaConfig | None = None) -> dict[str, float]:
    """Of a forward pass of one text on one image: {'image': ..., 'text': ..., 'fusion': ...}; as `forward_flops`."""
    of_towers = forward_flops(config)
    length, width = config.text_length, config.text_width
    if encoder is not None:
        length, width, of_towers["text"] = encoder.length, encoder.width, roberta_flops(encoder)
    w, tokens = sizes.width, image_token_count(config)
    macs = 1.0 * w * (length * width + tokens * image_token_width(config)) + 2 * w**2
    for own, other in ((length, tokens), (tokens, length)):
        attend = (4 * own * w + 2 * own**2) * w + (2 * own * w + 2 * other * w + 2 * own * other) * w
        macs += sizes.layers * (attend + 2 * sizes.mlp_ratio * own * w**2)
    if "mlm" in sizes.heads:
        macs += place_count(length) * w * (w + _vocabulary(config, sizes, encoder))
    if "vqa" in sizes.heads:
        macs += 2 * w * (2 * w + sizes.answers)
    return {**of_towers, "fusion": 2.0 * macs}


def build_fusion(
    config: ModelConfig, variant: str, encoder: RobertaConfig | None = None, **overrides: Any
) -> Model[ModelConfig]:
    """A fusion on the image tower and a text encoder: {"fusion"} and what `florence.build` has beside it.

    The text encoder is the folder's own text tower, or RoBERTa, with parameters {"roberta"} and none of that tower.

    Its inputs, for N texts on I images, all in one call, so that an image is encoded once for all its texts:

      "image" float (I, H, W, 3), normalised, or "image_tokens" (I, T, C), the output of that name kept from before;
      "text" int32 (N, L) and "text_length" int32 (N,), tokens before the padding (without it there is none);
      "image_index" int32 (N,), the image of each text; without it the texts of an image lie beside each other, N / I
        of each;
      "image2_index" int32 (N,), of the second image, for the head 'nlvr2';
      "places" int32 (M, P), positions whose words the head 'mlm' is asked for, of every (N / M)-th text, the first one
        among them;
      "example" int32 (N,), ids by which texts draw dropout, default: positions in the batch; "image_example" int32
        (I,), ids by which images draw stochastic depth, default: those of the texts where each has its own image.

    Training needs rngs={'dropout': key}, and with drop_path > 0 'drop_path'. Without "text" images are encoded.

    Its outputs, beside the towers':

      'image_tokens' (I, T, C): the last stage after its LayerNorm, of a ViT with the class token first.
      'text_tokens' (N, L, C'), 'fused_text' (N, L, W), 'fused_image' (N, T, W): before and after the fusion.
      'pooled' (N, 2 W): text, image.
      'attention' float32 (N, T): where the text's first token looks in the last layer, mean over the heads.
      'itm_logits' (N, 2), 1 = match; 'mlm_logits' (M, P, vocabulary); 'answer_logits' (N, answers); 'nlvr2_logits'
        (N, 2), 1 = true; 'snli_ve_logits' (N, 3); 'rank_logits' (N, 1): float32, of the heads that there are.

    Args:
      config: of the towers.
      variant: a key of `FUSIONS`.
      encoder: sizes of RoBERTa; None for the text tower.
      **overrides: any field of `FusionConfig`; None = keep the table's value.

    Raises:
      UserError: an unknown variant, option or choice; from `apply`, inputs that do not fit together.
    """
    sizes = resolve_fusion(variant, **overrides)
    length = config.text_length if encoder is None else encoder.length
    towers, numbers = tower_inputs(config), ("text_length", "example", "image_index", "image2_index", "image_example")
    inputs = {
        "image": towers["image"],
        "image_tokens": jax.ShapeDtypeStruct((1, image_token_count(config), image_token_width(config)), jnp.float32),
        "text": jax.ShapeDtypeStruct((1, length), jnp.int32),
        "places": jax.ShapeDtypeStruct((1, place_count(length)), jnp.int32),
        **{name: jax.ShapeDtypeStruct((1,), jnp.int32) for name in numbers},
    }
    flops = fusion_flops(config, sizes, encoder)
    return Model(FusionTowers(config, sizes, encoder), config, inputs, optional=tuple(inputs), flops=flops)
