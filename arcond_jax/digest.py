"""A number for each array of a tree that changes with any one of its bits, on every mesh the same.

The bits of element i are weighted by the odd number 2i + 1 and summed modulo 2^32: a flipped bit
moves the sum by a power of two times an odd number, which is never 0. Integer sums are exact in
every order, so shards are summed where they lie.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


def of_tree(tree: Any) -> dict[str, int]:
    """The digest of each array by its path; leaves that are `...` have none."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if leaf is not ...
    }
    if not leaves:
        return {}
    return dict(zip(leaves, np.asarray(_of_leaves(list(leaves.values()))).tolist(), strict=True))


def of_json(value: Any) -> str:
    """SHA-256 of a value that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@jax.jit
def _of_leaves(leaves: list[Array]) -> UInt32[Array, " n"]:
    return jnp.stack([_of_array(leaf) for leaf in leaves])


def _of_array(x: Array) -> UInt32[Array, ""]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # Numbers of 64 bits become two of 32, along a new last axis.
    width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):  # no reshape, which would move shards
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(
            jnp.uint32, bits.shape, axis
        )
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)
