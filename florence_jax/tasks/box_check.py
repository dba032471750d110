"""Protocol 'check' of detection: what the data are, and what is wrong with them; no model, no weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.data.sources.catalog import split_mixture
from florence_jax.data.sources.detection import open_boxes
from florence_jax.errors import UserError
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.box_check import BoxCheck
from florence_jax.models.base import Params
from florence_jax.params.weights import make_description
from florence_jax.tasks.base import Suite, make_identity

CHECKED = ("train", "test")  # of config.data


class BoxCheckSuite(Suite):
    """Looks at `config.data.train` and `config.data.test`, each where it is given, and tells what it finds.

    Raises:
      UserError: where neither is given.
    """

    name = "detect"

    def __init__(self, config: ConfigDict):
        if not any(config.data[name] for name in CHECKED):
            raise UserError("nothing to check: give --config.data.test=DATA, or --config.data.train=DATA")
        self.config = config

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        return make_identity(self.config, "protocol", "data.train", "data.test")

    @property
    def description(self) -> Mapping[str, Any]:
        """See `Suite`; no parts."""
        return make_description(self.name, {})

    def load(self, mesh: Mesh) -> Params:
        """No parameters."""
        return {}

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """A check of each set."""
        checks = []
        for name in CHECKED:
            if spec := self.config.data[name]:
                for i, (part, _) in enumerate(split_mixture(spec)):
                    source = open_boxes(part, name, check=True)
                    checks.append(BoxCheck(source, f"{name}_{i + 1}" if i else name))
        return checks
