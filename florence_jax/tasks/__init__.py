"""Tasks by name: each joins a model, a loss and data for the one training loop."""

from ml_collections import ConfigDict

from florence_jax.errors import UserError
from florence_jax.tasks.base import Task
from florence_jax.tasks.classify import Classify
from florence_jax.tasks.pretrain import Pretrain
from florence_jax.tasks.retrieve import Retrieve

TASKS = {"classify": Classify, "pretrain": Pretrain, "retrieve": Retrieve}


def create_task(config: ConfigDict) -> Task:
    """Builds the task named by `config.task`; raises `UserError` listing the known ones."""
    if config.task not in TASKS:
        raise UserError(f"config.task={config.task!r} is unknown; known tasks: {', '.join(sorted(TASKS))}")
    return TASKS[config.task](config)
