"""Attention to the past, with or without a cache of it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from arcond_jax.nn import attention


def attend(
    queries: Float[Array, "b l h k"],
    keys: Float[Array, "b l kv_heads k"],
    values: Float[Array, "b l kv_heads k"],
    cache: attention.Cache | None,
    layer: Int[Array, ""],
    *,
    visible: Bool[Array, "b places"] | None = None,
    dropout: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "b l h k"], attention.Cache | None]:
    """Every token attends to itself and to those before it, the ones in the cache included.

    Args:
      layer: Where in the cache the keys and values of this layer lie.
      visible: Of all places there will ever be, those that others may see; each sees itself. None
        for all.

    Returns:
      The mixed values; the cache with the new keys and values in it, its index as it was.
    """
    if cache is None and visible is None:
        mixed = attention.attend(queries, keys, values, is_causal=True, dropout=dropout)
        return mixed, None
    start = jnp.zeros((), jnp.int32)
    if cache is not None:
        start = cache.index
        keys, values, cache = attention.extended(cache, layer, keys, values)
    # [l 1], or [b l 1] where each row has an index of its own.
    seen, place = jnp.arange(keys.shape[1]), _places(start, queries.shape[1])[..., None]
    mask = seen <= place
    if visible is not None:
        mask = mask & (visible[:, None, : len(seen)] | (seen == place))
    return attention.attend(queries, keys, values, mask, dropout=dropout), cache


def rows_of(
    table: Float[Array, "places *n"], cache: attention.Cache | None, count: int
) -> Float[Array, "..."]:
    """Of a table with a row for each place, those of the `count` tokens behind the cache.

    For each row of the batch where the cache has an index for each. Beyond the end the last stands.
    """
    if cache is None:
        return table[:count]
    if cache.index.ndim:
        return jnp.take(table, _places(cache.index, count), axis=0, mode="clip")
    return jax.lax.dynamic_slice_in_dim(table, cache.index, count)


def _places(start: Int[Array, "*b"], count: int) -> Int[Array, "*b count"]:
    return start[..., None] + jnp.arange(count)
