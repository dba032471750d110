"""Compiles one Swin block, forward and backward, for a TPU chip that need not be there: what attention's forms cost.

    python -m florence_jax.tools.aot_compile.block --topology=v5e:2x2 --examples=48 --side=14 --channels=1024 --window=7

One JSON line: for each form of `--attention` the compiler's estimate in milliseconds (see `estimate.py`), its part that
is kernels, the FLOPs of the products as milliseconds at the chip's peak (`ideal_ms`), bytes of temporaries, and the
most expensive places; of each kernel the bundles of instructions for a window of one example and 128 channels, loops by
their trips, copies included. The block is shifted where its map is larger than the window, in bfloat16, nothing
recomputed, with the gradients of its parameters and of the map. It needs libtpu (pip install '.[aot]').
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from florence_jax.command_line import enter, exit_code
from florence_jax.errors import UserError
from florence_jax.models.window_attention import kernel_sizes
from florence_jax.models.window_sizes_tpu import EXAMPLES
from florence_jax.models.windows import SwinBlock, window_places
from florence_jax.tools.aot_compile import report, topologies
from florence_jax.tools.aot_compile.estimate import estimate, kernels_of
from florence_jax.tools.aot_compile.schedules import kernel_lengths
from florence_jax.tools.aot_compile.topologies import Topology

HEAD_CHANNELS = 32  # channels of a head in all sizes of CoSwin
PLACES_SHOWN = 6  # most expensive places
TPU_FORMS = ("xla", "fused")  # what there is on a TPU


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with these options; the exit code is 2 for a user's mistake."""
    jax.config.update("jax_platforms", "cpu")  # libtpu only compiles
    args = block_options(argv)

    def work() -> None:
        topology = topologies.find(args.topology)
        with tempfile.TemporaryDirectory(prefix="florence_jax_schedules_") as folder:
            device = topologies.devices(topology, Path(folder))[0]
            forms = {form: compile_block(args, form, device, topology, Path(folder)) for form in args.attention}
        print(json.dumps({"ideal_ms": flops(args) / topology.chip.peak_flops * 1e3, **forms}), flush=True)

    return exit_code(work)


def block_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2", help="slice whose chip is compiled for, such as v5p:2x2x1")
    parser.add_argument("--examples", type=int, default=48, help="pictures on the chip")
    parser.add_argument("--side", type=int, default=14, help="of the map, in tokens")
    parser.add_argument("--channels", type=int, default=1024, help="of the map, a multiple of 32")
    parser.add_argument("--window", type=int, default=7, help="side of a window, in tokens")
    parser.add_argument("--attention", default="xla,fused", type=lambda text: text.split(","), help="forms of it")
    args = parser.parse_args(argv)
    if min(args.examples, args.side, args.channels, args.window) < 1 or args.channels % HEAD_CHANNELS:
        parser.error(f"sizes must be positive and --channels a multiple of {HEAD_CHANNELS}")
    if unknown := [form for form in args.attention if form not in TPU_FORMS]:
        parser.error(f"--attention: unknown {', '.join(unknown)}; known are {', '.join(TPU_FORMS)}")
    return args


def flops(args: argparse.Namespace) -> float:
    """Of the block's matrix products, forward and backward."""
    tokens, channels = args.examples * args.side**2, args.channels
    return 3 * 2 * tokens * (12 * channels**2 + 2 * args.window**2 * channels)


def compile_block(
    args: argparse.Namespace, form: str, device: Any, topology: Topology, schedules: Path
) -> dict[str, Any]:
    """The keys of a form, see the module's docstring."""
    for file in schedules.iterdir():
        file.unlink()
    shift = args.window // 2 if args.side > args.window else 0
    block = SwinBlock(
        args.channels // HEAD_CHANNELS, (args.window,) * 2, (shift,) * 2, dtype=jnp.dtype(jnp.bfloat16), form=form
    )
    mesh = Mesh(np.array([device]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((args.examples, args.side, args.side, args.channels), jnp.bfloat16, sharding=sharding)
    shapes = jax.eval_shape(block.init, jax.random.key(0), jnp.zeros((1, *x.shape[1:]), x.dtype))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)

    def loss(params: Any, x: jax.Array, grad: jax.Array) -> jax.Array:
        return (block.apply(params, x).astype(jnp.float32) * grad.astype(jnp.float32)).sum()

    with jax.set_mesh(mesh):  # kernels ask the mesh in context which chip they are compiled for
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, x, x).compile()
        program = compiled.as_text()
        lengths = kernel_lengths(schedules, kernels_of(program))
        places = window_places((args.side,) * 2, (args.window,) * 2, (shift,) * 2)
        sizes = kernel_sizes(x, places, args.channels // HEAD_CHANNELS) if lengths else None
    found = estimate(program, topology.chip.clock, lengths)
    if found is None:
        raise UserError("the compiler gives no estimate; it needs libtpu (pip install '.[aot]')")
    return {
        "ms": found["seconds"] * 1e3,
        "kernels_ms": found["kernel_seconds"] * 1e3,
        "unknown_kernels": found["unknown_kernels"],
        "bundles": {name: length / (EXAMPLES * sizes.groups) for name, length in lengths.items()} if sizes else {},
        "temporaries": report.hbm_of_compiled(compiled.memory_analysis())["temporaries"],
        "places": {place["place"]: place["seconds"] * 1e3 for place in found["places"][:PLACES_SHOWN]},
    }


if __name__ == "__main__":
    enter(main)
