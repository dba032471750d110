"""Image-text pretraining: two towers, the UniCL loss, prompt templates for short captions."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.batches import check_fields, known_captions
from florence_jax.data.ops.captions import MADE_OF_TEXTS, Caption, parse_fields
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.pipeline import TrainData
from florence_jax.data.prompts import TEMPLATES
from florence_jax.data.records import Source
from florence_jax.data.sources.catalog import open_mixture
from florence_jax.data.tokenizers import Tokenizer
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.emoji import EmojiSplit
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.retrieval import open_retrieval
from florence_jax.evaluators.zero_shot import open_zero_shot
from florence_jax.losses.grad_cache import encode_pairs
from florence_jax.losses.unicl import unicl, unicl_sharded
from florence_jax.models.base import Model, Params
from florence_jax.params.sharding import ambient_batch_axes, params_like
from florence_jax.params.weights import checkpoint_folder, load, make_description
from florence_jax.tasks.base import Plan, Task, frozen_parts, make_identity, make_plan, model_identity
from florence_jax.tasks.encoder import TOWER_RULES, build_model, check_same_network, normalise, text_inputs

# CLIP's bounds of the learned logit scale (the logarithm of the multiplier), applied after each update.
LOGIT_SCALE_RANGE = (0.0, float(np.log(100.0)))


IN_BATCH = (Chart("accuracy within the batch", {"image to text": "i2t_accuracy", "text to image": "t2i_accuracy"}),)
LOGIT_SCALE = Chart("logit scale", {"": "logit_scale"})


def clamp_logit_scale(params: Params) -> Params:
    """The parameters with the logit scale, where there is one, in CLIP's range."""
    if "logit_scale" not in params:
        return params
    return params | {"logit_scale": jnp.clip(params["logit_scale"], *LOGIT_SCALE_RANGE)}


