"""How every parameter is made and read: stored float32, each axis with its logical name."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike

from arcond_jax import placement

Initializer = Callable[..., Array]

# LlamaGen's `initializer_range` (autoregressive/models/gpt.py), GPT-2's before it.
normal_init = nn.initializers.normal(0.02)
zeros_init = nn.initializers.zeros_init()
ones_init = nn.initializers.ones_init()

WHOLE = "whole"  # variables under this name are parameters that were gathered before


def parameter(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: DTypeLike = jnp.float32,
    *,
    looked_up: bool = False,
) -> jax.Array:
    """A parameter of `module` in `dtype`, gathered along what cuts the batch.

    A program may gather it before it is read again and again: it is written under `WHOLE`, where
    that can be written to, and read from there.

    Args:
      axes: Names of its axes, as the sharding rules have them.
      looked_up: Whether it is a table of rows. That is moved in `dtype` but comes as it is stored,
        so that the gradients of equal rows are added in float32.
    """
    used = jnp.float32 if looked_up else dtype
    if module.has_variable(WHOLE, name):
        return module.get_variable(WHOLE, name).astype(used)
    # Flax hands back the array itself; only the stored tree is boxed with the names.
    stored = jnp.asarray(
        module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    )
    whole = placement.gathered(stored, axes, dtype, looked_up=looked_up)
    if module.is_mutable_collection(WHOLE) and not module.is_initializing():
        module.put_variable(WHOLE, name, whole)
    return whole.astype(used)
