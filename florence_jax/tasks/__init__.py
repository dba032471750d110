"""Tasks by name: each joins a model, a loss and data for the one training loop, or weights and evaluators."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from florence_jax.errors import UserError
from florence_jax.tasks.base import Suite, Task
from florence_jax.tasks.classify import FewShotSuite, ProbeSuite, ZeroShotSuite
from florence_jax.tasks.finetune import FineTuneLinear, FineTuneUniCL
from florence_jax.tasks.pretrain import Pretrain
from florence_jax.tasks.retrieve import FineTuneRetrieval, RetrievalSuite

# Task -> protocol ('' where a task has one only) -> what it is.
TASKS: Mapping[str, Mapping[str, Callable[[ConfigDict], Suite]]] = {
    "pretrain": {"": Pretrain},
    "classify": {
        "zeroshot": ZeroShotSuite,
        "probe": ProbeSuite,
        "fewshot": FewShotSuite,
        "finetune_unicl": FineTuneUniCL,
        "finetune_linear": FineTuneLinear,
    },
    "retrieve": {"zeroshot": RetrievalSuite, "finetune": FineTuneRetrieval},
}


def create_suite(config: ConfigDict) -> Suite:
    """Builds what `config.task` and `config.protocol` name; raises `UserError` listing the known ones."""
    if config.task not in TASKS:
        raise UserError(f"config.task={config.task!r} is unknown; known tasks: {', '.join(sorted(TASKS))}")
    protocols, protocol = TASKS[config.task], config.get("protocol", "")
    if protocol not in protocols:
        raise UserError(f"config.protocol={protocol!r} is unknown; choose one of {', '.join(protocols)}")
    return protocols[protocol](config)


def create_task(config: ConfigDict) -> Task:
    """As `create_suite`, for what is to be trained; raises `UserError` for what is only evaluated."""
    suite = create_suite(config)
    if not isinstance(suite, Task):
        raise UserError(f"protocol {config.protocol!r} of task {config.task!r} trains nothing")
    return suite
