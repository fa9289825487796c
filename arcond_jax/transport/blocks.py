"""Rows of many groups as a few dense blocks of one group each.

Every row has the map of its own group. Looked up row by row, the maps would be copied a thousand
times per slot; in blocks each copy serves many rows, and the arithmetic is matrix products. The
shapes depend on the sizes alone. A block holds as many rows as an even share of a group has, at
most MAX_ROWS. Of b rows in g groups at most k = min(b, g) groups have any; each of these begins one
block, and another block takes r more rows: blocks of r rows are at most k + (b - k) // r.

Rows that lie on several devices are as many pieces, each with blocks of its own, so that no device
asks another for rows.

The same layout serves mixtures of experts: Gale et al. (2023), "MegaBlocks", section 4.
"""

import functools
from collections.abc import Callable
from typing import Any, no_type_check

import flax.struct
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_ROWS = 32  # of a block, whose points and costs then stay within a core's cache


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Blocks:
    """Where each row goes: `row` numbers the rows of a piece; as many where a block is not full."""

    row: Int[Array, "pieces blocks rows"]
    group: Int[Array, "pieces blocks"]


def make(group: Int[Array, " b"], num_groups: int, *, num_pieces: int = 1) -> Blocks:
    """Lays the rows of each group into its own blocks.

    Args:
      group: In [0, num_groups).
      num_groups: That there are.
      num_pieces: Equal parts of the rows that are laid out apart; divides b.
    """
    pieces = group.reshape(num_pieces, group.shape[0] // num_pieces)
    return jax.vmap(functools.partial(_make, num_groups=num_groups))(pieces)


def apply(
    function: Callable[[Float[Array, "rows d"], Any], Float[Array, "rows d"]],
    x: Float[Array, "b d"],
    by_group: Any,
    *,
    blocks: Blocks,
) -> Float[Array, "b d"]:
    """`function(rows, tree of their group)` for all rows; the leaves of `by_group` lead with g."""

    def of_piece(x: Float[Array, "n d"], blocks: Blocks) -> Float[Array, "n d"]:
        rows = jnp.take(x, blocks.row, axis=0, mode="fill", fill_value=0)
        moved = jax.vmap(function)(rows, jax.tree.map(lambda leaf: leaf[blocks.group], by_group))
        return jnp.zeros_like(x).at[blocks.row].set(moved, mode="drop")

    num_pieces, (num_rows, width) = blocks.row.shape[0], x.shape
    if num_pieces == 1:  # a fifth faster on a CPU
        return of_piece(x, jax.tree.map(lambda leaf: leaf[0], blocks))
    pieces = x.reshape(num_pieces, num_rows // num_pieces, width)
    return jax.vmap(of_piece)(pieces, blocks).reshape(x.shape)


def _make(group: Int[Array, " n"], num_groups: int) -> Blocks:
    """Those of one piece."""
    num_rows = group.shape[0]
    size = jax.core.min_dim(MAX_ROWS, -(-num_rows // num_groups))  # of symbolic sizes as well
    num_filled = jax.core.min_dim(num_rows, num_groups)
    num_blocks = num_filled + (num_rows - num_filled) // size
    order = jnp.argsort(group, stable=True)
    counts = jnp.bincount(group, length=num_groups)
    first_row = jnp.cumsum(counts) - counts
    last_block = jnp.cumsum(-(-counts // size))
    first_block = last_block - -(-counts // size)

    sorted_group = group[order]
    rank = jnp.arange(num_rows) - first_row[sorted_group]
    block = first_block[sorted_group] + rank // size
    row = jnp.full((num_blocks, size), num_rows).at[block, rank % size].set(order)
    block_group = jnp.searchsorted(last_block, jnp.arange(num_blocks), side="right")
    return Blocks(row=row, group=jnp.minimum(block_group, num_groups - 1))
