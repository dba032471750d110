"""The detector of a checkpoint folder, or a fresh one on the towers of a folder: what training and use share."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from florence_jax.params.rules import Rules
from florence_jax.params.sharding import params_like
from florence_jax.params.weights import load
from florence_jax.tasks.encoder import RESIZED, Encoder
from toy_detector.model import build_detector

DETECTOR = "detector"  # its part in model.json
ENTRIES = ("image", "detector")  # of the parameters: no text, no projection
# What pretraining has not trained: the detector, and the norms of maps, which only the detection mode has.
FRESH = ((r"detector/.*", "new"), (r"image/norm\d+/.*", "new"))


class Detector:
    """An image tower with a detector on its last map.

    Args:
      encoder: the tower, in detection mode.
      variant: of the detector; '' for the folder's.

    Attributes:
      encoder, model. trained: whether the folder holds a detector.
    """

    def __init__(self, encoder: Encoder, variant: str = ""):
        part = encoder.description.parts.get(DETECTOR)
        self.encoder, self.trained = encoder, part is not None
        self.variant = variant or (part or {}).get("variant", "")
        self.model = build_detector(encoder.model.config, self.variant)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters."""
        params = self.model.init(key)
        return {name: params[name] for name in ENTRIES}

    def load(self, like: Mapping[str, Any]) -> dict[str, Any]:
        """The folder's parameters on the devices of `like`, which gives what they lack."""
        rules = RESIZED if self.trained else (*FRESH, *RESIZED)
        return load(self.encoder.description.folder, like, rules, self.model.adapt)

    def load_on(self, mesh: Mesh, rules: Rules[int | str] = ()) -> dict[str, Any]:
        """The parameters of a folder that holds a detector, sharded over a mesh."""
        return self.load(params_like(jax.eval_shape(self.init, jax.random.key(0)), mesh, rules))

    def outputs(
        self, params: Any, batch: Mapping[str, jax.Array], train: bool = False, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """See `model.build_detector`; the batch has "image" uint8 (B, H, W, 3) and "valid" int32 (B, 2)."""
        inputs = {"image": self.encoder.normalise(batch["image"]), "image_valid": batch["valid"]}
        return self.model.apply(params, inputs, train, None if key is None else {"drop_path": key})

    def detect(self, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """For a `Predictor`: "found" (B, N, 4), boxes of the cells, and "scores" (B, N), 0 for cells of padding."""
        out = self.outputs(params, batch)
        scores = jnp.where(out["detector/inside"], jax.nn.sigmoid(out["detector/objectness"]), 0.0)
        return {"found": out["detector/boxes"], "scores": scores}
