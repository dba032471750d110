"""Video and text towers trained on videos with captions by the UniCL loss, from an image tower that is inflated."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.batches import known_captions
from florence_jax.data.ops.captions import MADE_OF_TEXTS
from florence_jax.data.pipeline import TrainData
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Evaluator
from florence_jax.losses.unicl import unicl, unicl_sharded
from florence_jax.models.base import Params
from florence_jax.models.video_coswin import VIDEO
from florence_jax.params.rules import Policy
from florence_jax.params.sharding import ambient_batch_axes
from florence_jax.tasks.base import Task, frozen_parts, make_plan
from florence_jax.tasks.encoder import text_inputs
from florence_jax.tasks.pretrain import IN_BATCH, LOGIT_SCALE, clamp_logit_scale
from florence_jax.tasks.recipe import motion_recipe, video_recipe
from florence_jax.tasks.video import TextToVideoSuite, tower_policy
from florence_jax.tasks.video_tower import VIDEO_HEAD

# What learns beside the video tower; the image tower itself stays as it is.
LEARNS_TOO = ("text", "text_projection", "image_projection", "logit_scale")


class FineTuneVideoRetrieval(TextToVideoSuite, Task):
    """Videos of `config.data.train` and their captions; a caption that is there twice is one class, as in pretraining.

    The projection of the image tower, which the video tower shares, learns with it. A classifier of actions that the
    folder holds is left out, as the tower below it becomes another.

    Raises:
      UserError: as `VideoSuite`; for weights whose video tower has no text tower beside it.
    """

    learns = True
    charts = (*IN_BATCH, LOGIT_SCALE)

    def __init__(self, config: ConfigDict):
        if config.video.tower != VIDEO:
            raise UserError(f"config.video.tower={config.video.tower!r}: this protocol trains the video tower")
        super().__init__(config)
        examples = None if self.train_source is None else len(self.train_source)
        recipe = motion_recipe if self.of_motions else video_recipe
        width = self.encoder.model.config.projection
        self.plan = make_plan(config, examples, recipe(examples, width, config.batch_size))
        noise = config.video.inflate_noise
        self.noise = float(self.of_motions) if noise is None else noise
        flops = self.tower.model.flops
        self.flops_per_example = 3.0 * (flops[VIDEO] + flops["text"])

    def _usual_ops(self, dataset: str) -> tuple[str, str]:
        train, evaluation = super()._usual_ops(dataset)
        if self.of_motions:
            return train, evaluation
        n, res = self.tower.frames, self.encoder.model.config.res
        frames = f"segments({n}, short={round(res * 8 / 7)})|rrc({res}, scale=(0.5, 1.0), field=video)"
        return frames, evaluation

    @property
    def embedded_frames(self) -> tuple[int, ...]:
        """As many as it is trained on."""
        return (self.tower.frames,)

    @functools.cached_property
    def policy(self) -> Policy:
        """As `TrainVideo.policy`; the text tower has the full rate."""
        return tower_policy(jax.eval_shape(self.init, jax.random.key(0)), self.config, LEARNS_TOO)

    @functools.cached_property
    def frozen(self) -> frozenset[str]:
        """See `frozen_parts`."""
        return frozen_parts(self, self.config)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        return {**super().identity, "video.inflate_noise": self.noise, "data.train_ops": self.train_ops}

    def parts(self) -> dict[str, Mapping[str, Any]]:
        """The parts of the model."""
        return super().parts() | {VIDEO: self.tower.parts()[VIDEO]}

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        return {name: value for name, value in self.tower.init(key).items() if name != VIDEO_HEAD}

    def start(self, params: Params) -> Params:
        """The folder's parameters; its image tower inflated where it holds no video tower."""
        return self.tower.load(params, self.noise, self.config.seed)

    def project(self, params: Params) -> Params:
        """Clamps the logit scale to CLIP's range."""
        return clamp_logit_scale(params)

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """UniCL over the global batch."""
        axes, train = ambient_batch_axes(), VIDEO not in self.frozen
        texts = {name: value[:, 0] for name, value in text_inputs(batch).items()}
        clips = {VIDEO: self.encoder.normalise(batch["video"]), "example": jnp.arange(len(batch["video"]))}
        out = self.tower.model.apply(params, clips | texts, train, {"drop_path": key} if train else None)
        contrast = functools.partial(unicl_sharded, axes=axes) if axes else unicl
        scale = out["logit_scale"]
        loss, metrics = contrast(out["video/embedding"], out["text/embedding"], batch["label"][:, 0], scale)
        return loss, metrics | {"logit_scale": scale}

    @property
    def batches(self) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
        """See `Task`; there is one text of each clip, "label" is of the text."""
        size, model = self.plan.batch_size, self.encoder.model.config
        shapes = {
            "video": jax.ShapeDtypeStruct((size, self.tower.frames, model.res, model.res, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((size, 1, model.text_length), jnp.int32),
            "text_length": jax.ShapeDtypeStruct((size, 1), jnp.int32),
            "label": jax.ShapeDtypeStruct((size, 1, 2), jnp.int32),
            "corrupt": jax.ShapeDtypeStruct((size,), jnp.int32),
        }
        return (shapes,)

    def train_data(self) -> TrainData:
        """Clips with a text each."""
        if self.train_source is None:
            raise UserError("nothing to train on: give --config.data.train=DATA, videos with captions")
        (fields,) = known_captions([self.train_source])
        ops = f"{self.train_ops}|texts({fields!r})|keep({', '.join(('video', *MADE_OF_TEXTS))})"
        return TrainData([self.train_source], None, ops, {"tokenizer": self.encoder.tokenizer, "templates": ()})

    def protocol_evaluators(self, mesh: Mesh) -> list[Evaluator]:
        """Retrieval of the test videos, where there are any."""
        return [] if self.test_source is None else super().protocol_evaluators(mesh)
