"""The C library's memory on a machine without an accelerator, where XLA computes in it."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# Options of glibc's mallopt.
ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1


def has_accelerator_support() -> bool:
    """Whether JAX may find more than the CPU: a plug-in for GPUs or TPUs is installed and not excluded."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return False
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None


def keep_freed_memory() -> bool:
    """Makes glibc keep memory that is freed for the next allocation, in one heap; returns whether it does.

    XLA's CPU client takes its buffers from malloc and frees them in every step. By default those go back to the system
    and come again as pages to be cleared, which is a fifth of a small step. Call it before JAX starts its threads, each
    of which would get a heap of its own. Not where there is an accelerator: the host's memory is then for data and
    checkpoints, and should go back.
    """
    if not sys.platform.startswith("linux") or has_accelerator_support():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; musl has none
    options = ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1))
    return mallopt is not None and all([mallopt(option, value) for option, value in options])
