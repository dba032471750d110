"""Programs that are traced and give zeros, for tests of what is timed: nothing is compiled."""

import functools

import jax
import numpy as np


def jit_to_zeros(function, **options):
    """In place of `jax.jit`: what is called gives zeros of the right shapes."""
    zeros = functools.partial(jax.tree.map, lambda leaf: np.zeros(leaf.shape, leaf.dtype))
    return lambda *args: zeros(jax.eval_shape(function, *args))
