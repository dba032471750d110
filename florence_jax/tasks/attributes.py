"""Attributes of objects, learned beside their boxes: the head, its weights and its loss, joined for detection."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from florence_jax.data.sources.boxes import BoxSource
from florence_jax.data.visual_genome import MOST_ATTRIBUTES
from florence_jax.errors import UserError
from florence_jax.losses.attributes import attribute_loss, best_found
from florence_jax.models.attributes import build_attribute_head
from florence_jax.models.base import Params
from florence_jax.params.rules import Rules
from florence_jax.params.sharding import params_like
from florence_jax.params.weights import load
from florence_jax.tasks.detector import Detector

HEAD = "attributes"  # its part in model.json, and the entry of its parameters
ATTRIBUTE_WEIGHT = 0.5  # of its loss beside the detector's
MOST_TOLD = 8  # of an object
NAMELESS_ATTRIBUTES = tuple(f"attribute {number}" for number in range(400))  # of a head that is only compiled


class Attributes:
    """A head for attributes on the last stage of a detector's image tower.

    Args:
      names: of the attributes.
      detector: whose classes and tower it takes.

    Attributes:
      names: of the attributes.
    """

    def __init__(self, names: Sequence[str], detector: Detector):
        self.names, self._detector = tuple(names), detector
        channels = detector.encoder.model.config.image_width * 2**3
        self._head = build_attribute_head(channels, len(detector.classes), len(self.names))

    def describe(self) -> dict[str, Any]:
        """Its part of `model.json`."""
        return {"names": list(self.names), "classes": list(self._detector.classes), "entries": [HEAD]}

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, {"attributes": ...}."""
        return {HEAD: self._head.init(key)}

    def load(self, like: Mapping[str, Any]) -> Params:
        """The folder's parameters, where it holds a head of these attributes and classes; else `like`."""
        description = self._detector.encoder.description
        saved, own = description.parts.get(HEAD, {}), self.describe()
        same = all(saved.get(name) == own[name] for name in ("names", "classes"))
        return load(description.folder, {HEAD: like[HEAD]}, ((f"{HEAD}/.*", "read" if same else "new"),))

    def load_on(self, mesh: Mesh, rules: Rules[int | str] = ()) -> Params:
        """The parameters of a folder that holds this head, sharded over a mesh."""
        return self.load(params_like(jax.eval_shape(self.init, jax.random.key(0)), mesh, rules))

    def batch(self, rows: int, boxes: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What its loss needs of a batch, beside the detector's."""
        return {"attribute_ids": jax.ShapeDtypeStruct((rows, boxes, MOST_ATTRIBUTES), jnp.int32)}

    def loss(
        self, params: Params, outputs: Mapping[str, jax.Array], batch: Mapping[str, jax.Array], matched: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Half the mean cross entropy of annotated boxes and of as many that were found, and metrics.

        Args:
          params: with "attributes".
          outputs: the tower's and the detector's.
          batch: with "attribute_ids".
          matched: int (B, N), the object of each anchor, -1 for none.
        """
        boxes = batch["boxes"]
        places = jnp.broadcast_to(jnp.arange(boxes.shape[1], dtype=jnp.int32)[None], boxes.shape[:2])
        decoded = jax.lax.stop_gradient(outputs["detector/boxes"])
        found, of_object, good = best_found(matched, decoded, boxes, boxes.shape[1])
        places = jnp.concatenate([places, of_object], 1)
        class_ids = jnp.take_along_axis(batch["class_ids"], places, axis=1)
        logits = self.logits(params, outputs, jnp.concatenate([boxes, found], 1), class_ids)
        ids = jnp.take_along_axis(batch["attribute_ids"], places[..., None], axis=1)
        loss, number = attribute_loss(logits, ids, jnp.concatenate([batch["objects"], good], 1))
        return ATTRIBUTE_WEIGHT * loss, {"attribute_loss": ATTRIBUTE_WEIGHT * loss, "boxes_with_attributes": number}

    def logits(
        self, params: Params, outputs: Mapping[str, jax.Array], boxes: jax.Array, class_ids: jax.Array
    ) -> jax.Array:
        """float32 (B, R, A) of boxes (B, R, 4), in pixels of what the tower has seen, that hold `class_ids` (B, R)."""
        inputs = {"map": outputs["image/norm3"], "valid": outputs["image/valid3"]}
        return self._head.apply(params[HEAD], inputs | {"boxes": boxes, "class_ids": class_ids})["logits"]

    def detect(self, params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """As `Detector.detect`, with the likeliest attributes of each box.

        Returns:
          Also "attribute_ids" int32 and "attribute_scores" float32, (B, n, T), probabilities, falling.
        """
        found, outputs = self._detector.look(params, batch)
        seen = found["boxes"] * self._detector.options.scales[0]  # the map is of the first view
        chances = jax.nn.softmax(self.logits(params, outputs, seen, jnp.maximum(found["labels"], 0)))
        ids = jnp.broadcast_to(jnp.arange(len(self.names), dtype=jnp.int32)[None, None], chances.shape)
        falling, ids = jax.lax.sort((-chances, ids), num_keys=1, is_stable=True)
        return found | {"attribute_ids": ids[..., :MOST_TOLD], "attribute_scores": -falling[..., :MOST_TOLD]}

    def judge(self, params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Which objects have attributes, and of which of them the likeliest one is right: bool (B, M) each.

        Args:
          params: of the detector and the head.
          batch: "image", "valid", "boxes", "class_ids", "objects" and "attribute_ids", of the detector's classes and
            these attributes, -1 for others.
        """
        outputs = self._detector.outputs(params, batch)
        logits = self.logits(params, outputs, batch["boxes"], jnp.maximum(batch["class_ids"], 0))
        ids, best = batch["attribute_ids"], logits.argmax(-1).astype(jnp.int32)
        counted = batch["objects"] & (batch["class_ids"] >= 0) & (ids >= 0).any(-1)
        return {"counted": counted, "right": counted & (ids == best[..., None]).any(-1)}


def attributes_of_source(source: BoxSource | None, detector: Detector) -> Attributes:
    """A head for the attributes of what is trained on, None: it is only compiled. Raises UserError for none."""
    names = NAMELESS_ATTRIBUTES if source is None else getattr(source, "attribute_names", ())
    if not names:
        raise UserError(
            f"{getattr(source, 'name', '')} has no attributes: vg:FOLDER with attributes.json has, or give "
            "--config.detector.attributes=False"
        )
    return Attributes(names, detector)


def attributes_of_folder(detector: Detector) -> Attributes | None:
    """The head of a detector's folder; None where it holds none of its classes."""
    part = detector.encoder.description.parts.get(HEAD, {})
    return Attributes(part["names"], detector) if part.get("classes") == list(detector.classes) else None
