"""Training on a large vocabulary: the classes that a step looks at, drawn by how frequent they are in the data."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from florence_jax.data.sources.boxes import BoxSource, pictures_by_class
from florence_jax.errors import UserError
from florence_jax.losses.class_sampling import is_drawn, sample_classes


class ClassSampler:
    """Draws the classes that a step of training looks at.

    Args:
      source: what is trained on; None where nothing is, then all classes are as frequent.
      classes: how many there are.
      sampled: most classes of a step; where there are no more, all are looked at, and nothing is drawn.

    Attributes:
      per_step: classes that a step looks at.

    Raises:
      UserError: for less than one.
    """

    def __init__(self, source: BoxSource | None, classes: int, sampled: int):
        if sampled < 1:
            raise UserError(f"config.detector.sampled_classes={sampled} must be at least 1")
        self.per_step = min(classes, sampled)
        self._frequencies: np.ndarray | None = None
        if self.per_step < classes:
            counted = np.ones(classes) if source is None else pictures_by_class(source)
            self._frequencies = counted.astype(np.float32)

    def draw(self, key: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The batch with "drawn", see `losses.detection.loss_sums`, and metrics.

        "objects_not_drawn" is the number of objects whose class the step has no room for: none, as long as the batch
        has no more classes than the step.
        """
        if self._frequencies is None:
            return dict(batch), {}
        ids, objects = batch["class_ids"], batch["objects"]
        present = jnp.where(objects, ids, -1)
        drawn = sample_classes(key, present, jnp.asarray(self._frequencies), self.per_step)
        missing = (objects & ~is_drawn(ids, drawn)).sum().astype(jnp.float32)
        return {**batch, "drawn": drawn}, {"objects_not_drawn": missing}
