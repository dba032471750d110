"""Which classes of a large vocabulary a batch is trained on: its own, and others by how frequent they are.

As in the federated loss of Zhou et al. 2021 (arXiv 2103.07461) and Detic (arXiv 2201.02605): of classes without an
object in the batch the logits are background of few pictures in any case, and some of them are enough.
"""

import jax
import jax.numpy as jnp

POWER = 0.5  # of the frequencies


def sample_classes(key: jax.Array, present: jax.Array, frequencies: jax.Array, count: int) -> jax.Array:
    """Draws classes without repetition: those that are present, then others, one by one, by frequency^(1/2).

    What is drawn depends on the key and the classes of the whole batch alone: over several devices it is the same on
    each. Of more present classes than `count` some are drawn, all equally likely.

    Args:
      key: of the step.
      present: int (...), classes of the objects of the global batch, -1 for none.
      frequencies: (K,), how often each class is in the data; less than once counts as once.
      count: how many, at most K.

    Returns:
      int32 (count,), ascending.
    """
    classes = len(frequencies)
    places = jnp.where(present < 0, classes, present).ravel()
    own = jnp.zeros(classes + 1, jnp.int32).at[places].max(1)[:classes]
    # Gumbel's noise on logarithms: the order of the sums is that of draws without repetition (Efraimidis & Spirakis).
    weights = jnp.where(own > 0, 0, POWER * jnp.log(jnp.maximum(frequencies, 1).astype(jnp.float32)))
    noisy = weights + jax.random.gumbel(key, (classes,))
    order = jax.lax.sort((-own, -noisy, jnp.arange(classes, dtype=jnp.int32)), num_keys=2)[2]
    return jnp.sort(order[:count])


def is_drawn(class_ids: jax.Array, drawn: jax.Array) -> jax.Array:
    """bool (...): which of int (...) are among `drawn` (S,), ascending."""
    places = jnp.minimum(jnp.searchsorted(drawn, class_ids), len(drawn) - 1)
    return drawn[places] == class_ids
