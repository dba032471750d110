"""The video tower of a checkpoint folder, or one inflated from its image tower: what training and use share."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from florence_jax.errors import UserError
from florence_jax.models.dropout import drop_examples
from florence_jax.models.layers import unit_norm
from florence_jax.models.video_coswin import VIDEO, VideoModel, build_video, resolve_video
from florence_jax.params.rules import Rules
from florence_jax.params.sharding import params_like
from florence_jax.params.weights import load
from florence_jax.tasks.encoder import Encoder
from florence_jax.tasks.linear_head import feature_width

VIDEO_HEAD = "video_head"  # the classifier's part in model.json, and the entry of its parameters
LOOKED_BY = ("image", "video")  # the towers that embed a video: frame by frame, or as a clip
FIRST_STD = 0.01  # of its first weights: with zeros an inflated tower, blind to the direction of time, would stay so
SMALL_FRAMES = 8  # of a clip for the smallest towers
FRAME_OPS = "uniform({frames}, short={res})|resize({res}, field=video)|center_crop({res}, field=video)"
NOISE_KEY = 7  # folded into the seed


class VideoTower:
    """The video tower of a folder, with its classifier of actions where it has one.

    Args:
      encoder: the folder's towers.
      overrides: fields of `VideoConfig` on top of the folder's; None leaves one alone.
      classes: of the classifier, in the order of the logits; () for the folder's.
      sampling: "interval", "clips" and "crops" on top of the folder's; None leaves one alone.

    Attributes:
      encoder. part: in the folder's `model.json`; {} where it holds none. trained: whether it does.
      overrides, config: of the tower. classes: names; () for no classifier.
      sampling: how clips are taken: "interval" in frames, "clips" and "crops" of a test.
      predict: pure functions (params, batch) of "video" uint8 (B, T, H, W, 3): 'frames' (B, D), unit vectors, the mean
        of the image tower's of all frames; 'frame_features' (B, C) likewise, before the projection; 'features' (B, C)
        and 'video' (B, D), a unit vector, of the video tower; and of "video" (B, V, T, H, W, 3) 'views' (B, V, K),
        probabilities, and 'shuffled', the same of frames in random order.

    Raises:
      UserError: for options that do not fit, and where the video tower is asked for, an image tower that none can be
        made of.
    """

    def __init__(
        self,
        encoder: Encoder,
        overrides: Mapping[str, Any] | None = None,
        classes: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
    ):
        self.encoder = encoder
        self.part: dict[str, Any] = encoder.description.parts.get(VIDEO, {})
        self.trained = bool(self.part)
        given = {name: value for name, value in (overrides or {}).items() if value is not None}
        usual = {"frames": SMALL_FRAMES} if encoder.variant == "ti" else {}
        self.overrides: dict[str, Any] = {**usual, **self.part.get("overrides", {}), **given}
        known = encoder.description.classes if VIDEO_HEAD in encoder.description.parts else ()
        self.classes = tuple(classes or known)
        self._known_classes = tuple(known)
        chosen = {name: value for name, value in (sampling or {}).items() if value is not None}
        self.sampling: dict[str, Any] = {
            "interval": 2,
            "clips": 4,
            "crops": 3,
            **self.part.get("sampling", {}),
            **chosen,
        }
        if self.sampling["crops"] not in (1, 3) or min(self.sampling.values()) < 1:
            raise UserError(f"config.video: {self.sampling}: crops are 1 or 3, clips and interval at least 1")
        self.predict = {
            "frames": self._frames,
            "frame_features": self._frame_features,
            "features": lambda params, batch: self.outputs(params, batch)["video/pooled"],
            "video": lambda params, batch: self.outputs(params, batch)["video/embedding"],
            "views": self._views,
            "shuffled": self._shuffled,
        }

    @functools.cached_property
    def model(self) -> VideoModel:
        """The towers with the video tower."""
        return build_video(self.encoder.model.config, resolve_video(self.encoder.model.config, **self.overrides))

    @property
    def frames(self) -> int:
        """Of a clip."""
        return self.model.video.frames

    @property
    def view_ops(self) -> str:
        """Ops that leave the views of a test, crop * clips + clip."""
        n, s, res = self.frames, self.sampling, self.encoder.model.config.res
        crop = f"three_crops({res})" if s["crops"] == 3 else f"center_crop({res}, field=video)"
        views = f"views({s['clips']}, {n}, interval={s['interval']}, short={res})"
        return f"{views}|resize({res}, field=video)|{crop}|split_views({n})"

    def frame_ops(self, frames: int) -> str:
        """Ops that leave so many frames, spread evenly by time."""
        return FRAME_OPS.format(frames=frames, res=self.encoder.model.config.res)

    def parts(self) -> dict[str, Mapping[str, Any]]:
        """Parts of `model.json`: the tower's, and the classifier's where there are classes."""
        own: dict[str, Mapping[str, Any]] = {
            VIDEO: {"overrides": self.overrides, "sampling": self.sampling, "entries": [VIDEO]}
        }
        return own | ({VIDEO_HEAD: {"entries": [VIDEO_HEAD]}} if self.classes else {})

    # -- parameters -------------------------------------------------------------------------------------------------

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh parameters: of the folder's towers, of the video tower, of the classifier where there are classes."""
        params = self.encoder.init(key) | {VIDEO: self.model.init_video(key)}
        if not self.classes:
            return params
        shape = (feature_width(self.encoder.model.config), len(self.classes))
        weight = FIRST_STD * jax.random.normal(jax.random.fold_in(key, 1), shape, jnp.float32)
        return params | {VIDEO_HEAD: {"weight": weight, "bias": jnp.zeros(shape[1:], jnp.float32)}}

    def load(self, like: Mapping[str, Any], noise: float = 0.0, seed: int = 0) -> dict[str, Any]:
        """The folder's parameters on the devices of `like`, whose fresh classifier is taken for one that it lacks.

        Args:
          like: as `init` gives them, or some of its entries.
          noise: where the tower is inflated: see `VideoModel.with_direction`. seed: of it.
        """
        folder = self.encoder.description.folder
        if not folder:
            raise UserError("no weights to load: give them with --config.init=DIR")
        rules: Rules[str] = self.encoder.tower_rules
        if self.classes != self._known_classes:
            rules = ((f"{VIDEO_HEAD}/.*", "new"), *rules)
        if not self.trained:
            rules = ((f"{VIDEO}/.*", "inflated"), *rules)
        params = load(folder, like, rules, self.model.adapt, inflate=self.model.inflate)
        if noise and not self.trained:
            places = jax.tree.map(lambda leaf: leaf.sharding, params[VIDEO])
            key = jax.random.fold_in(jax.random.key(seed), NOISE_KEY)
            noisy = jax.jit(lambda tree: self.model.with_direction(tree, noise, key), out_shardings=places)
            params[VIDEO] = noisy(params[VIDEO])
        return params

    def load_on(self, mesh: Mesh, rules: Rules[int | str] = ()) -> dict[str, Any]:
        """The parameters, sharded over a mesh; a classifier only where the folder has it."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        if self.classes != self._known_classes:
            shapes.pop(VIDEO_HEAD, None)
        return self.load(params_like(shapes, mesh, policy=rules))

    # -- use --------------------------------------------------------------------------------------------------------

    def outputs(
        self, params: Any, batch: Mapping[str, jax.Array], train: bool = False, key: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """The model's outputs for clips, "video" uint8 (B, T, H, W, 3), and perhaps "example", see `CoSwin`."""
        inputs = {"video": self.encoder.normalise(batch["video"])}
        inputs |= {name: batch[name] for name in ("example",) if name in batch}
        return self.model.apply(params, inputs, train, None if key is None else {"drop_path": key})

    def logits(
        self, params: Any, pooled: jax.Array, key: jax.Array | None = None, examples: jax.Array | None = None
    ) -> jax.Array:
        """float32 (B, K) of the features (B, C); with a key these are dropped as in training.

        Args:
          params: of the classifier.
          pooled: features.
          key: PRNG key.
          examples: int (B,), equal ones drop the same; None: each its own.
        """
        rate = self.model.video.dropout
        if key is not None and rate:
            pooled = drop_examples(key, jnp.arange(len(pooled)) if examples is None else examples, rate)(pooled)
        head = params[VIDEO_HEAD]
        return jnp.matmul(pooled, head["weight"], precision="highest") + head["bias"][None]

    def _views(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        # One view after the other: the memory is that of one, however many there are.
        def view(video: jax.Array) -> jax.Array:
            return jax.nn.softmax(self.logits(params, self.outputs(params, {"video": video})["video/pooled"]))

        return jnp.moveaxis(jax.lax.map(view, jnp.moveaxis(batch["video"], 1, 0)), 0, 1)

    def _shuffled(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        frames = np.arange(batch["video"].shape[2])
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(batch["index"])
        orders = jax.vmap(lambda key: jax.random.permutation(key, frames))(keys)
        mixed = jax.vmap(lambda video, order: video[:, order])(batch["video"], orders)
        return self._views(params, batch | {"video": mixed})

    def _mean_frame(self, what: str, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        def frame(images: jax.Array) -> jax.Array:
            return self.encoder.predict[what](params, {"image": images})

        return jax.lax.map(frame, jnp.moveaxis(batch["video"], 1, 0)).mean(0)

    def _frames(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return unit_norm(self._mean_frame("image", params, batch))

    def _frame_features(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self._mean_frame("features", params, batch)
