"""TPU slices that need not be there: their chips as devices to compile for, by the compiler in pip's `libtpu`."""

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

from florence_jax.errors import UserError

GIB = 2**30
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
# Of each op and kernel how many instruction bundles it has, and which.
_DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


@dataclasses.dataclass(frozen=True)
class Kind:
    """One generation of TPU.

    Attributes:
      peak_flops: bfloat16 operations a second of one chip (Google Cloud's system architecture pages).
      hbm: bytes that the compiler lets one program use on a chip; a little less than the memory's size.
      shapes: slices that can be had, in chips.
      clock: cycles a second; `peak_flops` follows from it and the size of the matrix units.
      cores: TensorCores of a chip as counted in the accelerator type's name (v5p-512 is 256 chips).
    """

    peak_flops: float
    hbm: float
    shapes: tuple[str, ...]
    clock: float
    cores: int = 1


CHIP_KINDS = {
    "v4": Kind(275e12, 30.75 * GIB, (*_CUBES, "12x16x16"), 1.05e9, cores=2),
    "v5e": Kind(197e12, 15.75 * GIB, _SQUARES, 1.5e9),
    "v5p": Kind(459e12, 95.74 * GIB, (*_CUBES, "16x16x24"), 1.75e9, cores=2),
    "v6e": Kind(918e12, 31.25 * GIB, _SQUARES, 1.75e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A kind of chip and its arrangement in a slice, for example ('v5p', (4, 8, 8)); and how many such slices."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As it is written: 'v5p:4x8x8'; of one slice."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Number of chips, of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def chip(self) -> Kind:
        """What one of its chips can do."""
        return CHIP_KINDS[self.kind]


def find(name: str, slices: int = 1) -> Topology:
    """`slices` slices of the topology `name`: kind and shape ('v5p:4x8x8', in any order), or a type ('v5p-512').

    Raises:
      UserError: for an unknown one, with the list of the known; for less than one slice.
    """
    if slices < 1:
        raise UserError(f"--slices={slices}: a run needs at least one")
    kind, _, shape = name.partition(":")
    if match := re.fullmatch(r"(v\d\w*?)(?:litepod)?-(\d+)", name):
        kind = {"v5": "v5e"}.get(match[1], match[1])
        chips = int(match[2]) // (CHIP_KINDS[kind].cores if kind in CHIP_KINDS else 1)
        shape = next((s for s in CHIP_KINDS[kind].shapes if _chips(s) == chips), "") if kind in CHIP_KINDS else ""
    if kind in CHIP_KINDS and re.fullmatch(r"\d+(x\d+)+", shape):
        wanted = sorted(map(int, shape.split("x")))
        for known in CHIP_KINDS[kind].shapes:
            if sorted(map(int, known.split("x"))) == wanted:
                return Topology(kind, tuple(map(int, known.split("x"))), slices)
    lists = "; ".join(f"{kind}: {', '.join(entry.shapes)}" for kind, entry in CHIP_KINDS.items())
    raise UserError(f"unknown topology {name!r}; write KIND:SHAPE with one of {lists}")


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def devices(topology: Topology, schedules: Path | None = None) -> list[Any]:
    """One compile-only device per chip.

    Args:
      topology: the slice.
      schedules: folder in which the compiler leaves the lengths of what it schedules, see `schedules.kernel_lengths`;
        the first call of a process decides. What LIBTPU_INIT_ARGS names a folder for goes there instead.

    Raises:
      UserError: if the TPU compiler is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed: pip install '.[aot]' (or libtpu); no TPU is needed")
    # Keeps libtpu from looking for a TPU and its metadata server, and from locking other compilations out.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = os.environ.get("LIBTPU_INIT_ARGS", "")
    if schedules is not None and "--xla_jf_dump_to=" not in options:
        os.environ["LIBTPU_INIT_ARGS"] = f"{options} {_DUMP.format(schedules)}".strip()
    from jax.experimental import topologies

    description = topologies.get_topology_desc(
        topology_name=topology.name, platform="tpu", num_slices=topology.slices, **_options(topology)
    )
    return list(description.devices)


def _options(topology: Topology) -> dict[str, Any]:
    """What the name does not tell the compiler."""
    shape = topology.shape
    if len(shape) == 3:
        # Slices of whole 4x4x4 cubes are tori; smaller ones are not. A v4 chip is two devices unless 'megacore'.
        cubes = all(side % 4 == 0 for side in shape)
        options: dict[str, Any] = {"chips_per_host_bounds": (2, 2, 1), "wrap": (cubes, cubes, cubes)}
        return options | ({"chip_config_name": "megacore"} if topology.kind == "v4" else {})
    # v5e and v6e: a side of 16 chips closes to a ring.
    host = tuple(min(side, 2) for side in shape)
    return {"chips_per_host_bounds": (*host, 1), "wrap": (*(side == 16 for side in shape), False)}
