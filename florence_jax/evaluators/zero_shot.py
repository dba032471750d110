"""Zero-shot classification: an image takes the class whose prompts are nearest (CLIP; Florence section 3.1)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from florence_jax.data.classes import METRICS, ClassIndex, choose_templates, dataset_name, open_classes, open_images
from florence_jax.data.prompts import class_prompts
from florence_jax.data.records import Source
from florence_jax.errors import UserError
from florence_jax.evaluators.classification import Classification
from florence_jax.evaluators.metrics import softmax
from florence_jax.evaluators.predictor import Embedder

# Of the softmax behind VOC's ranking of images by class (CLIP's learned maximum); no other metric depends on it.
CLIP_SCALE = 100.0


def class_embeddings(
    embedder: Embedder, params: Any, names: Sequence[str | Sequence[str]], templates: Sequence[str]
) -> np.ndarray:
    """One unit vector a class: the mean of the unit embeddings of its prompts, made unit again.

    The prompts of a class with several names are those of all of them: each name in each template.

    Args:
      embedder, params: of the model.
      names: K classes, each a name or the names that mean the same.
      templates: prompts with one '{}' each.

    Returns:
      float32 (K, D).

    Raises:
      UserError: for an empty name, no templates or a malformed one.
    """
    groups = [(given,) if isinstance(given, str) else tuple(given) for given in names]
    if not all(groups):
        raise UserError("a class without a name cannot be put into prompts")
    prompts = [prompt for group in groups for name in group for prompt in class_prompts(name, templates)]
    embedded = embedder.texts(params, prompts, f"prompts of {len(names)} classes")
    counts = len(templates) * np.array([len(group) for group in groups])
    mean = np.add.reduceat(embedded, np.cumsum(counts) - counts, axis=0) / counts[:, None].astype(np.float32)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


class ZeroShot(Classification):
    """Zero-shot classification on a labelled source; results as `Classification`.

    Scores are the model's logit scale times the cosine of the image's and the class's embedding; for VOC's metric the
    softmax of `CLIP_SCALE` times the cosine.

    Args:
      name, source, classes, ops, embedder, metric, on_corrupt: see `Classification`.
      templates: prompts with one '{}' each; all names of each class go into them.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        classes: ClassIndex,
        ops: str,
        embedder: Embedder,
        templates: Sequence[str],
        metric: str = "top1",
        on_corrupt: str = "error",
    ):
        readable = _as_it_is if metric == "voc_map" else None
        super().__init__(name, source, classes, ops, embedder, self._scores, metric, on_corrupt, readable)
        self._templates = tuple(templates)

    def _scores(self, params: Any, features: np.ndarray) -> Callable[[int, int], np.ndarray]:
        weights = class_embeddings(self._embedder, params, self._classes.names, self._templates)
        if self.metric == "voc_map":  # images are ranked for each class by the softmax over classes (ELEVATER)
            return lambda start, stop: softmax(CLIP_SCALE * (features[start:stop] @ weights.T))
        scale = float(np.exp(params["logit_scale"]))
        return lambda start, stop: scale * (features[start:stop] @ weights.T)


def _as_it_is(scores: np.ndarray) -> np.ndarray:
    return scores


def open_zero_shot(
    name: str, spec: str, ops: str, embedder: Embedder, class_names: str = "", on_corrupt: str = "error"
) -> ZeroShot:
    """Zero-shot classification of a named source, with the prompts and the metric of its data set.

    Args:
      name, ops, embedder, on_corrupt: see `ZeroShot`.
      spec: see `data.classes.open_images`.
      class_names: see `data.classes.open_classes`.
    """
    source, dataset = open_images(spec), dataset_name(spec)
    classes = open_classes(source, class_names)
    metric = "voc_map" if classes.multi else METRICS.get(dataset, "top1")
    return ZeroShot(name, source, classes, ops, embedder, choose_templates("", dataset), metric, on_corrupt)
