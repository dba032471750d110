"""The device mesh and where every array lives on it.

Axes: `data` replicates parameters, `fsdp` shards them (ZeRO-3: parameters, gradients and optimizer state); the batch
is split over both. Axis types are Auto: XLA's partitioner places the collectives.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from florence_jax.errors import UserError
from florence_jax.train.rules import match_rules, path_string

BATCH_AXES = ("data", "fsdp")

# A rule's value names the axis of the tensor to split over `fsdp` (negative counts from the end), or 'replicate'.
# Matrices and convolutions split their output channels; vectors, tables and the scalar are small and replicated.
SHARDING_RULES = (
    (r".*/kernel", -1),
    (r".*/token_embedding", 0),
    (r".*", "replicate"),
)


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


def make_mesh(data: int, fsdp: int, devices: list[Any] | None = None) -> Mesh:
    """A (`data`, `fsdp`) mesh over `devices` (default: all); sizes as in `mesh_sizes`.

    Raises:
      UserError: as there, or if the sizes are not products of sides of the TPU slice.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, len(devices))
    try:
        return jax.make_mesh(sizes, BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)
    except NotImplementedError as error:
        sides = "x".join(str(1 + max(device.coords[i] for device in devices)) for i in range(3))
        raise UserError(
            f"mesh data={sizes[0]}, fsdp={sizes[1]} does not lie along the sides of the {sides} slice: each size must "
            "be a product of some of the sides"
        ) from error


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over all devices, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def ambient_batch_axes() -> tuple[str, ...]:
    """Batch axes of the mesh in context that have several devices; () without a mesh, or on one device.

    `train.step` sets the mesh while it traces the loss, so that a loss needs no mesh among its arguments.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in BATCH_AXES if shape.get(axis, 1) > 1)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every host has in whole, on the devices of all hosts."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def param_shardings(params: Any, mesh: Mesh, rules: Any = SHARDING_RULES) -> Any:
    """A `NamedSharding` for every leaf of `params` (arrays or shapes) by the path rules.

    Raises:
      UserError: listing every tensor whose named axis does not divide by the `fsdp` size: never a silent replica.
    """
    fsdp = mesh.shape["fsdp"]
    axes = match_rules(rules, params, what="sharding")
    offenders = []

    def place(path: Any, leaf: Any, axis: int | str) -> NamedSharding:
        if axis == "replicate" or fsdp == 1:
            return replicated(mesh)
        if leaf.shape[axis] % fsdp:
            offenders.append(f"{path_string(path)} {tuple(leaf.shape)} axis {axis}")
            return replicated(mesh)
        spec: list[str | None] = [None] * leaf.ndim
        spec[axis] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    tree = jax.tree_util.tree_map_with_path(place, params, axes)
    if offenders:
        raise UserError(
            f"not divisible by mesh.fsdp={fsdp}: {'; '.join(offenders)}; choose a smaller fsdp, another axis "
            "or 'replicate'"
        )
    return tree


def state_shardings(state: Any, params_sharding: Any, mesh: Mesh) -> Any:
    """Shardings of a whole train state: sub-trees shaped like the parameters follow them, the rest replicates."""
    structure = jax.tree.structure(params_sharding)

    def is_params(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    return jax.tree.map(lambda node: params_sharding if is_params(node) else replicated(mesh), state, is_leaf=is_params)
