"""The device mesh and where every array lives on it.

Axes: `data` replicates parameters, `fsdp` shards them (ZeRO-3: parameters, gradients and optimizer state); the batch
is split over both. Axis types are Auto: XLA's partitioner places the collectives.

Where the devices lie in several slices (TPU slices, or what JAX reports as such elsewhere), joined by a network far
slower than the links inside one, `data` runs across the slices and `fsdp` inside each: parameters are gathered over
the fast links only, and once a step the gradients' shards cross the slow network.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from florence_jax.errors import UserError
from florence_jax.params.rules import Rules, match_rules, path_string

BATCH_AXES = ("data", "fsdp")
# A rule's value names the axis of the tensor to split over `fsdp` (negative counts from the end); or 'replicate'; or
# 'largest': the last axis if fsdp divides it, else the largest axis that it divides, else whole on every device if the
# tensor has less than `SMALL` bytes. Matrices and convolutions so split their output channels, and heads of 1, 27 or
# 3,129 outputs their input channels; what is known to be small stays whole.
SHARDING_RULES: Rules[int | str] = (
    (r"(.*/)?(bias|scale|relative_position_bias_table|position_embedding|class_embedding)", "replicate"),
    (r"logit_(scale|bias)", "replicate"),
    (r".*/token_embedding", 0),
    (r".*", "largest"),
)
SMALL = 2**20


def mesh_sizes(data: int, fsdp: int, count: int) -> tuple[int, int]:
    """The sizes (data, fsdp) of a mesh over `count` devices. One of the two given may be -1: what is left.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp]
    if sizes.count(-1) == 1:
        known = max(1, -int(np.prod(sizes)))
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or sizes[0] * sizes[1] != count:
        raise UserError(
            f"mesh data={data}, fsdp={fsdp} does not use the {count} devices; choose sizes with that product"
        )
    return sizes[0], sizes[1]


def group_by_slice(devices: list[Any]) -> list[list[Any]]:
    """The devices of each slice, in the slices' order; one group where they do not say."""
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    return [groups[index] for index in sorted(groups)]


def split_over_slices(data: int, fsdp: int, slices: int, fsdp_across_slices: bool) -> tuple[int, int]:
    """The parts (of `data`, of `fsdp`) that run across slices: their product is `slices`, each divides its axis.

    `data` takes as many as it can.

    Raises:
      UserError: if `data` cannot take them all and `fsdp` must not or cannot take the rest.
    """
    outer = math.gcd(data, slices)
    rest = slices // outer
    if rest > 1 and (not fsdp_across_slices or fsdp % rest):
        raise UserError(
            f"mesh data={data}, fsdp={fsdp} does not lie across the {slices} slices: data must be a multiple of "
            f"{slices}, which keeps fsdp inside a slice; or set config.mesh.fsdp_across_slices=True, at the price of "
            "gathering parameters over the network between slices, with an fsdp that divides"
        )
    return outer, rest


