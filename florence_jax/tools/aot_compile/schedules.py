"""How long the schedule of a kernel is, from what the TPU compiler writes about it: a bundle of instructions a cycle.

The first bundle of a loop says the regions that begin there; where it ends, a branch goes back to one of them unless
the next index has reached the loop's end. It takes effect four bundles later:

    0x69 LB: >> { %s9 = ... } /* Start region 36 */
    0x71   : >> { %p7 = scmp.ge.s32.totalorder %s9, 3 /* loop exit test */ ;; %1 = sbr.rel (!%p7) target = $region36 }
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_FILE = re.compile(r"^\d+-(.+)-\d+-final_bundles\.txt$")
_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s*(?:[A-Z]{2})?\s*: .*\{")
_REGION = re.compile(r"Start region (\d+)")
_EXIT = re.compile(r"%(\w+) = scmp\.ge\.s32\.totalorder (?:\(.*?\), )?%\w+, (\d+) /\* loop exit test \*/")
_BACK = re.compile(r"sbr\.rel \(!%(\w+)\) target = \$region(\d+)")
_DELAY = 4  # bundles after a branch that still run


def kernel_lengths(folder: Path, kernels: Mapping[str, str]) -> dict[str, int]:
    """`turn_length` of kernels, by their names.

    Args:
      folder: of `topologies.devices`, where the compiler leaves schedules.
      kernels: see `estimate.kernels_of`. Several that are alike may have one schedule, that of one of them.
    """
    lengths = {}
    for file in folder.iterdir():
        if (named := _FILE.match(file.name)) and named[1] in kernels:
            lengths[named[1]] = turn_length(file.read_text())
    alike = {kernels[name]: length for name, length in lengths.items()}
    return {name: alike[kind] for name, kind in kernels.items() if kind in alike} | lengths


def turn_length(bundles: str) -> int:
    """Bundles of one turn of a kernel's outermost loop, its grid; of all of it where there is none.

    Those of a loop inside count once for each trip; once where its end is not a number. What is skipped in most turns
    (waiting for what the last one began) counts like the rest.
    """
    lines = [line for line in bundles.splitlines() if _BUNDLE.match(line)]
    begins = {region: i for i, line in enumerate(lines) for region in _REGION.findall(line)}
    ends = {name: int(end) for line in lines for name, end in _EXIT.findall(line)}
    loops = [
        (begins[region], i + 1 + _DELAY, ends[name])
        for i, line in enumerate(lines)
        for name, region in _BACK.findall(line)
        if name in ends and begins.get(region, i + 1) <= i
    ]
    times = np.ones(len(lines), np.int64)
    if not loops:
        return len(times)
    grid = max(loops, key=lambda loop: loop[1] - loop[0])
    for first, end, trips in loops:
        if (first, end, trips) != grid:
            times[first:end] *= trips
    return int(times[grid[0] : grid[1]].sum())
