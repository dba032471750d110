"""Command-line tools: `python -m florence_jax.tools.NAME`."""
