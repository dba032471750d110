"""Test-wide settings: eight simulated CPU devices and no silent rank promotion."""

import jax
from absl import flags

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# grain's worker processes read absl flags; outside an absl app they must be marked as parsed.
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
