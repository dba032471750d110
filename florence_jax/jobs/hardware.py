"""What accelerators can do, by the names that JAX gives them; what processors can, and how many may be used."""

import os
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_PRODUCTS = {"avx512_bf16", "amx_bf16"}  # instructions that multiply bfloat16 and add up in float32
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time in a period, and the period
TRAINER_CORES = 2  # for the training process itself
MOST_WORKERS = 8  # processes that make batches: more are a choice to be made by who knows the machine

# Peak dense bf16 FLOP/s of one device (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}


def multiplies_bfloat16() -> bool:
    """Whether this processor has `BFLOAT16_PRODUCTS`; told by Linux only."""
    try:
        flags = next((line for line in CPU_INFO.read_text().splitlines() if line.startswith("flags")), "")
    except OSError:
        return False
    return not BFLOAT16_PRODUCTS.isdisjoint(flags.split())


def available_cores() -> int:
    """Cores that this process may use: of the machine, of what it is bound to, of what its container is given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = CPU_LIMIT.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if share == "max" else max(min(cores, int(share) // int(period)), 1)


def worker_count(wanted: int) -> int:
    """Processes that make batches: `wanted`, or with -1 one for each core to spare, at most `MOST_WORKERS`."""
    return wanted if wanted != -1 else min(max(available_cores() - TRAINER_CORES, 0), MOST_WORKERS)
