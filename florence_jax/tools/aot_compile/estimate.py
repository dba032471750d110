"""The TPU compiler's estimate of a program's time: what it reckons for each op, added up.

The optimised program carries `estimated_cycles` for every op that the compiler made itself; those of a loop's body
count once for each of its trips. For a kernel (a Pallas call) that says nothing of its schedule. But the schedule is
known, a bundle of instructions a cycle (`schedules.py`), and the kernel says how often a core runs through it:
`pallas_call(metadata={"trips": "96"})`, the product of its grid over the cores. Waiting for memory or for other chips
is in it only as far as the compiler reckons with it: the estimate ranks programs, it is no measurement.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from florence_jax.tools.aot_compile.hlo import Program

MOST_EXPENSIVE = 10  # places
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'kernel_metadata=\{[^}]*"trips":"(\d+)"')
_OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?\})\}")
_KERNEL = 'custom_call_target="tpu_custom_call"'
_INNER = {"while", "conditional", "call"}  # instructions whose computations the program runs as written
# Parts of a traced name that tell nothing of the model.
_WRAPPERS = re.compile(r"while|body|cond|branch_\d+_fun|closed_call|checkpoint|rematted_computation|shard_map")


def estimate(hlo: str, clock: float, kernels: Mapping[str, int]) -> dict[str, Any] | None:
    """The time of one execution of a compiled program.

    Args:
      hlo: text of the optimised module.
      clock: cycles a second.
      kernels: bundles of a turn of each kernel by its name, see `schedules.kernel_lengths`.

    Returns:
      {"cycles", "clock", "seconds", "kernel_seconds" (of them in kernels), "unknown_kernels" (executions of kernels
      that are not in it, because they do not say their trips or have no schedule), "places": [{"place", "seconds",
      "share"}, ...], the most expensive first}; None for a program without estimates, of another compiler.
    """
    program, unknown, of_kernels = Program(hlo), Counter[str](), 0

    def visit(computation: str, times: int) -> Counter[str]:
        nonlocal of_kernels
        found: Counter[str] = Counter()
        for line in program.lines.get(computation, ()):
            match = _NAME.match(line)
            if match is None:
                continue
            name, opcode = match.groups()
            if opcode in _INNER:
                inner = [visit(other, times * trips) for other, trips in program.called(line)]
                found += max(inner, key=Counter.total) if opcode == "conditional" and inner else sum(inner, Counter())
            elif _KERNEL in line:
                trips = _TRIPS.search(line)
                if trips is None or name not in kernels:
                    unknown[name] += times
                else:
                    found[origin(line, opcode)] += int(trips[1]) * kernels[name] * times
                    of_kernels += int(trips[1]) * kernels[name] * times
            elif match := _CYCLES.search(line):
                found[origin(line, opcode)] += int(match[1]) * times
        return found

    places = visit(program.entry, 1)
    cycles = places.total()
    if not cycles:
        return None
    return {
        "cycles": cycles,
        "clock": clock,
        "seconds": cycles / clock,
        "kernel_seconds": of_kernels / clock,
        "unknown_kernels": unknown.total(),
        "places": [
            {"place": name, "seconds": count / clock, "share": count / cycles}
            for name, count in places.most_common(MOST_EXPENSIVE)
        ],
    }


def origin(line: str, opcode: str) -> str:
    """Where in the model an instruction comes from: 'backward image/stage2/plain/attention/qkv'."""
    match = _OP_NAME.search(line)
    if match is None:
        return f"the compiler's own ({opcode})"
    way = "backward" if "transpose(" in match[1] else "forward"
    parts = [part for part in match[1].split("/")[:-1] if re.fullmatch(r"\w+", part) and not _WRAPPERS.fullmatch(part)]
    return f"{way} {'/'.join(parts)}" if parts else "outside of the model"


def kernels_of(hlo: str) -> dict[str, str]:
    """The kernels of a compiled program, and of each what is alike in those that are compiled once for all of them."""
    found = {}
    for line in hlo.splitlines():
        if _KERNEL in line and (match := _NAME.match(line)):
            operands = _OPERANDS.search(line)
            found[match[1]] = match[1].rstrip(".0123456789") + (operands[1] if operands else "")
    return found