class Pretrain(Task):
    """The `Task` of configs/pretrain.py.

    Attributes:
      tokenizer, model: of the towers. train_ops, eval_ops: image ops at the model's size.
      predict: pure functions (params, batch) -> float32 (B, D), 'image' and 'text'.

    Raises:
      UserError: for an unknown variant, loss, transform or tokenizer.
    """

    name = "pretrain"
    charts = (*IN_BATCH, LOGIT_SCALE)
    default_eval_ops = "decode|resize({res})|center_crop({res})"

    def __init__(self, config: ConfigDict):
        if config.loss not in ("unicl", "clip"):
            raise UserError(f"config.loss={config.loss!r} is unknown; choose 'unicl' or 'clip'")
        self.config = config
        self.tokenizer, self.model = self.open_model()
        res = str(self.model.config.res)
        self.train_ops = config.data.train_ops.replace("{res}", res)
        self.eval_ops = (config.data.eval_ops or self.default_eval_ops).replace("{res}", res)
        for ops in (self.train_ops, self.eval_ops):
            parse_ops(ops, {})
        self._captions = self.caption_fields()
        flops = self.model.flops
        self.flops_per_example = 3.0 * (flops["image"] + len(self._captions) * flops["text"])
        self.predict = {"image": self._embed_image, "text": self._embed_text}
        self.plan = self.length()

    def open_model(self) -> tuple[Tokenizer, Model]:
        """What is trained."""
        return build_model(self.config)

    def caption_fields(self) -> list[str]:
        """Of each text of a picture: `config.data.captions`, or what is in the data."""
        data, extra = self.config.data, self.config.text.extra_captions
        if data.captions:
            return data.captions.split("|")
        return known_captions(self.mixture[0], extra) if data.train else ["caption=1", *filter(None, [extra])]

    def length(self) -> Plan:
        """The plan."""
        return make_plan(self.config)

    @functools.cached_property
    def frozen(self) -> frozenset[str]:
        """See `frozen_parts`."""
        return frozen_parts(self, self.config)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        resolved = {
            "text.tokenizer": self.tokenizer_spec,
            "data.captions": "|".join(self._captions),
            "data.train_ops": self.train_ops,
            "data.eval_ops": self.eval_ops,
        }
        given = make_identity(self.config, "loss", "init", "data.train", "text.templates")
        return given | resolved | model_identity(self.model)

    @property
    def tokenizer_spec(self) -> str:
        """As for `data.tokenizers.load_tokenizer`."""
        return self.config.text.tokenizer

    @functools.cached_property
    def description(self) -> Mapping[str, Any]:
        """See `Suite`."""
        config = self.config
        return make_description(
            self.name,
            {"towers": self.towers_part()},
            tokenizer=self.tokenizer_spec,
            source={"init": config.init, "data": config.data.train},
        )

    def towers_part(self) -> dict[str, Any]:
        """What builds the towers again."""
        model, entries = self.config.model, jax.eval_shape(self.init, jax.random.key(0))
        return {"variant": model.variant, "overrides": model.overrides.to_dict(), "entries": list(entries)}

    # -- model ------------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; see `models.florence`."""
        return self.model.init(key)

    def start(self, params: Params) -> Params:
        """The parameters of the run `config.init`, bias tables resized where the window is another."""
        check_same_network(self.config.init, self.model.config)
        return load(checkpoint_folder(self.config.init), params, TOWER_RULES, self.model.adapt, average=False)

    def load(self, mesh: Mesh) -> Params:
        """The parameters of `config.init`: the moving average where that run kept one."""
        check_same_network(self.config.init, self.model.config)
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        like = params_like(shapes, mesh, self.config.mesh.sharding_rules, self.policy.sharding)
        return load(checkpoint_folder(self.config.init), like, TOWER_RULES, self.model.adapt)

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """UniCL over the global batch; with `config.loss='clip'` every pair is its own class.

        With K texts a picture it is the mean of K losses, each of all pictures and one text of each: the image tower,
        by far the larger part of a step, learns from K descriptions at once. With `config.grad_cache.micro_batch` the
        towers run a micro-batch at a time: same value, same gradients.
        """
        axes, cache, train = ambient_batch_axes(), self.config.grad_cache, "image" not in self.frozen
        texts = batch["text"].shape[1]

        def encode(params: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
            change = {
                "image": self._normalise,
                "text": lambda ids: ids.reshape(-1, ids.shape[-1]),  # (b K, L)
                "text_length": lambda lengths: lengths.reshape(-1),
            }
            inputs = {name: change[name](x) if name in change else x for name, x in inputs.items()}
            out = self.model.apply(params, inputs, train=train, rngs={"drop_path": key})
            back = {"image/embedding": (-1,), "text/embedding": (-1, texts)}
            return {name: out[name].reshape(*back[name], out[name].shape[-1]) for name in back if name in out}

        positions = jnp.arange(batch["label"].shape[0])
        out = encode_pairs(
            encode,
            params,
            {"image": batch["image"], "example": positions},
            text_inputs(batch),
            micro_batch=cache.micro_batch,
            towers=cache.towers,
            axes=axes,
            replicated=[axis for axis in axes if axis != "fsdp"],
        )
        scale = self.model.apply(params, {})["logit_scale"]
        contrast = functools.partial(unicl_sharded, axes=axes) if axes else unicl
        results = []
        for k in range(texts):
            labels = positions[:, None] if self.config.loss == "clip" else batch["label"][:, k]
            results.append(contrast(out["image/embedding"], out["text/embedding"][:, k], labels, scale))
        loss, metrics = jax.tree.map(lambda *values: sum(values) / len(values), *results)
        return loss, metrics | {"logit_scale": scale}

    def project(self, params: Params) -> Params:
        """Clamps the logit scale to CLIP's range."""
        return clamp_logit_scale(params)

    def _normalise(self, image: jax.Array) -> jax.Array:
        return normalise(image, self.model.config.image_mean, self.model.config.image_std)

    def _embed_image(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.model.apply(params, {"image": self._normalise(batch["image"])})["image/embedding"]

    def _embed_text(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.model.apply(params, text_inputs(batch))["text/embedding"]

    # -- data -------------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
        """See `Task`. There are K texts of each picture; "label" is of the text."""
        size, texts, model = self.plan.batch_size, len(self._captions), self.model.config
        shapes = {
            "image": jax.ShapeDtypeStruct((size, model.res, model.res, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((size, texts, model.text_length), jnp.int32),
            "text_length": jax.ShapeDtypeStruct((size, texts), jnp.int32),
            "label": jax.ShapeDtypeStruct((size, texts, 2), jnp.int32),
            "corrupt": jax.ShapeDtypeStruct((size,), jnp.int32),
        }
        return (shapes,)

    @functools.cached_property
    def mixture(self) -> tuple[list[Source], list[float]]:
        """Sources and weights of `config.data.train`."""
        return open_mixture(self.config.data.train)

    @property
    def sources(self) -> Sequence[Source]:
        """See `Suite`."""
        return self.mixture[0] if self.config.data.train else ()

    def train_data(self) -> TrainData:
        """See `Task`; raises `UserError` also for an unknown caption field."""
        config, (sources, weights) = self.config, self.mixture
        if not config.data.captions and not all(source.name.startswith("emoji:") for source in sources):
            logging.warning(
                "the texts of a picture are drawn from %s; --config.data.captions chooses other fields",
                " and from ".join(self._captions),
            )
        for fields in self._captions:
            check_fields(sources, [Caption(**parse_fields(fields))])
        context = {"tokenizer": self.tokenizer, "templates": TEMPLATES if config.text.templates else ()}
        texts, kept = ", ".join(map(repr, self._captions)), ", ".join(("image", *MADE_OF_TEXTS))
        ops = f"{self.train_ops}|texts({texts}, sampling={config.text.subword_sampling})|keep({kept})"
        return TrainData(sources, weights, ops, context)

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """Held-out emoji splits when training on emoji; zero-shot classification of the images of `config.data.test`,
        retrieval on the pairs of `config.eval.source`, where those are given.
        """
        config = self.config
        embedder = Embedder(self.predict, self.tokenizer, mesh, config.eval.batch_size)
        found: list[Evaluator] = []
        if any(source.name.startswith("emoji:") for source in self.mixture[0]):
            found += [EmojiSplit(split, self.eval_ops, embedder) for split in ("new_style", "new_names")]
        return [*found, *open_held_out(config, self.eval_ops, embedder)]


def open_held_out(config: ConfigDict, ops: str, embedder: Embedder) -> list[Evaluator]:
    """Zero-shot classification of the images of `config.data.test`, retrieval on the pairs of `config.eval.source`."""
    found: list[Evaluator] = []
    if config.data.test:
        found.append(open_zero_shot("test", config.data.test, ops, embedder, on_corrupt=config.data.on_corrupt))
    if config.eval.source:
        found.append(open_retrieval("held_out", config.eval.source, ops, embedder))
    return found
