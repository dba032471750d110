"""What the tasks that train a fusion share: how it begins, learns and is loaded."""

import functools

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from florence_jax.models.base import Params
from florence_jax.params.rules import Policy
from florence_jax.tasks.base import Task, frozen_parts
from florence_jax.tasks.fusion import FusedTowers


class FusionTask(Task):
    """A task that trains a fusion on two towers.

    Attributes:
      config: of the run. fusion: the model, and the folder that it begins from.
    """

    config: ConfigDict
    fusion: FusedTowers

    @functools.cached_property
    def policy(self) -> Policy:
        """METER's groups; see `FusedTowers.policy`."""
        return self.fusion.policy(self.config.fusion)

    @functools.cached_property
    def frozen(self) -> frozenset[str]:
        """See `frozen_parts`."""
        return frozen_parts(self, self.config)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        return self.fusion.init(key)

    def start(self, params: Params) -> Params:
        """The folder's towers, and its fusion where it holds one."""
        return self.fusion.load(params)

    def load(self, mesh: Mesh) -> Params:
        """The trained model of `config.init`."""
        return self.fusion.load_on(mesh, self.config.mesh.sharding_rules)
