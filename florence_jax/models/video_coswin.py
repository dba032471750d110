"""Video CoSwin: the image tower with a time axis (Florence, section 2.7), after Liu et al., "Video Swin" (2106.13230).

Tokens are tubes of some frames, attention runs in windows over (time, height, width), embeddings between the stages
leave the time as it is. A trained image tower becomes a video tower by `inflate`: for a clip of identical frames both
give the same. Maps are (B, T, H, W, C).
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.errors import UserError
from florence_jax.models.base import Model, draw_params
from florence_jax.models.coswin import (
    EMBEDDINGS,
    STAGE_CONV,
    PatchMerging,
    check_stages,
    embedded_size,
    fan_in_uniform,
)
from florence_jax.models.flops import forward_flops, video_flops
from florence_jax.models.florence import TwoTowers, tower_inputs
from florence_jax.models.layers import Dtype, LayerNorm, add_bias, at_least_float32, constrain, convolve
from florence_jax.models.resize import BIAS_TABLE, resize_bias_table
from florence_jax.models.sizes import ModelConfig
from florence_jax.models.windows import axis_windows, pad_to_multiple, path_factors, run_pairs, stage_window

VIDEO = "video"  # the entry of its parameters, and its part in model.json


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """What a video tower has beside the sizes of the image tower that it is made of.

    Attributes:
      frames: of a clip in training; the tower takes any number.
      tube: frames of a token.
      merge: frames that an embedding between two stages looks at, odd; with embedding='patch' 1.
      window_frames: tokens along time of the window of each stage. It grows where the maps shrink, so that attention
        takes about the same memory in all; the same number for all is Video Swin's way.
      mask_padding: keep padding out of attention; False: it takes part, as in published weights.
      drop_path: stochastic depth, see `CoSwin.drop_path`.
      dropout: of the features that a classifier reads, in training.
    """

    frames: int = 32
    tube: int = 2
    merge: int = 1
    window_frames: tuple[int, ...] = (2, 4, 8, 16)
    mask_padding: bool = True
    drop_path: float = 0.0
    dropout: float = 0.5


def resolve_video(tower: ModelConfig, **overrides: Any) -> VideoConfig:
    """The sizes of a video tower of the sizes of an image tower; `overrides` None take the default.

    Raises:
      UserError: for an unknown option, sizes that do not fit, and a tower that is not one of CoSwin's family.
    """
    if tower.image_tower != "coswin":
        raise UserError(f"a video tower is made of a CoSwin or Swin, not of image_tower={tower.image_tower!r}")
    known = [field.name for field in dataclasses.fields(VideoConfig)]
    if unknown := sorted(set(overrides) - set(known)):
        raise UserError(f"unknown option of a video tower {', '.join(unknown)}: known are {', '.join(known)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    given.setdefault("window_frames", tuple(2 * 2**i for i in range(len(tower.depths))))
    given["window_frames"] = tuple(given["window_frames"])
    config = VideoConfig(**given)
    for name in ("frames", "tube", "merge"):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise UserError(f"video {name}={value!r}: must be a whole number above 0")
    if config.merge % 2 == 0 or (config.merge > 1 and tower.embedding == "patch"):
        raise UserError(f"video merge={config.merge}: an odd number of frames, and 1 where embedding='patch'")
    if len(config.window_frames) != len(tower.depths) or min(config.window_frames) < 1:
        raise UserError(f"video window_frames={config.window_frames}: one for each of {len(tower.depths)} stages")
    if not 0 <= config.drop_path < 1 or not 0 <= config.dropout < 1:
        raise UserError(f"video drop_path={config.drop_path}, dropout={config.dropout}: must be in [0, 1)")
    return config


def stage_windows(tower: ModelConfig, video: VideoConfig) -> tuple[tuple[int, int, int], ...]:
    """Sides (time, height, width) of the windows that the bias tables are for, of each stage.

    In space they are those of the image tower for pictures of `tower.res`.
    """
    found, side = [], tower.res
    for i, frames in enumerate(video.window_frames):
        side = embedded_size(side, i, tower.embedding)
        space, _ = stage_window(side, side, tower.window, tower.size_mode)
        found.append((frames, space, space))
    return tuple(found)


class TubeEmbed(nn.Module):
    """Convolution over time and space with bias, then LayerNorm: (B, T, H, W, C) -> (B, t, h, w, features).

    In time either tubes that do not overlap (`tubes`; T that they do not divide: the last frame is repeated), or a
    kernel of odd length that slides over all frames, the first and last ones repeated beyond the ends: nothing that is
    not there counts as black. Both run as two-dimensional convolutions, which are faster than XLA's of three.

    Attributes:
      features: channels of the output.
      frames: of the kernel. kernel, stride, padding: in space, see `ConvEmbed`.
      tubes: the stride in time is `frames`, not 1.
    """

    features: int
    frames: int
    kernel: int
    stride: int
    padding: int
    tubes: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """See the class."""
        shape = (self.frames, self.kernel, self.kernel, x.shape[-1], self.features)
        uniform = fan_in_uniform(self.frames * self.kernel**2 * x.shape[-1])
        kernel = self.param("kernel", uniform, shape).astype(self.dtype)
        bias = self.param("bias", uniform, (self.features,))
        x = self._tubes(x, kernel) if self.tubes else self._sliding(x, kernel)
        return LayerNorm(dtype=self.dtype, name="norm")(constrain(add_bias(x, bias)))

    def _tubes(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Frames of a tube are further channels."""
        if missing := -x.shape[1] % self.frames:
            x = jnp.concatenate([x, *[x[:, -1:]] * missing], 1)
        batch, time, height, width, channels = x.shape
        x = x.reshape(-1, self.frames, height, width, channels).transpose(0, 2, 3, 1, 4)
        x = x.reshape(*x.shape[:3], self.frames * channels)
        y = convolve(x, _side_by_side(kernel, 2), self.stride, self.padding)
        return y.reshape(batch, time // self.frames, *y.shape[1:])

    def _sliding(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Every frame by every slice of the kernel, in one convolution; then the sum of its neighbours' answers."""
        batch, time, *rest = x.shape
        y = convolve(x.reshape(-1, *rest), _side_by_side(kernel, 3), self.stride, self.padding)
        y = y.reshape(batch, time, *y.shape[1:3], self.frames, self.features)
        frames, middle = np.arange(time), self.frames // 2
        taps = [y[..., tap, :][:, np.clip(frames + tap - middle, 0, time - 1)] for tap in range(self.frames)]
        return functools.reduce(jnp.add, taps)


def _side_by_side(kernel: jax.Array, before: int) -> jax.Array:
    """(t, k, k, C, F) as a kernel (k, k, t C, F), `before` 2, or (k, k, C, t F), `before` 3."""
    moved = jnp.moveaxis(kernel, 0, before)
    return moved.reshape(*moved.shape[:2], -1, kernel.shape[-1] if before == 2 else kernel.shape[0] * kernel.shape[-1])


class VideoCoSwin(nn.Module):
    """The video tower. Submodules and their parameters have the names that `CoSwin` gives them.

    Attributes:
      width, depths, heads, embedding, mlp_ratio, drop_path, mask_padding, remat, scan, attention, dtype: see `CoSwin`.
      windows: of each stage, the sides (time, height, width) that its bias table is for. An axis of a map no longer
        than the window's is one window, without shift; a map of any size is padded.
      tube, merge: see `VideoConfig`.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[tuple[int, int, int], ...]
    embedding: str = "conv"
    tube: int = 2
    merge: int = 1
    mlp_ratio: float = 4
    drop_path: float = 0.0
    mask_padding: bool = True
    remat: str = "none"
    scan: bool = True
    attention: str = "xla"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, video: jax.Array, train: bool = False, examples: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Encodes clips.

        Args:
          video: float (B, T, H, W, 3), normalised.
          train, examples: see `CoSwin`.

        Returns:
          'stage{i}': (B, t, h, w, C_i); 'tokens' (B, t * h * w, C_last), the last one after its LayerNorm `norm`;
          'pooled' float32 (B, C_last), their average.

        Raises:
          UserError: for sizes that do not fit together, or no key to draw stochastic depth with.
        """
        check_stages(self.width, self.depths, self.heads)
        if self.embedding not in EMBEDDINGS:
            raise UserError(f"embedding={self.embedding!r}: choose one of {', '.join(EMBEDDINGS)}")
        factors = path_factors(self, self.drop_path, self.depths, train, len(video), examples)
        outputs, x = {}, video.astype(self.dtype)
        for i, depth in enumerate(self.depths):
            x = self._embed(i, x)
            if min(x.shape) < 1:
                raise UserError(f"no token is left of clips of {'x'.join(map(str, video.shape[1:4]))}")
            start = sum(self.depths[:i]) // 2
            window, shift = axis_windows(x.shape[1:4], self.windows[i])
            x = run_pairs(
                i,
                depth // 2,
                x,
                None if factors is None else factors[start : start + depth // 2],
                None,
                remat=self.remat,
                scan=self.scan,
                heads=self.heads[i],
                window=window,
                shift=shift,
                table=self.windows[i],
                mlp_ratio=self.mlp_ratio,
                mask_padding=self.mask_padding,
                form=self.attention,
                dtype=self.dtype,
            )
            outputs[f"stage{i}"] = x
        x = LayerNorm(dtype=at_least_float32(x.dtype), name="norm")(x)
        outputs["pooled"] = x.mean((1, 2, 3))
        outputs["tokens"] = x.astype(self.dtype).reshape(len(x), -1, x.shape[-1])
        return outputs

    def _embed(self, stage: int, x: jax.Array) -> jax.Array:
        features, name = self.width * 2**stage, f"stage{stage}_embed"
        frames = self.merge if stage else self.tube
        if self.embedding == "conv":
            sizes = STAGE_CONV[min(stage, 1)]
            return TubeEmbed(features, frames, *sizes, tubes=stage == 0, dtype=self.dtype, name=name)(x)
        if stage:  # of each frame by itself
            merged = PatchMerging(features, self.dtype, name=name)(x.reshape(-1, *x.shape[2:]))
            return merged.reshape(*x.shape[:2], *merged.shape[1:])
        x = pad_to_multiple(x, (1, 4, 4))
        return TubeEmbed(features, frames, 4, 4, 0, tubes=True, dtype=self.dtype, name=name)(x)


class VideoTowers(TwoTowers):
    """Florence's towers and the video tower, which shares the projection of the image tower."""

    sizes: VideoConfig

    def setup(self) -> None:
        """Makes the submodules."""
        super().setup()
        c, v = self.config, self.sizes
        self.video = VideoCoSwin(
            width=c.image_width, depths=c.depths, heads=c.heads, windows=stage_windows(c, v), embedding=c.embedding,
            tube=v.tube, merge=v.merge, mlp_ratio=c.mlp_ratio, drop_path=v.drop_path, mask_padding=v.mask_padding,
            remat=c.remat, scan=c.scan, attention=c.attention, dtype=jnp.dtype(c.dtype),
        )  # fmt: skip

    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> dict[str, jax.Array]:
        """The towers' outputs, and the video tower's."""
        batch = dict(batch)
        video = batch.pop("video", None)
        outputs = super().__call__(batch, train)
        if video is None:
            return outputs
        if not self._has("video"):
            raise UserError("the weights hold no video tower, which the batch needs")
        found = self.video(video, train, batch.get("example"))
        outputs |= {f"video/{name}": value for name, value in found.items()}
        if self._has("image_projection"):
            outputs["video/embedding"] = self.image_projection(found["pooled"])
        return outputs


class VideoModel(Model[ModelConfig]):
    """The towers, with a video tower made of the image tower."""

    def __init__(self, config: ModelConfig, video: VideoConfig):
        inputs = tower_inputs(config)
        inputs["video"] = jax.ShapeDtypeStruct((1, video.frames, config.res, config.res, 3), jnp.float32)
        self.windows = stage_windows(config, video)
        flops = forward_flops(config) | {
            "video": video_flops(config, video.frames, video.tube, video.merge, self.windows)
        }
        super().__init__(VideoTowers(config, video), config, inputs, tuple(inputs), flops)
        self.video = video

    def init_video(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters of the video tower alone; they do not depend on the number of frames."""
        res = self.config.res
        clip = jax.ShapeDtypeStruct((1, self.video.tube, res, res, 3), jnp.float32)
        return draw_params(self._module, {VIDEO: clip}, key)[VIDEO]

    def adapt(self, path: str, saved: np.ndarray, like: Any) -> np.ndarray | None:
        """See `Model`; bias tables of the video tower are resized in space."""
        windows = self._windows(path)
        if windows is None:
            return super().adapt(path, saved, like)
        depth = 2 * windows[0] - 1
        if saved.shape[-2] % depth:
            return None
        slices = saved.reshape(*saved.shape[:-2], depth, -1, saved.shape[-1])
        return _like(_resized(slices, windows[1]), like)

    def inflate(self, path: str, saved: np.ndarray, like: Any) -> np.ndarray | None:
        """A parameter of the image tower for the video tower, which then gives the same for identical frames.

        Kernels are repeated over time and divided by its length, bias tables are copied along time and where needed
        resized in space, all else is copied.

        Args:
          path: of the video tower's parameter. saved: the image tower's of the same name.
          like: with the shape to be filled.

        Returns:
          float32 of that shape; None if there is no sensible way.
        """
        windows, shape = self._windows(path), tuple(like.shape)
        if windows is not None:
            resized = _resized(saved, windows[1])
            return None if resized is None else _like(np.concatenate([resized] * (2 * windows[0] - 1), -2), like)
        if path.endswith("_embed/kernel") and saved.shape == shape[1:]:
            return np.repeat(saved[None].astype(np.float32) / np.float32(shape[0]), shape[0], axis=0)
        return _like(saved, like)

    def with_direction(self, params: Mapping[str, Any], amount: float, key: jax.Array) -> dict[str, Any]:
        """The video tower's parameters, no longer blind to the direction of time, as an inflated tower is.

        Kernels and bias tables get noise that is antisymmetric in time. That of a table depends on the distance in time
        alone: what attention gives to the places of a frame keeps its proportions, so that for a clip of identical
        frames the tower gives what it did.

        Args:
          params: of the video tower.
          amount: the noise's standard deviation: of tables as it is, since they are added to logits, of kernels over
            that of the kernel.
          key: PRNG key.
        """

        def noisy(path: Any, leaf: jax.Array) -> jax.Array:
            name = f"{VIDEO}/" + jax.tree_util.keystr(path, simple=True, separator="/")
            windows = self._windows(name)
            if windows is not None:
                depth, axis = 2 * windows[0] - 1, leaf.ndim - 2
                shape = (*leaf.shape[:axis], depth, leaf.shape[axis] // depth, leaf.shape[-1])
                drawn, scale = (*leaf.shape[:axis], depth, 1, leaf.shape[-1]), jnp.ones(())
            elif name.endswith("_embed/kernel") and leaf.ndim == 5:
                shape, axis, drawn, scale = leaf.shape, 0, leaf.shape, leaf.std()
            else:
                return leaf
            noise = jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), drawn, leaf.dtype)
            odd = (noise - jnp.flip(noise, axis)) / 2**0.5
            return (leaf.reshape(shape) + amount * scale * odd).reshape(leaf.shape)

        return jax.tree_util.tree_map_with_path(noisy, dict(params))

    def _windows(self, path: str) -> tuple[int, int, int] | None:
        """Of the stage that a bias table of the video tower belongs to; None for other parameters."""
        found = re.fullmatch(rf"{VIDEO}/stage(\d+)_.*/{BIAS_TABLE}", path)
        return None if found is None else self.windows[int(found[1])]


def _resized(table: np.ndarray, window: int) -> np.ndarray | None:
    """(..., rows, heads) of a square window for another; None where it is not square."""
    side = round(table.shape[-2] ** 0.5)
    return resize_bias_table(table, window) if side * side == table.shape[-2] else None


def _like(value: np.ndarray | None, like: Any) -> np.ndarray | None:
    return None if value is None or value.shape != tuple(like.shape) else np.asarray(value, np.float32)


def build_video(tower: ModelConfig, video: VideoConfig) -> VideoModel:
    """The towers of `florence.build` with a video tower, whose parameters are the entry "video".

    Further input: "video" float (B, T, H, W, 3), already normalised; T, H and W are any. Further outputs:
    'video/stage{i}', 'video/tokens', 'video/pooled' as `VideoCoSwin` has them, and 'video/embedding' (B, D) float32,
    unit vectors of the joint space through the projection of the image tower.
    """
    return VideoModel(tower, video)
