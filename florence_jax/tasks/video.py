"""Videos: actions by a video tower that is trained, probed or asked by name, and retrieval of videos by texts."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.classes import ClassIndex, ClassNames, open_classes
from florence_jax.data.pipeline import TrainData
from florence_jax.data.prompts import VIDEO_PROMPTS
from florence_jax.data.records import Source, Subset, scattered, summary_of
from florence_jax.data.sides import sided_names
from florence_jax.data.sources.motions import MOTION_KIND
from florence_jax.data.sources.video import open_videos
from florence_jax.data.sources.video_source import VideoSource
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.classification import HINT
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.video import OF_VIDEOS, ActionRecognition, PairProbe, TextToVideo, reversed_classes
from florence_jax.models.base import Params
from florence_jax.models.resize import BIAS_TABLE
from florence_jax.models.video_coswin import VIDEO
from florence_jax.params.layer_decay import layer_decay_rules
from florence_jax.params.rules import Policy
from florence_jax.tasks.base import Task, frozen_parts, make_plan
from florence_jax.tasks.classify import ClassificationSuite
from florence_jax.tasks.linear_head import feature_width
from florence_jax.tasks.recipe import LARGE, motion_recipe, video_recipe
from florence_jax.tasks.video_tower import LOOKED_BY, VIDEO_HEAD, VideoTower

MIRROR = "|flip(0.5, field=video)"
# Motion clips of objects, a style and backgrounds that are not in training.
UNSEEN_MOTIONS = f"{MOTION_KIND}:new_names::h264"
WHOLE_CLIP = {"clips": 1, "crops": 1}  # of a motion clip: a clip of the usual frames and interval is all of it
PROBED_CLIPS = 2000  # of the training videos, that the probe of single frames learns from


class VideoSuite(ClassificationSuite):
    """What the protocols of configs/video.py share; as those of configs/classify.py, for videos.

    Attributes:
      tower: see `VideoTower`.

    Raises:
      UserError: as `ClassificationSuite`.
    """

    name = "video"
    payload = OF_VIDEOS
    probe_class = PairProbe
    without_text = "use protocol=train or probe"

    def _open_sources(self) -> None:
        given = self.config.video
        sampling = {name: given[name] for name in ("interval", "clips", "crops")}
        if self.of_motions:
            sampling |= {name: value for name, value in WHOLE_CLIP.items() if sampling[name] is None}
        self.tower = VideoTower(self.encoder, given.overrides, (), sampling)
        if given.tower not in LOOKED_BY:
            raise UserError(f"config.video.tower={given.tower!r}: choose 'image' or 'video'")
        super()._open_sources()
        if self.classes is not None and self.classes.multi:
            raise UserError(f"{self.config.data.train or self.config.data.test} has several classes a video")

    def _open_classes(self, names: str) -> ClassIndex | None:
        found = super()._open_classes(names)
        if found is not None:
            for source in self.sources:
                check_numbers(source, len(found))
        return found

    @property
    def of_motions(self) -> bool:
        """Whether it is trained on motion clips."""
        return self.config.data.train.startswith(f"{MOTION_KIND}:")

    def _open(self, spec: str) -> Source:
        return open_videos(spec)

    def _own_test(self, train: str) -> str:
        return UNSEEN_MOTIONS if self.of_motions else ""

    def _usual_ops(self, dataset: str) -> tuple[str, str]:
        del dataset
        n, res = self.tower.frames, self.encoder.model.config.res
        clip = f"clip({n}, interval={self.tower.sampling['interval']}, short={{short}})"
        if self.of_motions:  # each clip is another already
            whole = f"{clip.format(short=res)}|resize({res}, field=video)|center_crop({res}, field=video)"
            return whole, self.tower.view_ops
        crop = f"rrc({res}, scale=(0.5, 1.0), field=video)"
        train = f"{clip.format(short=round(res * 8 / 7))}|{crop}"
        return train + (MIRROR if self._mirrors() else ""), self.tower.view_ops

    def _mirrors(self) -> bool:
        """Whether a mirror changes no class: asked of large sets only, as nobody knows what is in one of one's own."""
        if self.train_source is None or len(self.train_source) < LARGE or self.classes is None:
            return False
        return not sided_names(self.classes.first_names)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        own = {f"video.{name}": value for name, value in {**self.tower.overrides, **self.tower.sampling}.items()}
        # Of motion clips: a package that is installed in between would change them.
        grounds = {found["backgrounds"] for found in map(summary_of, self.sources) if "backgrounds" in found}
        own |= {"backgrounds": sorted(grounds)} if grounds else {}
        return {**super().identity, **{name: list(v) if isinstance(v, tuple) else v for name, v in own.items()}}

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """Those of the protocol."""
        return self.protocol_evaluators(mesh)

    def load(self, mesh: Mesh) -> Params:
        """The weights of `config.init`."""
        if self.needs_video:
            return self.tower.load_on(mesh, self.config.mesh.sharding_rules)
        return super().load(mesh)

    @property
    def needs_video(self) -> bool:
        """Whether the protocol asks the video tower."""
        return self.config.video.tower == "video"

    def embedder(self, mesh: Mesh, image: str = "frames") -> Embedder:
        """See `VideoTower.predict`."""
        self.predict |= self.tower.predict
        return super().embedder(mesh, image)

    def recognition(self, name: str, mesh: Mesh, predict: str = "views") -> ActionRecognition:
        """Actions of the test videos, by the classifier."""
        videos, classes = self.tested
        sampling = self.tower.sampling
        return ActionRecognition(
            name,
            videos,
            classes,
            self.eval_ops,
            self.embedder(mesh, predict),
            sampling["clips"],
            sampling["crops"],
            self.metric,
            self.config.data.on_corrupt,
            None if predict == "shuffled" else HINT,
        )


