"""The detector of a checkpoint folder, or a fresh one on the towers of a folder: what training and use share."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from florence_jax.errors import UserError
from florence_jax.models.anchors import level_shapes
from florence_jax.models.detections import CLASSES_AT_ONCE, candidates, merge
from florence_jax.models.detector import build_detector, resolve_detector
from florence_jax.params.rules import Rules
from florence_jax.params.sharding import params_like, place, whole_like
from florence_jax.params.weights import load
from florence_jax.tasks.encoder import MAP_NORMS, RESIZED, Encoder

DETECTOR = "detector"  # its part in model.json, and the entry of its parameters
CLASS_LAYER = "class_logits"  # below that entry: the only parameters whose last axis is the classes
# What pretraining has not trained: the detector, and the norms of maps, which only the detection mode has.
FRESH = ((r"detector/.*", "new"), (MAP_NORMS, "new"))


class Options(NamedTuple):
    """Which detections are given, see `models.detections`, and how many views a picture has.

    Attributes:
      threshold: least score. per_level: pairs of place and class that go on. iou: of boxes of which one is dropped.
      most: of a picture.
      scales: multi-scale testing: shares of the size of the bucket, each at most 1; what they give is put together.
      flip: each also as in a mirror.
      root: scores are told as their square roots, as ATSS's and GLIP's are; their order is the same.
    """

    threshold: float = 0.05
    per_level: int = 1000
    iou: float = 0.6
    most: int = 100
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    root: bool = False


class Detector:
    """An image tower with a Dynamic Head on its maps.

    Args:
      encoder: the towers.
      variant: of the detector, a key of `models.detector.DETECTORS`; '' for the folder's, or a choice by the tower.
      classes: their names, in the order of the logits; () for the folder's.
      overrides: fields of the detector's sizes on top of the folder's; None leaves one alone.
      options: fields of `Options` on top of the folder's; None leaves one alone.

    Attributes:
      encoder. model: `Model`. variant, overrides, config: of the detector. classes: names. options.
      part: the detector's in the folder's `model.json`; {} where it holds none. trained: whether it holds one.

    Raises:
      UserError: for an unknown variant or option, and where nobody names the classes.
    """

    def __init__(
        self,
        encoder: Encoder,
        variant: str = "",
        classes: Sequence[str] = (),
        overrides: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        self.part: dict[str, Any] = encoder.description.parts.get(DETECTOR, {})
        self.encoder, self.trained = encoder, bool(self.part)
        self.classes = tuple(classes or self.part.get("classes", ()))
        if not self.classes:
            raise UserError(
                f"{encoder.description.folder} holds no detector: train one with python -m florence_jax.main "
                f"--config=configs/detect.py --config.init={encoder.description.folder} --config.data.train=DATA"
            )
        by_tower = "tiny" if encoder.variant == "ti" else "dyhead"
        self.variant = variant or self.part.get("variant", by_tower)
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        known = dict(self.part["overrides"]) if self.variant == self.part.get("variant") else {}
        self.overrides = known | given
        chosen = {name: value for name, value in (options or {}).items() if value is not None}
        self.options = Options(**self.part.get("options", {}) | chosen)
        if not self.options.scales or not all(0 < scale <= 1 for scale in self.options.scales):
            raise UserError(f"config.detections.scales={self.options.scales} must be above 0 and at most 1")
        self.config = resolve_detector(self.variant, **self.overrides)
        self.model = build_detector(encoder.model.config, self.variant, len(self.classes), **self.overrides)

    def describe(self) -> dict[str, Any]:
        """The detector's part of `model.json`, without what only a training knows."""
        return {
            "variant": self.variant,
            "overrides": self.overrides,
            "classes": list(self.classes),
            "options": self.options._asdict(),
            "entries": [DETECTOR],
        }

    # -- parameters -------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters: of the towers, the image tower with the norms of its maps, and of the detector."""
        params = self.model.init(key)
        return self.encoder.init(key) | {name: params[name] for name in ("image", DETECTOR)}

    def load(self, like: Mapping[str, Any]) -> dict[str, Any]:
        """The folder's parameters on the devices of `like`, whose fresh values are taken for what it lacks.

        A class that the folder's detector knows by name keeps what it learned, whatever its place; another begins.
        """
        folder = self.encoder.description.folder
        if not folder:
            raise UserError("no weights to load: give them with --config.init=DIR")
        if not self.trained:
            return load(folder, like, (*FRESH, *RESIZED), self.model.adapt)
        same = self.classes == tuple(self.part["classes"])
        rules = () if same else ((f"{DETECTOR}/{CLASS_LAYER}/.*", "new"),)
        params = load(folder, like, (*rules, *RESIZED), self.model.adapt)
        if not same:
            params[DETECTOR] = params[DETECTOR] | {CLASS_LAYER: self._known_classes(params[DETECTOR][CLASS_LAYER])}
        return params

    def load_on(self, mesh: Mesh, rules: Rules[int | str] = ()) -> dict[str, Any]:
        """The parameters of a folder that holds a detector of these classes, sharded over a mesh."""
        return self.load(params_like(jax.eval_shape(self.init, jax.random.key(0)), mesh, rules))

    def saved_class_layer(self, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The class layer of the folder's detector, of its own classes, whole on the devices of `like`, another one."""
        shapes = {
            name: jax.ShapeDtypeStruct(
                (*leaf.shape[:-1], len(self.part["classes"])), leaf.dtype, sharding=whole_like(leaf.sharding)
            )
            for name, leaf in like.items()
        }
        rules = ((f"{DETECTOR}/{CLASS_LAYER}/.*", "read"), (".*", "new"))
        return load(self.encoder.description.folder, {DETECTOR: {CLASS_LAYER: shapes}}, rules)[DETECTOR][CLASS_LAYER]

    def _known_classes(self, fresh: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The class layer: columns of the folder's, by name, in place of fresh ones."""
        places = {name: place for place, name in enumerate(self.part["classes"])}
        known = [(k, places[name]) for k, name in enumerate(self.classes) if name in places]
        to, source = np.array(known, np.int64).reshape(-1, 2).T
        old, found = self.saved_class_layer(fresh), {}
        for name, leaf in fresh.items():
            values = np.array(jax.jit(jnp.copy, out_shardings=whole_like(leaf.sharding))(leaf))
            values[..., to] = np.asarray(old[name])[..., source]
            found[name] = place(values, leaf.sharding)
        return found

    # -- use --------------------------------------------------------------------------------------------------------

    def outputs(
        self, params: Any, batch: Mapping[str, jax.Array], train: bool = False, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """See `build_detector`; the batch has "image" uint8 (B, H, W, 3), "valid" int32 (B, 2), perhaps "drawn"."""
        inputs = {"image": self.encoder.normalise(batch["image"]), "image_valid": batch["valid"]}
        inputs |= {"drawn": batch["drawn"]} if "drawn" in batch else {}
        return self.model.apply(params, inputs, train, None if key is None else {"drop_path": key})

    def detect(self, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What is found in each picture, as `models.detections.merge` gives it, of all views together."""
        return self.look(params, batch)[0]

    def look(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], Mapping[str, jax.Array]]:
        """As `detect`, and the model's outputs of the first view: the whole picture, at the first of the scales."""
        options, views = self.options, []
        first: Mapping[str, jax.Array] = {}
        for scale in options.scales:
            view = scaled(batch["image"], batch["valid"], scale, self.config.multiple)
            for flip in (False, True)[: 1 + options.flip]:
                seen = mirrored(*view) if flip else view[0]
                out = self.outputs(params, {"image": seen, "valid": view[1]})
                first = first or out
                found = self._candidates(params, out, *view)
                boxes = found["boxes"]
                if flip:
                    width = view[1][:, None, 1].astype(boxes.dtype)
                    boxes = jnp.stack([width - boxes[..., 2], boxes[..., 1], width - boxes[..., 0], boxes[..., 3]], -1)
                views.append(found | {"boxes": boxes / scale})
        found = merge(views, options.iou, options.most)
        return (found | {"scores": jnp.sqrt(found["scores"])} if options.root else found), first

    def _candidates(
        self, params: Any, out: Mapping[str, jax.Array], image: jax.Array, valid: jax.Array
    ) -> dict[str, jax.Array]:
        levels = [height * width for height, width in level_shapes(*image.shape[1:3])]
        layer = params[DETECTOR][CLASS_LAYER] if len(self.classes) > CLASSES_AT_ONCE else None
        return candidates(out, valid, levels, self.options.threshold, self.options.per_level, layer)


def scaled(image: jax.Array, valid: jax.Array, scale: float, multiple: int) -> tuple[jax.Array, jax.Array]:
    """Padded pictures uint8 (B, H, W, 3) and their sizes int32 (B, 2), made smaller, antialiased.

    What they lie on is padded to a multiple of so many pixels.
    """
    if scale == 1:
        return image, valid
    batch, *sides, channels = image.shape
    small = [round(side * scale) for side in sides]
    resized = jax.image.resize(image.astype(jnp.float32), (batch, *small, channels), "cubic")
    pads = [(0, -side % multiple) for side in small]
    padded = jnp.pad(resized.round().clip(0, 255), ((0, 0), *pads, (0, 0)))
    return padded.astype(image.dtype), jnp.ceil(valid * scale).astype(valid.dtype)


def mirrored(image: jax.Array, valid: jax.Array) -> jax.Array:
    """Padded pictures (B, H, W, 3), each with its own part, int32 (B, 2), from right to left."""
    columns = jnp.arange(image.shape[2])[None]
    from_right = valid[:, 1:] - 1 - columns
    places = jnp.where(from_right >= 0, from_right, columns)
    return jnp.take_along_axis(image, places[:, None, :, None], axis=2)
