"""The mesh of devices, and the places on it of trees of arrays."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from arcond_jax.placement import AXES, BATCH, num_batch_shards, spec


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over the devices, neighbours in it neighbours in their network.

    Slices of TPUs, which a slower network connects, are cut by `data` alone.

    Args:
      data: None takes all that the other axes leave.
      devices: None for all there are.

    Raises:
      ValueError: the axes do not multiply to the number of devices, or one is below 1.
    """
    devices = jax.devices() if devices is None else devices
    for name, size in (("data", data), ("fsdp", fsdp), ("tensor", tensor)):
        if size is not None and size < 1:
            raise ValueError(f"mesh.{name} {size} must be at least 1")
    if data is None:
        data = max(1, len(devices) // (fsdp * tensor))
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"mesh data {data} x fsdp {fsdp} x tensor {tensor} needs {data * fsdp * tensor} "
            f"devices, but there are {len(devices)}: change the mesh section of the config"
        )
    grid = _grid(devices, data, fsdp, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(devices: Sequence[Any], data: int, fsdp: int, tensor: int) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(data, fsdp, tensor)
    if data % slices:
        raise ValueError(
            f"mesh.data {data} is not divisible by the {slices} slices: fsdp {fsdp} x tensor "
            f"{tensor} devices must lie in one of them"
        )
    inside = (data // slices, fsdp, tensor)
    if slices > 1:
        return mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings for an abstract tree whose leaves may be boxed with logical axis names."""

    def place(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.Partitioned):
            return replicated(mesh)
        return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, mesh))

    return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, meta.AxisMetadata))


def shapes_in(tree: Any, place: NamedSharding) -> Any:
    """Shapes of a tree whose arrays all lie in one place, to restore into or to compile for."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def spread_over(mesh: Mesh, num_rows: int) -> int:
    """The batch size next to `num_rows`, not below it, that can be cut into the pieces."""
    shards = num_batch_shards(mesh)
    return -(-num_rows // shards) * shards
