"""Attributes of objects, such as 'red' or 'wooden', from the features of their boxes.

The head of Anderson et al. 2018 (arXiv 1707.07998): the mean feature of a box and an embedding of what it holds.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from florence_jax.models.base import Model
from florence_jax.models.layers import Dense
from florence_jax.models.roi_align import roi_align

EMBEDDING, HIDDEN_WIDTH = 256, 512
STRIDE = 32  # of the tower's last stage


class AttributeHead(nn.Module):
    """See `build_attribute_head`."""

    classes: int
    attributes: int

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> dict[str, jax.Array]:
        """Logits of the attributes of each box."""
        found = roi_align(batch["map"], batch["boxes"], STRIDE, (1, 1), valid=batch["valid"])[:, :, 0, 0]
        table = self.param("class_embedding", nn.initializers.normal(0.02), (self.classes, EMBEDDING))
        x = jnp.concatenate([found.astype(jnp.float32), table[batch["class_ids"]]], -1)
        hidden = jax.nn.relu(Dense(HIDDEN_WIDTH, name="fc1")(x))
        return {"logits": Dense(self.attributes, name="fc2")(hidden)}


def build_attribute_head(channels: int, classes: int, attributes: int) -> Model[None]:
    """A head that tells attributes of boxes: a linear layer to 512, ReLU, a linear layer, in float32.

    Its inputs are "map" float (B, h, w, C), the tower's last stage, "valid" int32 (B, 2), the pictures' own part of it,
    "boxes" float32 (B, R, 4) in pixels, and "class_ids" int32 (B, R); its output 'logits' float32 (B, R, A).

    Args:
      channels: C. classes: whose embeddings it learns. attributes: A.
    """
    inputs = {
        "map": jax.ShapeDtypeStruct((1, 2, 2, channels), jnp.float32),
        "valid": jax.ShapeDtypeStruct((1, 2), jnp.int32),
        "boxes": jax.ShapeDtypeStruct((1, 1, 4), jnp.float32),
        "class_ids": jax.ShapeDtypeStruct((1, 1), jnp.int32),
    }
    return Model(AttributeHead(classes, attributes), None, inputs)
