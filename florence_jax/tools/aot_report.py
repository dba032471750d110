"""What a compiled training step says about itself: collectives in its HLO, memory, and the table made of them."""

import math
import re
from typing import Any

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "token": 0}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(-start)?\(")
_TENSOR = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(condition|body|calls|to_apply|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\])")
_SIZE = r"([\d.]+)([KMGT]?)"
_NEEDED = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm", re.IGNORECASE),
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", re.IGNORECASE),
)


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Communication of one execution of a compiled program, by kind.

    A collective inside a loop counts once per iteration where the compiler knows how many there are (the trip count of
    a scan; else once). The TPU compiler writes most reduce-scatters as a fusion called all-reduce-scatter around an
    all-reduce: those count as reduce-scatter.

    Args:
      hlo: text of the optimised module (`compiled.as_text()`).

    Returns:
      kind -> {"count": executions, "bytes": of the whole tensors, on one device: gathered, to be reduced, or
      exchanged}. A ring sends about that much per device (twice that for an all-reduce). Only kinds that occur.
    """
    bodies, entry = _computations(hlo)
    totals: dict[str, dict[str, int]] = {}

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if match := _COLLECTIVE.search(line):
                kind, size = _collective(match, line, name)
                total = totals.setdefault(kind, {"count": 0, "bytes": 0})
                total["count"] += times
                total["bytes"] += times * size
            trips = int(_TRIPS.search(line)[1]) if _TRIPS.search(line) else 1
            called = [match[2] for match in _CALLED.finditer(line)]
            for match in _BRANCHES.finditer(line):
                called += re.findall(r"[\w.\-]+", match[1])
            for other in called:
                visit(other, times * trips)

    visit(entry, 1)
    return {kind: totals[kind] for kind in COLLECTIVES if kind in totals}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Computation name -> those of its lines that communicate or call others; and the entry's name."""
    bodies: dict[str, list[str]] = {}
    current, entry = "", ""
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            if match := _COMPUTATION.match(line):
                current = match[1]
                bodies[current] = []
                entry = current if line.startswith("ENTRY") else entry
        elif current and ("=%" in line or "computation" in line or _COLLECTIVE.search(line)):
            bodies[current].append(line)
    return bodies, entry


def _collective(match: re.Match, line: str, computation: str) -> tuple[str, int]:
    """Kind and bytes of one collective."""
    result, kind, start = match[1], match[2], match[3]
    sizes = [_bytes(*tensor) for tensor in _TENSOR.findall(result)]
    if start and kind == "all-gather":
        sizes = sizes[len(sizes) // 2 :]  # (operands, results)
    elif start and kind == "collective-permute":
        sizes = sizes[:1]  # (operand, result, synchronisation flags)
    size = sum(sizes)
    if kind == "reduce-scatter":
        size *= _group_size(line)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return kind, size


def _bytes(dtype: str, dimensions: str) -> int:
    bits = _BITS.get(dtype)
    if bits is None:
        bits = int(re.search(r"\d+", dtype)[0]) if re.search(r"\d+", dtype) else 0
    return math.ceil(math.prod(map(int, filter(None, dimensions.split(",")))) * bits / 8)


def _group_size(line: str) -> int:
    match = _GROUPS.search(line)
    if match is None:
        return 1
    return int(match[3]) if match[3] else len(match[1].split(","))


def hbm_of_compiled(stats: Any) -> dict[str, int]:
    """Bytes on one chip from `compiled.memory_analysis()`: the step's arguments (state and batch), temporaries, peak.

    The outputs take over the memory of the donated state. Padding by the chip's tiling is included.
    """
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes
    return {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "peak": total,
    }


def hbm_of_failure(message: str) -> dict[str, int] | None:
    """The same from the compiler's out-of-memory message, which only names the peak; None for another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in _NEEDED:
        if match := pattern.search(message):
            scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
            return {"peak": int(float(match[1]) * scale[match[2].upper()])}
    return {}


def table(report: dict[str, Any]) -> str:
    """The report of `aot_compile.preflight` for a terminal."""
    memory, times = report["hbm"], report["expected"]
    rows = [
        ("slice", f"{report['topology']}, {report['chips']} chips, mesh " + _pairs(report["mesh"])),
        ("model", f"{report['variant']} at {report['res']} px, {report['parameters'] / 1e6:.1f} M parameters"),
        ("compute", f"{report['dtype']}, remat={report['remat']}, micro-batch {report['micro_batch'] or 'none'}"),
        ("batch", f"{report['batch']}, {report['batch_per_chip']} a chip"),
        ("HBM", f"{_gib(memory['capacity'])} a chip"),
        ("  arguments", _gib(memory.get("arguments"))),
        ("  temporaries", _gib(memory.get("temporaries"))),
        ("  peak", _gib(memory.get("peak")) + (f" ({memory['share']:.1%})" if memory.get("share") else "")),
        ("model FLOPs", f"{report['model_flops']:.4g} a step, {report['model_flops'] / report['chips']:.4g} a chip"),
    ]
    for kind, total in report["collectives"].items():
        rows.append((f"  {kind}", f"{total['count']} a step, {_gib(total['bytes'])} a chip"))
    rows += [
        (
            f"at {times['mfu']:.0%} MFU",
            f"{times['step_seconds']:.3f} s a step, {times['examples_per_second_per_chip']:.1f} examples/s/chip",
        ),
        ("compiled", f"in {report['compile_seconds']:.0f} s by {report['compiler']}"),
        ("verdict", "fits" if report["fits"] else "DOES NOT FIT"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _pairs(mapping: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in mapping.items())


def _gib(value: float | None) -> str:
    return "unknown" if value is None else f"{value / 2**30:.2f} GiB"
