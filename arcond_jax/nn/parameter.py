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


def parameter(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """A parameter of `module` in `dtype`, gathered along what cuts the batch.

    The names in `axes` are those of the sharding rules.
    """
    stored = _stored(module, name, init, shape, axes)
    return placement.gathered(stored, axes, dtype).astype(dtype)


def table(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: DTypeLike,
) -> jax.Array:
    """The same for rows to be looked up: moved in `dtype`, but of the type it is stored in.

    So that the gradients of equal rows are added in float32.
    """
    stored = _stored(module, name, init, shape, axes)
    return placement.gathered(stored, axes, dtype, looked_up=True).astype(stored.dtype)


def _stored(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> jax.Array:
    # Flax hands back the array itself; only the stored tree is boxed with the names.
    return jnp.asarray(
        module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    )
