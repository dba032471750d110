"""How many objects a head for attributes describes rightly."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from florence_jax.data.box_classes import match_classes
from florence_jax.data.buckets import Bucket
from florence_jax.data.records import Source
from florence_jax.data.sources.boxes import BoxSource
from florence_jax.evaluators.base import Chart, Evaluator
from florence_jax.evaluators.predictor import Predictor

FIELDS = "image, valid, boxes, class_ids, objects, attribute_ids"


class AttributeAccuracy(Evaluator):
    """Attributes of the true boxes, told of their true classes.

    Results: 'top1', the share of objects with attributes whose likeliest attribute is one of theirs, and 'objects', how
    many those are. Chance: the attribute that most of them have, told of all.

    Args:
      source: with `attribute_names`.
      ops: of a picture, without boxes.
      buckets: see `make_buckets`.
      judge: pure function (params, batch) as `tasks.attributes.Attributes.judge`.
      mesh, batch_size: of the evaluation.
      class_names, attribute_names: of the head. Objects of other classes, and other attributes, are left out.
      name: prefix of the results.
      on_corrupt: 'skip' or 'error'.
    """

    def __init__(
        self,
        source: BoxSource,
        ops: str,
        buckets: Sequence[Bucket],
        judge: Callable[[Any, dict[str, jax.Array]], Mapping[str, jax.Array]],
        mesh: Mesh,
        batch_size: int,
        class_names: Sequence[str],
        attribute_names: Sequence[str],
        name: str,
        on_corrupt: str = "error",
    ):
        self.name, self.charts = name, (Chart(f"{name}: right attribute", {"": "top1"}),)
        self._source, self._buckets, self._on_corrupt = source, buckets, on_corrupt
        # From the numbers of the source to those of the head, -1 for what it does not know.
        classes = match_classes(source.class_names, class_names)
        attributes = np.append(
            match_classes(getattr(source, "attribute_names", ()), attribute_names), -1
        )  # the last: of no attribute
        self._most_common, room = _most_common(source, classes, attributes)

        def renumbered(params: Any, batch: dict[str, jax.Array]) -> Mapping[str, jax.Array]:
            ids = {"class_ids": jnp.asarray(classes)[batch["class_ids"]]}
            return judge(params, batch | ids | {"attribute_ids": jnp.asarray(attributes)[batch["attribute_ids"]]})

        self._ops = f"{ops}|pad_boxes({room})|keep({FIELDS})"
        self._predictor = Predictor(renumbered, mesh, batch_size)

    @property
    def chance(self) -> Mapping[str, float]:
        """See the class."""
        return {"top1": self._most_common}

    @property
    def sources(self) -> Sequence[Source]:
        """See `Evaluator`."""
        return (self._source,)

    def run(self, params: Any) -> dict[str, float]:
        """See the class."""
        right = counted = 0
        rows = self._predictor.rows(
            params, self._source, self._ops, {}, buckets=self._buckets, on_corrupt=self._on_corrupt, what=self.name
        )
        for row in rows:
            right, counted = right + int(row["right"].sum()), counted + int(row["counted"].sum())
        return {"top1": right / max(counted, 1), "objects": float(counted)}


def _most_common(source: BoxSource, classes: np.ndarray, attributes: np.ndarray) -> tuple[float, int]:
    """The share of the objects with attributes that have the most common one, and the most boxes of a picture."""
    counts, objects, room = np.zeros(int(attributes.max(initial=0)) + 1, np.int64), 0, 1
    for record in source.metadata():
        ids = attributes[record["attribute_ids"]][(classes[record["class_ids"]] >= 0) & ~record["iscrowd"]]
        known = ids >= 0
        objects += int(known.any(-1).sum())
        np.add.at(counts, ids[known], 1)
        room = max(room, len(record["boxes"]))
    return float(counts.max() / max(objects, 1)), room
