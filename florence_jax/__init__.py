"""florence_jax: the Florence vision foundation model (Yuan et al., arXiv 2111.11432) in JAX."""

__version__ = "0.1.0"
