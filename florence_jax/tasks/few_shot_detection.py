"""Few-shot detection: a detector, or towers, adapted on few pictures of each class of a set."""

from collections.abc import Mapping
from typing import Any

from florence_jax.data.few_shots import few_shots
from florence_jax.tasks.base import make_identity
from florence_jax.tasks.finetune_detection import FineTuneDetect
from florence_jax.tasks.recipe import few_shot_recipe


class FewShotDetect(FineTuneDetect):
    """Training on `config.shots` pictures of each class, which `config.seed` draws; 0 shots: on all pictures.

    Raises:
      UserError: as `FineTuneDetect`, and as `few_shots`.
    """

    recipe = staticmethod(few_shot_recipe)

    def _open_sources(self) -> None:
        super()._open_sources()
        if self.train_source is not None and self.config.shots:
            self.train_source = few_shots(self.train_source, self.config.shots, self.config.seed)

    def _examples(self) -> int | None:
        if self.train_source is None or not self.config.shots:
            return super()._examples()
        return len(self.train_source)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Suite`."""
        return {**super().identity, **make_identity(self.config, "shots")}