def make_mesh(data: int, fsdp: int, devices: list[Any] | None = None, *, fsdp_across_slices: bool = False) -> Mesh:
    """A (`data`, `fsdp`) mesh over `devices` (default: all); sizes as in `mesh_sizes`.

    Over several slices `data` runs across them and `fsdp` inside; with `fsdp_across_slices`, `fsdp` too may run across
    those that `data` cannot take.

    Raises:
      UserError: as `mesh_sizes` and `split_over_slices`, or if the sizes are not products of sides of the TPU slice.
    """
    devices = jax.devices() if devices is None else devices
    sizes, types = mesh_sizes(data, fsdp, len(devices)), (AxisType.Auto, AxisType.Auto)
    slices = group_by_slice(devices)
    outer = split_over_slices(*sizes, len(slices), fsdp_across_slices)
    inner = (sizes[0] // outer[0], sizes[1] // outer[1])
    try:
        meshes = [jax.make_mesh(inner, BATCH_AXES, axis_types=types, devices=group) for group in slices]
    except NotImplementedError as error:
        sides = "x".join(str(1 + max(device.coords[i] for device in devices)) for i in range(3))
        raise UserError(
            f"mesh data={inner[0]}, fsdp={inner[1]} does not lie along the sides of the {sides} slice: each size must "
            "be a product of some of the sides"
        ) from error
    # As mesh_utils.create_hybrid_device_mesh does it; jax.make_mesh knows what each kind of chip can be split into.
    grid = np.stack([mesh.devices for mesh in meshes]).reshape(*outer, *inner).transpose(0, 2, 1, 3).reshape(sizes)
    return Mesh(grid, BATCH_AXES, axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over all devices, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def ambient_batch_axes() -> tuple[str, ...]:
    """Batch axes of the mesh in context that have several devices; () without a mesh, or on one device.

    `train.step` sets the mesh while it traces the loss, so that a loss needs no mesh among its arguments.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in BATCH_AXES if shape.get(axis, 1) > 1)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def whole_like(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The whole array on every device of the mesh of another array; that of one device is left."""
    return replicated(sharding.mesh) if isinstance(sharding, NamedSharding) else sharding


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every host has in whole, on the devices of all hosts."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def param_shardings(
    params: Any, mesh: Mesh | AbstractMesh, rules: Rules[int | str] = (), policy: Rules[int | str] = ()
) -> Any:
    """A `NamedSharding` for every leaf of `params` (arrays or shapes) by the path rules.

    Args:
      params: the parameters, or their shapes.
      mesh: device mesh, or its shape alone.
      rules: of the run's configuration (`mesh.sharding_rules`), asked first; values as in `SHARDING_RULES`.
      policy: of the task, asked next, before `SHARDING_RULES`.

    Raises:
      UserError: listing every tensor that cannot be split as its rule says: never a silent replica. Also for rules of
        another form, or those of the configuration that decide nothing.
    """
    fsdp = mesh.shape["fsdp"]
    axes = match_rules(rules, params, what="sharding", defaults=(*policy, *SHARDING_RULES))
    offenders = []

    def place(path: Any, leaf: Any, rule: int | str) -> NamedSharding:
        axis = _axis(leaf, rule, fsdp)
        if axis is None:
            asked = rule if isinstance(rule, str) else f"axis {rule}"
            offenders.append(f"{path_string(path)} {tuple(leaf.shape)} {asked}")
        if not isinstance(axis, int) or fsdp == 1:
            return replicated(mesh)
        spec: list[str | None] = [None] * leaf.ndim
        spec[axis] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    tree = jax.tree_util.tree_map_with_path(place, params, axes)
    if offenders:
        raise UserError(
            f"not divisible by mesh.fsdp={fsdp}: {'; '.join(offenders)}; choose a smaller fsdp, or another axis or "
            "'replicate' for them with --config.mesh.sharding_rules=\"(('PATTERN', AXIS),)\""
        )
    return tree


def params_like(
    shapes: Any, mesh: Mesh | AbstractMesh, rules: Rules[int | str] = (), policy: Rules[int | str] = ()
) -> Any:
    """`shapes` with the places that `param_shardings` gives them: what `weights.load` reads parameters into.

    Arguments and errors as there.
    """
    return with_places(shapes, param_shardings(shapes, mesh, rules, policy))


def with_places(shapes: Any, shardings: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct` of these shapes, dtypes and shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _axis(leaf: Any, rule: int | str, fsdp: int) -> int | str | None:
    """The axis to split, 'replicate', or None if the rule cannot be followed."""
    if rule == "replicate":
        return "replicate"
    if rule == "largest":
        if not leaf.ndim:
            return "replicate"
        if leaf.shape[-1] % fsdp == 0:
            return leaf.ndim - 1
        if divided := [axis for axis in range(leaf.ndim) if leaf.shape[axis] % fsdp == 0]:
            return max(divided, key=lambda axis: (leaf.shape[axis], axis))
        return "replicate" if math.prod(leaf.shape) * leaf.dtype.itemsize < SMALL else None
    known = isinstance(rule, int) and -leaf.ndim <= rule < leaf.ndim
    return rule if known and leaf.shape[rule] % fsdp == 0 else None


def state_shardings(state: Mapping[str, Any], params_sharding: Any, mesh: Mesh) -> Any:
    """Shardings of a whole train state: an array that belongs to a parameter lies as the parameter does.

    It belongs to the parameter whose path is the end of its own ('opt_state/1/mu/image/norm/scale'), however the
    optimizer wraps its state. Scalars are replicated.

    Args:
      state: the state, or its shapes; its "params" are the parameters.
      params_sharding: of them, see `param_shardings`.
      mesh: device mesh.

    Raises:
      UserError: listing every other array that is of no parameter, or not of its shape: never a silent replica.
    """
    shapes = {_names(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"])}
    places = {_names(path): place for path, place in jax.tree_util.tree_leaves_with_path(params_sharding)}
    offenders = []

    def place(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        owner = next((names[i:] for i in range(len(names)) if names[i:] in shapes), None)
        if owner is not None and shapes[owner] == tuple(leaf.shape):
            return places[owner]
        if leaf.shape:
            of = f", which is not the {shapes[owner]} of {'/'.join(owner)}" if owner else ""
            offenders.append(f"{path_string(path)} {tuple(leaf.shape)}{of}")
        return replicated(mesh)

    tree = jax.tree_util.tree_map_with_path(place, state)
    if offenders:
        raise UserError(f"no parameter says how these arrays of the train state are split: {'; '.join(offenders)}")
    return tree


def _names(path: Any) -> tuple[str, ...]:
    return tuple(path_string((entry,)) for entry in path)
