"""How every parameter is made: float32, and each axis with its logical name."""

from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

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
) -> Array:
    """A parameter of `module`; the names in `axes` are those of the sharding rules."""
    # Flax hands back the array itself; only the stored tree is boxed with the names.
    return cast(
        Array, module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    )
