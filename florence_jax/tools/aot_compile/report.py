"""What a compiled training step says about itself: collectives in its HLO, memory, and the table made of them."""

import math
import re
from typing import Any

from florence_jax.tools.aot_compile.hlo import Program

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ACROSS = "across slices: "  # prefix of the kinds that the TPU compiler hands to the network between slices
_BITS = {"pred": 8, "bf16": 16, "token": 0}
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(COLLECTIVES)})(-start)?\(")
_TENSOR = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_TRANSFER = re.compile(r'= \((\w+)\[([\d,]*)\].*? send\(.*_xla_megascale_transfer_type="(\w+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_FUSION = re.compile(r"async_collective_fusion|fused_computation")
# {{0,1},{2,3}}, or [groups,size]<=[devices], or mesh['a'=2,'b'=4] {'b'}
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[(.*?)\] \{(.*?)\})")
_SIZE = r"([\d.]+)([KMGT]?)"
_NEEDED = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm", re.IGNORECASE),
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", re.IGNORECASE),
)


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Communication of one execution of a compiled program, by kind.

    A collective inside a loop counts once per iteration, see `Program.called`. The TPU compiler spreads one
    asynchronous collective over several fusions with the same channel: those count as one (outside of fusions a channel
    may be used again). It writes a reduce-scatter as a fusion called all-reduce-scatter around an all-reduce: that
    counts as reduce-scatter. Over several slices it splits a collective into one inside each slice and one across them,
    which it leaves to the host's network as a pair of send and receive.

    Args:
      hlo: text of the optimised module (`compiled.as_text()`).

    Returns:
      kind -> {"count": executions, "bytes": of the whole tensors, on one device: gathered, to be reduced, or
      exchanged}. A ring sends about that much per device (twice that for an all-reduce). Only kinds that occur:
      those of `COLLECTIVES`; with the prefix `ACROSS` and the bytes that a device sends, those across slices.
    """
    program = Program(hlo)
    found: dict[tuple[str, str], tuple[int, int]] = {}  # (kind, which) -> (executions, bytes)

    def visit(name: str, times: int) -> None:
        for line in program.lines.get(name, ()):
            if match := _COLLECTIVE.search(line):
                kind, size = _collective(match, line, name)
                channel = _CHANNEL.search(line) if _FUSION.match(name) else None
                key = (kind, f"{channel[1]} {_TENSOR.findall(match[1])}" if channel else line)
                found[key] = max(found.get(key, (0, 0)), (times, size))
            if match := _TRANSFER.search(line):
                kind = ACROSS + match[3].lower().replace("_", "-")
                found[kind, line] = times, _bytes(match[1], match[2])
            for other, trips in program.called(line):
                visit(other, times * trips)

    visit(program.entry, 1)
    kinds = dict.fromkeys(kind for kind, _ in found)
    return {
        kind: {
            "count": sum(times for (other, _), (times, _) in found.items() if other == kind),
            "bytes": sum(times * size for (other, _), (times, size) in found.items() if other == kind),
        }
        for kind in [*COLLECTIVES, *sorted(kind for kind in kinds if kind.startswith(ACROSS))]
        if kind in kinds
    }


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
    devices, size, mesh, axes = match.groups()
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", axes))
    return int(size) if size else len(devices.split(","))


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


def report_table(report: dict[str, Any]) -> str:
    """The report of `aot_compile.preflight` for a terminal."""
    memory = report["hbm"]
    slices = f"{report['slices']} slices of " if report["slices"] > 1 else ""
    rows = [
        ("slice", f"{slices}{report['topology']}, {report['chips']} chips, mesh " + _pairs(report["mesh"])),
        ("model", f"{report['task']} {report['variant']}, {report['parameters'] / 1e6:.1f} M parameters"),
        ("compute", f"{report['dtype']}, remat={report['remat']}, micro-batch {report['micro_batch'] or 'none'}"),
        ("batch", f"{report['batch']}, {report['batch_per_chip']} a chip"),
        *((f"  bucket {found['bucket']}", _bucket(found)) for found in report["buckets"]),
        ("HBM", f"{_gib(memory['capacity'])} a chip"),
        ("  arguments", _gib(memory.get("arguments"))),
        ("  temporaries", _gib(memory.get("temporaries"))),
        ("  peak", _gib(memory.get("peak")) + (f" ({memory['share']:.1%})" if memory.get("share") else "")),
        ("model FLOPs", f"{report['model_flops']:.4g} a step, {report['model_flops'] / report['chips']:.4g} a chip"),
    ]
    for kind, total in report["collectives"].items():
        rows.append((f"  {kind}", f"{total['count']} a step, {_gib(total['bytes'])} a chip"))
    rows += [
        *_estimate(report["estimate"]),
        ("compiled", f"in {report['compile_seconds']:.0f} s by {report['compiler']}"),
        ("verdict", "fits" if report["fits"] else "DOES NOT FIT"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _bucket(found: dict[str, Any]) -> str:
    """A line about one shape of the batch."""
    inputs = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found["inputs"].items() if shape)
    return f"{inputs}: {_gib(found['hbm'].get('peak'))}, {'fits' if found['fits'] else 'DOES NOT FIT'}"


def _estimate(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The estimated time of a step and its most expensive places."""
    if found is None:
        return [("estimate", "none: only the TPU compiler gives cycles, and only for what fits")]
    rate = f"{found['examples_per_second_per_chip']:.1f} examples/s/chip"
    rows = [
        ("estimate", f"{found['seconds']:.3f} s a step, {found['share_of_peak']:.1%} of peak, {rate}"),
        ("", f"{found['cycles']:.4g} cycles, by the compiler for each op alone, at {found['clock'] / 1e9:.2f} GHz"),
    ]
    if found["unknown_kernels"]:
        rows.append(("", f"NOT in it: {found['unknown_kernels']} kernels a step of unknown trips or schedule"))
    for place in found["places"]:
        rows.append((f"  {place['seconds'] * 1e3:8.2f} ms", f"{place['share']:6.1%}  {place['place']}"))
    return rows


def _pairs(mapping: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in mapping.items())


def _gib(value: float | None) -> str:
    return "unknown" if value is None else f"{value / 2**30:.2f} GiB"
