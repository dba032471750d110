"""Tasks by name: each joins a model, a loss and data for the one training loop, or weights and evaluators."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from florence_jax.errors import UserError
from florence_jax.tasks.base import Suite, Task
from florence_jax.tasks.box_check import BoxCheckSuite
from florence_jax.tasks.classify import FewShotSuite, HeadSuite, ProbeSuite, ZeroShotSuite
from florence_jax.tasks.detect import DetectionSuite
from florence_jax.tasks.few_shot_detection import FewShotDetect
from florence_jax.tasks.finetune import FineTuneLinear, FineTuneUniCL
from florence_jax.tasks.finetune_detection import FineTuneDetect
from florence_jax.tasks.pretrain import Pretrain
from florence_jax.tasks.rerank import RerankSuite
from florence_jax.tasks.retrieve import FineTuneRetrieval, RetrievalSuite
from florence_jax.tasks.sentences import Nlvr2, SnliVe
from florence_jax.tasks.video import RecognitionSuite, TextToVideoSuite, TrainVideo, VideoProbeSuite, ZeroShotVideoSuite
from florence_jax.tasks.video_check import VideoCheckSuite
from florence_jax.tasks.video_retrieval import FineTuneVideoRetrieval
from florence_jax.tasks.vlp import VLP
from florence_jax.tasks.vqa import Vqa, VqaSuite
from florence_jax.tasks.zero_shot_detection import ZeroShotDetectionSuite

CLASSIFIER = "florence_jax.inference.classifier:Classifier"
PRETRAINED = "pretrain"


class Registered(NamedTuple):
    """A task.

    Attributes:
      protocols: what its configuration can do, by `config.protocol` ('' where there is one only).
      answerer: 'module:class', what `florence_jax.predict` uses for the weights of this task, see `inference.base`; it
        is imported only there.
    """

    protocols: Mapping[str, Callable[[ConfigDict], Suite]]
    answerer: str


TASKS: dict[str, Registered] = {
    PRETRAINED: Registered({"": Pretrain}, CLASSIFIER),
    "classify": Registered(
        {
            "zeroshot": ZeroShotSuite,
            "probe": ProbeSuite,
            "fewshot": FewShotSuite,
            "head": HeadSuite,
            "finetune_unicl": FineTuneUniCL,
            "finetune_linear": FineTuneLinear,
        },
        CLASSIFIER,
    ),
    "detect": Registered(
        {
            "train": FineTuneDetect,
            "fewshot": FewShotDetect,
            "zeroshot": ZeroShotDetectionSuite,
            "eval": DetectionSuite,
            "check": BoxCheckSuite,
        },
        "florence_jax.inference.detector:DetectorAnswerer",
    ),
    "video": Registered(
        {
            "train": TrainVideo,
            "eval": RecognitionSuite,
            "probe": VideoProbeSuite,
            "zeroshot": ZeroShotVideoSuite,
            "retrieval": TextToVideoSuite,
            "finetune": FineTuneVideoRetrieval,
            "check": VideoCheckSuite,
        },
        "florence_jax.inference.video:ActionAnswerer",
    ),
    "retrieve": Registered({"zeroshot": RetrievalSuite, "finetune": FineTuneRetrieval}, CLASSIFIER),
    "vlp": Registered({"": VLP}, CLASSIFIER),
    "vqa": Registered(
        {"train": Vqa, "eval": VqaSuite, "nlvr2": Nlvr2, "snli_ve": SnliVe, "rerank": RerankSuite},
        "florence_jax.inference.answers:QuestionAnswerer",
    ),
}


def create_suite(config: ConfigDict) -> Suite:
    """Builds what `config.task` and `config.protocol` name; raises `UserError` listing the known ones."""
    if config.task not in TASKS:
        raise UserError(f"config.task={config.task!r} is unknown; known tasks: {', '.join(sorted(TASKS))}")
    protocols, protocol = TASKS[config.task].protocols, config.get("protocol", "")
    if protocol not in protocols:
        raise UserError(f"config.protocol={protocol!r} is unknown; choose one of {', '.join(protocols)}")
    return protocols[protocol](config)


def create_task(config: ConfigDict) -> Task:
    """As `create_suite`, for what is to be trained; raises `UserError` for what is only evaluated."""
    suite = create_suite(config)
    if not isinstance(suite, Task):
        raise UserError(f"protocol {config.protocol!r} of task {config.task!r} trains nothing")
    return suite


def answerer_class(task: str) -> Any:
    """What `florence_jax.predict` uses for the weights of a task; imported towers are used as pretrained ones."""
    module, _, name = TASKS.get(task, TASKS[PRETRAINED]).answerer.partition(":")
    return getattr(importlib.import_module(module), name)
