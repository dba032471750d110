"""A linear classifier on an image tower: fine-tuning trains it, evaluation and inference use it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.evaluators.metrics import sigmoid, softmax
from florence_jax.models.sizes import ModelConfig

ENTRY = "head"  # of the parameters, and of the parts in model.json


def feature_width(config: ModelConfig) -> int:
    """Of what the image tower gives before the projection."""
    stages = 1 if config.image_tower == "vit" else len(config.depths)
    return config.image_width * 2 ** (stages - 1)


class LinearHead(NamedTuple):
    """Which head it is; its parameters are {"weight" (C, K), "bias" (K,)}, float32.

    Attributes:
      classes: K.
      features: what it reads: 'pooled', the image tower's features, or 'embedding', the unit vector of the joint space
        times the logit scale, for a head made of class embeddings.
      multi: whether an image may have several classes; then each is judged by itself.
    """

    classes: int
    features: str
    multi: bool

    @classmethod
    def of(cls, part: Mapping[str, Any], classes: int) -> "LinearHead":
        """The head of a part of `model.json`."""
        return cls(classes, part["features"], part["multi"])

    def part(self) -> dict[str, Any]:
        """The head's part of `model.json`."""
        return {"features": self.features, "multi": self.multi, "entries": [ENTRY]}

    def init(self, config: ModelConfig) -> dict[str, jax.Array]:
        """Zeros, for the towers of `config`."""
        width = config.projection if self.features == "embedding" else feature_width(config)
        return {
            "weight": jnp.zeros((width, self.classes), jnp.float32),
            "bias": jnp.zeros((self.classes,), jnp.float32),
        }

    def logits(self, params: Mapping[str, Any], out: Mapping[str, jax.Array]) -> jax.Array:
        """float32 (B, K) from the outputs of the towers."""
        scaled = self.features == "embedding"
        features = out["logit_scale"] * out["image/embedding"] if scaled else out["image/pooled"]
        product = jnp.matmul(features, params[ENTRY]["weight"], precision="highest")
        return product + params[ENTRY]["bias"][None]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """float32 (N, K): rows sum to 1; with several classes an image each entry stands for itself."""
        return sigmoid(logits) if self.multi else softmax(logits)
