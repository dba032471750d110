"""Classes of objects by name: proposals of a class-agnostic detector, classified by the two towers.

As Florence's zero-shot detection (arXiv 2111.11432, section 3.5): the image tower is frozen, its detector says where
things are, and each is classified as pictures are. What is cut out, and how the two scores are joined, the paper leaves
open; here it is as in RegionCLIP (Zhong et al. 2022) and R-CNN.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from florence_jax.data.sources.agnostic import OBJECT
from florence_jax.errors import UserError
from florence_jax.models.florence import embed_maps
from florence_jax.models.regions import crop_regions, name_boxes, widen_boxes
from florence_jax.models.roi_align import roi_align
from florence_jax.models.windows import zero_outside
from florence_jax.params.rules import Rules, path_string
from florence_jax.params.sharding import params_like, place, whole_like
from florence_jax.tasks.detector import DETECTOR, Detector
from florence_jax.tasks.encoder import Encoder

REGIONS = ("crops", "roi")
CROPS_AT_ONCE = 256  # of a batch, that are cut out and encoded at once
ROI_BINS = 7  # along each side of a region
LAST_STAGE, LAST_STRIDE = "image/stage3", 32


class ZeroShotOptions(NamedTuple):
    """How regions are proposed and classified.

    Attributes:
      region: 'crops': what is cut out goes through the image tower as a picture; 'roi': RoIAlign of the map that the
        detector has seen, last stage, then the tower's norm, mean and projection.
      margin, square: see `models.regions.widen_boxes`; a margin also for 'roi', which is never square.
      g: of objectness^(1 - g) x class^g, from 0 to 1.
      proposals: of a picture. proposal_iou: above it the worse of two proposals is dropped.
      iou: the same of two boxes of a class, in the end. most: boxes of a picture.
      background: whether the softmax over the classes has one more entry, of the logit `background_logit`.
      temperature: that cosines are divided by; None: as the towers were trained.
    """

    region: str = "crops"
    margin: float = 0.1
    square: bool = True
    g: float = 0.5
    proposals: int = 100
    proposal_iou: float = 0.9
    iou: float = 0.5
    most: int = 100
    background: bool = True
    background_logit: float = 0.0
    temperature: float | None = None


def check_options(options: ZeroShotOptions) -> None:
    """Raises UserError for a value that makes no sense."""
    if options.region not in REGIONS:
        raise UserError(f"zero_shot.region={options.region!r}: choose one of {', '.join(REGIONS)}")
    for name in ("g", "proposal_iou", "iou"):
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(f"zero_shot.{name}={getattr(options, name)} must be from 0 to 1")
    for name in ("proposals", "most"):
        if getattr(options, name) < 1:
            raise UserError(f"zero_shot.{name}={getattr(options, name)} must be at least 1")
    if options.margin < 0:
        raise UserError(f"zero_shot.margin={options.margin} must be at least 0, a share of the box's side")
    if options.temperature is not None and options.temperature <= 0:
        raise UserError(f"zero_shot.temperature={options.temperature} must be above 0, such as 0.01")


class ZeroShotDetector:
    """A class-agnostic detector and the two towers of its folder.

    Args:
      encoder: of the folder.
      options: see there.
      views: fields of `detector.Options` that the proposals are made with: per_level, scales, flip; None leaves one
        alone.

    Raises:
      UserError: for a folder without a class-agnostic detector, or without both towers.
    """

    def __init__(self, encoder: Encoder, options: ZeroShotOptions, views: Mapping[str, Any] | None = None):
        check_options(options)
        _check_folder(encoder)
        self.encoder, self.options = encoder, options
        made = {"threshold": 0.0, "iou": options.proposal_iou, "most": options.proposals}
        self.detector = Detector(encoder, options=dict(views or {}) | made)

    def load_on(self, mesh: Mesh, rules: Rules[int | str] = ()) -> dict[str, Any]:
        """The parameters of the folder, sharded over a mesh, as `with_towers` gives them."""
        return self.with_towers(self.detector.load_on(mesh, rules), mesh, rules)

    def with_towers(self, model: Mapping[str, Any], mesh: Mesh, rules: Rules[int | str] = ()) -> dict[str, Any]:
        """Parameters of the detector, as "model", and "towers", which classify.

        They are the same arrays, but for tables of windows, where maps of a picture that is classified are smaller than
        the detector's windows: these are resized.
        """
        wanted = params_like(jax.eval_shape(self.encoder.init, jax.random.key(0)), mesh, policy=rules)

        def of_towers(path: Any, like: jax.ShapeDtypeStruct, own: jax.Array) -> jax.Array:
            if own.shape == like.shape:
                return own
            whole = jax.jit(jnp.copy, out_shardings=whole_like(own.sharding))(own)
            values = self.encoder.model.adapt(path_string(path), np.asarray(whole), like)
            if values is None:
                raise UserError(f"{self.encoder.description.folder}: {path_string(path)} does not fit the towers")
            return place(values, like.sharding)

        return {
            "model": model,
            "towers": jax.tree_util.tree_map_with_path(of_towers, wanted, _leaves_of(model, wanted)),
        }

    def detect(self, params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What is found in each picture, as `models.detections.suppress` gives it.

        Args:
          params: as `load_on` gives them, and of K classes "classes" float32 (K, D), unit vectors, and "known" bool
            (K,), False for one that is none; see `evaluators.zero_shot_detection.class_inputs`.
          batch: "image" uint8 (B, H, W, 3) and "valid" int32 (B, 2).
        """
        found, outputs = self.detector.look(params["model"], batch)
        vectors = self._embed(params["towers"], batch, found["boxes"], outputs)
        return self._named(params, found["boxes"], found["scores"], vectors)

    def judge(self, params: Mapping[str, Any], batch: Mapping[str, jax.Array], draws: int) -> dict[str, jax.Array]:
        """As `detect`, with what it is to be compared with; see `evaluators.zero_shot_detection.ZeroShotDetection`.

        Args:
          params: as above.
          batch: also "boxes" float32 (B, M, 4), "class_ids" (B, M) and "objects" bool (B, M), the true boxes, and
            "index" int32 (B,).
          draws: how often classes are drawn at random.

        Returns:
          Beside what was found, under names that begin with a word: 'proposal_' the proposals, all of label 0; 'true_'
          what is found of the true boxes as proposals; 'chance0_', 'chance1_', ... of the proposals with classes drawn
          at random; and "true_best" int32 (B, M), the likeliest class of each true box.
        """
        found, outputs = self.detector.look(params["model"], batch)
        proposals, count = found["boxes"], found["boxes"].shape[1]
        boxes = jnp.concatenate([proposals, batch["boxes"]], 1)
        vectors = self._embed(params["towers"], batch, boxes, outputs)
        objects = batch["objects"].astype(jnp.float32)
        parts = {
            "": self._named(params, proposals, found["scores"], vectors[:, :count]),
            "true_": self._named(params, batch["boxes"], objects, vectors[:, count:]),
            "proposal_": found,
        }

        def drawn(index: jax.Array) -> jax.Array:  # the same for a picture in any batch
            key = jax.random.fold_in(jax.random.key(0), index.astype(jnp.uint32))
            return jax.random.randint(key, (draws, count), 0, params["known"].sum())

        labels = jax.vmap(drawn)(batch["index"])
        for draw in range(draws):
            one = jax.nn.one_hot(labels[:, draw], len(params["known"]))
            certain = jnp.where(one > 0, 0.0, -jnp.inf)
            parts[f"chance{draw}_"] = self._scored(proposals, found["scores"], certain, None)
        given = {f"{word}{name}": value for word, part in parts.items() for name, value in part.items()}
        best = self._logits(params, vectors[:, count:]).argmax(-1).astype(jnp.int32)
        return given | {"true_best": best, "true_class_ids": batch["class_ids"], "true_objects": batch["objects"]}

    # -- regions ----------------------------------------------------------------------------------------------------

    def _named(
        self, params: Mapping[str, Any], boxes: jax.Array, objectness: jax.Array, vectors: jax.Array
    ) -> dict[str, jax.Array]:
        background = self.options.background_logit if self.options.background else None
        return self._scored(boxes, objectness, self._logits(params, vectors), background)

    def _scored(
        self, boxes: jax.Array, objectness: jax.Array, logits: jax.Array, background: float | None
    ) -> dict[str, jax.Array]:
        options = self.options
        return name_boxes(boxes, objectness, logits, options.g, background, options.iou, options.most)

    def _logits(self, params: Mapping[str, Any], vectors: jax.Array) -> jax.Array:
        """(B, R, D) -> float32 (B, R, K)."""
        given = self.options.temperature
        scale = jnp.exp(params["towers"]["logit_scale"]) if given is None else 1 / given
        cosines = jnp.einsum("brd,kd->brk", vectors, params["classes"], precision="highest")
        return jnp.where(params["known"][None, None], scale * cosines, -jnp.inf)

    def _embed(
        self, params: Any, batch: Mapping[str, jax.Array], boxes: jax.Array, outputs: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Unit vectors of regions: boxes (B, R, 4) -> float32 (B, R, D)."""
        options = self.options
        if options.region == "crops":
            return self._embed_crops(params, batch, widen_boxes(boxes, options.margin, options.square))
        stride = LAST_STRIDE / self.detector.options.scales[0]  # the map is of the first view
        maps = roi_align(
            outputs[LAST_STAGE],
            widen_boxes(boxes, options.margin, False),
            stride,
            (ROI_BINS, ROI_BINS),
            valid=outputs["image/valid3"],
        )
        vectors = embed_maps(self.encoder.model.config, params, maps.reshape(-1, *maps.shape[2:]))
        return vectors.reshape(*boxes.shape[:2], -1)

    def _embed_crops(self, params: Any, batch: Mapping[str, jax.Array], boxes: jax.Array) -> jax.Array:
        """Some crops of every picture after the others: memory is bounded, and pictures stay on their devices."""
        count, regions = boxes.shape[:2]
        some = min(max(CROPS_AT_ONCE // count, 1), regions)
        pixels = zero_outside(self.encoder.normalise(batch["image"]), batch["valid"])

        def encode(part: jax.Array) -> jax.Array:
            side = self.encoder.model.config.res
            crops = crop_regions(pixels, part, side, batch["valid"])
            embedded = self.encoder.model.apply(params, {"image": crops.reshape(-1, side, side, 3)})
            return embedded["image/embedding"].reshape(count, some, -1)

        padded = jnp.pad(boxes, ((0, 0), (0, -regions % some), (0, 0)))
        parts = jnp.moveaxis(padded.reshape(count, -1, some, 4), 1, 0)
        return jnp.moveaxis(jax.lax.map(encode, parts), 0, 1).reshape(count, padded.shape[1], -1)[:, :regions]


def _leaves_of(params: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `params` that `like` has too."""
    return {
        name: _leaves_of(params[name], leaf) if isinstance(leaf, Mapping) else params[name]
        for name, leaf in like.items()
    }


def _check_folder(encoder: Encoder) -> None:
    """Raises UserError, with the way out, for what cannot name classes."""
    folder, part = encoder.description.folder, encoder.description.parts.get(DETECTOR)
    recipe = "python -m florence_jax.main --config=configs/detect.py:recipe=proposals"
    way = recipe + " --config.init={} --config.data.train=DATA"
    if part is None:
        raise UserError(
            f"{folder} holds no detector, and classes by name need the proposals of one: {way.format(folder)}"
        )
    if tuple(part["classes"]) != (OBJECT,):
        known = ", ".join(part["classes"][:3]) + (", ..." if len(part["classes"]) > 3 else "")
        raise UserError(
            f"{folder} holds a detector of its own {len(part['classes'])} classes ({known}), which finds no others: "
            "use it without names (protocol=eval), or train a class-agnostic one on the towers that it was made of: "
            + way.format(encoder.description.source.get("init") or "DIR")
        )
    if not encoder.has_text:
        raise UserError(
            f"{folder} holds no text tower, which the names of classes need: train the proposals on weights with both "
            f"towers, {way.format('DIR')}"
        )
    _ = encoder.tokenizer  # raises where nobody named it
