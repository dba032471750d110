"""Training of the toy detector: model, loss and data joined for the one loop."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.buckets import make_buckets
from florence_jax.data.pipeline import TrainData
from florence_jax.data.sources.catalog import open_mixture, open_source
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.models.base import Params
from florence_jax.params.rules import Policy
from florence_jax.params.weights import make_description
from florence_jax.tasks.base import Task, frozen_parts, make_identity, make_plan
from florence_jax.tasks.encoder import open_encoder
from toy_detector.detector import DETECTOR, ENTRIES, Detector
from toy_detector.evaluator import BoxRecall
from toy_detector.loss import detection_loss


class ToyDetection(Task):
    """The `Task` of config.py.

    Raises:
      UserError: for weights that hold no image tower, an unknown variant.
    """

    name = "toy_detection"
    charts = (Chart("losses", {"objects": "objectness_loss", "boxes": "box_loss"}),)
    policy = Policy(lr=((r"image/.*", 0.0),))  # frozen

    def __init__(self, config: ConfigDict):
        self.config, self.plan = config, make_plan(config)
        self.detector = Detector(open_encoder(config), config.detector.variant)
        self.sizes = [(int(height), int(width)) for height, width in config.detector.sizes]
        flops, res = self.detector.model.flops, self.detector.model.config.res
        area = sum(map(math.prod, self.sizes)) / len(self.sizes) / res**2
        self.flops_per_example = area * (flops["image"] + 3.0 * flops["detector"])

    @functools.cached_property
    def frozen(self) -> frozenset[str]:
        """See `frozen_parts`; a configuration may train the tower too."""
        return frozen_parts(self, self.config)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        return make_identity(self.config, "init", "data.train")

    @property
    def description(self) -> Mapping[str, Any]:
        """See `Suite`; "side" is that of the squares that `florence_jax.predict` puts pictures into."""
        towers = self.detector.encoder.towers_part() | {"entries": ENTRIES[:1]}
        head = {"variant": self.detector.variant, "side": max(map(max, self.sizes)), "entries": ENTRIES[1:]}
        source = {"init": self.config.init, "data": self.config.data.train}
        return make_description(self.name, {"towers": towers, DETECTOR: head}, source=source)

    # -- model ------------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        return self.detector.init(key)

    def start(self, params: Params) -> Params:
        """The folder's tower, and a fresh detector where it holds none."""
        return self.detector.load(params)

    def load(self, mesh: Mesh) -> Params:
        """A trained detector."""
        return self.detector.load_on(mesh, self.policy.sharding)

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `detection_loss`."""
        return detection_loss(self.detector.outputs(params, batch, "image" not in self.frozen, key), batch)

    # -- data -------------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
        """One shape for each bucket."""
        rows, most = self.plan.batch_size, self.config.detector.most_boxes
        of = jax.ShapeDtypeStruct
        common = {
            "valid": of((rows, 2), jnp.int32),
            "boxes": of((rows, most, 4), jnp.float32),
            "objects": of((rows, most), jnp.bool_),
            "ignore": of((rows, most), jnp.bool_),
            "corrupt": of((rows,), jnp.int32),
            "padded": of((rows,), jnp.float32),
        }
        return tuple({"image": of((rows, *size, 3), jnp.uint8), **common} for size in self.sizes)

    def train_data(self) -> TrainData:
        """Pictures with their boxes, by the shape of the pictures."""
        if not self.config.data.train:
            raise UserError("nothing to train on: give --config.data.train=DATA")
        sources, weights = open_mixture(self.config.data.train)
        pad = f"toy_pad_boxes({self.config.detector.most_boxes})"
        ops = f"{self.config.data.train_ops}|{pad}|keep(image, valid, boxes, objects, ignore)"
        return TrainData(sources, weights, ops, {}, make_buckets(sources, self.sizes))

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """Boxes found in `config.data.test`."""
        config = self.config
        if not config.data.test:
            return []
        source = open_source(config.data.test)
        buckets = make_buckets([source], self.sizes)
        return [BoxRecall(source, config.data.eval_ops, buckets, self.detector.detect, mesh, config.eval.batch_size)]
