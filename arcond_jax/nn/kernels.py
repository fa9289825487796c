"""Attention as one kernel of an accelerator, whose scores never reach the device's memory.

`choose` says which kernel, if any, computes what `attention.attend` is asked for.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, Float

from arcond_jax import placement

EINSUM, SPLASH, CUDNN = KINDS = ("einsum", "splash", "cudnn")

# Of fewer positions a kernel takes more memory than the scores that it saves, since what goes in
# and out of it lies padded: 377 MiB against 169 at 128 (benchmarks/attention.py, docs/pods.md).
MIN_LENGTH = 256
MAX_HEAD_DIM = 128  # of cuDNN on all its cards; of Splash where it is no multiple of that
LANES = 128  # Splash takes a multiple of so many positions
MAX_PADDING = 1.25  # times the length
MAX_BLOCK = 1152  # positions whose scores a TPU's vector memory holds, with those of their gradient


def choose(
    platform: str | None,
    dtype: DTypeLike,
    *,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    is_plain: bool,
) -> str:
    """Of `KINDS`; what the scores of a call are computed by.

    A kernel takes whole sequences in bfloat16; they are long enough for it, and nearly a multiple
    of what it works on at a time.

    Args:
      platform: What the program is for; None if for more than one.
      is_plain: Whether every query sees every key or those up to its own, and no weight is dropped.
    """
    if not is_plain or num_queries != num_keys or jnp.dtype(dtype) != jnp.bfloat16:
        return EINSUM
    if num_queries < MIN_LENGTH or head_dim > MAX_HEAD_DIM:
        return EINSUM
    if platform == "tpu" and _padded(num_queries) <= MAX_PADDING * num_queries:
        return SPLASH
    # jax refuses odd lengths where there is a gradient.
    if platform == "gpu" and head_dim % 8 == 0 and num_queries % 2 == 0 and _has_cudnn():
        return CUDNN
    return EINSUM


def splash(
    queries: Float[Array, "b l h k"],
    keys: Float[Array, "b l kv_heads k"],
    values: Float[Array, "b l kv_heads k"],
    *,
    is_causal: bool,
    interpret: bool = False,
) -> Float[Array, "b l h k"]:
    """Scaled dot-product attention by JAX's Splash kernel for TPUs, and its gradient by another.

    Weights stay in float32 until they are summed over.

    Args:
      interpret: Whether to compute on a CPU what the kernel would.

    Source: Dao et al. (2022), "FlashAttention"; `jax.experimental.pallas.ops.tpu`.
    """
    # Here, since few programs have it: Pallas takes a tenth of a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    length = queries.shape[1]
    size = _padded(length)
    if is_causal:
        mask: Any = splash_attention_mask.CausalMask((size, size))
    elif size == length:
        mask = splash_attention_mask.FullMask((size, size))
    else:
        seen = np.broadcast_to(np.arange(size) < length, (size, size))
        mask = splash_attention_mask.NumpyMask(np.array(seen))
    block = max(x for x in range(LANES, MAX_BLOCK + 1, LANES) if size % x == 0)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,  # two kernels for the gradient took more memory
    )

    def heads_first(x: Float[Array, "b l h k"]) -> Float[Array, "b h size k"]:
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, size - length), (0, 0)))

    def local(queries: Array, keys: Array, values: Array) -> Array:
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * queries.shape[2]),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        queries = queries / math.sqrt(queries.shape[-1])
        mixed = jax.vmap(kernel)(heads_first(queries), heads_first(keys), heads_first(values))
        return jnp.swapaxes(cast(Array, mixed), 1, 2)[:, :length]

    return _on_each_device(local, queries, keys, values)


def cudnn(
    queries: Float[Array, "b l h k"],
    keys: Float[Array, "b l kv_heads k"],
    values: Float[Array, "b l kv_heads k"],
    *,
    is_causal: bool,
) -> Float[Array, "b l h k"]:
    """Scaled dot-product attention by cuDNN, as `jax.nn.dot_product_attention` calls it."""
    local = functools.partial(
        jax.nn.dot_product_attention, is_causal=is_causal, implementation="cudnn"
    )
    return _on_each_device(local, queries, keys, values)


def _on_each_device(
    local: Callable[..., Array], queries: Array, keys: Array, values: Array
) -> Array:
    """A function of whole sequences and heads, where a mesh has cut batch and heads.

    No compiler cuts a kernel. Where key heads do not divide all heads stay whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(queries, keys, values)
    place: PartitionSpec = placement.spec(("batch", None, "heads", None), keys.shape, mesh)
    mapped = jax.shard_map(local, in_specs=(place,) * 3, out_specs=place, check_vma=False)
    return mapped(queries, keys, values)


def _padded(length: int) -> int:
    return -(-length // LANES) * LANES


@functools.cache
def _has_cudnn() -> bool:
    """Whether this process has NVIDIA cards and a cuDNN that computes attention on them."""
    x = jax.ShapeDtypeStruct((1, MIN_LENGTH, 1, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(cudnn, is_causal=True), x, x, x)
        card = jax.local_devices(backend="gpu")[0]
    except (RuntimeError, NotImplementedError):  # jax says so of what is missing or too old
        return False
    return int(card.compute_capability.split(".")[0]) >= 8  # cuDNN's kernel begins with Ampere
