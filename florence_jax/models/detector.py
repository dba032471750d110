"""A one-stage detector on the image tower: feature pyramid, Dynamic Head, and three predictions a position.

The feature pyramid is that of Lin et al. 2017 (arXiv 1612.03144) on the strides 8, 16, 32, with two coarser levels as
in FCOS; blocks see `models/dyhead.py`; predictions and box code are ATSS's (Zhang et al. 2020, arXiv 1912.02424).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.anchors import anchors, decode_boxes, level_shapes
from florence_jax.models.base import Model
from florence_jax.models.coswin import conv_size
from florence_jax.models.dyhead import COARSE_MODES, NORM_GROUPS, TAPS, Conv, DyHeadBlock, Maps, uniform_by_fan_in
from florence_jax.models.flops import image_flops
from florence_jax.models.florence import TwoTowers, tower_inputs
from florence_jax.models.layers import Dense, Dtype, constrain, remat_module
from florence_jax.models.sizes import ModelConfig
from florence_jax.models.windows import zero_outside

PADDINGS = ("masked", "published")
MULTIPLES = (32, 64, 128)
STAGES = (1, 2, 3)  # of the tower: strides 8, 16, 32
PRIOR = 0.01  # of an object of a class at a position, before training


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """Sizes of a detector.

    Attributes:
      width: channels of the pyramid and the blocks, a multiple of 16.
      blocks: of the Dynamic Head.
      coarse: how a block reads the coarser level, one of `dyhead.COARSE_MODES`; published weights need 'flat'.
      padding: 'masked': what lies beyond a picture inside its batch changes nothing. 'published': it takes part, as
        zeros, everywhere: in attention, convolutions, averages and GroupNorm, as anchors and as background.
      multiple: of height and width of a batch, in pixels. 128: each level is half the one before. 32 (weights of GLIP):
        the two coarsest are halves rounded up.
      relu_p7: whether the coarsest level is made of the positive part of the one before it, as in DyHead and GLIP, or
        of all of it, as in mmdetection.

    Raises:
      UserError: for another choice, or sizes that do not fit together.
    """

    width: int = 256
    blocks: int = 6
    coarse: str = "upfirst"
    padding: str = "masked"
    multiple: int = 128
    relu_p7: bool = True

    def __post_init__(self) -> None:
        for name, known in dict(coarse=COARSE_MODES, padding=PADDINGS, multiple=MULTIPLES).items():
            if getattr(self, name) not in known:
                choices = ", ".join(map(str, known))
                raise UserError(f"detector {name}={getattr(self, name)!r}: choose one of {choices}")
        for name, step in dict(width=NORM_GROUPS, blocks=1).items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value % step:
                of = "a whole number above 0" if step == 1 else f"a multiple of {step} (the groups of its GroupNorm)"
                raise UserError(f"detector {name}={value!r}: must be {of}")


# tiny is ours, for a laptop's CPU; dyhead is Dai et al.'s, glip_l has the sizes of GLIP-L (Li et al. 2021). The weights
# that they published also need coarse='flat' and padding='published'.
DETECTORS = {
    "tiny": DetectorConfig(width=64, blocks=2),
    "dyhead": DetectorConfig(),
    "glip_l": DetectorConfig(blocks=8, multiple=32),
}


class Pyramid(nn.Module):
    """Five maps of one width from three of the tower.

    1x1 convolutions, coarser maps added at twice their size (nearest), 3x3 convolutions; then two of stride 2.
    """

    width: int
    relu_p7: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Maps, valids: Maps) -> Maps:
        """Maps of the strides 8, 16, 32 -> of 8 to 128, (B, h, w, width), 0 beyond `valids`, int32 (B, 2) of each."""
        added: jax.Array | None = None
        levels: list[jax.Array] = []
        for i in reversed(range(len(maps))):
            lateral = Dense(self.width, uniform_by_fan_in(3), self.dtype, name=f"lateral{i + 3}")(maps[i])
            if added is not None:
                lateral = lateral + jnp.repeat(jnp.repeat(added, 2, axis=1), 2, axis=2)
            added = zero_outside(lateral, valids[i])
            output = Conv(self.width, dtype=self.dtype, name=f"output{i + 3}")(added)
            levels.insert(0, zero_outside(output, valids[i]))
        for name, positive in (("p6", False), ("p7", self.relu_p7)):
            finer = jax.nn.relu(levels[-1]) if positive else levels[-1]
            coarser = Conv(self.width, stride=2, dtype=self.dtype, name=name)(finer)
            levels.append(zero_outside(coarser, valids[len(levels)]))
        return tuple(levels)


def predict_positions(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """A linear layer of each position in float32, from features in any dtype: (B, N, C) -> (B, N, features)."""
    product = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return constrain(product + bias.reshape(1, 1, -1))


class Prediction(nn.Module):
    """`predict_positions` with learned kernel and bias."""

    features: int
    bias: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, columns: jax.Array | None = None) -> jax.Array:
        """(B, N, C) -> float32 (B, N, features), or (B, N, S) of `columns` int (S,) alone, which differ."""
        kernel = self.param("kernel", nn.initializers.normal(0.01), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.constant(self.bias), (self.features,))
        if columns is not None:
            kernel, bias = (each.at[..., columns].get(unique_indices=True) for each in (kernel, bias))
        return predict_positions(x, kernel, bias)


class LevelScales(nn.Module):
    """A learned factor of each level, 1 at first: (B, N, C) -> the same, with `counts` positions of each level."""

    @nn.compact
    def __call__(self, x: jax.Array, counts: np.ndarray) -> jax.Array:
        """(B, N, C) float32 -> the same shape."""
        scale = self.param("scale", nn.initializers.ones, (len(counts),))
        return x * jnp.repeat(scale, counts, total_repeat_length=x.shape[1]).reshape(1, -1, 1)


class DyHeadDetector(nn.Module):
    """Pyramid, blocks and predictions; see `build_detector`."""

    config: DetectorConfig
    classes: int
    remat: str = "none"
    scan: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, maps: Maps, valids: Maps, size: tuple[int, ...], drawn: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Detects.

        Args:
          maps: the tower's normed maps of the strides 8, 16, 32.
          valids: int32 (B, 2) of each, the images' own part.
          size: height and width of the batch in pixels.
          drawn: int32 (S,), the only classes whose logits are wanted; None: all.
        """
        shapes, batch = level_shapes(*size), len(maps[0])
        if self.config.padding == "published":  # all of it takes part
            valids = tuple(jnp.broadcast_to(jnp.array(shape)[None], (batch, 2)) for shape in shapes)
        else:
            valids = (*valids, conv_size(valids[-1], 3, 2, 1))
            valids = (*valids, conv_size(valids[-1], 3, 2, 1))
        levels = Pyramid(self.config.width, self.config.relu_p7, self.dtype, name="pyramid")(maps, valids)
        x = jnp.concatenate([level.reshape(batch, -1, level.shape[-1]) for level in self._blocks(levels, valids)], 1)
        counts = np.array([math.prod(shape) for shape in shapes])
        deltas = LevelScales(name="scales")(Prediction(4, name="box_deltas")(x), counts)
        boxes = jnp.asarray(anchors(*size))
        inside = [
            zero_outside(jnp.ones((batch, *shape, 1), bool), valid).reshape(batch, -1)
            for shape, valid in zip(shapes, valids, strict=True)
        ]
        return {
            "features": x,
            "logits": Prediction(self.classes, -math.log((1 - PRIOR) / PRIOR), name="class_logits")(x, drawn),
            "centerness": Prediction(1, name="centerness")(x)[..., 0],
            "deltas": deltas,
            "boxes": decode_boxes(boxes[None], deltas),
            "inside": jnp.concatenate(inside, 1),
            "anchors": boxes,
            "levels": jnp.asarray(counts, jnp.int32),
        }

    def _blocks(self, levels: Maps, valids: Maps) -> Maps:
        scanned = self.scan and self.config.blocks > 1
        block = remat_module(DyHeadBlock, self.remat, scanned=scanned)
        arguments = dict(coarse=self.config.coarse, dtype=self.dtype)
        if scanned:
            block = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.config.blocks,
            )
            return block(**arguments, name="blocks")(levels, valids)[0]
        for i in range(self.config.blocks):
            levels = block(**arguments, name=f"block{i}")(levels, valids)[0]
        return levels


