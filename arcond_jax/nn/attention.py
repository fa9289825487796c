"""Attention, and the cache of keys and values that makes sampling linear in length."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from arcond_jax import placement
from arcond_jax.nn import kernels

SCOPE = re.compile(rf"attention_({'|'.join(kernels.KINDS)})_(\d+)x(\d+)")


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Cache:
    """Keys and values of all layers at the positions seen so far.

    One array for all layers, carried through the scan over layers and written in place: as scanned
    input and output it would be copied at every step. Where that scan is unrolled, an array for
    each layer, the one whose turn it is first: of one array each layer's part would be copied out
    at every step. Heads come before positions, as the products of one query with its head's keys
    and values want them: the other way round a CPU turns the whole cache at every step.

    Attributes:
      index: Positions filled, of all rows or of each; the next token goes here.
    """

    keys: Float[Array, "depth b kv_heads l k"] | tuple[Float[Array, "b kv_heads l k"], ...]
    values: Float[Array, "depth b kv_heads l k"] | tuple[Float[Array, "b kv_heads l k"], ...]
    index: Int[Array, "*b"]

    @property
    def num_places(self) -> int:
        """Positions there is room for."""
        return jax.tree.leaves(self.keys)[0].shape[-2]


def empty_cache(
    *,
    depth: int,
    batch: int,
    length: int,
    kv_heads: int,
    head_dim: int,
    dtype: DTypeLike,
    unrolled: bool = False,
) -> Cache:
    """A cache with room for `length` positions.

    Args:
      unrolled: Whether the scan over layers is, so that each has its own arrays.
    """
    layer = jnp.zeros((batch, kv_heads, length, head_dim), dtype)
    zeros = (layer,) * depth if unrolled else jnp.broadcast_to(layer, (depth, *layer.shape))
    return Cache(keys=zeros, values=zeros, index=jnp.zeros((), jnp.int32))


def extended(
    cache: Cache,
    layer: Int[Array, ""],
    keys: Float[Array, "b n kv_heads k"],
    values: Float[Array, "b n kv_heads k"],
) -> tuple[Float[Array, "b l kv_heads k"], Float[Array, "b l kv_heads k"], Cache]:
    """Puts one layer's new keys and values behind those already there; `index` stays.

    There must be room for them: near the end they would lie over earlier ones.

    Returns:
      The layer's keys and values, those of places not yet filled included; the cache with them.
    """

    def extend(cached: Array | tuple[Array, ...], new: Array) -> tuple[Array, Any]:
        new = jnp.swapaxes(new, 1, 2)
        if isinstance(cached, tuple):
            first = _write(cached[0][None], 0, cache.index, new)[0]
            return first, (*cached[1:], first)
        cached = _write(cached, layer, cache.index, new)
        return jax.lax.dynamic_index_in_dim(cached, layer, keepdims=False), cached

    keys, all_keys = extend(cache.keys, keys)
    values, all_values = extend(cache.values, values)
    cache = dataclasses.replace(cache, keys=all_keys, values=all_values)
    return jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2), cache


def _write(
    cached: Float[Array, "depth b kv_heads l k"],
    layer: Int[Array, ""] | int,
    index: Int[Array, "*b"],
    new: Float[Array, "b kv_heads n k"],
) -> Float[Array, "depth b kv_heads l k"]:
    """Writes into one layer, each row at its index."""
    new = new.astype(cached.dtype)
    # Of one type also where jax counts in 64 bits.
    layer = jnp.asarray(layer, jnp.int32)
    if index.ndim:
        return _write_rows(cached, new, layer, index)
    start = [jnp.asarray(i, jnp.int32) for i in (layer, 0, 0, index, 0)]
    return jax.lax.dynamic_update_slice(cached, new[None], start)


def _write_rows(
    cached: Float[Array, "depth b kv_heads l k"],
    new: Float[Array, "b kv_heads n k"],
    layer: Int[Array, ""],
    index: Int[Array, " b"],
) -> Float[Array, "depth b kv_heads l k"]:
    """Writes each row at its own index; one slice for each row, which stays on its device."""
    start = jnp.stack([jnp.broadcast_to(layer, index.shape), index], axis=-1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, 3),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    return jax.lax.scatter(
        cached, start, new, numbers, unique_indices=True, mode=jax.lax.GatherScatterMode.CLIP
    )


def attend(
    queries: Float[Array, "b l h k"],
    keys: Float[Array, "b m kv_heads k"],
    values: Float[Array, "b m kv_heads k"],
    mask: Bool[Array, "l m"] | Bool[Array, "b l m"] | None = None,
    *,
    is_causal: bool = False,
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "b l h k"]:
    """Scaled dot-product attention; softmax in float32; grouped heads share a key in blocks.

    By a kernel where `kernels.choose` has one, with the same numbers but for rounding. The name of
    the scope says which and of how many queries and keys: `SCOPE`.

    Args:
      mask: True where a query may look; None lets every query see every key.
      is_causal: Whether a query sees the keys up to its own number, in the place of a mask.
      dropout: Applied to the weights, if given.

    Source: Vaswani et al. (2017), eq. 1; Ainslie et al. (2023) for grouped queries.
    """
    l, m = queries.shape[1], keys.shape[1]
    kind = kernels.choose(
        placement.platform(),
        queries.dtype,
        num_queries=l,
        num_keys=m,
        head_dim=queries.shape[3],
        is_plain=mask is None and dropout is None,
    )
    with jax.named_scope(f"attention_{kind}_{l}x{m}"):
        if kind == kernels.SPLASH:
            return kernels.splash(queries, keys, values, is_causal=is_causal)
        if kind == kernels.CUDNN:
            return kernels.cudnn(queries, keys, values, is_causal=is_causal)
        if is_causal:
            mask = jnp.arange(m) <= jnp.arange(l)[:, None]
        return _einsum(queries, keys, values, mask, dropout)


def _einsum(
    queries: Float[Array, "b l h k"],
    keys: Float[Array, "b m kv_heads k"],
    values: Float[Array, "b m kv_heads k"],
    mask: Bool[Array, "l m"] | Bool[Array, "b l m"] | None,
    dropout: Callable[[Array], Array] | None,
) -> Float[Array, "b l h k"]:
    b, l, h, k = queries.shape
    kv_heads = keys.shape[2]
    queries = queries.reshape(b, l, kv_heads, h // kv_heads, k)
    scores = jnp.einsum("blngk,bmnk->bnglm", queries, keys, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(k)
    if mask is not None:
        if mask.ndim == 3:
            mask = mask[:, None, None]
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    if dropout is not None:
        weights = dropout(weights)
    # Values first: the other way round a CPU takes twice the time for a few queries.
    return jnp.einsum("bmnk,bnglm->blngk", values, weights).reshape(b, l, h, k)
