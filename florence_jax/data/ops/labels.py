"""Ops for classes: the class as a label, and as a prompt."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from florence_jax.data.ops.registry import Example, Op, op
from florence_jax.data.prompts import class_prompts
from florence_jax.errors import UserError


@op("class_label")
class ClassLabel(Op):
    """Adds "label": the class number by context["classes"] (a `ClassIndex`), see `ClassIndex.target`."""

    def __init__(self, context: Mapping[str, Any]):
        if context.get("classes") is None:
            raise UserError("needs 'classes' in the context")
        self.classes = context["classes"]
        # Without a field of its own a class is in the first there is of several; a record without any is a bad one.
        self.reads = frozenset((self.classes.field,) if self.classes.field else ())

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Replaces the label."""
        return example | {"label": self.classes.target(example)}


@op("class_prompt")
class ClassPrompt(Op):
    """Replaces the caption by a random one of context["templates"] around a random name of the example's class.

    Goes after `class_label`. Unlike `prompt`, it is for names of any length (UniCL; Florence section 4.3).
    """

    random = True
    reads = frozenset(("label",))

    def __init__(self, context: Mapping[str, Any]):
        if context.get("classes") is None or not context.get("templates"):
            raise UserError("needs 'classes' and 'templates' in the context")
        self.names, self.templates = context["classes"].names, tuple(context["templates"])

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Replaces the caption."""
        names = self.names[int(example["label"])]
        template = self.templates[int(rng.integers(len(self.templates)))]
        (prompt,) = class_prompts(names[int(rng.integers(len(names)))], (template,))
        return example | {"caption": prompt}
