"""`config.precision`, and what 'auto' comes to; in config.json stands what was chosen.

  float32            of activations.
  bfloat16           of activations (`float16` likewise); for accelerators.
  bfloat16_products  float32, but in training the factors of products with parameters are rounded (`models.products`).
  auto               the last on a processor that is faster with it, float32 elsewhere; a resume keeps what it was.

Parameters, norms, softmax, the loss and the optimizer are float32 always.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from florence_jax.jobs.hardware import multiplies_bfloat16
from florence_jax.models.products import ROUNDED
from florence_jax.models.sizes import DTYPES

AUTO = "auto"
CHOICES = (ROUNDED, *DTYPES)


def best_precision(platform: str) -> str:
    """What 'auto' is on this machine for devices of a platform ('cpu', 'tpu', ...): `ROUNDED` or 'float32'.

    An accelerator multiplies float32 arrays as it likes best without being told. Who sets JAX's own
    `jax_default_matmul_precision` (JAX_DEFAULT_MATMUL_PRECISION) has chosen already.
    """
    chosen = jax.config.jax_default_matmul_precision is not None  # type: ignore[attr-defined]
    return ROUNDED if platform == "cpu" and not chosen and multiplies_bfloat16() else "float32"


def agreed_precision(found: str, saved: Mapping[str, Any]) -> str:
    """What 'auto' is for a run: as it was begun with, and on all processes as on the first.

    Args:
      found: `best_precision`, of each process.
      saved: the config.json of the run that is resumed; {} for a new one. Of process 0.
    """
    chosen = CHOICES.index(saved.get("precision", found))
    return CHOICES[int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))]
