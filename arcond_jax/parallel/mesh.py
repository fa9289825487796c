"""The mesh, and the one table that says where every axis of every array lives.

Mesh axes: `data` (whole copies), `fsdp` (parameters cut, batch cut), `tensor` (heads, MLP width
and vocabulary cut). Arrays name their axes logically where they are made; RULES maps the names.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.linen.spmd as spmd
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocab", "tensor"),
    ("layers", None),
)


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over the devices; `data` None takes all that the other axes leave.

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
    grid = np.array(devices).reshape(data, fsdp, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fit_spec(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Drops mesh axes that do not divide the array's: small arrays stay whole."""
    kept = []
    for size, names in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        group = (names,) if isinstance(names, str) else tuple(names or ())
        count = int(np.prod([mesh.shape[name] for name in group]))
        kept.append(names if size % count == 0 else None)
    return PartitionSpec(*kept)


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings for an abstract tree whose leaves may be boxed with logical axis names."""
    specs = spmd.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    return jax.tree.map(
        lambda leaf, spec: NamedSharding(mesh, fit_spec(spec, leaf.shape, mesh)),
        nn.unbox(boxed),
        specs,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data and fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def num_batch_shards(mesh: Mesh) -> int:
    """Pieces a batch is cut into; batch sizes must be multiples of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def spread_over(mesh: Mesh, num_rows: int) -> int:
    """The batch size next to `num_rows`, not below it, that can be cut into the pieces."""
    shards = num_batch_shards(mesh)
    return -(-num_rows // shards) * shards
