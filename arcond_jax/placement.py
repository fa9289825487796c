"""Where every axis of every array lies: logical names, and the one table of their mesh axes.

Mesh axes: `data` (whole copies), `fsdp` (parameters cut, batch cut), `tensor` (heads, MLP width
and vocabulary cut). Arrays name their axes logically where they are made; RULES maps the names.

What is said of placement inside a model is said here, and says nothing outside `jax.set_mesh`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, DTypeLike, Shaped

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)  # what cuts a batch

RULES = {
    "batch": BATCH,
    "embed": FSDP,
    "mlp": TENSOR,
    "heads": TENSOR,
    "vocab": TENSOR,
    "layers": None,
}


def spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Where an array with these axes lies; an axis that does not divide stays whole.

    Raises:
      KeyError: A name that RULES does not have.
    """
    kept = []
    for name, size in zip(names, shape, strict=True):
        cut = None if name is None else RULES[name]
        group = (cut,) if isinstance(cut, str) else cut or ()
        count = math.prod(mesh.shape[axis] for axis in group)
        kept.append(cut if count > 1 and size % count == 0 else None)
    return PartitionSpec(*kept)


def platform() -> str | None:
    """What the program that is being traced is for, "cpu", "gpu" or "tpu"; None if for all of them.

    The mesh says it, also where the program is compiled on a machine of another platform. A mesh
    without devices stands for all, and outside a mesh a program runs where jax does.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend()
    return None if mesh.abstract_device is None else mesh.abstract_device.platform


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Pieces that a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def num_pieces(num_rows: Any) -> int:
    """Pieces into which the compiler cuts so many rows of a batch; 1 if they do not divide.

    In the mesh that is being traced for, whatever its axes. `num_rows` is a size of a shape: where
    it is symbolic, the rows are one piece.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    cuts = [axis for axis in BATCH if kinds.get(axis) is AxisType.Auto]
    count = math.prod(mesh.shape[axis] for axis in cuts)
    return count if isinstance(num_rows, int) and num_rows % count == 0 else 1


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps the first axis on the mesh axes that cut a batch, and the others whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(BATCH) & set(mesh.manual_axes):  # there the batch is a device's own
        return x
    place = spec(("batch",) + (None,) * (x.ndim - 1), x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, place)


def gathered(
    weight: jax.Array,
    names: Sequence[str | None],
    dtype: DTypeLike,
    *,
    looked_up: bool = False,
) -> jax.Array:
    """A weight as it is multiplied with: whole along the axes that cut the batch.

    Its gradient is brought back to where the weight is stored, so that both ways a device moves no
    more than the weights: a gather in the forward pass, one more where a block is computed again,
    a reduction that scatters. Without it the compiler may choose to move activations instead.

    Args:
      names: Its logical axes.
      dtype: What it is used in, and so what is moved; a weight that stays where it is keeps its
        own.
      looked_up: Whether it is a table of rows and no factor. The gradient of a row is a sum of rows
        of the batch, which would be moved to where it is stored; so it is summed whole first.

    Source: Rajbhandari et al. (2020), "ZeRO", stage 3.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return weight
    stored = spec(names, weight.shape, mesh)
    used = PartitionSpec(*(None if axis in BATCH else axis for axis in stored))
    if used == stored:
        return weight

    @jax.custom_vjp
    def gather(weight: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(weight, used)

    def scatter(_: Any, gradient: jax.Array) -> tuple[jax.Array]:
        if looked_up:
            gradient = jax.lax.with_sharding_constraint(gradient, used)
        return (jax.lax.with_sharding_constraint(gradient, stored),)

    gather.defvjp(lambda weight: (gather(weight), None), scatter)
    return gather(weight.astype(dtype))


def sum_over_shards(
    local: Callable[..., jax.Array], weights: Any, *rows: Shaped[Array, "b ..."]
) -> jax.Array:
    """`local(weights, *rows)` of what each device has of the rows, summed over what cuts a batch.

    The gradient of the weights is added up on each device, and then summed over devices, once; both
    in float32. A compiler sums it where it is made: in a loop at every step.

    Args:
      weights: A tree of arrays. Those that are read should be whole along what cuts the batch, as
        they come from `gathered`; others are gathered here as they are stored.
    """
    weights = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    if num_pieces(rows[0].shape[0]) == 1:
        return local(weights, *rows)
    place = PartitionSpec(BATCH)
    sums = jax.shard_map(
        lambda *args: local(*args)[None],
        in_specs=(PartitionSpec(), *[place] * len(rows)),
        out_specs=place,
        axis_names=set(BATCH),
        check_vma=False,
    )(weights, *rows)
    return jnp.sum(sums, axis=0)