class RecognitionSuite(VideoSuite):
    """The trained classifier of actions of `config.init`, on `config.data.test`.

    Raises:
      UserError: as `VideoSuite`; for weights without one, and class names beside its own.
    """

    learns = False

    def __init__(self, config: ConfigDict):
        if config.classes:
            raise UserError("config.classes: the classes are those of the weights; leave it out")
        super().__init__(config)

    def _open_classes(self, names: str) -> ClassIndex | None:
        known = self.encoder.description
        if VIDEO_HEAD not in known.parts:
            raise UserError(f"{self.config.init} holds no classifier of actions: train one with configs/video.py")
        given = ClassNames(known.classes, known.names)
        return None if self.test_source is None else open_classes(self.test_source, given, self.config.label_field)

    @property
    def needs_video(self) -> bool:
        """Always."""
        return True

    def parts(self) -> dict[str, Mapping[str, Any]]:
        """The parts of the model."""
        return super().parts() | self.tower.parts()

    def protocol_evaluators(self, mesh: Mesh) -> list[Evaluator]:
        """See the class."""
        return [self.recognition("test", mesh)]


class TrainVideo(VideoSuite, Task):
    """A video tower inflated from the image tower of `config.init`, or a trained one, and a classifier of actions.

    The image tower and all that is for texts stay as they are, so that the folder can still be searched by text.

    Raises:
      UserError: as `VideoSuite`.
    """

    charts = (Chart("accuracy on the batch", {"": "accuracy"}),)

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        if self.classes is not None:
            self.tower = VideoTower(self.encoder, self.tower.overrides, self.classes.first_names, self.tower.sampling)
            self._warn_of_mirrors(self.classes.first_names)
        examples = None if self.train_source is None else len(self.train_source)
        width = feature_width(self.encoder.model.config)
        recipe = (motion_recipe if self.of_motions else video_recipe)(examples, width, config.batch_size)
        self.plan = make_plan(config, examples, recipe)
        reverses = self.of_motions if config.video.reversed is None else config.video.reversed
        self._partner = reversed_classes(self.tower.classes) if reverses else np.full(len(self.tower.classes), -1)
        self.reverses = bool((self._partner >= 0).any())
        if config.video.reversed and self.tower.classes and not self.reverses:
            raise UserError("config.video.reversed: no class is another's reversal in time by its name; leave it out")
        noise = config.video.inflate_noise
        self.noise = float(self.paired) if noise is None else noise
        self.flops_per_example = 3.0 * self.tower.model.flops[VIDEO] * (2 if self.reverses else 1)

    @property
    def paired(self) -> bool:
        """Whether there are classes that are each other's reversal in time by name."""
        return self.classes is not None and bool((reversed_classes(self.classes.first_names) >= 0).any())

    def _warn_of_mirrors(self, names: Sequence[str]) -> None:
        if "flip(" in self.config.data.train_ops and (sided := sided_names(names)):
            logging.warning(
                "config.data.train_ops mirror clips, which changes %d of the classes, such as %r: leave flip out",
                len(sided),
                sided[0],
            )

    @property
    def needs_video(self) -> bool:
        """Always."""
        return True

    @functools.cached_property
    def policy(self) -> Policy:
        """The video tower has its own rate, which falls towards the input; what is for pictures and texts is frozen."""
        return tower_policy(jax.eval_shape(self.init, jax.random.key(0)), self.config, (VIDEO_HEAD,))

    @functools.cached_property
    def frozen(self) -> frozenset[str]:
        """See `frozen_parts`."""
        return frozen_parts(self, self.config)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        return {
            **super().identity,
            "video.inflate_noise": self.noise,
            "video.reversed": self.reverses,
            "data.train_ops": self.train_ops,
        }

    def parts(self) -> dict[str, Mapping[str, Any]]:
        """The parts of the model."""
        return super().parts() | self.tower.parts()

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters.

        Raises:
          UserError: where nobody says how many classes there are.
        """
        if not self.tower.classes:
            raise UserError(
                "how many classes has the classifier? Give --config.data.train=DATA or --config.classes=NAMES"
            )
        return self.tower.init(key)

    def start(self, params: Params) -> Params:
        """The folder's parameters; its image tower inflated where it holds no video tower."""
        return self.tower.load(params, self.noise, self.config.seed)

    def load(self, mesh: Mesh) -> Params:
        """As `RecognitionSuite`.

        Raises:
          UserError: for a folder without a classifier of these classes.
        """
        if VIDEO_HEAD not in self.encoder.description.parts or self.tower.classes != self.encoder.description.classes:
            raise UserError(f"nothing is trained yet, and {self.config.init} has no classifier of these classes")
        return super().load(mesh)

    def loss(
        self, params: Params, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross entropy of the classifier."""
        train = VIDEO not in self.frozen
        rows = self._with_reversals(batch)
        pooled = self.tower.outputs(params, rows, train, key if train else None)["video/pooled"]
        # The key itself draws paths.
        logits = self.tower.logits(params, pooled, jax.random.fold_in(key, 0), rows["example"])
        smooth = optax.smooth_labels(jax.nn.one_hot(rows["label"], logits.shape[1]), self.config.label_smoothing)
        right = logits.argmax(-1) == rows["label"]
        entropy, counted = optax.softmax_cross_entropy(logits, smooth), rows["counted"]
        return (entropy * counted).sum() / counted.sum(), {"accuracy": (right * counted).sum() / counted.sum()}

    def _with_reversals(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Clips: "video", "label", "counted", float32, 1 for those that count, else 0, and "example", see `logits`.

        With `video.reversed` each clip is there twice, also with its frames in reverse order, as the class that is its
        reversal; of a class without one that copy does not count. Both being in a batch, and dropped alike, what they
        have in common cancels in the gradient of what tells them apart.
        """
        clips, labels = batch["video"], batch["label"]
        examples = jnp.arange(len(labels))
        if not self.reverses:
            return {"video": clips, "label": labels, "counted": jnp.ones(len(labels)), "example": examples}
        partner = jnp.asarray(self._partner)[labels]

        def doubled(first: jax.Array, second: jax.Array) -> jax.Array:
            # Side by side, so that both of a pair are on the device that the clip is on.
            return jnp.stack([first, second], 1).reshape(-1, *first.shape[1:])

        return {
            "video": doubled(clips, clips[:, ::-1]),
            "label": doubled(labels, jnp.maximum(partner, 0)),
            "counted": doubled(jnp.ones(len(labels)), (partner >= 0).astype(jnp.float32)),
            "example": doubled(examples, examples),
        }

    @property
    def batches(self) -> tuple[Mapping[str, jax.ShapeDtypeStruct], ...]:
        """See `Task`."""
        size, res = self.plan.batch_size, self.encoder.model.config.res
        shapes = {
            "video": jax.ShapeDtypeStruct((size, self.tower.frames, res, res, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((size,), jnp.int32),
            "corrupt": jax.ShapeDtypeStruct((size,), jnp.int32),
        }
        return (shapes,)

    def train_data(self) -> TrainData:
        """Clips with their classes."""
        if self.train_source is None:
            raise UserError("nothing to train on: give --config.data.train=DATA, a folder with a sub-folder a class")
        ops = f"{self.train_ops}|class_label|keep(video, label)"
        return TrainData([self.train_source], None, ops, {"classes": self.classes})

    def protocol_evaluators(self, mesh: Mesh) -> list[Evaluator]:
        """Of the test videos; of their frames in random order; of single frames by a probe of the image tower.

        The last two, where the configuration leaves it open, if classes are each other's reversal in time by name.
        """
        if self.test_source is None or self.classes is None:
            return []
        found: list[Evaluator] = [self.recognition("test", mesh)]
        given = self.config.video
        if self.paired if given.shuffled is None else given.shuffled:
            found.append(self.recognition("test_shuffled", mesh, "shuffled"))
        probed = PROBED_CLIPS * self.paired if given.probed is None else given.probed
        if probed and self.train_source is not None and "image" in self.encoder.description.entries:
            rows = scattered(len(self.train_source), probed)
            some = Subset(self.train_source, rows, f"{self.train_source.name} ({len(rows):,} of them)")
            ops = self.tower.frame_ops(self.tower.frames)
            found.append(self.linear_probe("test_frames", mesh, some, image="frame_features", ops=ops, hint=None))
        return found


def check_numbers(source: Source, classes: int) -> None:
    """Raises `UserError` for a video of a list whose class is a number beyond those of the classes."""
    for row in source.metadata() if isinstance(source, VideoSource) else ():
        if not 0 <= row.get("class_id", 0) < classes:
            raise UserError(
                f"{source.name}: {row['key']} is of class {row['class_id']}, there are names of {classes}, from 0 on"
            )


def tower_policy(shapes: Params, config: ConfigDict, learns_too: Sequence[str]) -> Policy:
    """The video tower at its own rate, which falls towards the input; the entries `learns_too` at the full one.

    The tower's bias tables have `video.table_lr` times that: with Adam a parameter moves by about the rate a step, and
    those are added to logits, where only what is of the order of one tells before from after.
    """
    rate, tables = config.video.tower_lr, config.video.table_lr
    frozen = tuple((rf"{name}(/.*)?", 0.0) for name in shapes if name not in (VIDEO, *learns_too))
    layers = layer_decay_rules({VIDEO: shapes[VIDEO]}, config.optim.layer_decay)

    def times(factor: Any, by: float) -> Any:
        return tuple(by * one for one in factor) if isinstance(factor, tuple) else by * factor

    of_layers = ((one, times(factor, rate)) for one, factor in layers if one.startswith(f"{VIDEO}/"))
    own = (*of_layers, (f"{VIDEO}/.*", rate))
    faster = tuple((f"{pattern}/{BIAS_TABLE}", times(factor, tables)) for pattern, factor in own)
    return Policy(lr=(*frozen, *faster, *own))


class VideoProbeSuite(VideoSuite):
    """A linear probe on frozen features: of the video tower, or of the image tower, averaged over frames."""

    def protocol_evaluators(self, mesh: Mesh) -> list[Evaluator]:
        """See the class."""
        if self.train_source is None:
            raise UserError("a probe needs videos to learn from: give --config.data.train=DATA")
        held = self._open(self.config.validation) if self.config.validation else None
        return [self.linear_probe("probe", mesh, self.train_source, held)]

    def _usual_ops(self, dataset: str) -> tuple[str, str]:
        train, _ = super()._usual_ops(dataset)
        return train, self.tower.frame_ops(self.tower.frames)

    def embedder(self, mesh: Mesh, image: str = "features") -> Embedder:
        """Of features."""
        del image
        return super().embedder(mesh, "features" if self.needs_video else "frame_features")


class ZeroShotVideoSuite(VideoSuite):
    """Actions by name, never trained: the unit vector of a video against those of prompts."""

    needs_text, learns = True, False

    def _usual_ops(self, dataset: str) -> tuple[str, str]:
        train, _ = super()._usual_ops(dataset)
        return train, self.tower.frame_ops(self.embedded_frames[-1])

    @property
    def embedded_frames(self) -> tuple[int, ...]:
        """Of each video; the last number is the headline's."""
        return tuple(self.config.video.embedded_frames)

    def _open_sources(self) -> None:
        super()._open_sources()
        if not self.config.templates:
            self.templates = VIDEO_PROMPTS

    def embedder(self, mesh: Mesh, image: str = "") -> Embedder:
        """Of unit vectors."""
        del image
        return super().embedder(mesh, "video" if self.needs_video else "frames")

    def protocol_evaluators(self, mesh: Mesh) -> list[Evaluator]:
        """See the class."""
        return [self.zero_shot("zero_shot", mesh)]


class TextToVideoSuite(ZeroShotVideoSuite):
    """Retrieval of `config.data.test`, videos with captions, by their captions, never trained."""

    def _open_classes(self, names: str) -> ClassIndex | None:
        del names
        return None

    def protocol_evaluators(self, mesh: Mesh) -> list[Evaluator]:
        """See the class."""
        if self.test_source is None:
            raise UserError("no videos to evaluate on: give --config.data.test=DATA")
        ops = {n: self.config.data.eval_ops or self.tower.frame_ops(n) for n in self.embedded_frames}
        dual, on_corrupt = self.config.video.dual_softmax, self.config.data.on_corrupt
        return [TextToVideo("test", self.test_source, ops, self.embedder(mesh), dual, on_corrupt)]