class DetectorTowers(TwoTowers):
    """The towers and the detector."""

    head: DetectorConfig
    classes: int

    def setup(self) -> None:
        """Makes the submodules."""
        super().setup()
        c = self.config
        self.detector = DyHeadDetector(self.head, self.classes, c.remat, c.scan, jnp.dtype(c.dtype))

    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> dict[str, jax.Array]:
        """The towers' outputs, and the detector's."""
        size, multiple = batch["image"].shape[1:3], self.head.multiple
        if any(side % multiple for side in size):
            raise UserError(
                f"a batch of {size[0]}x{size[1]} pixels: the detector takes heights and widths that are multiples of "
                f"{multiple}, padded at the bottom and right"
            )
        outputs = super().__call__(batch, train)
        maps, valids = (tuple(outputs[f"image/{name}{i}"] for i in STAGES) for name in ("norm", "valid"))
        found = self.detector(maps, valids, size, batch.get("drawn"))
        return outputs | {f"detector/{name}": value for name, value in found.items()}


def resolve_detector(variant: str, **overrides: Any) -> DetectorConfig:
    """The sizes of a row of `DETECTORS` with `overrides` applied; None = keep the table's value.

    Raises:
      UserError: an unknown variant, option or choice; the message lists the known ones.
    """
    if variant not in DETECTORS:
        raise UserError(f"unknown detector {variant!r}: choose one of {', '.join(DETECTORS)}")
    known = [field.name for field in dataclasses.fields(DetectorConfig)]
    if unknown := sorted(overrides.keys() - set(known)):
        raise UserError(f"unknown detector option {', '.join(unknown)}: known are {', '.join(known)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    return dataclasses.replace(DETECTORS[variant], **given)


def detector_flops(
    config: ModelConfig, head: DetectorConfig, classes: int, height: int, width: int
) -> dict[str, float]:
    """Floating point operations of a forward pass for a picture of height x width, {'image': ..., 'detector': ...}.

    Counted as `forward_flops` does; the interpolation of samples, which is no matrix product, is left out.
    """
    c = head.width
    areas = [rows * columns for rows, columns in level_shapes(height, width)]
    positions = sum(areas)
    tower = sum(area * config.image_width * 2**stage * c for area, stage in zip(areas, STAGES, strict=False))
    pyramid = tower + 9 * c**2 * positions
    coarse = areas[:-1] if head.coarse == "upfirst" else areas[1:]
    convolutions = positions + sum(areas[1:]) + sum(coarse)  # of the same level, of the finer one, of the coarser one
    block = 9 * c**2 * convolutions + 9 * c * 3 * TAPS * positions
    macs = pyramid + head.blocks * block + positions * c * (classes + 5)
    return {"image": image_flops(config, height, width), "detector": 2.0 * macs}


def build_detector(config: ModelConfig, variant: str, classes: int, **overrides: Any) -> Model[ModelConfig]:
    """A detector on an image tower: parameters {"image", "detector"} and what `florence.build` has beside them.

    Its inputs are "image" float (B, H, W, 3), normalised, H and W multiples of `DetectorConfig.multiple`,
    "image_valid" int32 (B, 2), true height and width in pixels, "example" if there is stochastic depth, and perhaps
    "drawn" int32 (S,), different classes, the only ones whose logits are computed. Its outputs, beside the towers', for
    N positions of five levels, finest first, row by row, and K classes:

      'detector/features' (B, N, C): what the predictions are made of; entry 'class_logits' of the parameters makes
        the logits of it, see `predict_positions`.
      'detector/logits' float32 (B, N, K): of each class, on its own (sigmoid); with "drawn" (B, N, S).
      'detector/centerness' float32 (B, N): logits of how central the position is in its object.
      'detector/deltas' float32 (B, N, 4), 'detector/boxes' float32 (B, N, 4): see `anchors.decode_boxes`; pixels of the
        padded picture.
      'detector/inside' bool (B, N): False for positions of padding. With padding='published' there are none.
      'detector/anchors' float32 (N, 4); 'detector/levels' int32 (5,), positions of each level.

    `flops` is of a square picture of `config.res` pixels, rounded up; `detector_flops` gives those of any other.

    Args:
      config: of the tower, of four stages; its mode, masks and output norms are set here.
      variant: a key of `DETECTORS`.
      classes: K.
      **overrides: any field of `DetectorConfig`; None = keep the table's value.

    Raises:
      UserError: an unknown variant, option or choice, a tower without the four stages; from `apply`, a batch of
        another multiple.
    """
    head = resolve_detector(variant, **overrides)
    if config.image_tower == "vit" or len(config.depths) != 4:
        raise UserError(
            f"a detector needs an image tower of four stages: image_tower={config.image_tower!r} of variant "
            f"{config.variant} has {len(config.depths)}; choose weights of CoSwin or Swin"
        )
    if classes < 1:
        raise UserError(f"a detector of {classes} classes: give it at least one")
    config = dataclasses.replace(
        config, size_mode="detection", out_stages=STAGES, mask_padding=head.padding == "masked"
    )
    inputs: dict[str, Any] = {name: tower_inputs(config)[name] for name in ("image", "image_valid", "example")}
    side = -(-config.res // head.multiple) * head.multiple
    inputs["image"] = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    inputs["drawn"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    flops = detector_flops(config, head, classes, side, side)
    return Model(DetectorTowers(config, head, classes), config, inputs, optional=("example", "drawn"), flops=flops)
