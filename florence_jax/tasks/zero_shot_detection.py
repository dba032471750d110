"""A class-agnostic detector on test sets whose classes are told by name: zero-shot detection."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.buckets import make_buckets
from florence_jax.data.classes import choose_templates, load_class_names
from florence_jax.data.sources.boxes import BoxSource
from florence_jax.data.sources.detection import open_boxes
from florence_jax.errors import UserError
from florence_jax.evaluators.predictor import Embedder
from florence_jax.evaluators.zero_shot_detection import DRAWS, TEXTS_AT_ONCE, ZeroShotDetection
from florence_jax.models.base import Params
from florence_jax.tasks.base import make_identity
from florence_jax.tasks.detect import DetectionSuite
from florence_jax.tasks.encoder import open_encoder
from florence_jax.tasks.zero_shot_detector import ZeroShotDetector, ZeroShotOptions


class ZeroShotDetectionSuite(DetectionSuite):
    """The class-agnostic detector of `config.init` on `config.data.test`, whose classes are told by name.

    Attributes:
      zero_shot: proposals and towers.
      templates: of prompts.

    Raises:
      UserError: as `DetectionSuite` and `ZeroShotDetector`; for names that cannot be read.
    """

    def __init__(self, config: ConfigDict):
        given, encoder = config.zero_shot.to_dict(), open_encoder(config)
        self._class_names = given.pop("names")
        self.templates = choose_templates(given.pop("templates"), trained=encoder.description.templates)
        self.zero_shot = ZeroShotDetector(encoder, ZeroShotOptions(**given), config.detections.to_dict())
        super().__init__(config)

    def _open(self, spec: str, split: str) -> BoxSource:
        return open_boxes(spec, split)  # with its classes

    def load(self, mesh: Mesh) -> Params:
        """Of the folder of `config.init`, see `ZeroShotDetector.load_on`."""
        return self.zero_shot.load_on(mesh, self.config.mesh.sharding_rules)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        options = [f"zero_shot.{name}" for name in sorted(self.config.zero_shot)]
        return {**super().identity, **make_identity(self.config, *options)}

    def evaluators(self, mesh: Mesh) -> Sequence[ZeroShotDetection]:
        """Zero-shot detection on each of the test sets."""
        encoder, config = self.zero_shot.encoder, self.config
        tokenizer = encoder.tokenizer
        if tokenizer is None:
            raise UserError(f"{config.init} holds no text tower")
        embedder = Embedder({"text": encoder.predict["text"]}, tokenizer, mesh, TEXTS_AT_ONCE)

        def judge(params: Any, batch: Any) -> Any:
            return self.zero_shot.judge(params, batch, DRAWS)

        found = []
        for name, source in self.test_sources.items():
            labels, names = self._names_of(source)
            buckets, batch = make_buckets([source], self.sizes), config.eval.batch_size
            evaluator = ZeroShotDetection(
                source, self.eval_ops, buckets, judge, mesh, batch, labels, names, self.templates, embedder, tokenizer,
                name, config.data.on_corrupt,
            )  # fmt: skip
            found.append(evaluator)
        return found

    def _names_of(self, source: BoxSource) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Classes as a test set has them, and the names of each for the prompts."""
        if not self._class_names:
            return source.class_names, [(name.replace("_", " "),) for name in source.class_names]
        given = load_class_names(self._class_names)
        return given.labels, given.names
