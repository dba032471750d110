"""The packages: configs/ of the repository is florence_jax/configs in an installation. All else: pyproject.toml."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["florence_jax*"]), "florence_jax.configs"],
    package_dir={"florence_jax.configs": "configs"},
)
