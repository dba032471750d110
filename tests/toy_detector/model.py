"""The towers with a detector beside them: for each cell of the last map whether an object is there, and its box."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from florence_jax.errors import UserError
from florence_jax.models.base import Model
from florence_jax.models.flops import forward_flops
from florence_jax.models.florence import TwoTowers, tower_inputs
from florence_jax.models.layers import Dense, gelu
from florence_jax.models.sizes import ModelConfig
from florence_jax.models.windows import zero_outside


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """Sizes of the detector: `width` channels in its hidden layer."""

    width: int


DETECTORS = {"tiny": DetectorConfig(width=64)}


class CellHead(nn.Module):
    """A small perceptron on each cell."""

    config: DetectorConfig

    @nn.compact
    def __call__(self, cells: jax.Array, valid: jax.Array, stride: int) -> dict[str, jax.Array]:
        """Cells (B, h, w, C) of `stride` pixels, of which `valid` (B, 2) are the picture's. N is h * w."""
        batch, height, width, _ = cells.shape
        raw = Dense(5, name="out")(gelu(Dense(self.config.width, name="hidden")(cells.astype(jnp.float32))))
        raw = raw.reshape(batch, -1, 5)
        y, x = (stride * (jnp.arange(size) + 0.5) for size in (height, width))
        centres = jnp.stack(jnp.meshgrid(x, y), -1).reshape(1, -1, 2)
        left_top, right_bottom = jnp.split(stride * jax.nn.softplus(raw[..., 1:]), 2, axis=-1)
        inside = zero_outside(jnp.ones((batch, height, width, 1)), valid).reshape(batch, -1) > 0
        boxes = jnp.concatenate([centres - left_top, centres + right_bottom], -1)
        return {"objectness": raw[..., 0], "boxes": boxes, "inside": inside, "centres": centres[0]}


class DetectorTowers(TwoTowers):
    """The towers and the detector."""

    head: DetectorConfig

    def setup(self) -> None:
        """Makes the submodules."""
        super().setup()
        self.detector = CellHead(self.head)

    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> dict[str, jax.Array]:
        """The towers' outputs, and the detector's."""
        outputs, last = super().__call__(batch, train), len(self.config.depths) - 1
        cells = outputs[f"image/norm{last}"]
        stride = batch["image"].shape[1] // cells.shape[1]
        found = self.detector(cells, outputs[f"image/valid{last}"], stride)
        return outputs | {f"detector/{name}": value for name, value in found.items()}


def build_detector(config: ModelConfig, variant: str) -> Model[ModelConfig]:
    """A detector on an image tower: parameters {"image", "detector"} and what `florence.build` has beside them.

    Its inputs are "image" and "image_valid", and "example" if there is stochastic depth. Its outputs, beside the
    towers': 'detector/objectness' float32 (B, N), logits of the cells; 'detector/boxes' float32 (B, N, 4), pixels of
    the padded picture; 'detector/inside' bool (B, N), False for cells of padding; 'detector/centres' float32 (N, 2).

    Args:
      config: of the tower, in detection mode.
      variant: a key of `DETECTORS`.

    Raises:
      UserError: for an unknown variant, a tower of another mode.
    """
    if variant not in DETECTORS:
        raise UserError(f"unknown detector {variant!r}: choose one of {', '.join(DETECTORS)}")
    if config.size_mode != "detection":
        raise UserError("a detector needs --config.model.overrides.size_mode=detection")
    inputs: dict[str, Any] = {name: tower_inputs(config)[name] for name in ("image", "image_valid", "example")}
    stages, head = len(config.depths), DETECTORS[variant]
    cells = math.prod(side // 2 ** (stages + 1) for side in inputs["image"].shape[1:3])
    macs = cells * (config.image_width * 2 ** (stages - 1) + 5) * head.width
    flops = {"image": forward_flops(config)["image"], "detector": 2.0 * macs}
    return Model(DetectorTowers(config, head), config, inputs, optional=("example",), flops=flops)
