"""Trained weights from Python."""

from florence_jax.inference.florence import Florence

__all__ = ["Florence"]
