"""Freed memory stays with the process on a machine without an accelerator."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from florence_jax.jobs import host_memory

TOUCH = """
import ctypes, resource, sys, threading
from florence_jax.jobs.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def touch():
    for size in (100 << 20, 20 << 20):
        place = libc.malloc(size)
        ctypes.memset(place, 1, size)
        libc.free(place)

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=touch)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()
print(step())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again():
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TOUCH]
    kept, plain = (
        int(subprocess.run([*command, how], env=environment, check=True, capture_output=True).stdout)
        for how in ("keep", "plain")
    )
    assert kept < 1000 and kept < plain / 2


def test_machines_with_accelerators_are_left_alone(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ["cuda"])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert host_memory.has_accelerator_support() and not host_memory.keep_freed_memory()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not host_memory.has_accelerator_support()


def test_an_installed_tpu_runtime_counts(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not host_memory.has_accelerator_support()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert host_memory.has_accelerator_support()
