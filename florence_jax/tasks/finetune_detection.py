"""Training of detectors, watched by what it costs a class-agnostic one: classes by name, before and after."""

from collections.abc import Mapping
from typing import Any

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.sources.agnostic import OBJECT
from florence_jax.data.sources.boxes import BoxSource
from florence_jax.data.sources.detection import open_boxes
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.finetuning import Forgetting, Interpolated, Remade
from florence_jax.models.base import Params
from florence_jax.tasks.detect import Detect
from florence_jax.tasks.detector import CLASS_LAYER, DETECTOR
from florence_jax.tasks.zero_shot_detection import ZeroShotDetectionSuite
from florence_jax.tasks.zero_shot_detector import ZeroShotOptions


class KeptZeroShot(ZeroShotDetectionSuite):
    """What is left of a class-agnostic detector's zero-shot detection when it is trained on classes of its own.

    The first class layer, which says whether something is there, on all else that was trained.

    Args:
      config: of the training.
      sources: to detect on, by the names of the results; their classes are told by name.

    Raises:
      UserError: as `ZeroShotDetectionSuite`.
    """

    def __init__(self, config: ConfigDict, sources: Mapping[str, BoxSource]):
        self._given = dict(sources)
        plain = ConfigDict(config.to_dict())
        plain.data.train, plain.protocol = "", "zeroshot"
        options = ZeroShotOptions(region=config.forgetting.region)._asdict()
        plain.zero_shot = {**options, "names": "", "templates": ""}
        super().__init__(plain)

    def _open_sources(self) -> None:
        self.test_sources = self._given

    def maker(self, mesh: Mesh) -> Any:
        """A function from the parameters of the training to those that the evaluators take."""
        first: dict[str, Params] = {}

        def made(params: Params) -> Params:
            detector = params[DETECTOR]
            if not first:
                first[CLASS_LAYER] = self.detector.saved_class_layer(detector[CLASS_LAYER])
            return self.zero_shot.with_towers(
                {**params, DETECTOR: {**detector, **first}}, mesh, self.config.mesh.sharding_rules
            )

        return made


class FineTuneDetect(Detect):
    """Training of a detector; of a class-agnostic first one zero-shot AP is measured before and after.

    Raises:
      UserError: as `Detect`, and as `KeptZeroShot`.
    """

    def watched(self, mesh: Mesh) -> list[Evaluator]:
        """As `Detect`; of a class-agnostic first detector with both towers by names, also on the test sets."""
        config, first = self.config, self.detector
        if tuple(first.part.get("classes", ())) != (OBJECT,) or OBJECT in first.classes:
            return super().watched(mesh)
        found: list[Evaluator] = self.mixed(self.test_sources, mesh)
        if not first.encoder.has_text or not config.forgetting.zero_shot:
            if source := config.forgetting.source:
                why = "no text tower" if not first.encoder.has_text else "config.forgetting.zero_shot=False"
                logging.warning("%s is not watched: the first detector has one class, and %s", source, why)
            return found
        sources = dict(self.test_sources)
        if config.forgetting.source:
            sources["forgetting"] = open_boxes(config.forgetting.source, "test")
        kept = KeptZeroShot(config, sources)
        made, limit = kept.maker(mesh), config.forgetting.threshold
        for evaluator in kept.evaluators(mesh):
            again = Remade(evaluator, made, f"{evaluator.name}_zero_shot")
            found.append(Forgetting(again, self.start, limit, "config.keep_zero_shot"))
            for share in config.keep_zero_shot:
                again = Remade(evaluator, made, f"{evaluator.name}_zero_shot_wise{share:g}")
                found.append(Interpolated(again, self.start, share))
        return found
