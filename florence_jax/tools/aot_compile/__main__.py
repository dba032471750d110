"""Compiles the real training step for a TPU slice, without a TPU, and says what it needs.

    python -m florence_jax.tools.aot_compile --config=configs/pretrain.py:variant=H --topology=v5p:4x8x8 \
        --config.batch_size=24576 --config.precision=bfloat16 --config.mesh.fsdp=64
    python -m florence_jax.tools.aot_compile --config=... --topology=v5e:16x16 --search
    python -m florence_jax.tools.aot_compile --config=... --topology=v5e:16x16 --slices=2
    python -m florence_jax.tools.aot_compile --config=... --topology=v5p:4x8x8 --shardings=FILE
    python -m florence_jax.tools.aot_compile --config=configs/classify.py:protocol=finetune_unicl,res=512 \
        --config.init= --config.model.variant=H --config.data.train= --config.total_steps=1560 --topology=v5p:4x8x8

Takes the configuration, with its --config.x= options, that would be trained. A table goes to stderr and one JSON line
to stdout; the exit code is 0 where the step fits, 1 where it does not. The compiler is the one a TPU would use: it
fails where the chip's memory would not be enough. It needs libtpu (pip install '.[aot]').

Any configuration that trains is compiled, for every shape of its batches (--bucket=N: for one of them). Neither weights
nor data are needed: where a configuration starts from weights, --config.init= --config.model.variant=NAME; where it
counts epochs, --config.data.train= --config.total_steps=N (with data, a batch is at most as large as they are).

The FLOPs come from the model (the compiler's own count takes the body of a scan once). The step's time is the sum of
the cycles that the compiler reckons for each op, an estimate and no measurement, see `estimate.py`. The ten most
expensive places are named.

--search tries activation checkpointing policies from the lightest on, first without the gradient cache, then with the
largest micro-batch that fits, and stops at the first that does. --shardings writes {path: partition of each axis} of
the parameters as JSON and compiles nothing; it does not need libtpu.
"""

import atexit
import copy
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from florence_jax.command_line import CONFIG, enter_with_flags, fail, no_more_arguments
from florence_jax.errors import UserError
from florence_jax.files import write_text
from florence_jax.models.sizes import resolve_config
from florence_jax.params.rules import path_string
from florence_jax.params.sharding import BATCH_AXES, batch_sharding, mesh_sizes, param_shardings
from florence_jax.tasks import create_task
from florence_jax.tasks.base import Task
from florence_jax.tools.aot_compile import report, topologies
from florence_jax.tools.aot_compile.estimate import estimate, kernels_of
from florence_jax.tools.aot_compile.schedules import kernel_lengths
from florence_jax.tools.aot_compile.topologies import Topology
from florence_jax.train.loop import Trainer, variants

_TOPOLOGY = flags.DEFINE_string("topology", None, "Slice to compile for: KIND:SHAPE in chips, for example v5p:4x8x8.")
_SLICES = flags.DEFINE_integer("slices", 1, "How many such slices, joined by the data centre's network.")
_SEARCH = flags.DEFINE_bool("search", False, "Find the lightest remat policy and the largest micro-batch that fit.")
_BUCKET = flags.DEFINE_integer("bucket", None, "Compile for this shape of the batch only; default: for each.")
_SHARDINGS = flags.DEFINE_string("shardings", None, "Only write the parameters' partition as JSON to this file.")
# By what they compute twice: nothing; the attention core; all but linear layers and attention; everything.
LIGHTEST_FIRST = ("none", "attention", "dots", "block")


def main(argv: Sequence[str]) -> None:
    """Runs the command; exits with 0, with 1 where the step does not fit, with 2 for a user's mistake."""
    no_more_arguments(argv)
    # Here libtpu only compiles; without this JAX would look for a TPU.
    jax.config.update("jax_platforms", "cpu")
    config = CONFIG.value
    try:
        if _TOPOLOGY.value is None:
            raise UserError("--topology is missing; for example --topology=v5p:4x8x8")
        topology = topologies.find(_TOPOLOGY.value, _SLICES.value)
        if _SHARDINGS.value:
            write_shardings(config, topology.chips, Path(_SHARDINGS.value))
            return
        compile_all = functools.partial(preflight, bucket=_BUCKET.value)
        measure = functools.partial(lightest_that_fits, measure=compile_all) if _SEARCH.value else compile_all
        result = measure(config, topology)
    except UserError as error:
        fail(error)
    except OSError as error:
        fail(UserError(f"{error}; choose a writable --shardings file"))
    print(report.report_table(result), file=sys.stderr, flush=True)
    print(json.dumps(result), flush=True)
    sys.exit(0 if result["fits"] else 1)


