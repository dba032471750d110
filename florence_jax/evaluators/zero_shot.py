"""Zero-shot classification: an image takes the class whose prompts are nearest (CLIP; Florence section 3.1)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from florence_jax.data.text import class_prompts
from florence_jax.evaluators.base import Embedder


def class_embeddings(embedder: Embedder, params: Any, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """One unit vector a class: the mean over templates of the unit embeddings of its prompts, made unit again.

    Args:
      embedder, params: of the model.
      names: K class names.
      templates: prompts with one '{}' each.

    Returns:
      float32 (K, D).

    Raises:
      UserError: for an empty name, no templates or a malformed one.
    """
    prompts = [prompt for name in names for prompt in class_prompts(name, templates)]
    embedded = embedder.texts(params, prompts, f"{len(names)} classes").reshape(len(names), len(templates), -1)
    mean = embedded.mean(1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
