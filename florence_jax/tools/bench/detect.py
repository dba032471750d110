"""`bench detect`: the detector's parts and steps: time, working memory, and what of it the head and the NMS take.

--parts=conv: the deformable convolution, forward and backward, in each of its forms, beside torchvision's where that is
installed (`pip install torch torchvision`), in turns: under `conv`, for each size of --maps, the keys of
`florence_jax.tools.bench.deform_conv.measure_forms`.
"""

import argparse
from typing import Any

from florence_jax.errors import UserError
from florence_jax.tools.bench import deform_conv, step

DETECT_PARTS = ("conv",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench detect`."""
    parser.add_argument("--parts", default=",".join(DETECT_PARTS), help="what is measured, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the median is reported")
    parser.add_argument(
        "--maps",
        default="2x32x48x64,2x256x12x16,2x256x8x8",
        help="conv: BATCHxCHANNELSxHEIGHTxWIDTH, separated by commas",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures; see the module's docstring for the keys."""
    parts = args.parts.split(",")
    unknown = [part for part in parts if part not in DETECT_PARTS]
    if unknown:
        raise UserError(f"--parts={args.parts}: unknown {', '.join(unknown)}; known are {', '.join(DETECT_PARTS)}")
    if args.rounds < 1:
        raise UserError("--rounds must be positive")
    report: dict[str, Any] = {}
    if "conv" in parts:
        report["conv"] = {
            name: deform_conv.measure_forms(maps, args.rounds) for name, maps in parse_maps(args.maps).items()
        }
    return report | {"rounds": args.rounds} | step.device()


def parse_maps(text: str) -> dict[str, deform_conv.MapSize]:
    """'2x32x48x64,..' -> {"2x32x48x64": MapSize(2, 32, 48, 64), ..}."""
    found = {}
    for name in text.split(","):
        numbers = [int(number) if number.isdecimal() else 0 for number in name.split("x")]
        if len(numbers) != 4 or min(numbers) < 1:
            raise UserError(f"--maps={text}: {name!r} is not BATCHxCHANNELSxHEIGHTxWIDTH, such as 2x32x48x64")
        found[name] = deform_conv.MapSize(*numbers)
    return found