def preflight(
    config: ConfigDict, topology: Topology, devices: list[Any] | None = None, bucket: int | None = None
) -> dict[str, Any]:
    """Compiles the training step of `config` for `topology` and reports.

    Args:
      config: of the run.
      topology: slice; gives the chip's memory, peak and clock.
      devices: to compile for; default: the slice's, from libtpu.
      bucket: the one shape of the batch to compile for; default: each.

    Returns:
      {"topology", "slices", "chips", "mesh", "task", "variant", "dtype", "remat", "micro_batch" (0: no gradient cache),
      "batch", "batch_per_chip", "parameters", "fits", "buckets" (see `compile_bucket`), "hbm", "collectives" (of the
      bucket that needs most), "model_flops" (of a step, all chips), "estimate" (of that bucket, see `of_peak`),
      "compile_seconds", "compiler"}.

    Raises:
      UserError: for what the configuration gets wrong, a missing compiler included.
    """
    devices = topologies.devices(topology, schedules_folder()) if devices is None else devices
    task = task_of(config)
    chosen = range(len(task.batches)) if bucket is None else [bucket]
    if bucket is not None and not 0 <= bucket < len(task.batches):
        raise UserError(f"--bucket={bucket}: batches have {len(task.batches)} shapes, numbered from 0")
    trainer = Trainer(config, task, Path(config.workdir), devices)
    step = trainer.make_step()
    buckets = [compile_bucket(trainer, step, number, topology) for number in chosen]
    worst = max(buckets, key=lambda found: (not found["fits"], found["hbm"].get("peak", 0)))
    flops = task.flops_per_example * task.plan.batch_size
    return describe_program(trainer, topology) | {
        "fits": worst["fits"],
        "buckets": buckets,
        "hbm": worst["hbm"],
        "model_flops": flops,
        "collectives": worst["collectives"],
        "estimate": worst["estimate"] and of_peak(worst["estimate"], flops, task.plan.batch_size, topology),
        "compile_seconds": round(sum(found["compile_seconds"] for found in buckets), 1),
        "compiler": f"libtpu {_version('libtpu')}, jax {jax.__version__}",
    }


@functools.cache
def schedules_folder() -> Path:
    """A folder of this process for `topologies.devices`; removed at its end."""
    folder = tempfile.TemporaryDirectory(prefix="florence_jax_schedules_")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def of_peak(found: dict[str, Any], flops: float, batch: int, topology: Topology) -> dict[str, Any]:
    """`estimate.estimate` with "share_of_peak", of the model's FLOPs of a step, and "examples_per_second_per_chip"."""
    chip_seconds = found["seconds"] * topology.chips
    share, rate = flops / (chip_seconds * topology.chip.peak_flops), batch / chip_seconds
    return found | {"share_of_peak": share, "examples_per_second_per_chip": rate}


def task_of(config: ConfigDict) -> Task:
    """The task of `config`; what it lacks of weights is said with the way around it."""
    try:
        return create_task(config)
    except UserError as error:
        if not config.init:
            raise
        way = "a preflight needs no weights: --config.init= --config.model.variant=NAME"
        raise UserError(f"{error} ({way})") from error


def describe_program(trainer: Trainer, topology: Topology) -> dict[str, Any]:
    """What was compiled."""
    config, task = trainer.config, trainer.task
    cache = config.get("grad_cache") or {}
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "mesh": dict(trainer.mesh.shape),
        "task": task.name,
        "variant": variants(task),
        "dtype": config.precision,
        "remat": towers_of(task)["overrides"].get("remat", "none"),
        "micro_batch": cache.get("micro_batch", 0),
        "batch": task.plan.batch_size,
        "batch_per_chip": task.plan.batch_size // topology.chips,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trainer.target["params"])),
    }


def towers_of(task: Task) -> dict[str, Any]:
    """The towers' part of a model's description."""
    return task.description["parts"]["towers"]


def compile_bucket(trainer: Trainer, step: Any, bucket: int, topology: Topology) -> dict[str, Any]:
    """Compiles the trainer's step for its devices and one shape of the batch; nothing is allocated on them.

    Returns:
      {"bucket", "inputs" ({name: shape of one example}), "fits", "hbm": {"capacity", "arguments", "temporaries", "peak"
      (bytes a chip), "share" (peak over capacity)}, "collectives" (see `report.collectives`), "estimate" (see
      `estimate.estimate`), "compile_seconds"}. Where the step does not fit, "hbm" has only what the compiler says,
      "collectives" nothing, and "estimate" is None.
    """
    began = time.perf_counter()
    sharding, shapes = batch_sharding(trainer.mesh), trainer.task.batches[bucket]
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) for name, leaf in shapes.items()}
    hbm, program = compile_step(trainer, step, batch)
    hbm["capacity"] = topology.chip.hbm
    if "peak" in hbm:
        hbm["share"] = hbm["peak"] / hbm["capacity"]
    lengths = kernel_lengths(schedules_folder(), kernels_of(program or ""))
    return {
        "bucket": bucket,
        "inputs": {name: list(leaf.shape[1:]) for name, leaf in shapes.items()},
        "fits": program is not None and hbm["share"] <= 1,
        "hbm": hbm,
        "collectives": {} if program is None else report.collectives(program),
        "estimate": program and estimate(program, topology.chip.clock, lengths),
        "compile_seconds": round(time.perf_counter() - began, 1),
    }


