"""Laws of the blocks of rows: every row once, with the map of its group, in no more than needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcond_jax.transport import blocks as blocks_lib

LAYOUTS = {
    "fewer rows than groups": (7, 1000, lambda rng, b, g: rng.integers(0, g, b)),
    "all rows of one group": (64, 10, lambda rng, b, g: np.full(b, g - 1)),
    "as many rows of each": (96, 3, lambda rng, b, g: np.arange(b) % g),
    "many rows of few groups": (203, 4, lambda rng, b, g: rng.integers(0, g, b)),
    "one row": (1, 5, lambda rng, b, g: np.array([3])),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_row_is_moved_by_the_map_of_its_group(name):
    num_rows, num_groups, draw = LAYOUTS[name]
    rng = np.random.default_rng(0)
    group = jnp.asarray(draw(rng, num_rows, num_groups), jnp.int32)
    x = jnp.asarray(rng.normal(size=(num_rows, 3)), jnp.float32)
    scale = jnp.asarray(rng.normal(size=(num_groups, 3)), jnp.float32)

    @jax.jit
    def moved(x, group, scale):
        blocks = blocks_lib.make(group, num_groups)
        return blocks_lib.apply(lambda rows, one: rows * one, x, scale, blocks=blocks), blocks

    refined, blocks = moved(x, group, scale)
    np.testing.assert_array_equal(refined, x * scale[group])
    (rows,) = np.asarray(blocks.row)
    np.testing.assert_array_equal(np.sort(rows[rows < num_rows]), np.arange(num_rows))


def test_rows_in_pieces_stay_in_them():
    rng = np.random.default_rng(0)
    group = jnp.asarray(rng.integers(0, 10, 64), jnp.int32)
    x = jnp.asarray(rng.normal(size=(64, 3)), jnp.float32)
    scale = jnp.asarray(rng.normal(size=(10, 3)), jnp.float32)
    blocks = blocks_lib.make(group, 10, num_pieces=8)
    assert len(blocks.row) == 8
    for row in np.asarray(blocks.row):
        np.testing.assert_array_equal(np.sort(row[row < 8]), np.arange(8))
    moved = blocks_lib.apply(lambda rows, one: rows * one, x, scale, blocks=blocks)
    np.testing.assert_array_equal(moved, x * scale[group])


@pytest.mark.parametrize(("num_rows", "num_groups"), [(64, 1000), (64, 10), (1000, 10), (5, 5)])
def test_there_are_as_many_blocks_as_the_worst_groups_fill(num_rows, num_groups):
    """One row of each group, and the rest in one: no groups fill more blocks, so no fewer do."""
    spread = np.arange(min(num_rows, num_groups))
    group = np.concatenate([spread, np.zeros(num_rows - len(spread), int)])
    blocks = blocks_lib.make(jnp.asarray(group, jnp.int32), num_groups)
    (rows,) = np.asarray(blocks.row)
    assert len(rows) <= num_rows
    assert (rows < num_rows).any(axis=1).all()
    assert rows.shape[1] * num_groups < num_rows + num_groups  # no longer than an even share
