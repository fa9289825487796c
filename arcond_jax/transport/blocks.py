"""Rows of many groups as a few dense blocks of one group each.

Every row has the map of its own group. Looked up row by row, the maps would be copied a thousand
times per slot; in blocks each copy serves many rows, and the arithmetic is matrix products. The
shapes depend on the sizes alone: b rows of g groups fill at most b // BLOCK_SIZE + g blocks.

The same layout serves mixtures of experts: Gale et al. (2023), "MegaBlocks", section 4.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK_SIZE = 32  # rows; a block's points and costs stay within a core's cache


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Blocks:
    """Where each row goes: `row` holds row numbers, and b where a block is not full."""

    row: Int[Array, "blocks rows"]
    group: Int[Array, " blocks"]


def make(group: Int[Array, " b"], num_groups: int) -> Blocks:
    """Lays the rows of each group into its own blocks; `group` in [0, num_groups)."""
    num_rows = group.shape[0]
    num_blocks = num_rows // BLOCK_SIZE + num_groups
    order = jnp.argsort(group, stable=True)
    counts = jnp.bincount(group, length=num_groups)
    first_row = jnp.cumsum(counts) - counts
    last_block = jnp.cumsum(-(-counts // BLOCK_SIZE))
    first_block = last_block - -(-counts // BLOCK_SIZE)

    sorted_group = group[order]
    rank = jnp.arange(num_rows) - first_row[sorted_group]
    block = first_block[sorted_group] + rank // BLOCK_SIZE
    row = jnp.full((num_blocks, BLOCK_SIZE), num_rows).at[block, rank % BLOCK_SIZE].set(order)
    block_group = jnp.searchsorted(last_block, jnp.arange(num_blocks), side="right")
    return Blocks(row=row, group=jnp.minimum(block_group, num_groups - 1))


def apply(
    function: Callable[[Float[Array, "rows d"], Any], Float[Array, "rows d"]],
    x: Float[Array, "b d"],
    by_group: Any,
    *,
    blocks: Blocks,
) -> Float[Array, "b d"]:
    """`function(rows, tree of their group)` for all rows; the leaves of `by_group` lead with g."""
    rows = jnp.take(x, blocks.row, axis=0, mode="fill", fill_value=0)
    moved = jax.vmap(function)(rows, jax.tree.map(lambda leaf: leaf[blocks.group], by_group))
    return jnp.zeros_like(x).at[blocks.row].set(moved, mode="drop")