def compile_step(
    trainer: Trainer, step: Any, batch: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, Any], str | None]:
    """(bytes of memory on a device, optimised program) of the step; the latter None where the memory is not enough."""
    for file in schedules_folder().iterdir():
        file.unlink()
    with jax.set_mesh(trainer.mesh):  # Pallas kernels ask the mesh in context which chip they are compiled for
        lowered = step.lower(trainer.target, batch)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = report.hbm_of_failure(str(error))
            if needed is None:
                raise
            return needed, None
    return report.hbm_of_compiled(compiled.memory_analysis()), compiled.as_text()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def lightest_that_fits(
    config: ConfigDict,
    topology: Topology,
    measure: Callable[..., dict[str, Any]] = preflight,
) -> dict[str, Any]:
    """The preflight report of the lightest settings that fit; see the module's docstring.

    Without the gradient cache everything is computed 1 to 4/3 times (by policy); with it the encoders run forward once
    more, which costs as much as the heaviest policy. So it is tried last. Memory is taken to grow with the
    micro-batch: the largest that fits is found by bisection.

    Args:
      config, topology: as for `preflight`; the configuration's own remat and micro-batch are overridden.
      measure: `preflight`, or a stand-in with its arguments.

    Returns:
      The report, with "tried": [{"remat", "micro_batch", "fits", "peak"}, ...] added; of the heaviest settings where
      nothing fits.
    """
    tried: list[dict[str, Any]] = []

    def attempt(remat: str, micro_batch: int) -> dict[str, Any]:
        changed = copy.deepcopy(config)
        changed.model.overrides.remat = remat
        if "grad_cache" in changed:
            changed.grad_cache.micro_batch = micro_batch
        found = measure(changed, topology)
        short = {"remat": remat, "micro_batch": micro_batch, "fits": found["fits"], "peak": found["hbm"].get("peak")}
        tried.append(short)
        print(json.dumps(short), file=sys.stderr, flush=True)
        return found | {"tried": tried}

    policies = remat_policies(config)
    for remat in policies:
        if (found := attempt(remat, 0))["fits"]:
            return found
    local = found["batch_per_chip"]
    sizes = [size for size in range(1, local) if local % size == 0] if "grad_cache" in config else []
    for remat in policies:
        if best := largest_that_fits(sizes, lambda size, remat=remat: attempt(remat, size)):
            return best
    return found | {"tried": tried}


def largest_that_fits(sizes: list[int], attempt: Callable[[int], dict[str, Any]]) -> dict[str, Any] | None:
    """The report of the largest of the ascending `sizes` for which `attempt` says "fits", by bisection; or None."""
    if not sizes or not (best := attempt(sizes[0]))["fits"]:
        return None
    low, high = 0, len(sizes)  # sizes[low] fits, sizes[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        if (found := attempt(sizes[middle]))["fits"]:
            low, best = middle, found
        else:
            high = middle
    return best


def remat_policies(config: ConfigDict) -> list[str]:
    """Those of `LIGHTEST_FIRST` that the model of `config` knows."""
    policies = []
    towers = towers_of(task_of(config))
    for remat in LIGHTEST_FIRST:
        try:
            resolve_config(towers["variant"], **{**towers["overrides"], "remat": remat})
        except UserError:
            continue
        policies.append(remat)
    return policies


def shardings(config: ConfigDict, chips: int) -> dict[str, Any]:
    """How the parameters of `config` are split over `chips` devices.

    Returns:
      {"mesh": {axis: size}, "params": {path: [mesh axis or None for each axis of the tensor]}}.
    """
    sizes = mesh_sizes(config.mesh.data, config.mesh.fsdp, chips)
    task = task_of(config)
    params = jax.eval_shape(task.init, jax.random.key(0))
    mesh = AbstractMesh(sizes, BATCH_AXES)
    placed = param_shardings(params, mesh, config.mesh.sharding_rules, task.policy.sharding)
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(placed), strict=True)
    return {
        "mesh": dict(zip(BATCH_AXES, sizes, strict=True)),
        "params": {
            path_string(path): list(place.spec) + [None] * (leaf.ndim - len(place.spec))
            for (path, leaf), place in leaves
        },
    }


def write_shardings(config: ConfigDict, chips: int, file: Path) -> None:
    """Writes `shardings` as JSON, a parameter a line."""
    result = shardings(config, chips)
    lines = ",\n".join(f"  {json.dumps(path)}: {json.dumps(spec)}" for path, spec in result["params"].items())
    write_text(file, f'{{\n "mesh": {json.dumps(result["mesh"])},\n "params": {{\n{lines}\n }}\n}}\n')


if __name__ == "__main__":
    enter_with_flags(main)
