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
from florence_jax.data.pipeline import train_stream
from florence_jax.data.sources import Source, open_mixture
from florence_jax.data.templates import TEMPLATES
from florence_jax.data.text import load_tokenizer
from florence_jax.data.transforms import caption_strings
from florence_jax.errors import UserError
from florence_jax.losses.grad_cache import encode_pairs
from florence_jax.losses.unicl import unicl, unicl_sharded
from florence_jax.models import florence
from florence_jax.train.sharding import ambient_batch_axes

# Channel statistics of ImageNet, in units of a full-scale pixel.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# CLIP's bounds of the learned logit scale (the logarithm of the multiplier), applied after each update.
LOGIT_SCALE_RANGE = (0.0, float(np.log(100.0)))


def normalise(image: jax.Array) -> jax.Array:
    """uint8 (B, H, W, 3) on the device to float32 with ImageNet's mean 0 and deviation 1 per channel."""
    scale = 1.0 / (255.0 * np.asarray(STD, np.float32))
    shift = -np.asarray(MEAN, np.float32) / np.asarray(STD, np.float32)
    return image.astype(jnp.float32) * scale[None, None, None] + shift[None, None, None]


class Pretrain:
    """The `Task` of configs/pretrain.py.

    Raises:
      UserError: for an unknown variant, loss, source, transform or tokenizer.
    """

    def __init__(self, config: ConfigDict):
        if config.loss not in ("unicl", "clip"):
            raise UserError(f"config.loss={config.loss!r} is unknown; choose 'unicl' or 'clip'")
        self.config = config
        sizes = dict(config.model.overrides)
        length = sizes.get("text_length", florence.resolve_config(config.model.variant, **sizes).text_length)
        self.tokenizer = load_tokenizer(config.text.tokenizer, length)
        sizes.setdefault("vocab_size", self.tokenizer.vocab_size)
        self.model = florence.build(config.model.variant, dtype=config.precision, **sizes)
        self.flops_per_example = 3.0 * sum(florence.forward_flops(self.model.config).values())
        self.predict = {"image": self._embed_image, "text": self._embed_text}

    # -- model ------------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters; see `models.florence`."""
        sizes = self.model.config
        batch = {
            "image": jnp.zeros((1, sizes.res, sizes.res, 3), jnp.float32),
            "text": jnp.zeros((1, sizes.text_length), jnp.int32),
        }
        return self.model.init(key, batch)

    def loss(
        self, params: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """UniCL over the global batch; with `config.loss='clip'` every pair is its own class.

        With `config.grad_cache.micro_batch` the towers run a micro-batch at a time: same value, same gradients.
        """
        axes, cache = ambient_batch_axes(), self.config.grad_cache

        def encode(params: Any, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
            inputs = {name: normalise(x) if name == "image" else x for name, x in inputs.items()}
            out = self.model.apply(params, inputs, train=True, rngs={"drop_path": key})
            return {name: value for name, value in out.items() if name.endswith("/embedding")}

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
        labels = positions if self.config.loss == "clip" else batch["label"]
        contrast = functools.partial(unicl_sharded, axes=axes) if axes else unicl
        loss, metrics = contrast(out["image/embedding"], out["text/embedding"], labels, scale)
        return loss, metrics | {"logit_scale": scale}

    def project(self, params: Any) -> Any:
        """Clamps the logit scale to CLIP's range."""
        return params | {"logit_scale": jnp.clip(params["logit_scale"], *LOGIT_SCALE_RANGE)}

    def _embed_image(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.model.apply(params, {"image": normalise(batch["image"])})["image/embedding"]

    def _embed_text(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.model.apply(params, {"text": batch["text"]})["text/embedding"]

    # -- data -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _mixture(self) -> tuple[list[Source], list[float]]:
        return open_mixture(self.config.data.train)

    def train_stream(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Local batches {"image" uint8, "text" int32, "label" int32, "corrupt" int32} from `start_step` on."""
        config, data = self.config, self.config.data
        sources, weights = self._mixture
        index = CaptionIndex.build(
            text for source in sources for record in source.metadata() for text in caption_strings(record, data.captions)
        )
        context = {
            "tokenizer": self.tokenizer,
            "caption_index": index,
            "templates": TEMPLATES if config.text.templates else (),
        }
        ops = f"{data.train_image_ops}|caption({data.captions})|label|prompt|tokenize|keep(image, text, label)"
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
        )

    def evaluators(self, mesh: Mesh) -> Sequence[Any]:
        """Held-out emoji splits when training on emoji, and retrieval on `config.eval.source` where one is given."""
        raise UserError("evaluators are set below")
