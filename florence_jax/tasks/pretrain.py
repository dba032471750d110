"""Image-text pretraining: two towers, the UniCL loss, prompt templates for short captions."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.captions import CaptionIndex
from florence_jax.data.ops.captions import caption_strings, parse_fields
from florence_jax.data.ops.parse import parse_ops
from florence_jax.data.pipeline import check_caption_fields, train_stream
from florence_jax.data.prompts import TEMPLATES
from florence_jax.data.records import Source
from florence_jax.data.sources.catalog import open_mixture, open_source
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.emoji import EmojiSplit
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.retrieval import open_retrieval
from florence_jax.losses.grad_cache import encode_pairs
from florence_jax.losses.unicl import unicl, unicl_sharded
from florence_jax.models.flops import forward_flops
from florence_jax.params.sharding import ambient_batch_axes
from florence_jax.params.weights import checkpoint_folder, load_parameters, make_description
from florence_jax.tasks.encoder import build_model, normalise

# CLIP's bounds of the learned logit scale (the logarithm of the multiplier), applied after each update.
LOGIT_SCALE_RANGE = (0.0, float(np.log(100.0)))


class Pretrain:
    """The `Task` of configs/pretrain.py.

    Raises:
      UserError: for an unknown variant, loss, source, transform or tokenizer.
    """

    def __init__(self, config: ConfigDict):
        if config.loss not in ("unicl", "clip"):
            raise UserError(f"config.loss={config.loss!r} is unknown; choose 'unicl' or 'clip'")
        self.config = config
        self.tokenizer, self.model = build_model(config)
        for name in ("train_image_ops", "eval_image_ops"):
            config.data[name] = config.data[name].replace("{res}", str(self.model.config.res))
        self._captions = config.data.captions.split("|")  # the fields of each text of a picture
        flops = forward_flops(self.model.config)
        self.flops_per_example = 3.0 * (flops["image"] + len(self._captions) * flops["text"])
        self.predict = {"image": self._embed_image, "text": self._embed_text}

    # -- model ------------------------------------------------------------------------------------------------------

    @property
    def description(self) -> dict[str, Any]:
        """Content of the `model.json` of a run."""
        model, entries = self.config.model, jax.eval_shape(self.init, jax.random.key(0))
        return make_description(
            self.config.task,
            {"towers": {"variant": model.variant, "overrides": model.overrides.to_dict(), "entries": list(entries)}},
            tokenizer=self.config.text.tokenizer,
            source={"init": self.config.init, "data": self.config.data.train},
        )

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters; see `models.florence`."""
        return self.model.init(key)

    def start(self, params: Any) -> Any:
        """The parameters of the run `config.init`, bias tables resized where the window is another."""
        return load_parameters(checkpoint_folder(self.config.init), params, average=False)

    def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """UniCL over the global batch; with `config.loss='clip'` every pair is its own class.

        With K texts a picture it is the mean of K losses, each of all pictures and one text of each: the image tower,
        by far the larger part of a step, learns from K descriptions at once. With `config.grad_cache.micro_batch` the
        towers run a micro-batch at a time: same value, same gradients.
        """
        axes, cache = ambient_batch_axes(), self.config.grad_cache
        texts = batch["text"].shape[1]

        def encode(params: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
            change = {"image": self._normalise, "text": lambda ids: ids.reshape(-1, ids.shape[-1])}  # (b K, L)
            inputs = {name: change[name](x) if name in change else x for name, x in inputs.items()}
            out = self.model.apply(params, inputs, train=True, rngs={"drop_path": key})
            back = {"image/embedding": (-1,), "text/embedding": (-1, texts)}
            return {name: out[name].reshape(*back[name], out[name].shape[-1]) for name in back if name in out}

        positions = jnp.arange(batch["label"].shape[0])
        out = encode_pairs(
            encode,
            params,
            {"image": batch["image"], "example": positions},
            {"text": batch["text"]},
            micro_batch=cache.micro_batch,
            towers=cache.towers,
            axes=axes,
            replicated=[axis for axis in axes if axis != "fsdp"],
        )
        scale = self.model.apply(params, {})["logit_scale"]
        contrast = functools.partial(unicl_sharded, axes=axes) if axes else unicl
        results = []
        for k in range(texts):
            labels = positions if self.config.loss == "clip" else batch["label"][:, k]
            results.append(contrast(out["image/embedding"], out["text/embedding"][:, k], labels, scale))
        loss, metrics = jax.tree.map(lambda *values: sum(values) / len(values), *results)
        return loss, metrics | {"logit_scale": scale}

    def project(self, params: Any) -> Any:
        """Clamps the logit scale to CLIP's range."""
        return params | {"logit_scale": jnp.clip(params["logit_scale"], *LOGIT_SCALE_RANGE)}

    def _normalise(self, image: jax.Array) -> jax.Array:
        return normalise(image, self.model.config.image_mean, self.model.config.image_std)

    def _embed_image(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.model.apply(params, {"image": self._normalise(batch["image"])})["image/embedding"]

    def _embed_text(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.model.apply(params, {"text": batch["text"]})["text/embedding"]

    # -- data -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _mixture(self) -> tuple[list[Source], list[float]]:
        return open_mixture(self.config.data.train)

    def open_data(self) -> None:
        """Raises UserError for a missing source, an unknown caption field or op."""
        check_caption_fields(self._mixture[0], {name for fields in self._captions for name in parse_fields(fields)})
        for ops in (self.config.data.train_image_ops, self.config.data.eval_image_ops):
            parse_ops(ops, {})
        if self.config.eval.source:
            open_source(self.config.eval.source)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the batches of `train_stream`, over all processes; K texts of each picture, "label" is of the text."""
        size, texts, model = self.config.batch_size, len(self._captions), self.model.config
        return {
            "image": jax.ShapeDtypeStruct((size, model.res, model.res, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((size, texts, model.text_length), jnp.int32),
            "label": jax.ShapeDtypeStruct((size, texts), jnp.int32),
            "corrupt": jax.ShapeDtypeStruct((size,), jnp.int32),
        }

    def train_stream(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Local batches from `start_step` on, as `batch_shapes` has them."""
        config, data = self.config, self.config.data
        sources, weights = self._mixture
        index = CaptionIndex.build(
            text
            for source in sources
            for record in source.metadata()
            for fields in self._captions
            for text in caption_strings(record, fields)
        )
        context = {
            "tokenizer": self.tokenizer,
            "caption_index": index,
            "templates": TEMPLATES if config.text.templates else (),
        }
        texts = ", ".join(map(repr, self._captions))
        ops = f"{data.train_image_ops}|texts({texts}, sampling={config.text.subword_sampling})|keep(image, text, label)"
        return train_stream(
            sources,
            weights,
            ops,
            context,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=data.workers,
            on_corrupt=data.on_corrupt,
            cache=data.cache,
        )

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """Held-out emoji splits when training on emoji, and retrieval on `config.eval.source` where one is given."""
        config = self.config
        embedder = Embedder(self.predict, self.tokenizer, mesh, config.eval.batch_size)
        ops = config.data.eval_image_ops
        found: list[Evaluator] = []
        if any(source.name.startswith("emoji:") for source in self._mixture[0]):
            found += [EmojiSplit(split, ops, embedder) for split in ("new_style", "new_names")]
        if config.eval.source:
            found.append(open_retrieval("held_out", open_source(config.eval.source), ops, embedder))
        return found
